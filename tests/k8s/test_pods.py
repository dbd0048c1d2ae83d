"""Pods for a job, by hand-computed figures; and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.errors import ClusterError, RecipeError
from engine.kubernetes.pods import (
    GIB,
    MIB,
    PodGroup,
    Wish,
    extraction_pods,
    machines_of,
    scoring_pods,
    training_pods,
)
from engine.recipes import Compute
from engine.sizing import Footprint, share_of_workers, size_up
from engine.strategies.kinds import Mirrored, MultiWorker, OneDevice

NEEDS = Footprint(part=60 * MIB, reader=2 * GIB, reader_at_least=GIB, actor=3 * GIB)


def test_without_gpus_each_pod_has_an_actor_beside_readers() -> None:
    plan = extraction_pods(Wish(cpus=8, workers=3), Compute(), NEEDS, None)
    (group,) = plan.groups
    assert (group.name, group.at_least, group.at_most, group.cpus, group.gpus) == ("cpu", 3, 3, 8, 0)
    assert group.memory == (3 + 7 * 2 + 2) * GIB  # an actor, readers, and room for one more process
    assert group.object_store == (2 + 4 * 7 + 4) * 60 * MIB
    assert group.limit == group.memory + group.object_store + 256 * MIB + GIB
    assert plan.settings == {
        "compute.actors.min": 1,
        "compute.actors.max": 3,
        "compute.decode_tasks": 21,
    }
    assert plan.note is None


def test_with_gpus_each_pod_of_theirs_has_an_actor_for_each_gpu() -> None:
    plan = extraction_pods(Wish(cpus=16, workers=5, gpus=6, gpus_per_pod=2), Compute(), NEEDS, None)
    cpu, gpu = plan.groups
    assert (cpu.at_least, cpu.at_most, cpu.gpus) == (1, 5, 0)
    assert (gpu.at_least, gpu.at_most, gpu.gpus) == (3, 3, 2)
    assert gpu.memory - 2 * GIB == 2 * 3 * GIB + 477 * MIB + 14 * 2 * GIB  # 250 MB for each writer
    assert plan.settings == {
        "compute.gpus_per_actor": 1,
        "compute.actors.min": 1,
        "compute.actors.max": 6,
        "compute.decode_tasks": 5 * 16 + 3 * 14,
    }


def test_a_night_takes_gpus_only_when_an_actor_asks_for_one() -> None:
    cpu, gpu = extraction_pods(Wish(gpus=2), Compute(), NEEDS, None, may_be_idle=True).groups
    assert (cpu.at_least, gpu.at_least, gpu.at_most) == (1, 0, 2)


def test_actors_without_gpus_are_one_on_each_pod_with_all_its_cores() -> None:
    """As the job lays them out on the pods that it finds at its start."""
    plan = extraction_pods(Wish(cpus=8, workers=3), Compute(), NEEDS, None)
    compute = Compute(actors={"min": 1, "max": 3}, decode_tasks=21)  # type: ignore[arg-type]
    at_start = tuple(replace(group, at_most=group.at_least) for group in plan.groups)
    sizing = size_up(compute, machines_of(at_start), NEEDS)
    assert (sizing.start_actors, sizing.embed_threads) == (3, 8)


def test_what_the_recipe_says_is_kept() -> None:
    compute = Compute(actors={"min": 2, "max": 2}, decode_tasks=5)  # type: ignore[arg-type]
    assert extraction_pods(Wish(cpus=8, workers=3), compute, NEEDS, None).settings == {}
    half = extraction_pods(Wish(cpus=8, gpus=1), Compute(gpus_per_actor=0.5), NEEDS, None)
    assert half.settings["compute.actors.max"] == 2
    assert "compute.gpus_per_actor" not in half.settings


@pytest.mark.parametrize(
    ("read_tasks", "pods", "readers"), [(0, 1, 1), (5, 1, 5), (15, 3, 15), (1000, 9, 63)]
)
def test_there_are_no_more_pods_than_there_is_to_read(read_tasks: int, pods: int, readers: int) -> None:
    plan = extraction_pods(Wish(cpus=8, workers=9), Compute(), NEEDS, read_tasks)
    assert (plan.groups[0].at_most, plan.settings["compute.decode_tasks"]) == (pods, readers)


def test_the_job_finds_in_these_pods_what_they_were_sized_for() -> None:
    """The pods as Ray's nodes: all actors and readers fit, each reader with an image of limits.max_pixels."""
    for wish in (Wish(cpus=8, workers=3), Wish(cpus=16, workers=5, gpus=6, gpus_per_pod=2)):
        plan = extraction_pods(wish, Compute(), NEEDS, None)
        compute = Compute(
            actors={"min": 1, "max": plan.settings["compute.actors.max"]},  # type: ignore[arg-type]
            decode_tasks=plan.settings["compute.decode_tasks"],
            gpus_per_actor=1 if wish.gpus else 0,
        )
        sizing = size_up(compute, machines_of(plan.groups), NEEDS)
        assert sizing.start_actors == plan.settings["compute.actors.max"]
        assert sizing.reader_bytes == NEEDS.reader


@pytest.mark.parametrize(
    ("wish", "compute", "said"),
    [
        (Wish(memory=6 * GIB), Compute(), "cannot hold its processes"),
        (Wish(memory=3 * GIB), Compute(), "nothing is left"),
        (Wish(cpus=2, workers=1), Compute(actors=4), "CPUs: 5 = 4 actors"),  # type: ignore[arg-type]
        (Wish(cpus=8, workers=1), Compute(decode_tasks=400), "memory"),
        (Wish(cpus=8, workers=2), Compute(cpus_per_actor=12), "CPUs: 13"),
        (Wish(), Compute(gpus_per_actor=1), "there are no GPUs"),
        (Wish(gpus=2), Compute(gpus_per_actor=2), "no pod has as many"),
    ],
)
def test_what_the_pods_cannot_hold_is_refused(wish: Wish, compute: Compute, said: str) -> None:
    with pytest.raises((ClusterError, RecipeError)) as refused:
        extraction_pods(wish, compute, NEEDS, None)
    assert said in str(refused.value)
    assert "way out" in str(refused.value)


def test_gpus_that_do_not_fill_pods_are_refused() -> None:
    with pytest.raises(RecipeError, match="--gpus 6"):
        Wish(gpus=6, gpus_per_pod=4)


def shape(groups: tuple[PodGroup, ...]) -> list[tuple[str, int, int, int]]:
    return [(group.name, group.at_least, group.at_most, group.gpus) for group in groups]


def test_a_training_has_a_pod_for_each_worker() -> None:
    wish = Wish(cpus=8, workers=3)
    assert shape(training_pods(wish, Mirrored(), with_readers=False).groups) == [("cpu", 1, 1, 0)]
    # Fine-tuning counts cores for its readers once: what comes later would be idle.
    assert shape(training_pods(wish, Mirrored(), with_readers=True).groups) == [("cpu", 3, 3, 0)]
    several = MultiWorker(kind="multi_worker", workers=2)
    assert shape(training_pods(wish, several, with_readers=False).groups) == [("cpu", 3, 3, 0)]
    gpus = Wish(cpus=8, workers=3, gpus=4)
    assert shape(training_pods(gpus, Mirrored(), with_readers=False).groups) == [
        ("cpu", 1, 1, 0),
        ("gpu", 1, 1, 4),
    ]
    assert shape(training_pods(gpus, Mirrored(), with_readers=True).groups) == [
        ("cpu", 3, 3, 0),
        ("gpu", 1, 1, 4),
    ]
    plan = training_pods(Wish(gpus=4, gpus_per_pod=2), several, with_readers=False)
    assert shape(plan.groups) == [("cpu", 1, 1, 0), ("gpu", 2, 2, 2)]
    assert share_of_workers(several, machines_of(plan.groups)).gpus == 2


@pytest.mark.parametrize(
    ("wish", "strategy", "said"),
    [
        (Wish(gpus=2), OneDevice(), "uses one"),
        (Wish(gpus=3), MultiWorker(kind="multi_worker", workers=2), "--gpus 2"),
        (Wish(gpus=1), Mirrored(devices_per_worker=2), "no pod has as many GPUs"),
    ],
)
def test_gpus_that_a_training_cannot_use_are_refused(wish: Wish, strategy: Mirrored, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        training_pods(wish, strategy, with_readers=False)
    assert said in str(refused.value)


def test_scoring_has_cores_alone_and_no_more_than_parts() -> None:
    assert shape(scoring_pods(Wish(cpus=8, workers=4), None).groups) == [("cpu", 4, 4, 0)]
    assert shape(scoring_pods(Wish(cpus=8, workers=4), 17).groups) == [("cpu", 3, 3, 0)]
    with pytest.raises(RecipeError, match="runs on CPUs"):
        scoring_pods(Wish(gpus=1), None)
