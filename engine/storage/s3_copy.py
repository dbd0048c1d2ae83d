"""One S3 object copied by the store itself, in one request or in parts; not for reading it, nor for other stores."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, final

from botocore import exceptions as aws

from engine.storage.base import ObjectInfo
from engine.storage.s3_download import etag_of
from engine.storage.s3_errors import code_of

COPY_BYTES = (
    2**30
)  # in one request: S3 takes 5 GiB, but a slow store is silent for longer than we wait for it
_QUOTE = '"'


@final
class Copy:
    """One version of one object on its way to another key. What is copied is kept: a retry asks for the rest."""

    def __init__(self, source: Mapping[str, str], info: ObjectInfo, target: Mapping[str, str]) -> None:
        """Nothing is asked for yet.

        Args:
            source: Bucket and Key.
            info: the version wanted.
            target: Bucket and Key.
        """
        # Without quotes, as `Download` has it.
        self._source = {"CopySource": dict(source), "CopySourceIfMatch": etag_of(info)}
        self._target, self._size = dict(target), info.size
        self._upload: dict[str, str] = {}
        self._part_etags: dict[int, str] = {}

    async def go_on(self, client: Any) -> str:
        """Copy what is missing, all of it on the first call.

        Returns:
            The target's ETag without quotes; "" where the store did not tell it.
        """
        if self._size <= COPY_BYTES:
            answer = await client.copy_object(**self._target, **self._source)
            return str(answer.get("CopyObjectResult", {}).get("ETag", "")).strip(_QUOTE)
        if not self._upload:
            begun = await client.create_multipart_upload(**self._target)
            self._upload = {**self._target, "UploadId": begun["UploadId"]}
        count = -(-self._size // COPY_BYTES)
        missing = [number for number in range(1, count + 1) if number not in self._part_etags]
        copies = [self._copy_part(client, number) for number in missing]
        for outcome in await asyncio.gather(*copies, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return await self._complete(client)

    async def abort(self, client: Any) -> None:
        """Have the store drop the parts: it keeps and bills them until then."""
        if self._upload:
            await client.abort_multipart_upload(**self._upload)

    async def _copy_part(self, client: Any, number: int) -> None:
        begin = (number - 1) * COPY_BYTES
        span = f"bytes={begin}-{min(begin + COPY_BYTES, self._size) - 1}"
        answer = await client.upload_part_copy(
            **self._upload, **self._source, PartNumber=number, CopySourceRange=span
        )
        self._part_etags[number] = answer["CopyPartResult"]["ETag"]

    async def _complete(self, client: Any) -> str:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._part_etags.items())]
        try:
            answer = await client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": parts})
        except aws.ClientError as error:
            if code_of(error) != "NoSuchUpload":  # else it is complete, and the answer that said so was lost
                raise
            return ""
        return str(answer["ETag"]).strip(_QUOTE)
