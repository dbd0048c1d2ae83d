"""Images as vectors of a table: decoded and embedded by the very network that its record names, in this process.

For a person who asks a table about a few images. Not for: archives (`engine.extraction`).
Shape letters: B images, S side in pixels, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from engine.backbones.kinds import BackboneConfig
from engine.embedder import Embedder
from engine.errors import CanaryMismatch, RecipeError, TableDamaged
from engine.images import ImageRejected, decode_image
from engine.recipes import Limits
from engine.resolve import Network, resolve
from engine.runtimes.kinds import RuntimeConfig
from engine.tables import Table


def embed_as_table(
    table: Table, images: Mapping[str, bytes], num_threads: int | None = None
) -> NDArray[np.float32]:
    """Embeddings of images as a part of the table would hold them.

    The network comes from the node's cache where a run here has put it there; before it is used it must compute the
    table's canary, as every actor of a run must.

    Args:
        table: of embeddings; its store's config says how weights are reached.
        images: encoded bytes of at least one, by a name for messages.
        num_threads: CPU threads; None: as many as there are cores. What an actor had is part of the cache's key.

    Returns:
        float32, shape (B, D), in the order of the images.

    Raises:
        RecipeError: an image cannot be decoded or embedded, or the table's runtime is not installed here.
        TableDamaged: the table's record names no network that this engine knows.
        WeightsError, BackboneError, StorageError: the network cannot be loaded.
        CanaryMismatch: its weights are not those of the table, or this machine computes other numbers.
    """
    record = table.record
    backbone, runtime = _network_of(table)
    contract = record["contract"]
    max_pixels = int(contract.get("limits.max_pixels", Limits().max_pixels))
    pixels_BSS3 = np.stack([_pixels(name, encoded, backbone, max_pixels) for name, encoded in images.items()])
    found = resolve(Network(backbone, runtime, table.store.config, num_threads), None, record)
    if found.fingerprint != record["fingerprint"]:
        raise CanaryMismatch(
            f"{table.store.uri}: the network that its record names is another one here",
            found=f"fingerprint {found.fingerprint[:16]}",
            wanted=record["fingerprint"][:16],
        )
    embedder = Embedder(found.graph, found.runtime, num_threads)
    embedder.check(np.asarray(found.canary, np.float32))
    dtype = contract.get("output.dtype", "float32")
    with np.errstate(over="ignore"):  # of float16: infinity is found below
        embeddings_BD = embedder.embed(pixels_BSS3).astype(dtype).astype(np.float32)
    for name, row_D in zip(images, embeddings_BD, strict=True):
        if not np.isfinite(row_D).all() or not row_D.any():
            raise RecipeError(
                f"{name}: the network answers all zeros, NaN or infinity",
                wanted="an image that it has an embedding of",
            )
    return embeddings_BD


def _network_of(table: Table) -> tuple[BackboneConfig, RuntimeConfig]:
    try:
        return (
            TypeAdapter(BackboneConfig).validate_python(table.record["backbone"]),
            TypeAdapter(RuntimeConfig).validate_python(table.record["runtime"]),
        )
    except (KeyError, ValidationError) as error:
        raise TableDamaged(
            f"{table.store.uri}: its record names no network that this engine knows",
            found=" ".join(str(error).split())[:300],
            way_out="ask by the key of a row, or extract the table with this engine",
        ) from None


def _pixels(name: str, encoded: bytes, backbone: BackboneConfig, max_pixels: int) -> NDArray[np.uint8]:
    try:
        return decode_image(encoded, backbone.input_size, backbone.resize, max_pixels).pixels_SS3
    except ImageRejected as rejected:
        raise RecipeError(
            f"{name}: cannot be decoded",
            found=str(rejected),
            wanted="a whole JPEG, PNG, WebP, GIF, BMP or TIFF",
        ) from None
