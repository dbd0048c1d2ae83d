"""What every kind of head gives. Not for: training it (`engine.training`) or storing it (`engine.heads.bundle`).

Shape letters: B rows, D embedding width, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True, slots=True)
class AffineMap:
    """A head that is nothing but `embeddings_BD @ kernel_DK + bias_K`, so that scoring needs no Keras."""

    kernel_DK: NDArray[np.float32]
    bias_K: NDArray[np.float32]

    def logits(self, embeddings_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, D) float32 embeddings to (B, K) float32 logits."""
        logits_BK: NDArray[np.float32] = embeddings_BD @ self.kernel_DK + self.bias_K
        return logits_BK


class Head(ABC):
    """One kind of classifier on embeddings: logits inside, probabilities are the predictor's."""

    @abstractmethod
    def build(self, width: int, num_classes: int, seed: int) -> keras.Model:
        """A fresh network. Call it inside the strategy's scope, so that every device gets the same variables.

        Args:
            width: D, numbers in one embedding.
            num_classes: K.
            seed: of the initial weights; the same seed gives the same weights on every machine.

        Returns:
            A Keras model from (B, D) float32 to (B, K) float32 logits, without softmax.
        """

    @abstractmethod
    def as_matrix(self, network: keras.Model) -> AffineMap | None:
        """The trained network as a matrix and a bias, or None where it is more than that."""
