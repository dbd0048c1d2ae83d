"""From a recipe and two listings to what will run, with numbers; refuses before anything starts.

Pure: listings come in, values go out. What the cluster offers is passed in, so that `--plan` and the run agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.errors import PruneRefused
from engine.extraction import ShardWork
from engine.parts import Progress, TableProgress, hash8_of, path16_of
from engine.recipes import Compute
from engine.storage import ObjectInfo

READ_TASK_BYTES = 256 << 20  # small shards share a read task up to this many bytes: a task costs about 10 ms
READ_TASK_SHARDS = 1000
# A reader keeps its core until its shards are read. The rest of that core is for the tasks that write parts: with
# every core taken in full, a writer would wait for a reader that waits for the writer.
READ_TASK_CPUS = 0.95
WRITE_TASK_CPUS = 0.01  # writing a part is waiting for storage


@dataclass(frozen=True)
class PendingShards:
    """Inputs minus outputs.

    Attributes:
        shards_total: shards that the source lists.
        shards_done: of those, complete in the table.
        works: the others, in the order of their paths.
        replaced: shards whose table parts belong to another version of the object.
        removed: shards in the table that the source no longer lists (by path16; names are hashes).
        regrouped: of those, taken out of `removed`: groups whose files are in another group now.
        bytes_total: size of all pending shards.
        path_of: path16 -> relative path of every listed shard.
        shards_in_table: of which the table has parts.
    """

    shards_total: int
    shards_done: int
    works: tuple[ShardWork, ...]
    replaced: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_total: int
    path_of: dict[str, str]
    shards_in_table: int
    regrouped: frozenset[str] = frozenset()


def pending_shards(shards: Iterable[ObjectInfo], progress: TableProgress) -> PendingShards:
    """Set difference of a listing of the source and a listing of the table."""
    works: list[ShardWork] = []
    replaced: list[str] = []
    path_of: dict[str, str] = {}
    for shard in shards:
        path16, version = path16_of(shard.path), hash8_of(shard.identity)
        path_of[path16] = shard.path
        versions = progress.get(path16, {})
        existing = versions.get(version, Progress())
        if not existing.is_complete:
            works.append(ShardWork(shard, existing))
        if any(other != version for other in versions):
            replaced.append(shard.path)
    return PendingShards(
        shards_total=len(path_of),
        shards_done=len(path_of) - len(works),
        works=tuple(works),
        replaced=tuple(replaced),
        removed=tuple(path16 for path16 in progress if path16 not in path_of),
        bytes_total=sum(work.shard.size for work in works),
        path_of=path_of,
        shards_in_table=len(progress),
    )


def read_tasks(works: Sequence[ShardWork], min_tasks: int) -> list[tuple[ShardWork, ...]]:
    """Group shards into read tasks of about equal bytes; large shards get a task of their own.

    Args:
        min_tasks: readers that could run at once; no group is made so large that some of them stay idle.
    """
    total_bytes = sum(work.shard.size for work in works)
    group_bytes = min(READ_TASK_BYTES, max(1, total_bytes // max(1, 4 * min_tasks)))
    groups: list[tuple[ShardWork, ...]] = []
    group: list[ShardWork] = []
    size = 0
    for work in works:
        if group and (size + work.shard.size > group_bytes or len(group) == READ_TASK_SHARDS):
            groups.append(tuple(group))
            group, size = [], 0
        group.append(work)
        size += work.shard.size
    return [*groups, tuple(group)] if group else groups


MAX_PRUNED_FRACTION = 0.1


def check_prune(pending: PendingShards, up_to: int | None) -> None:
    """Refuse to prune what looks like a mistake: a wrong source, a pattern that became narrower.

    Args:
        up_to: shards that may be pruned; None: a tenth of the table.

    Raises:
        PruneRefused: there are more.
    """
    removed = len(pending.removed)
    allowed = up_to if up_to is not None else int(MAX_PRUNED_FRACTION * pending.shards_in_table)
    if removed > allowed:
        raise PruneRefused(
            f"pruning would remove {removed:,} of the table's {pending.shards_in_table:,} shards",
            found=f"{pending.shards_total:,} shards in the source",
            wanted=f"at most {allowed:,} to remove"
            + ("" if up_to is not None else f" ({MAX_PRUNED_FRACTION:.0%} of the table)"),
            way_out=f"check source.uri and source.pattern; if it is meant: --prune-up-to {removed}",
        )


@dataclass(frozen=True)
class Machines:
    """What there is to run on.

    Attributes:
        cpus: logical cores of all nodes.
        gpus: of all nodes.
        largest_node_cpus: cores of the largest node.
        largest_node_gpus: GPUs of the node that has most.
        nodes: number of nodes that have cores.
    """

    cpus: float
    gpus: float
    largest_node_cpus: float
    largest_node_gpus: float
    nodes: int


@dataclass(frozen=True)
class Sizing:
    """How an extraction is laid out on machines; every `null` of the recipe's `compute` resolved.

    Attributes:
        actor_cpus, actor_gpus: what one actor reserves.
        embed_threads: threads one actor computes with.
        decode_tasks: readers at once, each reserving one core together with the writers.
        decode_threads: in each reader.
        cpus_reserved: by all of it together.
    """

    actors: int
    actor_cpus: float
    actor_gpus: float
    embed_threads: int
    decode_tasks: int
    decode_threads: int

    @property
    def writers(self) -> int:
        """Tasks that write parts at once: each is a process to start, and one keeps up with several actors."""
        return max(2, self.actors)

    @property
    def cpus_reserved(self) -> float:
        return self.actors * self.actor_cpus + self.decode_tasks


def size_up(compute: Compute, machines: Machines) -> Sizing:
    """Resolve the recipe's `compute` for these machines.

    Without `cpus_per_actor` an actor reserves one core, but computes with its share of the node: where there is no
    GPU, decoding and the forward pass share the cores, and the operating system divides them better than we can.
    """
    actor_cpus = compute.cpus_per_actor if compute.cpus_per_actor is not None else 1.0
    actors_per_node = math.ceil(compute.actors / max(1, machines.nodes))
    share = compute.cpus_per_actor or machines.largest_node_cpus / actors_per_node
    free_cpus = int(machines.cpus - compute.actors * actor_cpus)
    return Sizing(
        actors=compute.actors,
        actor_cpus=actor_cpus,
        actor_gpus=compute.gpus_per_actor,
        embed_threads=max(1, int(share)),
        decode_tasks=compute.decode_tasks or max(1, free_cpus),
        decode_threads=compute.decode_threads or 2,
    )
