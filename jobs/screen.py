"""Tables on stdout, for people: whole words at any width, also where they are piped into a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.log_lines import plain_text

WIDTH_OF_FILES = 200  # characters; on a terminal its own width


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows; a cell that does not fit goes on below, and None is empty."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_FILES)
    table = Table(title=Text(plain_text(title)) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    is_number = [
        bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(columns))
    ]
    for name, right in zip(columns, is_number, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: Any) -> Text:
    """Never read as markup, nor obeyed by the terminal: keys and labels come from outside."""
    if value is None:
        return Text("")
    return Text(f"{value:.4f}" if isinstance(value, float) else plain_text(str(value)))
