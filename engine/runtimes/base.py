"""What every runtime does: byte pixels in, embeddings out, for any number of images; not how the network is made.

Shape letters: B images, S side in pixels, D embedding width. Importing this module imports no TensorFlow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class Scaling(Protocol):
    """What a runtime must know about pixel scaling: how to put it into its graph."""

    def apply(self, pixels_BSS3: Any) -> Any:
        """Scaled pixels, as a new tensor of the library that the float32 tensor 0..255 belongs to."""


class Runtime(ABC):
    """A network ready to run: `run` is all there is, and `tests/contracts/test_runtime_contract.py` says what it keeps.

    Every kind gives, on real images, what `keras.Model.predict` gives on the scaled pixels: cosine >= 0.9999.
    """

    def __init__(self, input_size: int, width: int, batch_size: int) -> None:
        self.input_size, self.width, self.batch_size = input_size, width, batch_size

    def run(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Embed any number of images, `batch_size` at a time.

        Args:
            pixels_BSS3: uint8, shape (B, S, S, 3), RGB, unscaled; B may be 0. Left unchanged.

        Returns:
            float32, shape (B, D), a new array; row i belongs to image i.

        Raises:
            TypeError: not an array of uint8 (scaled pixels would be scaled twice).
            ValueError: another shape.
        """
        import numpy as np

        self._check(pixels_BSS3)
        starts = range(0, len(pixels_BSS3), self.batch_size)
        batches = [self._run_batch(pixels_BSS3[start : start + self.batch_size]) for start in starts]
        return np.concatenate([np.empty((0, self.width), np.float32), *batches])

    @abstractmethod
    def _run_batch(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """Embed 1 to `batch_size` checked images."""

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
