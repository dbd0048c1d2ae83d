"""Which rows of the judged split a person is shown, and what the head answered for them. Not for: their pictures.

Few rows, whatever the table: some of each kind of mistake, those the head is least sure of, and some right ones of each
class. The same logits choose the same rows. Shape letters: M judged rows, K classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.schema import SampleId
from engine.training.judgement import JudgedRows

# With SUSPECTS_PICTURED they are as many as the pictures of a report may be (`engine.pictures`).
WRONG_SHOWN = 48
UNSURE_SHOWN = 12
RIGHT_SHOWN = 40
SUSPECTS_PICTURED = 20
TOP_SHOWN = 3  # classes of each row, with their probabilities

Probabilities = NDArray[np.floating[Any]]


def gallery_of_classes(
    split: str, rows: JudgedRows, probabilities_MK: Probabilities, class_names: Sequence[str]
) -> dict[str, Any]:
    """For gallery.json, of rows that have one class each.

    Args:
        split: its name.
        rows: of that split; the logits are not looked at.
        probabilities_MK: calibrated.
        class_names: K names in the order of the probabilities.
    """
    answers_M = probabilities_MK.argmax(axis=1)
    chosen = choose_rows(
        rows.targets_N * len(class_names) + answers_M,
        answers_M == rows.targets_N,
        probabilities_MK.max(axis=1, initial=0.0),
    )
    told = {
        row: ([class_names[rows.targets_N[row]]], [class_names[answers_M[row]]])
        for some in chosen.values()
        for row in some
    }
    return _document(split, rows, chosen, told, probabilities_MK, class_names)


def gallery_of_label_sets(
    split: str,
    rows: JudgedRows,
    probabilities_MK: Probabilities,
    thresholds: Sequence[float],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """For gallery.json, of rows that have any number of classes; a row is right where all questions are.

    Args:
        thresholds: of each class the probability from which on a row is given it.
        split, rows, probabilities_MK, class_names: as of `gallery_of_classes`.
    """
    given_MK = probabilities_MK >= np.asarray(thresholds)
    has_MK = rows.targets_N.astype(bool)
    is_right_M = (given_MK == has_MK).all(axis=1)
    distances_MK = np.abs(probabilities_MK - np.asarray(thresholds))
    nearest_M = distances_MK.min(axis=1, initial=1.0)
    farthest_wrong_M = np.where(given_MK == has_MK, 0.0, distances_MK).max(axis=1, initial=0.0)
    chosen = choose_rows(
        np.where(is_right_M, has_MK.argmax(axis=1), -1),
        is_right_M,
        np.where(is_right_M, nearest_M, farthest_wrong_M),
        nearest_M,
    )

    def names(has_K: NDArray[np.bool_]) -> list[str]:
        return [class_names[number] for number in np.flatnonzero(has_K).tolist()]

    told = {row: (names(has_MK[row]), names(given_MK[row])) for some in chosen.values() for row in some}
    return _document(split, rows, chosen, told, probabilities_MK, class_names)


def choose_rows(
    cells_M: NDArray[np.integer[Any]],
    is_right_M: NDArray[np.bool_],
    sureness_M: Probabilities,
    doubt_M: Probabilities | None = None,
) -> dict[str, list[int]]:
    """Numbers of rows: `wrong`, `unsure` and `right`; a row is in one of them at most.

    Args:
        cells_M: what is taken for what: rows of one number are of a kind. Of wrong rows the largest kinds come first.
        sureness_M: wrong rows are shown from the highest down; of right ones the highest, the lowest, the middle.
        doubt_M: the lowest are `unsure`; None: by sureness.
    """
    surest = np.argsort(-sureness_M, kind="stable")
    wrong_kinds = _kinds(surest[~is_right_M[surest]], cells_M)
    wrong = _by_turns(sorted(wrong_kinds.values(), key=len, reverse=True), WRONG_SHOWN)
    doubted = np.argsort(sureness_M if doubt_M is None else doubt_M, kind="stable").tolist()
    unsure = _but(set(wrong), doubted, UNSURE_SHOWN)
    right_kinds = _kinds(surest[is_right_M[surest]], cells_M)
    typical = [_ends_and_middle(right_kinds[kind]) for kind in sorted(right_kinds)]
    right = _but({*wrong, *unsure}, _by_turns(typical, 2 * RIGHT_SHOWN), RIGHT_SHOWN)
    return {"wrong": wrong, "unsure": unsure, "right": right}


def wanted_pictures(
    metrics: Mapping[str, Any], suspects: Sequence[Mapping[str, Any]] | None, gallery: Mapping[str, Any]
) -> list[SampleId]:
    """The samples that a report shows, the most wanted first, each once."""
    rows = [*metrics["most_confident_mistakes"], *(suspects or [])[:SUSPECTS_PICTURED], *gallery["rows"]]
    return list(dict.fromkeys((row["shard"], row["index"]) for row in rows))


def _kinds(rows: NDArray[np.int64], cells_M: NDArray[np.integer[Any]]) -> dict[int, list[int]]:
    """Rows of each kind, in the order in which they come."""
    kinds: dict[int, list[int]] = defaultdict(list)
    for row, cell in zip(rows.tolist(), cells_M[rows].tolist(), strict=True):
        kinds[cell].append(row)
    return kinds


def _ends_and_middle(rows: list[int]) -> list[int]:
    places = dict.fromkeys((0, len(rows) - 1, len(rows) // 2))
    return [rows[place] for place in places]


def _by_turns(kinds: Iterable[Sequence[int]], most: int) -> list[int]:
    """The first of each kind, then the second of each."""
    turns = (row for turn in zip_longest(*kinds) for row in turn if row is not None)
    return [row for row, _ in zip(turns, range(most), strict=False)]


def _but(taken: set[int], rows: Iterable[int], most: int) -> list[int]:
    left = (row for row in rows if row not in taken)
    return [row for row, _ in zip(left, range(most), strict=False)]


def _document(
    split: str,
    rows: JudgedRows,
    chosen: Mapping[str, Sequence[int]],
    told: Mapping[int, tuple[list[str], list[str]]],
    probabilities_MK: Probabilities,
    class_names: Sequence[str],
) -> dict[str, Any]:
    return {
        "split": split,
        "rows": [
            {
                "key": rows.keys[row],
                "shard": rows.shards[row],
                "index": rows.indexes[row],
                "group": group,
                "labels": told[row][0],
                "answers": told[row][1],
                "right": told[row][0] == told[row][1],
                "top": _top(probabilities_MK[row], class_names),
            }
            for group, some in chosen.items()
            for row in some
        ],
    }


def _top(probabilities_K: Probabilities, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The most probable classes, of equal ones the first."""
    numbers = np.argsort(-probabilities_K, kind="stable")[:TOP_SHOWN].tolist()
    return [
        {"label": class_names[number], "confidence": round(float(probabilities_K[number]), 4)}
        for number in numbers
    ]
