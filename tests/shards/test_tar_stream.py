"""Header blocks that are read without tarfile say what tarfile says of them."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from engine.errors import ShardDamaged
from engine.shards.tar_stream import TarStream

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def header(form: int, **fields: object) -> bytes:
    """The header block of a member; its fields as of TarInfo."""
    info = tarfile.TarInfo("photos/cat 1.jpg")
    info.size, info.mtime = 123_456, 1_790_000_000
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(form)[-tarfile.BLOCKSIZE :]


def by_tarfile(block: bytes) -> tuple[str, int] | None:
    """Name and size; None: no header."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return (info.name, info.size) if info.size >= 0 else None


def by_stream(block: bytes) -> tuple[str, int] | None:
    try:
        member = next(TarStream(io.BytesIO(block), 0, "made").members())
    except ShardDamaged:
        return None
    return member.name, member.size


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"uname": "nobody", "gname": "users", "uid": 1000, "mode": 0o600},
        {"name": "päth/ü.jpg"},
        {"name": "x" * 100},
        {"name": "/".join(["folder"] * 18) + "/a.jpg"},
        {"size": 0},
        {"size": 8**11 - 1},
        {"mtime": 0},
    ],
    ids=["plain", "owner", "not-ascii", "long", "prefix", "empty", "large", "1970"],
)
def test_a_whole_header_is_read_as_tarfile_reads_it(form: int, fields: dict[str, object]) -> None:
    block = header(form, **fields)
    assert by_tarfile(block) is not None
    assert by_stream(block) == by_tarfile(block)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_header_with_any_byte_changed_is_damage_as_for_tarfile(form: int) -> None:
    """With and without a checksum that was mended: of the fields that matter, too, each byte takes several values."""
    whole, random_ = header(form), random.Random(0)
    for place in range(tarfile.BLOCKSIZE):
        for value in {0, 32, ord("7"), ord("9"), 255, random_.randrange(256)} - {whole[place]}:
            changed = bytearray(whole)
            changed[place] = value
            assert by_stream(bytes(changed)) == by_tarfile(bytes(changed)), (place, value)
            if 148 <= place < 157:  # the checksum itself; other types are not for tarfile alone
                continue
            changed[148:156] = b" " * 8
            changed[148:156] = b"%06o\0 " % sum(changed)
            assert by_stream(bytes(changed)) == by_tarfile(bytes(changed)), (place, value)


def test_a_sum_that_is_wrong_by_as_much_as_adler_32_wraps_at_is_damage() -> None:
    block = bytearray(header(tarfile.USTAR_FORMAT))
    block[345:500] = b"\xff" * 155
    block[157:257] = b"\xff" * 100  # a link's name, which plain files do not use
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) % 65_521)
    assert sum(block) > 65_521
    assert by_stream(bytes(block)) is None
    assert by_tarfile(bytes(block)) is None
