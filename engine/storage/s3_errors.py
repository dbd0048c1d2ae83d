"""What an S3 store says when it fails: what of it may pass, and what it means in our words; sends nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from engine.errors import AccessDenied, ObjectChanged, ObjectNotFound, StorageError

T = TypeVar("T")

ATTEMPTS = 10  # measured at 25 % faults: 3 attempts lose about 2 % of requests, 10 lose none
FIRST_PAUSE_S, LONGEST_PAUSE_S = (
    0.1,
    20.0,
)  # bounds of the random pause, which doubles: 23 s in all on average
PATIENCE_S = 120.0  # with a store that answers, but wrongly or late
UNREACHABLE_PATIENCE_S = 10.0  # with an address where nobody answers: mostly a wrong one

FOREIGN_ERRORS = (aws.BotoCoreError, aws.ClientError, aiohttp.ClientError, ResponseParserError, OSError)

_PASSING_STATUS = {429, 500, 502, 503, 504}
_PASSING_CODES = {
    "BadDigest",  # the body was damaged on its way
    "ConditionalRequestConflict",  # AWS: two conditional writes at once (409)
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_PASSING_ERRORS = (
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    aiohttp.ClientError,
    ResponseParserError,  # an XML answer that was cut
    ConnectionError,
    TimeoutError,
)
_UNREACHABLE_ERRORS = (aws.ConnectTimeoutError, aws.ProxyConnectionError, aws.SSLError)
_KEY_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
    aws.ProfileNotFound,
)
_JITTER = random.SystemRandom()  # has no state that forked processes would share

_SET_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for temporary keys AWS_SESSION_TOKEN too), or "
    "AWS_PROFILE, or give the machine a role; for a public bucket set storage.anonymous: true"
)
_RENEW_TOKEN = "get new temporary keys and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
_KEY_CODES = {
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, and that storage.endpoint_url is the store it belongs to",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY: it does not belong to this AWS_ACCESS_KEY_ID",
    "ExpiredToken": _RENEW_TOKEN,
    "ExpiredTokenException": _RENEW_TOKEN,
    "InvalidToken": _RENEW_TOKEN,
    "TokenRefreshRequired": _RENEW_TOKEN,
    "RequestTimeTooSkewed": "set the clock of this machine",
}
_REGION_CODES = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
}


async def persistently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat what may pass by itself after random pauses; raise anything else, and what lasts, as it came."""
    began = time.monotonic()
    longest_pause_s = FIRST_PAUSE_S
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            return await attempt()
        except FOREIGN_ERRORS as error:
            pause_s = _JITTER.uniform(0, longest_pause_s)
            if not attempts_left or time.monotonic() - began + pause_s > _patience_s(error):
                raise
        await asyncio.sleep(pause_s)
        longest_pause_s = min(2 * longest_pause_s, LONGEST_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


def explained(error: Exception, doing: str, uri: str, endpoint: str) -> StorageError:
    """The same failure as one of `engine.errors`.

    Args:
        error: what came after the last attempt.
        doing: the verb of what was wanted, e.g. "read".
        uri: of the object, or of the prefix of a listing.
        endpoint: address of the store, or "AWS".
    """
    thing = f"cannot {doing} {uri}"
    if isinstance(error, aws.ClientError):
        return _explained_answer(error, thing, uri, endpoint)
    if isinstance(error, _KEY_ERRORS):
        return AccessDenied(thing, found=f"{error} (for {endpoint})", way_out=_SET_KEYS)
    if _is_unreachable(error):
        way_out = "check storage.endpoint_url, and that the store runs and can be reached from this machine"
        return StorageError(thing, found=f"no connection to {endpoint}: {_innermost(error)}", way_out=way_out)
    found = f"{type(error).__name__}: {error} (from {endpoint}, after up to {ATTEMPTS} attempts)"
    return StorageError(
        thing, found=found, way_out="look at the store's health and the network, then run again"
    )


def changed(uri: str, found: str, wanted: str) -> ObjectChanged:
    """An object that is no longer the version that was asked for."""
    way_out = "run again: the new version is then read from its start"
    return ObjectChanged(
        f"{uri} was changed since it was listed", found=found, wanted=wanted, way_out=way_out
    )


def status_of(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _explained_answer(error: aws.ClientError, thing: str, uri: str, endpoint: str) -> StorageError:
    status, code = status_of(error), code_of(error)
    message = error.response.get("Error", {}).get("Message", "")
    said = f"{status} {code}: {message}" if code != str(status) else f"{status} {message}"
    found = f"{said} (from {endpoint})"
    if status == 412:
        return changed(uri, found, "the version that the listing showed")
    if code == "NoSuchBucket":
        way_out = "create the bucket, or correct the URI or storage.endpoint_url"
        return ObjectNotFound(thing, found=found, wanted="a bucket that exists", way_out=way_out)
    if status == 404:
        return ObjectNotFound(
            thing, found=found, wanted="an object that exists", way_out="check bucket and path"
        )
    if code in _KEY_CODES:
        return AccessDenied(thing, found=found, way_out=_KEY_CODES[code])
    if status in (401, 403):
        way_out = (
            "check the AWS_* keys in the environment, or have their owner allowed to do this in this bucket"
        )
        return AccessDenied(thing, found=found, way_out=way_out)
    if code in _REGION_CODES:
        return StorageError(thing, found=found, way_out="set storage.region to the region of the bucket")
    if status == 400 and code == "400":  # to a HEAD request, which has no body that could give a reason
        return AccessDenied(thing, found=found, way_out=f"check storage.region; {_RENEW_TOKEN}")
    way_out = "look at the store's own log"
    if _patience_s(error):
        found = f"{said} (from {endpoint}, after {ATTEMPTS} attempts)"
        way_out = (
            "the store is overloaded or out of order: look at its own log, and run again when it is well"
        )
    return StorageError(thing, found=found, way_out=way_out)


def _patience_s(error: Exception) -> float:
    """Seconds after which another attempt is no longer worth while; 0 for what will not pass by itself."""
    if isinstance(error, aws.ClientError):
        return PATIENCE_S if status_of(error) in _PASSING_STATUS or code_of(error) in _PASSING_CODES else 0.0
    if _is_unreachable(error):
        return UNREACHABLE_PATIENCE_S
    return PATIENCE_S if isinstance(error, _PASSING_ERRORS) else 0.0


def _is_unreachable(error: Exception) -> bool:
    """No connection was made at all; aiobotocore says EndpointConnectionError for a late reset too."""
    return isinstance(error, _UNREACHABLE_ERRORS) or isinstance(
        _innermost(error), aiohttp.ClientConnectorError
    )


def _innermost(error: Exception) -> Exception:
    inner = getattr(error, "kwargs", {}).get("error")
    return inner if isinstance(inner, Exception) else error
