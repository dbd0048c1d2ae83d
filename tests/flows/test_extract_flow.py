"""Extraction end to end on one shared Ray: nothing lost, nothing doubled, nothing mixed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.storage import open_store
from engine.tables import embeddings_matrix, list_parts, open_table
from tests.flows.archives import crop_jpeg, extract_recipe, shard_bytes, write_recipe, write_shards
from tests.flows.conftest import Engine
from tests.shards.archives import member, tar_bytes


def keys_of(table: Path) -> Counter[str]:
    return Counter(open_table(open_store(str(table))).read(["key"])["key"].to_pylist())


def test_every_sample_is_a_row_or_a_reject_and_rows_say_what_they_are(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    good, label = crop_jpeg(1)
    members = [
        member("a/good.jpg", good),
        member("a/good.cls", label.encode()),
        member("a/good.json", b'{"camera": {"id": 17}}'),
        member("b/truncated.jpg", good[:200]),
        member("c/only-text.cls", b"flower"),
        member("d/empty.jpg", b""),
        member("e/no-label.jpg", good),
    ]
    source.write("mixed.tar", tar_bytes(members))
    recipe = extract_recipe(
        tmp_path, source.uri, str(tmp_path / "table"), "limits: {max_reject_fraction: 0.6}"
    )
    settings = ("--set", "source.metadata=['json:camera.id']", "--set", "output.dtype=float16")
    ended = engine("extract", recipe, "--json", *settings)
    assert ended.code == 0, ended.stderr
    assert (ended.summary["rows"], ended.summary["rejects"]) == (2, 3)
    assert ended.summary["rejects_by_reason"] == {"truncated_image": 1, "no_image": 1, "empty_sample": 1}
    table = open_table(open_store(str(tmp_path / "table")))
    assert embeddings_matrix(table.read(["embedding"])["embedding"]).dtype == np.float16
    rows = table.read(["key", "index", "label", "image_width", "shard", "id"]).to_pylist()
    assert rows == [
        {"key": "a/good", "index": 0, "label": label, "image_width": 24, "shard": "mixed.tar", "id": "17"},
        {"key": "e/no-label", "index": 4, "label": None, "image_width": 24, "shard": "mixed.tar", "id": None},
    ]
    rejects = pq.read_table(tmp_path / "table" / "rejects").sort_by("index").to_pylist()
    assert [(row["key"], row["stage"], row["error"]) for row in rejects] == [
        ("b/truncated", "decode", "truncated_image"),
        ("c/only-text", "read", "no_image"),
        ("d/empty", "read", "empty_sample"),
    ]


def test_rejects_over_the_budget_exit_3_again_on_a_rerun_with_the_table_intact(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    good, _ = crop_jpeg(1)
    source.write("a.tar", tar_bytes([member(f"{i}.jpg", good if i else b"") for i in range(5)]))
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    for _ in range(2):
        ended = engine("extract", recipe, "--json")
        assert ended.code == 3
        assert "the table has 1 rejects" in ended.stderr and "empty_sample 1" in ended.stderr
        assert ended.summary["rejects"] == 1
    assert keys_of(tmp_path / "table").total() == 4


def test_a_rerun_reads_nothing_but_listings(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    keys = write_shards(source, shards=3, images=70)
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    assert engine("extract", recipe).code == 0
    assert keys_of(tmp_path / "table") == Counter(keys)
    parts = sorted((tmp_path / "table" / "data").iterdir())
    before = {path: path.stat().st_mtime_ns for path in parts}
    for path in [*(tmp_path / "shards").iterdir(), *parts]:  # same size and time, nothing left to read
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    ended = engine("extract", recipe, "--json")
    assert ended.code == 0, ended.stderr
    assert (ended.summary["parts_written"], ended.summary["bytes_read"], ended.summary["rows"]) == (0, 0, 0)
    assert (ended.summary["shards_skipped"], ended.summary["shards_total"]) == (3, 3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "table" / "data").iterdir()} == before


def test_a_half_done_shard_resumes_at_its_first_missing_part(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    source.write("a.tar", shard_bytes(0, 300))
    table = tmp_path / "table"
    recipe = extract_recipe(tmp_path, source.uri, str(table))
    full = engine("extract", recipe, "--json")
    assert full.summary["parts_written"] == 5
    calm = open_table(open_store(str(table))).read(["key", "embedding"]).sort_by("key")
    size = source.info("a.tar").size
    for lost, parts_again, most_bytes in (
        ([3, 4], 2, size * 0.5),
        ([1], 1, size),
        ([0, 1, 2, 3, 4], 5, size),
    ):
        for number, path in enumerate(sorted((table / "data").iterdir())):
            if number in lost:
                path.unlink()
        ended = engine("extract", recipe, "--json")
        assert ended.code == 0, ended.stderr
        assert ended.summary["parts_written"] == parts_again
        assert 0 < ended.summary["bytes_read"] <= most_bytes
        again = open_table(open_store(str(table))).read(["key", "embedding"]).sort_by("key")
        assert again["key"].equals(calm["key"])
        np.testing.assert_allclose(
            embeddings_matrix(again["embedding"]), embeddings_matrix(calm["embedding"]), atol=1e-5
        )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output.dtype=float16", 'output.dtype: the table has "float32", this run "float16"'),
        ("backbone.input_size=64", "backbone.input_size: the table has 32, this run 64"),
        ("backbone.seed=4", "fingerprint: the table has"),
        ("source.label=null", 'source.label: the table has "cls", this run null'),
        ("limits.max_pixels=1000", "limits.max_pixels: the table has 178956970, this run 1000"),
        ("output.rows_per_part=128", "output.rows_per_part: the table has 64, this run 128"),
    ],
)
def test_a_changed_contract_is_refused_with_both_values(
    engine: Engine, small_table: Path, override: str, said: str
) -> None:
    before = sorted(path.name for path in (small_table / "table" / "data").iterdir())
    ended = engine("extract", small_table / "extract.yaml", "--set", override)
    assert ended.code == 1
    assert said in ended.stderr
    assert sorted(path.name for path in (small_table / "table" / "data").iterdir()) == before


@pytest.mark.parametrize(
    "override", ["runtime.batch_size=7", "compute.decode_threads=3", "source.pattern=0*.tar"]
)
def test_what_is_not_in_the_contract_may_change(engine: Engine, small_table: Path, override: str) -> None:
    assert engine("extract", small_table / "extract.yaml", "--set", override).code == 0


@pytest.fixture(scope="module")
def small_table(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one shard, its table, and the recipe that made it."""
    from jobs.cli import main

    folder = tmp_path_factory.mktemp("small")
    write_shards(open_store(str(folder / "shards")), shards=1, images=5)
    recipe = extract_recipe(folder, str(folder / "shards"), str(folder / "table"))
    assert main(["extract", str(recipe)]) == 0
    return folder


def test_shards_whose_names_would_collide_and_an_empty_one_all_come_through(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    for number, path in enumerate(["a/b__c.tar", "a__b/c.tar", "_x.tar", "x.tar", "a/b/c.tar"]):
        source.write(path, shard_bytes(number * 3, 3))
    source.write("empty.tar", tar_bytes([]))
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["rows"], ended.summary["parts_written"]) == (0, 15, 6)
    assert engine("extract", recipe, "--json").summary["shards_skipped"] == 6
    assert keys_of(tmp_path / "table") == Counter(f"{number:06d}" for number in range(15))


def test_a_replaced_shard_leaves_one_version(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    source.write("a.tar", shard_bytes(0, 130))
    source.write("b.tar", shard_bytes(500, 3))
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    assert engine("extract", recipe).code == 0
    source.write("a.tar", shard_bytes(1000, 70))
    ended = engine("extract", recipe, "--json")
    assert ended.code == 0, ended.stderr
    assert (ended.summary["shards_skipped"], ended.summary["rows"]) == (1, 70)
    wanted = [*range(1000, 1070), *range(500, 503)]
    assert keys_of(tmp_path / "table") == Counter(f"{number:06d}" for number in wanted)
    assert len(list(list_parts(open_store(str(tmp_path / "table"))))) == 3


def test_a_damaged_shard_keeps_its_good_parts_and_fails_the_run(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    whole = shard_bytes(0, 150)
    source.write("a.tar", whole[: len(whole) * 2 // 3])
    source.write("b.tar", shard_bytes(500, 3))
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    ended = engine("extract", recipe, "--json")
    assert ended.code == 1
    assert (ended.summary["shards_failed"], ended.summary["parts_written"]) == (1, 2)
    assert "a.tar" in ended.stderr and "limits.max_failed_shards" in ended.stderr
    tolerant = engine("extract", recipe, "--json", "--set", "limits.max_failed_shards=1")  # tries it again
    assert (tolerant.code, tolerant.summary["shards_failed"], tolerant.summary["parts_written"]) == (0, 1, 0)
    source.write("a.tar", whole)
    assert engine("extract", recipe, "--json").code == 0
    assert keys_of(tmp_path / "table") == Counter(f"{number:06d}" for number in [*range(150), 500, 501, 502])


def test_plan_says_what_would_be_done_and_touches_nothing(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    write_shards(source, shards=2, images=3)
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    planned = engine("extract", recipe, "--plan", "--json")
    assert planned.code == 0
    assert (planned.summary["shards_pending"], planned.summary["rows_per_part"]) == (2, 64)
    assert not (tmp_path / "table").exists()


def test_a_source_that_is_not_there_is_an_error_and_leaves_no_table(engine: Engine, tmp_path: Path) -> None:
    recipe = extract_recipe(tmp_path, str(tmp_path / "unmounted"), str(tmp_path / "table"))
    for arguments in ([], ["--plan"]):
        ended = engine("extract", recipe, *arguments)
        assert ended.code == 1
        assert "unmounted: no shards here" in ended.stderr
    assert not (tmp_path / "table").exists()


def test_a_cluster_that_does_not_answer_is_one_message_within_seconds(
    engine_process: Engine, small_table: Path
) -> None:
    settings = ("--set", "compute.address=127.0.0.1:9", "--set", f"output.uri={small_table}/elsewhere")
    ended = engine_process("extract", small_table / "extract.yaml", *settings)
    assert ended.code == 1
    assert "127.0.0.1:9" in ended.stderr and "way out" in ended.stderr and "Traceback" not in ended.stderr


def test_gpus_that_a_local_ray_does_not_have_are_refused(engine_process: Engine, small_table: Path) -> None:
    settings = ("--set", "compute.gpus_per_actor=1", "--set", f"output.uri={small_table}/elsewhere")
    ended = engine_process("extract", small_table / "extract.yaml", *settings)
    assert ended.code == 1
    assert "this machine cannot hold" in ended.stderr and "1 GPUs" in ended.stderr


@pytest.mark.parametrize("override", ["labels.label=species", "split.column=part"])
def test_a_wrong_column_for_fit_is_named_with_the_columns_there_are(
    engine: Engine, small_table: Path, override: str
) -> None:
    text = f"embeddings: {{uri: {small_table}/table}}\noutput: {{uri: {small_table}/bundle}}\n"
    recipe = write_recipe(small_table, "fit.yaml", text)
    ended = engine("fit", recipe, "--plan", "--set", override)
    assert ended.code == 1
    assert override.split("=")[1] in ended.stderr and "image_width" in ended.stderr
    assert "delete" not in ended.stderr
