"""Which shards a training worker decodes where images are split between workers. Imports nothing heavy; not for:
which images a step takes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from engine.worklist import ShardWork, WorkList

# A shard of more than this part of a worker's fair share is decoded by several, each of which has to read it.
PIECES_PER_WORKER = 4


def shares_of_workers(works: Sequence[ShardWork], workers: int) -> list[WorkList]:
    """What each of the workers decodes: every sample of every shard once, and about as many bytes as the others.

    Largest shards first, each to the workers that have least. How many samples a shard has is not known before it is
    read, so bytes stand for them. No worker is left without a piece of a shard.

    Args:
        works: in the same order on every worker; none of their parts exist.
        workers: how many.
    """
    fair = sum(_weight(work) for work in works) / workers
    pieces = [min(workers, math.ceil(PIECES_PER_WORKER * _weight(work) / fair)) for work in works]
    sizes = [_weight(work) / count for work, count in zip(works, pieces, strict=True)]
    loads = [0.0] * workers
    given: list[list[tuple[int, ShardWork]]] = [[] for _ in range(workers)]
    for place in sorted(range(len(works)), key=lambda place: -sizes[place]):
        least = heapq.nsmallest(pieces[place], range(workers), key=loads.__getitem__)
        for turn, worker in enumerate(least):
            loads[worker] += sizes[place]
            given[worker].append((place, replace(works[place], turn=(turn, pieces[place]))))
    return [WorkList(work for _, work in sorted(own, key=lambda one: one[0])) for own in given]


def bytes_of(works: Sequence[ShardWork]) -> int:
    """Of those samples that are decoded."""
    return sum(work.shard.size // work.turn[1] for work in works)


def _weight(work: ShardWork) -> int:
    return max(1, work.shard.size)
