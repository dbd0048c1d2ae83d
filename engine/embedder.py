"""The body of an inference actor: byte pixels in, embeddings out, and proof that it computes what others do.

Knows no Ray, no Keras, no storage of embeddings and no files of images. Shape letters: B images, S side in pixels, D
embedding width, C canary images.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import CanaryMismatch

if TYPE_CHECKING:
    from engine.runtimes.base import FrozenGraph
    from engine.runtimes.kinds import ResolvedRuntime

# float32 runtimes agree with each other far better (1 - 1e-6); TF32 or another network does not reach it.
MIN_CANARY_COSINE = 0.9999
# Processors and GPUs of different kinds round bfloat16 and float16 at different places.
MIN_REDUCED_COSINE = 0.999
NUM_CANARIES = 4


class Embedder:
    """A frozen graph, loaded, as one actor holds it; what its first run has to prepare, the canary prepares.

    Args:
        graph: the network, as the resolve task froze it.
        runtime: how it is run.
        num_threads: CPU threads for the network; None: all cores. TensorFlow takes it in a fresh process only.
        use_gpu: whether GPUs that this process sees are for it.

    Raises:
        RecipeError: the runtime is not installed on this host.
    """

    def __init__(
        self,
        graph: FrozenGraph,
        runtime: ResolvedRuntime,
        num_threads: int | None = None,
        use_gpu: bool = False,
    ) -> None:
        from engine.runtimes.kinds import open_runtime

        self.input_size, self.width = graph.input_size, graph.width
        self._min_cosine = MIN_CANARY_COSINE if runtime.precision == "float32" else MIN_REDUCED_COSINE
        self._runtime = open_runtime(runtime, graph, num_threads, use_gpu)

    def embed(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Embeddings of any number of images; may be called from several threads at once.

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

    def check(self, canary_CD: np.ndarray) -> None:
        """Make sure that this process computes what the table was resolved with.

        Args:
            canary_CD: float32, shape (C, D), the table's embeddings of the canary images.

        Raises:
            CanaryMismatch: a row whose cosine to the resolved one is below 0.9999 (0.999 in a reduced precision).
        """
        cosines = cosine_per_row(self.canary(), np.asarray(canary_CD))
        if not (cosines >= self._min_cosine).all():
            raise CanaryMismatch(
                f"host {socket.gethostname()} computes other embeddings than the table was resolved with",
                found=f"cosines to the resolved canary: {', '.join(f'{cosine:.6f}' for cosine in cosines)}",
                wanted=f"each at least {self._min_cosine}",
                way_out="compare runtime versions, precision settings, processor and GPU of this host with the others",
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
