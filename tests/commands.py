"""The `engine` command as tests start it: how it ended, and processes to be watched and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.storage import Store

START_TIMEOUT_S = 180


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed: the one line on stdout."""
        (line,) = self.stdout.splitlines()
        answer: dict[str, Any] = json.loads(line)
        return answer


Engine = Callable[..., Ended]


def start(
    verb: str,
    repository: Path,
    recipe: Path,
    *arguments: str,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, as a terminal or a job supervisor would."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", verb, str(recipe), *arguments],
        cwd=repository,
        env={**os.environ, **environment},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_parts(table: Path | Store, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until the table has so many parts; fails if the process ends before."""
    deadline, store = time.monotonic() + START_TIMEOUT_S, _store_of(table)
    while sum(1 for _ in store.names("data/")) < count:
        assert process.poll() is None, f"ended by itself: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "no parts were written in time"
        time.sleep(0.02)


def rows_of(table: Path | Store, columns: list[str], kind: str = "embeddings") -> pa.Table:
    """Columns of a table, or of its predictions, sorted by (shard, index)."""
    from engine.tables import open_table

    order = ["shard", "index"]
    rows = open_table(_store_of(table), kind).read(list(dict.fromkeys([*columns, *order])))
    return rows.sort_by([(name, "ascending") for name in order]).select(columns)


def _store_of(table: Path | Store) -> Store:
    from engine.storage import open_store

    return open_store(str(table)) if isinstance(table, Path) else table
