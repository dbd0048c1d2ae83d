"""Extract, fit, score, review, answer, fit on the answers; and what each prediction was made from, then and since."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.heads.bundle import open_bundle
from engine.storage import open_store
from tests.commands import Engine
from tests.flows.archives import crop_label, extract_recipe, write_recipe, write_shards
from tests.flows.test_score_flow import predictions_in

ROWS = 2 * 150  # two shards, three parts each
FIT = "embeddings: {{uri: '{folder}/embeddings'}}\noptimizer: {{kind: lbfgs}}\noutput: {{uri: '{folder}/{bundle}'}}\n"


@pytest.fixture
def folder(engine: Engine, tmp_path: Path) -> Path:
    """An archive of labelled photos, its embeddings, a bundle, and its predictions with their files' copies."""
    write_shards(open_store(str(tmp_path / "archive")), 2, 150)
    recipe = extract_recipe(tmp_path, str(tmp_path / "archive"), str(tmp_path / "embeddings"))
    for verb, path in (
        ("extract", recipe),
        ("fit", write_recipe(tmp_path, "fit.yaml", FIT.format(folder=tmp_path, bundle="bundle"))),
        ("score", score_recipe(tmp_path)),
    ):
        ended = engine(verb, path)
        assert ended.code == 0, ended.stderr
    return tmp_path


def score_recipe(folder: Path) -> Path:
    return write_recipe(
        folder,
        "score.yaml",
        f"embeddings: {{uri: '{folder}/embeddings'}}\n"
        f"bundles: [{{uri: '{folder}/bundle', output: {{uri: '{folder}/labels', top_k: 2, min_confidence: 0.6}}}}]\n",
    )


def answered(rows: pa.Table, every: int) -> tuple[pa.Table, dict[str, str]]:
    """What a person makes of a queue: each row is answered but every n-th; and the answers by key."""
    keys = rows["key"].to_pylist()
    said = [None if number % every == 0 else crop_label(int(key)) for number, key in enumerate(keys)]
    answers = {key: label for key, label in zip(keys, said, strict=True) if label is not None}
    place = rows.schema.get_field_index("answer")
    return rows.set_column(place, "answer", pa.array(said, pa.string())), answers


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_review_that_was_answered_is_fitted_on(engine: Engine, folder: Path, ending: str) -> None:
    queue = folder / f"queue.{ending}"
    few = engine("review", folder / "labels", "--count", "90", "--json")
    assert few.code == 0, few.stderr
    (note,) = few.summary["notes"]  # this network is cut early: all photos look alike to it
    assert f"{few.summary['rows']} rows of 90" in note and "--near-duplicate" in note
    assert few.summary["rows"] == pq.read_table(few.summary["out"]).num_rows < 90
    wanted = ("--count", "90", "--near-duplicate", "1", "--out", queue, "--json")
    ended = engine("review", folder / "labels", *wanted)
    assert ended.code == 0, ended.stderr
    told = ended.summary
    assert (told["rows_read"], told["notes"], told["out"]) == (ROWS, [], str(queue))
    assert sum(told["reasons"].values()) == told["rows"] == 90
    again = engine("review", folder / "labels", "--out", queue)
    assert again.code == 1 and "a person's answers" in again.stderr

    if ending == "parquet":
        rows = pq.read_table(queue)
        assert rows["nearness"].null_count == 0
        assert set(rows["source_uri"].to_pylist()) <= {f"{folder}/archive/0000{n}.tar" for n in (0, 1)}
        filled, answers = answered(rows, 3)
        pq.write_table(filled, queue)
    else:
        with open(queue, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        filled, answers = answered(pa.Table.from_pylist(lines), 3)
        with open(queue, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, filled.column_names)
            writer.writeheader()
            writer.writerows(filled.to_pylist())
    assert len(answers) == 60
    text = FIT.format(folder=folder, bundle="taught") + f"labels: {{uri: '{queue}', label: answer}}\n"
    added = ending == "csv"  # to the labels that the table has, or alone
    more = ["--set", "labels.otherwise=label"] if added else []
    ended = engine("fit", write_recipe(folder, "taught.yaml", text), *more)
    assert ended.code == 0, ended.stderr
    bundle = open_bundle(open_store(str(folder / "taught")))
    assert bundle.manifest.classes == ("china", "flower")
    labels = bundle.document("metrics")["labels"]
    counts = (ROWS, 0, 0) if added else (60, ROWS - 60, 0)
    assert (labels["labelled"], labels["unlabelled"], labels["unknown_keys"]) == counts


def steps_of(engine: Engine, uri: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What inspect says, and the steps of the lineage by name."""
    ended = engine("inspect", uri, "--json")
    assert ended.code == 0, ended.stderr
    facts = json.loads(ended.stdout)
    return facts, {step["what"]: step for step in facts["lineage"]}


def test_predictions_are_followed_back_to_their_shards_then_and_since(engine: Engine, folder: Path) -> None:
    labels, bundle = folder / "labels", open_bundle(open_store(str(folder / "bundle")))
    facts, steps = steps_of(engine, labels)
    assert {what: (step["uri"], step["state"]) for what, step in steps.items()} == {
        "bundle": (f"{folder}/bundle", "same"),
        "fitted on": (f"{folder}/embeddings", "same"),
        "embeddings": (f"{folder}/embeddings", "same"),
        "source": (f"{folder}/archive", "same"),
    }
    assert (facts["parts"], facts["held_parts"], facts["last_night"]) == (6, 0, None)
    part = sorted((labels / "data").glob("00001*.00000.parquet"))[0]
    of_part, steps = steps_of(engine, part)
    assert (of_part["kind"], of_part["rows"], of_part["bundle"]) == ("part of predictions", 64, bundle.id)
    assert (of_part["recipe_sha256"], of_part["recipe"]) == (facts["recipe_sha256"], "that of the table")
    assert of_part["engine_version"] == facts["engine_version"]
    source = (folder / "archive" / "00001.tar").stat()
    assert {what: step["state"] for what, step in steps.items()} == dict.fromkeys(
        ("bundle", "fitted on", "embedding part", "shard"), "same"
    )
    assert (steps["shard"]["uri"], steps["shard"]["says"]) == (
        f"{folder}/archive/00001.tar",
        f"mtime:{source.st_mtime_ns}:{source.st_size}",
    )
    shown = engine("inspect", part).stdout
    assert len(shown.splitlines()) < 24 and f"{folder}/archive/00001.tar" in shown

    # Since then: another bundle, a rewritten embedding part, a shard that was touched, and one night held back.
    recipe = write_recipe(folder, "fit.yaml", FIT.format(folder=folder, bundle="bundle"))
    assert engine("fit", recipe, "--set", "optimizer.l2=3.0").code == 0
    os.utime(folder / "archive" / "00001.tar", ns=(1, 1_700_000_000_000_000_000))
    embedding_part = Path(steps["embedding part"]["uri"])
    embedding_part.write_bytes(embedding_part.read_bytes())
    held = labels / "held" / "data" / part.name
    held.parent.mkdir(parents=True)
    part.rename(held)
    night: dict[str, Any] = {
        "run_id": "nightly-20260102T030405Z-ab12",
        "held_parts": 1,
        "published_parts": 0,
        "gate": {"passes": False},
    }
    (labels / "nights").mkdir()
    (labels / "nights" / f"{night['run_id']}.json").write_text(json.dumps(night))
    facts, steps = steps_of(engine, labels)
    assert (steps["bundle"]["state"], steps["fitted on"]["state"]) == ("changed", "unknown")
    assert f"wanted {bundle.id}" in steps["bundle"]["says"] and "republished" in steps["bundle"]["says"]
    assert facts["held_parts"] == 1
    del night["gate"]
    assert facts["last_night"] == {**night, "passes_gate": False}
    of_part, steps = steps_of(engine, held)
    assert (of_part["is_held_back"], of_part["table"]) == (True, str(labels))
    assert {what: step["state"] for what, step in steps.items()} == {
        "bundle": "changed",
        "fitted on": "unknown",
        "embedding part": "changed",
        "shard": "changed",
    }
    assert f"then mtime:{source.st_mtime_ns}:" in steps["shard"]["says"]

    # And all of it gone but the part itself.
    (folder / "bundle" / "bundle.json").unlink()
    embedding_part.unlink()
    (folder / "archive" / "00001.tar").unlink()
    _, steps = steps_of(engine, held)
    assert [step["state"] for step in steps.values()] == ["gone", "unknown", "gone", "gone"]
    (folder / "embeddings" / "_table.json").unlink()
    (labels / "_table.json").unlink()
    of_part, steps = steps_of(engine, held)
    assert {step["state"] for step in steps.values()} == {"unknown"}
    assert "nothing is known" in of_part["table"]


def test_parts_of_two_runs_name_the_same_recipe_and_those_of_older_engines_stay_valid(
    engine: Engine, folder: Path
) -> None:
    labels = folder / "labels"
    before = {path.name: path.read_bytes() for path in (labels / "data").iterdir()}
    first = predictions_in(labels)
    labels.rename(folder / "kept")
    assert engine("score", score_recipe(folder)).code == 0
    assert {path.name: path.read_bytes() for path in (labels / "data").iterdir()} == before
    for path in (labels / "data").iterdir():
        part = pq.read_table(path)
        footer = json.loads(part.schema.metadata[b"engine.part"])
        assert len(footer.pop("recipe_sha256")) == 64
        del footer["engine_version"]
        pq.write_table(part.replace_schema_metadata({b"engine.part": json.dumps(footer).encode()}), path)
    assert engine("verify", labels).code == 0
    facts, _ = steps_of(engine, next((labels / "data").iterdir()))
    assert facts["recipe_sha256"] == facts["engine_version"] == "not said: written by an older engine"
    assert predictions_in(labels).equals(first)
