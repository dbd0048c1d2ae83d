"""One epoch of many heads at once: a step for each batch, or an iteration over all rows. Not for: when to stop.

Shape letters: N rows held, R replicas, B rows of one replica's share, S batches, H heads, P parameters of one head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.strategies.base import agreement
from engine.training.kinds import LbfgsConfig, TrainingConfig
from engine.training.lbfgs import Lbfgs
from engine.training.step import Learner, compile_gradients, compile_steps, is_bias

Batch = tuple[
    NDArray[np.int64], NDArray[np.float32]
]  # rows_RB and weights_RB, as `global_batches` gives them
Weigh = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
"""(rows_SRB, weights_SRB) -> weights_SHRB: what each row counts for each head; H may be 1: for all."""
STEPS_PER_CALL = 16  # of the compiled function: entering it takes as long as a small head's step
ROWS_AT_ONCE = 8192  # of a full batch: 42 MB of float32 at width 1280


@dataclass(frozen=True, slots=True)
class Passed:
    """What an epoch came to for one head.

    Attributes:
        train_loss: mean cross-entropy in nats; of mini-batches before each update, of L-BFGS after the iteration.
        has_converged: another pass would change next to nothing.
    """

    train_loss: float
    has_converged: bool = False


class Passes(ABC):
    """Goes over the training rows, time and again.

    Args:
        strategy: opened.
        learners: made in its scope; their optimizers are all of one kind.
        held: as `hold_rows` gives it.
        train: rows to learn from.
        weights_N: what each row held counts.
        weigh: and for which head.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        learners: Sequence[Learner],
        held: Any,
        train: NDArray[np.int64],
        weights_N: NDArray[np.float32],
        config: TrainingConfig,
        weigh: Weigh,
    ) -> None:
        self._strategy, self._learners, self._held = strategy, learners, held
        self._train, self._weights_N, self._config, self._weigh = train, weights_N, config, weigh
        self._together: list[int] = []

    def epoch(self, number: int, going: Sequence[int]) -> dict[int, Passed]:
        """One epoch of some of the learners, and perhaps of others that are computed with them; counts from 1."""
        # Heads that have stopped still cost time in each step, and compiling one without them does too.
        if not self._together or len(going) <= len(self._together) / 2:
            self._take_together(going)
        return self._pass(number, going)

    def _take_together(self, heads: Sequence[int]) -> None:
        self._together = list(heads)
        self._compile([self._learners[head] for head in heads])

    @abstractmethod
    def _compile(self, learners: Sequence[Learner]) -> None:
        """What is needed for epochs of these."""

    @abstractmethod
    def _pass(self, number: int, going: Sequence[int]) -> dict[int, Passed]:
        """An epoch of those that are computed together."""

    def facts(self) -> dict[str, Any]:
        """With `tensors`: what it would need to go on with the next epoch. Which heads are computed together is part of
        it, for dropout's numbers hang on the widest of them."""
        return {"together": self._together}

    @abstractmethod
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The rest of it, the learners' weights apart."""

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        """Go on from there; call it in the strategy's scope."""
        self._restore(tensors)
        self._take_together(facts["together"])

    @abstractmethod
    def _restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """As `tensors` gave them."""


def for_all_heads(rows_SRB: NDArray[np.int64], weights_SRB: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights that no head has for itself."""
    del rows_SRB
    return weights_SRB[:, None]


def open_passes(
    strategy: tf.distribute.Strategy,
    learners: Sequence[Learner],
    held: Any,
    train: NDArray[np.int64],
    weights_N: NDArray[np.float32],
    config: TrainingConfig,
    weigh: Weigh = for_all_heads,
) -> Passes:
    """As the learners' optimizers go; those of one recipe are all of one kind."""
    kind = FullBatch if isinstance(learners[0].config, LbfgsConfig) else MiniBatches
    return kind(strategy, learners, held, train, weights_N, config, weigh)


class MiniBatches(Passes):
    """All rows in another order each epoch, and an optimizer step for each batch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with self._strategy.scope():
            for learner in self._learners:
                learner.optimizer_of_steps.build(learner.network.trainable_variables)

    def _compile(self, learners: Sequence[Learner]) -> None:
        config = self._config
        self._steps = compile_steps(self._strategy, learners, self._held, config.label_smoothing, config.seed)

    def _pass(self, number: int, going: Sequence[int]) -> dict[int, Passed]:
        """One pass; heads that are not going may be taken along."""
        config = self._config
        order = np.random.default_rng([config.seed, number]).permutation(self._train)
        replicas = self._strategy.num_replicas_in_sync
        batches = list(global_batches(order, self._weights_N, config.batch_size, replicas))
        first = (number - 1) * len(batches)
        losses = []
        for start in range(0, len(batches), STEPS_PER_CALL):
            rows_SRB, weights_SRB = _stacked(batches[start : start + STEPS_PER_CALL])
            losses.append(self._steps(first + start, rows_SRB, self._weigh(rows_SRB, weights_SRB)))
        losses_SH = np.concatenate([portion.numpy() for portion in losses])  # waits only now
        loss_H = np.average(losses_SH, axis=0, weights=[weights_RB.sum() for _, weights_RB in batches])
        return {head: Passed(loss) for head, loss in zip(self._together, loss_H.tolist(), strict=True)}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The optimizers' variables."""
        return {
            f"{head}.optimizer.{place}": np.asarray(variable)
            for head, learner in enumerate(self._learners)
            for place, variable in enumerate(learner.optimizer_of_steps.variables)
        }

    def _restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        for head, learner in enumerate(self._learners):
            for place, variable in enumerate(learner.optimizer_of_steps.variables):
                variable.assign(tensors[f"{head}.optimizer.{place}"])


class FullBatch(Passes):
    """An L-BFGS iteration over all rows; the line searches of all heads share their passes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        replicas = self._strategy.num_replicas_in_sync
        batches = global_batches(self._train, self._weights_N, ROWS_AT_ONCE * replicas, replicas)
        self._rows_SRB, weights_SRB = _stacked(list(batches))
        self._weights_SHRB = self._weigh(self._rows_SRB, weights_SRB)
        self._agreed = agreement(self._strategy)
        self._descents = [
            Lbfgs(_flat(learner.network.trainable_variables), learner.lbfgs.history)
            for learner in self._learners
        ]

    def _pass(self, number: int, going: Sequence[int]) -> dict[int, Passed]:
        """One iteration of each that is going."""
        del number
        waiting = set(going)
        while True:
            asked = self._agreed_points({head: self._descents[head].asked for head in self._together})
            found = self._evaluated(asked)
            for head in sorted(waiting):
                if self._descents[head].tell(*found[head]):
                    waiting.discard(head)
            # The chief's word: another processor may round a line search to another end.
            if not self._agreed(np.array([len(waiting)], np.float64))[0]:
                break
        finals = self._agreed_points(
            {head: np.append(self._descents[head].at_P, self._descents[head].loss) for head in self._together}
        )
        steepest = self._agreed(np.array([self._descents[head].steepest for head in self._together]))
        passed = {}
        for head, slope in zip(self._together, steepest.tolist(), strict=True):
            at_P, loss = finals[head][:-1], float(finals[head][-1])
            self._set(head, at_P)
            learner = self._learners[head]
            has_converged = slope <= learner.lbfgs.tolerance
            passed[head] = Passed(loss - self._penalty(head, at_P)[0], has_converged)
        return passed

    def _compile(self, learners: Sequence[Learner]) -> None:
        own = (
            self._weights_SHRB if self._weights_SHRB.shape[1] == 1 else self._weights_SHRB[:, self._together]
        )
        self._weight_H = np.broadcast_to(own.sum(axis=(0, 2, 3), dtype=np.float64), len(learners))
        self._gradients = compile_gradients(
            self._strategy, learners, self._held, self._rows_SRB, own, self._config.label_smoothing
        )

    def _evaluated(self, asked: Mapping[int, NDArray[np.float64]]) -> dict[int, tuple[float, Any]]:
        """Loss and gradient of each head at its point, penalty included."""
        for head, point_P in asked.items():
            self._set(head, point_P)
        loss_H, gradients_H = self._gradients()
        found = {}
        for place, head in enumerate(self._together):
            penalty, slope_P = self._penalty(head, asked[head])
            weight = self._weight_H[place]
            loss, gradient_P = loss_H[place] / weight, _flat(gradients_H[place]) / weight
            found[head] = (float(loss) + penalty, gradient_P + slope_P)
        return found

    def _penalty(self, head: int, point_P: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """l2 / 2 times the squares of all weights but biases, and its gradient."""
        learner = self._learners[head]
        counts = [
            np.full(math.prod(variable.shape), 0.0 if is_bias(variable) else 1.0)
            for variable in learner.network.trainable_variables
        ]
        slope_P = learner.lbfgs.l2 * np.concatenate(counts) * point_P
        return float(slope_P @ point_P) / 2, slope_P

    def _set(self, head: int, point_P: NDArray[np.float64]) -> None:
        start = 0
        for variable in self._learners[head].network.trainable_variables:
            size = math.prod(variable.shape)
            variable.assign(point_P[start : start + size].reshape(variable.shape).astype(np.float32))
            start += size

    def _agreed_points(self, points: Mapping[int, NDArray[np.float64]]) -> dict[int, NDArray[np.float64]]:
        together = self._agreed(np.concatenate(list(points.values())))
        ends = np.cumsum([len(point) for point in points.values()])
        return dict(zip(points, np.split(together, ends[:-1]), strict=True))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All that the descents remember."""
        return {
            f"{head}.lbfgs.{name}": tensor
            for head, descent in enumerate(self._descents)
            for name, tensor in descent.tensors().items()
        }

    def _restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        for head, descent in enumerate(self._descents):
            prefix = f"{head}.lbfgs."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            descent.restore(own)


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
    targets_N: NDArray[np.integer[Any]], train: NDArray[np.int64], class_weights: str
) -> NDArray[np.float32]:
    """What each row counts in the loss: 1, or under "balanced" rows / (classes * rows of its class).

    Counted over the training rows, each of whose classes has at least one.
    """
    if class_weights == "none":
        return np.ones(len(targets_N), np.float32)
    rows_K = np.bincount(targets_N[train])
    weight_K = len(train) / (np.count_nonzero(rows_K) * np.maximum(rows_K, 1))
    weights_N = np.ones(len(targets_N), np.float32)
    weights_N[train] = weight_K[targets_N[train]]
    return weights_N


def _stacked(batches: Sequence[Batch]) -> Batch:
    return np.stack([rows_RB for rows_RB, _ in batches]), np.stack([weights_RB for _, weights_RB in batches])


def _flat(arrays: Sequence[Any]) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])
