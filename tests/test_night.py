"""Held parts of a night: what they come to, and publishing that is killed at every step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from numpy.typing import NDArray

from engine import night
from engine.decisions import PredictionOutput, decisions_of
from engine.errors import TableDamaged
from engine.heads.bundle import open_bundle
from engine.parts import PartName, prediction_name
from engine.scoring import BundleJob, PartScorer, ScoreJob, pending_parts, score_items
from engine.storage import StorageConfig, Store, open_store
from engine.tables import open_table
from tests.embedding_tables import FINGERPRINT, publish_linear, write_part, write_table

WIDTH, CLASSES = 13, ("ant", "bee", "cat")
ROWS = {"a.tar": 41, "b.tar": 29, "c.tar": 7}  # parts of 17 rows: 3 + 2 + 1


class _Killed(Exception):
    """Where a process would have ended."""


def embeddings_of(shard: str, rows: int) -> NDArray[np.float32]:
    return np.random.default_rng([ord(shard[0]), rows]).normal(size=(rows, WIDTH)).astype(np.float32)


def score_held(folder: Path, counts: bool = True) -> None:
    """What is pending, into the held folder, by one scorer in this process."""
    bundle, table = open_bundle(open_store(str(folder / "bundle"))), open_store(str(folder / "labels"))
    output = PredictionOutput(uri=table.uri, top_k=2, min_confidence=0.6, also=("csv", "jsonl"))
    decided = decisions_of(output, bundle.manifest.classes, StorageConfig(), bundle.store.uri)
    held = night.held_store(table)
    job = BundleJob(bundle.store.uri, bundle.id, held.uri, decided, counts_in_footers=counts)
    scorer = PartScorer(ScoreJob(str(folder / "embeddings"), StorageConfig(), FINGERPRINT, {0: job}))
    parts = open_table(open_store(str(folder / "embeddings"))).parts
    there = {name for store in (table, held) for name, _ in night.list_parts(store)}
    for item in score_items(pending_parts(parts, [there]), 1):
        scorer(item)


def wanted_of(folder: Path) -> set[PartName]:
    parts = open_table(open_store(str(folder / "embeddings"))).parts
    return {prediction_name(name, info.identity) for name, info in parts}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An embedding table, a bundle, and predictions that are held."""
    shards = {shard: embeddings_of(shard, rows) for shard, rows in ROWS.items()}
    write_table(tmp_path / "embeddings", shards, 17)
    random = np.random.default_rng(1)
    publish_linear(tmp_path / "bundle", random.normal(size=(WIDTH, 3)), random.normal(size=3), CLASSES)
    score_held(tmp_path)
    return tmp_path


def tables(folder: Path) -> tuple[Store, Store]:
    return open_store(str(folder / "labels")), open_store(str(folder / "embeddings"))


def files(folder: Path, *places: str) -> dict[str, bytes]:
    return {
        f"{place}/{path.name}": path.read_bytes() for place in places for path in (folder / place).glob("*")
    }


def test_tally_is_what_the_parts_hold(folder: Path) -> None:
    table, embeddings = tables(folder)
    found = night.tally(table, embeddings, night.held_parts(table))
    rows = ds.dataset(folder / "labels/held/data").to_table()
    assert (found.parts, found.rows, found.rows_expected, found.samples, found.rejects) == (6, 77, 77, 77, 0)
    assert found.answer_counts == dict(Counter(top[0] for top in rows["top_labels"].to_pylist()))
    assert found.abstained == rows["label"].null_count > 0
    assert found.cosine_counts is None, "this bundle remembers nothing"
    assert (found.compared, found.agreeing) == (0, 0)


@pytest.mark.parametrize("checks", [0, 1, 2])
def test_publishing_that_is_killed_goes_on(folder: Path, checks: int) -> None:
    """Before copies for people, between them and the data, between copying and removing."""
    table, _ = tables(folder)
    held = files(folder / "labels/held", "data", "also")
    left = [None] * checks

    def check() -> None:
        if not left:
            raise _Killed
        left.pop()

    with pytest.raises(_Killed):
        night.publish(table, night.held_parts(table), check)
    assert len(files(folder / "labels", "also")) == (12 if checks else 0)
    assert len(files(folder / "labels", "data")) == (6 if checks == 2 else 0)
    assert files(folder / "labels/held", "data", "also") == held
    assert night.publish(table, night.held_parts(table)) == 6
    assert files(folder / "labels", "data", "also") == held
    assert not files(folder / "labels/held", "data", "also")
    assert night.publish(table, night.held_parts(table)) == 0


def test_a_night_is_published_within_an_object_store(
    folder: Path, s3_uri: str, s3_config: StorageConfig
) -> None:
    held = files(folder / "labels/held", "data", "also")
    table = open_store(f"{s3_uri}/labels", s3_config)
    for path, content in held.items():
        table.write(f"held/{path}", content)
    parts = night.held_parts(table)
    found = night.tally(table, tables(folder)[1], parts)
    assert (found.parts, found.rows) == (6, 77)
    night.refuse(table, parts[:2], "night-1")
    assert night.publish(table, parts[2:]) == 4
    assert set(night.refused(table)) == {part.info.path for part in parts[:2]}
    assert night.publish(table, parts[:2]) == 2
    assert {info.path: table.read(info.path) for info in table.list()} == held


def test_held_parts_of_rewritten_embeddings_and_lone_copies_go(folder: Path) -> None:
    table, embeddings = tables(folder)
    write_part(embeddings, "c.tar", 0, True, 0, -embeddings_of("c.tar", 7))
    lone = folder / "labels/held/also" / f"{'x' * 5}.{'0' * 16}.{'0' * 8}.{'0' * 8}.00000.last.csv"
    lone.write_text("key\n")
    assert night.drop_stale(table, wanted_of(folder)) == 1
    assert len(files(folder / "labels/held", "data")) == 5
    assert len(files(folder / "labels/held", "also")) == 10
    assert not lone.exists()
    score_held(folder)
    assert night.drop_stale(table, wanted_of(folder)) == 0
    assert night.tally(table, embeddings, night.held_parts(table)).rows == 77


def test_keys_of_a_replaced_shard_are_compared_with_what_they_were(folder: Path) -> None:
    table, embeddings = tables(folder)
    night.publish(table, night.held_parts(table))
    changed = embeddings_of("b.tar", 29)[:17]
    changed[:5] = -changed[:5]
    write_part(embeddings, "b.tar", 0, False, 0, changed)
    score_held(folder)
    old = {row["key"]: row["label"] for row in ds.dataset(folder / "labels/data").to_table().to_pylist()}
    new = {row["key"]: row["label"] for row in ds.dataset(folder / "labels/held/data").to_table().to_pylist()}
    found = night.tally(table, embeddings, night.held_parts(table))
    assert (found.parts, found.compared) == (1, 17)
    assert found.agreeing == sum(old[key] == label for key, label in new.items())
    assert 12 <= found.agreeing < 17


def test_part_that_does_not_say_what_is_in_it_is_named(tmp_path: Path, folder: Path) -> None:
    for path in (folder / "labels/held/data").glob("*"):
        path.unlink()
    score_held(folder, counts=False)
    table, embeddings = tables(folder)
    with pytest.raises(TableDamaged, match=r"held/data/.*does not say what is in it"):
        night.tally(table, embeddings, night.held_parts(table))


def test_the_last_night_that_published_is_found_among_others(folder: Path) -> None:
    table, _ = tables(folder)
    assert night.last_published(table) is None
    nights: list[tuple[str, dict[str, Any]]] = [
        ("nightly-20260101T010101Z-aaaa", {"published_rows": 5, "answer_counts": {"ant": 5}, "abstained": 0}),
        ("nightly-20260102T010101Z-aaaa", {"published_rows": 7, "answer_counts": {"ant": 7}, "abstained": 1}),
        ("nightly-20260103T010101Z-aaaa", {"published_rows": 0, "answer_counts": {}, "abstained": 0}),
        ("nightly-20260104T010101Z-aaaa", {"published_rows": 3}),
    ]
    for run_id, summary in nights:
        night.keep_night(table, run_id, {"run_id": run_id, **summary})
    table.write("nights/readme.txt", b"not ours")
    assert night.last_published(table) == {"run_id": nights[1][0], **nights[1][1]}
    assert (night.last_night(table) or {})["published_rows"] == 3


def test_what_was_refused_is_known_until_it_is_published(folder: Path) -> None:
    table, _ = tables(folder)
    first, *others = night.held_parts(table)
    night.refuse(table, [first], "night-1")
    night.refuse(table, others[:2], "night-2")
    assert Counter(night.refused(table).values()) == {"night-1": 1, "night-2": 2}
    assert night.publish(table, [first, *others[2:]]) == 4
    assert set(night.refused(table).values()) == {"night-2"}
    assert night.publish(table, others[:2]) == 2
    assert night.refused(table) == {}
    assert not (folder / "labels/held/refused.json").exists()


def test_part_that_came_after_the_judgement_is_not_published(folder: Path) -> None:
    table, _ = tables(folder)
    judged = night.held_parts(table)[1:]
    assert night.publish(table, judged) == 5
    assert len(files(folder / "labels", "data")) == 5
    assert len(files(folder / "labels/held", "data")) == 1
    assert len(files(folder / "labels/held", "also")) == 2
