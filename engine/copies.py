"""Predictions as text for people: JSON Lines and CSV, beside the Parquet part they say the same as.

The same predictions give the same bytes. Confidences are written with the digits that float32 needs and no more. In CSV
(RFC 4180, UTF-8, a line of column names) a list is a JSON array in one cell, and where there is no label the cell is
empty.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def written_as(predictions: pa.Table, form: str) -> bytes:
    """The bytes of a copy of a prediction part."""
    return FORMS[form](predictions)


def _jsonl(predictions: pa.Table) -> bytes:
    names, columns = predictions.column_names, _columns(predictions)
    rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    return "".join(f"{_json(row)}\n" for row in rows).encode()


def _csv(predictions: pa.Table) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # lines end in CR LF, so that a value with either of them is quoted
    writer.writerow(predictions.column_names)
    writer.writerows(csv_rows(predictions))
    return text.getvalue().encode()


def csv_rows(rows: pa.Table) -> Iterator[list[Any]]:
    """The cells of each row as `csv.writer` takes them, of any table: lists as JSON, bytes in hexadecimal digits."""
    return ([_cell(value) for value in row] for row in zip(*_columns(rows), strict=True))


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return _json(value)
    return value.hex() if isinstance(value, bytes) else value


FORMS: dict[str, Callable[[pa.Table], bytes]] = {"csv": _csv, "jsonl": _jsonl}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_text_of)


def _text_of(value: Any) -> str:
    """Of what JSON has no form for: bytes, moments, decimals."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _columns(predictions: pa.Table) -> list[list[Any]]:
    return [_values(column.combine_chunks()) for column in predictions.columns]


def _values(column: pa.Array) -> list[Any]:
    """Python values; float32 becomes the shortest decimal that is the same float32 again."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_float16(column.type):
        return _values(pc.cast(column, pa.float32()))
    if pa.types.is_float32(column.type):
        texts = pc.cast(column, pa.string()).to_pylist()
        return [None if text is None else float(text) for text in texts]
    if pa.types.is_fixed_size_list(column.type) and pa.types.is_floating(column.type.value_type):
        flat, width = _values(column.flatten()), column.type.list_size
        return [flat[first : first + width] for first in range(0, len(flat), width)]
    values: list[Any] = column.to_pylist()
    return values
