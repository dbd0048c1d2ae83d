"""Lists of numbers copied from Parquet pages are what pyarrow reads, and what is not plain is left to it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.plain_pages import read_plain_lists

SHAPES = [(0, 5), (1, 1), (1, 7), (3, 5), (257, 13), (1024, 331), (2, 300_007)]  # several pages from 1 MB on


def a_table(rows: int, width: int, number: str = "float32", nullable: bool = False) -> pa.Table:
    numbers = np.random.default_rng(rows + width).normal(size=rows * width).astype(number)
    element = pa.field("element", pa.from_numpy_dtype(numbers.dtype), nullable=False)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(numbers), type=pa.list_(element, width))
    fields = [
        pa.field("key", pa.string()),
        pa.field("embedding", lists.type, nullable=nullable),
        pa.field("n", pa.int32()),
    ]
    columns = [pa.array([f"k{row}" for row in range(rows)]), lists, pa.array(range(rows), pa.int32())]
    return pa.table(columns, schema=pa.schema(fields))


def written(table: pa.Table, **options: Any) -> bytes:
    options = {"compression": "NONE", "use_dictionary": ["key"], **options}
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def by_pyarrow(content: bytes) -> pa.Array:
    column = pq.read_table(io.BytesIO(content))["embedding"]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def copied(content: bytes) -> pa.Array | None:
    return read_plain_lists(content, pq.read_schema(io.BytesIO(content)), 1)


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_copied_numbers_are_those_that_pyarrow_reads(rows: int, width: int, number: str) -> None:
    content = written(a_table(rows, width, number))
    found = copied(content)
    assert found is not None
    found.validate(full=True)
    assert found.equals(by_pyarrow(content))
    assert found.type == by_pyarrow(content).type


@pytest.mark.parametrize("page_bytes", [1, 1000, 1 << 30])
def test_the_size_of_pages_makes_no_difference(page_bytes: int) -> None:
    content = written(a_table(601, 17), data_page_size=page_bytes)
    found = copied(content)
    assert found is not None and found.equals(by_pyarrow(content))


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (a_table(97, 11), {"compression": "ZSTD"}),
        (a_table(97, 11), {"use_dictionary": True}),
        (a_table(97, 11), {"row_group_size": 50}),
        (a_table(97, 11), {"data_page_version": "2.0"}),
        (a_table(97, 11), {"use_byte_stream_split": ["embedding.list.element"], "use_dictionary": False}),
        (a_table(97, 11, nullable=True), {}),
        (a_table(97, 11, "float64"), {}),
    ],
)
def test_what_is_not_plain_is_left_to_pyarrow(table: pa.Table, options: dict[str, Any]) -> None:
    assert copied(written(table, **options)) is None


def test_damaged_pages_are_left_to_pyarrow_or_read_as_numbers_but_never_break() -> None:
    content = written(a_table(211, 13))
    begin = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(1).data_page_offset
    schema, random = pq.read_schema(io.BytesIO(content)), np.random.default_rng(0)
    left = 0
    for place in [*range(begin, begin + 60), *random.integers(0, len(content), 400).tolist()]:
        damaged = bytearray(content)
        damaged[place] ^= int(random.integers(1, 256))
        found = read_plain_lists(bytes(damaged), schema, 1)
        assert found is None or len(found) == 211
        left += found is None
    assert left > 20
    assert read_plain_lists(content[: len(content) // 2], schema, 1) is None
