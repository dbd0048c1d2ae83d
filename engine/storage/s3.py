"""A prefix of an S3 bucket as a store; not for files on a disk, and nobody else uses s3fs.

s3fs gives the client (keys, region, signing) and the event loop. The requests go to that client directly, so
that neither s3fs (five attempts of its own) nor botocore (a quota of retries that an outage uses up) retries
as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, final

import s3fs
from botocore import exceptions as aws

from engine.errors import ObjectChanged, ObjectNotFound, RecipeError, StorageError
from engine.storage.base import (
    BLOCK_BYTES,
    InputBlocks,
    InputStream,
    ObjectInfo,
    StorageConfig,
    Store,
    checked_path,
    checked_prefix,
    checked_target,
    is_unicode,
)
from engine.storage.s3_copy import Copy
from engine.storage.s3_download import Download, etag_of, identity_of
from engine.storage.s3_errors import FOREIGN_ERRORS, changed, code_of, explained, persistently

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60  # between two pieces of an answer, not for all of it
KEYS_PER_PAGE = 1000
KEYS_HELD = 100_000  # about 40 MB; the reordering that `_in_order` can repair
MAX_CONNECTIONS = 64

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")  # as botocore has it


@final
class S3Store(Store):
    """Objects are the keys below a prefix; keys that end in "/" are folder markers of tools, not objects."""

    def __init__(self, uri: str, config: StorageConfig) -> None:
        self._bucket, self._root = _bucket_and_root(uri)
        super().__init__(f"s3://{self._bucket}/{self._root}".rstrip("/"), config)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        checked_prefix(prefix, self.uri)
        return _in_order(self._listed(prefix), self.uri)

    def names(self, prefix: str = "") -> Iterator[str]:
        checked_prefix(prefix, self.uri)
        return (info.path for info in self._listed(prefix))

    def info(self, path: str) -> ObjectInfo:
        place = self._place(path)
        answer = self._call("find", path, lambda client: client.head_object(**place))
        size, modified = answer["ContentLength"], answer.get("LastModified")  # HTTP lets a store leave it out
        return ObjectInfo(
            path, size, identity_of(answer["ETag"], size), None if modified is None else modified.timestamp()
        )

    def read(
        self, path: str, offset: int = 0, length: int | None = None, expected: ObjectInfo | None = None
    ) -> bytes:
        if length == 0:
            return b""
        download = Download(self._place(path), offset, length, expected)
        return bytes(self._call("read", path, download.go_on))

    def open_input(self, info: ObjectInfo, offset: int = 0) -> InputStream:
        return InputStream(_RangedBlocks(self, info, offset))

    def write(self, path: str, data: bytes) -> ObjectInfo:
        place = self._place(path)
        answer = self._call("write", path, lambda client: client.put_object(**place, Body=data))
        return ObjectInfo(path, len(data), identity_of(answer["ETag"], len(data)))

    def create(self, path: str, data: bytes) -> bool:
        place = self._place(path)
        try:
            return self.read(path) == data  # looked at first for the stores that ignore If-None-Match
        except ObjectNotFound:
            pass
        # 412: another's, or our own whose answer was lost. Reading it back tells which.
        with contextlib.suppress(ObjectChanged):
            self._call("create", path, lambda client: client.put_object(**place, Body=data, IfNoneMatch="*"))
        return self.read(path) == data

    def copy(self, info: ObjectInfo, path: str) -> ObjectInfo:
        checked_target(info, path, self.uri)
        if self._copied(info, path) == etag_of(info):
            return ObjectInfo(path, info.size, info.identity)
        # The same bytes in other parts or under another key have another ETag; so have other bytes, which a store
        # that ignores the condition, or copies nothing, may have put there.
        source, target = self.info(info.path), self.info(path)
        if source.identity != info.identity or target.size != info.size:
            self.delete(path)
            if source.identity != info.identity:
                raise changed(f"{self.uri}/{info.path}", source.identity, info.identity)
            raise StorageError(
                f"the store did not copy {self.uri}/{info.path} to {path}",
                found=f"{target.size} bytes",
                wanted=f"{info.size} bytes",
                way_out="use a store that has CopyObject and UploadPartCopy",
            )
        return target

    def delete(self, path: str) -> None:
        place = self._place(path)

        async def delete_if_there(client: Any) -> None:
            try:
                await client.delete_object(**place)
            except aws.ClientError as error:
                if code_of(error) != "NoSuchKey":  # S3 answers 204; some others say that there was none
                    raise

        self._call("delete", path, delete_if_there)

    def sub(self, path: str) -> S3Store:
        if not path:
            return self
        return S3Store(f"{self.uri}/{checked_path(path.rstrip('/'), self.uri)}", self.config)

    def start_block(self, info: ObjectInfo, begin: int, on_bytes: Callable[[int], None]) -> Future[bytearray]:
        """Fetch the next block in the background; `answer_of` has it, or its error in our words."""
        length = min(BLOCK_BYTES, info.size - begin)
        download = Download(self._place(info.path), begin, length, info, on_bytes)
        return self._start(download.go_on)

    def answer_of(self, future: Future[T], doing: str, path: str) -> T:
        """Wait for a request; an interrupt (Ctrl-C) cancels it."""
        try:
            return future.result()
        except FOREIGN_ERRORS as error:
            raise explained(error, doing, f"{self.uri}/{path}", self._endpoint()) from error
        finally:
            future.cancel()

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        where = {"Bucket": self._bucket, "Prefix": self._root + prefix, "MaxKeys": KEYS_PER_PAGE}
        while True:
            page = self._call("list", prefix, lambda client: client.list_objects_v2(**where))
            for entry in page.get("Contents", ()):
                path = entry["Key"][len(self._root) :]
                if path and not path.endswith("/"):
                    identity, modified = identity_of(entry["ETag"], entry["Size"]), entry["LastModified"]
                    yield ObjectInfo(path, entry["Size"], identity, modified.timestamp())
            if not page["IsTruncated"]:
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def _copied(self, info: ObjectInfo, path: str) -> str:
        """The ETag of the new target."""
        copy = Copy(self._place(info.path), info, self._place(path))
        doing = f"make {path} a copy of"
        try:
            return self._call(doing, info.path, copy.go_on)
        except BaseException:
            with contextlib.suppress(StorageError):
                self._call(doing, info.path, copy.abort)
            raise

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._root + checked_path(path, self.uri)}

    def _call(self, doing: str, path: str, request: Callable[[Any], Awaitable[T]]) -> T:
        return self.answer_of(self._start(request), doing, path)

    def _start(self, request: Callable[[Any], Awaitable[T]]) -> Future[T]:
        return _connection(self.config).start(request)

    def _endpoint(self) -> str:
        named = (self.config.endpoint_url, *map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")))
        return next(filter(None, named), "AWS")


@final
class _RangedBlocks(InputBlocks):
    """One version of one object in ranges of BLOCK_BYTES; while one is consumed the next is on its way."""

    def __init__(self, store: S3Store, info: ObjectInfo, offset: int) -> None:
        self._store, self._info = store, info
        self._block = memoryview(b"")
        self._begin = offset  # of the block that is on its way
        self._ahead: Future[bytearray] | None = None
        self._ahead = self._start()

    def readinto(self, buffer: WriteableBuffer) -> int:
        if not self._block and self._ahead is not None:
            block = self._store.answer_of(self._ahead, "read", self._info.path)
            self._block = memoryview(block)
            self._begin += len(block)
            self._ahead = self._start()
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._block))
        target[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def close(self) -> None:
        if not self.closed and self._ahead is not None:
            self._ahead.cancel()
        self._block = memoryview(b"")
        super().close()

    def _start(self) -> Future[bytearray] | None:
        if self._begin >= self._info.size:
            return None
        return self._store.start_block(self._info, self._begin, self._count)

    def _count(self, received: int) -> None:
        self.bytes_read += received


@final
class _Connection:
    """A client with its sockets, shared by all stores of this process with the same settings and keys."""

    def __init__(self, config: StorageConfig) -> None:
        self._files = s3fs.S3FileSystem(
            anon=config.anonymous,
            endpoint_url=config.endpoint_url,
            client_kwargs={"region_name": config.region} if config.region else {},
            config_kwargs={
                "request_checksum_calculation": "when_required",  # else many S3-compatible stores answer 411
                "response_checksum_validation": "when_required",
                "retries": {"mode": "standard", "total_max_attempts": 1},  # `persistently` retries
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": MAX_CONNECTIONS,
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def start(self, request: Callable[[Any], Awaitable[T]]) -> Future[T]:
        """Send it from the event loop's thread, again while that may help."""
        return asyncio.run_coroutine_threadsafe(self._send(request), self._files.loop)

    async def _send(self, request: Callable[[Any], Awaitable[T]]) -> T:
        try:
            client = await self._files.set_session()
        except ValueError as error:  # botocore's for an endpoint or region that it cannot parse
            way_out = "check storage.endpoint_url and storage.region, or AWS_ENDPOINT_URL and AWS_REGION"
            raise StorageError("cannot make an S3 client", found=str(error), way_out=way_out) from error
        return await persistently(lambda: request(client))


_connections: dict[object, _Connection] = {}


def _connection(config: StorageConfig) -> _Connection:
    """Making a client takes 0.15 s, and with a role a request for keys: once per process is enough."""
    keys = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    settings = (os.getpid(), config, keys)  # a forked child has no event loop thread: it needs its own
    return _connections.get(settings) or _connections.setdefault(settings, _Connection(config))


def _bucket_and_root(uri: str) -> tuple[str, str]:
    """The bucket and what all keys begin with: "" or the prefix with one slash at its end."""
    bucket, _, prefix = uri[len("s3://") :].partition("/")
    prefix = prefix.rstrip("/")
    if uri[:5].lower() != "s3://" or not _BUCKET.fullmatch(bucket):
        raise RecipeError(f"{uri!r} names no bucket", found=repr(bucket), wanted="s3://bucket/prefix")
    if {".", ".."} & set(prefix.split("/")) or not is_unicode(prefix):
        wanted = 'a prefix in UTF-8, without "." or ".." as a step'
        raise RecipeError(f"{uri!r} is not a place in a bucket", wanted=wanted)
    return bucket, f"{prefix}/" if prefix else ""


def _in_order(found: Iterable[ObjectInfo], uri: str) -> Iterator[ObjectInfo]:
    """Sort a listing that is almost sorted, holding at most KEYS_HELD of it.

    S3 lists by whole keys ("a-b" before "a/b"); SeaweedFS 4.48 walks folders ("a/b" first), and S3 directory
    buckets promise no order.
    """
    held: list[tuple[str, ObjectInfo]] = []
    last = ""
    for info in found:
        heapq.heappush(held, (info.path, info))
        if len(held) > KEYS_HELD:
            smallest = heapq.heappop(held)[1]
            _check_order(last, smallest.path, uri)
            last = smallest.path
            yield smallest
    if held:
        _check_order(last, held[0][0], uri)
    while held:
        yield heapq.heappop(held)[1]


def _check_order(before: str, after: str, uri: str) -> None:
    if after < before:
        raise StorageError(
            f"the store lists {uri} too far out of order to be sorted within {KEYS_HELD} keys",
            found=f"{after!r} behind {before!r}",
            way_out="give a narrower URI, or rename one of the two folders",
        )
