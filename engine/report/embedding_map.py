"""The map of embeddings, for a report: points as one path for each class, where names stand. Not for: colours.

Drawn here and not by Matplotlib, whose two thousand marks would be 180 kB; names of classes come from outside, and the
template escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.report.tables import percent, shortened

WIDTH, HEIGHT, MARGIN = 640, 440, 14
COLOURS = 12  # of the page; more classes begin again
NAMED_CLASSES = 20  # up to which names stand on the map
LISTED_CLASSES = 1_000
LINE_PX, LETTER_PX = 17, 9  # between two names; the width of a letter of one


@dataclass(frozen=True, slots=True)
class MapClass:
    """Points of one class.

    Attributes:
        path: a dot for each, as SVG draws a line of no length with round ends.
        colour: number of its colour.
        name_at: middle of its points; None: it has no place.
    """

    number: int
    label: str
    points: int
    path: str
    colour: int
    name_at: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """A map, and what it is told as."""

    classes: Sequence[MapClass]
    words: str
    axes: tuple[str, str]
    width: int = WIDTH
    height: int = HEIGHT


def embedding_map(document: Mapping[str, Any] | None, classes: Sequence[str]) -> EmbeddingMap | None:
    """The map of a bundle; None where it has none.

    Args:
        document: embedding_map.json.
        classes: names in the order of the classes' numbers.
    """
    if document is None or not document["x"]:
        return None
    x_P, y_P = _scaled(document["x"], document["y"])
    class_P = np.array(document["class"])
    found = [number for number in np.unique(class_P).tolist() if number < len(classes)][:LISTED_CLASSES]
    drawn = [
        MapClass(
            number,
            shortened(classes[number], 40) if number >= 0 else "no class",
            int((class_P == number).sum()),
            "".join(
                f"M{x} {y}h0" for x, y in zip(x_P[class_P == number], y_P[class_P == number], strict=True)
            ),
            number % COLOURS,
            (int(np.median(x_P[class_P == number])), int(np.median(y_P[class_P == number])))
            if len(found) <= NAMED_CLASSES
            else None,
        )
        for number in found
    ]
    first, second = document["explained"]
    words = (
        f"{len(x_P):,} of {document['of_rows']:,} labelled rows. Rows that lie near each other look alike to the "
        f"backbone. The two axes hold {percent(first + second)} of what tells these rows apart."
    )
    axes = (f"first component, {percent(first)}", f"second component, {percent(second)}")
    return EmbeddingMap(_with_names_apart(drawn), words, axes)


def _scaled(x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole pixels in the middle of the map, up is less; one scale for both axes, so that distances can be compared."""
    points_P2 = np.column_stack([x, y]).astype(np.float64)
    spans = np.maximum(np.ptp(points_P2, axis=0), 1e-12)
    scale = min((WIDTH - 2 * MARGIN) / spans[0], (HEIGHT - 2 * MARGIN) / spans[1])
    middle = (points_P2.max(axis=0) + points_P2.min(axis=0)) / 2
    pixels_P2 = np.rint((points_P2 - middle) * (scale, -scale) + (WIDTH / 2, HEIGHT / 2)).astype(np.int64)
    return pixels_P2[:, 0], pixels_P2[:, 1]


def _with_names_apart(drawn: Sequence[MapClass]) -> list[MapClass]:
    """Names that would stand on each other are moved down, one after the other."""
    placed: list[MapClass] = []
    for one in sorted(drawn, key=lambda one: (one.name_at or (0, 0))[1]):
        if one.name_at is None:
            placed.append(one)
            continue
        half = len(one.label) * LETTER_PX // 2 + 4
        x, y = min(max(one.name_at[0], half), WIDTH - half), one.name_at[1]
        for other in placed:
            assert other.name_at is not None
            is_beside = abs(other.name_at[0] - x) < LETTER_PX * (len(one.label) + len(other.label)) // 2
            if is_beside and abs(other.name_at[1] - y) < LINE_PX:
                y = other.name_at[1] + LINE_PX
        placed.append(
            MapClass(one.number, one.label, one.points, one.path, one.colour, (x, min(y, HEIGHT - MARGIN)))
        )
    return sorted(placed, key=lambda one: one.number)
