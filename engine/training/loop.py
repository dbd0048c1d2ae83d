"""Epochs over embeddings held in memory, with early stopping; read it top to bottom. Not for: what a step computes.

Shape letters: N rows held, R replicas, B rows of one replica's share, S steps of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.heads.kinds import open_head
from engine.heads.network import compile_logits
from engine.training import metrics
from engine.training.grid import Candidate
from engine.training.kinds import AnyOptimizerConfig, TrainingConfig
from engine.training.step import Learner, build_optimizer, compile_steps, hold_rows

Report = Callable[[dict[str, Any]], None]
Batch = tuple[
    NDArray[np.int64], NDArray[np.float32]
]  # rows_RB and weights_RB, as `global_batches` gives them
STEPS_PER_CALL = 16  # of the compiled function: entering it takes as long as a small head's step


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows in memory and which of them are for what. Row numbers count from 0 within the arrays."""

    embeddings_ND: NDArray[np.floating[Any]]  # float32 or float16
    classes_N: NDArray[np.int64]
    train: NDArray[np.int64]  # row numbers, at least one
    validation: NDArray[np.int64]  # row numbers, perhaps none

    @property
    def num_classes(self) -> int:
        """K: each class has a row."""
        return int(self.classes_N.max()) + 1


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


@dataclass(frozen=True, slots=True)
class Trained:
    """One of the heads that were trained together, at the weights of its best epoch."""

    network: keras.Model
    result: TrainingResult


def train_heads(
    candidates: Sequence[Candidate],
    strategy: tf.distribute.Strategy,
    rows: TrainingRows,
    config: TrainingConfig,
    report: Report,
    held: Any = None,
) -> list[Trained]:
    """Train heads at once, each until its validation loss has not fallen for `patience` epochs; keep the best weights.

    All see the same batches, and end when the last of them does. Without validation rows nothing can say when to stop:
    all epochs are run and the last weights are kept.

    Args:
        candidates: heads, and how each is trained.
        strategy: opened.
        rows: embeddings, classes, and which rows are for what.
        config: epochs, batch size, patience, class weights, label smoothing, seed.
        report: called once per epoch with a flat dict of numbers: of the head with the lowest validation loss so far.
        held: the rows, where `hold_rows` has already put them on the devices.

    Raises:
        EngineError: a loss became infinite or NaN, and there is no other head.
    """
    num_replicas = strategy.num_replicas_in_sync
    steps_per_epoch = math.ceil(len(rows.train) / min(config.batch_size, len(rows.train)))
    with strategy.scope():
        learners = [_learner(candidate, rows, steps_per_epoch, config) for candidate in candidates]
        held = hold_rows(strategy, rows.embeddings_ND, rows.classes_N) if held is None else held
    watched_VD, watched_classes_V = rows.embeddings_ND[rows.validation], rows.classes_N[rows.validation]
    weights_N = row_weights(rows.classes_N, rows.train, config.class_weights)
    courses = [
        _Course(candidate, learner, config) for candidate, learner in zip(candidates, learners, strict=True)
    ]
    stepped: list[_Course] = []

    for epoch in range(1, config.epochs + 1):
        going = [course for course in courses if not course.is_over]
        # Heads that have stopped still cost time in each step, and compiling one without them does too.
        if not stepped or len(going) <= len(stepped) / 2:
            stepped = going
            steps = compile_steps(
                strategy, [course.learner for course in stepped], held, config.label_smoothing, config.seed
            )
        order = np.random.default_rng([config.seed, epoch]).permutation(rows.train)
        batches = list(global_batches(order, weights_N, config.batch_size, num_replicas))
        first = (epoch - 1) * steps_per_epoch
        losses = [
            steps(
                first + start,
                np.stack([rows_RB for rows_RB, _ in portion]),
                np.stack([weights_RB[None] for _, weights_RB in portion]),
            )
            for start, portion in _portions(batches)
        ]
        losses_SH = np.concatenate([portion.numpy() for portion in losses])  # waits only now
        train_loss_H = np.average(losses_SH, axis=0, weights=[weights.sum() for _, weights in batches])
        for course, train_loss in zip(stepped, train_loss_H.tolist(), strict=True):
            if course.is_over:
                continue
            if math.isfinite(train_loss):
                course.take(epoch, train_loss, watched_VD, watched_classes_V)
            elif len(courses) == 1:
                raise _diverged(epoch, train_loss, course.candidate.optimizer)
            else:
                course.give_up(epoch, train_loss)
        leader = min(courses, key=lambda course: course.best_loss)
        if leader.history:
            report({**asdict(leader.history[-1]), "epoch": epoch, "epochs": config.epochs})
        if all(course.is_over for course in courses):
            break

    with strategy.scope():
        return [course.trained() for course in courses]


def out_of_fold_logits(
    candidate: Candidate,
    strategy: tf.distribute.Strategy,
    rows: TrainingRows,
    folds_N: NDArray[np.int64],
    epochs: int,
    config: TrainingConfig,
    held: Any,
) -> NDArray[np.float32]:
    """What a head says of each row that was fitted on the rows of all other folds, N rows of K logits.

    One head for each fold, all at once; `rows.train` are all that take part, others have no answer (zeros).

    Args:
        candidate: of which kind the heads are, and how they are trained.
        folds_N: fold of each row, from 0.
        epochs: how long; nothing stops earlier, for there are no rows to watch.
        held: as `hold_rows` gives it.
    """
    num_folds = int(folds_N.max()) + 1
    steps_per_epoch = math.ceil(len(rows.train) / min(config.batch_size, len(rows.train)))
    with strategy.scope():
        learners = [_learner(candidate, rows, steps_per_epoch, config) for _ in range(num_folds)]
        steps = compile_steps(strategy, learners, held, config.label_smoothing, config.seed)
    weights_N = row_weights(rows.classes_N, rows.train, config.class_weights)
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng([config.seed, epoch]).permutation(rows.train)
        batches = list(global_batches(order, weights_N, config.batch_size, strategy.num_replicas_in_sync))
        first = (epoch - 1) * steps_per_epoch
        for start, portion in _portions(batches):
            rows_SRB = np.stack([rows_RB for rows_RB, _ in portion])
            weights_SRB = np.stack([weights_RB for _, weights_RB in portion])
            is_seen_SHRB = folds_N[rows_SRB][:, None] != np.arange(num_folds)[:, None, None]
            steps(first + start, rows_SRB, weights_SRB[:, None] * is_seen_SHRB.astype(np.float32))
    logits_NK = np.zeros((len(folds_N), rows.num_classes), np.float32)
    for fold, learner in enumerate(learners):
        unseen = rows.train[folds_N[rows.train] == fold]
        logits_NK[unseen] = compile_logits(learner.network)(rows.embeddings_ND[unseen])
    return logits_NK


def _portions(batches: Sequence[Batch]) -> Iterator[tuple[int, Sequence[Batch]]]:
    """Batches as one call of the compiled function takes them, and the place of the first."""
    for start in range(0, len(batches), STEPS_PER_CALL):
        yield start, batches[start : start + STEPS_PER_CALL]


def _learner(
    candidate: Candidate, rows: TrainingRows, steps_per_epoch: int, config: TrainingConfig
) -> Learner:
    head = open_head(candidate.head)
    network = head.build(rows.embeddings_ND.shape[1], rows.num_classes, config.seed)
    return Learner(head, network, build_optimizer(candidate.optimizer, steps_per_epoch, config.epochs))


class _Course:
    """What becomes of one head over the epochs."""

    def __init__(self, candidate: Candidate, learner: Learner, config: TrainingConfig) -> None:
        self.candidate, self.learner = candidate, learner
        self._network, self._config = learner.network, config
        self._logits = compile_logits(learner.network)
        self._best_weights = learner.network.get_weights()
        self._diverged: str | None = None
        self.history: list[Epoch] = []
        self.best_epoch, self.best_loss, self.is_over = 0, math.inf, False

    def take(
        self,
        epoch: int,
        train_loss: float,
        watched_VD: NDArray[np.floating[Any]],
        watched_classes_V: NDArray[np.int64],
    ) -> None:
        """An epoch came to its end: is it the best until now, and was it the last?"""
        watched_loss, watched_accuracy = None, None
        if len(watched_classes_V):
            watched = self._logits(watched_VD)
            watched_loss = metrics.cross_entropy(watched, watched_classes_V)
            watched_accuracy = metrics.accuracy(watched, watched_classes_V)
        self.history.append(Epoch(epoch, train_loss, watched_loss, watched_accuracy))
        if watched_loss is None or watched_loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, math.inf if watched_loss is None else watched_loss
            self._best_weights = self._network.get_weights()
        self.is_over = epoch - self.best_epoch >= self._config.patience

    def give_up(self, epoch: int, train_loss: float) -> None:
        """Its loss is no number any more: what it was until now counts, if anything."""
        self._diverged = (
            f"the loss was {train_loss} in epoch {epoch}; weights of epoch {self.best_epoch} kept"
        )
        self.is_over = True

    def trained(self) -> Trained:
        """At its best weights; call it in the strategy's scope."""
        self._network.set_weights(self._best_weights)
        stopped = self._diverged or _why_stopped(self.history[-1], self.best_epoch, self._config)
        return Trained(self._network, TrainingResult(tuple(self.history), self.best_epoch, stopped))


def global_batches(
    order: NDArray[np.int64], weights_N: NDArray[np.float32], batch_size: int, num_replicas: int
) -> Iterator[Batch]:
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


def _diverged(epoch: int, loss: float, optimizer: AnyOptimizerConfig) -> EngineError:
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
