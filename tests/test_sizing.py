"""How a run is laid out on machines, in cores and bytes, and what is refused."""

import math
from dataclasses import replace

import pytest

from engine.errors import ClusterError, RecipeError
from engine.recipes import ActorRange, Compute, Limits
from engine.sizing import (
    Footprint,
    Machines,
    Sizing,
    WorkerShare,
    check_room,
    footprint,
    share_of_workers,
    size_up,
)
from engine.strategies.kinds import AnyStrategyConfig, Mirrored, MultiWorker, OneDevice

GB = 10**9
NEEDS = Footprint(part=64_000_000, reader=2 * GB, reader_at_least=GB, actor=2 * GB)


def node(cpus: float = 8, gpus: float = 0, memory: float = 100 * GB, store: float = 30 * GB) -> Machines:
    return Machines.of_one_node(cpus=cpus, gpus=gpus, memory=memory, object_store=store)


def test_actors_of_a_node_share_its_cores() -> None:
    sizing = size_up(Compute(actors=ActorRange(min=2, max=2)), node(), NEEDS)
    assert (sizing.embed_threads, sizing.decode_tasks, sizing.cpus_reserved) == (4, 6, 8)
    three_nodes = Machines(cpus=24, gpus=0, largest_node_cpus=8, largest_node_gpus=0, nodes=3)
    assert size_up(Compute(actors=ActorRange(min=4, max=4)), three_nodes, NEEDS).embed_threads == 4
    fixed = Compute(actors=ActorRange(min=1, max=1), cpus_per_actor=5, decode_tasks=2, decode_threads=3)
    assert size_up(fixed, node(), NEEDS).cpus_reserved == 7


def test_one_core_is_enough() -> None:
    sizing = size_up(Compute(), node(cpus=1), NEEDS)
    assert (sizing.embed_threads, sizing.decode_tasks, sizing.cpus_reserved) == (1, 1, 2)
    assert check_room(sizing, node(cpus=1), can_grow=False) is None
    assert "CPUs: 2 = 1 actors x 1" in str(check_room(sizing, node(cpus=1), can_grow=True))  # of a cluster


def test_what_no_node_of_a_cluster_can_hold_is_said() -> None:
    cluster = Machines(cpus=8, gpus=4, largest_node_cpus=2, largest_node_gpus=1, nodes=4)
    for compute in (Compute(cpus_per_actor=4), Compute(gpus_per_actor=2)):
        assert "waiting for it to grow" in str(check_room(layout(compute, cluster), cluster, can_grow=True))
    assert check_room(layout(Compute(gpus_per_actor=1), cluster), cluster, can_grow=True) is None


def test_readers_leave_room_for_an_actor_on_some_node() -> None:
    cluster = Machines(
        cpus=8, gpus=0, largest_node_cpus=4, largest_node_gpus=0, nodes=2, memory=8 * GB, object_store=8 * GB
    )
    needs = Footprint(part=1, reader=int(2.4 * GB), reader_at_least=GB, actor=2 * GB)
    assert size_up(Compute(), cluster, needs).decode_tasks == 1


def test_where_memory_is_short_readers_do_without_the_largest_image_and_that_is_said() -> None:
    small = node(cpus=4, memory=3.6 * GB)
    sizing = layout(Compute(), small)
    assert (sizing.reader_bytes, sizing.decode_tasks) == (GB, 1)
    assert "limits.max_pixels" in str(check_room(sizing, small, can_grow=False))


def test_there_are_no_more_readers_than_memory_for_them() -> None:
    assert size_up(Compute(), node(cpus=32, memory=100 * GB), NEEDS).decode_tasks == 31
    assert size_up(Compute(), node(cpus=32, memory=13 * GB), NEEDS).decode_tasks == 5
    assert size_up(Compute(), node(cpus=32, memory=3 * GB), NEEDS).decode_tasks == 1


@pytest.mark.parametrize(
    ("machines", "gpus_per_actor", "start"),
    [
        (node(cpus=16, gpus=3), 0.5, 6),
        (node(cpus=16, gpus=8), 1, 6),
        (node(cpus=4, gpus=8), 1, 3),
        (node(cpus=16, gpus=8, memory=8 * GB), 1, 2),
        (node(cpus=16), 0, 6),
        (node(cpus=8), 0, 4),
        (node(cpus=1), 0, 2),
        (node(cpus=16, gpus=math.inf, memory=math.inf), 1, 6),
        (node(cpus=6, gpus=math.inf), 0.5, 5),
    ],
)
def test_a_pool_starts_with_as_many_actors_as_there_is_room_for(
    machines: Machines, gpus_per_actor: float, start: int
) -> None:
    compute = Compute(actors=ActorRange(min=2, max=6), gpus_per_actor=gpus_per_actor)
    sizing = size_up(compute, machines, NEEDS)
    assert (sizing.min_actors, sizing.start_actors, sizing.actors) == (2, start, 6)


def test_a_number_of_actors_is_that_number() -> None:
    sizing = size_up(Compute(actors=ActorRange(min=5, max=5)), node(cpus=2), NEEDS)
    assert (sizing.min_actors, sizing.start_actors, sizing.actors) == (5, 5, 5)


def test_the_largest_image_and_two_parts_are_in_the_bytes_of_a_reader() -> None:
    def reader(**limits: int) -> int:
        return footprint(Compute(), Limits(**limits), 100, 100, None).reader  # type: ignore[arg-type]

    assert reader() - reader(max_pixels=78_956_970) == 8 * 10**8
    assert reader(max_sample_bytes=1000) - reader(max_sample_bytes=10) == 990
    needs = footprint(Compute(), Limits(), 100, 100, 10**9)
    assert (needs.part, needs.actor) == (3_000_000, 1_250_000_000)
    given = Compute(memory_per_actor=5, memory_per_reader=6)
    assert footprint(given, Limits(), 100, 100, 10**9) == Footprint(
        part=3_000_000, reader=6, reader_at_least=6, actor=5
    )


def test_an_actor_has_room_for_its_heads_while_they_are_loaded() -> None:
    def actor(head_bytes: int, compute: Compute | None = None) -> int:
        return footprint(compute or Compute(), Limits(), 100, 100, 10**9, head_bytes).actor

    assert actor(0) == 1_250_000_000
    assert actor(5_120_000_000) == 31_970_000_000  # a million rows of 1,280 numbers, six times
    assert actor(5_120_000_000, Compute(memory_per_actor=7 * GB)) == 7 * GB


def layout(compute: Compute, machines: Machines) -> Sizing:
    return size_up(compute, machines, NEEDS)


def test_what_fits_is_not_refused() -> None:
    assert check_room(layout(Compute(), node()), node(), can_grow=False) is None


@pytest.mark.parametrize(
    ("compute", "machines", "arithmetic"),
    [
        (Compute(gpus_per_actor=2), node(gpus=1), "GPUs: 2 = 1 actors x 2"),
        (
            Compute(actors=ActorRange(min=2, max=2), decode_tasks=3),
            node(memory=6.5 * GB),
            "memory: 7.00 GB = 2 actors x 2.00 GB \\+ 3 readers x 1.00 GB\n",
        ),
        (
            Compute(actors=ActorRange(min=2, max=2), gpus_per_actor=1, decode_tasks=3),
            node(memory=7 * GB, gpus=2),
            "memory: 7.50 GB = 2 actors x 2.00 GB \\+ 3 readers x 1.00 GB \\+ 2 writers x 0.25 GB",
        ),
        (
            Compute(),
            replace(node(), largest_node_memory=1.5 * GB),
            "memory of one node: 2.00 GB for one reader",
        ),
        (
            Compute(actors=ActorRange(min=2, max=2)),
            node(store=0.2 * GB),
            "object store: 0.26 GB = 2 actors x 2 parts x 0.06 GB",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_arithmetic(
    compute: Compute, machines: Machines, arithmetic: str
) -> None:
    sizing = layout(compute, machines)
    with pytest.raises(ClusterError, match=arithmetic):
        check_room(sizing, machines, can_grow=False)
    assert "waiting for it to grow" in str(check_room(sizing, machines, can_grow=True))


def test_gpus_that_nobody_has_looked_for_are_not_told() -> None:
    here = node(gpus=math.inf, memory=GB)
    with pytest.raises(ClusterError) as refused:
        check_room(layout(Compute(), here), here, can_grow=False)
    assert "8 CPUs, memory 1.00 GB" in str(refused.value) and "inf" not in str(refused.value)


def test_a_few_large_shards_are_decoded_by_more_tasks_than_they_are() -> None:
    sizing = layout(Compute(), node(cpus=16))
    assert sizing.decode_tasks == 15
    assert sizing.decoders(4, 40 * GB) == 11
    assert sizing.decoders(15, 40 * GB) == 0  # as many as readers: each decodes what it reads
    assert sizing.decoders(4, 40_000) == 0  # too small to be worth it
    assert sizing.decoders(0, 0) == 0


def test_small_parts_leave_room_for_every_running_task() -> None:
    """Ray Data counts at least 2 MiB for each task, whatever it hands on; less room would leave actors unfed."""
    small = size_up(Compute(actors=ActorRange(min=4, max=4)), node(), replace(NEEDS, part=200_000))
    tasks = small.start_actors + small.decode_tasks + small.writers
    assert small.bytes_in_flight >= tasks * (2 << 20)
    assert layout(Compute(), node()).bytes_in_flight % NEEDS.part == 0  # of usual parts: what they take


def test_actors_are_a_number_or_a_range() -> None:
    assert Compute.model_validate({"actors": 3}).actors == ActorRange(min=3, max=3)
    assert Compute.model_validate({"actors": {"max": 3}}).actors == ActorRange(min=1, max=3)
    for wrong in (0, True, "many", {"min": 3, "max": 2}, {}):
        with pytest.raises(ValueError, match="actors"):
            Compute.model_validate({"actors": wrong})


def test_training_workers_share_nodes_evenly() -> None:
    def share(strategy: AnyStrategyConfig, cpus: list[float], gpus: list[float]) -> WorkerShare:
        machines = Machines(
            cpus=sum(cpus),
            gpus=sum(gpus),
            largest_node_cpus=max(cpus),
            largest_node_gpus=max(gpus),
            nodes=len(cpus),
            node_cpus=tuple(cpus),
            node_gpus=tuple(gpus),
        )
        return share_of_workers(strategy, machines)

    def workers(count: int, devices: int | None = None) -> MultiWorker:
        return MultiWorker(kind="multi_worker", workers=count, devices_per_worker=devices)

    no_gpus = [0.0, 0.0]
    assert share(OneDevice(), [8, 4], no_gpus) == WorkerShare(7, 0)
    assert share(Mirrored(), [8, 4], [4, 0]) == WorkerShare(1, 4)
    assert share(Mirrored(devices_per_worker=2), [8, 4], [4, 0]) == WorkerShare(1, 2)
    assert share(workers(2), [8, 4], no_gpus) == WorkerShare(4, 0)
    assert share(workers(3), [8, 4], no_gpus) == WorkerShare(4, 0)
    assert share(workers(4), [8, 4], no_gpus) == WorkerShare(2, 0)
    assert share(workers(13), [8, 4], no_gpus) == WorkerShare(1, 0, fits=False)
    assert share(workers(2), [8, 8], [4, 2]) == WorkerShare(1, 2)
    assert share(workers(2, devices=4), [8, 8], [4, 2]) == WorkerShare(1, 4, fits=False)
    assert share(workers(7), [8, 8], [4, 2]) == WorkerShare(1, 1, fits=False)
    with pytest.raises(RecipeError, match="no node has as many"):
        share(workers(2, devices=8), [8, 8], [4, 2])
