"""`engine nightly`, three nights on end: new, replaced, removed, damaged and drifting shards, each night twice."""

from __future__ import annotations

import datetime
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.config import load_recipe
from engine.doctor import STAGES
from engine.errors import HeldBack
from engine.lease import held_lease, this_run
from engine.run_metrics import Kind, RunMetrics
from engine.storage import open_store
from jobs import nightly
from jobs.nightly import LEASE_NAME
from jobs.outcome import Run
from tests.commands import Ended, Engine
from tests.flows.archives import shard_bytes, write_recipe
from tests.report.pages import Element, read_page
from tests.shards.archives import member, tar_bytes

ROWS = 96  # of each shard: two parts
RECIPE = """
source:   {{kind: webdataset, uri: "{folder}/archive", pattern: "*.tar", image: [jpg], label: cls}}
backbone: {{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32, layer: block_2_add}}
output:   {{uri: "{folder}/embeddings", rows_per_part: 64}}
"""
MORE = """
bundles:  [{{uri: "{folder}/bundle", output: {{uri: "{folder}/labels", top_k: 2, also: [jsonl]}}}}]
gate:     {{min_rows: 40, min_agreement: 0.95}}
"""
FIT = """
embeddings: {{uri: "{folder}/embeddings"}}
optimizer:  {{kind: lbfgs}}
output:     {{uri: "{folder}/bundle"}}
"""


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / "archive").mkdir(exist_ok=True)
    (folder / "archive" / name).write_bytes(content)


def noise_shard() -> bytes:
    """What no photo looks like."""
    members = []
    for number in range(ROWS):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3)).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        members.append(member(f"noise{number:03d}.jpg", encoded.getvalue()))
    return tar_bytes(members)


@pytest.fixture
def night(engine: Engine, tmp_path: Path) -> Any:
    """The command on its recipe, with what it answers; three shards, their table and a bundle are there."""
    for number in range(3):
        put(tmp_path, f"{number}.tar", shard_bytes(number * ROWS, ROWS))
    extract = write_recipe(tmp_path, "extract.yaml", RECIPE.format(folder=tmp_path))
    assert engine("extract", extract).code == 0
    fitted = engine("fit", write_recipe(tmp_path, "fit.yaml", FIT.format(folder=tmp_path)))
    assert fitted.code == 0, fitted.stderr
    recipe = write_recipe(tmp_path, "nightly.yaml", (RECIPE + MORE).format(folder=tmp_path))

    def run(*options: str) -> Ended:
        return engine("nightly", recipe, "--json", *options)

    return run


def table_of(folder: Path, name: str = "labels") -> pa.Table:
    """What readers see."""
    found = ds.dataset(folder / name / "data").to_table(
        columns=["key", "shard", "index", "label", "confidence"]
    )
    return found.sort_by([("shard", "ascending"), ("index", "ascending")])


def page_of(folder: Path, run_id: str) -> Element:
    """The night's page, which is the index, too, while it is the last one."""
    nights = folder / "labels" / "nights"
    page = (nights / f"{run_id}.html").read_text(encoding="utf-8")
    assert (nights / "index.html").read_text(encoding="utf-8") == page
    return read_page(page)


def told_of(page: Element) -> tuple[str, list[str]]:
    """The verdict, and the commands to go on with."""
    verdict = next(page.by_id("verdict").all("h2")).text
    return verdict, [one.text for one in page.by_id("next").all("code")]


def published_files(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for place in ("data", "also")
        for path in (folder / "labels" / place).glob("*")
    }


def test_three_nights(engine: Engine, night: Any, tmp_path: Path) -> None:  # noqa: PLR0915 (nights on end)
    # The first: everything is new.
    first = night()
    assert first.code == 0, first.stderr
    told = first.summary
    assert (told["published_parts"], told["held_parts"], told["is_finished"]) == (6, 0, True)
    assert told["tables"][0]["gate"]["passes"]
    assert table_of(tmp_path).num_rows == 3 * ROWS
    assert not list((tmp_path / "labels" / "held").rglob("*.parquet"))
    assert (
        json.loads((tmp_path / "labels" / "nights" / f"{told['run_id']}.json").read_text())["published_rows"]
        == 3 * ROWS
    )
    page = page_of(tmp_path, told["run_id"])
    assert told["tables"][0]["page"] == f"{tmp_path}/labels/nights/{told['run_id']}.html"
    assert told_of(page) == ("Published", [f"engine inspect {tmp_path}/labels"])
    assert f"readers have its {3 * ROWS} rows in 6 parts" in page.by_id("verdict").text
    assert page.by_id("cosines").rows() and "published last" not in page.by_id("cosines").text
    assert {row[0] for row in page.by_id("label-mix").rows()} == {"china", "flower"}
    assert len(list(page.by_id("doubtful").all("img"))) == 20
    assert "were not available" not in page.text
    files = published_files(tmp_path)
    assert len(files) == 2 * 6
    assert night().summary["published_parts"] == 0
    assert published_files(tmp_path) == files, "the same night again changes nothing"

    # The second: one new, one replaced by photos of which half were there, one gone, one cut off.
    put(tmp_path, "3.tar", shard_bytes(3 * ROWS, ROWS))
    put(tmp_path, "1.tar", shard_bytes(ROWS + ROWS // 2, ROWS))
    (tmp_path / "archive" / "2.tar").unlink()
    put(tmp_path, "4.tar", shard_bytes(9 * ROWS, ROWS)[:-9000])
    second = night()
    assert second.code == 1, second.stderr  # a shard failed; what is whole is published all the same
    told = second.summary
    extracted = told["extract"]
    assert (extracted["shards_done"], extracted["shards_failed"]) == (2, 1)
    assert (extracted["shards_replaced"], extracted["shards_removed"]) == (1, 1)
    rules = {rule["name"]: rule for rule in told["tables"][0]["gate"]["rules"]}
    assert rules["min_agreement"]["value"] == 1.0, "of unchanged keys each keeps its label"
    page = page_of(tmp_path, told["run_id"])
    assert told_of(page)[0] == "Published"
    assert "1 shards could not be read to their end" in page.by_id("verdict").text
    assert [row[0] for row in page.by_id("failed-shards").rows()] == ["4.tar"]
    assert "Published last" in page.by_id("cosines").text, "drawn beside the night before"
    assert "keep their label" in page.by_id("agreement").text
    assert [row[1] for row in page.by_id("nights").rows()] == ["Nothing new", "Published"]
    found = table_of(tmp_path)
    places = set(zip(found["shard"].to_pylist(), found["index"].to_pylist(), strict=True))
    assert len(places) == found.num_rows == 4 * ROWS + 64  # of the one that is cut off its first part
    assert {"0.tar", "1.tar", "2.tar", "3.tar"} <= set(found["shard"].to_pylist())
    files = published_files(tmp_path)
    again = night()
    assert (again.code, again.summary["published_parts"]) == (1, 0)
    assert published_files(tmp_path) == files

    # The third: what comes looks like nothing that the bundle was fitted on.
    (tmp_path / "archive" / "4.tar").unlink()
    put(tmp_path, "5.tar", noise_shard())
    for verdict in ("Held back", "Nothing new, earlier nights are held back"):
        third = night()
        assert third.code == 3, third.stderr
        found, commands = told_of(page_of(tmp_path, third.summary["run_id"]))
        review = f"engine review {tmp_path}/labels --held"
        assert (found, commands) == (verdict, [review, f"engine nightly {tmp_path}/nightly.yaml --publish"])
        assert (third.summary["published_parts"], third.summary["held_parts"]) == (0, 2)
        assert "--publish" in third.stderr
        assert published_files(tmp_path) == files
    assert third.summary["tables"][0]["gate"] is None, "nothing new: it was judged the first time"
    assert third.summary["tables"][0]["refused_parts"] == 2

    reviewed = engine(*review.split()[1:], "--near-duplicate", "1", "--json")
    assert reviewed.code == 0, reviewed.stderr
    assert (reviewed.summary["rows_read"], reviewed.summary["rows"]) == (ROWS, ROWS)
    assert set(pq.read_table(reviewed.summary["out"])["shard"].to_pylist()) == {"5.tar"}

    # A good night after a bad one is published; the bad one waits for a person.
    put(tmp_path, "6.tar", shard_bytes(12 * ROWS, ROWS))
    fourth = night("--set", "report.pictures=false")
    page = page_of(tmp_path, fourth.summary["run_id"])
    assert len(page.by_id("doubtful").rows()) == 20 and not list(page.all("img"))
    assert "report.pictures is false" in page.by_id("rows").text
    assert (fourth.code, fourth.summary["published_parts"], fourth.summary["held_parts"]) == (3, 2, 2)
    assert "still held back" in fourth.stderr
    assert "5.tar" not in table_of(tmp_path)["shard"].to_pylist()
    text = f'embeddings: {{uri: "{tmp_path}/embeddings"}}\nbundles: [{{uri: "{tmp_path}/bundle", output: '
    scored = write_recipe(
        tmp_path, "over.yaml", text + f'{{uri: "{tmp_path}/labels", top_k: 2, also: [jsonl]}}}}]\n'
    )
    assert engine("score", scored).code == 3, "scoring would show it"
    approved = night("--publish")
    assert (approved.code, approved.summary["published_parts"]) == (0, 2), approved.stderr
    assert told_of(page_of(tmp_path, approved.summary["run_id"]))[0] == "Published by hand"
    nothing_held = engine(*review.split()[1:])
    assert nothing_held.code == 1 and "nothing is held back here" in nothing_held.stderr
    assert night().code == 0

    # And all of it is what one run would have made.
    alone = (RECIPE + MORE).format(folder=tmp_path)
    lines = alone[alone.index("bundles:") :].replace(f"{tmp_path}/labels", f"{tmp_path}/alone").splitlines()
    text = f'embeddings: {{uri: "{tmp_path}/embeddings"}}\n{lines[0]}\n'
    assert engine("score", write_recipe(tmp_path, "score.yaml", text)).code == 0
    assert table_of(tmp_path, "alone").equals(table_of(tmp_path))
    checked = engine("verify", str(tmp_path / "labels"))
    assert checked.code == 0, checked.stderr


def test_pruning_takes_the_predictions_along_and_not_too_many(night: Any, tmp_path: Path) -> None:
    assert night().code == 0
    (tmp_path / "archive" / "1.tar").unlink()
    refused = night("--prune")
    assert refused.code == 1
    assert "pruning would remove 1 of the table's 3 shards" in refused.stderr
    pruned = night("--prune-up-to", "1")
    assert (pruned.code, pruned.summary["extract"]["parts_pruned"], pruned.summary["predictions_pruned"]) == (
        0,
        2,
        2,
    )
    assert set(table_of(tmp_path)["shard"].to_pylist()) == {"0.tar", "2.tar"}
    assert len(list((tmp_path / "labels" / "also").glob("*.jsonl"))) == 4
    # Embeddings that are lost are no reason to drop what was predicted of them.
    shutil.rmtree(tmp_path / "embeddings" / "data")
    (tmp_path / "archive" / "0.tar").unlink()
    lost = night("--prune")
    assert "pruning would remove the predictions of 1 shards" in lost.stderr
    assert set(table_of(tmp_path)["shard"].to_pylist()) == {"0.tar", "2.tar"}


def test_a_night_since_a_time_leaves_what_is_older_and_a_later_one_does_it(
    night: Any, tmp_path: Path
) -> None:
    put(tmp_path, "old.tar", shard_bytes(5 * ROWS, ROWS))
    moment = datetime.datetime.now() + datetime.timedelta(seconds=0.02)
    time.sleep(0.05)
    put(tmp_path, "new.tar", shard_bytes(6 * ROWS, ROWS))
    planned = night("--since", moment.isoformat(), "--plan").summary
    assert (planned["shards_pending"], planned["shards_older"]) == (1, 1)
    told = night("--since", moment.isoformat()).summary
    extracted = told["extract"]
    assert (extracted["shards_done"], extracted["shards_older"], extracted["shards_removed"]) == (1, 1, 0)
    assert set(table_of(tmp_path)["shard"].to_pylist()) == {"0.tar", "1.tar", "2.tar", "new.tar"}
    later = night("--since", "7d").summary["extract"]
    assert (later["shards_done"], later["shards_older"]) == (1, 0)
    refused = night("--since", "yesterday")
    assert refused.code == 2
    assert "'yesterday' is no time" in refused.stderr


def test_a_night_beside_another_leaves_and_says_whose_turn_it_is(night: Any, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "embeddings"))
    with held_lease(store, LEASE_NAME, this_run("the other night"), 600.0):
        refused = night()
    assert refused.code == 1
    assert "the other night" in refused.stderr
    assert not (tmp_path / "labels").exists()
    assert night().code == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "embeddings" / "runs").glob("nightly*")]
    left, ended = sorted(records, key=lambda record: record["exit_code"], reverse=True)
    assert (left["outcome"], left["error"]["kind"], left["summary"]) == ("failed", "LeaseHeld", None)
    assert (ended["outcome"], ended["summary"]["published_parts"]) == ("done", 6)


def test_a_night_that_is_held_back_says_so_in_numbers(night: Any, tmp_path: Path) -> None:
    assert night().code == 0
    put(tmp_path, "5.tar", noise_shard())
    settings = ("budget.max_seconds=86400",)
    recipe = load_recipe(nightly.NightlyRecipe, tmp_path / "nightly.yaml", settings)
    metrics = RunMetrics("nightly")
    outcome = nightly.run(recipe, as_run=Run("nightly-20260101T000000Z-0a1b", metrics))
    assert isinstance(outcome.verdict, HeldBack)
    seen = {
        (
            change.metric.name,
            *(text for label, text in change.labels.items() if label != "verb"),
        ): change.value
        for change in metrics.changes()
        if change.metric.kind is not Kind.HISTOGRAM
    }
    assert seen["engine_gate_decisions_total", "held_back"] == 1
    assert ("engine_gate_decisions_total", "published") not in seen
    assert (seen["engine_held_parts",], seen["engine_lease_held",]) == (2, 1)
    assert 0 <= seen["engine_lease_age_ratio",] < 1
    assert 86_000 < seen["engine_deadline_timestamp_seconds",] - time.time() < 86_400
    assert seen["engine_rows_total", "embeddings"] == seen["engine_rows_total", "predictions"] == ROWS
    assert seen["engine_parts_written_total", "predictions"] == 2
    assert (seen["engine_shards_pending",], seen["engine_parts_pending",]) == (0, 0)
    assert all(seen["engine_stage_seconds_total", stage] > 0 for stage in (*STAGES, "score"))


def test_a_night_whose_time_is_up_stops_and_the_next_goes_on(night: Any, tmp_path: Path) -> None:
    for number in range(3, 9):
        put(tmp_path, f"{number}.tar", shard_bytes(number * ROWS, ROWS))
    planned = json.loads(night("--set", "budget.max_seconds=1", "--plan").stdout)
    assert (planned["shards_pending"], planned["seconds_at_most"]) == (6, 1.0)
    short = night("--set", "budget.max_seconds=1")
    assert short.code == 0, short.stderr
    assert not short.summary["is_finished"]
    assert "left for the next night" in short.stderr
    assert "Its time was up" in page_of(tmp_path, short.summary["run_id"]).by_id("verdict").text
    whole = night()
    assert (whole.code, whole.summary["is_finished"]) == (0, True), whole.stderr
    assert table_of(tmp_path).num_rows == 9 * ROWS


def test_a_night_that_fails_has_a_page_and_one_whose_page_cannot_be_written_does_not_fail(
    engine: Engine, night: Any, tmp_path: Path
) -> None:
    assert night().code == 0
    put(tmp_path, "3.tar", shard_bytes(3 * ROWS, ROWS))
    (reference,) = (tmp_path / "bundle").rglob("reference*.npz")
    content = reference.read_bytes()
    reference.unlink()
    failed = night()
    assert failed.code == 1
    inspected = json.loads(engine("inspect", tmp_path / "labels", "--json").stdout)["last_night"]
    assert reference.name in inspected["error"] and inspected["held_parts"] == 0
    nights = sorted((tmp_path / "labels" / "nights").glob("nightly*.html"))
    page = page_of(tmp_path, nights[-1].stem)
    assert len(nights) == 2
    assert told_of(page) == ("Failed", [f"engine nightly {tmp_path}/nightly.yaml"])
    assert "It ended during score: " in page.by_id("verdict").text and reference.name in page.text
    assert page.by_id("shards").rows()[2] == ["Done tonight", "1"]

    reference.write_bytes(content)
    index = tmp_path / "labels" / "nights" / "index.html"
    index.unlink()
    (index / "in the way").mkdir(parents=True)
    done = night()
    assert (done.code, done.summary["published_parts"]) == (0, 2), done.stderr
    assert done.summary["tables"][0]["page"] is None
    assert "warning: the night has no page in" in done.stderr
