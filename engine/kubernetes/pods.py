"""Pods for a job, from its recipe and from what a person wants to spend; what they could never hold is refused.

Pure: listings and recipes come in as values. The arithmetic of processes is that of `engine.sizing`, which the job
itself goes by when it runs in these pods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.errors import ClusterError, RecipeError
from engine.recipes import ActorRange, Compute
from engine.sizing import WRITER_BYTES, Footprint, Machines, check_room, size_up
from engine.strategies.kinds import AnyStrategyConfig, MultiWorker, OneDevice

GIB = 1 << 30
MIB = 1 << 20
# A raylet, its two agents and its log monitor were seen with 0.32 GB together, a worker that waits with 0.22 (Ray 2.60,
# 2026-11-23).
POD_OVERHEAD_BYTES = GIB
SHM_SPARE_BYTES = 256 * MIB  # of /dev/shm beside the object store: TensorFlow's collectives use it, too
# Where nothing says what a job's processes take. Of 32 GiB, as machines of 8 cores have, GKE leaves 28.3 to pods
# (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes), and 7 cores take 23.2 of them.
DEFAULT_BYTES_PER_CPU = 3_400 * MIB
WORKER, GPU = "cpu", "gpu"  # names of the groups


@dataclass(frozen=True)
class Wish:
    """What a person wants to spend on a job.

    Attributes:
        cpus: cores of each worker pod. One less than the machine has, which keeps some of one for itself: a pod of 8 is
            placed on no machine of 8.
        workers: pods without GPUs, at most.
        gpus: in all, at most.
        gpus_per_pod: of each pod that has some.
        memory: bytes of each worker pod for everything; None: what its processes need.
        scratch: bytes of each worker pod on its node's disk: objects that do not fit memory, files of training.
    """

    cpus: int = 7
    workers: int = 4
    gpus: int = 0
    gpus_per_pod: int = 1
    memory: int | None = None
    scratch: int = 20 * GIB

    def __post_init__(self) -> None:
        if self.gpus % self.gpus_per_pod:
            raise RecipeError(
                f"--gpus {self.gpus}: pods of {self.gpus_per_pod} GPUs cannot have as many in all",
                wanted=f"a multiple of --gpus-per-pod {self.gpus_per_pod}",
            )

    @property
    def gpu_pods(self) -> int:
        """At most."""
        return self.gpus // self.gpus_per_pod


@dataclass(frozen=True)
class PodGroup:
    """Equal worker pods.

    Attributes:
        name: of the group.
        at_least, at_most: pods; between them Ray's autoscaler goes by the work.
        cpus, gpus: of each pod.
        memory: bytes of each for the processes of the job.
        object_store: bytes of each for what travels between processes.
        scratch: bytes of each on disk.
    """

    name: str
    at_least: int
    at_most: int
    cpus: int
    gpus: int
    memory: int
    object_store: int
    scratch: int

    @property
    def limit(self) -> int:
        """Bytes of one pod: /dev/shm counts as memory."""
        return self.memory + self.object_store + SHM_SPARE_BYTES + POD_OVERHEAD_BYTES


@dataclass(frozen=True)
class PodPlan:
    """The pods of a job, and what its recipe has to say so that it fills them.

    Attributes:
        groups: of worker pods.
        settings: fields of the recipe by their path, with whole numbers.
        note: what a person should know; None: nothing.
    """

    groups: tuple[PodGroup, ...]
    settings: dict[str, int] = field(default_factory=dict)
    note: str | None = None


def machines_of(groups: tuple[PodGroup, ...]) -> Machines:
    """What there is when every group has its most pods, as the job will see it."""
    pods = [group for group in groups for _ in range(group.at_most)]
    return Machines(
        cpus=sum(pod.cpus for pod in pods),
        gpus=sum(pod.gpus for pod in pods),
        largest_node_cpus=max(pod.cpus for pod in pods),
        largest_node_gpus=max(pod.gpus for pod in pods),
        nodes=len(pods),
        memory=sum(pod.memory for pod in pods),
        object_store=sum(pod.object_store for pod in pods),
        largest_node_memory=max(pod.memory for pod in pods),
        node_cpus=tuple(float(pod.cpus) for pod in pods),
        node_gpus=tuple(float(pod.gpus) for pod in pods),
    )


def extraction_pods(
    wish: Wish, compute: Compute, needs: Footprint, read_tasks: int | None, *, may_be_idle: bool = False
) -> PodPlan:
    """Pods for an extraction: readers on cores of all pods; an actor for each GPU, else for each pod.

    Args:
        compute: of the recipe; what it says is kept.
        read_tasks: there are to do; None: nobody has looked, and there are as many as there are cores for.
        may_be_idle: often there is nothing to do, as on most nights: GPUs come when an actor asks for one.

    Raises:
        RecipeError: GPUs, actors and pods do not go together.
        ClusterError: the pods cannot hold the processes.
    """
    gpus_per_actor = compute.gpus_per_actor or (1.0 if wish.gpus else 0.0)
    if gpus_per_actor and not wish.gpus:
        raise RecipeError(
            f"compute.gpus_per_actor is {gpus_per_actor:g}, but there are no GPUs",
            way_out="give --gpus N, or --set compute.gpus_per_actor=0",
        )
    if gpus_per_actor > wish.gpus_per_pod:
        raise RecipeError(
            f"compute.gpus_per_actor is {gpus_per_actor:g}: no pod has as many",
            found=f"pods of {wish.gpus_per_pod}",
            way_out=f"--gpus-per-pod {gpus_per_actor:g}",
        )
    actor_cpus = compute.cpus_per_actor if compute.cpus_per_actor is not None else 1.0
    actors_each = int(wish.gpus_per_pod / gpus_per_actor) if gpus_per_actor else _actors_each(wish, compute)
    readers_each = max(1, int(wish.cpus - actors_each * actor_cpus))
    pods = wish.workers
    if read_tasks is not None:  # as many pods as there is something to read for; one even for nothing
        beside_gpus = wish.gpu_pods * readers_each
        wanted = math.ceil((read_tasks - beside_gpus) / (wish.cpus if gpus_per_actor else readers_each))
        pods = min(pods, max(1, wanted))
    readers_alone = wish.cpus if gpus_per_actor else readers_each
    held = _held(needs, 0 if gpus_per_actor else actors_each, readers_alone, False)
    # Actors are laid out on the pods that there are when the job starts: without GPUs these are all from the beginning,
    # or the first would hold every actor.
    groups = [_group(wish, WORKER, 1 if gpus_per_actor else pods, pods, 0, held)]
    if gpus_per_actor:
        held = _held(needs, actors_each, readers_each, True)
        at_least = 0 if may_be_idle else wish.gpu_pods
        groups.append(_group(wish, GPU, at_least, wish.gpu_pods, wish.gpus_per_pod, held))
    actors = _actors(compute, wish.gpu_pods * actors_each if gpus_per_actor else pods * actors_each)
    readers = (
        compute.decode_tasks or pods * readers_alone + bool(gpus_per_actor) * wish.gpu_pods * readers_each
    )
    if read_tasks is not None and compute.decode_tasks is None:
        readers = max(1, min(readers, read_tasks))
    settled = compute.model_copy(
        update={"gpus_per_actor": gpus_per_actor, "actors": actors, "decode_tasks": readers}
    )
    machines = machines_of(tuple(groups))
    sizing = size_up(settled, machines, needs)
    note = check_room(sizing, machines, can_grow=False, are_pods=True)
    return PodPlan(tuple(groups), _differences(compute, settled), note)


def _actors_each(wish: Wish, compute: Compute) -> int:
    """Actors of one pod without GPUs: one, unless the recipe wants more than there are pods."""
    return max(1, math.ceil(_actors(compute, wish.workers).max / wish.workers))


def _actors(compute: Compute, that_fit: int) -> ActorRange:
    """Those of the recipe if it says how many, else from one to as many as there is room for."""
    return compute.actors if "actors" in compute.model_fields_set else ActorRange(min=1, max=that_fit)


def _differences(compute: Compute, settled: Compute) -> dict[str, int]:
    """What the recipe does not say by itself, as paths of `--set`."""
    settings: dict[str, int] = {}
    if settled.gpus_per_actor != compute.gpus_per_actor:
        settings["compute.gpus_per_actor"] = int(settled.gpus_per_actor)
    if settled.actors != compute.actors:
        settings |= {"compute.actors.min": settled.actors.min, "compute.actors.max": settled.actors.max}
    if settled.decode_tasks != compute.decode_tasks:
        settings["compute.decode_tasks"] = int(settled.decode_tasks or 1)
    return settings


@dataclass(frozen=True)
class _Held:
    """Bytes of the processes of one pod, at least and with large images, and of what travels between them."""

    at_least: int
    memory: int
    in_flight: int


def _held(needs: Footprint, actors: int, readers: int, with_writers: bool) -> _Held:
    """Actors and readers of one pod; each reader with room for an image of `limits.max_pixels`."""
    fixed = actors * (needs.actor + with_writers * WRITER_BYTES)
    in_flight = (2 * actors + 4 * readers + 4) * needs.part
    # And one more process: what a lost one leaves behind on each node is no place for another (`size_up`).
    spare = min(needs.actor, needs.reader)
    return _Held(fixed + needs.reader_at_least, fixed + readers * needs.reader + spare, in_flight)


def _group(wish: Wish, name: str, at_least: int, at_most: int, gpus: int, held: _Held) -> PodGroup:
    store = max(GIB, _whole(held.in_flight))
    memory = _whole(held.memory) if wish.memory is None else _left(wish.memory, store)
    if memory < held.at_least:
        raise ClusterError(
            f"--memory-gib {(wish.memory or 0) / GIB:g}: a pod of the group {name!r} cannot hold its processes",
            found=f"{memory / GIB:.1f} GiB beside Ray and its objects",
            wanted=f"{held.at_least / GIB:.1f} GiB for its actors and one reader",
            way_out="give more, or leave it out",
        )
    return PodGroup(name, at_least, at_most, wish.cpus, gpus, memory, store, wish.scratch)


def _left(memory: int, store: int) -> int:
    """Of a pod's memory, for the processes of the job."""
    left = memory - store - SHM_SPARE_BYTES - POD_OVERHEAD_BYTES
    if left <= 0:
        raise RecipeError(
            f"--memory-gib {memory / GIB:g}: nothing is left for the job",
            found=f"{store / GIB:.1f} GiB for objects and {POD_OVERHEAD_BYTES / GIB:.0f} for Ray",
            way_out="give more, or fewer --cpus",
        )
    return left


def _whole(size: int) -> int:
    """In whole mebibytes: what a person reads in a manifest."""
    return math.ceil(size / MIB) * MIB


def training_pods(wish: Wish, strategy: AnyStrategyConfig, *, with_readers: bool) -> PodPlan:
    """Pods for a training: one for each of its workers, and beside them those that decode images.

    Args:
        with_readers: images are decoded on the cluster's cores, as fine-tuning does; it counts them once, so that all
            pods are there from the start.

    Raises:
        RecipeError: GPUs and training workers do not go together.
    """
    if isinstance(strategy, OneDevice) and wish.gpus > 1:
        raise RecipeError(
            f"--gpus {wish.gpus}: strategy one_device uses one", way_out="--gpus 1, or mirrored"
        )
    trainers, each = strategy.workers, wish.gpus_per_pod
    if wish.gpus and not isinstance(strategy, MultiWorker):
        trainers, each = 1, wish.gpus  # one process: its GPUs are of one pod
    if wish.gpus and trainers * each != wish.gpus:
        raise RecipeError(
            f"--gpus {wish.gpus}: {trainers} training workers (strategy.workers) with {each} each are others",
            way_out=f"--gpus {trainers * each}, or another --gpus-per-pod",
        )
    wanted = None if isinstance(strategy, OneDevice) else strategy.devices_per_worker
    if wish.gpus and wanted and wanted > each:
        raise RecipeError(
            f"strategy.devices_per_worker is {wanted}: no pod has as many GPUs",
            found=f"{each} in each pod",
            way_out="give more --gpus, or lower it",
        )
    default = _default_group(wish, WORKER, 1, 0)
    if wish.gpus:
        trained = _default_group(wish, GPU, trainers, each, fixed=True)
        beside = _default_group(wish, WORKER, wish.workers, 0, fixed=True) if with_readers else default
        return PodPlan((beside, trained))
    if trainers == 1:
        return PodPlan(
            (_default_group(wish, WORKER, wish.workers, 0, fixed=True) if with_readers else default,)
        )
    # One more than there are workers: Ray Train's own controller and the readers need a place, too.
    return PodPlan((_default_group(wish, WORKER, trainers + 1, 0, fixed=True),))


def scoring_pods(wish: Wish, parts: int | None) -> PodPlan:
    """Pods for scoring from embeddings: a scorer for each core.

    Args:
        parts: there are to score; None: nobody has looked.

    Raises:
        RecipeError: GPUs are asked for, which scoring does not use.
    """
    if wish.gpus:
        raise RecipeError(
            f"--gpus {wish.gpus}: scoring from embeddings runs on CPUs", way_out="leave --gpus out"
        )
    pods = wish.workers if parts is None else min(wish.workers, max(1, math.ceil(parts / wish.cpus)))
    return PodPlan((_default_group(wish, WORKER, pods, 0, fixed=True),))


def _default_group(wish: Wish, name: str, at_most: int, gpus: int, *, fixed: bool = False) -> PodGroup:
    """Of a job whose processes nobody has measured.

    Args:
        fixed: all pods from the start: the job counts the cores that there are once, when it starts.
    """
    memory, store = wish.memory or wish.cpus * DEFAULT_BYTES_PER_CPU, 2 * GIB
    return PodGroup(
        name, at_most if fixed else 1, at_most, wish.cpus, gpus, _left(memory, store), store, wish.scratch
    )
