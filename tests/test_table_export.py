"""Tables as arrays and CSV: the numbers, their order, what stands beside them, and files that are whole or none."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.errors import AlreadyExists, ContractMismatch, ObjectNotFound, RecipeError, TableDamaged
from engine.storage import Store, open_store
from engine.table_export import export_arrays, export_csv
from engine.tables import open_any_table, open_table
from jobs.cli import main
from tests.embedding_tables import claim_embeddings, store_in_half_precision, write_part, write_table
from tests.prediction_tables import write_predictions


def numbers(rows: int, width: int = 3, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


SHARDS = {"z/one.tar": numbers(7), "b.tar": numbers(5, seed=1), "a-b/two.tar": numbers(2, seed=2)}
ORDER = ["a-b/two.tar", "b.tar", "z/one.tar"]  # of the paths; part names begin with other letters


@pytest.fixture
def embeddings(tmp_path: Path) -> Store:
    return write_table(tmp_path / "embeddings", SHARDS, 3)


def test_the_array_and_its_rows_are_in_the_order_of_shard_and_index(
    embeddings: Store, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    done = export_arrays(open_table(embeddings), tmp_path / "out", report=lambda *counts: told.append(counts))
    array_ND = np.load(tmp_path / "out" / "embeddings.npy", mmap_mode="r")
    np.testing.assert_array_equal(array_ND, np.concatenate([SHARDS[shard] for shard in ORDER]))
    assert array_ND.dtype == np.float32
    rows = pq.read_table(tmp_path / "out" / "rows.parquet")
    assert rows.column_names == [
        "key", "shard", "index", "label", "image_width", "image_height", "sha256",
    ]  # fmt: skip
    assert rows["key"].to_pylist() == [
        f"{shard}-{index:08d}" for shard in ORDER for index in range(len(SHARDS[shard]))
    ]
    assert (done.rows, done.width, told[0], told[-1]) == (14, 3, (0, 6), (6, 6))
    files = sorted(os.listdir(tmp_path / "out"))
    assert files == ["embeddings.npy", "rows.parquet"]
    assert done.bytes_written == sum((tmp_path / "out" / name).stat().st_size for name in files)


def test_an_array_has_the_precision_of_its_table(embeddings: Store, tmp_path: Path) -> None:
    store_in_half_precision(embeddings)
    export_arrays(open_table(embeddings), tmp_path / "out")
    array_ND = np.load(tmp_path / "out" / "embeddings.npy")
    assert array_ND.dtype == np.float16
    wanted_ND = np.concatenate([SHARDS[shard] for shard in ORDER]).astype(np.float16)
    np.testing.assert_array_equal(array_ND, wanted_ND)
    export_csv(open_table(embeddings), tmp_path / "rows.csv", with_embeddings=True)
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        found_ND = np.array([json.loads(row["embedding"]) for row in csv.DictReader(file)], np.float16)
    np.testing.assert_array_equal(found_ND, wanted_ND)


def test_an_export_is_replaced_only_when_asked(embeddings: Store, tmp_path: Path) -> None:
    table, folder = open_table(embeddings), tmp_path / "out"
    export_arrays(table, folder)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "embeddings.npy").read_bytes()
    with pytest.raises(AlreadyExists, match="embeddings.npy: there is something already"):
        export_arrays(table, folder)
    assert (folder / "embeddings.npy").read_bytes() == before
    write_table(tmp_path / "other", {"a.tar": numbers(2, seed=9)}, 3)
    export_arrays(open_table(open_store(str(tmp_path / "other"))), folder, overwrite=True)
    np.testing.assert_array_equal(np.load(folder / "embeddings.npy"), numbers(2, seed=9))
    assert pq.read_metadata(folder / "rows.parquet").num_rows == 2
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_where_the_folder_should_be_is_told(embeddings: Store, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AlreadyExists, match="out: there is a file now"):
        export_arrays(open_table(embeddings), tmp_path / "out")
    with pytest.raises(ObjectNotFound, match="no folder to write it into"):
        export_csv(open_table(embeddings), tmp_path / "absent" / "rows.csv")


def test_a_damaged_part_leaves_no_half_a_file(embeddings: Store, tmp_path: Path) -> None:
    table = open_table(embeddings)
    path = table.parts[-1][1].path
    embeddings.write(path, embeddings.read(path)[:-20])
    for export in (
        lambda: export_arrays(open_table(embeddings), tmp_path / "out"),
        lambda: export_csv(open_table(embeddings), tmp_path / "out" / "rows.csv"),
    ):
        with pytest.raises(TableDamaged):
            export()
        assert os.listdir(tmp_path / "out") == []


def test_parts_whose_rows_are_out_of_order_are_refused_by_name(embeddings: Store, tmp_path: Path) -> None:
    name, info = open_table(embeddings).parts[0]
    path = Path(embeddings.uri, info.path)
    rows = pq.read_table(path)
    pq.write_table(rows.take(list(reversed(range(rows.num_rows)))), path)
    with pytest.raises(TableDamaged, match=str(name)):
        export_csv(open_table(embeddings), tmp_path / "rows.csv")


def test_csv_has_every_column_but_embeddings_unless_they_are_wanted(
    embeddings: Store, tmp_path: Path
) -> None:
    export_csv(open_table(embeddings), tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert "embedding" not in rows[0]
    assert [row["shard"] for row in rows] == [shard for shard in ORDER for _ in SHARDS[shard]]
    assert (rows[0]["label"], rows[0]["image_width"], len(rows[0]["sha256"])) == ("", "8", 64)
    export_csv(open_table(embeddings), tmp_path / "rows.csv", with_embeddings=True, overwrite=True)
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        found_ND = np.array([json.loads(row["embedding"]) for row in csv.DictReader(file)], np.float32)
    np.testing.assert_array_equal(found_ND, np.concatenate([SHARDS[shard] for shard in ORDER]))


def test_predictions_are_csv_and_no_array(embeddings: Store, tmp_path: Path) -> None:
    keys = open_table(embeddings).read(["key"])["key"].to_pylist()
    labels = {key: None if key.endswith("1") else 'cat, "tabby"' for key in keys}
    table = open_any_table(write_predictions(tmp_path / "predictions", embeddings, labels))
    export_csv(table, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["key"]: row["label"] or None for row in rows} == labels
    assert json.loads(rows[0]["top_labels"]) == ['cat, "tabby"', "other"]
    assert [(row["shard"], int(row["index"])) for row in rows] == sorted(
        (row["shard"], int(row["index"])) for row in rows
    )
    with pytest.raises(ContractMismatch, match="has no embeddings"):
        export_arrays(table, tmp_path / "out")


def test_nothing_is_written_into_the_table_where_readers_would_take_it_for_a_part(
    embeddings: Store, tmp_path: Path
) -> None:
    before = sorted(embeddings.names())
    (tmp_path / "link").symlink_to(embeddings.uri)
    for place in (Path(embeddings.uri, "data"), Path(embeddings.uri, "out"), tmp_path / "link" / "data"):
        with pytest.raises(RecipeError, match="lies in the table"):
            export_arrays(open_table(embeddings), place)
        with pytest.raises(RecipeError, match="lies in the table"):
            export_csv(open_table(embeddings), place / "rows.csv")
    assert sorted(embeddings.names()) == before and not Path(embeddings.uri, "out").exists()


def test_a_table_without_parts_has_nothing_to_export_and_leaves_no_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "embeddings"))
    claim_embeddings(store, 5, 4)
    with pytest.raises(TableDamaged, match="no parts yet"):
        export_csv(open_table(store), tmp_path / "rows.csv")
    with pytest.raises(TableDamaged, match="no parts yet"):
        export_arrays(open_table(store), tmp_path / "out")
    assert os.listdir(tmp_path) == ["embeddings"]


def test_the_command_looks_at_the_uri_for_what_it_exports(
    embeddings: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", embeddings.uri, str(out)]) == 2
    assert "is a table: say --to npy or --to csv" in " ".join(capsys.readouterr().err.split())
    assert main(["export", embeddings.uri, str(out), "--to", "npy", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["width"], summary["kind"]) == (14, 3, "embeddings")
    assert summary["files"] == [str(out / "embeddings.npy"), str(out / "rows.parquet")]
    assert main(["export", embeddings.uri, str(out), "--to", "npy", "--embeddings"]) == 2
    assert main(["export", embeddings.uri, "s3://bucket/out", "--to", "npy"]) == 2
    assert "on this machine's disk" in " ".join(capsys.readouterr().err.split())
    assert main(["export", str(tmp_path / "absent"), str(out / "rows.csv"), "--to", "csv"]) == 1
    assert "no embeddings table here" in capsys.readouterr().err
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    assert main(["export", str(tmp_path / "bundle"), str(out), "--to", "csv"]) == 2
    assert "is a bundle" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "command",
    [
        ("export", "TABLE", "OUT", "--to", "csv"),
        ("similar", "TABLE", "--key", "a.tar-00000001"),
        ("duplicates", "TABLE"),
    ],
)
def test_shards_that_are_not_done_to_their_end_are_said(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "begun"))
    claim_embeddings(store, 3, 4)
    write_part(store, "a.tar", 0, False, 0, numbers(4))
    places = {"TABLE": store.uri, "OUT": str(tmp_path / "rows.csv")}
    assert main([places.get(word, word) for word in (*command, "--json")]) == 0
    out, err = capsys.readouterr()
    assert "note: 1 shards of the table are not done to their end" in err
    assert json.loads(out)["incomplete_shards"] == 1
