"""Tar archives for tests, member by member; not for reading them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from typing import Any

from engine.storage import ObjectInfo, Store

END_BYTES = 1024  # the two zero blocks; Python adds more zeros, up to 10,240, which we leave out


def member(name: str | bytes, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member; `fields` are attributes of TarInfo (type, linkname, pax_headers ...)."""
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_bytes(
    members: Iterable[tuple[tarfile.TarInfo, bytes]],
    form: int = tarfile.USTAR_FORMAT,
    pax_headers: dict[str, str] | None = None,
) -> bytes:
    """A whole archive with its end marker and no padding behind it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers=pax_headers) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    return file.getvalue()[: end + END_BYTES]


def put(store: Store, data: bytes, path: str = "a.tar") -> ObjectInfo:
    return store.write(path, data)
