"""The layer of the knn head that lets neighbours vote; importing it lets Keras load such heads in safe mode.

Shape letters: N remembered rows, B rows, K classes, k neighbours.
"""

from __future__ import annotations

from typing import Any

import keras

from engine.heads.knn import LEAST_SHARE


@keras.saving.register_keras_serializable(package="engine")
class Votes(keras.layers.Layer):  # type: ignore[misc]
    """Similarities (B, N) to logits (B, K): log shares of the votes, or their log odds where a row has several classes.

    Args:
        k: neighbours that vote, each with exp(similarity / temperature).
        several: whether a row may have several classes.
    """

    def __init__(self, k: int, temperature: float, num_classes: int, several: bool, **common: Any) -> None:
        super().__init__(**common)
        self.k, self.temperature = k, temperature
        self.num_classes, self.several = num_classes, several

    def build(self, input_shape: tuple[int | None, int]) -> None:
        self.classes_NK = self.add_weight(
            shape=(input_shape[1], self.num_classes), initializer="zeros", name="classes", trainable=False
        )

    def call(self, similarities_BN: Any) -> Any:
        nearest_Bk, rows_Bk = keras.ops.top_k(similarities_BN, self.k)
        votes_Bk1 = keras.ops.softmax(nearest_Bk / self.temperature)[:, :, None]
        shares_BK = keras.ops.sum(votes_Bk1 * keras.ops.take(self.classes_NK, rows_Bk, axis=0), axis=1)
        shares_BK = keras.ops.clip(shares_BK, LEAST_SHARE, 1 - LEAST_SHARE)
        logits_BK = keras.ops.log(shares_BK)
        return logits_BK - keras.ops.log1p(-shares_BK) if self.several else logits_BK

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "k": self.k,
            "temperature": self.temperature,
            "num_classes": self.num_classes,
            "several": self.several,
        }
