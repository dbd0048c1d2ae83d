"""Run a head's Keras network on rows in memory, on one device. Imported on workers only; not for: training it.

Shape letters: N rows, B rows of one call, D embedding width, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

log = logging.getLogger(__name__)
ROWS_PER_CALL = 8192  # 42 MB of float32 at width 1280
NUMBERS_PER_CALL = 1 << 25  # of the widest layer: 134 MB of float32
CPU = "CPU:0"


class Logits(Protocol):
    """What `compile_logits` makes."""

    def __call__(
        self, embeddings_ND: NDArray[np.floating[Any]], rows: NDArray[np.int64] | None = None, /
    ) -> NDArray[np.float32]:
        """Embeddings (N, D), float32 or float16, to logits (N, K) float32; any N >= 0.

        Of some rows only, where they are given: no more of them are gathered at a time than are computed on.
        """


def compile_logits(network: keras.Model) -> Logits:
    """Compile a network; weights that it is given later are used from then on."""

    def block(embeddings_BD: tf.Tensor) -> tf.Tensor:
        return network(tf.cast(embeddings_BD, tf.float32), training=False)

    compiled_block = tf.function(block, reduce_retracing=True)
    rows_per_call = max(1, min(ROWS_PER_CALL, NUMBERS_PER_CALL // _widest(network)))

    def logits(
        embeddings_ND: NDArray[np.floating[Any]], rows: NDArray[np.int64] | None = None, /
    ) -> NDArray[np.float32]:
        count = len(embeddings_ND) if rows is None else len(rows)
        portions = [slice(start, start + rows_per_call) for start in range(0, max(1, count), rows_per_call)]
        return np.concatenate(
            [
                compiled_block(tf.constant(embeddings_ND[portion if rows is None else rows[portion]])).numpy()
                for portion in portions
            ]
        )

    return logits


def logits_on_cpu(load: Callable[[], keras.Model]) -> Logits:
    """Load a network for answering, and compile it. It is on the CPU whatever else this process computes on, so that an
    actor with a GPU answers as a scorer without one does."""
    leave_gpus_alone()
    with tf.device(CPU):
        anywhere = compile_logits(load())

    def logits(
        embeddings_ND: NDArray[np.floating[Any]], rows: NDArray[np.int64] | None = None, /
    ) -> NDArray[np.float32]:
        with tf.device(CPU):
            return anywhere(embeddings_ND, rows)

    return logits


def leave_gpus_alone() -> None:
    """Take no GPU's memory for what only answers: TensorFlow would take all of each that the process sees, and Ray
    hides none from an actor that has asked for none. Where TensorFlow computes already, its devices stay."""
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # how it says so
        log.debug("TensorFlow has started in this process: its devices stay as they are")


def _widest(network: keras.Model) -> int:
    """Numbers that a row becomes in the widest dense layer; a knn head has one as wide as it has rows."""
    inner = (
        layer._flatten_layers() if isinstance(layer, keras.Model) else [layer] for layer in network.layers
    )
    return max((_numbers(layer) for layers in inner for layer in layers), default=1)


def _numbers(layer: keras.Layer) -> int:
    """Of a dense layer its units; of votes, k neighbours with their classes."""
    return max(getattr(layer, "units", 1), getattr(layer, "k", 1) * getattr(layer, "num_classes", 1))
