"""What a run did and what the table holds: totals, the bottleneck, wholeness and the error budget.

Fed with receipts; knows nothing of how they came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from engine.errors import OverBudget, ShardsFailed, TableDamaged
from engine.extraction import Receipt, ShardWork
from engine.parts import PartName, Progress
from engine.recipes import Limits
from engine.storage import Store
from engine.tables import READ_THREADS, count_rejects, list_parts, read_embedding_facts


@dataclass
class RunTotals:
    """Sums over the receipts of one run."""

    parts_written: int = 0
    rows: int = 0
    rejects: int = 0
    bytes_read: int = 0
    stage_s: Counter[str] = field(default_factory=Counter)
    damage: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)

    def start(self, works: Iterable[ShardWork]) -> None:
        """Note the shards that this run set out to complete."""
        self.progress = {work.shard.path: work.existing for work in works}

    def add(self, receipt: Receipt) -> None:
        """Count one committed part, or one failed shard; a receipt seen twice (a task run again) counts once."""
        header = receipt.header
        self.bytes_read += header.bytes_read
        if header.damage is not None:
            self.damage[header.shard] = header.damage
            return
        if header.number in self.progress[header.shard].numbers:
            return
        self.parts_written += 1
        self.rows += receipt.rows
        self.rejects += receipt.rejects
        for stage in ("read", "decode", "embed", "write"):
            self.stage_s[stage] += getattr(header, f"{stage}_s")
        self.progress[header.shard] = self.progress[header.shard].with_part(header.number, header.last)

    @property
    def shards_done(self) -> int:
        """Shards that this run completed."""
        return sum(progress.is_complete for progress in self.progress.values())

    def require_whole(self) -> None:
        """Every shard is complete or says why not; anything else means that a part got lost between the stages."""
        lost = [
            path for path, done in self.progress.items() if not done.is_complete and path not in self.damage
        ]
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


def failed_shards_verdict(damage: dict[str, str], limits: Limits) -> ShardsFailed | None:
    """An error if more shards failed than `limits.max_failed_shards` allows."""
    if len(damage) <= limits.max_failed_shards:
        return None
    shown = [f"{path}: {' '.join(reason.split())}" for path, reason in sorted(damage.items())[:10]]
    more = [f"... and {len(damage) - 10} more"] if len(damage) > 10 else []
    return ShardsFailed(
        f"{len(damage)} shards could not be read to their end; their good parts are kept\n    "
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
    reasons, by_part = count_rejects(table)
    rejects = reasons.total()
    if rejects == 0:
        return reasons, None
    parts = [name for name, _ in list_parts(table)]
    full = sum(rows_per_part for name in parts if not name.last)
    last_parts = [name for name in parts if name.last]
    fewest = full + sum(by_part[name] for name in last_parts)
    most = full + rows_per_part * len(last_parts)
    if (rejects / most > limits.max_reject_fraction) == (rejects / fewest > limits.max_reject_fraction):
        samples = most
    else:
        samples = full + _count_samples(table, last_parts)
    return reasons, _over_budget(reasons, rejects / samples, limits)


def _count_samples(table: Store, names: Iterable[PartName]) -> int:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return sum(pool.map(lambda name: read_embedding_facts(table, name).samples, names))


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
