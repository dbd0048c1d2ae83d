"""What is kept of each run beside what it made, `runs/<run id>.json`: how it ended, also where it failed.

It outlives the cluster that the run was on. Not for: deciding what is to be done, which follows from listings alone; a
table is the same without these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, cast

from engine.errors import ObjectNotFound
from engine.storage import Store

RUNS_FOLDER = "runs/"
RUNS_KEPT = 100
_RUN_ID = re.compile(r"runs/[a-z]+-(\d{8}T\d{6}Z-[0-9a-f]+)\.json")


def keep_run(store: Store, run_id: str, record: dict[str, Any]) -> None:
    """Write a run's record, and remove the oldest beyond RUNS_KEPT.

    Args:
        store: rooted at what the run made: a table, or a bundle.
        run_id: verb, UTC time and random digits, as `jobs.outcome.new_run_id` makes it.

    Raises:
        StorageError: the store does not take it.
    """
    store.write(f"{RUNS_FOLDER}{run_id}.json", json.dumps(record, indent=1, default=str).encode())
    for path in list(_latest_first(store))[RUNS_KEPT:]:
        store.delete(path)


def last_run(store: Store) -> dict[str, Any] | None:
    """The record of the latest run; None where there is none."""
    for path in _latest_first(store):
        try:
            record: Any = json.loads(store.read(path))
        except (ObjectNotFound, ValueError):
            continue  # removed meanwhile, or somebody else's
        if isinstance(record, dict) and "run_id" in record:
            return cast("dict[str, Any]", record)
    return None


def _latest_first(store: Store) -> Iterator[str]:
    """Paths of records; other files in the folder are left alone."""
    begun = {path: found[1] for path in store.names(RUNS_FOLDER) if (found := _RUN_ID.fullmatch(path))}
    return iter(sorted(begun, key=lambda path: begun[path], reverse=True))
