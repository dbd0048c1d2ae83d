"""`engine sql`: the rows of a SELECT as a table on a terminal, one JSON object, CSV or Parquet; the SQL itself is
`engine.sql`."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from engine.errors import RecipeError
from engine.log_lines import NEW_LINE, plain_text
from engine.row_files import require_new, whole_file, write_csv, write_parquet
from engine.sql import TableViews, open_views
from engine.storage import StorageConfig
from jobs.outcome import say

ROWS_SHOWN = 100  # on a terminal; a file takes them all
_ITEMS_SHOWN = 4  # of a list
_CHARACTERS_SHOWN = 80  # of a cell


def run_sql(
    query: str,
    tables: Sequence[str],
    storage: StorageConfig,
    csv: Path | None = None,
    parquet: Path | None = None,
    as_json: bool = False,
) -> None:
    """Run one SELECT over tables and give its rows to a file, or to stdout.

    Args:
        query: the SELECT.
        tables: URIs, as of `engine.sql.open_views`.
        csv, parquet: a new file, one of them at most.
        as_json: print one JSON object: the rows, or with a file how many there are.

    Raises:
        EngineError: as `engine.sql.open_views` and `TableViews.select`; the file cannot be written.
    """
    path, started = csv or parquet, time.monotonic()
    if path is not None:
        require_new(path)
    with open_views(tables, storage) as views:
        for note in views.notes:
            say(f"note: {note}")
        found = views.select(query)
        summary: dict[str, Any] = {"verb": "sql", "columns": _described(found.schema)}
        if path is not None:
            with whole_file(path) as file:
                summary["rows"] = write_csv(file, found.schema, found) if csv else _write_parquet(file, found)
            summary["file"] = str(path)
            say(f"{summary['rows']:,} rows in {path}")
        elif as_json:
            summary["rows"] = [_jsonable(row) for batch in found for row in batch.to_pylist()]
        else:
            _print_rows(found)
        say(_cost(views, time.monotonic() - started))
        summary["bytes_read"] = views.bytes_read
    if as_json:
        print(json.dumps(summary, allow_nan=False))


def _write_parquet(file: BinaryIO, found: pa.RecordBatchReader) -> int:
    try:
        return write_parquet(file, found.schema, found)
    except pa.ArrowNotImplementedError as error:
        raise RecipeError(
            "--parquet: a column of the answer has a type that Parquet files lack",
            found=str(error),
            way_out="cast it (CAST(x AS VARCHAR)), or take --csv",
        ) from None


def _described(schema: pa.Schema) -> list[dict[str, str]]:
    return [{"name": field.name, "type": str(field.type)} for field in schema]


def _cost(views: TableViews, seconds: float) -> str:
    shown = ", ".join(f"{name} ({view.parts:,} parts)" for name, view in views.views.items())
    return f"{views.bytes_read / 1e6:,.1f} MB read in {seconds:.1f} s of {shown}"


def _print_rows(found: pa.RecordBatchReader) -> None:
    rows = itertools.islice((row for batch in found for row in _rows_of(batch)), ROWS_SHOWN + 1)
    shown = list(rows)
    table = Table(*(Column(Text(plain_text(name))) for name in found.schema.names))
    for row in shown[:ROWS_SHOWN]:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console()
    if not console.is_terminal:  # a pipe has no width
        console.width = max(
            console.width, console.measure(table, options=console.options.update(width=10**6)).maximum
        )
    console.print(table)
    if len(shown) > ROWS_SHOWN:
        say(f"the first {ROWS_SHOWN} rows; --csv FILE, --parquet FILE and --json have all of them")


def _rows_of(batch: pa.RecordBatch) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _cell(value: Any) -> str:
    """One value, short; what is no value is empty."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        value = value.hex()
    elif isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, list):
        more = f", ... {len(value):,} in all" if len(value) > _ITEMS_SHOWN else ""
        return f"[{', '.join(map(_cell, value[:_ITEMS_SHOWN]))}{more}]"
    text = plain_text(str(value), keep=NEW_LINE)  # plans have several lines
    return text if len(text) <= _CHARACTERS_SHOWN or "\n" in text else f"{text[:_CHARACTERS_SHOWN]}..."


def _jsonable(value: Any) -> Any:
    """What JSON has no form for as text, and what is not a number as null."""
    if isinstance(value, dict):
        return {name: _jsonable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_jsonable(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | bool | None) else str(value)
