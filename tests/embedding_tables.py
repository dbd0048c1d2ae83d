"""Embedding tables of given rows and bundles with given numbers, for tests and benchmarks of what reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.heads.bundle import Bundle, TrainedHead, publish_bundle
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig, build_head
from engine.parts import part_name
from engine.schema import SCHEMA_VERSION, embeddings_schema, rejects_schema
from engine.storage import Store, open_store
from engine.tables import (
    EmbeddingPartFacts,
    claim_table,
    open_table,
    read_embedding_facts,
    read_part,
    write_embedding_part,
)

FINGERPRINT = "f" * 64
IDENTITY = "etag:0:1"


def claim_embeddings(store: Store, width: int, rows_per_part: int) -> None:
    """The record of an embedding table without parts."""
    contract = {"fingerprint": FINGERPRINT, "source.uri": "/made", "source.kind": "webdataset"}
    contract |= {"output.dtype": "float32", "output.rows_per_part": rows_per_part}  # type: ignore[dict-item]
    record: dict[str, Any] = {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "contract": contract | {"limits.keep_reject_bytes": False},
        "fingerprint": FINGERPRINT,
        "source_uri": "/made",
        "width": width,
        "rows_per_part": rows_per_part,
    }
    claim_table(store, record)


def write_part(
    store: Store,
    shard: str,
    number: int,
    last: bool,
    first: int,
    embeddings_ND: NDArray[np.floating[Any]],
    **others: Any,
) -> None:
    """One part of rows `first`, `first` + 1 ... of the shard; their keys are `<shard>-<index:08d>`.

    Args:
        embeddings_ND: float32 or float16.
        others: columns that are to be other than usual, with N values each.
    """
    count, width = embeddings_ND.shape
    flat = pa.array(embeddings_ND.reshape(-1))
    schema = embeddings_schema(width, "float16" if embeddings_ND.dtype == np.float16 else "float32")
    columns = {
        "key": [f"{shard}-{first + row:08d}" for row in range(count)],
        "shard": [shard] * count,
        "index": np.arange(first, first + count),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type),
        "label": pa.nulls(count, pa.string()),
        "image_width": np.full(count, 8, np.int32),
        "image_height": np.full(count, 8, np.int32),
        "sha256": pa.array(
            [hashlib.sha256(f"{shard}-{first + row}".encode()).digest() for row in range(count)],
            pa.binary(32),
        ),
        **others,
    }
    facts = EmbeddingPartFacts(FINGERPRINT, "/made", shard, IDENTITY, None, None, count, 0, None, "")
    name = part_name(shard, IDENTITY, number, last)
    rejects = rejects_schema(keep_bytes=False).empty_table()
    write_embedding_part(store, name, pa.table(columns, schema=schema), rejects, facts)


def write_table(folder: Path, shards: dict[str, NDArray[np.float32]], rows_per_part: int) -> Store:
    """A whole table: of each shard its embeddings (N, D), cut into parts."""
    store = open_store(str(folder))
    width = next(iter(shards.values())).shape[1]
    claim_embeddings(store, width, rows_per_part)
    for shard, embeddings_ND in shards.items():
        starts = range(0, len(embeddings_ND), rows_per_part)
        for number, start in enumerate(starts):
            rows_ND = embeddings_ND[start : start + rows_per_part]
            write_part(store, shard, number, number == len(starts) - 1, start, rows_ND)
    return store


def store_in_half_precision(store: Store) -> None:
    """Rewrite every part of a table with float16 embeddings."""
    for name, info in open_table(store).parts:
        rows = read_part(store, info)
        schema = embeddings_schema(rows.schema.field("embedding").type.list_size, "float16")
        facts = read_embedding_facts(store, name)
        rejects = rejects_schema(keep_bytes=False).empty_table()
        write_embedding_part(store, name, rows.cast(schema), rejects, facts)


def publish_linear(
    folder: Path,
    kernel_DK: NDArray[Any],
    bias_K: NDArray[Any],
    classes: tuple[str, ...],
    table_record: Mapping[str, Any] | None = None,
) -> Bundle:
    """A bundle of a linear head with these numbers; the record is that of the table it was fitted on."""
    width, num_classes = kernel_DK.shape
    network = build_head(LinearHeadConfig(), width, num_classes, seed=0)
    network.set_weights([kernel_DK, bias_K])
    return publish_bundle(
        open_store(str(folder)),
        TrainedHead(LinearHeadConfig(), network, classes, "single_label"),
        table_record=table_record or {"fingerprint": FINGERPRINT, "width": width},
        metrics={},
        recipe={},
    )


def publish_mlp(
    folder: Path, width: int, classes: tuple[str, ...], table_record: Mapping[str, Any] | None = None
) -> Bundle:
    """A bundle of an mlp head with arbitrary numbers, which Keras computes; the record as of `publish_linear`."""
    config, random = MlpHeadConfig(kind="mlp", hidden=(16,)), np.random.default_rng(2)
    network = build_head(config, width, len(classes), seed=0)
    network.set_weights([random.normal(size=weights.shape) for weights in network.get_weights()])
    return publish_bundle(
        open_store(str(folder)),
        TrainedHead(config, network, classes, "single_label"),
        table_record=table_record or {"fingerprint": FINGERPRINT, "width": width},
        metrics={},
        recipe={},
    )
