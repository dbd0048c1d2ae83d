"""How an extraction is laid out on machines, in cores, GPUs and bytes; what cannot fit is refused with the arithmetic.

Pure: what there is to run on comes in as a value, so that `--plan` and the run agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import ClusterError
from engine.extraction import ENCODED_AHEAD_BYTES
from engine.images import LARGE_IMAGE_PIXELS
from engine.recipes import Compute, Limits

# A reader keeps its core until its shards are read. The rest of that core is for the tasks that write parts: with
# every core taken in full, a writer would wait for a reader that waits for the writer.
READ_TASK_CPUS = 0.95
WRITE_TASK_CPUS = 0.01  # writing a part is waiting for storage

MB = 1_000_000
# Peaks of resident memory that we measured (figures and date: tests/faults/README.md), rounded up.
READER_BASE_BYTES = 250 * MB  # the process, its libraries and its buffers
WRITER_BYTES = 250 * MB
ACTOR_BYTES = 1_500 * MB  # where the table does not say yet what its network takes
ACTOR_HEADROOM = 1.25  # over the peak that the resolve task saw while it loaded and warmed up
DECODE_BYTES_PER_PIXEL = 8  # of the whole image, at the peak of decoding and fitting it


@dataclass(frozen=True)
class Machines:
    """What there is to run on.

    Attributes:
        cpus: logical cores of all nodes.
        gpus: of all nodes.
        largest_node_cpus: cores of the largest node.
        largest_node_gpus: GPUs of the node that has most.
        nodes: number of nodes that have cores.
        memory: bytes for processes, of all nodes.
        object_store: bytes for what travels between processes, of all nodes.
        largest_node_memory: bytes for processes, of the node that has most.
    """

    cpus: float
    gpus: float
    largest_node_cpus: float
    largest_node_gpus: float
    nodes: int
    memory: float = math.inf
    object_store: float = math.inf
    largest_node_memory: float = math.inf


@dataclass(frozen=True)
class Footprint:
    """Bytes that the processes of one extraction take, from its recipe.

    Attributes:
        part: pixels of one full part.
        reader: a process that reads and decodes; its largest image included.
        actor: a process that holds the backbone.
    """

    part: int
    reader: int
    actor: int


def footprint(
    compute: Compute, limits: Limits, rows_per_part: int, input_size: int, actor_peak: int | None
) -> Footprint:
    """Estimate, or take what the recipe says.

    Args:
        input_size: pixels, side of the network's input.
        actor_peak: bytes that an actor was seen to take; None: not known yet.
    """
    part = rows_per_part * input_size**2 * 3
    one_large_image = limits.max_pixels * DECODE_BYTES_PER_PIXEL
    other_images = (decode_threads(compute) - 1) * LARGE_IMAGE_PIXELS * DECODE_BYTES_PER_PIXEL
    pixels = one_large_image + min(other_images, (decode_threads(compute) - 1) * one_large_image)
    # A part that is being filled and one that is being handed on.
    reader = READER_BASE_BYTES + 2 * part + pixels + ENCODED_AHEAD_BYTES + limits.max_sample_bytes
    actor = math.ceil(actor_peak * ACTOR_HEADROOM) if actor_peak is not None else ACTOR_BYTES
    return Footprint(
        part=part,
        reader=compute.memory_per_reader or reader,
        actor=compute.memory_per_actor or actor,
    )


@dataclass(frozen=True)
class Sizing:
    """How an extraction is laid out on machines; every `null` of the recipe's `compute` resolved.

    Attributes:
        actors: at most; as many as fit are started at once.
        min_actors: the run begins when these are there.
        start_actors: asked for at the start: as many as the machines hold now.
        actor_cpus, actor_gpus: what one actor reserves.
        embed_threads: threads one actor computes with.
        decode_tasks: readers at once, each reserving one core together with the writers.
        decode_threads: in each reader.
        footprint: bytes of each kind of process.
    """

    actors: int
    min_actors: int
    start_actors: int
    actor_cpus: float
    actor_gpus: float
    embed_threads: int
    decode_tasks: int
    decode_threads: int
    footprint: Footprint

    @property
    def writers(self) -> int:
        """Tasks that write parts at once: each is a process to start, and one keeps up with several actors."""
        return max(2, self.start_actors)

    @property
    def cpus_reserved(self) -> float:
        """Cores, by all of it together."""
        return self.start_actors * self.actor_cpus + self.decode_tasks

    @property
    def bytes_in_all(self) -> int:
        """Of all processes together."""
        needs = self.footprint
        return (
            self.start_actors * needs.actor + self.decode_tasks * needs.reader + self.writers * WRITER_BYTES
        )

    @property
    def bytes_in_flight(self) -> int:
        """Of parts between the stages, at most: an actor computes on one while another waits, and so on."""
        return (2 * self.actors + 4 * self.decode_tasks + 4) * self.footprint.part

    def decoders(self, read_tasks: int, bytes_total: int) -> int:
        """Tasks that only decode, where shards are so few and so large that readers alone leave cores idle."""
        spare = self.decode_tasks - read_tasks
        return spare if spare > 0 and read_tasks and bytes_total > read_tasks * SPLIT_SHARD_BYTES else 0


SPLIT_SHARD_BYTES = 32 << 20  # below that a shard is decoded before another task has started


def decode_threads(compute: Compute) -> int:
    """Threads that decode in each reader."""
    return compute.decode_threads or 2


def size_up(compute: Compute, machines: Machines, needs: Footprint) -> Sizing:
    """Resolve the recipe's `compute` for these machines.

    Without `cpus_per_actor` an actor reserves one core, but computes with its share of the node: where there is no
    GPU, decoding and the forward pass share the cores, and the operating system divides them better than we can.
    """
    at_least, at_most = compute.actors.min, compute.actors.max
    actor_cpus = compute.cpus_per_actor if compute.cpus_per_actor is not None else 1.0
    start = max(at_least, min(at_most, _actors_that_fit(compute, actor_cpus, machines, needs)))
    share = compute.cpus_per_actor or machines.largest_node_cpus / math.ceil(start / max(1, machines.nodes))
    free_cpus = int(machines.cpus - start * actor_cpus)
    free_memory = machines.memory - start * needs.actor - max(2, start) * WRITER_BYTES
    readers = min(free_cpus, free_memory // needs.reader)
    return Sizing(
        actors=at_most,
        min_actors=at_least,
        start_actors=start,
        actor_cpus=actor_cpus,
        actor_gpus=compute.gpus_per_actor,
        embed_threads=max(1, int(share)),
        decode_tasks=compute.decode_tasks or max(1, int(readers)),
        decode_threads=decode_threads(compute),
        footprint=needs,
    )


def _actors_that_fit(compute: Compute, actor_cpus: float, machines: Machines, needs: Footprint) -> int:
    """Beside one reader; without GPUs they take no more than half of the cores, or nobody would feed them."""
    by_memory = (machines.memory - needs.reader - 2 * WRITER_BYTES) // (needs.actor + WRITER_BYTES)
    if compute.gpus_per_actor:
        by_gpu = machines.gpus // compute.gpus_per_actor
        return int(min(by_gpu, (machines.cpus - 1) // actor_cpus, by_memory, 1 << 20))
    return int(min(machines.cpus // 2 // actor_cpus, by_memory, 1 << 20))


def check_room(sizing: Sizing, machines: Machines, can_grow: bool) -> str | None:
    """Refuse a layout that these machines can never hold.

    Returns:
        A warning where they are a cluster that may yet grow; None where all is well.

    Raises:
        ClusterError: with the arithmetic.
    """
    needs = sizing.footprint
    actors = f"{sizing.min_actors} actors x"
    claims = [
        (
            f"CPUs: {sizing.min_actors * sizing.actor_cpus + 1:g} = {actors} {sizing.actor_cpus:g} + 1 for a reader",
            sizing.min_actors * sizing.actor_cpus + 1 > machines.cpus,
            "compute.actors or compute.cpus_per_actor",
        ),
        (
            f"GPUs: {sizing.min_actors * sizing.actor_gpus:g} = {actors} {sizing.actor_gpus:g}",
            sizing.min_actors * sizing.actor_gpus > machines.gpus,
            "compute.actors or compute.gpus_per_actor",
        ),
        _memory_claim(sizing, machines),
        (
            f"memory of one node: {_gb(max(needs.actor, needs.reader))} for one "
            f"{'actor' if needs.actor > needs.reader else 'reader'}",
            max(needs.actor, needs.reader) > machines.largest_node_memory,
            "compute.memory_per_actor, limits.max_pixels or output.rows_per_part",
        ),
        (
            f"object store: {_gb(sizing.min_actors * 2 * needs.part)} = {actors} 2 parts x {_gb(needs.part)} of pixels",
            sizing.min_actors * 2 * needs.part > machines.object_store,
            "output.rows_per_part or compute.actors",
        ),
    ]
    unmet = [(claim, lower) for claim, is_unmet, lower in claims if is_unmet]
    if not unmet:
        return None
    found = f"{machines.cpus:g} CPUs, {machines.gpus:g} GPUs, memory {_gb(machines.memory)} "
    found += f"(at most {_gb(machines.largest_node_memory)} on one node), "
    found += f"object store {_gb(machines.object_store)}"
    wanted = "; ".join(claim for claim, _ in unmet)
    if can_grow:
        return f"the cluster has {found} now, and needs {wanted}: waiting for it to grow"
    raise ClusterError(
        "this machine cannot hold what the recipe asks for",
        found=found,
        wanted=wanted,
        way_out=f"lower {' or '.join(lower for _, lower in unmet)}, or give the compute.address of a cluster",
    )


def _memory_claim(sizing: Sizing, machines: Machines) -> tuple[str, bool, str]:
    needs = sizing.footprint
    terms = [
        (sizing.min_actors, "actors", needs.actor),
        (sizing.decode_tasks, "readers", needs.reader),
        (sizing.writers, "writers", WRITER_BYTES),
    ]
    total = sum(count * size for count, _, size in terms)
    arithmetic = " + ".join(f"{count} {name} x {_gb(size)}" for count, name, size in terms)
    lower = (
        "limits.max_pixels (an image may take 8 bytes a pixel), output.rows_per_part or compute.decode_tasks"
    )
    return f"memory: {_gb(total)} = {arithmetic}", total > machines.memory, lower


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
