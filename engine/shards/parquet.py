"""Parquet shards: one row is one sample, with a column of encoded images; not for our own tables (tables.py).

The rules:

- A name in the recipe is a column, or a way into structs with dots; a column whose own name has the dots comes first.
- A null image is `no_image`, also in a null struct; as a label or metadata null is null, as a key the position.
- Texts are strings, or bytes in UTF-8; integers, floats and booleans are spelled as JSON does. A Hugging Face
  ClassLabel becomes the name of its class, -1 becomes null.
- A label loses its outer spaces; an empty one is null. Bytes that are not UTF-8, more than 4,096 characters, NaN and
  infinities, and numbers that name no class are `bad_label`. As metadata they stay, undecodable bytes escaped.
- A text above 1 MiB is `bad_label`, null metadata, or no key; an empty key is none either. Where image and label are
  both bad, the image is the reason.

What is held in memory: the footer; one block of 8 MiB for each place that is being read; of each wanted column the
page that is being decoded and the dictionary of its column chunk; and a batch of at most 16 rows. Pages have the size
that their writer chose (pyarrow: up to 1,024 rows): a row group of any size is fine, a single page of 1 GB is not. An
image above the limit is decoded with its page but never copied out of it. A footer that declares more than the file
can hold is refused before more is read; a page that expands to more than the footer declared is not noticed, and
can take 2 GiB (the format's own limit) until it is found to be damaged.

Bytes are checked where pages have checksums. A damage shows when its page is reached: rows before it were given.
Source: github.com/apache/parquet-format, README.md (file layout) and parquet.thrift.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import pyarrow as pa
import pyarrow.parquet as pq

from engine.parquet_footer import (
    CHUNK_SIZES,
    DATA_PAGE_OFFSET,
    DICTIONARY_PAGE_OFFSET,
    UNCOMPRESSED_BYTES,
    Chunk,
    described_groups,
)
from engine.schema import RejectReason
from engine.shards.base import Resume, Sample, ShardReader, objects_matching
from engine.shards.image_bytes import Problem, size_problem
from engine.shards.kinds import ParquetSource
from engine.shards.member_text import BadText
from engine.shards.parquet_columns import Columns, TextColumn, Value
from engine.shards.parquet_file import MAGIC, Extent, ParquetObject, shortened
from engine.storage import ObjectInfo, Store

MAX_ROWS_PER_BATCH = 16  # each row holds its own copy of a value that the encoding repeats
MAX_BATCH_BYTES = 8 * 2**20  # aimed at, by the mean size of a row in the footer
MAX_EXPANSION = 1000  # uncompressed to compressed: images expand by 1.0, deflate by at most 1,032
FREE_EXPANSION_BYTES = 64 * 2**20  # a column of equal values may well expand more, as long as it stays small
FREE_ROWS = 2**20  # rows of nulls take hardly any bytes; beyond this each row has at least one
_PAGE_READ_BYTES = 64 * 2**10  # of pyarrow's own buffer: enough for a page header, what follows is read whole
# What pyarrow raises about bytes it cannot read; Arrow's own errors derive from these or from ArrowException.
_FOREIGN_ERRORS = (
    pa.ArrowException,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
)


@final
class ParquetReader(ShardReader):
    """Reads the shards of one Parquet source.

    Args:
        config: of the source.
        max_sample_bytes: a larger image is a reject.
    """

    def __init__(self, config: ParquetSource, max_sample_bytes: int) -> None:
        self._config, self._max_sample_bytes = config, max_sample_bytes

    def list_shards(self, store: Store) -> Iterator[ObjectInfo]:
        return objects_matching(store, self._config.pattern)

    def read(
        self, store: Store, shard: ObjectInfo, resume: Resume, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[Sample]:
        if resume.offset is not None:
            raise ValueError(f"{shard.path} is Parquet and cannot be entered at byte {resume.offset}")
        source, reported = ParquetObject(store, shard), 0
        try:
            for sample in self._samples(source, resume.index):
                yield sample
                if on_bytes:
                    on_bytes(source.bytes_read - reported)
                    reported = source.bytes_read
            source.check_unchanged()
        finally:
            if on_bytes:
                on_bytes(source.bytes_read - reported)

    def _samples(self, source: ParquetObject, first: int) -> Iterator[Sample]:
        """The samples from position `first` on; row groups before it are not read."""
        with _damage_of(source):
            source.fetch_end()
            file = _open(source)
            columns = Columns(self._config, file, source)
            groups = [g for g in _row_groups(file, columns, source) if g.begin_row + g.num_rows > first]
        source.expect((extent for group in groups for extent in group.extents), places=len(columns.leaves))
        for group in groups:
            index = group.begin_row
            for batch in _batches(source, file, columns, group):
                skipped = min(max(0, first - index), batch.num_rows)
                yield from self._samples_of(columns, batch.slice(skipped), index + skipped)
                index += batch.num_rows

    def _samples_of(self, columns: Columns, batch: pa.RecordBatch, begin_index: int) -> Iterator[Sample]:
        images = columns.image.array(batch)
        labels, keys, *metadata = (
            column.values(batch) if column else [None] * batch.num_rows
            for column in (columns.label, columns.key, *columns.metadata)
        )
        for row in range(batch.num_rows):
            index, encoded = begin_index + row, images[row].as_buffer()
            problem = _image_problem(encoded, self._max_sample_bytes)
            label, label_problem = _label_and_problem(columns.label, labels[row])
            yield Sample(
                key=(columns.key and columns.key.text(keys[row])) or f"{index:09d}",
                index=index,
                image=encoded.to_pybytes() if problem is None else None,
                label=label,
                metadata=tuple(
                    column.text(values[row])
                    for column, values in zip(columns.metadata, metadata, strict=True)
                ),
                begin_offset=None,
                end_offset=None,
                problem=problem or label_problem,
                size_bytes=0 if encoded is None else encoded.size,
            )


def columns_of(store: Store, shard: ObjectInfo) -> dict[str, str]:
    """The columns of a file with their types, from its footer; of a struct with encoded images the type says binary.

    Raises:
        ShardDamaged: it has no footer that can be read.
    """
    source = ParquetObject(store, shard)
    with _damage_of(source):
        source.fetch_end()
        return {field.name: shortened(str(field.type)) for field in _open(source).schema_arrow}


def _image_problem(encoded: pa.Buffer | None, max_sample_bytes: int) -> Problem | None:
    if encoded is None:
        return RejectReason.NO_IMAGE, "the image column is null"
    return size_problem("the image column", encoded.size, max_sample_bytes)


def _label_and_problem(column: TextColumn | None, value: Value) -> tuple[str | None, Problem | None]:
    if column is None:
        return None, None
    try:
        return column.label(value), None
    except BadText as error:
        return None, (RejectReason.BAD_LABEL, f"label column {column.name}: {error}")


@final
@dataclass(frozen=True)
class _RowGroup:
    """One row group as the footer describes it."""

    number: int
    begin_row: int
    num_rows: int
    rows_per_batch: int
    extents: tuple[Extent, ...]
    """Bytes of the wanted columns, one for each."""


def _open(source: ParquetObject) -> pq.ParquetFile:
    return pq.ParquetFile(
        pa.PythonFile(source, mode="r"),
        binary_type=pa.large_binary(),  # a batch may have more than 2 GiB
        buffer_size=_PAGE_READ_BYTES,
        pre_buffer=False,  # it would hold whole row groups
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )


def _row_groups(file: pq.ParquetFile, columns: Columns, source: ParquetObject) -> Iterator[_RowGroup]:
    """The row groups, once what the footer says about each is seen to be possible."""
    begin_row = 0
    for number, (num_rows, chunks) in enumerate(
        described_groups(source.footer, len(file.schema), columns.leaves)
    ):
        if num_rows == 0:
            continue
        extents = tuple(_checked_extent(chunk, num_rows, source) for chunk in chunks.values())
        bytes_per_row = chunks[columns.image_leaf].get(UNCOMPRESSED_BYTES, 0) // num_rows
        rows_per_batch = max(1, min(MAX_ROWS_PER_BATCH, MAX_BATCH_BYTES // max(1, bytes_per_row)))
        yield _RowGroup(number, begin_row, num_rows, rows_per_batch, extents)
        begin_row += num_rows
    if begin_row != file.metadata.num_rows or begin_row > max(FREE_ROWS, source.size):
        raise source.damaged(
            found=f"{begin_row:,} rows in {file.metadata.num_row_groups:,} row groups",
            wanted=f"the {file.metadata.num_rows:,} rows that the footer promises, and not more rows than bytes",
        )


def _checked_extent(chunk: Chunk, num_rows: int, source: ParquetObject) -> Extent:
    values, expanded, length = (chunk.get(field, -1) for field in CHUNK_SIZES)
    begin = chunk.get(DATA_PAGE_OFFSET, -1)
    if chunk.get(DICTIONARY_PAGE_OFFSET):
        begin = min(begin, chunk[DICTIONARY_PAGE_OFFSET])
    most = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * length)
    is_possible = (
        values == num_rows > 0
        and len(MAGIC) <= begin <= begin + length <= source.footer_begin
        and 0 <= expanded <= most
    )
    if not is_possible:
        raise source.damaged(
            found=f"a column chunk of {values:,} values and {length:,} bytes from byte {begin:,} on, expanding to "
            f"{expanded:,} bytes",
            wanted=f"{num_rows:,} values before byte {source.footer_begin:,}, expanding to at most {most:,} bytes",
        )
    return begin, begin + length


def _batches(
    source: ParquetObject, file: pq.ParquetFile, columns: Columns, group: _RowGroup
) -> Iterator[pa.RecordBatch]:
    """The wanted columns of one row group, a few rows at a time."""
    rows_seen = 0
    with _damage_of(source):
        batches = file.iter_batches(
            group.rows_per_batch, row_groups=[group.number], columns=columns.paths, use_threads=False
        )
    while True:
        with _damage_of(source):
            batch = next(batches, None)
        if batch is None:
            break
        rows_seen += batch.num_rows
        if rows_seen > group.num_rows:
            break
        yield batch
    if rows_seen != group.num_rows:
        raise source.damaged(
            found=f"{rows_seen:,} rows or more in row group {group.number}", wanted=f"{group.num_rows:,} rows"
        )


@contextlib.contextmanager
def _damage_of(source: ParquetObject) -> Iterator[None]:
    """Translate what pyarrow says about bad bytes; what the store said inside of it comes out as it was."""
    try:
        yield
    except _FOREIGN_ERRORS as error:
        if source.failure is not None:
            raise source.failure from None
        raise source.damaged(found=shortened(f"{type(error).__name__}: {error}")) from None
