"""What is gathered of a night for its page, and the page itself: `nights/<run id>.html`, and as `nights/index.html` the
last one's.

Bounded, however much a night held: some rejects, some rows, their pictures, the last nights. Pictures are in the page
alone: every later night reads the summaries. Not for: what the page looks like (`engine.report.night`), or judging a
night (`engine.gate`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.errors import ObjectChanged
from engine.night import NIGHTS_FOLDER, READ_THREADS, Held, embedding_part_of, held_store, nights
from engine.parts import PartName, path16_of
from engine.pictures import Budget, TableParts, read_pictures
from engine.report.night import render_night
from engine.storage import ObjectInfo, Store
from engine.tables import DATA_FOLDER, Record, read_part, read_rejects, require_record

INDEX = f"{NIGHTS_FOLDER}index.html"
REJECTS_READ = 256  # parts: of a part of 1,024 samples that holds a few, some thousand rejects
REJECTS_NAMED = 20
DOUBTED_PARTS = 16  # evenly taken: 16,384 rows, read in less than a second
DOUBTED_ROWS = 20
NIGHTS_LISTED = 30
PICTURES_BUDGET = Budget(seconds=10.0, size=256 << 20)  # of all pages of a night; the next one may be waiting


@dataclass(frozen=True, slots=True)
class RowsShown:
    """Rows that a night's page names, and what their pictures are found by.

    Attributes:
        embeddings: the embedding table.
        record: its `_table.json`.
        rejects: of `rejects_of`.
        doubtful: of `doubtful_rows`.
        parts: embedding parts of the shards that these rows are of, by path16 and number: their names, and the identity
            that each had when it was scored.
    """

    embeddings: Store
    record: Record
    rejects: Mapping[str, Any]
    doubtful: Mapping[str, Any]
    parts: Mapping[tuple[str, int], tuple[PartName, str]]


def rows_shown(
    table: Store, embeddings: Store, held: Sequence[Held], parts_with_rejects: Sequence[PartName]
) -> RowsShown:
    """Gather them, from what a night holds.

    Args:
        held: its parts.
        parts_with_rejects: embedding parts among those that they were made from.

    Raises:
        EngineError: something of it cannot be read.
    """
    rejects, doubtful = rejects_of(embeddings, parts_with_rejects), doubtful_rows(table, held)
    shards = {path16_of(row["shard"]) for row in (*rejects["named"], *doubtful["rows"])}
    parts = {
        (part.name.path16, part.name.number): (embedding_part_of(part), part.facts.embedding_identity)
        for part in held
        if part.name.path16 in shards
    }
    return RowsShown(embeddings, require_record(embeddings, "embeddings"), rejects, doubtful, parts)


def pictures_of(rows: RowsShown, budget: Budget) -> dict[str, Any]:
    """Small pictures of the rows, doubtful ones first, as for pictures.json: what could be had, and why the rest could
    not."""
    store = rows.embeddings

    def part_at(path16: str, number: int) -> tuple[PartName, ObjectInfo] | None:
        if (path16, number) not in rows.parts:
            return None
        name, identity = rows.parts[path16, number]
        info = store.info(f"{DATA_FOLDER}{name}")
        if info.identity != identity:
            raise ObjectChanged(f"{store.uri}/{info.path}: was rewritten since it was scored")
        return name, info

    doubtful = [(row["shard"], row["index"]) for row in rows.doubtful["rows"]]
    parts = TableParts(store, rows.record, part_at)
    return read_pictures(parts, doubtful, rows.rejects["named"], budget)


def rejects_of(embeddings: Store, parts: Sequence[PartName]) -> dict[str, Any]:
    """Why samples of these embedding parts became no embedding, from the first 256 of them.

    Returns:
        `by_reason`: reason -> samples. `named`: key, shard, index, error, message, size_bytes and sha256 (hex, or None)
        of some, of each reason by turns. `parts`, `parts_read`.
    """
    some = parts[:REJECTS_READ]
    columns = ("key", "shard", "index", "error", "message", "size_bytes", "sha256")
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = [
            row
            for rows in pool.map(lambda name: read_rejects(embeddings, name, columns), some)
            for row in rows
        ]
    reasons = Counter(row["error"] for row in found)
    by_reason = {
        reason: [row for row in found if row["error"] == reason] for reason, _ in reasons.most_common()
    }
    by_turns = itertools.chain.from_iterable(itertools.zip_longest(*by_reason.values()))
    named = itertools.islice((row for row in by_turns if row is not None), REJECTS_NAMED)
    return {
        "by_reason": dict(reasons.most_common()),
        "named": [{**row, "sha256": row["sha256"] and row["sha256"].hex()} for row in named],
        "parts": len(parts),
        "parts_read": len(some),
    }


def doubtful_rows(table: Store, held: Sequence[Held]) -> dict[str, Any]:
    """The held rows with the least between their first two candidates, of 16 parts evenly taken.

    Returns:
        `rows`: key, shard, index, label, candidate, confidence and margin (None with one candidate) of 20, the most
        doubtful first; none of tables with several labels for a row. `rows_read`.
    """
    some = held[:: max(1, math.ceil(len(held) / DOUBTED_PARTS))]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        parts = list(pool.map(lambda part: read_part(held_store(table), part.info), some))
    rows = [_doubt(row) for part in parts if "label" in part.column_names for row in part.to_pylist()]
    rows.sort(key=lambda row: row["confidence"] if row["margin"] is None else row["margin"])
    return {"rows": rows[:DOUBTED_ROWS], "rows_read": len(rows)}


def write_page(table: Store, night: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> str:
    """The page about a night beside its summary, and as the index; the path of the first.

    Args:
        night: its summary, as it is kept.
        pictures: of `pictures_of`; None: it shows no rows.
    """
    names = set(table.names(NIGHTS_FOLDER))
    earlier = (one for one in nights(table) if one["run_id"] != night["run_id"])
    listed = [
        {**one, "has_page": _page_path(one["run_id"]) in names}
        for one in itertools.islice(earlier, NIGHTS_LISTED)
    ]
    page = render_night({"night": night, "earlier": listed, "pictures": pictures}).encode()
    path = _page_path(night["run_id"])
    table.write(path, page)
    table.write(INDEX, page)
    return path


def _page_path(run_id: object) -> str:
    return f"{NIGHTS_FOLDER}{run_id}.html"


def _doubt(row: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = row["top_confidences"]
    told = {name: row[name] for name in ("key", "shard", "index", "label", "confidence")}
    return {**told, "candidate": row["top_labels"][0], "margin": first - others[0] if others else None}
