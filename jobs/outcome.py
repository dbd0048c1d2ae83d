"""What a job hands back to the command line, and how it talks to a person while it runs.

For people, or as JSON lines where `engine.log_lines` is in use. Not for: computing anything. Everything but the JSON
summary goes to stderr.
"""

from __future__ import annotations

import datetime
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from engine.errors import EngineError
from engine.log_lines import NEW_LINE, json_log, plain_text
from engine.run_metrics import RunMetrics

console = Console(stderr=True, highlight=False, soft_wrap=True)
PROGRESS_EVERY_S = 30.0  # a line of a log; a bar moves as it likes
_LEFT_OUT_IF_ZERO = ("shards_", "parts_")  # a person looks for what happened among what did not
_least = logging.INFO  # level of what is said to a person


@dataclass(frozen=True)
class Outcome:
    """The end of a job: its summary, and the error that decides the exit code although the work is done."""

    summary: dict[str, Any]
    verdict: EngineError | None = None


@dataclass(frozen=True)
class Run:
    """One run of a verb, as those who watch it know it.

    Attributes:
        run_id: the name that it goes by.
        metrics: where it counts what it does.
        ends: what is left open until its very end; None: nothing is.
        command: that runs the verb on the same recipe once more, without its options; None: not started by one.
    """

    run_id: str
    metrics: RunMetrics
    ends: ExitStack | None = None
    command: str | None = None

    @staticmethod
    def new(verb: str) -> Run:
        """One whose numbers nobody asks for."""
        return Run(new_run_id(verb), RunMetrics(verb))


def new_run_id(verb: str) -> str:
    """A name for one run: verb, UTC time, four random hex digits."""
    return f"{verb}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"


def say(text: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line to stderr, printed as it is; a warning says that it is one.

    Args:
        fields: what the text names, for machines; people have it in the text.
    """
    log = json_log()
    if log is not None:
        log.tell(level, text, **fields)
    elif level >= _least:
        _print(text, level)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Inside, a person is told what is at least a warning, and the summary: no progress. A JSON log has all of it."""
    global _least  # noqa: PLW0603 (of a process, as Python's own logging is)
    before, _least = _least, logging.WARNING
    try:
        yield
    finally:
        _least = before


def _print(text: str, level: int = logging.INFO) -> None:
    prefix = f"{logging.getLevelName(level).lower()}: " if level >= logging.WARNING else ""
    console.print(f"{prefix}{plain_text(text, keep=NEW_LINE)}", markup=False)


def say_incomplete(shards: int) -> None:
    """That an answer is not about the whole archive, where it is not."""
    if shards:
        say(f"note: {shards:,} shards of the table are not done to their end")


class Bar(Protocol):
    """What shows how far a run is."""

    def update(
        self,
        task_id: Any,
        *,
        description: str | None = None,
        completed: float | None = None,
        finished: int | None = None,
        total: float | None = None,
        rate: str = "",
    ) -> None:
        """Show it; what is left out stays.

        Args:
            completed: by which the bar and the time that is left go.
            finished: how many are told of; None: as many as are completed.
        """


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[tuple[Bar, Any]]:
    """A live bar on a terminal; in a log, be it a file, a pipe or JSON, now and then a line."""
    if json_log() is not None or _least > logging.INFO or not console.is_terminal:
        yield _ProgressLines(description, total), None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _FinishedOfTotal(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar, bar.add_task(description, total=total, rate="")


class _FinishedOfTotal(MofNCompleteColumn):
    """Whole ones, while the bar also goes by those that are under way."""

    def render(self, task: Task) -> Text:
        finished = task.fields.get("finished")
        if finished is None or task.total is None:
            return super().render(task)
        return Text(f"{finished}/{int(task.total)}", style="progress.download")


class _ProgressLines:
    """A line every PROGRESS_EVERY_S at most; machines get one at the first news, too."""

    def __init__(self, description: str, total: float) -> None:
        self._description, self._total = description, total
        self._completed: float = 0
        self._finished: int | None = None
        self._began = time.monotonic()
        self._told_at = self._began if json_log() is None else float("-inf")

    def update(
        self,
        task_id: Any,
        *,
        description: str | None = None,
        completed: float | None = None,
        finished: int | None = None,
        total: float | None = None,
        rate: str = "",
    ) -> None:
        self._description = description or self._description
        self._completed = self._completed if completed is None else completed
        self._finished = self._finished if finished is None else finished
        self._total = self._total if total is None else total
        if time.monotonic() - self._told_at < PROGRESS_EVERY_S:
            return
        self._told_at = time.monotonic()
        done = self._completed if self._finished is None else self._finished
        what = f"{done:,} of {self._total:,} {self._description}"
        message = ", ".join(filter(None, (what, rate, self._time_left())))
        say(message, progress=self._description, done=done, of=self._total, rate=rate)

    def _time_left(self) -> str:
        """If it goes on as it did; empty where nothing is done yet, or nothing is left."""
        if not 0 < self._completed < self._total:
            return ""
        seconds = (time.monotonic() - self._began) * (self._total / self._completed - 1)
        return f"{datetime.timedelta(seconds=round(seconds))} left"


def print_summary(summary: dict[str, Any]) -> None:
    """The closing summary for a person: one line a key, without empty ones and shards and parts of which there are
    none; in a JSON log one line."""
    log = json_log()
    if log is not None:
        log.tell(logging.INFO, "summary", summary=summary)
        return
    lines = [line for key, value in summary.items() for line in _summary_lines(key, value)]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        _print(f"  {name:<{width}}  {text}")


def _summary_lines(key: str, value: Any) -> list[tuple[str, str]]:
    if value is None or value == {} or (value == 0 and key.rpartition(" ")[2].startswith(_LEFT_OUT_IF_ZERO)):
        return []
    if (
        isinstance(value, list) and value and isinstance(value[0], dict)
    ):  # a line for each, without what is nested
        plain = [{name: one for name, one in each.items() if not isinstance(one, dict)} for each in value]
        return [line for number, each in enumerate(plain) for line in _summary_lines(f"{key} {number}", each)]
    if not isinstance(value, dict):
        return [(key, _shown(value))]
    if any(isinstance(inner, dict) for inner in value.values()):
        return [line for name, inner in value.items() for line in _summary_lines(f"{key} {name}", inner)]
    return [(key, ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()))]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
