"""Epochs over embeddings held in memory, with early stopping; read it top to bottom. Not for: what a step computes.

Shape letters: N rows held, R replicas, B rows of one replica's share, S steps of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.heads.network import compile_logits
from engine.training import metrics
from engine.training.kinds import OptimizerConfig, TrainingConfig
from engine.training.step import build_optimizer, compile_step

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows in memory and which of them are for what. Row numbers count from 0 within the arrays."""

    embeddings_ND: NDArray[np.floating[Any]]  # float32 or float16
    classes_N: NDArray[np.int64]
    train: NDArray[np.int64]  # row numbers, at least one
    validation: NDArray[np.int64]  # row numbers, perhaps none


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to. Losses are mean cross-entropies in nats."""

    epoch: int  # counts from 1
    train_loss: float  # weighted mean over the epoch's steps, each before its update
    validation_loss: float | None  # after the epoch; None without validation rows
    validation_accuracy: float | None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The trace of a training run; the network itself holds the weights of `best_epoch`."""

    history: tuple[Epoch, ...]
    best_epoch: int
    stopped: str  # a sentence on why training ended


def train_network(
    network: keras.Model,
    strategy: tf.distribute.Strategy,
    rows: TrainingRows,
    optimizer: OptimizerConfig,
    config: TrainingConfig,
    report: Report,
) -> TrainingResult:
    """Train in place until the validation loss has not fallen for `patience` epochs, and keep the best weights.

    Without validation rows nothing can say when to stop: all epochs are run and the last weights are kept.

    Args:
        network: made in the strategy's scope; (B, D) to logits. Its weights are changed.
        strategy: opened.
        rows: embeddings, classes, and which rows are for what.
        optimizer: how weights follow gradients.
        config: epochs, batch size, patience, class weights, seed.
        report: called once per epoch with a flat dict of numbers.

    Raises:
        EngineError: the loss became infinite or NaN.
    """
    with strategy.scope():
        step = compile_step(strategy, network, build_optimizer(optimizer), rows.embeddings_ND, rows.classes_N)
    logits = compile_logits(network)
    weights_N = row_weights(rows.classes_N, rows.train, config.class_weights)
    watched_VD, watched_classes_V = rows.embeddings_ND[rows.validation], rows.classes_N[rows.validation]
    history: list[Epoch] = []
    best_epoch, best_loss, best_weights = 0, math.inf, network.get_weights()

    for epoch in range(1, config.epochs + 1):
        order = np.random.default_rng([config.seed, epoch]).permutation(rows.train)
        batches = list(global_batches(order, weights_N, config.batch_size, strategy.num_replicas_in_sync))
        losses_S = np.array(
            [float(loss) for loss in [step(*batch) for batch in batches]]
        )  # waits only at the end
        train_loss = float(
            np.average(losses_S, weights=[batch_weights.sum() for _, batch_weights in batches])
        )
        if not math.isfinite(train_loss):
            raise _diverged(epoch, train_loss, optimizer)

        watched_loss, watched_accuracy = None, None
        if len(watched_classes_V):
            watched = logits(watched_VD)
            watched_loss = metrics.cross_entropy(watched, watched_classes_V)
            watched_accuracy = metrics.accuracy(watched, watched_classes_V)
        history.append(Epoch(epoch, train_loss, watched_loss, watched_accuracy))
        report({**asdict(history[-1]), "epochs": config.epochs})

        if watched_loss is None or watched_loss < best_loss:
            best_epoch, best_loss = epoch, math.inf if watched_loss is None else watched_loss
            best_weights = network.get_weights()
        if epoch - best_epoch >= config.patience:
            break

    with strategy.scope():
        network.set_weights(best_weights)
    return TrainingResult(tuple(history), best_epoch, _why_stopped(history[-1], best_epoch, config))


def global_batches(
    order: NDArray[np.int64], weights_N: NDArray[np.float32], batch_size: int, num_replicas: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Cut an epoch's rows into global batches and deal each to the replicas.

    Args:
        order: row numbers in this epoch's order.
        weights_N: what each row held counts.
        batch_size: rows per global batch, over all replicas.
        num_replicas: R.

    Yields:
        rows_RB and weights_RB of one step, the same shape every time: what is missing to fill the last batch,
        or to divide a batch evenly, is the batch's own first row with weight 0.
    """
    batch_size = min(batch_size, len(order))
    share = math.ceil(batch_size / num_replicas)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows_RB = np.full((num_replicas, share), batch[0], np.int64)
        weights_RB = np.zeros((num_replicas, share), np.float32)
        rows_RB.flat[: len(batch)] = batch
        weights_RB.flat[: len(batch)] = weights_N[batch]
        yield rows_RB, weights_RB


def row_weights(
    classes_N: NDArray[np.int64], train: NDArray[np.int64], class_weights: str
) -> NDArray[np.float32]:
    """What each row counts in the loss: 1, or under "balanced" rows / (classes * rows of its class).

    Counted over the training rows, each of whose classes has at least one.
    """
    if class_weights == "none":
        return np.ones(len(classes_N), np.float32)
    rows_K = np.bincount(classes_N[train])
    weight_K = len(train) / (np.count_nonzero(rows_K) * np.maximum(rows_K, 1))
    weights_N = np.ones(len(classes_N), np.float32)
    weights_N[train] = weight_K[classes_N[train]]
    return weights_N


def _diverged(epoch: int, loss: float, optimizer: OptimizerConfig) -> EngineError:
    return EngineError(
        f"training: the loss is {loss} in epoch {epoch}",
        found=f"optimizer.learning_rate {optimizer.learning_rate}",
        way_out="lower optimizer.learning_rate; if that does not help, look for extreme numbers in the embeddings",
    )


def _why_stopped(last: Epoch, best_epoch: int, config: TrainingConfig) -> str:
    if last.validation_loss is None:
        return f"no validation rows: all {last.epoch} epochs were run and the last weights kept"
    if last.epoch - best_epoch >= config.patience:
        return f"the validation loss did not fall for {config.patience} epochs; weights of epoch {best_epoch} kept"
    return f"all {last.epoch} epochs were run; weights of epoch {best_epoch}, the best, kept"
