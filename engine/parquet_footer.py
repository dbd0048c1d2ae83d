"""What a Parquet footer says about row groups, read without pyarrow's own view of it.

pyarrow 26 ends the whole process on a footer that breaks some rules: its bindings of RowGroup() and ColumnChunk() let
no C++ exception through (libparquet.pxd: no `except +`). So the fields of parquet.thrift that we need are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

Chunk = dict[int, int]  # the numbers of ColumnMetaData, by field
_FILE_ROW_GROUPS, _GROUP_COLUMNS, _GROUP_NUM_ROWS, _CHUNK_METADATA = 4, 1, 3, 3
CODEC, NUM_VALUES, UNCOMPRESSED_BYTES, COMPRESSED_BYTES = 4, 5, 6, 7
DATA_PAGE_OFFSET, DICTIONARY_PAGE_OFFSET = 9, 11
CHUNK_SIZES = (NUM_VALUES, UNCOMPRESSED_BYTES, COMPRESSED_BYTES)
_MAX_DEPTH = 32  # of structs in structs; the format has 7


def described_groups(
    footer: bytes, num_columns: int, wanted: Sequence[int]
) -> Iterator[tuple[int, dict[int, Chunk]]]:
    """Of each row group the number of rows, and what is said about the wanted leaf columns.

    Raises:
        ValueError, IndexError: the footer breaks its format.
    """
    compact = CompactThrift(footer)
    for field, kind in compact.fields():
        if field != _FILE_ROW_GROUPS:
            compact.skip(kind)
            continue
        for _ in compact.structs(kind):
            num_rows, chunks = 0, []
            for group_field, group_kind in compact.fields():
                if group_field == _GROUP_COLUMNS:
                    chunks = [_described_chunk(compact) for _ in compact.structs(group_kind)]
                elif group_field == _GROUP_NUM_ROWS:
                    num_rows = compact.integer()
                else:
                    compact.skip(group_kind)
            if len(chunks) != num_columns:
                raise ValueError(f"a row group of {len(chunks):,} columns in a file of {num_columns:,}")
            yield num_rows, {leaf: chunks[leaf] for leaf in wanted}


def _described_chunk(compact: CompactThrift) -> Chunk:
    """Its integers; a chunk without metadata has none."""
    chunk: Chunk = {}
    for field, kind in compact.fields():
        if field != _CHUNK_METADATA or kind != CompactThrift.STRUCT:
            compact.skip(kind)
            continue
        for inner_field, inner_kind in compact.fields():
            if inner_kind in CompactThrift.INTEGERS:
                chunk[inner_field] = compact.integer()
            else:
                compact.skip(inner_kind)
    return chunk


@final
class CompactThrift:
    """Walks through a value in Thrift's compact protocol without building it.

    Every method raises ValueError or IndexError where the bytes are none.
    Source: github.com/apache/thrift, doc/specs/thrift-compact-protocol.md.
    """

    BOOLEANS, INTEGERS, LISTS = (1, 2), (4, 5, 6), (9, 10)
    BYTE, DOUBLE, BINARY, STRUCT, UUID = 3, 7, 8, 12, 13

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self._at = data, at

    @property
    def at(self) -> int:
        """The byte that is read next."""
        return self._at

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; its value must be read or skipped before the next."""
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self.integer()
            yield field, head & 15

    def structs(self, kind: int) -> Iterator[None]:
        """Once for each struct of a list; it must be read before the next."""
        count, item_kind = self._list_head()
        if kind not in self.LISTS or (count and item_kind != self.STRUCT):
            raise ValueError(f"type {kind} of type {item_kind}, not a list of structs")
        yield from (None for _ in range(count))

    def integer(self) -> int:
        """A 16-, 32- or 64-bit integer."""
        number = self._unsigned()
        return (number >> 1) ^ -(number & 1)

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass over one value."""
        if kind in self.INTEGERS:
            self._unsigned()
        elif kind == self.BINARY:
            self._pass(self._unsigned())
        elif kind == self.STRUCT and depth < _MAX_DEPTH:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind in self.LISTS and depth < _MAX_DEPTH:
            count, item_kind = self._list_head()
            if item_kind in self.BOOLEANS:
                self._pass(count)
            else:
                for _ in range(count):
                    self.skip(item_kind, depth + 1)
        elif kind in (self.BYTE, self.DOUBLE, self.UUID):
            self._pass({self.BYTE: 1, self.DOUBLE: 8, self.UUID: 16}[kind])
        elif kind not in self.BOOLEANS:  # of a field, they stand in its type; maps the format has none
            raise ValueError(f"a value of type {kind} at byte {self._at:,} of the footer")

    def _list_head(self) -> tuple[int, int]:
        head = self._byte()
        count = self._unsigned() if head >> 4 == 15 else head >> 4
        if count > len(self._data) - self._at:
            raise ValueError(f"a list of {count:,} values in a footer of {len(self._data):,} bytes")
        return count, head & 15

    def _unsigned(self) -> int:
        number = shift = 0
        while (byte := self._byte()) >= 128:
            number |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits in the footer")
        return number | byte << shift

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _pass(self, count: int) -> None:
        self._at += count
