"""Run a head's Keras network on rows in memory, on one device. Imported on workers only; not for: training it.

Shape letters: N rows, B rows of one call, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

ROWS_PER_CALL = 8192  # 42 MB of float32 at width 1280
NUMBERS_PER_CALL = 1 << 25  # of the widest layer: 134 MB of float32


def compile_logits(network: keras.Model) -> Callable[[NDArray[np.floating[Any]]], NDArray[np.float32]]:
    """Compile embeddings (N, D), float32 or float16, to logits (N, K) float32; any N >= 0.

    Weights that the network is given later are used from then on.
    """

    def block(embeddings_BD: tf.Tensor) -> tf.Tensor:
        return network(tf.cast(embeddings_BD, tf.float32), training=False)

    compiled_block = tf.function(block, reduce_retracing=True)
    rows_per_call = max(1, min(ROWS_PER_CALL, NUMBERS_PER_CALL // _widest(network)))

    def logits(embeddings_ND: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        starts = range(0, max(1, len(embeddings_ND)), rows_per_call)
        return np.concatenate(
            [
                compiled_block(tf.constant(embeddings_ND[start : start + rows_per_call])).numpy()
                for start in starts
            ]
        )

    return logits


def _widest(network: keras.Model) -> int:
    """Numbers that a row becomes in the widest dense layer; a knn head has one as wide as it has rows."""
    inner = (
        layer._flatten_layers() if isinstance(layer, keras.Model) else [layer] for layer in network.layers
    )
    return max((getattr(layer, "units", 1) for layers in inner for layer in layers), default=1)
