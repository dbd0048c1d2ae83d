"""Epochs over embeddings, with early stopping; read it top to bottom. Not for: what an epoch does.

Shape letters: N rows held, V validation rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.heads.base import Head
from engine.heads.kinds import open_head
from engine.heads.network import Logits, compile_logits
from engine.strategies.base import Agreed, agreement
from engine.training import metrics
from engine.training.checkpoints import Checkpoints, State
from engine.training.grid import Candidate, step_sizes
from engine.training.kinds import AnyOptimizerConfig, LbfgsConfig, TrainingConfig
from engine.training.multi_label import binary_cross_entropy, share_right
from engine.training.passes import Passes, open_passes, row_weights
from engine.training.step import Learner, build_optimizer, hold_rows

log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]


def unheard(report: dict[str, Any]) -> None:
    """A `Report` of workers beside the first one: they would say the same."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows and which of them are for what. Row numbers count from 0 within the arrays."""

    embeddings_ND: NDArray[np.floating[Any]]  # float32 or float16, as `engine.training.rows` holds them
    targets_N: NDArray[np.integer[Any]]  # (N,) class numbers, or (N, K) with 1 where a row has a class
    train: NDArray[np.int64]  # row numbers, at least one
    validation: NDArray[np.int64]  # row numbers, perhaps none

    @property
    def num_classes(self) -> int:
        """K: each class has a row."""
        return int(self.targets_N.max()) + 1 if self.targets_N.ndim == 1 else self.targets_N.shape[1]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to. Losses are mean cross-entropies in nats; where rows have several classes, so is the mean
    over these, and accuracy is the share of right answers to all questions (row, class)."""

    epoch: int  # counts from 1
    # Weighted mean over the epoch's steps, each before its update; of L-BFGS after the iteration. None: not trained.
    train_loss: float | None
    validation_loss: float | None  # after the epoch; None without validation rows
    validation_accuracy: float | None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The trace of a training run; the network itself holds the weights of `best_epoch`."""

    history: tuple[Epoch, ...]
    best_epoch: int
    stopped: str  # a sentence on why training ended

    def facts(self) -> dict[str, Any]:
        """How training went, for metrics.json."""
        return {
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "stopped": self.stopped,
            "history": [asdict(epoch) for epoch in self.history],
        }


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
    checkpoints: Checkpoints | None = None,
) -> list[Trained]:
    """Train heads at once, each until its validation loss has not fallen for `patience` epochs; keep the best weights.

    All see the same batches, and end when the last of them does. Without validation rows nothing can say when to stop:
    all epochs are run and the last weights are kept. Heads that are not trained remember the training rows.

    Args:
        candidates: heads, and how each is trained.
        strategy: opened.
        rows: embeddings, classes, and which rows are for what.
        config: epochs, batch size, patience, class weights, label smoothing, seed.
        report: called once per epoch with a flat dict of numbers: of the head with the lowest validation loss so far.
        held: the rows, where `hold_rows` has already put them on the devices.
        checkpoints: where to begin, if an earlier run was interrupted, and to write what this one comes to.

    Raises:
        EngineError: a loss became infinite or NaN, and there is no other head.
        StorageError: whether there is a checkpoint cannot be said.
    """
    learning = [one for one in candidates if open_head(one.head).learns_by_gradient]
    if len(learning) < len(candidates):
        learned = iter(
            train_heads(learning, strategy, rows, config, report, held, checkpoints) if learning else ()
        )
        agreed = agreement(strategy)
        return [next(learned) if one in learning else _remembered(one, rows, agreed) for one in candidates]
    steps_per_epoch = math.ceil(len(rows.train) / min(config.batch_size, len(rows.train)))
    with strategy.scope():
        learners = [_learner(candidate, rows, steps_per_epoch, config) for candidate in candidates]
        held = hold_rows(strategy, rows.embeddings_ND, rows.targets_N) if held is None else held
    weights_N = row_weights(rows.targets_N, rows.train, config.class_weights)
    passes = open_passes(strategy, learners, held, rows.train, weights_N, config)
    courses = [
        _Course(candidate, learner, config) for candidate, learner in zip(candidates, learners, strict=True)
    ]
    agreed = agreement(strategy)
    first = 1
    if checkpoints is not None:
        with strategy.scope():
            first += _restored(checkpoints.read(), courses, passes)
        _refuse_two_beginnings(first, agreed)

    for epoch in range(first, config.epochs + 1):
        going = [place for place, course in enumerate(courses) if not course.is_over]
        if not going:
            break
        passed = passes.epoch(epoch, going)
        for place in going:
            course, train_loss = courses[place], passed[place].train_loss
            watched = course.watch(rows)
            train_loss, *watched = agreed(np.array([train_loss, *watched])).tolist()
            if math.isfinite(train_loss):
                course.take(epoch, train_loss, watched, passed[place].has_converged)
            elif len(courses) == 1:
                raise _diverged(epoch, train_loss, course.candidate.optimizer)
            else:
                course.give_up(epoch, train_loss)
        leader = min(courses, key=lambda course: course.best_loss)
        if leader.history:
            report({**asdict(leader.history[-1]), "epoch": epoch, "epochs": config.epochs})
        if checkpoints is not None and checkpoints.is_due:
            checkpoints.write(_state(epoch, courses, passes))

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
    head = open_head(candidate.head)
    if not head.learns_by_gradient:
        return _logits_of_others(head, rows, folds_N)
    steps_per_epoch = math.ceil(len(rows.train) / min(config.batch_size, len(rows.train)))

    def seen(rows_SRB: NDArray[np.int64], weights_SRB: NDArray[np.float32]) -> NDArray[np.float32]:
        is_seen_SHRB = folds_N[rows_SRB][:, None] != np.arange(num_folds)[:, None, None]
        weights_SHRB: NDArray[np.float32] = weights_SRB[:, None] * is_seen_SHRB.astype(np.float32)
        return weights_SHRB

    with strategy.scope():
        learners = [_learner(candidate, rows, steps_per_epoch, config) for _ in range(num_folds)]
    weights_N = row_weights(rows.targets_N, rows.train, config.class_weights)
    passes = open_passes(strategy, learners, held, rows.train, weights_N, config, seen)
    for epoch in range(1, epochs + 1):
        passes.epoch(epoch, range(num_folds))
    logits_NK = np.zeros((len(folds_N), rows.num_classes), np.float32)
    for fold, learner in enumerate(learners):
        unseen = rows.train[folds_N[rows.train] == fold]
        logits_NK[unseen] = compile_logits(learner.network)(rows.embeddings_ND, unseen)
    return logits_NK


def _remembered(candidate: Candidate, rows: TrainingRows, agreed: Agreed) -> Trained:
    """A head that is made of the training rows."""
    head = open_head(candidate.head)
    head.check_room(len(rows.train), rows.embeddings_ND.shape[1])
    network = head.remember(rows.embeddings_ND[rows.train], rows.targets_N[rows.train], rows.num_classes)
    watched = _watched(compile_logits(network), rows)
    loss, accuracy = agreed(np.array(watched)).tolist() if watched else (None, None)
    history = (Epoch(1, None, loss, accuracy),)
    return Trained(network, TrainingResult(history, 1, "nothing is trained: the training rows vote"))


def _logits_of_others(head: Head, rows: TrainingRows, folds_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """What a head says of each row that remembers the rows of all other folds."""
    logits_NK = np.zeros((len(folds_N), rows.num_classes), np.float32)
    for fold in range(int(folds_N.max()) + 1):
        is_unseen = folds_N[rows.train] == fold
        seen, unseen = rows.train[~is_unseen], rows.train[is_unseen]
        if len(seen) and len(unseen):
            network = head.remember(rows.embeddings_ND[seen], rows.targets_N[seen], rows.num_classes)
            logits_NK[unseen] = compile_logits(network)(rows.embeddings_ND, unseen)
    return logits_NK


def _watched(logits: Logits, rows: TrainingRows) -> tuple[float, ...]:
    """Loss and accuracy on the validation rows; nothing without any."""
    if not len(rows.validation):
        return ()
    watched_VK, watched_V = logits(rows.embeddings_ND, rows.validation), rows.targets_N[rows.validation]
    if watched_V.ndim == 2:
        return binary_cross_entropy(watched_VK, watched_V), share_right(watched_VK, watched_V)
    return metrics.cross_entropy(watched_VK, watched_V), metrics.accuracy(watched_VK, watched_V)


def _learner(
    candidate: Candidate, rows: TrainingRows, steps_per_epoch: int, config: TrainingConfig
) -> Learner:
    head, of = open_head(candidate.head), candidate.optimizer
    network = head.build(rows.embeddings_ND.shape[1], rows.num_classes, config.seed)
    steps = None if isinstance(of, LbfgsConfig) else build_optimizer(of, steps_per_epoch, config.epochs)
    return Learner(head, network, of, steps)


def _state(epoch: int, courses: Sequence[_Course], passes: Passes) -> State:
    """All that the rest of the training hangs on, after an epoch."""
    return State(
        {"epoch": epoch, "courses": [course.facts() for course in courses], "passes": passes.facts()},
        passes.tensors()
        | {
            f"{place}.{name}": tensor
            for place, course in enumerate(courses)
            for name, tensor in course.tensors().items()
        },
    )


def _restored(state: State | None, courses: Sequence[_Course], passes: Passes) -> int:
    """Put everything to where it was; the last epoch that was run, 0 without a state. Call it in strategy.scope()."""
    if state is None:
        return 0
    for place, course in enumerate(courses):
        course.restore(state.facts["courses"][place], state.tensors, f"{place}.")
    passes.restore(state.facts["passes"], state.tensors)
    epoch = int(state.facts["epoch"])
    log.warning("a fit that was interrupted after epoch %d goes on from there", epoch)
    return epoch


def _refuse_two_beginnings(first: int, agreed: Agreed) -> None:
    """A driver that was killed may have left a worker behind, which wrote once more while others were reading."""
    chiefs = int(agreed(np.array([first], np.float64))[0])
    if chiefs != first:
        raise EngineError(
            "training: two workers found different checkpoints",
            found=f"one after epoch {first - 1}",
            wanted=f"the chief's, after epoch {chiefs - 1}",
            way_out="run the same command again",
        )


class _Course:
    """What becomes of one head over the epochs."""

    def __init__(self, candidate: Candidate, learner: Learner, config: TrainingConfig) -> None:
        self.candidate, self.learner = candidate, learner
        self._network, self._config = learner.network, config
        self._logits = compile_logits(learner.network)
        self._best_weights = learner.network.get_weights()
        self._diverged: str | None = None
        self._has_converged = False
        self.history: list[Epoch] = []
        self.best_epoch, self.best_loss, self.is_over = 0, math.inf, False

    def watch(self, rows: TrainingRows) -> tuple[float, ...]:
        """Loss and accuracy on the validation rows now; nothing without any."""
        return _watched(self._logits, rows)

    def take(self, epoch: int, train_loss: float, watched: Sequence[float], has_converged: bool) -> None:
        """An epoch came to its end: is it the best until now, and was it the last?"""
        watched_loss, watched_accuracy = watched or (None, None)
        self.history.append(Epoch(epoch, train_loss, watched_loss, watched_accuracy))
        if watched_loss is None or watched_loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, math.inf if watched_loss is None else watched_loss
            self._best_weights = self._network.get_weights()
        self._has_converged = has_converged
        self.is_over = has_converged or epoch - self.best_epoch >= self._config.patience

    def give_up(self, epoch: int, train_loss: float) -> None:
        """Its loss is no number any more: what it was until now counts, if anything."""
        self._diverged = (
            f"the loss was {train_loss} in epoch {epoch}; weights of epoch {self.best_epoch} kept"
        )
        self.is_over = True

    def facts(self) -> dict[str, Any]:
        """For a checkpoint: what JSON can say."""
        return {
            "history": [asdict(epoch) for epoch in self.history],
            "best_epoch": self.best_epoch,
            "is_over": self.is_over,
            "has_converged": self._has_converged,
            "diverged": self._diverged,
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The rest of it."""
        now = {f"now.{place}": np.asarray(value) for place, value in enumerate(self._network.variables)}
        best = {f"best.{place}": value for place, value in enumerate(self._best_weights)}
        return now | best

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], prefix: str) -> None:
        """As `facts` and `tensors` gave it."""
        self.history = [Epoch(**epoch) for epoch in facts["history"]]
        self.best_epoch, self.is_over = facts["best_epoch"], facts["is_over"]
        self._has_converged, self._diverged = facts["has_converged"], facts["diverged"]
        losses = [epoch.validation_loss for epoch in self.history if epoch.validation_loss is not None]
        self.best_loss = min(losses, default=math.inf)
        for place, variable in enumerate(self._network.variables):
            variable.assign(tensors[f"{prefix}now.{place}"])
        self._best_weights = [tensors[f"{prefix}best.{place}"] for place in range(len(self._best_weights))]

    def trained(self) -> Trained:
        """At its best weights; call it in the strategy's scope."""
        self._network.set_weights(self._best_weights)
        stopped = self._diverged or _why_stopped(
            self.history[-1], self.best_epoch, self._config, self._has_converged
        )
        return Trained(self._network, TrainingResult(tuple(self.history), self.best_epoch, stopped))


def _diverged(epoch: int, loss: float, optimizer: AnyOptimizerConfig) -> EngineError:
    return EngineError(
        f"training: the loss is {loss} in epoch {epoch}",
        found=step_sizes(optimizer),
        way_out="lower optimizer.learning_rate; if that does not help, look for extreme numbers in the embeddings",
    )


def _why_stopped(last: Epoch, best_epoch: int, config: TrainingConfig, has_converged: bool) -> str:
    if has_converged:
        return f"the gradient vanished after epoch {last.epoch}; weights of epoch {best_epoch} kept"
    if last.validation_loss is None:
        return f"no validation rows: all {last.epoch} epochs were run and the last weights kept"
    if last.epoch - best_epoch >= config.patience:
        return f"the validation loss did not fall for {config.patience} epochs; weights of epoch {best_epoch} kept"
    return f"all {last.epoch} epochs were run; weights of epoch {best_epoch}, the best, kept"
