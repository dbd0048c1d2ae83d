"""What every runtime takes and does: a frozen graph, then byte pixels in and embeddings out, for any number of images.

Shape letters: B images, S side in pixels, D embedding width. Importing this module imports no TensorFlow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class Scaling(Protocol):
    """What a runtime must know about pixel scaling: how to put it into its graph."""

    def apply(self, pixels_BSS3: Any) -> Any:
        """Scaled pixels, as a new tensor of the library that the float32 tensor 0..255 belongs to."""


PIXELS, EMBEDDINGS = "pixels", "embeddings"  # names of a frozen graph's one input and one output


@dataclass(frozen=True)
class FrozenGraph:
    """A network as data: every runtime runs it, and no Keras, weights file or Python of the network is needed for that.

    Attributes:
        graph_def: a serialised TensorFlow GraphDef without variables: `pixels` uint8 (None, S, S, 3) -> `embeddings`
            float32 (None, D); pixel scaling is inside, BatchNorm has become part of the convolutions.
        input_size: S, pixels.
        width: D.
    """

    graph_def: bytes
    input_size: int
    width: int


class Runtime(ABC):
    """A network ready to run: `run` is all there is, and `tests/contracts/test_runtime_contract.py` says what it keeps.

    Every kind gives, on real images, what `keras.Model.predict` gives on the scaled pixels: cosine >= 0.9999 in
    float32; what a reduced precision must keep is measured by `engine.runtime_choice`. `run` may be called
    from several threads at once.

    Args:
        graph: what is run.
        batch_size: images in one call of the network.
    """

    def __init__(self, graph: FrozenGraph, batch_size: int) -> None:
        self.input_size, self.width, self.batch_size = graph.input_size, graph.width, batch_size

    def run(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Embed any number of images, `batch_size` at a time.

        Args:
            pixels_BSS3: uint8, shape (B, S, S, 3), RGB, unscaled; B may be 0. Left unchanged.

        Returns:
            float32, shape (B, D), a new array; row i belongs to image i.

        Raises:
            TypeError: not an array of uint8 (scaled pixels would be scaled twice).
            ValueError: another shape.
            RuntimeError: the library cannot compute this network on this machine.
        """
        import numpy as np

        self._check(pixels_BSS3)
        embeddings_BD = np.empty((len(pixels_BSS3), self.width), np.float32)
        self._run_into(embeddings_BD, pixels_BSS3)
        return embeddings_BD

    @abstractmethod
    def _run_into(self, embeddings_BD: np.ndarray, pixels_BSS3: np.ndarray) -> None:
        """Embed checked images, none or many, each into its row."""

    def _batch(self, pixels_BSS3: np.ndarray, start: int) -> np.ndarray:
        """`batch_size` images from `start` on: a remainder is filled up with nothing, where a network is compiled for
        one size."""
        import numpy as np

        batch = pixels_BSS3[start : start + self.batch_size]
        missing = self.batch_size - len(batch)
        if not missing:
            return batch
        return np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])

    def _check(self, pixels_BSS3: np.ndarray) -> None:
        wanted = f"(B, {self.input_size}, {self.input_size}, 3)"
        dtype, shape = (
            getattr(pixels_BSS3, "dtype", None),
            getattr(pixels_BSS3, "shape", ()),
        )
        if dtype != "uint8":
            raise TypeError(
                f"pixels are {dtype or type(pixels_BSS3).__name__}, wanted a uint8 array of shape {wanted}"
            )
        if len(shape) != 4 or tuple(shape[1:]) != (self.input_size, self.input_size, 3):
            raise ValueError(f"pixels have shape {tuple(shape)}, wanted {wanted}")
