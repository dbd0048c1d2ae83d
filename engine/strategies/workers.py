"""What the training processes of a strategy tell each other: sums, and bytes of each. Not for: what a step computes.

Shape letters: W workers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SUMMED_AT_ONCE = 1 << 22  # numbers; each takes its memory a few times over while it is sent


class Workers:
    """This training process among all of its strategy's.

    Its methods wait for the other workers: all must call the same ones in the same order.

    Attributes:
        rank: of this one; 0 is the chief.
        count: W.
        devices: replicas in each.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        resolver = strategy.cluster_resolver
        self.rank = int((resolver.task_id if resolver else None) or 0)
        self.devices = len(strategy.extended.worker_devices)  # of this process
        self.count = strategy.num_replicas_in_sync // self.devices

        def once(numbers: tf.Tensor) -> tf.Tensor:
            """Not once for each device."""
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            return tf.where(tf.equal(replica % self.devices, 0), numbers, tf.zeros_like(numbers))

        self._sum = tf.function(
            lambda numbers: strategy.reduce("SUM", strategy.run(once, args=(numbers,)), axis=None)
        )

    def summed(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Sums over all workers of float32, float64 or int32 arrays of one shape; a new array, the same on each."""
        if self.count == 1:
            return numbers.copy()
        flat = numbers.ravel()
        found = np.empty_like(flat)
        for start in range(0, len(flat), SUMMED_AT_ONCE):
            portion = slice(start, start + SUMMED_AT_ONCE)
            found[portion] = self._sum(tf.constant(flat[portion])).numpy()
        return found.reshape(numbers.shape)

    def each(self, number: float) -> list[float]:
        """The number of each worker, by rank."""
        own_W = np.zeros(self.count, np.float64)
        own_W[self.rank] = number
        numbers: list[float] = self.summed(own_W).tolist()
        return numbers

    def gathered(self, content: bytes) -> list[bytes]:
        """The bytes of each worker, by rank."""
        sizes = [int(size) for size in self.each(len(content))]
        ends_W = np.cumsum([-(-size // 4) for size in sizes])  # TensorFlow sums int32, not bytes (2.21)
        together = np.zeros(ends_W[-1], np.int32)
        own = together[ends_W[self.rank] - -(-len(content) // 4) : ends_W[self.rank]]
        own.view(np.uint8)[: len(content)] = np.frombuffer(content, np.uint8)
        begins_W = np.concatenate([[0], ends_W[:-1]])
        parts = self.summed(together).view(np.uint8)
        return [
            parts[4 * begin : 4 * begin + size].tobytes()
            for begin, size in zip(begins_W.tolist(), sizes, strict=True)
        ]
