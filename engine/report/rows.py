"""Rows that a report names or counts: mistakes, doubted labels, what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.report.tables import Cell, Table, count_cell, ratio_cell, shortened

SUSPECTS_SHOWN = 50
LEFT_OUT = {
    "unlabelled": "Rows without a label",
    "unknown_keys": "Labels of keys that no row has",
    "conflicting_keys": "Keys with several labels",
}


def mistakes_table(mistakes: Sequence[Mapping[str, Any]]) -> Table:
    """Wrong answers that were given with most confidence."""
    titles = {
        "key": "Key",
        "shard": "Shard",
        "split": "Split",
        "label": "Label",
        "answer": "Answer",
        "given": "Row has it",
        "confidence": "Confidence",
    }
    return _records("mistakes", "Most confident mistakes", titles, mistakes, len(mistakes))


def suspects_table(document: Mapping[str, Any] | None) -> Table | None:
    """Labels that are probably wrong, the most doubtful first; None where they were not looked for."""
    if document is None:
        return None
    titles = {
        "key": "Key",
        "shard": "Shard",
        "label": "Label",
        "suggested": "Seems to be",
        "given": "Row has it",
        "margin": "Margin",
    }
    suspects = document["suspects"]
    return _records(
        "suspects", "Labels that are probably wrong", titles, suspects[:SUSPECTS_SHOWN], len(suspects)
    )


def left_out_table(labels: Mapping[str, Any]) -> Table | None:
    """Rows and labels that do not fit; None where all do."""
    counts = {title: labels[name] for name, title in LEFT_OUT.items() if labels.get(name)}
    unseen = labels.get("classes_without_training_rows") or {}
    if unseen:
        counts["Rows of classes without a training row"] = sum(unseen.values())
    rows = [[Cell(title), count_cell(count)] for title, count in counts.items()]
    return Table("left-out", "Left out", ("What", "How many"), rows) if rows else None


def rejects_table(rejects: Mapping[str, int] | None) -> Table | None:
    """Samples without an image that can be used, by reason; None where that is not known or there are none."""
    if not rejects:
        return None
    ordered = sorted(rejects.items(), key=lambda one: (-one[1], one[0]))
    rows = [[Cell(reason), count_cell(count)] for reason, count in ordered]
    return Table("rejects", "Rejects by reason", ("Reason", "Samples"), rows)


def _records(
    id_: str, caption: str, titles: Mapping[str, str], records: Sequence[Mapping[str, Any]], total: int
) -> Table:
    """Records of known fields, as they come."""
    names = [name for name in titles if records and name in records[0]]
    rows = [[_record_cell(one[name]) for name in names] for one in records]
    note = f"The first {len(records):,} of {total:,}." if total > len(records) else ""
    return Table(id_, caption, [titles[name] for name in names], rows, note)


def _record_cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    return ratio_cell(value) if isinstance(value, float) else Cell(shortened(value))
