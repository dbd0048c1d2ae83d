"""The members of a tar archive, read forwards and strictly; not for what the members mean, nor for unpacking them.

Python's `tarfile` decodes each header block (`TarInfo.frombuf`), but for those that are like most: of them a few fields
are enough, in a third of the time. The walk from header to header is ours, because `tarfile.TarFile` (3.11 to 3.13)
takes an unreadable, cut or missing header for the end of the archive, reads extended headers of any length into memory,
and counts offsets from where its stream starts.

An archive ends with two blocks of zeros, and nothing but zeros follows. All else is damage: an end without that
marker, a lone zero block, archives joined with `cat`. Member data has no checksum: tar cannot tell a changed byte.
Layout: POSIX.1-2008 pax (ustar, pax), and the GNU tar manual, "Basic Tar Format" (long names, sparse files).
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, final

from engine.errors import ShardDamaged

BLOCK_BYTES = 512
FOLDER = "a folder"  # the `special` of folders
MAX_EXTENDED_HEADER_BYTES = 2**20  # long names and pax records are held in memory; Linux paths end at 4 KiB
_CHUNK_BYTES = 2**20
_ZERO_BLOCK = bytes(BLOCK_BYTES)

_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED_TYPES = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_DATALESS_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: FOLDER,
}
# Octal numbers as all common writers have them: mode, uid, gid; size; mtime; checksum. What is written otherwise (base
# 256, spaces in front) is left to tarfile.
_SHORT_NUMBER = rb"(?:[0-7]{7}[\0 ]|[0-7]{6} \0)"
_LONG_NUMBER = rb"[0-7]{11}[\0 ]"
_NUMBERS = re.compile(
    _SHORT_NUMBER + rb"{3}([0-7]{11})[\0 ]" + _LONG_NUMBER + rb"([0-7]{6})[\0 ]{2}" + tarfile.REGTYPE
)
_DEVICE = re.compile(rb"(?:" + _SHORT_NUMBER + rb"|\0{8}){2}\0")  # and no prefix
_SPARSE = "GNU.sparse."  # pax keywords of a file stored without its holes


@final
@dataclass(frozen=True, slots=True)
class TarMember:
    """One member, by its headers."""

    name: str
    """As it stands there, in UTF-8 with undecodable bytes escaped (\\xff); a text, never a place on a disk."""
    offset: int
    """Of its first header block, extended headers included."""
    size: int
    """Bytes of data; 0 if `special`."""
    special: str | None
    """None: a plain file. Else what it is ("a symbolic link", "a folder" ...), and it has no data for us."""


@final
class TarStream:
    """A tar archive as a forward stream of members.

    Args:
        source: positioned at a header; its `read` gives fewer bytes than asked for only at its end.
        offset: of that header in the archive.
        name: of the archive, for messages.
    """

    end_offset: int
    """Where the end-of-archive marker begins; set once `members` has come to its end."""

    def __init__(self, source: BinaryIO, offset: int, name: str) -> None:
        self._source, self._position, self._name = source, offset, name
        self._data_bytes = 0  # of the member that came last
        self._next_header = offset

    def members(self) -> Iterator[TarMember]:
        """Every member in turn; what was not read of the one before is skipped.

        Raises:
            ShardDamaged: the archive breaks off or breaks the rules.
        """
        while (member := self._next_member()) is not None:
            yield member
        self._check_end()

    def read(self) -> bytes:
        """The data of the member that came last; to be called once for it.

        Raises:
            ShardDamaged: the archive ends before the data does.
        """
        return self._exactly(self._data_bytes)

    def _next_member(self) -> TarMember | None:
        """None at the end-of-archive marker."""
        self._skip_to(self._next_header)
        begin: int | None = None
        overrides: dict[str, str] = {}
        while True:
            offset, block = self._position, self._take(BLOCK_BYTES)
            info = self._header(block, offset)
            if info is None and begin is None:
                self.end_offset = offset
                return None
            if info is None:
                raise self._damage(offset, "an extended header without its member")
            if info.type == tarfile.XGLTYPE:
                self._check_global(self._pax_records(self._extension(info)), offset)
                continue
            begin = offset if begin is None else begin
            if info.type not in _EXTENDED_TYPES:
                return self._member(info, block, begin, overrides)
            overrides |= self._overrides(info)

    def _header(self, block: bytes, offset: int) -> tarfile.TarInfo | None:
        """None for a block of zeros."""
        if (plain := _plain_header(block)) is not None:
            return plain
        if block == _ZERO_BLOCK:
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            found = (
                f"no tar header: {error}"
                if len(block) == BLOCK_BYTES
                else f"the end, after {len(block)} bytes"
            )
            raise self._damage(offset, found) from None
        if info.size < 0:
            raise self._damage(offset, f"a member of {info.size} bytes")
        return info

    def _overrides(self, info: tarfile.TarInfo) -> dict[str, str]:
        """What an extended header says about the member that follows."""
        body = self._extension(info)
        if info.type == tarfile.GNUTYPE_LONGLINK:
            return {}
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": _decoded(body.partition(b"\0")[0])}
        return self._pax_records(body)

    def _extension(self, info: tarfile.TarInfo) -> bytes:
        """The body of an extended header."""
        if info.size > MAX_EXTENDED_HEADER_BYTES:
            raise self._damage(self._position, f"an extended header of {info.size:,} bytes")
        return self._exactly(_whole_blocks(info.size))[: info.size]

    def _pax_records(self, body: bytes) -> dict[str, str]:
        """Records "LENGTH KEYWORD=VALUE\\n", where LENGTH counts the whole record."""
        records: dict[str, str] = {}
        begin = 0
        while begin < len(body):
            digits, _, _ = body[begin : begin + 20].partition(b" ")
            end = begin + int(digits) if digits.isdigit() else begin
            keyword, equals, value = body[begin + len(digits) + 1 : end].partition(b"=")
            if not equals or not value.endswith(b"\n") or end > len(body):
                raise self._damage(self._position, "a malformed pax record")
            records[_decoded(keyword)] = _decoded(value[:-1])
            begin = end
        return records

    def _check_global(self, records: dict[str, str], offset: int) -> None:
        """A global header may not change what members are: a read that starts behind it would see others."""
        for keyword in records:
            if keyword in ("path", "size") or keyword.startswith(_SPARSE):
                raise self._damage(offset, f"a global header that sets {keyword!r} for all members")

    def _member(
        self, info: tarfile.TarInfo, block: bytes, begin: int, overrides: dict[str, str]
    ) -> TarMember:
        size = overrides.get("size", str(info.size))
        if not (size.isascii() and size.isdigit() and len(size) < 20):
            raise self._damage(begin, f"a member of {size[:40]!r} bytes")
        is_sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(_SPARSE) for key in overrides)
        if info.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(block)
        special = _DATALESS_TYPES.get(info.type)
        self._next_header = self._position + (0 if special else _whole_blocks(int(size)))
        if special is None and is_sparse:
            special = "a sparse file"
        elif special is None and info.type not in _FILE_TYPES:
            special = "not a plain file"
        self._data_bytes = 0 if special else int(size)
        name = overrides.get(f"{_SPARSE}name") or overrides.get("path") or info.name
        return TarMember(name, begin, self._data_bytes, special)

    def _skip_sparse_map(self, block: bytes) -> None:
        """An old GNU sparse header says at byte 482, its continuations at byte 504, whether another block follows."""
        goes_on = block[482]
        while goes_on:
            goes_on = self._exactly(BLOCK_BYTES)[504]

    def _check_end(self) -> None:
        """Read to the end of the source: a second zero block, then zeros only."""
        offset, block = self._position, self._take(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise self._damage(offset, "a lone zero block and the end")
        while block:
            if block.count(0) != len(block):
                raise self._damage(offset, "data behind a zero block (archives joined into one?)")
            offset, block = self._position, self._take(_CHUNK_BYTES)

    def _skip_to(self, offset: int) -> None:
        while self._position < offset:
            self._exactly(min(_CHUNK_BYTES, offset - self._position))

    def _exactly(self, count: int) -> bytes:
        offset, data = self._position, self._take(count)
        if len(data) < count:
            raise self._damage(offset, f"the end, {count - len(data):,} bytes early")
        return data

    def _take(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end of the source."""
        try:
            data = self._source.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # cut, broken, and wrong header or checksum
            raise self._damage(self._position, f"broken compressed data: {error}") from None
        self._position += len(data)
        return data

    def _damage(self, offset: int, found: str) -> ShardDamaged:
        return ShardDamaged(
            f"{self._name} is damaged at byte {offset:,} of the tar archive",
            found=found,
            wanted="a header, its data, or two zero blocks that end the archive",
            way_out="write this shard again; the samples before that byte are good and are kept",
        )


def _plain_header(block: bytes) -> tarfile.TarInfo | None:
    """Name and size of a plain file, if the block is such that `TarInfo.frombuf` reads the same from it."""
    # At offsets 100, 257 and 329. Half of it zeros: then its bytes sum up to less than 65,521, where Adler-32 wraps.
    if len(block) != BLOCK_BYTES or block[257:262] != b"ustar" or block.count(0) < BLOCK_BYTES // 2:
        return None
    numbers = _NUMBERS.match(block, 100)
    if numbers is None or _DEVICE.match(block, 329) is None:
        return None
    size, checksum = numbers.groups()
    if _sum_of_bytes(block) - _sum_of_bytes(block[148:156]) + 8 * ord(" ") != int(checksum, 8):
        return None
    info = tarfile.TarInfo(_decoded(block[:100].partition(b"\0")[0]))
    info.size = int(size, 8)
    return info


def _sum_of_bytes(data: bytes) -> int:
    """Of less than 65,521. The lower half of Adler-32 counts from 1, and is much faster than sum() (RFC 1950)."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _whole_blocks(count: int) -> int:
    return -(-count // BLOCK_BYTES) * BLOCK_BYTES


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")
