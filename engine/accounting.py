"""What a run did and what the table holds: totals, the bottleneck, wholeness and the error budget.

Fed with receipts; knows nothing of how they came about.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from engine.doctor import STAGES
from engine.errors import OverBudget, ShardsFailed, TableDamaged
from engine.extraction import Receipt
from engine.parts import NOTHING, TableProgress, path16_of
from engine.predictor import BundleCounts
from engine.recipes import Limits
from engine.storage import Store
from engine.tables import (
    READ_THREADS,
    count_rejects,
    is_read,
    part_names,
    read_shard_facts,
    table_progress,
    version_to_read,
)
from engine.worklist import ShardWork

FAILURES_KEPT = 100  # with their reasons; the terminal has them all


class ShardsUnderWay:
    """Which of a run's shards have all their parts: 14 bytes a shard, and the parts of those that are half done.

    Args:
        works: what the run set out to complete.
    """

    def __init__(self, works: Sequence[ShardWork] = ()) -> None:
        self._works = works
        keys = np.fromiter((_key_of(work.shard.path) for work in works), np.uint64, len(works))
        self._order = np.argsort(keys).astype(np.uint32)
        self._keys = keys[self._order]
        self._is_done = np.zeros(len(keys), bool)
        self._has_failed = np.zeros(len(keys), bool)
        self.done = self.failed = 0  # that are complete now; that cannot be read to their end
        self._begun = {work.shard.path: work.existing for work in works if work.existing != NOTHING}

    def add(self, path: str, number: int, last: bool) -> bool:
        """Note one part; False if it was there already."""
        at = self._place_of(path)
        before = self._begun.get(path, NOTHING)
        if self._is_done[at] or number in before.numbers:
            return False
        after = before.with_part(number, last)
        if after.is_complete:
            self._is_done[at] = True
            self.done += 1
            self._begun.pop(path, None)
        else:
            self._begun[path] = after
        return True

    def fail(self, path: str) -> None:
        """Note that a shard cannot be read to its end."""
        at = self._place_of(path)
        self.failed += not self._has_failed[at]
        self._has_failed[at] = True

    def lost(self) -> Iterator[str]:
        """Paths of those that are neither."""
        places = self._order[~self._is_done & ~self._has_failed]
        return (self._works[int(place)].shard.path for place in places)

    def _place_of(self, path: str) -> int:
        key = np.uint64(_key_of(path))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise TableDamaged(
                f"a receipt came for {path}, which this run was not to do",
                way_out="this is a defect of the engine; `engine verify` says whether the table is whole",
            )
        return place


def _key_of(path: str) -> int:
    return int(path16_of(path), 16)


@dataclass
class Steady:
    """What came after the first part: start-up is not in it.

    Attributes:
        samples, stage_s: of the parts after the first.
        began, ended: when the first part came, and the last; None before.
    """

    samples: int = 0
    stage_s: Counter[str] = field(default_factory=Counter)
    began: float | None = None
    ended: float | None = None

    def add(self, samples: int, busy: dict[str, float], now: float) -> None:
        if self.began is None:
            self.began = now
            return
        self.ended = now
        self.samples += samples
        self.stage_s.update(busy)

    @property
    def seconds(self) -> float:
        """0 until a second part has come."""
        return self.ended - self.began if self.began is not None and self.ended is not None else 0.0


@dataclass
class RunTotals:
    """Sums over the receipts of one run.

    Attributes:
        bundles: what was written for each that labelled, by its place.
        damage: shard -> why it failed, in one line, of the first FAILURES_KEPT; `shards.failed` counts them all.
    """

    parts_written: int = 0
    rows: int = 0
    rejects: int = 0
    bytes_read: int = 0
    stage_s: Counter[str] = field(default_factory=Counter)
    steady: Steady = field(default_factory=Steady)
    bundles: dict[int, BundleCounts] = field(default_factory=dict)
    damage: dict[str, str] = field(default_factory=dict)
    shards: ShardsUnderWay = field(default_factory=ShardsUnderWay)

    def start(self, works: Sequence[ShardWork]) -> None:
        """Note the shards that this run set out to complete."""
        self.shards = ShardsUnderWay(works)

    def add(self, receipt: Receipt) -> bool:
        """Count one committed part, or one failed shard; a receipt seen twice (a task run again) counts once.

        Returns:
            Whether a part was counted.
        """
        header = receipt.header
        self.bytes_read += header.bytes_read
        if header.damage is not None:
            self.shards.fail(header.shard)
            if len(self.damage) < FAILURES_KEPT:
                self.damage[header.shard] = " ".join(header.damage.split())
            return False
        if not self.shards.add(header.shard, header.number, header.last):
            return False
        self.parts_written += 1
        self.rows += receipt.rows
        self.rejects += receipt.rejects
        for place, counts in receipt.bundles.items():
            self.bundles.setdefault(place, BundleCounts()).add(counts)
        busy = {stage: getattr(header, f"{stage}_s") for stage in STAGES}
        self.stage_s.update(busy)
        self.steady.add(header.samples, busy, time.monotonic())
        return True

    @property
    def shards_done(self) -> int:
        """Shards that this run completed."""
        return self.shards.done

    def require_whole(self) -> None:
        """Every shard is complete or says why not; anything else means that a part got lost between the stages."""
        lost = sorted(self.shards.lost())
        if lost:
            raise TableDamaged(
                f"{len(lost)} shards ended without all their parts, and without a reason",
                found=", ".join(lost[:5]),
                way_out="run the job again: it makes only what is missing; report this as a defect of the engine",
            )

    def bottleneck(self, parallelism: dict[str, float]) -> str | None:
        """The stage that was busy for the largest share of its workers' time.

        Args:
            parallelism: stage -> workers (threads or actors) that it ran on.
        """
        busy = {stage: seconds / parallelism[stage] for stage, seconds in self.stage_s.items() if seconds}
        return max(busy, key=lambda stage: busy[stage]) if busy else None


def failed_shards_verdict(totals: RunTotals, limits: Limits) -> ShardsFailed | None:
    """An error if more shards failed than `limits.max_failed_shards` allows."""
    failed = totals.shards.failed
    if failed <= limits.max_failed_shards:
        return None
    shown = [f"{path}: {reason}" for path, reason in sorted(totals.damage.items())[:10]]
    more = [f"... and {failed - 10} more"] if failed > 10 else []
    return ShardsFailed(
        f"{failed} shards could not be read to their end; their good parts are kept\n    "
        + "\n    ".join(shown + more),
        wanted=f"at most {limits.max_failed_shards} (limits.max_failed_shards)",
        way_out="run again if they were replaced meanwhile; else repair or remove them, or raise the limit: "
        "every run tries them again",
    )


def reject_verdict(
    table: Store, limits: Limits, rows_per_part: int
) -> tuple[Counter[str], OverBudget | None]:
    """Judge the whole table's rejects, written now or before, so that a rerun gives the same verdict.

    Reads rejects files only; footers of `.last` parts are read where their sample counts could turn the verdict.

    Returns:
        Rejects by reason, and the error if they are over the budget.
    """
    progress = table_progress(table)
    reasons, by_part = count_rejects(table, progress)
    rejects = reasons.total()
    if rejects == 0:
        return reasons, None
    full, last = _parts_that_count(progress)
    fewest = full * rows_per_part + sum(count for name, count in by_part.items() if name.last)
    most = (full + last) * rows_per_part
    if (rejects / most > limits.max_reject_fraction) == (rejects / fewest > limits.max_reject_fraction):
        samples = most
    else:
        samples = full * rows_per_part + _samples_in_last_parts(table, progress)
    return reasons, _over_budget(reasons, rejects / samples, limits)


def _parts_that_count(progress: TableProgress) -> tuple[int, int]:
    """Full parts, and last parts of their shards, of the version that readers get."""
    full = last = 0
    for versions in progress.values():
        done = versions[version_to_read(versions)]
        has_last = done.last in done.numbers
        full += len(done.numbers) - has_last
        last += has_last
    return full, last


def _samples_in_last_parts(table: Store, progress: TableProgress) -> int:
    """From their footers; a few at a time, for there is one to each shard."""
    names = (name for name in part_names(table) if name.last and is_read(progress, name))
    samples = 0
    with ThreadPoolExecutor(READ_THREADS) as pool:
        while some := list(itertools.islice(names, 1000)):
            samples += sum(facts.samples for facts in pool.map(partial(read_shard_facts, table), some))
    return samples


def _over_budget(reasons: Counter[str], fraction: float, limits: Limits) -> OverBudget | None:
    listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    rejects = reasons.total()
    if limits.max_rejects is not None and rejects > limits.max_rejects:
        wanted = f"at most {limits.max_rejects:,} (limits.max_rejects)"
    elif fraction > limits.max_reject_fraction:
        wanted = f"at most {limits.max_reject_fraction:.2%} of the samples (limits.max_reject_fraction)"
    else:
        return None
    return OverBudget(
        f"the table has {rejects:,} rejects",
        found=listed,
        wanted=wanted,
        way_out="look into the rejects/ folder; the table itself is whole, and a rerun gives the same verdict",
    )
