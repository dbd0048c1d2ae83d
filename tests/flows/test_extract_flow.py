"""Extraction end to end on one shared Ray: nothing lost, nothing doubled, nothing mixed."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.parts import path16_of
from engine.shards.files import is_border
from engine.storage import open_store
from engine.tables import embeddings_matrix, list_parts, open_table
from tests.commands import Engine, rows_of
from tests.flows.archives import (
    crop_jpeg,
    crop_label,
    extract_recipe,
    shard_bytes,
    write_recipe,
    write_shards,
)
from tests.processes import kinds_seen_below
from tests.shards.archives import member, tar_bytes


def keys_of(table: Path) -> Counter[str]:
    return Counter(open_table(open_store(str(table))).read(["key"])["key"].to_pylist())


def test_every_sample_is_a_row_or_a_reject_and_over_the_budget_a_rerun_says_so_again(
    engine: Engine, tmp_path: Path
) -> None:
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
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    settings = ("--set", "source.metadata=['json:camera.id']", "--set", "output.dtype=float16")
    for budget, code, rows in [(0.6, 0, 2), (0.5, 3, 0), (0.5, 3, 0)]:
        ended = engine(
            "extract", recipe, "--json", *settings, "--set", f"limits.max_reject_fraction={budget}"
        )
        assert ended.code == code, ended.stderr
        assert (ended.summary["rows"], ended.summary["rejects"]) == (rows, 3)
        assert ended.summary["rejects_by_reason"] == {"truncated_image": 1, "no_image": 1, "empty_sample": 1}
    assert "the table has 3 rejects" in ended.stderr and "empty_sample 1" in ended.stderr
    replayed = engine("extract", recipe, "--json", "--replay-rejects", *settings)
    assert (replayed.code, replayed.summary["parts_written"], replayed.summary["rejects"]) == (3, 1, 3)
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


def test_shards_whose_names_would_collide_come_through_and_a_rerun_reads_nothing_but_listings(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    for number, path in enumerate(["a/b__c.tar", "a__b/c.tar", "_x.tar", "x.tar", "a/b/c.tar"]):
        source.write(path, shard_bytes(number * 70, 70))
    source.write("empty.tar", tar_bytes([]))
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["rows"], ended.summary["parts_written"]) == (0, 350, 11)
    assert keys_of(tmp_path / "table") == Counter(f"{number:06d}" for number in range(350))

    parts = sorted((tmp_path / "table" / "data").iterdir())
    before = {path: path.stat().st_mtime_ns for path in parts}
    for path in [*(tmp_path / "shards").rglob("*.tar"), *parts]:  # same size and time, nothing left to read
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    ended = engine("extract", recipe, "--json")
    assert ended.code == 0, ended.stderr
    assert (ended.summary["parts_written"], ended.summary["bytes_read"], ended.summary["rows"]) == (0, 0, 0)
    assert (ended.summary["shards_skipped"], ended.summary["shards_total"]) == (6, 6)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "table" / "data").iterdir()} == before


def test_a_half_done_shard_resumes_at_its_first_missing_part(engine: Engine, tmp_path: Path) -> None:
    source = open_store(str(tmp_path / "shards"))
    shards = {"tail.tar": [3, 4], "middle.tar": [1], "all.tar": [0, 1, 2, 3, 4], "none.tar": []}
    for place, shard in enumerate(shards):
        source.write(shard, shard_bytes(place * 300, 300))
    table = tmp_path / "table"
    recipe = extract_recipe(tmp_path, source.uri, str(table))
    columns = ["key", "sha256", "embedding"]
    assert engine("extract", recipe, "--json").summary["parts_written"] == 20
    calm = open_table(open_store(str(table))).read(columns).sort_by("key")
    for shard, lost in shards.items():
        parts = sorted((table / "data").glob(f"*.{path16_of(shard)}.*"))
        assert len(parts) == 5
        for number in lost:
            parts[number].unlink()

    ended = engine("extract", recipe, "--json")
    assert ended.code == 0, ended.stderr
    assert (ended.summary["parts_written"], ended.summary["shards_skipped"]) == (8, 1)
    size = source.info("all.tar").size
    # The tail is read from part 3 on, the middle shard to the end of part 1 at most, one shard whole.
    assert size < ended.summary["bytes_read"] < size * (1 + 0.5 + 0.6)
    again = open_table(open_store(str(table))).read(columns).sort_by("key")
    assert again.drop_columns(["embedding"]).equals(calm.drop_columns(["embedding"]))
    np.testing.assert_allclose(
        embeddings_matrix(again["embedding"]), embeddings_matrix(calm["embedding"]), rtol=1e-4, atol=1e-6
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


def test_a_profile_stops_early_says_what_held_it_up_and_what_it_did_stays(
    engine: Engine, tmp_path: Path
) -> None:
    source, table = open_store(str(tmp_path / "shards")), tmp_path / "table"
    keys = write_shards(source, shards=12, images=320)
    recipe = extract_recipe(tmp_path, source.uri, str(table))
    settings = ("--set", "runtime={kind: auto}", "--set", "compute.node_price_per_hour=0.5")
    profiled = engine("extract", recipe, "--json", "--profile", "300", *settings)
    assert profiled.code == 0, profiled.stderr
    found = profiled.summary
    assert 300 <= found["rows"] < len(keys)
    assert found["bottleneck"] in ("read", "decode", "embed", "write", "scheduling") and found["advice"]
    assert found["utilisation"].keys() == {"read", "decode", "embed", "write"}
    rate = found["steady_images_per_second"]
    assert found["cost_per_million_images"] == pytest.approx(0.5 * 1e6 / rate / 3600, rel=0.01)

    record = json.loads((table / "_table.json").read_text())
    tried = {trial["kind"]: trial["images_per_second"] for trial in record["runtimes_tried"]}
    assert tried.keys() == {"tensorflow", "openvino"}
    assert record["runtime"]["kind"] == max(tried, key=lambda kind: tried[kind])

    finished = engine("extract", recipe, "--json", *settings)
    assert finished.code == 0, finished.stderr
    assert finished.summary["parts_written"] <= 12 * 5 - found["parts_written"]
    assert keys_of(table) == Counter(keys)


def test_a_precision_that_loses_accuracy_is_refused_and_leaves_no_table(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    write_shards(source, shards=1, images=4)
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"))
    ended = engine("extract", recipe, "--set", "runtime.precision=bfloat16")
    assert ended.code == 2
    assert "only 4 images were found to judge it by" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "table" / "_table.json").exists()


def test_a_precision_that_the_table_has_settled_is_not_judged_again_by_what_comes_later(
    engine: Engine, tmp_path: Path
) -> None:
    source, table = open_store(str(tmp_path / "shards")), tmp_path / "table"
    source.write("0.tar", shard_bytes(0, 40))
    recipe = extract_recipe(tmp_path, source.uri, str(table))
    runtime = ("--set", "runtime={kind: openvino, precision: auto}")
    first = engine("extract", recipe, "--json", *runtime)
    assert first.code == 0, first.stderr
    record = (table / "_table.json").read_bytes()
    assert {trial["precision"] for trial in json.loads(record)["runtimes_tried"]} == {"float32", "bfloat16"}
    settled = json.loads(record)["runtime"]["precision"]
    source.write("1.tar", shard_bytes(40, 3))  # too few to judge anything by
    for precision in ("auto", settled):
        source.write(f"{precision}.tar", shard_bytes(50, 2))
        later = engine("extract", recipe, "--json", *runtime, "--set", f"runtime.precision={precision}")
        assert later.code == 0, later.stderr
        assert later.summary["rows"] >= 2
    assert (table / "_table.json").read_bytes() == record


@pytest.fixture(scope="module")
def small_table(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one shard, its table, and the recipe that made it."""
    from jobs.cli import main

    folder = tmp_path_factory.mktemp("small")
    write_shards(open_store(str(folder / "shards")), shards=1, images=5)
    recipe = extract_recipe(folder, str(folder / "shards"), str(folder / "table"))
    assert main(["extract", str(recipe)]) == 0
    return folder


def test_a_large_shard_is_decoded_by_other_tasks_than_the_one_that_reads_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_store(str(tmp_path / "shards"))
    source.write("large.tar", shard_bytes(0, 640))
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"), "compute: {decode_tasks: 3}")
    monkeypatch.setattr("engine.sizing.SPLIT_SHARD_BYTES", 1)
    planned = json.loads(engine("extract", recipe, "--plan", "--json").stdout)
    assert (planned["read_tasks"], planned["tasks_that_only_decode"]) == (1, 2)
    with kinds_seen_below(os.getpid()) as seen:
        ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["rows"], ended.summary["parts_written"]) == (0, 640, 10), ended.stderr
    assert {"reader", "decoder", "actor"} <= seen
    rows = rows_of(tmp_path / "table", ["key", "label"])
    assert rows["key"].to_pylist() == [f"{number:06d}" for number in range(640)]
    assert rows["label"].to_pylist() == [crop_label(number) for number in range(640)]


def test_a_damaged_shard_keeps_its_good_parts_and_a_replaced_one_leaves_one_version(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    whole = shard_bytes(0, 150)
    source.write("damaged.tar", whole[: len(whole) * 2 // 3])
    source.write("changing.tar", shard_bytes(500, 130))
    source.write("steady.tar", shard_bytes(700, 3))
    table = open_store(str(tmp_path / "table"))
    recipe = extract_recipe(tmp_path, source.uri, table.uri)
    ended = engine("extract", recipe, "--json")
    assert ended.code == 1
    assert (ended.summary["shards_failed"], ended.summary["parts_written"]) == (1, 1 + 3 + 1)
    ((failed, reason),) = ended.summary["failed_shards"].items()
    assert failed in ended.stderr and reason.splitlines()[0] in ended.stderr
    assert "damaged.tar" in ended.stderr and "limits.max_failed_shards" in ended.stderr
    tolerant = engine("extract", recipe, "--json", "--set", "limits.max_failed_shards=1")  # tries it again
    assert (tolerant.code, tolerant.summary["shards_failed"], tolerant.summary["parts_written"]) == (0, 1, 0)

    source.write("damaged.tar", whole)
    source.write("changing.tar", shard_bytes(1000, 70))
    ended = engine("extract", recipe, "--json")
    assert ended.code == 0, ended.stderr
    assert (ended.summary["shards_skipped"], ended.summary["rows"]) == (1, 150 + 70)
    wanted = [*range(150), *range(1000, 1070), *range(700, 703)]
    assert keys_of(tmp_path / "table") == Counter(f"{number:06d}" for number in wanted)
    assert len(list(list_parts(table))) == 3 + 2 + 1

    source.delete("steady.tar")
    for settings, code, said in [
        ([], 0, "1 shards of the table are no longer in the source; their parts are kept (--prune"),
        (["--prune"], 1, "pruning would remove 1 of the table's 3 shards"),
        (["--prune-up-to", "1", "--set", "source.pattern=d*.tar"], 1, "remove 2 of the table's 3 shards"),
        (["--prune-up-to", "2", "--set", "source.pattern=d*.tar"], 0, "changing.tar"),  # still there: kept
        (["--prune"], 0, "2 done"),
    ]:
        ended = engine("extract", recipe, *settings)
        assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert keys_of(tmp_path / "table") == Counter(f"{number:06d}" for number in wanted[:-3])


def test_loose_files_are_grouped_and_a_border_that_goes_leaves_no_row_twice(
    engine: Engine, tmp_path: Path
) -> None:
    names = (f"cats/{number:05d}.jpg" for number in itertools.count())
    border = next(name for name in names if is_border(name))
    first = int(border[5:10]) - 2
    source = open_store(str(tmp_path / "files"))
    for number in range(first, first + 5):
        source.write(f"cats/{number:05d}.jpg", crop_jpeg(number)[0])
    table = open_store(str(tmp_path / "table"))
    recipe = write_recipe(
        tmp_path,
        "extract.yaml",
        f"""
source:   {{kind: files, uri: "{source.uri}", label: folder}}
backbone: {{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32, layer: block_2_add}}
output:   {{uri: "{table.uri}"}}
""",
    )
    ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["shards_total"], ended.summary["rows"]) == (0, 2, 5), ended.stderr
    source.delete(border)
    ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["shards_total"], ended.summary["rows"]) == (0, 1, 4), ended.stderr
    rows = open_table(table).read(["key", "label", "shard"]).to_pylist()
    kept = [number for number in range(first, first + 5) if f"cats/{number:05d}.jpg" != border]
    assert rows == [{"key": f"cats/{n:05d}.jpg", "label": "cats", "shard": "cats/~"} for n in kept]
    assert len(list(list_parts(table))) == 1


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
    assert "this machine cannot hold" in ended.stderr and "GPUs: 1 = 1 actors x 1" in ended.stderr


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


def test_a_list_labels_its_files_and_a_changed_label_does_one_group_again(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "photos"))
    for number, name in enumerate(["a/0.jpg", "a/1.jpeg.bak", "b/2.jpg", "b/unlisted.jpg"]):
        source.write(name, crop_jpeg(number)[0])
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "uri,species,camera\nb/2.jpg,dog,Leica\na/0.jpg,cat,\na/1.jpeg.bak,cow,Canon\na/gone.jpg,ox,\n"
    )
    table = open_store(str(tmp_path / "table"))
    recipe = write_recipe(
        tmp_path,
        "extract.yaml",
        f"""
source:   {{kind: files, uri: "{source.uri}", list: "{labels}", path: uri, label: species, metadata: [camera]}}
backbone: {{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32, layer: block_2_add}}
output:   {{uri: "{table.uri}"}}
limits:   {{max_reject_fraction: 0.25}}
""",
    )
    ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["shards_total"], ended.summary["rows"]) == (0, 2, 3), ended.stderr
    assert ended.summary["rejects_by_reason"] == {"no_image": 1}
    labels.write_text(labels.read_text().replace("dog", "wolf"))
    ended = engine("extract", recipe, "--json")
    assert (ended.code, ended.summary["shards_done"], ended.summary["rows"]) == (0, 1, 1), ended.stderr
    rows = open_table(table).read(["key", "label", "camera"]).sort_by("key").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("a/0.jpg", "cat", ""),
        ("a/1.jpeg.bak", "cow", "Canon"),
        ("b/2.jpg", "wolf", "Leica"),
    ]
    assert engine("verify", table.uri, "--source").code == 0
    labels.unlink()
    ended = engine("extract", recipe, "--plan")
    assert ended.code == 2 and f"source.list {labels}: not there" in ended.stderr
