"""A Parquet object as the file that pyarrow wants: few and large reads, footer first, never another version."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import final

from engine.errors import EngineError, ObjectChanged, ShardDamaged
from engine.storage import ObjectInfo, Store

BLOCK_BYTES = 8 * 2**20  # one ranged read, as in Store.open_input
MAX_GAP_BYTES = 2**20  # between wanted columns: read rather than skipped, a request costs more than that
MAX_FOOTER_BYTES = 32 * 2**20  # the footer of 10,000 row groups of 10 columns has about 10 MB
MAGIC = b"PAR1"
_END_READ_BYTES = 64 * 2**10  # what pyarrow asks for first; most footers fit
# Under its real name pyarrow would rebuild the writer's Arrow types from it, and so run the code of whatever extension
# types are registered in this process (Ray registers some) on bytes of the shard. The plain types are what we want.
_WRITERS_SCHEMA, _HIDDEN_SCHEMA = b"ARROW:schema", b"hidden-schem"
Extent = tuple[int, int]  # first byte, and the first behind the last


@final
class ParquetObject(io.RawIOBase):
    """One version of an object as the seekable file that pyarrow wants, with few and large reads from the store.

    pyarrow reads each column chunk forwards, in turns with the others. So there is one block in memory for each place
    that is being read; a block is replaced by the one behind it, and ends where wanted bytes end.
    """

    def __init__(self, store: Store, shard: ObjectInfo) -> None:
        super().__init__()
        self._store, self._shard, self._position = store, shard, 0
        self.name, self.size = f"{store.uri}/{shard.path}", shard.size
        self.bytes_read = 0
        self.failure: EngineError | None = None
        self.footer_begin = self._end_begin = shard.size
        self._end = self.footer = b""
        self._extents: list[Extent] = []
        self._max_blocks = 1
        self._blocks: list[tuple[int, bytes]] = []  # the one used last comes last

    def fetch_end(self) -> None:
        """Fetch the footer, and hide the writer's Arrow schema in it.

        Raises:
            ShardDamaged: there is no footer.
        """
        wanted = f"a Parquet file, which ends in the length of its footer and {MAGIC!r}"
        if self.size < 3 * len(MAGIC):
            raise self.damaged(found=f"{self.size} bytes", wanted=wanted)
        self._end_begin = max(0, self.size - _END_READ_BYTES)
        self._end = self._fetch(self._end_begin, self.size)
        footer_bytes = int.from_bytes(self._end[-8:-4], "little")
        if self._end[-4:] != MAGIC or footer_bytes > min(MAX_FOOTER_BYTES, self.size - 3 * len(MAGIC)):
            found = f"{self.size:,} bytes that end in {self._end[-8:]!r}"
            raise self.damaged(
                found=found, wanted=f"{wanted}, unencrypted, at most {MAX_FOOTER_BYTES:,} long"
            )
        self.footer_begin = self.size - 8 - footer_bytes
        if self.footer_begin < self._end_begin:
            self._end = self._fetch(self.footer_begin, self._end_begin) + self._end
            self._end_begin = self.footer_begin
        data_bytes = self.footer_begin - self._end_begin
        footer = self._end[data_bytes:].replace(_WRITERS_SCHEMA, _HIDDEN_SCHEMA)
        self._end = self._end[:data_bytes] + footer
        self.footer = footer[:-8]

    def expect(self, extents: Iterable[Extent], places: int) -> None:
        """Say which bytes will be asked for, and in how many places in turns; nothing else is read ahead."""
        merged: list[Extent] = []
        for begin, end in sorted(extents):
            if merged and begin <= merged[-1][1] + MAX_GAP_BYTES:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self._extents, self._max_blocks = merged, places

    def check_unchanged(self) -> None:
        """Raise ObjectChanged if the object was replaced since it was listed."""
        found = self._store.info(self._shard.path)
        if found.identity != self._shard.identity:
            raise ObjectChanged(
                f"{self.name} was changed since it was listed",
                found=found.identity,
                wanted=self._shard.identity,
                way_out="run again: the new version is then read from its start",
            )

    def damaged(self, found: str, wanted: str = "a whole Parquet file") -> ShardDamaged:
        return ShardDamaged(
            f"{self.name} is damaged",
            found=found,
            wanted=wanted,
            way_out="write this shard again; the samples before the damage are good and are kept",
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[
            whence
        ] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes | bytearray:
        left = max(0, self.size - self._position)
        size = left if size < 0 else min(size, left)
        try:
            first = self._piece(self._position, size)
            data = first if len(first) == size else self._joined(first, size)
        except EngineError as error:
            self.failure = error  # pyarrow may wrap it
            raise
        self._position += size
        return data

    def _joined(self, first: bytes, size: int) -> bytearray:
        data, filled = bytearray(size), len(first)
        data[:filled] = first
        while filled < size:
            piece = self._piece(self._position + filled, size - filled)
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
        return data

    def _piece(self, begin: int, size: int) -> bytes:
        """At least one of the bytes from `begin` on, at most `size`."""
        if begin >= self._end_begin or size == 0:
            return self._end[begin - self._end_begin :][:size] if size else b""
        for at, (block_begin, block) in enumerate(self._blocks):
            if block_begin <= begin < block_begin + len(block):
                self._blocks.append(self._blocks.pop(at))
                break
        else:
            block_begin, block = begin, self._next_block(begin, size)
        return block[begin - block_begin : begin - block_begin + size]

    def _next_block(self, begin: int, size: int) -> bytes:
        self._blocks = [(at, block) for at, block in self._blocks if at + len(block) != begin]
        del self._blocks[: max(0, len(self._blocks) + 1 - self._max_blocks)]
        wanted_end = next((end for first, end in self._extents if first <= begin < end), begin + size)
        held_from = min((at for at, _ in self._blocks if at > begin), default=self._end_begin)
        block = self._fetch(begin, min(begin + BLOCK_BYTES, wanted_end, held_from))
        self._blocks.append((begin, block))
        return block

    def _fetch(self, begin: int, end: int) -> bytes:
        data = self._store.read(self._shard.path, begin, end - begin, expected=self._shard)
        self.bytes_read += len(data)
        if len(data) != end - begin:
            raise self.damaged(
                found=f"{begin + len(data):,} bytes", wanted=f"{self.size:,} bytes, as it was listed"
            )
        return data


def with_plain_types(content: bytes) -> bytes:
    """A whole Parquet file without the writer's Arrow schema, as `ParquetObject` reads it; other bytes as they are."""
    begin = max(0, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    return content[:begin] + content[begin:].replace(_WRITERS_SCHEMA, _HIDDEN_SCHEMA)


def shortened(text: str) -> str:
    """A text that was found in a file, short enough for a message."""
    return text if len(text) <= 500 else f"{text[:500]} ..."
