"""Copies of tables in few sorted files: the same rows in order, of the wanted size, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import compaction
from engine.compaction import compact_table, row_sum
from engine.errors import AlreadyExists, RecipeError, StorageError, TableDamaged
from engine.storage import StorageConfig, Store, open_store
from engine.tables import Table, open_any_table, open_table, read_part
from jobs.cli import main
from tests.embedding_tables import claim_embeddings, store_in_half_precision, write_table
from tests.prediction_tables import write_predictions


def numbers(rows: int, width: int = 64, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


SHARDS = {f"{name}.tar": numbers(rows, seed=rows) for name, rows in (("q", 211), ("b", 307), ("m", 103))}


@pytest.fixture
def embeddings(tmp_path: Path) -> Store:
    return write_table(tmp_path / "embeddings", SHARDS, 50)


def sorted_rows(table: Table) -> pa.Table:
    columns = table.column_names()
    keys = [("key", "ascending"), ("shard", "ascending"), ("index", "ascending")]
    return table.read(columns).replace_schema_metadata(None).sort_by(keys)


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs, batches and row groups although the table is small."""
    monkeypatch.setattr(compaction, "RUN_BYTES", 40_000)
    monkeypatch.setattr(compaction, "GROUP_BYTES", 10_000)
    monkeypatch.setattr(compaction, "_BATCH_ROWS", 17)


@pytest.mark.usefixtures("small_runs")
def test_the_copy_has_the_same_rows_sorted_by_key_in_files_of_the_wanted_size(
    embeddings: Store, tmp_path: Path
) -> None:
    table, target, told = open_table(embeddings), open_store(str(tmp_path / "copy")), []
    done = compact_table(table, target, 50_000, report=lambda *news: told.append(news))
    size = sum(info.size for _, info in table.parts)
    assert done.files == -(-size // 50_000) == 5
    names = [f"rows-{number:05d}.parquet" for number in range(5)]
    assert sorted(os.listdir(target.uri)) == ["_compaction.json", *names]
    files = [pq.read_table(Path(target.uri, name)) for name in names]
    wanted = sorted_rows(table)
    assert pa.concat_tables(files).equals(wanted)
    assert files[0].schema.equals(wanted.schema)
    assert {621 / 5 * 0.8 < file.num_rows < 621 / 5 * 1.2 for file in files} == {True}
    metadata = pq.read_metadata(Path(target.uri, names[0]))
    assert metadata.num_row_groups > 2
    assert [column.column_index for column in metadata.row_group(0).sorting_columns] == [0, 1, 2]
    assert (done.rows, done.parts, done.incomplete_shards) == (621, len(table.parts), 0)
    assert done.checksum == f"{row_sum(wanted).checksum:032x}"
    record = json.loads(target.read("_compaction.json"))
    assert (record["state"], record["source"], record["rows"]) == ("whole", embeddings.uri, 621)
    assert [news[0] for news in told if news[1] == news[2]] == [
        "parts read",
        "files written",
        "files read again",
    ]


def test_small_tables_become_one_file_and_predictions_too(embeddings: Store, tmp_path: Path) -> None:
    keys = open_table(embeddings).read(["key"])["key"].to_pylist()
    labels = {key: None if key.endswith("7") else key[0] for key in keys}
    table = open_any_table(write_predictions(tmp_path / "predictions", embeddings, labels))
    done = compact_table(table, open_store(str(tmp_path / "copy")))
    assert (done.files, done.rows, done.kind) == (1, 621, "predictions")
    assert pq.read_table(tmp_path / "copy" / "rows-00000.parquet").equals(sorted_rows(table))


@pytest.mark.usefixtures("small_runs")
def test_embeddings_in_half_precision_stay_what_they_are(embeddings: Store, tmp_path: Path) -> None:
    store_in_half_precision(embeddings)
    compact_table(open_table(embeddings), open_store(str(tmp_path / "copy")))
    copy = pq.read_table(tmp_path / "copy" / "rows-00000.parquet")
    assert copy.schema.field("embedding").type.value_type == pa.float16()
    assert copy.equals(sorted_rows(open_table(embeddings)))


@pytest.mark.usefixtures("small_runs")
def test_equal_keys_are_kept_and_sorted_by_shard_and_index(tmp_path: Path) -> None:
    store = write_table(tmp_path / "embeddings", {"b.tar": numbers(40), "a.tar": numbers(40)}, 16)
    for _, info in open_table(store).parts:
        part = read_part(store, info)
        same = pa.array(["k"] * part.num_rows, pa.string())
        pq.write_table(
            part.set_column(0, part.schema.field("key"), same).cast(part.schema), Path(store.uri, info.path)
        )
    done = compact_table(open_table(store), open_store(str(tmp_path / "copy")), 5_000)
    rows = pq.read_table(tmp_path / "copy", columns=["shard", "index"]).to_pylist()
    assert done.files > 2
    assert [(row["shard"], row["index"]) for row in rows] == [
        (s, i) for s in ("a.tar", "b.tar") for i in range(40)
    ]


def test_the_checksum_forgets_order_and_nothing_else() -> None:
    schema = pa.schema([("key", pa.string()), ("embedding", pa.list_(pa.float32(), 2))])
    rows = pa.table({"key": ["a", "b", "c"], "embedding": [[1, 2], [3, 4], [5, 6]]}, schema=schema)
    whole = row_sum(rows)
    assert row_sum(rows.take([2, 0, 1])) == whole
    assert row_sum(rows.slice(0, 1)) + row_sum(rows.slice(1)) == whole
    assert row_sum(rows.take([0, 0, 2])) != whole  # one lost, one doubled
    swapped = rows.set_column(0, "key", pa.array(["b", "a", "c"]))  # every value is there, in other rows
    least = pa.array([[1, 2], [3, 4], [5, np.nextafter(np.float32(6), np.float32(7))]], schema.field(1).type)
    assert row_sum(swapped) != whole
    assert row_sum(rows.set_column(1, schema.field(1), least)) != whole
    assert row_sum(rows.slice(0, 0)).rows == 0


class ForgetfulStore:
    """A real store on a disk that flips one bit of each file it is given; the rest is the disk's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, path: str, data: bytes) -> Any:
        place = len(data) // 4  # among the numbers of the embeddings
        return self._store.write(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_a_store_that_changes_one_bit_is_found_out(tmp_path: Path) -> None:
    store = write_table(tmp_path / "embeddings", {"a.tar": numbers(50, 512)}, 50)
    target = ForgetfulStore(open_store(str(tmp_path / "copy")))
    with pytest.raises(TableDamaged, match="the copy is not what was read") as found:
        compact_table(open_table(store), target)  # type: ignore[arg-type]
    assert "50 rows" in str(found.value.found) and "50 rows" in str(found.value.wanted)
    assert json.loads(target.read("_compaction.json"))["state"] == "unfinished"


def test_what_is_there_is_never_written_over(embeddings: Store, tmp_path: Path) -> None:
    table, target = open_table(embeddings), open_store(str(tmp_path / "copy"))
    target.write("mine.txt", b"mine")
    with pytest.raises(AlreadyExists, match="not empty"):
        compact_table(table, target)
    assert list(target.names()) == ["mine.txt"]
    target.delete("mine.txt")
    compact_table(table, target)
    with pytest.raises(AlreadyExists) as refused:
        compact_table(table, target)
    assert refused.value.found == "a whole copy"


def test_interrupted_work_is_begun_again_but_not_that_on_another_table_nor_beside_other_files(
    embeddings: Store, tmp_path: Path
) -> None:
    table, target = open_table(embeddings), open_store(str(tmp_path / "copy"))

    def stop(step: str, done: int, total: int) -> None:
        if step == "files written" and done == 2:
            raise KeyboardInterrupt

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(KeyboardInterrupt):
        compact_table(table, target, 50_000, scratch, stop)
    assert len(list(target.names())) == 3 and os.listdir(scratch) == []
    other = write_table(tmp_path / "other", {"a.tar": numbers(3)}, 3)
    with pytest.raises(AlreadyExists) as refused:
        compact_table(open_table(other), target)
    assert refused.value.found == "unfinished work on another table"
    target.write("photos/mine.txt", b"mine")
    with pytest.raises(AlreadyExists, match="beside this command's unfinished work") as refused:
        compact_table(table, target)
    assert refused.value.found == "photos/mine.txt"
    assert target.read("photos/mine.txt") == b"mine" and len(list(target.names())) == 4
    target.delete("photos/mine.txt")
    done = compact_table(table, target, 300_000)
    assert done.files == 1
    assert sorted(target.names()) == ["_compaction.json", "rows-00000.parquet"]


def test_a_copy_in_the_table_files_too_large_and_a_table_without_parts_are_refused(
    embeddings: Store, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="lies in the table"):
        compact_table(open_table(embeddings), embeddings.sub("copy"))
    assert not Path(embeddings.uri, "copy").exists()
    with pytest.raises(RecipeError, match="written in one request"):
        compact_table(open_table(embeddings), open_store(str(tmp_path / "copy")), 5 << 30)
    empty = open_store(str(tmp_path / "empty"))
    claim_embeddings(empty, 3, 4)
    with pytest.raises(TableDamaged, match="no parts yet"):
        compact_table(open_table(empty), open_store(str(tmp_path / "copy")))
    assert not (tmp_path / "copy").exists()


def test_a_disk_without_room_is_told_before_anything_is_read(
    embeddings: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(compaction.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(StorageError, match="no room to sort the table") as refused:
        compact_table(open_table(embeddings), open_store(str(tmp_path / "copy")))
    assert "--scratch" in str(refused.value)
    with pytest.raises(StorageError, match="cannot sort on .*absent"):
        compact_table(open_table(embeddings), open_store(str(tmp_path / "copy")), scratch=tmp_path / "absent")


def test_a_table_in_a_bucket_is_copied_within_it(
    tmp_path: Path, s3_uri: str, s3_config: StorageConfig, embeddings: Store
) -> None:
    bucket = open_store(f"{s3_uri}/embeddings", s3_config)
    for info in embeddings.list():
        bucket.write(info.path, embeddings.read(info.path))
    target = open_store(f"{s3_uri}/copy", s3_config)
    done = compact_table(open_table(bucket), target, 100_000)
    files = [pa.BufferReader(target.read(f"rows-{number:05d}.parquet")) for number in range(done.files)]
    assert done.files == 3
    assert pa.concat_tables(map(pq.read_table, files)).equals(sorted_rows(open_table(embeddings)))


def test_the_command_tells_what_it_made(
    embeddings: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compact", embeddings.uri, str(tmp_path / "copy"), "--file-size"]
    assert main([*arguments, "512 bananas"]) == 2
    assert "512MiB" in capsys.readouterr().err
    assert main([*arguments, "100kB", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["verb"], summary["rows"], summary["files"]) == ("compact", 621, 3)
    assert main([*arguments, "100kB"]) == 1
    assert "a whole copy" in capsys.readouterr().err
