"""Rows with their pictures, for a report: cards of answers and of rejects. Not for: which rows, or whose pictures.

A page shows whatever `pictures.json` holds; without it the cards say the same in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.report.tables import Picture, percent, shortened

Pictures = Mapping[tuple[str, int], Picture]
GROUPS = {
    "wrong": (
        "Wrong answers",
        "Of each confusion the most confident ones; the most frequent confusions come first.",
    ),
    "unsure": ("Least sure", "What a higher min_confidence would take away first."),
    "right": ("Right answers", "Of each class the most and the least confident one, and one between."),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A class, its probability in words and from 0 to 1, and whether the row is labelled with it."""

    label: str
    text: str
    share: float
    is_own: bool


@dataclass(frozen=True, slots=True)
class Card:
    """One row.

    Attributes:
        title: its key.
        facts: what is said of it: title and text.
        verdict: `right`, `wrong`, or nothing where there was no answer.
        cell: of the confusion matrix, as `<class>-<answer>`; empty: of none.
    """

    title: str
    picture: Picture | None
    facts: Sequence[tuple[str, str]]
    verdict: str = ""
    bars: Sequence[Bar] = ()
    cell: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Cards under one heading."""

    id: str
    title: str
    words: str
    cards: Sequence[Card] = field(default_factory=list)


def pictures_of(document: Mapping[str, Any] | None) -> dict[tuple[str, int], Picture]:
    """By shard and index; none where the bundle has none."""
    return {
        (one["shard"], one["index"]): Picture(one["webp"], one["width"], one["height"])
        for one in (document or {}).get("pictures", ())
    }


def missing_words(document: Mapping[str, Any] | None) -> str:
    """Why pictures are missing; empty: none is, or nobody looked for any."""
    missing = (document or {}).get("missing")
    if document is None or not missing:
        return ""
    told = "; ".join(f"{shortened(one['why'], 300)} ({one['samples']:,})" for one in missing)
    if not document["pictures"]:
        return f"Pictures were not available: {missing[0]['why']}."
    lacking = document["wanted"] - len(document["pictures"])
    return f"{lacking:,} of {document['wanted']:,} pictures were not available: {told}." if lacking else ""


def gallery_groups(
    gallery: Mapping[str, Any] | None, pictures: Pictures, classes: Sequence[str]
) -> list[Group]:
    """Rows of the judged split: wrong, least sure, right."""
    rows = (gallery or {}).get("rows", ())
    number_of = {name: number for number, name in enumerate(classes)}
    groups = [
        Group(name, *GROUPS[name], [_card(row, pictures, number_of) for row in rows if row["group"] == name])
        for name in GROUPS
    ]
    return [group for group in groups if group.cards]


def shown_cells(gallery: Mapping[str, Any] | None, classes: Sequence[str]) -> set[str]:
    """Cells of the confusion matrix of which the gallery has a row."""
    number_of = {name: number for number, name in enumerate(classes)}
    return {_cell(row, number_of) for row in (gallery or {}).get("rows", ())} - {""}


def reject_cards(rejects: Mapping[str, Any] | None, pictures: Pictures) -> list[Card]:
    """Examples of samples without an embedding, and what was wrong with them."""
    return [
        Card(
            shortened(one["key"]),
            pictures.get((one["shard"], one["index"])),
            [
                ("Reason", one["error"]),
                ("Shard", shortened(one["shard"])),
                ("", shortened(one["message"], 160)),
            ],
        )
        for one in (rejects or {}).get("examples", ())
    ]


def _card(row: Mapping[str, Any], pictures: Pictures, number_of: Mapping[str, int]) -> Card:
    own = set(row["labels"])
    return Card(
        shortened(row["key"]),
        pictures.get((row["shard"], row["index"])),
        [("Labelled", _listed(row["labels"])), ("Answered", _listed(row["answers"]))],
        "right" if row["right"] else "wrong",
        [
            Bar(
                shortened(one["label"], 40),
                percent(one["confidence"]),
                one["confidence"],
                one["label"] in own,
            )
            for one in row["top"]
        ],
        _cell(row, number_of),
    )


def _cell(row: Mapping[str, Any], number_of: Mapping[str, int]) -> str:
    """Empty where a row has any number of classes: then there is no matrix."""
    told = [*row["labels"], *row["answers"]]
    if len(row["labels"]) != 1 or len(row["answers"]) != 1 or not all(name in number_of for name in told):
        return ""
    return "-".join(str(number_of[name]) for name in told)


def _listed(labels: Sequence[str]) -> str:
    return shortened(", ".join(labels)) if labels else "nothing"
