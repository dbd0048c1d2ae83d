"""Optimizer steps of many heads under a strategy. Not for: which rows go into them, or when to stop.

The step is ours because Keras' `fit` fails under MultiWorkerMirroredStrategy (Keras 3.15, TensorFlow 2.21).
Shape letters: N rows held, S steps of one call, R replicas, B rows of one replica's share, D embedding width, K
classes, H heads, L dropouts of a head, W numbers of its widest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.heads.base import Head
from engine.training.kinds import (
    AnyOptimizerConfig,
    GradientOptimizerConfig,
    LbfgsConfig,
    SgdConfig,
)
from engine.training.rows import is_on_disk

Gradients = Callable[[], tuple[NDArray[np.float64], list[list[NDArray[np.float32]]]]]
Steps = Callable[[int, NDArray[np.int64], NDArray[np.float32]], tf.Tensor]


@dataclass(frozen=True, slots=True)
class Learner:
    """A head that is being trained; its network and optimizer were made in the strategy's scope."""

    head: Head
    network: keras.Model  # (B, D) float32 to (B, K) logits
    config: AnyOptimizerConfig
    optimizer: keras.Optimizer | None  # None: `config` is of L-BFGS

    @property
    def optimizer_of_steps(self) -> keras.Optimizer:
        """Of one that goes by mini-batches."""
        assert self.optimizer is not None
        return self.optimizer

    @property
    def lbfgs(self) -> LbfgsConfig:
        """Of one that does not."""
        assert isinstance(self.config, LbfgsConfig)
        return self.config


def is_bias(variable: Any) -> bool:
    """Whether decay and penalties leave a variable alone."""
    return "bias" in variable.name


def build_optimizer(config: GradientOptimizerConfig, steps_per_epoch: int, epochs: int) -> keras.Optimizer:
    """The recipe's optimizer; call it inside the strategy's scope.

    Args:
        steps_per_epoch, epochs: of the whole training, for the learning rate's schedule.
    """
    rate = _learning_rate(config, steps_per_epoch, epochs)
    decay = config.weight_decay or None
    optimizer: keras.Optimizer
    if isinstance(config, SgdConfig):
        optimizer = keras.optimizers.SGD(rate, config.momentum, config.nesterov, weight_decay=decay)
    else:
        optimizer = keras.optimizers.Adam(rate, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def _learning_rate(
    config: GradientOptimizerConfig, steps_per_epoch: int, epochs: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "constant" and not warmup:
        return config.learning_rate
    falling = max(1, epochs * steps_per_epoch - warmup)
    start, aim = (0.0, config.learning_rate) if warmup else (config.learning_rate, None)
    return keras.optimizers.schedules.CosineDecay(
        start,
        falling,
        alpha=1.0 if config.schedule == "constant" else 0.0,  # of the rate, at the end
        warmup_target=aim,
        warmup_steps=warmup,
    )


def hold_rows(
    strategy: tf.distribute.Strategy,
    embeddings_ND: NDArray[np.floating[Any]],
    targets_N: NDArray[np.integer[Any]],
) -> Any:
    """Put the rows on every device of the strategy, once, for steps to pick from; or leave them on the disk.

    Args:
        embeddings_ND: float32 or float16, held as they are and cast to float32 share by share.
        targets_N: class number of each row, or (N, K) with 1 where it has a class.
    """
    if is_on_disk(embeddings_ND):
        return _OnDisk(embeddings_ND, targets_N)
    return strategy.experimental_distribute_values_from_function(
        lambda context: _on_device(strategy, context, embeddings_ND, targets_N)
    )


@dataclass(frozen=True, slots=True)
class _OnDisk:
    """Rows of which only those that are computed on come into memory."""

    embeddings_ND: NDArray[np.floating[Any]]
    targets_N: NDArray[np.integer[Any]]

    def portion(self, rows: NDArray[np.int64]) -> tuple[tuple[tf.Tensor, tf.Tensor], NDArray[np.int64]]:
        """Some rows as `hold_rows` holds all, and their numbers among them, in the same shape."""
        flat = rows.ravel()
        held = tf.constant(self.embeddings_ND[flat]), tf.constant(self.targets_N[flat])
        return held, np.arange(len(flat)).reshape(rows.shape)


def compile_steps(
    strategy: tf.distribute.Strategy,
    learners: Sequence[Learner],
    held: Any,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Steps:
    """Compile a function of several steps, each of which picks its share of the rows by number, for all heads.

    Args:
        strategy: opened.
        learners: H heads, their optimizers built; each row is gathered once for all of them.
        held: as `hold_rows` gives it.
        label_smoothing: share of a row's weight that all classes have evenly.
        seed: of dropout.

    Returns:
        steps(first, rows_SRB, weights_SHRB) -> losses of the global batches (S, H), not yet waited for. `first` is the
        number of the first step, counted from the beginning of training; with the seed a step's number decides what
        dropout leaves out. `rows_SRB` holds row numbers for each of the R replicas, `weights_SHRB` what each row counts
        for each head (H may be 1: for all);
        padding counts 0. Loss and gradients are sums over all replicas divided by the weight of the whole global batch
        (one without any weight moves nothing), and dropout's numbers belong to rows, so the loss trace does not depend
        on R.
    """
    count = max(learner.head.dropouts.count for learner in learners)
    width = max(learner.head.dropouts.width for learner in learners)

    def replica_step(
        held: tuple[tf.Tensor, tf.Tensor], rows_RB: tf.Tensor, weights_HRB: tf.Tensor, draws_RBLW: tf.Tensor
    ) -> tf.Tensor:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        embeddings_ND, targets_N = held
        embeddings_BD = tf.cast(tf.gather(embeddings_ND, rows_RB[replica]), tf.float32)
        targets_B = tf.gather(targets_N, rows_RB[replica])
        losses = []
        for place, learner in enumerate(learners):
            weights_RB = weights_HRB[place if weights_HRB.shape[0] != 1 else 0]

            def drop(
                numbers_BH: tf.Tensor, which: int, rate: float = learner.head.dropouts.rate
            ) -> tf.Tensor:
                stays_BH = draws_RBLW[replica, :, which, : numbers_BH.shape[1]] >= rate
                return tf.where(stays_BH, numbers_BH / (1 - rate), 0.0)

            variables = learner.network.trainable_variables
            with tf.GradientTape() as tape:
                logits_BK = learner.head.training_logits(learner.network, embeddings_BD, drop)
                losses_B = cross_entropies(logits_BK, targets_B, label_smoothing)
                weighed = tf.reduce_sum(losses_B * weights_RB[replica])
                loss = tf.math.divide_no_nan(weighed, tf.reduce_sum(weights_RB))
            gradients = tape.gradient(loss, variables)
            learner.optimizer_of_steps.apply_gradients(
                zip(gradients, variables, strict=True)
            )  # sums over replicas
            losses.append(loss)
        return tf.stack(losses)

    def global_step(held: Any, number: tf.Tensor, rows_RB: tf.Tensor, weights_HRB: tf.Tensor) -> tf.Tensor:
        draws_RBLW = draws(rows_RB, count, width, seed, number)
        losses_H = strategy.run(replica_step, args=(held, rows_RB, weights_HRB, draws_RBLW))
        return strategy.reduce("SUM", losses_H, axis=None)

    def global_steps(held: Any, first: tf.Tensor, rows_SRB: tf.Tensor, weights_SHRB: tf.Tensor) -> tf.Tensor:
        count_of_steps = tf.shape(rows_SRB)[0]
        losses = tf.TensorArray(tf.float32, count_of_steps, element_shape=(len(learners),))
        for place in tf.range(count_of_steps):
            number = first + tf.cast(place, tf.int64)
            losses = losses.write(place, global_step(held, number, rows_SRB[place], weights_SHRB[place]))
        return losses.stack()

    compiled_steps = tf.function(global_steps, reduce_retracing=True)

    def steps(first: int, rows_SRB: NDArray[np.int64], weights_SHRB: NDArray[np.float32]) -> tf.Tensor:
        if isinstance(held, _OnDisk):
            now, rows_SRB = held.portion(rows_SRB)
        else:
            now = held
        return compiled_steps(
            now, tf.constant(first, tf.int64), tf.constant(rows_SRB), tf.constant(weights_SHRB)
        )

    return steps


def compile_gradients(
    strategy: tf.distribute.Strategy,
    learners: Sequence[Learner],
    held: Any,
    rows_SRB: NDArray[np.int64],
    weights_SHRB: NDArray[np.float32],
    label_smoothing: float = 0.0,
) -> Gradients:
    """Compile a function that goes over rows in S portions and changes nothing.

    Args:
        learners: H heads without dropout.
        rows_SRB, weights_SHRB: as of `compile_steps`.

    Returns:
        gradients() -> weighted sums over all rows, with the weights that the networks have now: losses (H) in nats,
        and for each head the gradient of each of its trainable variables.
    """

    def replica_sums(held: tuple[tf.Tensor, tf.Tensor], rows_SRB: tf.Tensor, weights_SHRB: tf.Tensor) -> Any:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        embeddings_ND, targets_N = held

        def add(place: tf.Tensor, losses_H: tf.Tensor, sums: list[Any]) -> Any:
            rows_B, weights_HB = rows_SRB[place, replica], weights_SHRB[place, :, replica]
            embeddings_BD = tf.cast(tf.gather(embeddings_ND, rows_B), tf.float32)
            targets_B = tf.gather(targets_N, rows_B)
            losses, added = [], []
            for number, (learner, sums_of_head) in enumerate(zip(learners, sums, strict=True)):
                weights_B = weights_HB[number if weights_HB.shape[0] != 1 else 0]
                with tf.GradientTape() as tape:
                    logits_BK = learner.head.training_logits(learner.network, embeddings_BD, _nothing)
                    losses_B = cross_entropies(logits_BK, targets_B, label_smoothing) * weights_B
                    loss = tf.reduce_sum(losses_B)
                gradients = tape.gradient(loss, learner.network.trainable_variables)
                losses.append(tf.reduce_sum(tf.cast(losses_B, tf.float64)))
                added.append([one + other for one, other in zip(sums_of_head, gradients, strict=True)])
            return place + 1, losses_H + tf.stack(losses), added

        nothing = [
            [tf.zeros(variable.shape) for variable in learner.network.trainable_variables]
            for learner in learners
        ]
        _, losses_H, sums = tf.while_loop(
            lambda place, *_: place < tf.shape(rows_SRB)[0],
            add,
            (tf.constant(0), tf.zeros(len(learners), tf.float64), nothing),
            parallel_iterations=1,  # each takes the memory of a portion
        )
        return losses_H, sums

    def global_sums(held: Any, rows_SRB: tf.Tensor, weights_SHRB: tf.Tensor) -> Any:
        found = strategy.run(replica_sums, args=(held, rows_SRB, weights_SHRB))
        return tf.nest.map_structure(lambda value: strategy.reduce("SUM", value, axis=None), found)

    compiled_sums = tf.function(global_sums)
    rows, weights = tf.constant(rows_SRB), tf.constant(weights_SHRB)

    def gradients() -> tuple[NDArray[np.float64], list[list[NDArray[np.float32]]]]:
        if isinstance(held, _OnDisk):
            found = []
            for place in range(len(rows_SRB)):
                now, numbers = held.portion(rows_SRB[place : place + 1])
                found.append(compiled_sums(now, tf.constant(numbers), weights[place : place + 1]))
            losses_H, sums = tf.nest.map_structure(lambda *values: tf.add_n(values), *found)
        else:
            losses_H, sums = compiled_sums(held, rows, weights)
        return losses_H.numpy(), [[one.numpy() for one in of_head] for of_head in sums]

    return gradients


def _nothing(numbers_BH: tf.Tensor, which: int) -> tf.Tensor:
    """The dropout of heads without."""
    del which
    return numbers_BH


def cross_entropies(logits_BK: tf.Tensor, targets_B: tf.Tensor, label_smoothing: float) -> tf.Tensor:
    """(B,) in nats: of the class, and of the even distribution for its share; of several classes the mean."""
    if targets_B.shape.rank == 2:
        wanted_BK = (1 - label_smoothing) * tf.cast(targets_B, tf.float32) + label_smoothing / 2
        return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(wanted_BK, logits_BK), axis=1)
    own_B = tf.nn.sparse_softmax_cross_entropy_with_logits(targets_B, logits_BK)
    if not label_smoothing:
        return own_B
    even_B = -tf.reduce_mean(tf.nn.log_softmax(logits_BK), axis=1)
    return (1 - label_smoothing) * own_B + label_smoothing * even_B


def draws(rows_RB: tf.Tensor, count: int, width: int, seed: int, number: tf.Tensor) -> tf.Tensor:
    """Even numbers in [0, 1), shape (R, B, L, W), the same for a row of the global batch whatever R is.

    On the host: there the n-th number does not depend on how many are drawn, which padding changes.
    """
    shape = tf.shape(rows_RB)
    if not count:
        return tf.zeros((shape[0], shape[1], 0, 0))
    with tf.device("CPU:0"):
        drawn = tf.random.stateless_uniform(
            (shape[0] * shape[1], count * width), tf.stack([tf.constant(seed, tf.int64), number])
        )
    return tf.reshape(drawn, (shape[0], shape[1], count, width))


def _on_device(
    strategy: tf.distribute.Strategy,
    context: tf.distribute.experimental.ValueContext,
    embeddings_ND: NDArray[np.floating[Any]],
    targets_N: NDArray[np.integer[Any]],
) -> tuple[tf.Tensor, tf.Tensor]:
    own = strategy.extended.worker_devices  # of this process; replicas are counted over all processes
    with tf.device(own[context.replica_id_in_sync_group % len(own)]):
        return tf.convert_to_tensor(embeddings_ND), tf.convert_to_tensor(targets_N)
