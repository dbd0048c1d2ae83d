"""The mlp head: dense layers, dropout while training, then one matrix. Not for: choosing its optimizer or classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.base import Drop, Dropouts, Head, absorb_into_dense
from engine.heads.kinds import MlpHeadConfig

if TYPE_CHECKING:
    import keras


class MlpHead(Head):
    """(B, D) through each of `hidden` to (B, K) logits."""

    def __init__(self, config: MlpHeadConfig) -> None:
        self.config = config
        if config.dropout:
            self.dropouts = Dropouts(config.dropout, len(config.hidden), max(config.hidden))

    @property
    def stated(self) -> MlpHeadConfig:
        """As the recipe has it."""
        return self.config

    def build(self, width: int, num_classes: int, seed: int) -> keras.Model:
        """Hidden layers start as Glorot and Bengio (2010) have it, the last one at zero: the first batch's loss is then
        ln(K), as the linear head's."""
        import keras

        layers: list[Any] = [keras.Input((width,), name="embedding", dtype="float32")]
        for place, hidden in enumerate(self.config.hidden):
            start = keras.initializers.GlorotUniform(seed=seed + place)
            layers.append(
                keras.layers.Dense(
                    hidden,
                    self.config.activation,
                    kernel_initializer=start,
                    name=_hidden(place),
                    dtype="float32",
                )
            )
        layers.append(
            keras.layers.Dense(num_classes, kernel_initializer="zeros", name="logits", dtype="float32")
        )
        return keras.Sequential(layers, name="mlp_head")

    def absorb_scaling(
        self, network: keras.Model, subtract_D: NDArray[np.float64], multiply_D: NDArray[np.float64]
    ) -> keras.Model:
        """Into the first dense layer."""
        absorb_into_dense(network.get_layer(_hidden(0)), subtract_D, multiply_D)
        return network

    def training_logits(self, network: keras.Model, embeddings_BD: Any, drop: Drop) -> Any:
        """Each hidden layer, with some of its numbers left out, then the last one."""
        numbers_BH = embeddings_BD
        for place in range(len(self.config.hidden)):
            numbers_BH = network.get_layer(_hidden(place))(numbers_BH)
            if self.config.dropout:
                numbers_BH = drop(numbers_BH, place)
        return network.get_layer("logits")(numbers_BH)


def _hidden(place: int) -> str:
    return f"hidden_{place}"
