"""One range of one S3 object, read so that cuts and replaced objects do no harm; not for whole streams.

Where the range is the whole object and its ETag is the MD5 of its bytes (one PUT, not encrypted by a key of its own),
the bytes are checked, and read again if they are wrong. Of a part of an object no store tells a digest: there only
TCP's and TLS's own checksums stand between a flipped bit and us.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, final

from botocore import exceptions as aws

from engine.errors import StorageError
from engine.storage.base import ObjectInfo
from engine.storage.s3_errors import changed, status_of

PIECE_BYTES = 2**18
_QUOTE = '"'
_IDENTITY = re.compile(r"etag:(.*):\d+")
_MD5 = re.compile(r"[0-9a-f]{32}")
_OWN_KEY = (
    "SSEKMSKeyId",
    "SSECustomerAlgorithm",
)  # of an answer: the ETag is then not the MD5, though it looks like one
# By bucket: whether an ETag ever was the MD5 of its object, and how many objects came twice alike with another one.
_buckets_with_md5: set[str] = set()
_without_md5: Counter[str] = Counter()
MOST_WITHOUT_MD5 = 3  # so many, and none with: the store has ETags of its own


@final
class Download:
    """One range of one object. What has arrived is kept, so that a retry asks only for the rest."""

    def __init__(
        self,
        place: Mapping[str, str],
        offset: int,
        length: int | None,
        expected: ObjectInfo | None,
        on_bytes: Callable[[int], None] = lambda received: None,
    ) -> None:
        """Nothing is asked for yet.

        Args:
            place: Bucket and Key.
            offset: first byte wanted.
            length: bytes wanted; None: to the end.
            expected: the version wanted; None: any, but one.
            on_bytes: told how many bytes came, each time some have; called in the event loop's thread.
        """
        self._place, self._offset, self._expected, self._on_bytes = place, offset, expected, on_bytes
        self._length_asked = self._length = length  # the second is put right by the store's first answer
        self._etag = etag_of(expected) if expected is not None else None
        self._received = bytearray()
        self._md5 = hashlib.md5(usedforsecurity=False)  # of what was received
        self._wrong_digests: set[str] = set()

    async def go_on(self, client: Any) -> bytearray:
        """Ask for what is missing, all of it on the first call."""
        if self._length is not None and len(self._received) >= self._length:
            return self._received
        begin = self._offset + len(self._received)
        try:
            answer = await client.get_object(**self._place, **self._conditions(begin))
        except aws.ClientError as error:
            return self._without_answer(error)
        with contextlib.closing(answer["Body"]) as body:
            self._check(answer, begin)
            self._etag = answer["ETag"].strip('"')
            self._length = len(self._received) + answer["ContentLength"]
            while piece := await body.read(PIECE_BYTES):
                self._received += piece
                if self._offset == 0:  # else it is not the whole object, and there is nothing to compare with
                    self._md5.update(piece)
                self._on_bytes(len(piece))
        if len(self._received) != self._length:
            raise aws.IncompleteReadError(actual_bytes=len(self._received), expected_bytes=self._length)
        self._check_digest(answer)
        return self._received

    def _check_digest(self, answer: Mapping[str, Any]) -> None:
        """Ask for all of it again where a whole object does not have the MD5 that its ETag is.

        Some stores have other ETags of that look: where two reads agree, the object is taken as it is, and after some
        such objects the bucket is not checked any more.
        """
        bucket, size = self._place["Bucket"], _size_of(answer)
        is_whole = self._offset == 0 and len(self._received) == size
        if not is_whole or not self._etag or not _MD5.fullmatch(self._etag):
            return
        if bucket not in _buckets_with_md5 and _without_md5[bucket] >= MOST_WITHOUT_MD5:
            return
        found = self._md5.hexdigest()
        if found == self._etag:
            _buckets_with_md5.add(bucket)
            return
        if any(answer.get(name) for name in _OWN_KEY):
            return
        if found in self._wrong_digests:
            _without_md5[bucket] += 1
            return
        self._wrong_digests.add(found)
        self._forget()
        said = f"the bytes that came have the MD5 {found}, not that of the ETag, {self._etag}"
        raise aws.ResponseStreamingError(error=said)

    def _forget(self) -> None:
        """Drop what was received: it is to be asked for again."""
        self._received.clear()
        self._md5 = hashlib.md5(usedforsecurity=False)

    def _conditions(self, begin: int) -> dict[str, str]:
        """Range and If-Match; radosgw 16 wants the ETag without quotes, AWS and SeaweedFS take both."""
        conditions = {"IfMatch": self._etag} if self._etag else {}
        if self._length is not None:
            conditions["Range"] = f"bytes={begin}-{self._offset + self._length - 1}"
        elif begin > 0:  # from 0 on it is the whole object, and a range of an empty one is an error (416)
            conditions["Range"] = f"bytes={begin}-"
        return conditions

    def _without_answer(self, error: aws.ClientError) -> bytearray:
        if self._expected is None and status_of(error) == 416:
            return self._received  # the range begins at the end of the object or behind it
        if self._expected is None and status_of(error) == 412:  # replaced while it was read: read the new one
            self._forget()
            self._etag, self._length = None, self._length_asked
            raise aws.ResponseStreamingError(error="the object was replaced while it was read") from error
        raise error

    def _check(self, answer: Mapping[str, Any], begin: int) -> None:
        """Some stores ignore If-Match or Range, and would mix two versions or shift the bytes in silence."""
        uri = f"s3://{self._place['Bucket']}/{self._place['Key']}"
        content_range = _range_of(answer)
        found = identity_of(answer["ETag"], _size_of(answer))
        if self._expected is not None and found != self._expected.identity:
            raise changed(uri, found, self._expected.identity)
        if not content_range.startswith(f"bytes {begin}-"):
            raise StorageError(
                f"{uri}: the store sent another part of the object than was asked for",
                found=content_range,
                wanted=f"bytes {begin}-",
                way_out="use a store that keeps to the Range header",
            )


def _range_of(answer: Mapping[str, Any]) -> str:
    """Which bytes of how many an answer has; one without a range has the whole object."""
    return str(answer.get("ContentRange") or f"bytes 0-/{answer['ContentLength']}")


def _size_of(answer: Mapping[str, Any]) -> int:
    """Bytes of the whole object."""
    return int(_range_of(answer).rpartition("/")[2])


def identity_of(etag: str, size: int) -> str:
    return f"etag:{etag.strip(_QUOTE)}:{size}"


def etag_of(info: ObjectInfo) -> str:
    """The ETag in an identity; StorageError for an object of a disk."""
    found = _IDENTITY.fullmatch(info.identity)
    if found is None:
        raise StorageError(
            f"{info.path} was not listed in a bucket", found=info.identity, wanted="etag:<etag>:<size>"
        )
    return found.group(1)
