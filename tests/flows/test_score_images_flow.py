"""`engine score` straight from images: the same predictions as from embeddings, with and without keeping those."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from engine.config import load_recipe
from engine.parts import path16_of
from engine.storage import open_store
from engine.tables import open_table
from jobs import score
from tests.commands import Ended, Engine, rows_of, start, wait_for_parts
from tests.embedding_tables import publish_linear, publish_mlp
from tests.flows.archives import crop_jpeg, extract_recipe, shard_bytes, write_recipe
from tests.shards.archives import member, tar_bytes

CLASSES = ("ant", "bee", "cat", "dog", "eel")
SHARDS = {"a.tar": 150, "b.tar": 67, "c.tar": 3}  # parts of 64 images: 3 + 2 + 1
PARTS = 8  # with one of a good image and two rejects, and one of an empty shard


@pytest.fixture(scope="module")
def scored(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, their embeddings, two bundles fitted on these, and what each says of the embeddings."""
    from jobs.cli import main

    folder = tmp_path_factory.mktemp("scored")
    source = open_store(str(folder / "shards"))
    for place, (shard, images) in enumerate(SHARDS.items()):
        source.write(shard, shard_bytes(1000 * place, images))
    good, label = crop_jpeg(9)
    damaged = [
        ("good.jpg", good),
        ("good.cls", label.encode()),
        ("half.jpg", good[:300]),
        ("x.cls", b"flower"),
    ]
    source.write("rejects.tar", tar_bytes([member(name, data) for name, data in damaged]))
    source.write("empty.tar", tar_bytes([]))
    limits = "limits: {max_reject_fraction: 0.02}"
    assert main(["extract", str(extract_recipe(folder, source.uri, str(folder / "embeddings"), limits))]) == 0
    record = json.loads((folder / "embeddings" / "_table.json").read_text())
    random, width = np.random.default_rng(1), record["width"]
    kernel_DK = random.normal(size=(width, len(CLASSES)))
    publish_linear(folder / "one", kernel_DK, random.normal(size=len(CLASSES)), CLASSES, record)
    publish_mlp(folder / "two", width, CLASSES, record)  # computed by Keras
    recipe = {
        "embeddings": {"uri": str(folder / "embeddings")},
        "bundles": bundles(folder, folder, "one", "two"),
    }
    assert main(["score", str(write_recipe(folder, "score.yaml", json.dumps(recipe)))]) == 0
    return folder


@pytest.fixture
def folder(scored: Path, tmp_path: Path) -> Path:
    """An empty folder with shards of its own, the same as those."""
    (tmp_path / "shards").mkdir()
    for path in (scored / "shards").iterdir():
        os.link(path, tmp_path / "shards" / path.name)  # with their times: the same identities
    return tmp_path


def bundles(scored: Path, folder: Path, *names: str, **output: Any) -> list[dict[str, Any]]:
    """Each bundle of these names, into a table `labels-<name>`."""
    return [
        {"uri": str(scored / name), "output": {"uri": str(folder / f"labels-{name}"), "top_k": 3, **output}}
        for name in names
    ]


def recipe_of(scored: Path, folder: Path, *names: str, kept: bool = False, **blocks: Any) -> Path:
    """A recipe that scores the folder's shards with bundles of these names."""
    output = {"rows_per_part": 64} | ({"uri": str(folder / "embeddings")} if kept else {})
    document = {
        "source": {"kind": "webdataset", "uri": str(folder / "shards"), "image": ["jpg"], "label": "cls"},
        "bundles": bundles(scored, folder, *names),
        "output": output,
        "limits": {"max_reject_fraction": 0.02},
        **blocks,
    }
    return write_recipe(folder, f"score-{'-'.join(names)}.yaml", json.dumps(document))


def parts_in(table: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (table / "data").iterdir()}


def times_in(table: Path) -> dict[Path, int]:
    """Of all files but the records that each run leaves."""
    return {
        path: path.stat().st_mtime_ns
        for path in table.rglob("*")
        if path.is_file() and path.parent.name != "runs"
    }


def predictions_in(table: Path) -> pa.Table:
    """Its rows by shard and index."""
    return ds.dataset(table / "data").to_table().sort_by([("shard", "ascending"), ("index", "ascending")])


def lineage(engine: Engine, uri: Path) -> dict[str, dict[str, Any]]:
    steps = json.loads(engine("inspect", uri, "--json").stdout)["lineage"]
    return {step["what"]: step for step in steps}


def require_done(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.stderr
    return ended.summary


def test_images_are_labelled_to_the_bit_as_their_embeddings_are(
    engine: Engine, scored: Path, folder: Path
) -> None:
    recipe = recipe_of(scored, folder, "one", "two")
    plan = json.loads(engine("score", recipe, "--plan", "--json").stdout)
    assert (plan["shards_pending"], plan["table_exists"], plan["embeddings"]) == (5, False, "not kept")
    assert not (folder / "labels-one").exists()
    summary = require_done(engine("score", recipe, "--json"))
    assert (summary["rows"], summary["parts_written"], summary["embeddings"]) == (2 * 221, 2 * PARTS, None)
    images = summary["images"]
    assert (images["rows"], images["rejects"], images["shards_done"]) == (221, 2, 5)
    assert images["rejects_by_reason"] == {"truncated_image": 1, "no_image": 1}
    names = set(parts_in(scored / "embeddings"))
    for told, name in zip(summary["bundles"], ("one", "two"), strict=True):
        table, wanted = folder / f"labels-{name}", predictions_in(scored / f"labels-{name}")
        assert predictions_in(table) == wanted
        assert (told["rows"], told["parts_written"]) == (221, PARTS)
        assert sum(told["label_counts"].values()) == 221
        assert set(parts_in(table)) == names
        rejects = pq.read_table(table / "rejects").sort_by("index")
        assert rejects == pq.read_table(scored / "embeddings" / "rejects").sort_by("index")
        assert engine("verify", table, "--source").code == 0
    before = times_in(folder)
    again = require_done(engine("score", recipe, "--json"))
    assert (again["rows"], again["images"]["bytes_read"], again["images"]["rejects"]) == (0, 0, 2)
    assert times_in(folder) == before


@pytest.mark.parametrize("name", ["one", "two"])
def test_single_images_are_labelled_as_their_rows_are(
    engine: Engine, scored: Path, tmp_path: Path, name: str
) -> None:
    rows = {row["key"]: row for row in predictions_in(scored / f"labels-{name}").to_pylist()}
    numbers = range(SHARDS["a.tar"])
    for number in numbers:
        (tmp_path / f"{number:06d}.jpg").write_bytes(crop_jpeg(number)[0])
    summary = require_done(engine("predict", scored / name, tmp_path, "--top-k", 3, "--json"))
    assert [Path(one["image"]).stem for one in summary["predictions"]] == [f"{one:06d}" for one in numbers]
    for one in summary["predictions"]:
        row = rows[Path(one["image"]).stem]
        assert (one["label"], summary["bundle_id"]) == (row["label"], row["bundle"])
        assert [top["label"] for top in one["top"]] == row["top_labels"]
        confidences = [top["confidence"] for top in one["top"]]
        assert confidences == pytest.approx(row["top_confidences"], abs=1e-5)


def test_the_lineage_of_such_predictions_says_that_there_are_no_embeddings(
    engine: Engine, scored: Path, folder: Path
) -> None:
    require_done(engine("score", recipe_of(scored, folder, "one"), "--json"))
    table = folder / "labels-one"
    steps = lineage(engine, table)
    assert {what: step["state"] for what, step in steps.items()} == {
        "bundle": "same",
        "fitted on": "unknown",
        "embeddings": "none",
        "source": "same",
    }
    assert "labelled straight from images" in steps["embeddings"]["says"]
    (part,) = (table / "data").glob(f"*.{path16_of('rejects.tar')}.*")
    told = json.loads(engine("inspect", part, "--json").stdout)
    assert (told["rows"], told["rejects"], told["recipe"]) == (1, 2, "that of the table")
    assert lineage(engine, part)["shard"]["state"] == "same"
    source = open_store(str(folder / "shards"))
    source.write("rejects.tar", shard_bytes(5000, 3))
    assert lineage(engine, part)["shard"]["state"] == "changed"
    source.delete("rejects.tar")
    assert lineage(engine, part)["shard"]["state"] == "gone"


def test_a_part_that_one_table_lacks_is_written_there_and_nowhere_else(
    engine: Engine, scored: Path, folder: Path
) -> None:
    one, two = folder / "labels-one", folder / "labels-two"
    require_done(engine("score", recipe_of(scored, folder, "one"), "--json"))
    before = times_in(one)
    added = require_done(engine("score", recipe_of(scored, folder, "one", "two"), "--json"))
    assert [told["parts_written"] for told in added["bundles"]] == [0, PARTS]
    assert times_in(one) == before
    whole = {table: parts_in(table) for table in (one, two)}
    lost = [sorted(one.glob(f"data/*.{path16_of('a.tar')}.*"))[0], sorted(two.glob("data/*.last.*"))[0]]
    for path in lost:
        path.unlink()
    before = times_in(one) | times_in(two)
    mended = require_done(engine("score", recipe_of(scored, folder, "one", "two"), "--json"))
    assert [told["parts_written"] for told in mended["bundles"]] == [1, 1]
    assert {table: parts_in(table) for table in (one, two)} == whole
    after = times_in(one) | times_in(two)
    assert {path for path in after if after[path] != before.get(path)} == set(lost)


def test_replaced_shards_are_labelled_anew_and_removed_ones_pruned_with_their_copies(
    engine: Engine, scored: Path, folder: Path
) -> None:
    also: dict[str, Any] = {"bundles": bundles(scored, folder, "one", also=["jsonl"])}
    also["limits"] = {"max_reject_fraction": 0.05}
    recipe, table = recipe_of(scored, folder, "one", **also), folder / "labels-one"
    require_done(engine("score", recipe, "--json"))
    source = open_store(str(folder / "shards"))
    source.write("a.tar", shard_bytes(7000, 70))
    replaced = require_done(engine("score", recipe, "--json"))
    assert (replaced["rows"], replaced["images"]["shards_replaced"]) == (70, 1)
    assert sorted(row for row in predictions_in(table)["key"].to_pylist() if row.startswith("007")) == [
        f"{number:06d}" for number in range(7000, 7070)
    ]
    assert len(parts_in(table)) == len(list((table / "also").iterdir())) == 7
    source.delete("b.tar")
    assert require_done(engine("score", recipe, "--json"))["images"]["shards_removed"] == 1
    assert engine("score", recipe, "--prune").code == 1  # one of five is more than a tenth
    pruned = require_done(engine("score", recipe, "--json", "--prune-up-to", "1"))
    assert pruned["images"]["parts_pruned"] == 2
    assert len(parts_in(table)) == len(list((table / "also").iterdir())) == 5
    found = json.loads(engine("verify", table, "--json").stdout.splitlines()[-1])
    assert (found["damage"], found["leftovers"], found["rows"], found["rejects"]) == ({}, {}, 74, 2)


def test_over_the_budget_it_ends_with_3_each_time_and_a_damaged_shard_keeps_its_good_parts(
    engine: Engine, scored: Path, folder: Path
) -> None:
    whole = (folder / "shards" / "a.tar").read_bytes()
    open_store(str(folder / "shards")).write("a.tar", whole[: len(whole) * 2 // 3])
    recipe = recipe_of(scored, folder, "one", limits={"max_reject_fraction": 0.005})
    ended = engine("score", recipe, "--json")
    assert (ended.code, ended.summary["images"]["shards_failed"], ended.summary["rows"]) == (1, 1, 64 + 71)
    for _ in range(2):
        ended = engine("score", recipe, "--json", "--set", "limits.max_failed_shards=1")
        assert (ended.code, ended.summary["images"]["rejects"]) == (3, 2)
    assert "the table has 2 rejects" in ended.stderr


def test_a_run_that_is_killed_is_taken_up_in_both_tables(
    engine: Engine, scored: Path, folder: Path, repository: Path
) -> None:
    for number in range(40):
        (folder / "shards" / f"copy-{number}.tar").write_bytes((folder / "shards" / "a.tar").read_bytes())
    recipe, tables = recipe_of(scored, folder, "one", "two"), [folder / "labels-one", folder / "labels-two"]
    process = start("score", repository, recipe)
    wait_for_parts(tables[1], 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    begun = [len(parts_in(table)) for table in tables]
    assert max(begun) < PARTS + 40 * 3
    ended = require_done(engine("score", recipe, "--json"))
    for told, count in zip(ended["bundles"], begun, strict=True):  # actors may outlive their driver by a part
        assert 0 < told["parts_written"] <= PARTS + 40 * 3 - count
    for table, name in zip(tables, ("one", "two"), strict=True):
        assert engine("verify", table, "--source").code == 0
        found, wanted = predictions_in(table), predictions_in(scored / f"labels-{name}")
        of_a = wanted.filter(pc.equal(wanted["shard"], "a.tar"))
        for shard in ("a.tar", *(f"copy-{number}.tar" for number in range(40))):
            rows = found.filter(pc.equal(found["shard"], shard))
            assert rows.select(["key", "index", "label"]) == of_a.select(["key", "index", "label"])
            np.testing.assert_allclose(rows["confidence"], of_a["confidence"], atol=1e-5)
        assert found.num_rows == 221 + 40 * 150


# ---------------------------------------------------------------- embeddings that are kept


def test_embeddings_are_kept_as_extract_would_and_their_predictions_belong_to_them(
    engine: Engine, scored: Path, folder: Path
) -> None:
    recipe = recipe_of(scored, folder, "one", "two", kept=True)
    summary = require_done(engine("score", recipe, "--json"))
    assert (summary["rows"], summary["parts_written"], summary["parts_read"]) == (2 * 221, 2 * PARTS, 0)
    columns = ["key", "index", "embedding", "label", "sha256"]
    assert rows_of(folder / "embeddings", columns) == rows_of(scored / "embeddings", columns)
    for name in ("one", "two"):
        assert predictions_in(folder / f"labels-{name}") == predictions_in(scored / f"labels-{name}")
    parts = open_table(open_store(str(folder / "embeddings"))).parts
    assert {name.embedding8 is None for name, _ in parts} == {True}
    steps = lineage(engine, folder / "labels-one")
    assert (steps["embeddings"]["state"], steps["embeddings"]["uri"]) == ("same", str(folder / "embeddings"))
    from_embeddings = {
        "embeddings": {"uri": str(folder / "embeddings")},
        "bundles": bundles(scored, folder, "one", "two"),
    }
    tables = [folder / name for name in ("embeddings", "labels-one", "labels-two")]
    before = [times_in(table) for table in tables]
    for again in (recipe, write_recipe(folder, "from-embeddings.yaml", json.dumps(from_embeddings))):
        assert require_done(engine("score", again, "--json"))["parts_written"] == 0
    limits = "limits: {max_reject_fraction: 0.02}"
    extract = extract_recipe(folder, str(folder / "shards"), str(folder / "embeddings"), limits)
    extracted = require_done(engine("extract", extract, "--json"))
    assert (extracted["parts_written"], extracted["shards_skipped"]) == (0, 5)
    assert [times_in(table) for table in tables] == before
    for table in tables:
        assert engine("verify", table).code == 0


# The job without the command, which connects to a recipe's cluster before it runs the job.
SCORE = """
import pathlib
import sys

from engine.config import load_recipe
from jobs.score import ScoreRecipe, run

run(load_recipe(ScoreRecipe, pathlib.Path(sys.argv[1]), ["compute.address=127.0.0.1:1"]))
"""


def test_what_lacks_predictions_is_scored_from_its_embeddings_and_what_lacks_embeddings_from_its_images(
    engine: Engine, scored: Path, folder: Path, repository: Path
) -> None:
    recipe, table = recipe_of(scored, folder, "one", "two", kept=True), folder / "labels-two"
    require_done(engine("score", recipe, "--json"))
    whole = predictions_in(table)
    sorted(table.glob("data/*"))[0].unlink()  # as a run leaves it that was killed between the two
    plan = json.loads(engine("score", recipe, "--plan", "--json").stdout)
    assert (plan["shards_pending"], plan["parts_to_score_from_embeddings"]) == (0, 1)
    loaded = load_recipe(score.ScoreRecipe, recipe)
    late = score.run(loaded, until=time.monotonic()).summary
    assert (late["parts_left"], late["parts_read"], late["rows"]) == (1, 0, 0)
    elsewhere = subprocess.run(
        [sys.executable, "-c", SCORE, str(recipe)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "ClusterError: Ray at 127.0.0.1:1 cannot be used" in elsewhere.stderr, elsewhere.stderr
    mended = require_done(engine("score", recipe, "--json"))
    assert [told["parts_written"] for told in mended["bundles"]] == [0, 1]
    assert (mended["parts_read"], mended["images"]["bytes_read"]) == (1, 0)
    assert predictions_in(table) == whole

    lost = sorted((folder / "embeddings").glob(f"data/*.{path16_of('b.tar')}.*"))[0]
    lost.unlink()
    mended = require_done(engine("score", recipe, "--json"))
    assert (mended["images"]["parts_written"], mended["parts_read"]) == (1, 0)
    assert [told["parts_written"] for told in mended["bundles"]] == [1, 1]
    assert lost.exists()
    for name in ("one", "two"):
        assert len(parts_in(folder / f"labels-{name}")) == PARTS  # those of the lost part are gone
        assert engine("verify", folder / f"labels-{name}").code == 0
    assert predictions_in(table) == whole


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"embeddings": {"uri": "x"}}, 2, "give either embeddings or source"),
        (
            {"backbone": {"name": "MobileNetV2", "weights": "random", "seed": 4, "layer": "block_2_add"}},
            1,
            "tensor_digest",
        ),
        ({"backbone": {"name": "MobileNetV2", "weights": "random", "seed": 3}}, 1, "layer None"),
        ({"runtime": {"precision": "bfloat16"}}, 1, "wanted:  float32"),
    ],
)
def test_what_does_not_belong_to_the_bundles_is_refused(
    engine: Engine, scored: Path, folder: Path, settings: dict[str, Any], code: int, said: str
) -> None:
    if "backbone" in settings:
        settings["backbone"] |= {"kind": "keras_application", "input_size": 32}
    ended = engine("score", recipe_of(scored, folder, "one", **settings))
    assert ended.code == code
    assert said in ended.stderr, ended.stderr
    assert not (folder / "labels-one" / "_table.json").exists()


def test_the_same_network_from_another_place_is_as_good(engine: Engine, scored: Path, folder: Path) -> None:
    from engine.backbones.kinds import KerasApplicationConfig, build_backbone
    from engine.storage import StorageConfig

    config = KerasApplicationConfig(name="MobileNetV2", weights="random", seed=3, input_size=32)
    build_backbone(config, StorageConfig()).network.save_weights(folder / "moved.weights.h5")
    moved = {**config.model_dump(), "layer": "block_2_add", "weights": str(folder / "moved.weights.h5")}
    require_done(engine("score", recipe_of(scored, folder, "one", backbone=moved), "--json"))
    assert predictions_in(folder / "labels-one") == predictions_in(scored / "labels-one")


def test_bundles_of_different_networks_are_refused_with_both(
    engine: Engine, scored: Path, folder: Path
) -> None:
    record = json.loads((scored / "embeddings" / "_table.json").read_text())
    other = record | {"fingerprint": "e" * 64}
    publish_linear(folder / "other", np.ones((record["width"], 2)), np.zeros(2), ("ant", "bee"), other)
    both = bundles(scored, folder, "one") + bundles(folder, folder, "other")
    ended = engine("score", recipe_of(scored, folder, "one", bundles=both))
    assert ended.code == 1
    assert f"{folder}/other has fingerprint {'e' * 64}" in ended.stderr


def test_a_bundle_that_names_no_network_is_refused_and_so_is_a_table_of_the_other_kind(
    engine: Engine, scored: Path, folder: Path
) -> None:
    publish_linear(folder / "bare", np.ones((24, 2)), np.zeros(2), ("ant", "bee"))
    ended = engine("score", recipe_of(scored, folder, "bare", bundles=bundles(folder, folder, "bare")))
    assert (ended.code, "does not say which network it belongs to" in ended.stderr) == (1, True)
    ended = engine("score", recipe_of(scored, folder, "one", bundles=bundles(scored, scored, "one")))
    assert (ended.code, "holds predictions of an embedding table" in ended.stderr) == (1, True)
    require_done(engine("score", recipe_of(scored, folder, "one"), "--json"))
    of_embeddings = {
        "embeddings": {"uri": str(scored / "embeddings")},
        "bundles": bundles(scored, folder, "one"),
    }
    recipe = write_recipe(folder, "from-embeddings.yaml", json.dumps(of_embeddings))
    ended = engine("score", recipe)
    assert (ended.code, "holds predictions that were made straight from images" in ended.stderr) == (1, True)
    ended = engine("score", recipe, "--prune")
    assert (ended.code, "--prune: only for a recipe with `source`" in ended.stderr) == (2, True)
    ended = engine("score", recipe, "--set", "compute.actors=2")
    assert (ended.code, "compute: only with source" in ended.stderr) == (2, True)
