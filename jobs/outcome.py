"""What a job hands back to the command line, and how it talks to a person while it runs.

Not for: computing anything. Everything but the JSON summary goes to stderr.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from engine.errors import EngineError

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Outcome:
    """The end of a job: its summary, and the error that decides the exit code although the work is done."""

    summary: dict[str, Any]
    verdict: EngineError | None = None


def new_run_id(verb: str) -> str:
    """A name for one run: verb, UTC time, four random hex digits."""
    return f"{verb}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"


def say(text: str) -> None:
    """One line to stderr, printed as it is."""
    console.print(text, markup=False)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[tuple[Progress, Any]]:
    """A live bar on a terminal; nothing where stderr is a file (the summary says it all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar, bar.add_task(description, total=total, rate="")


def print_summary(summary: dict[str, Any]) -> None:
    """The closing summary for a person: one line a key, empty ones left out."""
    lines = [line for key, value in summary.items() for line in _summary_lines(key, value)]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        say(f"  {name:<{width}}  {text}")


def _summary_lines(key: str, value: Any) -> list[tuple[str, str]]:
    if value is None or value == {}:
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
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
