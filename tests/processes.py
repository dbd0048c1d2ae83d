"""Processes of one command and of its Ray, found by a mark in their environment: to be killed, or to be measured."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "ENGINE_TEST_MARK"
# How Ray titles the processes of ours; a raylet keeps its command line.
TITLES = {
    "actor": "EmbedActor",
    "reader": "ReadShards",
    "decoder": "_decode_row",
    "writer": "_write_row",
    "raylet": "/raylet/raylet",
}


def new_mark() -> dict[str, str]:
    """An environment that marks a command and all that it starts."""
    return {MARK: uuid.uuid4().hex}


def processes_with(mark: dict[str, str]) -> list[int]:
    """Processes that have the mark in the environment they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if mark[MARK].encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # ended meanwhile
    return found


def title_of(pid: int) -> str:
    """Its command line, as it has it now; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill_process(pid: int) -> None:
    """SIGKILL; fine if it has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_with_all_below(pid: int) -> None:
    """SIGKILL to it and all that it has started, as the end of a pod: Ray's processes are in groups of their own."""
    for one in [pid, *processes_below(pid)]:  # listed first: orphans have another parent
        kill_process(one)


def processes_below(pid: int) -> list[int]:
    """What the process has started, and what that has started."""
    children = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # ended since the listing
                fields = (folder / "stat").read_text().rpartition(")")[2].split()  # state, parent ...
                children[int(fields[1])].append(int(folder.name))
    found = [pid]
    for one in found:  # grows while it is gone through
        found += children[one]
    return found[1:]


def kill_one(kind: str, candidates: Callable[[], list[int]], patience_s: float) -> bool:
    """Kill -9 the first process of a kind (see TITLES) that is seen; False if there is none for so long."""
    deadline = time.monotonic() + patience_s
    while True:
        for pid in candidates():
            if TITLES[kind] in title_of(pid):
                kill_process(pid)
                return True
        if time.monotonic() > deadline:
            return False


def own_memory_bytes(pid: int) -> int:
    """Resident memory that the process shares with nobody: without libraries and Ray's object store."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


@contextmanager
def watching(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call a function again and again in a thread."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def kinds_seen_below(pid: int) -> Iterator[set[str]]:
    """Watch what a process has started; fills in the kinds (see TITLES) that were there at some moment."""
    seen: set[str] = set()

    def look() -> None:
        titles = [title_of(below) for below in processes_below(pid)]
        seen.update(kind for kind, text in TITLES.items() if any(text in title for title in titles))

    with watching(look, every_s=0.01):
        yield seen


@contextmanager
def peaks_of(mark: dict[str, str], driver: int) -> Iterator[dict[str, int]]:
    """Watch the processes of a command; fills in the most bytes of its own that one of each kind ever held.

    Kinds: driver, actor, and task for those that read, decode and write, since Ray lets a process do one after another.
    """
    peaks: dict[str, int] = {}
    by_pid: dict[int, int] = defaultdict(int)
    kinds: dict[int, str] = {driver: "driver"}

    def look() -> None:
        for pid in processes_with(mark):
            title = title_of(pid)
            if TITLES["actor"] in title:
                kinds[pid] = "actor"
            elif any(TITLES[kind] in title for kind in ("reader", "decoder", "writer")):
                kinds[pid] = "task"
            by_pid[pid] = max(by_pid[pid], own_memory_bytes(pid))

    with watching(look, every_s=0.02):
        yield peaks
    for pid, kind in kinds.items():
        peaks[kind] = max(peaks.get(kind, 0), by_pid[pid])
