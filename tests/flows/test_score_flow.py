"""`engine score` on embeddings: several bundles in one pass, what a rerun and a killed run do, and the numbers."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from numpy.typing import NDArray

from engine.decisions import Decisions, PredictionOutput, decisions_of
from engine.heads.bundle import Bundle, open_bundle
from engine.scoring import BundleJob, PartScorer, PendingPart, ScoreJob, ScoreReceipt, score_items
from engine.storage import StorageConfig, Store, open_store
from engine.tables import open_table
from tests.commands import Engine, start, wait_for_parts
from tests.embedding_tables import FINGERPRINT, publish_linear, write_part, write_table
from tests.flows.archives import write_recipe

WIDTH, CLASSES = 13, ("ant", "bee", "cat", "dog", "eel")
ROWS = {"a.tar": 41, "b.tar": 29, "c.tar": 7}  # parts of 17 rows: 3 + 2 + 1
PARTS = 6


def embeddings_of(shard: str, rows: int) -> NDArray[np.float32]:
    return np.random.default_rng([ord(shard[0]), rows]).normal(size=(rows, WIDTH)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An embedding table, and two bundles that answer differently."""
    write_table(
        tmp_path / "embeddings", {shard: embeddings_of(shard, rows) for shard, rows in ROWS.items()}, 17
    )
    for name, seed in (("one", 1), ("two", 2)):
        random = np.random.default_rng(seed)
        publish_linear(tmp_path / name, random.normal(size=(WIDTH, 5)), random.normal(size=5), CLASSES)
    return tmp_path


def recipe_of(folder: Path, *bundles: str, name: str = "score.yaml", **output: Any) -> Path:
    """A recipe that scores with bundles of these names into tables `labels-<name>`."""
    document = {
        "embeddings": {"uri": str(folder / "embeddings")},
        "bundles": [
            {"uri": str(folder / name), "output": {"uri": str(folder / f"labels-{name}"), **output}}
            for name in bundles
        ],
    }
    return write_recipe(folder, name, json.dumps(document))


def files_of(table: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (table / "data").glob("*.parquet")}


def predictions_in(table: Path) -> pa.Table:
    """Its rows by shard and index."""
    return ds.dataset(table / "data").to_table().sort_by([("shard", "ascending"), ("index", "ascending")])


def test_several_bundles_are_scored_in_one_pass_as_each_would_be_alone(engine: Engine, folder: Path) -> None:
    ended = engine("score", recipe_of(folder, "one", "two", top_k=3), "--json")
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert (summary["parts_read"], summary["parts_written"], summary["rows"]) == (PARTS, 2 * PARTS, 2 * 77)
    assert (summary["table"], summary["bundle"], summary["label_counts"]) == (None, None, {})
    together = {name: files_of(folder / f"labels-{name}") for name in ("one", "two")}
    for place, name in enumerate(("one", "two")):
        told, table = summary["bundles"][place], folder / f"labels-{name}"
        labels = predictions_in(table)["label"].to_pylist()
        assert told == {
            "table": str(table),
            "bundle": open_bundle(open_store(str(folder / name))).id,
            "parts_written": PARTS,
            "rows": 77,
            "label_counts": dict(Counter(labels)),
            "abstained": 0,
        }
        table.rename(folder / f"kept-{name}")
        ended = engine("score", recipe_of(folder, name, top_k=3), "--json")
        assert ended.code == 0, ended.stderr
        assert files_of(table) == together[name]
        assert ended.summary["bundles"] == [told]
        assert {key: ended.summary[key] for key in told} == told
    assert together["one"] != together["two"]


def times_of(table: Path) -> dict[Path, int]:
    """When each file of a table was written; each run adds a record of itself, which is not of the table."""
    return {
        path: path.stat().st_mtime_ns
        for path in table.rglob("*")
        if path.is_file() and path.parent.name != "runs"
    }


def test_a_rerun_does_nothing_and_a_bundle_that_is_added_reads_for_itself_alone(
    engine: Engine, folder: Path
) -> None:
    assert engine("score", recipe_of(folder, "one")).code == 0
    before = times_of(folder / "labels-one")
    again = engine("score", recipe_of(folder, "one"), "--json").summary
    assert (again["parts_read"], again["parts_written"], again["rows"]) == (0, 0, 0)
    (folder / "one" / "bundle.json").rename(folder / "kept.json")  # what is whole is not scored again:
    os.link(folder / "kept.json", folder / "one" / "bundle.json")
    for tensors in (*folder.glob("one/matrix.*"), *folder.glob("one/head.*")):
        tensors.unlink()  # its tensors are not even read
    added = engine("score", recipe_of(folder, "one", "two"), "--json")
    assert added.code == 0, added.stderr
    assert [told["parts_written"] for told in added.summary["bundles"]] == [0, PARTS]
    assert times_of(folder / "labels-one") == before
    two_parts = sorted((folder / "labels-two" / "data").iterdir())[:2]
    for part in two_parts:
        part.unlink()
    plan = json.loads(engine("score", recipe_of(folder, "one", "two"), "--plan", "--json").stdout)
    assert (plan["parts_pending 0"], plan["parts_pending 1"], plan["parts_pending"]) == (0, 2, 2)


def test_a_rewritten_embedding_part_is_scored_again_for_every_bundle_and_its_old_predictions_go(
    engine: Engine, folder: Path
) -> None:
    recipe = recipe_of(folder, "one", "two")
    assert engine("score", recipe).code == 0
    before = {name: set(files_of(folder / f"labels-{name}")) for name in ("one", "two")}
    changed_ND = -embeddings_of("c.tar", ROWS["c.tar"])
    write_part(open_store(str(folder / "embeddings")), "c.tar", 0, True, 0, changed_ND)
    ended = engine("score", recipe, "--json")
    assert [told["rows"] for told in ended.summary["bundles"]] == [7, 7]
    for name in ("one", "two"):
        after = set(files_of(folder / f"labels-{name}"))
        assert (len(after - before[name]), len(before[name] - after), len(after)) == (1, 1, PARTS)


def test_two_bundles_cannot_share_a_table(engine: Engine, folder: Path) -> None:
    recipe = folder / "shared.yaml"
    output = {"output": {"uri": str(folder / "labels")}}
    with_slash = {"output": {"uri": f"{folder}/labels/"}}
    bundles = [{"uri": str(folder / "one"), **output}, {"uri": str(folder / "two"), **with_slash}]
    recipe.write_text(json.dumps({"embeddings": {"uri": str(folder / "embeddings")}, "bundles": bundles}))
    ended = engine("score", recipe)
    assert ended.code == 2
    assert f"given twice: {folder}/labels" in ended.stderr
    assert not (folder / "labels").exists()


def test_a_table_of_another_contract_is_refused_before_any_table_is_begun(
    engine: Engine, folder: Path
) -> None:
    assert engine("score", recipe_of(folder, "two", top_k=2)).code == 0
    ended = engine("score", recipe_of(folder, "one", "two", top_k=3))
    assert ended.code == 1
    assert "top_k: the table has 2, this run 3" in ended.stderr
    assert not (folder / "labels-one").exists()


def test_a_run_that_is_killed_twice_leaves_the_same_tables_in_the_end(
    engine: Engine, folder: Path, repository: Path
) -> None:
    rows_ND = np.random.default_rng(5).normal(size=(4000, WIDTH)).astype(np.float32)
    write_table(folder / "embeddings", {"d.tar": rows_ND}, 17)
    recipe, tables = recipe_of(folder, "one", "two"), [folder / "labels-one", folder / "labels-two"]
    for number in range(2):
        process = start("score", repository, recipe)
        wait_for_parts(tables[1], 20 * (number + 1), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    begun = [len(files_of(table)) for table in tables]
    assert max(begun) < PARTS + 236
    ended = engine("score", recipe, "--json")
    assert ended.code == 0, ended.stderr
    for told, count in zip(
        ended.summary["bundles"], begun, strict=True
    ):  # scorers may outlive their driver by a part or two
        assert 0 < told["parts_written"] <= PARTS + 236 - count
    killed = [predictions_in(table) for table in tables]
    for table in tables:
        table.rename(table.with_name(f"{table.name}-killed"))
    assert engine("score", recipe).code == 0
    assert [predictions_in(table) for table in tables] == killed
    assert killed[0].num_rows == 4077


IDS = {"ant": "A-1", "bee": 'B,"2"', "cat": 3, "dog": "A-1", "eel": "007"}
DECIDED = {
    "top_k": 2,
    "min_confidence": {"default": 0.4, "classes": {"cat": 0.95}},
    "label_map": IDS,
    "also": ["jsonl", "csv"],
}


def test_decisions_are_part_of_the_contract_and_without_them_it_is_as_it_ever_was(
    engine: Engine, folder: Path
) -> None:
    plain, decided = recipe_of(folder, "one"), recipe_of(folder, "one", name="decided.yaml", **DECIDED)
    assert engine("score", plain).code == 0
    table = folder / "labels-one"
    assert json.loads((table / "_table.json").read_text())["contract"] == {
        "schema_version": 1,
        "embeddings.uri": str(folder / "embeddings"),
        "fingerprint": FINGERPRINT,
        "bundle": open_bundle(open_store(str(folder / "one"))).id,
        "top_k": 5,
        "min_confidence": 0.0,
    }
    bare = predictions_in(table).to_pylist()
    refused = engine("score", decided)
    assert refused.code == 1
    for line in (
        "top_k: the table has 5, this run 2",
        "min_confidence: the table has 0.0, this run 0.4",
        "min_confidence.cat: the table has no such field, this run 0.95",
        'label_map.eel: the table has no such field, this run "007"',
        'also: the table has no such field, this run ["csv", "jsonl"]',
    ):
        assert line in refused.stderr
    table.rename(folder / "plain")
    assert engine("score", decided).code == 0
    refused = engine("score", plain)
    assert refused.code == 1
    assert 'label_map.eel: the table has "007", this run null' in refused.stderr
    for row, was in zip(predictions_in(table).to_pylist(), bare, strict=True):
        assert row["top_labels"] == [str(IDS[name]) for name in was["top_labels"][:2]]
        enough = was["confidence"] >= (0.95 if was["label"] == "cat" else 0.4)
        assert (row["label"], row["confidence"]) == (
            str(IDS[was["label"]]) if enough else None,
            was["confidence"],
        )
    assert {row["label"] for row in predictions_in(table).to_pylist()} == {"A-1", 'B,"2"', "3", "007", None}


def test_copies_say_what_the_parts_say_and_go_with_them(engine: Engine, folder: Path) -> None:
    hostile = 'c,"\r\n\u2028é.tar'
    write_table(folder / "embeddings", {hostile: embeddings_of("c.tar", 5)}, 17)
    recipe, table = recipe_of(folder, "one", **DECIDED), folder / "labels-one"
    assert engine("score", recipe).code == 0
    stems = {Path(name).stem for name in files_of(table)}
    assert {path.name for path in (table / "also").iterdir()} == {
        f"{stem}.{form}" for stem in stems for form in ("csv", "jsonl")
    }
    float32 = pa.float32()
    for name in files_of(table):
        rows = ds.dataset(table / "data" / name).to_table()
        lines = (table / "also" / name).with_suffix(".jsonl").read_bytes().decode().split("\n")
        assert lines.pop() == ""
        from_jsonl = pa.Table.from_pylist([json.loads(line) for line in lines], schema=rows.schema)
        assert from_jsonl == rows
        with open((table / "also" / name).with_suffix(".csv"), newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert [row["key"] for row in read] == rows["key"].to_pylist()
        assert [row["label"] or None for row in read] == rows["label"].to_pylist()
        assert [json.loads(row["top_labels"]) for row in read] == rows["top_labels"].to_pylist()
        confidences = [float(row["confidence"]) for row in read]
        assert pa.array(confidences, float32) == rows["confidence"].combine_chunks()
    assert engine("verify", table).code == 0

    before = set(files_of(table))
    write_part(open_store(str(folder / "embeddings")), "c.tar", 0, True, 0, -embeddings_of("c.tar", 7))
    assert engine("score", recipe).code == 0
    (gone,), (new,) = before - set(files_of(table)), set(files_of(table)) - before
    copies = {path.name for path in (table / "also").iterdir()}
    assert {f"{Path(new).stem}.csv", f"{Path(new).stem}.jsonl"} <= copies
    assert len(copies) == 2 * len(before) and not any(Path(gone).stem in name for name in copies)

    orphan = table / "also" / f"{Path(gone).stem}.csv"  # as a run leaves it that was killed before its commit
    orphan.write_text("key\n")
    (table / "also" / f"{Path(new).stem}.jsonl").unlink()
    found = engine("verify", table, "--json")
    assert found.code == 1
    told = json.loads(found.stdout)
    assert (told["damage"], told["leftovers"]) == ({"copy_missing": 1}, {"orphaned_copy": 1})
    (table / "data" / new).unlink()
    assert engine("score", recipe).code == 0
    assert engine("verify", table).code == 0
    assert not orphan.exists()


# ---------------------------------------------------------------- one actor, without Ray


_LISTENERS: list[list[str]] = []


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        for opened in _LISTENERS:
            opened.append(arguments[0])


sys.addaudithook(_note_opened)


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """Paths of the files that are opened meanwhile, as the interpreter tells them."""
    _LISTENERS.append([])
    try:
        yield _LISTENERS[-1]
    finally:
        _LISTENERS.pop()


def decided(output: PredictionOutput, bundle: Bundle) -> Decisions:
    return decisions_of(output, bundle.manifest.classes, StorageConfig(), bundle.store.uri)


def job_of(folder: Path, *names: str) -> ScoreJob:
    bundles = {}
    for place, name in enumerate(names):
        bundle = open_bundle(open_store(str(folder / name)))
        table = PredictionOutput(uri=str(folder / f"labels-{name}"), top_k=3)
        bundles[place] = BundleJob(bundle.store.uri, bundle.id, table.uri, decided(table, bundle))
    return ScoreJob(str(folder / "embeddings"), StorageConfig(), FINGERPRINT, bundles)


def parts_of(folder: Path) -> list[Any]:
    store: Store = open_store(str(folder / "embeddings"))
    return [info for _, info in open_table(store).parts]


def test_each_embedding_part_is_read_once_for_all_bundles_that_want_it(folder: Path) -> None:
    scorer, infos = PartScorer(job_of(folder, "one", "two")), parts_of(folder)
    wanted = [(0, 1), (1,), (0,), (0, 1), (0, 1), (1,)]
    pending = [PendingPart(info, bundles) for info, bundles in zip(infos, wanted, strict=True)]
    with files_opened() as opened:
        answers = [ScoreReceipt.from_json(scorer(item)) for item in score_items(pending, 1)]
    read = Counter(path for path in opened if path.startswith(f"{folder}/embeddings/"))
    assert read == {f"{folder}/embeddings/{info.path}": 1 for info in infos}
    assert sum(answer.parts_read for answer in answers) == PARTS
    for place, name, parts in ((0, "one", 4), (1, "two", 5)):
        assert sum(answer.bundles[place].parts for answer in answers) == parts
        assert len(files_of(folder / f"labels-{name}")) == parts


def test_a_scorer_of_matrix_products_loads_neither_tensorflow_nor_keras(
    folder: Path, repository: Path
) -> None:
    script = f"""
import pickle, sys
from pathlib import Path
from engine.scoring import PartScorer
job, item = pickle.loads(Path({str(folder / "job.pickle")!r}).read_bytes())
PartScorer(job)(item)
print(sorted({{"tensorflow", "keras", "ray"}} & set(sys.modules)))
"""
    (item,) = score_items([PendingPart(info, (0, 1)) for info in parts_of(folder)][:1], 1)
    (folder / "job.pickle").write_bytes(pickle.dumps((job_of(folder, "one", "two"), item)))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert len(files_of(folder / "labels-two")) == 1


def test_predictions_equal_those_of_scikit_learn_and_of_keras_on_the_same_rows(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits = load_digits()
    rows_ND, names = (digits.data / 16).astype(np.float32), [f"digit {number}" for number in digits.target]
    fitted = LogisticRegression(max_iter=300).fit(rows_ND, names)
    classes = tuple(fitted.classes_)
    publish_linear(tmp_path / "one", fitted.coef_.T, fitted.intercept_, classes)
    write_table(tmp_path / "embeddings", {"d.tar": rows_ND}, 256)
    bundle = open_bundle(open_store(str(tmp_path / "one")))
    output = PredictionOutput(uri=str(tmp_path / "labels"), top_k=10)
    job = BundleJob(bundle.store.uri, bundle.id, output.uri, decided(output, bundle))
    scorer = PartScorer(
        ScoreJob(str(tmp_path / "embeddings"), StorageConfig(), FINGERPRINT, bundles={0: job})
    )
    for item in score_items([PendingPart(info, (0,)) for info in parts_of(tmp_path)], 1):
        scorer(item)
    table = predictions_in(tmp_path / "labels")
    assert table["index"].to_pylist() == list(range(len(rows_ND)))
    number_of = {name: number for number, name in enumerate(classes)}
    found_NK = np.empty((len(rows_ND), 10))
    for row, (labels, confidences) in enumerate(
        zip(table["top_labels"].to_pylist(), table["top_confidences"].to_pylist(), strict=True)
    ):
        found_NK[row, [number_of[label] for label in labels]] = confidences
    np.testing.assert_allclose(found_NK, fitted.predict_proba(rows_ND.astype(np.float64)), atol=1e-5)
    raised_NK = np.exp(np.asarray(bundle.network()(rows_ND), np.float64))
    np.testing.assert_allclose(found_NK, raised_NK / raised_NK.sum(axis=1, keepdims=True), atol=1e-5)
    assert table["label"].to_pylist() == fitted.predict(rows_ND).tolist()
