"""What a report tells of confidences: how many answers a threshold leaves, and whether they mean what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.report.tables import Cell, Table, count_cell, number_cell, percent, ratio_cell

THRESHOLDS_SHOWN = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of the table; the slider has them all


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What becomes of accuracy where answers below a confidence are not given.

    Attributes:
        steps: for each threshold the texts of it, of the share of rows that are labelled, and of their accuracy.
        chosen: number of the step that is shown first.
        table: some of them.
    """

    steps: Sequence[tuple[str, str, str]]
    chosen: int
    table: Table


def thresholds(judged: Mapping[str, Any], calibration: Mapping[str, Any]) -> Thresholds | None:
    """Accuracy and share labelled for each `min_confidence`; None where metrics do not hold it."""
    curve = judged.get("by_min_confidence")
    if not curve:
        return None
    # The slider begins where the lowest wished accuracy that needs a threshold has it.
    suggested = [
        one["min_confidence"]
        for one in calibration.get("suggested_min_confidence") or []
        if one["min_confidence"]
    ]
    wanted = suggested[0] if suggested else 0.0
    chosen = min(range(len(curve)), key=lambda place: abs(curve[place]["min_confidence"] - wanted))
    shown = [
        min(curve, key=lambda point: abs(point["min_confidence"] - threshold))
        for threshold in THRESHOLDS_SHOWN
    ]
    table = Table(
        "thresholds",
        "Share of rows that are labelled, and their accuracy",
        ("min_confidence", "Labelled", "Accuracy"),
        [
            [
                ratio_cell(point["min_confidence"], 3),
                number_cell(percent(point["coverage"]), point["coverage"]),
                number_cell(percent(point["accuracy"]), point["accuracy"]),
            ]
            for point in shown
        ],
    )
    steps = [
        (f"{point['min_confidence']:.3f}", percent(point["coverage"]), percent(point["accuracy"]))
        for point in curve
    ]
    return Thresholds(steps, chosen, table)


def suggestions_table(calibration: Mapping[str, Any]) -> Table | None:
    """A `min_confidence` for each wished share of right answers, and what it came to on test."""
    suggested = calibration.get("suggested_min_confidence")
    if not suggested:
        return None
    rows = []
    for one in suggested:
        test, threshold = one.get("test") or {}, one["min_confidence"]
        rows.append(
            [
                number_cell(percent(one["precision"]), one["precision"]),
                Cell("not reached") if threshold is None else ratio_cell(threshold),
                number_cell(percent(one["coverage"]), one["coverage"]),
                number_cell(percent(test.get("precision")), test.get("precision")),
                number_cell(percent(test.get("coverage")), test.get("coverage")),
            ]
        )
    columns = (
        "Wished accuracy",
        "min_confidence",
        "Labelled (validation)",
        "Accuracy on test",
        "Labelled (test)",
    )
    return Table("suggestions", "Thresholds found on validation rows", columns, rows)


def reliability_table(bins: Sequence[Mapping[str, Any]]) -> Table | None:
    """What confidences promise and what answers keep."""
    if not bins:
        return None
    rows = [
        [
            Cell(f"{one['above']:.3f} to {one['up_to']:.3f}", one["above"]),
            count_cell(one["rows"]),
            number_cell(percent(one["confidence"]), one["confidence"]),
            number_cell(percent(one["accuracy"]), one["accuracy"]),
        ]
        for one in bins
    ]
    columns = ("Confidence", "Answers", "Mean confidence", "Right")
    return Table("reliability", "Confidence beside accuracy", columns, rows)


def calibration_words(judged: Mapping[str, Any], calibration: Mapping[str, Any], split: str) -> str:
    """The calibration error, and what it was before."""
    if judged.get("calibration_error") is None:
        return ""
    before = (calibration.get("calibration_error_before") or {}).get(split)
    return f"Calibration error {percent(judged['calibration_error'])}" + (
        f" ({percent(before)} before calibration)." if before is not None else "."
    )
