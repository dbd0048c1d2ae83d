"""One optimizer step under a strategy. Not for: which rows go into it, or when to stop.

The step is ours because Keras' `fit` fails under MultiWorkerMirroredStrategy (Keras 3.15, TensorFlow 2.21).
Shape letters: N rows held, R replicas, B rows of one replica's share, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.training.kinds import OptimizerConfig

Step = Callable[[NDArray[np.int64], NDArray[np.float32]], tf.Tensor]


def build_optimizer(config: OptimizerConfig) -> keras.Optimizer:
    """The recipe's optimizer; call it inside the strategy's scope."""
    optimizer = keras.optimizers.Adam(config.learning_rate, weight_decay=config.weight_decay or None)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def compile_step(
    strategy: tf.distribute.Strategy,
    network: keras.Model,
    optimizer: keras.Optimizer,
    embeddings_ND: NDArray[np.floating[Any]],
    classes_N: NDArray[np.int64],
) -> Step:
    """Put the rows on every device once, and compile the step that picks its share of them by number.

    Args:
        strategy: opened; network and optimizer were made in its scope.
        network: (B, D) float32 to (B, K) logits.
        optimizer: applied to the network's trainable variables.
        embeddings_ND: float32 or float16, held as they are and cast to float32 share by share.
        classes_N: class number of each row.

    Returns:
        step(rows_RB, weights_RB) -> the global batch's loss, a scalar not yet waited for. `rows_RB` holds row
        numbers for each of the R replicas, `weights_RB` what each row counts; padding counts 0. Loss and
        gradients are sums over all replicas divided by the weight of the whole global batch, so the loss trace
        does not depend on R.
    """
    with strategy.scope():
        optimizer.build(network.trainable_variables)
    held = strategy.experimental_distribute_values_from_function(
        lambda context: _on_device(strategy, context, embeddings_ND, classes_N)
    )

    def replica_step(
        held: tuple[tf.Tensor, tf.Tensor], rows_RB: tf.Tensor, weights_RB: tf.Tensor
    ) -> tf.Tensor:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        embeddings_ND, classes_N = held
        embeddings_BD = tf.cast(tf.gather(embeddings_ND, rows_RB[replica]), tf.float32)
        classes_B = tf.gather(classes_N, rows_RB[replica])
        with tf.GradientTape() as tape:
            logits_BK = network(embeddings_BD, training=True)
            losses_B = tf.nn.sparse_softmax_cross_entropy_with_logits(classes_B, logits_BK)
            loss = tf.reduce_sum(losses_B * weights_RB[replica]) / tf.reduce_sum(weights_RB)
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, network.trainable_variables, strict=True)
        )  # sums over replicas
        return loss

    def global_step(held: Any, rows_RB: tf.Tensor, weights_RB: tf.Tensor) -> tf.Tensor:
        losses = strategy.run(replica_step, args=(held, rows_RB, weights_RB))
        return strategy.reduce("SUM", losses, axis=None)

    compiled_step = tf.function(global_step, reduce_retracing=True)

    def step(rows_RB: NDArray[np.int64], weights_RB: NDArray[np.float32]) -> tf.Tensor:
        return compiled_step(held, tf.constant(rows_RB), tf.constant(weights_RB))

    return step


def _on_device(
    strategy: tf.distribute.Strategy,
    context: tf.distribute.experimental.ValueContext,
    embeddings_ND: NDArray[np.floating[Any]],
    classes_N: NDArray[np.int64],
) -> tuple[tf.Tensor, tf.Tensor]:
    with tf.device(strategy.extended.worker_devices[context.replica_id_in_sync_group]):
        return tf.convert_to_tensor(embeddings_ND), tf.convert_to_tensor(classes_N)
