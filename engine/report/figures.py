"""What a report tells first: the single figures of each split, and what the bundle is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.report.tables import (
    LABEL_SHOWN,
    NOTHING,
    Cell,
    Table,
    count_cell,
    in_one_line,
    number_cell,
    percent,
    shortened,
)

TITLES = {
    "accuracy": "Accuracy",
    "mean_average_precision": "Mean average precision",
    "micro_f1": "F1 of all questions together",
    "exact_match": "Rows with all classes right",
    "loss": "Loss (cross-entropy, nats)",
    "roc_auc": "ROC AUC, mean of the classes",
    "calibration_error": "Calibration error",
    "rows": "Rows",
}
SHARES = ("accuracy", "exact_match", "calibration_error")  # shown in percent


def judged_split(metrics: Mapping[str, Any]) -> str:
    """The split that the page tells of: test, or validation where test has no rows."""
    return "test" if metrics.get("test") or not metrics.get("validation") else "validation"


def headline(judged: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and text of every single figure of a split."""
    return [
        (_title(name), _figure(name, value))
        for name, value in judged.items()
        if isinstance(value, int | float)
    ]


def facts(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the bundle is: title and text."""
    classes = manifest["classes"]
    shown = ", ".join(shortened(name, 30) for name in classes[:8])
    backbone = record.get("backbone") or {}
    told = {
        "Task": manifest["task"].replace("_", " "),
        "Classes": f"{len(classes):,}: {shown}" + (", …" if len(classes) > 8 else ""),
        "Head": in_one_line(manifest["head"]),
        "Columns beside the embedding": shortened(
            ", ".join(one["column"] for one in manifest["side_features"]), 3 * LABEL_SHOWN
        ),
        "Backbone": _named_backbone(backbone),
        "Embedding width": f"{manifest['width']:,}",
        "Fingerprint": manifest["fingerprint"][:12],
        "Published": manifest["created"],
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    }
    return [(title, text) for title, text in told.items() if text]


def splits_table(metrics: Mapping[str, Any]) -> Table:
    """Figures of validation and test side by side, and how many rows each split has."""
    judged = {name: metrics.get(name) or {} for name in ("validation", "test")}
    names = dict.fromkeys(
        name
        for split in judged.values()
        for name, value in split.items()
        if isinstance(value, int | float) and name != "rows"
    )
    counted = metrics.get("split") or {}
    counts = [
        counted.get(split, {}).get("rows", judged.get(split, {}).get("rows"))
        for split in ("train", "validation", "test")
    ]
    rows = [[Cell("Rows"), *(count_cell(count) for count in counts)]]
    for name in names:
        cells = (number_cell(_figure(name, split.get(name)), split.get(name)) for split in judged.values())
        rows.append([Cell(_title(name)), Cell(NOTHING), *cells])
    return Table("splits", "Figures of each split", ("Figure", "Train", "Validation", "Test"), rows)


def _title(name: str) -> str:
    if name.startswith("top_") and name.endswith("_accuracy"):
        return f"Top-{name.removeprefix('top_').removesuffix('_accuracy')} accuracy"
    return TITLES.get(name, name.replace("_", " "))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    if name in SHARES or name.endswith("_accuracy"):
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _named_backbone(block: Mapping[str, Any]) -> str:
    if not block:
        return ""
    size = f" at {block['input_size']} px" if block.get("input_size") else ""
    return shortened(f"{block.get('name') or block.get('kind', '')}{size}")
