"""How much memory a process and all its descendants hold at their peak, seen from outside; Linux only."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

from tests.processes import processes_below

PERIOD_S = 0.5
# For a PSS the kernel goes through all pages of a process: 0.09 s for the 13 of an engine's run, 0.03 s for a program
# that is alone. Every half second that was a thirteenth of two cores, and so of the engine's rate (2026-11-23).
MAX_SHARE = 0.01  # of a core


class PeakMemory:
    """Looks every half second while it is entered, or less often where looking takes long.

    Sizes are proportional (PSS), so that what processes share counts once; where another user's process does not show
    its PSS, its resident size is taken.

    Attributes:
        sum_bytes: the most that all held together.
        largest_bytes: the most that a single process held.
    """

    def __init__(self, root_pid: int) -> None:
        self.sum_bytes, self.largest_bytes = 0, 0
        self._root_pid, self._ended = root_pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        took = 0.0
        while not self._ended.wait(max(PERIOD_S, took / MAX_SHARE)):
            started = time.thread_time()
            sizes = [_bytes(pid) for pid in [self._root_pid, *processes_below(self._root_pid)]]
            self.sum_bytes = max(self.sum_bytes, sum(sizes))
            self.largest_bytes = max(self.largest_bytes, *sizes)
            took = time.thread_time() - started


def _bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    except PermissionError:
        return os.sysconf("SC_PAGE_SIZE") * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # ended meanwhile
        return 0
