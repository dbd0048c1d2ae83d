"""The shards that a run has to do, packed: 70 bytes a shard with short names.

Knows nothing of how a shard is read; what is pending is `engine.plan`'s business.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final, overload

from engine.parts import NOTHING, Progress
from engine.storage import ObjectInfo

ALL_SAMPLES = (0, 1)
"""The turn of a shard's only reader."""


@final
@dataclass(frozen=True, slots=True)
class ShardWork:
    """One shard that is not complete, and which of its parts exist.

    Attributes:
        existing: in every table that is filled.
        tables: in each of several, where they differ; else empty.
        turn: (k, n): of its samples those with index k, k + n, k + 2n ..., for one of n readers that share it. Parts
            are counted within those, so that none may exist where n > 1.
    """

    shard: ObjectInfo
    existing: Progress = NOTHING
    tables: tuple[Progress, ...] = ()
    turn: tuple[int, int] = ALL_SAMPLES

    def lacking(self, number: int) -> tuple[int, ...]:
        """Places of the tables that lack a part; empty where all do."""
        return tuple(place for place, one in enumerate(self.tables) if number not in one.numbers)

    def has(self, index: int) -> bool:
        """Whether the sample at that position of the shard is to be read."""
        return index % self.turn[1] == self.turn[0]


@final
class WorkList(Sequence[ShardWork]):
    """Works in the order they were added; a slice is a WorkList of its own, small to pickle."""

    def __init__(self, works: Iterable[ShardWork] = ()) -> None:
        self._texts = bytearray()  # path, identity, path, identity ...
        self._ends = array("Q")  # of each text
        self._sizes = array("Q")
        self._existing: dict[int, Progress] = {}  # of the few that are half done
        self._tables: dict[int, tuple[Progress, ...]] = {}
        self._turns: dict[int, tuple[int, int]] = {}  # of the few that are shared
        self._same: dict[Any, Any] = {}  # one object for all that are equal: there may be as many as shards
        for work in works:
            self.append(work)

    def append(self, work: ShardWork) -> None:
        for text in (work.shard.path, work.shard.identity):
            self._texts += text.encode("utf-8", "surrogateescape")
            self._ends.append(len(self._texts))
        if work.existing != NOTHING:
            self._existing[len(self._sizes)] = self._same.setdefault(work.existing, work.existing)
        if work.tables:
            self._tables[len(self._sizes)] = self._same.setdefault(work.tables, work.tables)
        if work.turn != ALL_SAMPLES:
            self._turns[len(self._sizes)] = work.turn
        self._sizes.append(work.shard.size)

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each shard."""
        return self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, at: int) -> ShardWork: ...

    @overload
    def __getitem__(self, at: slice) -> WorkList: ...

    def __getitem__(self, at: int | slice) -> ShardWork | WorkList:
        if isinstance(at, slice):
            return WorkList(self[position] for position in range(*at.indices(len(self))))
        position = range(len(self))[at]  # negative ones, and the IndexError
        shard = ObjectInfo(self._text(2 * position), self._sizes[position], self._text(2 * position + 1))
        existing, tables = self._existing.get(position, NOTHING), self._tables.get(position, ())
        return ShardWork(shard, existing, tables, self._turns.get(position, ALL_SAMPLES))

    def _text(self, number: int) -> str:
        begin = self._ends[number - 1] if number else 0
        return self._texts[begin : self._ends[number]].decode("utf-8", "surrogateescape")
