"""Which images each step of an epoch takes, and which of them one worker hands in. Not for: reading them.

Shape letters: N labelled images, T of them that an epoch takes (or what is left of it), R devices that a worker hands
images to, B images of one device's share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.strategies.workers import Workers
from engine.training.passes import global_batches

NO_IMAGE = -1
EVERYWHERE = "everywhere"


class Batch(NamedTuple):
    """One step's images, as far as this worker hands them in.

    Attributes:
        rows_RB: which of the labelled ones; NO_IMAGE where it has no more of them.
        weights_RB: what each counts; padding 0.
        places_RB: the place of each within the batch of all workers together.
        weight: of that whole batch.
    """

    rows_RB: NDArray[np.int64]
    weights_RB: NDArray[np.float32]
    places_RB: NDArray[np.int64]
    weight: np.float32


class ImagesEverywhere:
    """Each worker has all images: an epoch's order is the same for any number of workers, and each is handed the whole
    batch, of which its devices take their share.

    Attributes:
        name: of all that an epoch's order hangs on beside seed, epoch and rows.
    """

    name = EVERYWHERE

    def __init__(self, workers: Workers, weights_N: NDArray[np.float32], batch_size: int, seed: int) -> None:
        self._replicas = workers.count * workers.devices
        self._weights_N, self._batch_size, self._seed = weights_N, batch_size, seed

    def order(self, rows_T: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The rows in this epoch's order, (T,)."""
        return np.random.default_rng([self._seed, epoch]).permutation(rows_T)

    def make_room(self, rows_T: NDArray[np.int64]) -> None:
        """Batches of these rows are to come."""

    def batches(self, order_T: NDArray[np.int64]) -> Sequence[Batch]:
        """Every row once, each batch of the same shape."""
        return [
            Batch(rows_RB, weights_RB, np.arange(rows_RB.size).reshape(rows_RB.shape), weights_RB.sum())
            for rows_RB, weights_RB in global_batches(
                order_T, self._weights_N, self._batch_size, self._replicas
            )
        ]


class ImagesSplit:
    """Each image is on one worker, which hands in its own of each batch.

    A worker's images come in an order of its own, and are spread evenly over the epoch: all batches but the last are
    full, whatever the workers' numbers of images, and none of them runs out before the others. How many of a batch are
    one worker's hangs on these numbers alone, so that a step has one shape in all epochs.

    Args:
        holders_N: the worker that has each image.

    Attributes:
        name: as of `ImagesEverywhere`.
    """

    def __init__(
        self,
        workers: Workers,
        weights_N: NDArray[np.float32],
        batch_size: int,
        seed: int,
        holders_N: NDArray[np.int64],
    ) -> None:
        self._rank, self._replicas = workers.rank, workers.devices
        self._weights_N, self._batch_size, self._seed = weights_N, batch_size, seed
        self._holders_N = holders_N
        self._share = 1
        self.name = hashlib.sha256(np.ascontiguousarray(holders_N, np.int64).data).hexdigest()[:16]

    def order(self, rows_T: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The rows in this epoch's order, (T,): the same on every worker."""
        holders_T = self._holders_N[rows_T]
        shuffled: list[NDArray[np.int64]] = []
        places: list[NDArray[np.float64]] = []
        for worker in np.unique(holders_T).tolist():
            own = rows_T[holders_T == worker]
            shuffled.append(np.random.default_rng([self._seed, epoch, worker]).permutation(own))
            places.append((np.arange(len(own)) + 0.5) / len(own))
        if not shuffled:
            return rows_T
        # Stable: of equal places the first worker's comes first.
        return np.concatenate(shuffled)[np.argsort(np.concatenate(places), kind="stable")]

    def make_room(self, rows_T: NDArray[np.int64]) -> None:
        """Batches of these rows are to come. Say so before the first step is compiled: were one worker to compile
        another shape later, and others not, they would no longer find each other's sums."""
        most = max((len(self._own(batch)) for batch in self._cut(self.order(rows_T, 0))), default=0)
        self._share = max(self._share, -(-most // self._replicas))

    def batches(self, order_T: NDArray[np.int64]) -> Sequence[Batch]:
        """Of every row that this worker has one place, in batches of one shape, as many as on all other workers."""
        return [self._batch(batch) for batch in self._cut(order_T)]

    def _cut(self, order_T: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        size = self._batch_size
        return [order_T[start : start + size] for start in range(0, len(order_T), size)]

    def _own(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of this worker's images in it."""
        return np.flatnonzero(self._holders_N[batch] == self._rank)

    def _batch(self, batch: NDArray[np.int64]) -> Batch:
        shape, own = (self._replicas, self._share), self._own(batch)
        rows_RB = np.full(shape, NO_IMAGE, np.int64)
        weights_RB = np.zeros(shape, np.float32)
        places_RB = np.zeros(shape, np.int64)
        rows_RB.flat[: len(own)] = batch[own]
        weights_RB.flat[: len(own)] = self._weights_N[batch[own]]
        places_RB.flat[: len(own)] = own
        return Batch(rows_RB, weights_RB, places_RB, self._weights_N[batch].sum())


Order = ImagesEverywhere | ImagesSplit


class Feed(NamedTuple):
    """What a worker hands to a step: a `Batch` with its images.

    Attributes:
        pixels_BSS3: uint8, one device's after the other's; padding is black.
        targets_B: of each its class, or (B, K).
        weights_RB, places_RB, weight: as in `Batch`.
    """

    pixels_BSS3: NDArray[np.uint8]
    targets_B: NDArray[np.integer[Any]]
    weights_RB: NDArray[np.float32]
    places_RB: NDArray[np.int64]
    weight: np.float32
