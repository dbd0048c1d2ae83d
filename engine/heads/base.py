"""What every kind of head gives. Not for: training it (`engine.training`) or storing it (`engine.heads.bundle`).

Shape letters: B rows, D embedding width, K classes, H numbers of a hidden layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import keras

    from engine.heads.kinds import AnyHeadConfig

Drop = Callable[[Any, int], Any]
"""(numbers (B, H) of a hidden layer, which dropout of the head it is, from 0) -> the same with some left out."""


@dataclass(frozen=True, slots=True)
class AffineMap:
    """A head that is nothing but `embeddings_BD @ kernel_DK + bias_K`, so that scoring needs no Keras."""

    kernel_DK: NDArray[np.float32]
    bias_K: NDArray[np.float32]

    def logits(self, embeddings_BD: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, D) float32 embeddings to (B, K) float32 logits."""
        logits_BK: NDArray[np.float32] = embeddings_BD @ self.kernel_DK + self.bias_K
        return logits_BK


@dataclass(frozen=True, slots=True)
class Dropouts:
    """Which random numbers a head needs for one row of a step.

    Attributes:
        rate: share of numbers that are left out.
        count: how often it leaves some out.
        width: of the widest layer it does so to.
    """

    rate: float = 0.0
    count: int = 0
    width: int = 0


class Head(ABC):
    """One kind of classifier on embeddings: logits inside, probabilities are the predictor's.

    Attributes:
        dropouts: which random numbers it needs for a row of a training step.
        learns_by_gradient: whether it is trained; else it is made of the training rows at once, by `remember`.
    """

    dropouts = Dropouts()
    learns_by_gradient = True

    @property
    @abstractmethod
    def stated(self) -> AnyHeadConfig:
        """The config as a bundle states it."""

    @abstractmethod
    def build(self, width: int, num_classes: int, seed: int) -> keras.Model:
        """A fresh network. Call it inside the strategy's scope, so that every device gets the same variables.

        Args:
            width: D, numbers in one embedding.
            num_classes: K.
            seed: of the initial weights; the same seed gives the same weights on every machine.

        Returns:
            A Keras model from (B, D) float32 to (B, K) float32 logits, without softmax. It answers; what only training
            does is in `training_logits`.
        """

    def remember(
        self,
        embeddings_ND: NDArray[np.floating[Any]],
        targets_N: NDArray[np.integer[Any]],
        num_classes: int,
    ) -> keras.Model:
        """The network made of the training rows, of a kind that is not trained."""
        raise NotImplementedError

    def check_room(self, rows: int, width: int) -> None:  # noqa: B027  (most kinds have room)
        """Refuse more rows than such a head may remember.

        Raises:
            LabelError: with the numbers.
        """

    def as_matrix(self, network: keras.Model) -> AffineMap | None:
        """The trained network as a matrix and a bias, or None where it is more than that, or nobody knows."""
        del network
        return None

    def absorb_scaling(
        self, network: keras.Model, subtract_D: NDArray[np.float64], multiply_D: NDArray[np.float64]
    ) -> keras.Model:
        """From a network trained on (embeddings - subtract) * multiply, which may be changed, one that takes embeddings
        as they are: the network behind a layer that scales."""
        return scaled_before(network, multiply_D, -subtract_D * multiply_D)

    def training_logits(self, network: keras.Model, embeddings_BD: Any, drop: Drop) -> Any:
        """Logits as a training step sees them.

        Dropout is a function of the step and the row, and so comes from outside: Keras' own layer would draw other
        numbers on every device, and the loss trace would depend on how many there are.
        """
        del drop
        return network(embeddings_BD, training=True)


def absorb_into_dense(layer: Any, subtract_D: NDArray[np.float64], multiply_D: NDArray[np.float64]) -> None:
    """For heads that begin with a dense layer: its kernel takes the factors, its bias what is subtracted."""
    kernel_DH, bias_H = (np.asarray(weights, np.float64) for weights in layer.get_weights())
    scaled_DH = multiply_D[:, None] * kernel_DH
    layer.set_weights([scaled_DH.astype(np.float32), (bias_H - subtract_D @ scaled_DH).astype(np.float32)])


SCALED, SCALING = "scaled_head", "scaling"  # names of the network and of its first layer


def scaled_before(
    network: keras.Model, multiply_D: NDArray[np.floating[Any]], add_D: NDArray[np.floating[Any]]
) -> keras.Model:
    """A network that answers for embeddings what the given one answers for embeddings * multiply + add."""
    import keras

    embeddings = keras.Input((len(multiply_D),), name="embedding", dtype="float32")
    scaling = keras.layers.Rescaling(multiply_D.tolist(), add_D.tolist(), name=SCALING, dtype="float32")
    return keras.Model(embeddings, network(scaling(embeddings)), name=SCALED)
