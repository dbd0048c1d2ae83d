"""The linear head: one dense layer without activation. Not for: choosing its optimizer or its classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.heads.base import AffineMap, Head, absorb_into_dense
from engine.heads.kinds import LinearHeadConfig

if TYPE_CHECKING:
    import keras


class LinearHead(Head):
    """Multinomial logistic regression: (B, D) to (B, K) logits, (D + 1) * K parameters."""

    def __init__(self, config: LinearHeadConfig) -> None:
        self.config = config

    @property
    def stated(self) -> LinearHeadConfig:
        """As the recipe has it."""
        return self.config

    def build(self, width: int, num_classes: int, seed: int) -> keras.Model:
        """All weights start at zero: the loss is convex, so there is no symmetry to break and `seed` has no say.

        The first batch's loss is then exactly ln(K), and no row prefers a class before it has been seen.
        """
        import keras

        return keras.Sequential(
            [
                keras.Input((width,), name="embedding", dtype="float32"),
                # Names are fixed: automatic ones count up within a process and would differ between workers.
                keras.layers.Dense(num_classes, kernel_initializer="zeros", name="logits", dtype="float32"),
            ],
            name="linear_head",
        )

    def as_matrix(self, network: keras.Model) -> AffineMap:
        """Kernel (D, K) and bias (K,) of the dense layer, copied."""
        kernel_DK, bias_K = network.get_layer("logits").get_weights()
        return AffineMap(np.asarray(kernel_DK, np.float32), np.asarray(bias_K, np.float32))

    def absorb_scaling(
        self, network: keras.Model, subtract_D: NDArray[np.float64], multiply_D: NDArray[np.float64]
    ) -> keras.Model:
        """Into the one dense layer there is."""
        absorb_into_dense(network.get_layer("logits"), subtract_D, multiply_D)
        return network
