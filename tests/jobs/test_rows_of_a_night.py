"""Rows for the page of a night, and their pictures: whatever is wrong with them, the night goes on without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import night
from engine.config import check_recipe
from engine.lease import held_lease, this_run
from engine.storage import open_store
from jobs.nightly import NightlyRecipe, _Night, _pictures, _to_look_at
from jobs.outcome import Run
from tests.test_night import ROWS, folder, tables

__all__ = ["folder"]  # the fixture: an embedding table, a bundle, and predictions of it that are held


def test_rows_that_nobody_foresaw_cost_a_night_its_rows_to_look_at_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, embeddings = tables(folder)
    found = night.tally(table, embeddings, night.held_parts(table))
    rows = _to_look_at(table, embeddings, night.held_parts(table), found)
    assert rows is not None and len(rows.doubtful["rows"]) == 20
    for path in (folder / "labels/held/data").glob("*.parquet"):
        part = pq.read_table(path)
        place = part.column_names.index("top_confidences")
        nobody = pa.array([[]] * part.num_rows, pa.list_(pa.float32()))
        pq.write_table(part.set_column(place, "top_confidences", nobody), path)
    assert _to_look_at(table, embeddings, night.held_parts(table), found) is None
    assert "the night's page goes without rows to look at: ValueError: not enough" in capsys.readouterr().err


def recipe_of(folder: Path, **fields: Any) -> NightlyRecipe:
    wanted = {
        "source": {"kind": "webdataset", "uri": str(folder / "archive")},
        "backbone": {"kind": "keras_application", "name": "MobileNetV2", "input_size": 32},
        "output": {"uri": str(folder / "embeddings")},
        "bundles": [{"uri": str(folder / "bundle"), "output": {"uri": str(folder / "labels")}}],
    }
    return check_recipe(NightlyRecipe, {**wanted, **fields})


@pytest.fixture
def this_night(folder: Path) -> Iterator[_Night]:
    """That has judged its table, and has rows to show."""
    table, embeddings = tables(folder)
    with held_lease(embeddings, "_nightly", this_run("nightly-1"), 600.0) as lease:
        running, parts = (
            _Night({"run_id": "nightly-1"}, lease, 0.0, Run.new("nightly")),
            night.held_parts(table),
        )
        rows = _to_look_at(table, embeddings, parts, night.tally(table, embeddings, parts))
        assert rows is not None
        running.rows[table.uri] = rows
        yield running


def why_none(document: dict[str, Any] | None) -> str:
    """The one reason that a night has no picture."""
    assert document is not None and document["pictures"] == []
    (one,) = document["missing"]
    return str(one["why"])


def test_a_recipe_without_pictures_decides_the_page_and_no_table(folder: Path, this_night: _Night) -> None:
    without, usual = recipe_of(folder, report={"pictures": False}), recipe_of(folder)
    assert usual.report.pictures
    assert without.extraction() == usual.extraction() and without.scoring() == usual.scoring()
    assert why_none(_pictures(without, this_night, tables(folder)[0])) == "report.pictures is false"


def test_an_archive_that_is_gone_leaves_a_night_its_words(folder: Path, this_night: _Night) -> None:
    """The one that these embeddings name was never there."""
    document = _pictures(recipe_of(folder), this_night, tables(folder)[0])
    assert document is not None and (document["wanted"], document["pictures"]) == (20, [])
    whys = {one["why"] for one in document["missing"]}
    assert whys <= {f"cannot find /made/{shard}" for shard in ROWS} and whys
    assert sum(one["samples"] for one in document["missing"]) == 20


def test_a_night_that_was_interrupted_takes_no_pictures(folder: Path, this_night: _Night) -> None:
    this_night.about["error"] = {"kind": "KeyboardInterrupt", "thing": "interrupted"}
    assert (
        why_none(_pictures(recipe_of(folder), this_night, tables(folder)[0])) == "the night was interrupted"
    )


def test_what_nobody_foresaw_in_a_picture_is_words_on_the_page(folder: Path, this_night: _Night) -> None:
    table, _ = tables(folder)
    rows = this_night.rows[table.uri]
    record = {**rows.record, "rows_per_part": "seventeen"}
    this_night.rows[table.uri] = dataclasses.replace(rows, record=record)
    why = why_none(_pictures(recipe_of(folder), this_night, table))
    assert why.startswith("reading them failed: TypeError: unsupported operand")


def test_a_table_that_was_not_judged_has_no_rows_and_no_pictures(folder: Path, this_night: _Night) -> None:
    assert _pictures(recipe_of(folder), this_night, open_store(str(folder / "others"))) is None
