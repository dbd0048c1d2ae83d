"""What every kind of source says about the size of an encoded image."""

from __future__ import annotations

from engine.schema import RejectReason

Problem = tuple[RejectReason, str]


def size_problem(what: str, size_bytes: int, max_sample_bytes: int) -> Problem | None:
    """Why an image of that size cannot be used; None if it can.

    Args:
        what: holds it, for the sentence: "the image member", "the file".
        size_bytes: of the encoded image.
        max_sample_bytes: limits.max_sample_bytes.
    """
    if size_bytes == 0:
        return RejectReason.EMPTY_SAMPLE, f"{what} has no bytes"
    if size_bytes > max_sample_bytes:
        limit = f"limits.max_sample_bytes is {max_sample_bytes:,}"
        return RejectReason.SAMPLE_TOO_LARGE, f"{what} has {size_bytes:,} bytes; {limit}"
    return None
