"""`engine duplicates`: from a table to its groups of duplicates, as a file, as JSON and as a table on the screen."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from engine.duplicates import Duplicates
    from engine.storage import Store

ROWS_SHOWN = 40  # on the screen
ROWS_IN_JSON = 1000


def search_duplicates(
    store: Store, threshold: float, output: str | None, scratch: Path | None
) -> tuple[Duplicates, dict[str, Any]]:
    """The groups, written to `output` if there is one, and the summary.

    Raises:
        EngineError: as `engine.duplicates.find_duplicates` and `require_duplicates_uri`.
    """
    from engine.duplicates import find_duplicates, require_duplicates_uri, write_duplicates
    from engine.tables import open_table
    from jobs.outcome import progress_bar, say_incomplete

    if output is not None:
        require_duplicates_uri(output, store.config)
    table, started = open_table(store), time.monotonic()
    with progress_bar("parts", len(table.parts)) as (bar, task):
        found = find_duplicates(
            table,
            threshold,
            scratch,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if output is not None:
        write_duplicates(found, output, store.config)
    say_incomplete(table.incomplete_shards)
    names = ("rows_read", "images", "groups", "exact", "near", "label_conflicts", "cells", "recall")
    summary = {
        "verb": "duplicates",
        "table": store.uri,
        "threshold": found.threshold,
        **{name: getattr(found, name) for name in names},
        "incomplete_shards": table.incomplete_shards,
        "output": output,
        "seconds": round(time.monotonic() - started, 3),
    }
    return found, summary


def print_duplicates(found: Duplicates, summary: dict[str, Any], as_json: bool) -> None:
    """The summary to stderr; to stdout the first rows, as a table or as JSON."""
    from jobs.outcome import print_summary, say
    from jobs.screen import print_table

    shown = ROWS_IN_JSON if as_json else ROWS_SHOWN
    rows = found.rows.slice(0, shown).to_pylist()
    if rows and not as_json:
        columns = ("group", "kind", "cosine", "key", "shard", "index", "label")
        print_table("", columns, [[row[name] for name in columns] for row in rows])
    if len(found.rows) > shown:
        way_out = "" if summary["output"] else "; --output FILE.parquet has all"
        say(f"{len(found.rows) - shown:,} more rows of groups are not shown{way_out}")
    print_summary(summary)
    if as_json:
        print(json.dumps({**summary, "duplicates": rows}))
