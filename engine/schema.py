"""The tables users read: Arrow schemas of embeddings, rejects and predictions, and the reasons for rejects.

Shape letters: N rows, D embedding width, k top entries. Plain Arrow types only, so that every Parquet reader
opens the files. Adding, removing or retyping a column raises SCHEMA_VERSION.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 1

EmbeddingDtype = Literal["float32", "float16"]
SampleId = tuple[str, int]
"""Shard (path relative to its source) and index: which sample of a table, and no other."""


class RejectReason(StrEnum):
    """Stable names for why a sample has no embedding. Only properties of the bytes are reasons, never time-outs."""

    NO_IMAGE = "no_image"  # nothing in the member, column or feature that the recipe names
    EMPTY_SAMPLE = "empty_sample"  # the image has zero bytes
    SAMPLE_TOO_LARGE = "sample_too_large"  # more encoded bytes than limits.max_sample_bytes
    BAD_LABEL = "bad_label"  # not text or JSON, a list or an object, names no class, or is too long
    UNSUPPORTED_FORMAT = "unsupported_format"  # not one of the formats that images.py decodes
    TRUNCATED_IMAGE = "truncated_image"  # the encoded bytes end early
    CORRUPT_IMAGE = "corrupt_image"  # the encoded bytes break their format's rules
    TOO_MANY_PIXELS = "too_many_pixels"  # more pixels than limits.max_pixels, judged from the header
    NON_FINITE_EMBEDDING = "non_finite_embedding"  # the network answered NaN or infinity
    ZERO_EMBEDDING = "zero_embedding"  # the network answered all zeros


RejectStage = Literal["read", "decode", "embed"]

SAMPLE_FIELDS = (
    pa.field("key", pa.string(), nullable=False),
    pa.field("shard", pa.string(), nullable=False),
    pa.field("index", pa.int64(), nullable=False),
)


def embeddings_schema(width: int, dtype: EmbeddingDtype, metadata: Sequence[str] = ()) -> pa.Schema:
    """Columns of a data part.

    Args:
        width: D, numbers in one embedding.
        dtype: of those numbers; float16 is opt-in.
        metadata: names of extra string columns, in the recipe's order.
    """
    number = pa.float32() if dtype == "float32" else pa.float16()
    return pa.schema(
        [
            *SAMPLE_FIELDS,
            pa.field(
                "embedding", pa.list_(pa.field("element", number, nullable=False), width), nullable=False
            ),
            pa.field("label", pa.string()),
            pa.field("image_width", pa.int32(), nullable=False),
            pa.field("image_height", pa.int32(), nullable=False),
            pa.field("sha256", pa.binary(32), nullable=False),
            *(pa.field(name, pa.string()) for name in metadata),
        ]
    )


def rejects_schema(keep_bytes: bool) -> pa.Schema:
    """Columns of a rejects part; `bytes` only where the recipe keeps them. `sha256` is null without an image."""
    fields = [
        *SAMPLE_FIELDS,
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.binary(32)),
    ]
    return pa.schema([*fields, pa.field("bytes", pa.binary())] if keep_bytes else fields)


def predictions_schema(top_k: int, several: bool = False) -> pa.Schema:
    """Columns of a prediction part.

    Args:
        top_k: min(k of the recipe, number of classes).
        several: a row may be given any number of labels.
    """
    labels = pa.list_(pa.field("element", pa.string(), nullable=False))
    return pa.schema(
        [
            *SAMPLE_FIELDS,
            pa.field("labels", labels, nullable=False) if several else pa.field("label", pa.string()),
            pa.field("confidence", pa.float32(), nullable=False),
            pa.field(
                "top_labels",
                pa.list_(pa.field("element", pa.string(), nullable=False), top_k),
                nullable=False,
            ),
            pa.field(
                "top_confidences",
                pa.list_(pa.field("element", pa.float32(), nullable=False), top_k),
                nullable=False,
            ),
            pa.field("bundle", pa.string(), nullable=False),
        ]
    )
