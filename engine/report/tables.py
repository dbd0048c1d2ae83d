"""Tables of a report, and how numbers and strangers' words are written in them. Not for: what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "-"  # where there is no number
LABEL_SHOWN = 80  # characters of a label, key or path


@dataclass(frozen=True, slots=True)
class Picture:
    """A small picture: WebP in base64, and its size."""

    webp: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Text as it is shown, and what it is sorted by: a number, else the text.

    Attributes:
        picture: beside the text.
        opens: the cell of the confusion matrix whose rows it shows when it is chosen; empty: it cannot be.
        words: what it then says of itself.
    """

    text: str
    number: float | None = None
    picture: Picture | None = None
    opens: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows whose first cell is their name.

    Attributes:
        id: of the element, unique on the page.
        columns: titles.
        note: what is left out, if anything is.
    """

    id: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def percent(share: float | None) -> str:
    """0.9375 is 93.75 %; None is a hyphen."""
    return NOTHING if share is None else f"{100 * share:.2f} %"


def shortened(text: object, limit: int = LABEL_SHOWN) -> str:
    """Its beginning, where it is too long to be shown."""
    whole = str(text)
    return whole if len(whole) <= limit else whole[: limit - 1] + "…"


def number_cell(text: str, value: float | None) -> Cell:
    """A number in words of its own."""
    return Cell(text, None if value is None else float(value))


def count_cell(value: int | None) -> Cell:
    """12345 is 12,345."""
    return Cell(NOTHING) if value is None else Cell(f"{value:,}", float(value))


def ratio_cell(value: float | None, digits: int = 4) -> Cell:
    """0.5 is 0.5000."""
    return Cell(NOTHING) if value is None else Cell(f"{value:.{digits}f}", float(value))


def in_one_line(block: Mapping[str, Any]) -> str:
    """A block of a recipe in one line: its kind, then its fields."""
    fields = (f"{name} {json.dumps(value)}" for name, value in block.items() if name != "kind")
    return shortened(", ".join([str(block.get("kind", "")), *fields]), 3 * LABEL_SHOWN)
