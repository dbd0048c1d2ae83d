"""What is gathered of a night for its page, and the page itself: `nights/<run id>.html`, and as `nights/index.html` the
last one's.

Bounded, however much a night held: some rejects, some rows, the last nights. Not for: what the page looks like
(`engine.report.night`), or judging a night (`engine.gate`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.night import NIGHTS_FOLDER, READ_THREADS, Held, held_store, nights
from engine.parts import PartName
from engine.report.night import render_night
from engine.storage import Store
from engine.tables import read_part, read_rejects

INDEX = f"{NIGHTS_FOLDER}index.html"
REJECTS_READ = 256  # parts: of a part of 1,024 samples that holds a few, some thousand rejects
REJECTS_NAMED = 20
DOUBTED_PARTS = 16  # evenly taken: 16,384 rows, read in less than a second
DOUBTED_ROWS = 20
NIGHTS_LISTED = 30


def rejects_of(embeddings: Store, parts: Sequence[PartName]) -> dict[str, Any]:
    """Why samples of these embedding parts became no embedding, from the first 256 of them.

    Returns:
        `by_reason`: reason -> samples. `named`: key, shard, error, message and size_bytes of some, of each reason by
        turns. `parts`, `parts_read`.
    """
    some = parts[:REJECTS_READ]
    columns = ("key", "shard", "error", "message", "size_bytes")
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
    return {
        "by_reason": dict(reasons.most_common()),
        "named": list(itertools.islice((row for row in by_turns if row is not None), REJECTS_NAMED)),
        "parts": len(parts),
        "parts_read": len(some),
    }


def doubtful_rows(table: Store, held: Sequence[Held]) -> dict[str, Any]:
    """The held rows with the least between their first two candidates, of 16 parts evenly taken.

    Returns:
        `rows`: key, shard, label, candidate, confidence and margin (None with one candidate) of 20, the most doubtful
        first; none of tables with several labels for a row. `rows_read`.
    """
    some = held[:: max(1, math.ceil(len(held) / DOUBTED_PARTS))]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        parts = list(pool.map(lambda part: read_part(held_store(table), part.info), some))
    rows = [_doubt(row) for part in parts if "label" in part.column_names for row in part.to_pylist()]
    rows.sort(key=lambda row: row["confidence"] if row["margin"] is None else row["margin"])
    return {"rows": rows[:DOUBTED_ROWS], "rows_read": len(rows)}


def write_page(table: Store, night: Mapping[str, Any]) -> str:
    """The page about a night beside its summary, and as the index; the path of the first.

    Args:
        night: its summary, as it is kept.
    """
    names = set(table.names(NIGHTS_FOLDER))
    earlier = (one for one in nights(table) if one["run_id"] != night["run_id"])
    listed = [
        {**one, "has_page": _page_path(one["run_id"]) in names}
        for one in itertools.islice(earlier, NIGHTS_LISTED)
    ]
    page = render_night({"night": night, "earlier": listed}).encode()
    path = _page_path(night["run_id"])
    table.write(path, page)
    table.write(INDEX, page)
    return path


def _page_path(run_id: object) -> str:
    return f"{NIGHTS_FOLDER}{run_id}.html"


def _doubt(row: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = row["top_confidences"]
    told = {name: row[name] for name in ("key", "shard", "label", "confidence")}
    return {**told, "candidate": row["top_labels"][0], "margin": first - others[0] if others else None}
