"""How extraction and training are laid out on machines, in cores, GPUs and bytes; what cannot fit is said in figures.

Pure: what there is to run on comes in as a value, so that `--plan` and the run agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine.errors import ClusterError, RecipeError
from engine.extraction import ENCODED_AHEAD_BYTES
from engine.images import LARGE_IMAGE_PIXELS
from engine.recipes import Compute, Limits
from engine.strategies.kinds import AnyStrategyConfig, MultiWorker, OneDevice

# A reader keeps its core until its shards are read. The rest of that core is for the tasks that write parts: with
# every core taken in full, a writer would wait for a reader that waits for the writer.
READ_TASK_CPUS = 0.95
WRITE_TASK_CPUS = 0.01  # writing a part is waiting for storage

MB = 1_000_000
# Resident memory, rounded up: processes that read or write small images were seen with 200 to 250 MB, an actor with
# MobileNetV2 with 850 (2026-11-22). What compiles the resize is 150 more where images are decoded, 70 of them not
# shared with other processes.
READER_BASE_BYTES = 400 * MB  # the process, its libraries and its buffers
WRITER_BYTES = 250 * MB
ACTOR_BYTES = 1_500 * MB  # where the table does not say yet what its network takes
ACTOR_HEADROOM = 1.25  # over the peak that the resolve task saw while it loaded and warmed up
# A knn head whose file had 413 MB took 2,424 MB while Keras loaded it, and 1,249 from then on (Keras 3.15, 2026-11-23).
HEAD_COPIES = 6
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
        node_cpus, node_gpus: cores and GPUs of each node.
    """

    cpus: float
    gpus: float
    largest_node_cpus: float
    largest_node_gpus: float
    nodes: int
    memory: float = math.inf
    object_store: float = math.inf
    largest_node_memory: float = math.inf
    node_cpus: tuple[float, ...] = ()
    node_gpus: tuple[float, ...] = ()

    @staticmethod
    def of_one_node(cpus: float, gpus: float, memory: float, object_store: float) -> Machines:
        """One machine, with all that it has."""
        return Machines(
            cpus=cpus,
            gpus=gpus,
            largest_node_cpus=cpus,
            largest_node_gpus=gpus,
            nodes=1,
            memory=memory,
            object_store=object_store,
            largest_node_memory=memory,
            node_cpus=(cpus,),
            node_gpus=(gpus,),
        )


@dataclass(frozen=True)
class Footprint:
    """Bytes that the processes of one extraction take, from its recipe.

    Attributes:
        part: pixels of one full part.
        reader: a process that reads and decodes; an image of `limits.max_pixels` included.
        reader_at_least: the same with no image above LARGE_IMAGE_PIXELS: what most archives need.
        actor: a process that holds the backbone, and the heads that label behind it.
    """

    part: int
    reader: int
    reader_at_least: int
    actor: int


def footprint(
    compute: Compute,
    limits: Limits,
    rows_per_part: int,
    input_size: int,
    actor_peak: int | None,
    head_bytes: int = 0,
) -> Footprint:
    """Estimate, or take what the recipe says.

    Args:
        input_size: pixels, side of the network's input.
        actor_peak: bytes that an actor was seen to take, before any head; None: not known yet.
        head_bytes: of the files of the heads that each actor loads besides.
    """
    part = rows_per_part * input_size**2 * 3
    image = min(limits.max_pixels, LARGE_IMAGE_PIXELS) * DECODE_BYTES_PER_PIXEL
    large_image = limits.max_pixels * DECODE_BYTES_PER_PIXEL  # one at a time
    # A part that is being filled and one that is being handed on.
    others = READER_BASE_BYTES + 2 * part + (decode_threads(compute) - 1) * image + ENCODED_AHEAD_BYTES
    reader = others + large_image + limits.max_sample_bytes
    actor = math.ceil(actor_peak * ACTOR_HEADROOM) if actor_peak is not None else ACTOR_BYTES
    actor += HEAD_COPIES * head_bytes
    return Footprint(
        part=part,
        reader=compute.memory_per_reader or reader,
        reader_at_least=compute.memory_per_reader or others + image,
        actor=compute.memory_per_actor or actor,
    )


@dataclass(frozen=True)
class Sizing:
    """How an extraction is laid out on machines; every `null` of the recipe's `compute` resolved.

    Attributes:
        actors: at most; as many as fit are started at once.
        min_actors: the pool never has fewer.
        start_actors: asked for at the start: as many as the machines hold now.
        actor_cpus, actor_gpus: what one actor reserves.
        embed_threads: threads one actor computes with.
        decode_tasks: readers at once, each reserving one core together with the writers.
        decode_threads: in each reader.
        reader_bytes: what each reader reserves.
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
    reader_bytes: int
    footprint: Footprint

    @property
    def writers(self) -> int:
        """Tasks that write parts at once; none without GPUs: there actors write, too, beside their next part."""
        return _writers(self.actor_gpus, self.start_actors)

    @property
    def cpus_reserved(self) -> float:
        """Cores, by all of it together."""
        return self.start_actors * self.actor_cpus + self.decode_tasks

    @property
    def bytes_in_all(self) -> int:
        """Of all processes together."""
        needs = self.footprint
        return (
            self.start_actors * needs.actor
            + self.decode_tasks * self.reader_bytes
            + self.writers * WRITER_BYTES
        )

    @property
    def bytes_in_flight(self) -> int:
        """Of parts between the stages, at most: an actor computes on one while another waits, and so on; enough for the
        largest pool of actors that the recipe allows."""
        part = max(self.footprint.part, SMALL_PART_BYTES)
        return (2 * self.actors + 4 * self.decode_tasks + 4) * part

    def decoders(self, read_tasks: int, bytes_total: int) -> int:
        """Tasks that only decode, where shards are so few and so large that readers alone leave cores idle."""
        spare = self.decode_tasks - read_tasks
        return spare if spare > 0 and read_tasks and bytes_total > read_tasks * SPLIT_SHARD_BYTES else 0


# Ray Data sets some room aside for every running task, however little that hands on: with parts of 0.2 MB counted as
# such, two of four actors were never fed.
SMALL_PART_BYTES = 8 << 20
SPLIT_SHARD_BYTES = 32 << 20  # below that a shard is decoded before another task has started


def _writers(gpus_per_actor: float, actors: int) -> int:
    """Each is a process to start, and one keeps up with several actors. On the cores that actors compute with it would
    only be one more to share them."""
    return max(2, actors) if gpus_per_actor else 0


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
    writers = _writers(compute.gpus_per_actor, start)
    free_memory = machines.memory - start * needs.actor - writers * WRITER_BYTES
    # A process takes its memory from one node, and what is left over there may be too little for another: readers that
    # took every last byte could leave an actor that is to be started again without a place.
    free_memory -= max(0, machines.nodes - 1) * min(needs.actor, needs.reader)
    fits = free_memory >= needs.reader * (compute.decode_tasks or 1)
    reader_bytes = needs.reader if fits else needs.reader_at_least
    readers = min(free_cpus, _times(free_memory, reader_bytes))
    return Sizing(
        actors=at_most,
        min_actors=at_least,
        start_actors=start,
        actor_cpus=actor_cpus,
        actor_gpus=compute.gpus_per_actor,
        embed_threads=max(1, int(share)),
        decode_tasks=compute.decode_tasks or max(1, int(readers)),
        decode_threads=decode_threads(compute),
        reader_bytes=reader_bytes,
        footprint=needs,
    )


def _actors_that_fit(compute: Compute, actor_cpus: float, machines: Machines, needs: Footprint) -> int:
    """Beside one reader; without GPUs they take no more than half of the cores, or nobody would feed them."""
    free_memory = machines.memory - needs.reader_at_least
    if compute.gpus_per_actor:
        by_memory = _times(free_memory - 2 * WRITER_BYTES, needs.actor + WRITER_BYTES)
        by_gpu = _times(machines.gpus, compute.gpus_per_actor)
        return int(min(by_gpu, _times(machines.cpus - 1, actor_cpus), by_memory))
    return int(min(_times(machines.cpus // 2, actor_cpus), _times(free_memory, needs.actor)))


def _times(available: float, each: float) -> float:
    """How often `each` is in it; of infinity Python says that this is not a number."""
    return available if math.isinf(available) else available // each


def check_room(sizing: Sizing, machines: Machines, can_grow: bool, *, are_pods: bool = False) -> str | None:
    """Refuse a layout that these machines can never hold.

    Cores are not refused where Ray is local: it is told of as many as are asked for, and they are shared.

    Args:
        are_pods: the machines are pods of a cluster that is yet to be made, at their most.

    Returns:
        A warning where they are a cluster that may yet grow, or where an image of `limits.max_pixels` would be too
        much; None where all is well.

    Raises:
        ClusterError: with the arithmetic.
    """
    unmet = [claim for claim in _claims(sizing, machines, can_grow or are_pods) if claim.is_unmet]
    if not unmet:
        return _large_image_warning(sizing)
    gpus = "" if math.isinf(machines.gpus) else f"{machines.gpus:g} GPUs, "  # nobody has looked for them yet
    found = f"{machines.cpus:g} CPUs, {gpus}memory {_gb(machines.memory)} "
    found += f"(at most {_gb(machines.largest_node_memory)} on one node), "
    found += f"object store {_gb(machines.object_store)}"
    wanted = "; ".join(claim.arithmetic for claim in unmet)
    if can_grow:
        return f"the cluster has {found} now, and needs {wanted}: waiting for it to grow (a fixed cluster: Ctrl-C)"
    raise ClusterError(
        f"{'these pods' if are_pods else 'this machine'} cannot hold what the recipe asks for",
        found=found,
        wanted=wanted,
        way_out=f"lower {'; '.join(dict.fromkeys(claim.lower for claim in unmet))}; or "
        + ("give more or larger pods" if are_pods else "give the compute.address of a cluster"),
    )


class _Claim(NamedTuple):
    arithmetic: str
    is_unmet: bool
    lower: str  # what to lower


def _claims(sizing: Sizing, machines: Machines, is_cluster: bool) -> Iterator[_Claim]:
    needs, least = sizing.footprint, sizing.min_actors
    actors = f"{least} actors x"
    if is_cluster:
        yield _Claim(
            f"CPUs: {least * sizing.actor_cpus + 1:g} = {actors} {sizing.actor_cpus:g} + 1 for a reader",
            least * sizing.actor_cpus + 1 > machines.cpus or sizing.actor_cpus > machines.largest_node_cpus,
            "compute.actors or compute.cpus_per_actor",
        )
    yield _Claim(
        f"GPUs: {least * sizing.actor_gpus:g} = {actors} {sizing.actor_gpus:g}",
        least * sizing.actor_gpus > machines.gpus or sizing.actor_gpus > machines.largest_node_gpus,
        "compute.actors or compute.gpus_per_actor",
    )
    terms = [
        (least, "actors", needs.actor),
        (sizing.decode_tasks, "readers", sizing.reader_bytes),
        (sizing.writers, "writers", WRITER_BYTES),
    ]
    total = sum(count * size for count, _, size in terms)
    lower = "compute.memory_per_actor, compute.memory_per_reader (what they are believed to need), compute.decode_tasks"
    yield _Claim(
        f"memory: {_gb(total)} = "
        + " + ".join(f"{count} {name} x {_gb(size)}" for count, name, size in terms if count),
        total > machines.memory,
        lower,
    )
    largest, who = max((needs.actor, "actor"), (sizing.reader_bytes, "reader"))
    yield _Claim(
        f"memory of one node: {_gb(largest)} for one {who}",
        largest > machines.largest_node_memory,
        lower,
    )
    yield _Claim(
        f"object store: {_gb(least * 2 * needs.part)} = {actors} 2 parts x {_gb(needs.part)} of pixels",
        least * 2 * needs.part > machines.object_store,
        "output.rows_per_part (of a new table) or compute.actors",
    )


def _large_image_warning(sizing: Sizing) -> str | None:
    if sizing.reader_bytes >= sizing.footprint.reader:
        return None
    return (
        f"readers reserve {_gb(sizing.reader_bytes)} each; an image of limits.max_pixels can take one to "
        f"{_gb(sizing.footprint.reader)}, which is not there"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


@dataclass(frozen=True)
class WorkerShare:
    """What each training worker is given.

    Attributes:
        cpus, gpus: of the cluster's.
        fits: whether the nodes that are there have room for all workers.
    """

    cpus: float
    gpus: float
    fits: bool = True


def share_of_workers(strategy: AnyStrategyConfig, machines: Machines) -> WorkerShare:
    """The most that a training's workers can have; a machine with GPUs has cores enough beside them.

    Raises:
        RecipeError: a node has fewer GPUs than one worker is to have.
    """
    if not isinstance(strategy, MultiWorker):
        wanted = 1 if isinstance(strategy, OneDevice) else strategy.devices_per_worker
        gpus = min(wanted or machines.largest_node_gpus, machines.largest_node_gpus)
        return WorkerShare(1.0 if gpus else max(1.0, machines.largest_node_cpus - 1), float(gpus))
    if not machines.gpus:
        cpus = _most_for_each(machines.node_cpus, strategy.workers)
        return WorkerShare(float(max(1, cpus)), 0.0, fits=cpus > 0)
    wanted = strategy.devices_per_worker
    if wanted and wanted > machines.largest_node_gpus:
        raise RecipeError(
            f"strategy.devices_per_worker: {wanted} GPUs for each worker, but no node has as many",
            found=f"at most {machines.largest_node_gpus:.0f} on one node",
            way_out="ask for fewer and for more workers",
        )
    gpus = wanted or max(1, _most_for_each(machines.node_gpus, strategy.workers))
    return WorkerShare(1.0, float(gpus), fits=_room(machines.node_gpus, gpus) >= strategy.workers)


def share_of_workers_here(strategy: AnyStrategyConfig, machine: Machines, cpus: float) -> WorkerShare:
    """The same on one machine with a Ray of its own, which is told of more cores than there are.

    Args:
        cpus: that there are.

    Raises:
        RecipeError: there is no room for the workers, and nothing will come to it.
    """
    share = share_of_workers(strategy, machine)
    if not share.fits:
        raise RecipeError(
            f"strategy.workers: no room for {strategy.workers} workers on this machine",
            found=f"{share.gpus:.0f} GPUs for each were wanted",
            way_out="ask for fewer workers or devices, or submit the job to a cluster",
        )
    return replace(share, cpus=min(share.cpus, max(1.0, cpus // strategy.workers)))


def _most_for_each(amounts: Sequence[float], workers: int) -> int:
    """The most, in whole numbers, of which nodes with these amounts have one for each worker; 0: not even 1."""
    most = int(max(amounts, default=0))
    return next((each for each in range(most, 0, -1) if _room(amounts, each) >= workers), 0)


def _room(amounts: Sequence[float], each: int) -> int:
    return sum(int(amount // each) for amount in amounts)
