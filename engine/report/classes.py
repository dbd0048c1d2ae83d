"""What a report tells of each class, and which are taken for which; bounded, however many there are."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.report.tables import Cell, Table, count_cell, number_cell, percent, ratio_cell, shortened

CLASSES_SHOWN = 1_000  # rows of the table of classes
MATRIX_CLASSES = 40  # up to which the confusion matrix is shown whole
CONFUSIONS_SHOWN = 20
CLASS_TITLES = {
    "label": "Class",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "support": "Rows",
    "roc_auc": "ROC AUC",
    "average_precision": "Average precision",
    "threshold": "Threshold",
}


@dataclass(frozen=True, slots=True)
class MatrixCell:
    """Rows of one class that were given one answer.

    Attributes:
        share: of the class's rows, from 0 to 1; empty: none.
        opens, words: as of a table's cell.
    """

    text: str
    share: str
    is_right: bool
    opens: str
    words: str


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """Answers to the rows of one class."""

    label: str
    cells: Sequence[MatrixCell]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A confusion matrix; row: true class, column: answer."""

    labels: Sequence[str]
    rows: Sequence[MatrixRow]


def classes_table(judged: Mapping[str, Any]) -> Table | None:
    """Precision, recall and whatever else is known of each class; of very many those with the lowest F1."""
    per_class = judged.get("per_class")
    if not per_class:
        return None
    shown, note = per_class, ""
    if len(per_class) > CLASSES_SHOWN:
        shown = heapq.nsmallest(CLASSES_SHOWN, per_class, key=lambda one: one["f1"])
        note = f"{CLASSES_SHOWN:,} of {len(per_class):,} classes: those with the lowest F1."
    names = [name for name in CLASS_TITLES if name in per_class[0]]
    rows = [[_class_cell(name, one[name]) for name in names] for one in shown]
    return Table("classes", "Figures of each class", [CLASS_TITLES[name] for name in names], rows, note)


def confusion_matrix(
    judged: Mapping[str, Any], classes: Sequence[str], pictured: Container[str] = ()
) -> Matrix | None:
    """The whole matrix, where it can be looked at.

    Args:
        pictured: cells of which there are rows to show, as `<class>-<answer>`.
    """
    matrix = judged.get("confusion_matrix")
    if not matrix or len(matrix) > MATRIX_CLASSES:
        return None
    rows = [
        MatrixRow(
            shortened(classes[true], 40),
            [
                MatrixCell(
                    f"{count:,}",
                    f"{count / max(1, sum(counts)):.3f}" if count else "",
                    answer == true,
                    *_opening(true, answer, count, classes, pictured),
                )
                for answer, count in enumerate(counts)
            ],
        )
        for true, counts in enumerate(matrix)
    ]
    return Matrix([shortened(name, 24) for name in classes], rows)


def confusions_table(
    judged: Mapping[str, Any], classes: Sequence[str], pictured: Container[str] = ()
) -> Table | None:
    """The wrong answers that were given most often; `pictured` as of `confusion_matrix`."""
    matrix = judged.get("confusion_matrix")
    if not matrix:
        return None
    rows = [
        [
            Cell(shortened(classes[true])),
            Cell(shortened(classes[answer])),
            Cell(f"{count:,}", float(count), None, *_opening(true, answer, count, classes, pictured)),
            number_cell(percent(count / sum(matrix[true])), count / sum(matrix[true])),
        ]
        for count, true, answer in heapq.nsmallest(
            CONFUSIONS_SHOWN, _confusions(matrix), key=lambda one: (-one[0], one[1:])
        )
    ]
    columns = ("Labelled", "Answered", "Rows", "Share of the class")
    return Table("confusions", "Most frequent confusions", columns, rows)


def _opening(
    true: int, answer: int, count: int, classes: Sequence[str], pictured: Container[str]
) -> tuple[str, str]:
    """Which cell it is, and what opening it is called; empty where there is nothing to show."""
    cell = f"{true}-{answer}"
    if cell not in pictured:
        return "", ""
    rows, label = "row" if count == 1 else "rows", shortened(classes[true], 40)
    if true == answer:
        return cell, f"{count:,} {rows} of {label}, answered so"
    return cell, f"{count:,} {rows} of {label}, answered {shortened(classes[answer], 40)}"


def _confusions(matrix: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    for true, counts in enumerate(matrix):
        for answer, count in enumerate(counts):
            if count and answer != true:
                yield count, true, answer


def _class_cell(name: str, value: Any) -> Cell:
    if name == "label":
        return Cell(shortened(value))
    return count_cell(value) if name == "support" else ratio_cell(value)
