"""Runs a frozen Keras network as one constant-folded TensorFlow graph; the slow `model.predict` is never used.

Casting and pixel scaling are inside the graph, so only bytes go in. The batch axis is open: a remainder does not
trace or compile anything anew. Shape letters: B images, S side in pixels, D embedding width.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, final

import numpy as np
import tensorflow as tf

from engine.runtimes.base import Runtime, Scaling

if TYPE_CHECKING:
    from engine.runtimes.kinds import TensorFlowRuntimeConfig

logger = logging.getLogger(__name__)


@final
class TensorFlowRuntime(Runtime):
    """A network whose variables became constants; BatchNorm is folded as far as TensorFlow's optimiser does it."""

    def __init__(
        self,
        config: TensorFlowRuntimeConfig,
        network: Any,
        scaling: Scaling,
        input_size: int,
        num_threads: int | None,
    ) -> None:
        prepare_process(num_threads)
        super().__init__(input_size, int(network.output_shape[-1]), config.batch_size)
        self._graph = folded_graph(network, scaling, input_size)

    def _run_batch(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        (embeddings_BD,) = self._graph(tf.constant(pixels_BSS3))
        return np.asarray(embeddings_BD)


def folded_graph(network: Any, scaling: Scaling, input_size: int) -> Any:
    """A concrete function, uint8 pixels (None, S, S, 3) -> [float32 embeddings (None, D)], without variables.

    Args:
        network: keras.Model, scaled pixels -> embeddings.
        scaling: put in front of it.
        input_size: S, pixels.
    """
    # The only import path it has; not in the public API as of TensorFlow 2.21.
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    def forward(pixels_BSS3: tf.Tensor) -> tf.Tensor:
        scaled_BSS3 = scaling.apply(tf.cast(pixels_BSS3, tf.float32))
        return tf.cast(network(scaled_BSS3, training=False), tf.float32)

    pixels = tf.TensorSpec((None, input_size, input_size, 3), tf.uint8, name="pixels")
    traced = tf.function(forward, autograph=False).get_concrete_function(pixels)
    return convert_variables_to_constants_v2(traced)


def prepare_process(num_threads: int | None) -> None:
    """TF32 off, GPU memory taken as needed, CPU threads as given. May be called again with the same values.

    TensorFlow fixes threads and memory growth at its first operation. Where that has happened with other values
    they stay as they are, with a warning in the log: results are the same, speed is not as asked.

    Args:
        num_threads: for the work inside operations; None: TensorFlow's choice, all cores.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)  # float32 is float32: TF32 has 10 bits
    try:
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError as error:
        logger.warning(
            "TensorFlow has already started: GPU memory growth stays as it is (%s)",
            error,
        )
    if num_threads is not None:
        _set_threads(num_threads)


def _set_threads(num_threads: int) -> None:
    threading = tf.config.threading
    try:
        threading.set_intra_op_parallelism_threads(num_threads)
        threading.set_inter_op_parallelism_threads(
            1
        )  # one forward pass at a time: its operations come in a row
    except RuntimeError:
        logger.warning(
            "TensorFlow has already started in this process with %s threads (0: all cores): num_threads=%d has no "
            "effect; set it before the first operation, as the Embedder of a fresh process does",
            threading.get_intra_op_parallelism_threads(),
            num_threads,
        )
