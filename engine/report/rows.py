"""Rows that a report names or counts: mistakes, doubted labels, what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.report.pictures import Pictures
from engine.report.tables import Cell, Table, count_cell, ratio_cell, shortened

SUSPECTS_SHOWN = 50
LEFT_OUT = {
    "unlabelled": "Rows without a label",
    "unknown_keys": "Labels of keys that no row has",
    "conflicting_keys": "Keys with several labels",
}


def mistakes_table(mistakes: Sequence[Mapping[str, Any]], pictures: Pictures) -> Table:
    """Wrong answers that were given with most confidence, with the pictures that there are."""
    titles = {
        "key": "Key",
        "shard": "Shard",
        "split": "Split",
        "label": "Label",
        "answer": "Answer",
        "given": "Row has it",
        "confidence": "Confidence",
    }
    return _records("mistakes", "Most confident mistakes", titles, mistakes, len(mistakes), pictures)


def suspects_table(document: Mapping[str, Any] | None, pictures: Pictures) -> Table | None:
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
    caption = "Labels that are probably wrong"
    return _records("suspects", caption, titles, suspects[:SUSPECTS_SHOWN], len(suspects), pictures)


def left_out_table(labels: Mapping[str, Any]) -> Table | None:
    """Rows and labels that do not fit; None where all do."""
    counts = {title: labels[name] for name, title in LEFT_OUT.items() if labels.get(name)}
    unseen = labels.get("classes_without_training_rows") or {}
    if unseen:
        counts["Rows of classes without a training row"] = sum(unseen.values())
    rows = [[Cell(title), count_cell(count)] for title, count in counts.items()]
    return Table("left-out", "Left out", ("What", "How many"), rows) if rows else None


def rejects_table(metrics: Mapping[str, Any], document: Mapping[str, Any] | None) -> Table | None:
    """Samples without an image that can be used, by reason; None where that is not known or there are none.

    Args:
        metrics: has the rejects of a fine-tuning.
        document: rejects.json, of the table that a head was fitted on.
    """
    rejects = metrics.get("rejects") or (document or {}).get("reasons")
    if not rejects:
        return None
    note = ""
    if document and document["has_more"]:
        note = f"Of {document['files_read']:,} files of rejects; there are more."
    ordered = sorted(rejects.items(), key=lambda one: (-one[1], one[0]))
    rows = [[Cell(reason), count_cell(count)] for reason, count in ordered]
    return Table("rejects", "Rejects by reason", ("Reason", "Samples"), rows, note)


def _records(
    id_: str,
    caption: str,
    titles: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    total: int,
    pictures: Pictures,
) -> Table:
    """Records of known fields, as they come; the first is the key, with the picture."""
    names = [name for name in titles if records and name in records[0]]
    rows = [
        [
            replace(_record_cell(one["key"]), picture=pictures.get((one["shard"], one.get("index", -1)))),
            *(_record_cell(one[name]) for name in names[1:]),
        ]
        for one in records
    ]
    note = f"The first {len(records):,} of {total:,}." if total > len(records) else ""
    return Table(id_, caption, [titles[name] for name in names], rows, note)


def _record_cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    return ratio_cell(value) if isinstance(value, float) else Cell(shortened(value))
