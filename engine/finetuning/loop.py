"""Epochs over images, with early stopping and checkpoints between steps. Not for: what a step does.

Shape letters: N labelled images, T of them in an epoch or what is left of it, B images that a worker hands to a step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.finetuning.images import ImageRows
from engine.finetuning.kinds import FinetuneTrainingConfig
from engine.finetuning.order import NO_IMAGE, Batch, Feed, ImagesEverywhere, ImagesSplit, Order
from engine.finetuning.step import Classifier, Step, overflows_unscaled
from engine.strategies.base import agreement
from engine.strategies.workers import Workers
from engine.training.checkpoints import Checkpoints, State
from engine.training.loop import Epoch, Report

log = logging.getLogger(__name__)
OTHER_THAN_FLOAT16 = ", or set training.precision to mixed_bfloat16 or float32, whose numbers reach further"
STATE_VERSION = 2  # of what a checkpoint holds: raise it when `Finetuning._state` changes
BATCHES_AHEAD = 2  # read from the disk while a step is computed

Watch = Callable[[], tuple[float, ...]]
"""Loss and accuracy on the validation images with the weights that there are now; nothing without any."""


@dataclass(frozen=True, slots=True)
class Images:
    """What is trained on.

    Attributes:
        rows: all images.
        numbers_N: which of them are the labelled ones that targets and splits count.
        targets_N: of each labelled one: its class, or (N, K) with 1 where it has the class.
        weights_N: what each counts.
        train: numbers of those that are learnt from, within the labelled ones.
        workers: who train together.
    """

    rows: ImageRows
    numbers_N: NDArray[np.int64]
    targets_N: NDArray[np.integer[Any]]
    weights_N: NDArray[np.float32]
    train: NDArray[np.int64]
    workers: Workers

    @property
    def holders_N(self) -> NDArray[np.int64] | None:
        """The worker that has each labelled one; None: each worker has all."""
        return None if self.rows.holders_N is None else self.rows.holders_N[self.numbers_N]

    @property
    def are_everywhere(self) -> bool:
        """Whether each worker has all of them."""
        return self.rows.holders_N is None

    def own(self, labelled: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of those among them that this worker is to look at: all, or those that it alone has."""
        if self.holders_N is None:
            return np.arange(len(labelled))
        return np.flatnonzero(self.holders_N[labelled] == self.workers.rank)

    def summed(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """What each worker has found of its `own` ones, of all; all workers must call it."""
        return numbers if self.are_everywhere else self.workers.summed(numbers)

    def pixels(self, labelled: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Of some of the labelled ones that are here."""
        return self.rows.pixels(self.numbers_N[labelled])

    def feed(self, batch: Batch) -> Feed:
        """A batch with its images."""
        rows_B = batch.rows_RB.ravel()
        is_image_B = rows_B != NO_IMAGE
        if is_image_B.all():
            pixels_BSS3 = self.pixels(rows_B)
        else:
            side = self.rows.side_px
            pixels_BSS3 = np.zeros((len(rows_B), side, side, 3), np.uint8)
            pixels_BSS3[is_image_B] = self.pixels(rows_B[is_image_B])
        targets_B = self.targets_N[np.maximum(rows_B, 0)]
        return Feed(pixels_BSS3, targets_B, batch.weights_RB, batch.places_RB, batch.weight)


@dataclass(frozen=True, slots=True)
class Trainee:
    """What learns, and how; made in the strategy's scope."""

    strategy: tf.distribute.Strategy
    classifier: Classifier
    optimizer: Any  # keras.Optimizer, built
    step: Step


@dataclass(frozen=True, slots=True)
class Course:
    """How it went.

    Attributes:
        history: of each epoch.
        best_epoch: whose weights the classifier has now; 0: those that it began with.
        stopped: a sentence on why it ended.
        waiting: share of the time of the steps in which they waited for images.
        skipped_steps: steps whose gradients were not finite, so that they changed no weights (mixed_float16).
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    stopped: str
    waiting: float
    skipped_steps: int


class Finetuning:
    """Trains until the validation loss has not fallen for `patience` epochs, and leaves the best weights.

    Without validation images all epochs are run and the last weights are kept.

    Args:
        watch: must give the same on every worker.
        report: called once per epoch with epoch, epochs, train_loss, validation_loss, validation_accuracy.
        checkpoints: where to begin, if an earlier run was interrupted, and to write what this one comes to.
    """

    def __init__(
        self,
        trainee: Trainee,
        images: Images,
        watch: Watch,
        config: FinetuneTrainingConfig,
        report: Report,
        checkpoints: Checkpoints,
    ) -> None:
        self._strategy, self._classifier = trainee.strategy, trainee.classifier
        self._optimizer, self._step = trainee.optimizer, trainee.step
        self._images, self._watch, self._config = images, watch, config
        self._report, self._checkpoints = report, checkpoints
        self._agreed = agreement(trainee.strategy)
        self._order = _order_of(images, config)
        self._order.make_room(images.train)
        self._steps_per_epoch = math.ceil(len(images.train) / config.batch_size)
        self._epoch, self._steps_done = 1, 0  # where it is: steps of this epoch that are behind it
        self._before = np.empty(0, np.int64)  # images that the epoch took in another order than it goes on in
        self._loss_sum, self._weight_sum = 0.0, 0.0  # of those
        self._history: list[Epoch] = []
        self._best_epoch, self._best_loss = 0, math.inf
        self._best: list[NDArray[Any]] = []
        self._waited_s, self._stepping_s = 0.0, 0.0

    def run(self) -> Course:
        """All of it.

        Raises:
            EngineError: the loss became infinite or NaN before any epoch was better than none, or gradients did however
                little the loss was scaled; or they were so in every step.
            StorageError: whether there is a checkpoint cannot be said.
        """
        if not self._restored():
            watched = self._agreed_watch()
            self._best_loss = watched[0] if watched else math.inf
            self._best = self._weights()
        stopped = None
        while stopped is None and self._epoch <= self._config.epochs:
            # Before the epoch: one that was interrupted may have used up its patience.
            stopped = self._out_of_patience() or self._out_of_range() or self._one_epoch()
        stopped = stopped or self._out_of_patience() or self._out_of_range()
        skipped = self._skipped_steps()
        if skipped and skipped == self._steps():
            raise _overflowing(skipped, skipped)
        self._set_weights(self._best)
        told = stopped or f"all {self._config.epochs} epochs were run; {_kept(self._best_epoch)}"
        waiting = max(self._images.workers.each(self._waited_s / max(self._stepping_s, 1e-30)))
        return Course(tuple(self._history), self._best_epoch, told, round(waiting, 4), skipped)

    def _one_epoch(self) -> str | None:
        """The rest of the epoch; why it was the last one, or None."""
        batches = self._order.batches(self._order_of_rest())
        pending: list[tuple[tf.Tensor, float]] = []
        first = (self._epoch - 1) * self._steps_per_epoch
        for feed in self._read_ahead(batches[self._steps_done - self._steps_before() :]):
            started = time.perf_counter()
            pending.append((self._step(first + self._steps_done, feed), float(feed.weight)))
            # The device has something to do while the next one is made ready.
            if len(pending) > BATCHES_AHEAD:
                self._count(pending.pop(0))
            self._stepping_s += time.perf_counter() - started
            self._steps_done += 1
            if self._checkpoints.is_due and self._steps_done < self._steps_per_epoch:
                while pending:
                    self._count(pending.pop(0))
                self._checkpoints.write(self._state())
        while pending:
            self._count(pending.pop(0))
        return self._end_epoch()

    def _order_of_rest(self) -> NDArray[np.int64]:
        """All training images, or those that the epoch had not taken when it began to go in this order, (T,)."""
        left = self._images.train[np.isin(self._images.train, self._before, invert=True)]
        return self._order.order(left, self._epoch)

    def _steps_before(self) -> int:
        """Steps that the epoch took in another order: each of a full batch, for an epoch's last one ends it."""
        return len(self._before) // self._config.batch_size

    def _taken(self) -> NDArray[np.int64]:
        """Images that the epoch has taken so far, in whatever order."""
        since = (self._steps_done - self._steps_before()) * self._config.batch_size
        return np.concatenate([self._before, self._order_of_rest()[:since]]) if since else self._before

    def _end_epoch(self) -> str | None:
        config, epoch = self._config, self._epoch
        train_loss = float(self._agreed(np.array([self._loss_sum / max(self._weight_sum, 1e-30)]))[0])
        watched = self._agreed_watch() if math.isfinite(train_loss) else ()
        loss, accuracy = watched or (None, None)
        lost = next((one for one in (train_loss, loss) if one is not None and not math.isfinite(one)), None)
        if lost is None and loss is None and not all(np.isfinite(some).all() for some in self._weights()):
            lost = math.nan
        if lost is not None:
            if not self._best_epoch:
                raise _diverged(epoch, lost, config.precision)
            told = f"the loss was {lost} in epoch {epoch}; {_kept(self._best_epoch)}"
            log.warning(told)
            return told
        self._history.append(Epoch(epoch, train_loss, loss, accuracy))
        if loss is None or loss < self._best_loss:
            self._best_epoch, self._best_loss = epoch, math.inf if loss is None else loss
            self._best = self._weights()
        self._report({**asdict(self._history[-1]), "epochs": config.epochs})
        self._epoch, self._steps_done, self._loss_sum, self._weight_sum = epoch + 1, 0, 0.0, 0.0
        self._before = np.empty(0, np.int64)
        if self._checkpoints.is_due:
            self._checkpoints.write(self._state())
        return None

    def _out_of_patience(self) -> str | None:
        """Why no further epoch is run, if none is."""
        if not self._history or self._history[-1].validation_loss is None:
            return None
        if self._history[-1].epoch - self._best_epoch < self._config.patience:
            return None
        return (
            f"the validation loss did not fall for {self._config.patience} epochs; {_kept(self._best_epoch)}"
        )

    def _out_of_range(self) -> str | None:
        """Why no further epoch is run, if gradients are not finite however small the loss is made."""
        if not self._history or not overflows_unscaled(self._optimizer):
            return None
        if not self._best_epoch:
            raise _overflowing(self._skipped_steps(), self._steps())
        told = f"gradients do not fit float16 however little the loss is scaled; {_kept(self._best_epoch)}"
        log.warning(told)
        return told

    def _steps(self) -> int:
        return (self._epoch - 1) * self._steps_per_epoch + self._steps_done

    def _skipped_steps(self) -> int:
        """Those that the optimizer did not take."""
        return self._steps() - int(self._optimizer.iterations.numpy())

    def _read_ahead(self, batches: Sequence[Batch]) -> Iterator[Feed]:
        """Their images, read by a thread while others are computed."""
        waiting: list[Future[Feed]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="images") as reader:
            for place in range(len(batches)):
                while len(waiting) < BATCHES_AHEAD and place + len(waiting) < len(batches):
                    waiting.append(reader.submit(self._images.feed, batches[place + len(waiting)]))
                started = time.perf_counter()
                feed = waiting.pop(0).result()
                waited = time.perf_counter() - started
                self._waited_s += waited
                self._stepping_s += waited
                yield feed

    def _count(self, done: tuple[tf.Tensor, float]) -> None:
        loss, weight = done
        self._loss_sum += float(loss) * weight
        self._weight_sum += weight

    def _agreed_watch(self) -> tuple[float, ...]:
        watched = self._watch()
        return tuple(self._agreed(np.array(watched, np.float64)).tolist()) if watched else ()

    def _weights(self) -> list[NDArray[Any]]:
        return [np.array(variable) for variable in self._classifier.tensors]

    def _set_weights(self, values: Sequence[NDArray[Any]]) -> None:
        with self._strategy.scope():
            for variable, value in zip(self._classifier.tensors, values, strict=True):
                variable.assign(value)

    def _state(self) -> State:
        """All that the rest of the training hangs on."""
        facts = {
            "epoch": self._epoch,
            "steps_done": self._steps_done,
            "loss_sum": self._loss_sum,
            "weight_sum": self._weight_sum,
            "history": [asdict(epoch) for epoch in self._history],
            "best_epoch": self._best_epoch,
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "order": self._order.name,
        }
        tensors = {f"now.{place}": value for place, value in enumerate(self._weights())}
        tensors |= {f"best.{place}": value for place, value in enumerate(self._best)}
        tensors |= {
            f"optimizer.{place}": np.array(variable)
            for place, variable in enumerate(self._optimizer.variables)
        }
        tensors |= {"taken.before": self._before, "taken": self._taken()}
        return State(facts, tensors)

    def _restored(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        state = self._checkpoints.read()
        epoch_and_step = [0.0, 0.0] if state is None else [state.facts["epoch"], state.facts["steps_done"]]
        mine = np.array(epoch_and_step, np.float64)
        if (self._agreed(mine) != mine).any():
            raise EngineError(
                "finetune: two workers found different checkpoints", way_out="run the same command again"
            )
        if state is None:
            return False
        facts, tensors = state.facts, state.tensors
        self._epoch, self._steps_done = int(facts["epoch"]), int(facts["steps_done"])
        self._loss_sum, self._weight_sum = facts["loss_sum"], facts["weight_sum"]
        self._history = [Epoch(**epoch) for epoch in facts["history"]]
        self._best_epoch = facts["best_epoch"]
        self._best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]
        count = len(self._classifier.tensors)
        self._set_weights([tensors[f"now.{place}"] for place in range(count)])
        self._best = [tensors[f"best.{place}"] for place in range(count)]
        with self._strategy.scope():
            for place, variable in enumerate(self._optimizer.variables):
                variable.assign(tensors[f"optimizer.{place}"])
        is_same_order = facts["order"] == self._order.name
        self._before = tensors["taken.before" if is_same_order else "taken"]
        self._order.make_room(self._order_of_rest())
        if not is_same_order:
            log.warning(
                "images are placed otherwise than before the interruption: what is left of the epoch, and each later "
                "one, comes in another order than it would have"
            )
        log.warning(
            "a fine-tuning that was interrupted in epoch %d after %d steps goes on from there",
            self._epoch,
            self._steps_done,
        )
        return True


def _order_of(images: Images, config: FinetuneTrainingConfig) -> Order:
    given = images.workers, images.weights_N, config.batch_size, config.seed
    return ImagesEverywhere(*given) if images.holders_N is None else ImagesSplit(*given, images.holders_N)


def _kept(best_epoch: int) -> str:
    if not best_epoch:
        return "no epoch was better than the weights that it began with, which are kept"
    return f"weights of epoch {best_epoch} kept"


def _diverged(epoch: int, loss: float, precision: str) -> EngineError:
    further = {
        "float32": "",
        "mixed_bfloat16": ", or set training.precision to float32",
        "mixed_float16": OTHER_THAN_FLOAT16,
    }
    return EngineError(
        f"finetune: the loss is {loss} in epoch {epoch}",
        way_out="lower optimizer.learning_rate" + further[precision],
    )


def _overflowing(skipped: int, steps: int) -> EngineError:
    return EngineError(
        f"finetune: {skipped:,} of {steps:,} steps changed no weights: their gradients were infinite or NaN",
        wanted="gradients that fit float16, which ends at 65,504",
        way_out="lower optimizer.learning_rate" + OTHER_THAN_FLOAT16,
    )
