"""What a store can do, whichever kind it is; not for how any one kind does it."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from pydantic import field_validator

from engine.config import Config
from engine.errors import StorageError

BLOCK_BYTES = (
    8 * 2**20
)  # one ranged read of `open_input`: long enough to hide a round trip, short enough to hold two


class StorageConfig(Config):
    """How to reach an object store. Keys come from the usual AWS environment or role, never from here."""

    endpoint_url: str | None = None
    """http(s) address of an S3-compatible store; null: AWS itself, or AWS_ENDPOINT_URL where that is set."""
    region: str | None = None
    """Region of the bucket, e.g. eu-central-1; null: AWS_REGION, the AWS profile, or us-east-1."""
    anonymous: bool = False
    """True: send requests without keys, for public buckets."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_web_address(cls, endpoint_url: str | None) -> str | None:
        if endpoint_url is not None and not endpoint_url.startswith(("http://", "https://")):
            raise ValueError("an endpoint starts with http:// or https://")
        return endpoint_url


@final
@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a listing describes it."""

    path: str
    """Relative to the store's root, separated by "/"."""
    size: int
    """Bytes."""
    identity: str
    """Differs when the content does: "etag:<etag>:<size>" (no quotes) on S3, "mtime:<ns>:<size>" on disk."""
    modified: float | None = field(default=None, compare=False)
    """When it came here or was last replaced, in seconds since 1970 UTC; None where that was not asked for."""


class InputStream(io.BufferedReader):
    """A sequential stream over one object that knows how much of it came from the store.

    It belongs to the process that opened it. Read it to its end (b""): a changed file is noticed there.
    """

    raw: InputBlocks

    def __init__(self, raw: InputBlocks) -> None:
        super().__init__(raw, buffer_size=256 * 1024)

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from the store until now, read-ahead included."""
        return self.raw.bytes_read


class InputBlocks(io.RawIOBase):
    """What an `InputStream` reads from; each kind of store has its own."""

    bytes_read = 0

    def readable(self) -> bool:
        return True


class Store(ABC):
    """A folder of objects, on disk or in a bucket, under one root URI.

    Paths are relative to the root, separated by "/", and never leave it. A store is cheap, can be pickled
    (URI and config travel, connections do not) and may be used by several threads at once. Every method
    raises errors of `engine.errors` only: ObjectNotFound, AccessDenied, ObjectChanged, or StorageError for
    the rest, after what may pass by itself was tried again.
    """

    uri: str
    """Normalised: the same place has one spelling; without a slash at the end."""
    config: StorageConfig

    def __init__(self, uri: str, config: StorageConfig) -> None:
        self.uri, self.config = uri, config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose path starts with this text, in code point order of the whole path.

        Args:
            prefix: text, as S3 means it: "data/" lists a folder, "data" also finds "data2/x".

        Returns:
            A lazy iterator in bounded memory, empty where nothing is there, or not even the folder. Our own
            temporary files and S3's folder markers ("x/") are left out.

        Raises:
            ObjectNotFound: the bucket does not exist.
        """

    def names(self, prefix: str = "") -> Iterator[str]:
        """The paths of `list` alone, in any order: on a disk a fraction of the work, since no file is looked at."""
        return (info.path for info in self.list(prefix))

    @abstractmethod
    def info(self, path: str) -> ObjectInfo:
        """The object's present size and identity, equal to what `list` says.

        Raises:
            ObjectNotFound: no such object.
        """

    @abstractmethod
    def read(
        self, path: str, offset: int = 0, length: int | None = None, expected: ObjectInfo | None = None
    ) -> bytes:
        """Bytes [offset, offset + length) of the object, as far as it reaches; b"" at or behind its end.

        Args:
            path: of the object.
            offset: first byte wanted.
            length: bytes wanted; None: to the end.
            expected: the object must still be this one.

        Raises:
            ObjectNotFound: no such object.
            ObjectChanged: it is no longer the expected one.
        """

    @abstractmethod
    def open_input(self, info: ObjectInfo, offset: int = 0) -> InputStream:
        """A sequential stream from `offset` to the end of exactly this version of the object.

        S3: ranged reads of 8 MiB with If-Match, one block ahead in the background; a read that was cut goes
        on at the byte it reached. Disk: a plain file, checked against `info` now and at its end. Close it.

        Raises:
            ObjectNotFound, ObjectChanged: at once or while reading.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> ObjectInfo:
        """Put the whole object in place in one step: readers see the old one, or none, or all of the new."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write the object only if there is none.

        Returns:
            True: the object there now is `data`. False: another content is there; read it.
        """

    @abstractmethod
    def copy(self, info: ObjectInfo, path: str) -> ObjectInfo:
        """Copy exactly this version of an object to another path of this store; the store does it, not this machine.

        The target appears whole in one step, or not at all; one that was there is replaced. S3: CopyObject, above
        1 GiB UploadPartCopy, on condition of the ETag. Disk: a hard link where the disk has them, since no write
        of a store changes a file in place; else the bytes.

        Args:
            info: what to copy.
            path: where to.

        Returns:
            The target, with an identity of its own.

        Raises:
            ObjectNotFound: there is no such object to copy.
            ObjectChanged: it is no longer this version.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object; it is fine if there is none."""

    @abstractmethod
    def sub(self, path: str) -> Store:
        """The store rooted at `path` below this one; "" is this one."""


def checked_path(path: str, uri: str) -> str:
    """`path` if it names something below the root.

    Raises:
        StorageError: it is empty, absolute, has "." or ".." as a step, a NUL, or is not valid Unicode.
    """
    steps = path.split("/")
    if not path or path.startswith("/") or path.endswith("/") or {".", ".."} & set(steps) or "\0" in path:
        raise StorageError(
            f"{path!r} is not a path of an object below {uri}",
            wanted='steps separated by "/", none of them "." or "..", without a slash at either end',
        )
    if not is_unicode(path):
        raise StorageError(
            f"{path!r} below {uri} cannot be written as UTF-8",
            wanted="a name in valid UTF-8, which every object store and every table can hold",
            way_out="rename the file",
        )
    return path


def checked_target(info: ObjectInfo, path: str, uri: str) -> str:
    """`path` if the object can be copied there: S3 refuses to copy one onto itself."""
    if path == info.path:
        raise StorageError(
            f"{uri}/{path} cannot be copied onto itself", found="the same path twice", wanted="another path"
        )
    return checked_path(path, uri)


def checked_prefix(prefix: str, uri: str) -> str:
    """`prefix` if no step of it leaves the root; it may be empty and may end in a slash."""
    checked_path(f"{prefix}x", uri)
    return prefix


def is_unicode(path: str) -> bool:
    """False for names of a disk that are not UTF-8 (Python shows them with surrogates)."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
