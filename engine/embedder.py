"""The body of an inference actor: byte pixels in, embeddings out, and proof that it computes what others do.

Knows no Ray, no storage of embeddings and no files of images. Shape letters: B images, S side in pixels, D
embedding width, C canary images.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import CanaryMismatch

if TYPE_CHECKING:
    from engine.backbones.kinds import BackboneConfig
    from engine.runtimes.kinds import RuntimeConfig
    from engine.storage import StorageConfig

# float32 runtimes agree with each other far better (1 - 1e-6); TF32 or another network does not reach it.
MIN_CANARY_COSINE = 0.9999
NUM_CANARIES = 4


class Embedder:
    """A backbone, loaded and warmed up, as one actor holds it.

    Args:
        backbone: which network, weights, cut, pooling, input size.
        runtime: how it is run.
        storage: how to reach the store where the weights are given by URI.
        num_threads: CPU threads for the network; None: all cores. Takes effect in a fresh process only.

    Raises:
        RecipeError, WeightsError, BackboneError: as `engine.backbones.kinds.build_backbone`.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        runtime: RuntimeConfig,
        storage: StorageConfig,
        num_threads: int | None = None,
    ) -> None:
        from engine.backbones.fingerprint import (
            fingerprint,
            fingerprint_fields,
            tensor_digest,
        )
        from engine.backbones.kinds import build_backbone
        from engine.images import DECODE_VERSION
        from engine.runtimes.kinds import open_runtime, prepare_runtime

        prepare_runtime(runtime, num_threads)
        built = build_backbone(backbone, storage)
        self.input_size, self.width = built.input_size, built.width
        self.tensor_digest = tensor_digest(built.network)
        self.fingerprint_fields: dict[str, Any] = fingerprint_fields(
            built,
            DECODE_VERSION,
            backbone.resize,
            runtime.precision,
            self.tensor_digest,
        )
        self.fingerprint = fingerprint(self.fingerprint_fields)
        self._runtime = open_runtime(runtime, built.network, built.scaling, built.input_size, num_threads)
        self._runtime.run(
            np.zeros((runtime.batch_size, self.input_size, self.input_size, 3), np.uint8)
        )  # warm up

    def embed(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Embeddings of any number of images.

        Args:
            pixels_BSS3: uint8, shape (B, S, S, 3), RGB, as `engine.images.decode_image` gives them.

        Returns:
            float32, shape (B, D).

        Raises:
            TypeError, ValueError: pixels of another dtype or shape.
        """
        return self._runtime.run(pixels_BSS3)

    def canary(self) -> np.ndarray:
        """Embeddings of the canary images, computed now: float32, shape (C, D)."""
        return self.embed(canary_pixels(self.input_size))

    def check(self, fingerprint_fields: Mapping[str, Any], canary_CD: np.ndarray) -> None:
        """Make sure that this process computes what the table was resolved with.

        Args:
            fingerprint_fields: of the resolved network, as `self.fingerprint_fields`.
            canary_CD: float32, shape (C, D), its embeddings of the canary images.

        Raises:
            CanaryMismatch: other fields, or a canary row whose cosine to the resolved one is below 0.9999.
        """
        host = socket.gethostname()
        here = self.fingerprint_fields
        other = [name for name in here if fingerprint_fields.get(name) != here[name]]
        if other:
            raise CanaryMismatch(
                f"host {host} has loaded another backbone than the table was resolved with",
                found=", ".join(f"{name} {here[name]}" for name in other),
                wanted=", ".join(f"{name} {fingerprint_fields.get(name)}" for name in other),
                way_out="the same weights must be reachable from every node: look into the caches "
                "(~/.keras/models, ENGINE_CACHE_DIR) of this one; if the weights were replaced on purpose, "
                "start a new table",
            )
        cosines = cosine_per_row(self.canary(), np.asarray(canary_CD))
        if not (cosines >= MIN_CANARY_COSINE).all():
            raise CanaryMismatch(
                f"host {host} computes other embeddings from the same weights (tensor digest {self.tensor_digest})",
                found=f"cosines to the resolved canary: {', '.join(f'{cosine:.6f}' for cosine in cosines)}",
                wanted=f"each at least {MIN_CANARY_COSINE}",
                way_out="compare TensorFlow, precision settings, processor and GPU of this host with the others",
            )


def canary_pixels(side_px: int) -> np.ndarray:
    """The canary images: uint8, shape (C, S, S, 3); flat grey, gradients, a checkerboard, a pseudo-texture.

    Integer arithmetic only, so that they are the same on every machine and with every version of every library.
    """
    row, column, channel = np.ogrid[:side_px, :side_px, :3]
    flat = 128 + 0 * (row + column + channel)
    gradients = (row * (3 - channel) + column * (1 + channel)) * 255 // (4 * max(side_px - 1, 1))
    checkerboard = (row // 8 + column // 8 + channel) % 2 * 255
    texture = (row * row * 7 + column * 13 + row * column * 31 + channel * 101) % 257 % 256
    return np.stack(np.broadcast_arrays(flat, gradients, checkerboard, texture)).astype(np.uint8)


def cosine_per_row(left_CD: np.ndarray, right_CD: np.ndarray) -> np.ndarray:
    """float64, shape (C,). Two zero rows are equal (1.0); a zero row and another are not (0.0); not finite gives NaN.

    Raises:
        CanaryMismatch: the shapes differ.
    """
    if left_CD.shape != right_CD.shape:
        raise CanaryMismatch(
            f"host {socket.gethostname()}: canaries of different shape",
            found=f"{left_CD.shape}",
            wanted=f"{right_CD.shape}",
            way_out="the table was resolved by another version of the engine or with another network",
        )
    left, right = left_CD.astype(np.float64), right_CD.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = ~left.any(axis=1) & ~right.any(axis=1)
    with np.errstate(invalid="ignore"):  # infinities give NaN, which is no agreement
        cosines = (left * right).sum(axis=1) / np.where(norms == 0.0, 1.0, norms)
    return np.where(both_zero, 1.0, cosines)
