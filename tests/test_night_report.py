"""What is gathered of a night for its page: rejects by reason, the most doubtful rows, pages beside summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from engine import night, night_report
from engine.night_report import INDEX, doubtful_rows, rejects_of, write_page
from engine.parts import PartName, part_name
from engine.schema import embeddings_schema, rejects_schema
from engine.storage import Store
from engine.tables import EmbeddingPartFacts, write_embedding_part
from tests.embedding_tables import FINGERPRINT, IDENTITY
from tests.report.pages import read_page
from tests.test_night import WIDTH, folder, tables

__all__ = ["folder"]  # the fixture: an embedding table, a bundle, and predictions of it that are held


def write_rejects(embeddings: Store, shard: str, reasons: list[str]) -> PartName:
    """A part of nothing but rejects."""
    schema = rejects_schema(keep_bytes=False)
    rows = [
        {"key": f"{shard}-{row}", "shard": shard, "index": row, "stage": "decode", "error": reason}
        | {"message": f"not an image: {row}", "size_bytes": 100 + row, "sha256": None}
        for row, reason in enumerate(reasons)
    ]
    facts = EmbeddingPartFacts(
        FINGERPRINT, "/made", shard, IDENTITY, None, None, len(reasons), len(reasons), None, ""
    )
    name = part_name(shard, IDENTITY, 0, True)
    write_embedding_part(
        embeddings,
        name,
        embeddings_schema(WIDTH, "float32").empty_table(),
        pa.Table.from_pylist(rows, schema=schema),
        facts,
    )
    return name


def test_rejects_are_counted_by_reason_and_each_reason_is_named(folder: Path) -> None:
    _, embeddings = tables(folder)
    first = write_rejects(embeddings, "x.tar", ["truncated_image"] * 41)
    second = write_rejects(embeddings, "y.tar", ["no_image", "truncated_image", "no_image"])
    found = rejects_of(embeddings, [first, second])
    assert found["by_reason"] == {"truncated_image": 42, "no_image": 2}
    assert [row["error"] for row in found["named"][:5]] == [
        "truncated_image",
        "no_image",
        "truncated_image",
        "no_image",
        "truncated_image",
    ]
    assert len(found["named"]) == 20
    assert found["named"][1] == {
        "key": "y.tar-0",
        "shard": "y.tar",
        "error": "no_image",
        "message": "not an image: 0",
        "size_bytes": 100,
    }
    assert (found["parts"], found["parts_read"]) == (2, 2)
    assert rejects_of(embeddings, []) == {"by_reason": {}, "named": [], "parts": 0, "parts_read": 0}


def test_parts_with_rejects_are_known_from_the_tally(folder: Path) -> None:
    table, embeddings = tables(folder)
    held = night.held_parts(table)
    assert night.tally(table, embeddings, held).parts_with_rejects == ()


def test_of_very_many_parts_with_rejects_the_first_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, embeddings = tables(folder)
    parts = [write_rejects(embeddings, f"{name}.tar", ["no_image"] * 3) for name in "xyz"]
    monkeypatch.setattr(night_report, "REJECTS_READ", 2)
    found = rejects_of(embeddings, parts)
    assert (found["by_reason"], found["parts"], found["parts_read"]) == ({"no_image": 6}, 3, 2)


def test_the_most_doubtful_rows_are_those_between_whose_candidates_there_is_least(folder: Path) -> None:
    table, _ = tables(folder)
    found = doubtful_rows(table, night.held_parts(table))
    rows = ds.dataset(folder / "labels/held/data").to_table().to_pylist()
    margins = sorted(row["top_confidences"][0] - row["top_confidences"][1] for row in rows)
    assert [row["margin"] for row in found["rows"]] == margins[:20]
    assert found["rows_read"] == len(rows) == 77
    by_key = {row["key"]: row for row in rows}
    for row in found["rows"]:
        there = by_key[row["key"]]
        assert (row["shard"], row["label"]) == (there["shard"], there["label"])
        assert (row["candidate"], row["confidence"]) == (there["top_labels"][0], there["confidence"])
    assert doubtful_rows(table, []) == {"rows": [], "rows_read": 0}


def test_a_page_lies_beside_its_summary_and_links_only_to_pages_that_are_there(folder: Path) -> None:
    table, _ = tables(folder)
    runs = [f"nightly-2026020{day}T010101Z-aaaa" for day in (1, 2, 3)]
    summaries: list[dict[str, Any]] = [{"run_id": run_id, "table": table.uri} for run_id in runs]
    for summary in summaries:
        night.keep_night(table, summary["run_id"], summary)
    table.write("nights/nightly-20260104.json", b"[] not ours")
    for summary in summaries[1:]:
        assert write_page(table, summary) == f"nights/{summary['run_id']}.html"
    page = read_page(table.read(f"nights/{runs[2]}.html").decode())
    assert [row[0] for row in page.by_id("nights").rows()] == ["2026-02-02 01:01 UTC", "2026-02-01 01:01 UTC"]
    assert [one.attributes["href"] for one in page.by_id("nights").all("a")] == [f"{runs[1]}.html"]
    assert table.read(INDEX) == table.read(f"nights/{runs[2]}.html")
    assert (night.last_night(table) or {})["run_id"] == runs[2], "pages are no summaries"
