"""Rows for the page of a night: whatever is wrong with them, the night goes on without."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import night
from jobs.nightly import _to_look_at
from tests.test_night import folder, tables

__all__ = ["folder"]  # the fixture: an embedding table, a bundle, and predictions of it that are held


def test_rows_that_nobody_foresaw_cost_a_night_its_rows_to_look_at_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, embeddings = tables(folder)
    found = night.tally(table, embeddings, night.held_parts(table))
    assert len(_to_look_at(table, embeddings, night.held_parts(table), found)["doubtful"]["rows"]) == 20
    for path in (folder / "labels/held/data").glob("*.parquet"):
        part = pq.read_table(path)
        place = part.column_names.index("top_confidences")
        nobody = pa.array([[]] * part.num_rows, pa.list_(pa.float32()))
        pq.write_table(part.set_column(place, "top_confidences", nobody), path)
    assert _to_look_at(table, embeddings, night.held_parts(table), found) == {}
    assert "the night's page goes without rows to look at: ValueError: not enough" in capsys.readouterr().err
