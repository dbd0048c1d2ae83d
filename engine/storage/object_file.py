"""One object as a seekable file whose end is fetched once, for readers of formats with a footer; not for whole streams
(`Store.open_input`)."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from engine.storage.base import ObjectInfo, Store

_END_BYTES = 64 << 10  # what pyarrow asks for first; the footers of our parts are about 4 KiB


def object_file(store: Store, info: ObjectInfo) -> ObjectFile:
    """Exactly this version of an object; nothing is asked for yet.

    Reading raises ObjectNotFound, ObjectChanged.
    """
    return ObjectFile(
        info.size,
        lambda offset, length: store.read(info.path, offset=offset, length=length, expected=info),
    )


@final
class ObjectFile(io.RawIOBase):
    """For one thread at a time; a read before the end is a request, unless what was read last has it.

    Args:
        size: of the object in bytes.
        fetch: gives so many bytes from an offset on.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._size, self._fetch, self._position = size, fetch, 0
        self._end_from = max(0, size - _END_BYTES)
        self._block, self._block_from = b"", 0  # what was read last

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        begin = self._position
        size = max(0, self._size - begin) if size is None or size < 0 else size
        if begin >= self._end_from:
            chunk = self._end[begin - self._end_from : begin - self._end_from + size]
        else:
            self._cover(begin, size)
            chunk = self._block[begin - self._block_from : begin - self._block_from + size]
        self._position = begin + len(chunk)
        return chunk

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        chunk = self.read(len(target))
        target[: len(chunk)] = chunk
        return len(chunk)

    def _cover(self, begin: int, size: int) -> None:
        """Have these bytes in the block, without asking again for those that are in it, and for many at once: small
        columns that stand together come in one request.

        DuckDB 2.0 reads a page's header with up to 1,000,000 bytes behind it, and then the page.
        """
        skipped = begin - self._block_from
        known = self._block[skipped:] if 0 <= skipped < len(self._block) else b""
        if len(known) < size:
            missing = min(max(size - len(known), _END_BYTES), self._size - begin - len(known))
            self._block, self._block_from = known + self._fetch(begin + len(known), missing), begin

    @cached_property
    def _end(self) -> bytes:
        return self._fetch(self._end_from, self._size - self._end_from)
