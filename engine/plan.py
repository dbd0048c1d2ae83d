"""From two listings to what is pending, and in which read tasks; refuses to prune too much.

Pure: listings come in, values go out, so that `--plan` and the run agree. What it runs on: `engine.sizing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from engine.errors import PruneRefused
from engine.parts import NOTHING, Progress, TableProgress, hash8_of, path16_of
from engine.storage import ObjectInfo
from engine.worklist import ShardWork, WorkList

READ_TASK_BYTES = 256 << 20  # small shards share a read task up to this many bytes: a task costs about 10 ms
READ_TASK_SHARDS = 1000
MAX_READ_TASKS = 10_000  # each is known to the driver by some kilobytes


@dataclass(frozen=True)
class PendingShards:
    """Inputs minus outputs.

    Attributes:
        shards_total: shards that the source lists.
        shards_done: of those, complete in the table.
        shards_older: of those, neither complete nor to be done now: they came before the time that was asked for.
        works: the others, in the order of their paths.
        replaced: shards whose table parts belong to another version of the object.
        removed: shards in a table that the source no longer lists (by path16; names are hashes).
        regrouped: of those, taken out of `removed`: groups whose files are in another group now.
        bytes_total: size of all pending shards.
        shards_in_table: of which the table has parts; of several, the one that has most.
    """

    shards_total: int
    shards_done: int
    works: WorkList
    replaced: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_total: int
    shards_in_table: int
    regrouped: frozenset[str] = frozenset()
    shards_older: int = 0


def pending_shards(
    shards: Iterable[ObjectInfo],
    progress: TableProgress,
    *others: TableProgress,
    since: float | None = None,
) -> PendingShards:
    """Set difference of a listing of the source and a listing of the table; nothing is kept of shards that are done.

    Args:
        others: of further tables that are filled with the same parts; a shard is done when it is whole in all of them.
        since: leave out shards that came before that, in seconds since 1970 UTC, of which no table has anything; such
            whose time is not known stay.
    """
    works = WorkList()
    replaced: list[str] = []
    tables = [_Sighted(one) for one in (progress, *others)]
    total = older = 0
    for shard in shards:
        total += 1
        path16, version = path16_of(shard.path), hash8_of(shard.identity)
        versions = [table.versions(path16) for table in tables]
        if any(other != version for found in versions for other in found):
            replaced.append(shard.path)
        each = tuple(found.get(version, NOTHING) for found in versions)
        existing = each[0] if len(each) == 1 else Progress.in_all(each)
        if existing.is_complete:
            continue
        is_begun = any(versions)  # half done, or replaced: left alone it would stay half done for ever
        if since is not None and not is_begun and shard.modified is not None and shard.modified < since:
            older += 1
        else:
            works.append(ShardWork(shard, existing, each if len(set(each)) > 1 else ()))
    return PendingShards(
        shards_total=total,
        shards_done=total - len(works) - older,
        works=works,
        replaced=tuple(replaced),
        removed=tuple(dict.fromkeys(path16 for table in tables for path16 in table.not_seen())),
        bytes_total=sum(works.sizes),
        shards_in_table=max(len(table.progress) for table in tables),
        shards_older=older,
    )


class _Sighted:
    """A table's progress, and which of its shards the source has."""

    def __init__(self, progress: TableProgress) -> None:
        self.progress, self._is_seen = progress, np.zeros(len(progress), bool)

    def versions(self, path16: str) -> Mapping[str, Progress]:
        """What there is of a shard, which the source has."""
        at = self.progress.position(path16)
        if at is None:
            return {}
        self._is_seen[at] = True
        return self.progress.at(at)

    def not_seen(self) -> Iterator[str]:
        """path16 of the others."""
        return (path16 for path16, seen in zip(self.progress, self._is_seen, strict=True) if not seen)


def read_tasks(works: WorkList, min_tasks: int) -> list[WorkList]:
    """Group shards into read tasks of about equal bytes; large shards get a task of their own.

    Args:
        min_tasks: readers that could run at once; no group is made so large that some of them stay idle.
    """
    total_bytes = sum(works.sizes)
    group_bytes = min(READ_TASK_BYTES, max(1, total_bytes // max(1, 4 * min_tasks)))
    group_bytes = max(group_bytes, total_bytes // MAX_READ_TASKS)
    groups: list[WorkList] = []
    group = WorkList()
    size = 0
    for work in works:
        if group and (size + work.shard.size > group_bytes or len(group) == READ_TASK_SHARDS):
            groups.append(group)
            group, size = WorkList(), 0
        group.append(work)
        size += work.shard.size
    return [*groups, group] if group else groups


MAX_PRUNED_FRACTION = 0.1


def may_prune(shards_in_table: int, up_to: int | None) -> int:
    """How many shards may be pruned: so many, or a tenth of the table."""
    return up_to if up_to is not None else int(MAX_PRUNED_FRACTION * shards_in_table)


def check_prune(pending: PendingShards, up_to: int | None) -> None:
    """Refuse to prune what looks like a mistake: a wrong source, a pattern that became narrower.

    Args:
        up_to: shards that may be pruned; None: a tenth of the table.

    Raises:
        PruneRefused: there are more.
    """
    removed = len(pending.removed)
    allowed = may_prune(pending.shards_in_table, up_to)
    if removed > allowed:
        raise PruneRefused(
            f"pruning would remove {removed:,} of the table's {pending.shards_in_table:,} shards",
            found=f"{pending.shards_total:,} shards in the source",
            wanted=f"at most {allowed:,} to remove"
            + ("" if up_to is not None else f" ({MAX_PRUNED_FRACTION:.0%} of the table)"),
            way_out=f"check source.uri and source.pattern; if it is meant: --prune-up-to {removed}",
        )
