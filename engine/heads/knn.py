"""The knn head: the nearest training rows vote. Nothing is trained; the rows themselves are the head.

Shape letters: N remembered rows, B rows, D embedding width, K classes, k neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import LabelError
from engine.heads.base import Head
from engine.heads.kinds import KnnHeadConfig

if TYPE_CHECKING:
    import keras

LEAST_SHARE = 1e-4  # of the votes: what nobody voted for is unlikely, not impossible


class KnnHead(Head):
    """Cosine similarity to every remembered row; the k nearest vote, each with exp(similarity / temperature)."""

    learns_by_gradient = False

    def __init__(self, config: KnnHeadConfig) -> None:
        self.config = config

    @property
    def stated(self) -> KnnHeadConfig:
        """As the recipe has it."""
        return self.config

    def build(self, width: int, num_classes: int, seed: int) -> keras.Model:
        """Not without rows: see `remember`."""
        raise NotImplementedError("a knn head has no weights to begin with")

    def check_room(self, rows: int, width: int) -> None:
        """At most `max_rows`.

        Raises:
            LabelError: with the numbers.
        """
        if rows > self.config.max_rows:
            raise LabelError(
                "head.kind knn: it keeps every training row, and there are too many",
                found=f"{rows:,} rows of {width:,} numbers",
                wanted=f"at most head.max_rows {self.config.max_rows:,}",
                way_out="fit on fewer rows, raise head.max_rows, or take a linear head",
            )

    def remember(
        self,
        embeddings_ND: NDArray[np.floating[Any]],
        targets_N: NDArray[np.integer[Any]],
        num_classes: int,
    ) -> keras.Model:
        """The network of these rows.

        Args:
            targets_N: class numbers; or (N, K), 1 where a row has the class: logits are then for sigmoid.
        """
        import keras

        from engine.heads.knn_layer import Votes

        several = targets_N.ndim == 2
        classes_NK = targets_N if several else np.eye(num_classes)[targets_N]
        unit_ND = embeddings_ND.astype(np.float32)
        unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        embedding = keras.Input((embeddings_ND.shape[1],), name="embedding", dtype="float32")
        unit = keras.layers.UnitNormalization(name="unit", dtype="float32")(embedding)
        similarity = keras.layers.Dense(len(unit_ND), use_bias=False, name="similarity", dtype="float32")
        votes = Votes(
            min(self.config.k, len(unit_ND)),
            self.config.temperature,
            num_classes,
            several,
            name="votes",
            dtype="float32",
        )
        network = keras.Model(embedding, votes(similarity(unit)), name="knn_head")
        similarity.set_weights([unit_ND.T])
        votes.set_weights([classes_NK.astype(np.float32)])
        network.trainable = False
        return network
