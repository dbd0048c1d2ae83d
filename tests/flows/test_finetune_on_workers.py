"""Fine-tuned by two workers on two nodes: as by one device, though one is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.heads.bundle import open_bundle
from engine.storage import open_store
from tests.clusters import open_cluster
from tests.commands import Engine
from tests.flows.archives import write_recipe, write_shards

RECIPE = """
source:   {{kind: webdataset, uri: "{folder}/shards", label: cls}}
backbone: {{kind: efficientnet_lite0, input_size: 64}}
unfreeze: {{top_layers: 12}}
split:    {{train: 0.6, validation: 0.2, test: 0.2}}
head:     {{kind: mlp, hidden: [8], dropout: 0.2}}
head_phase: {{training: {{epochs: 2}}}}
augment:  {{crop: 0.3, cutmix: 0.5}}
optimizer: {{learning_rate: 0.001}}
training: {{epochs: 3, batch_size: 7, checkpoint_seconds: 0}}
publish:  always
output:   {{uri: "{folder}/{name}"}}
strategy: {strategy}
"""


def recipe(folder: Path, name: str, strategy: str) -> Path:
    return write_recipe(folder, f"{name}.yaml", RECIPE.format(folder=folder, name=name, strategy=strategy))


def losses_of(bundle: Path) -> list[list[float]]:
    training = open_bundle(open_store(str(bundle))).document("metrics")["training"]
    return [
        [epoch["train_loss"], epoch["validation_loss"]]
        for phase in ("head", "backbone")
        for epoch in training[phase]["history"]
    ]


def finetune_and_be_killed(
    recipe_path: Path, pids: Path
) -> Callable[[Callable[[dict[str, Any]], None]], dict[str, Any] | None]:
    """A training worker whose chief kills the second one at the end of the backbone's second epoch, once."""
    from engine.config import load_recipe
    from jobs.finetune import FinetuneRecipe, _look

    loaded = load_recipe(FinetuneRecipe, recipe_path)
    works, bundle_id = _look(loaded)

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        from jobs.finetune import finetune_on_worker

        rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        (pids / str(rank)).write_text(str(os.getpid()))

        def report_and_kill(epoch: dict[str, Any]) -> None:
            report(epoch)
            mark = pids / "killed"
            if (epoch["phase"], epoch["epoch"]) == ("backbone", 2) and not mark.exists():
                mark.touch()
                os.kill(int((pids / "1").read_text()), signal.SIGKILL)
                time.sleep(60)  # the victim ends this one, or Ray does

        return finetune_on_worker(loaded, works, bundle_id, 1, report_and_kill)

    return body


def test_two_workers_of_which_one_is_killed_train_as_one_device_does(
    tmp_path: Path, engine_process: Engine
) -> None:
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    write_shards(open_store(str(tmp_path / "shards")), shards=4, images=15)
    two = recipe(tmp_path, "two", "{kind: multi_worker, workers: 2}")
    alone = recipe(tmp_path, "alone", "{kind: one_device}")
    pids = tmp_path / "pids"
    pids.mkdir()
    epochs: list[tuple[str, int]] = []
    with open_cluster({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        with ray_session(cluster.address, local_cpus=1):
            body = finetune_and_be_killed(two, pids)
            answer = run_training(
                body, lambda one: epochs.append((one["phase"], one["epoch"])), 2, WorkerShare(1.0, 0.0)
            )
        ended = engine_process("finetune", alone, "--json", environment={"RAY_ADDRESS": cluster.address})
        assert ended.code == 0, ended.stderr
    assert (pids / "killed").exists()
    assert any("goes on from there" in note for note in answer["notes"]), answer["notes"]
    again = epochs[epochs.index(("backbone", 2)) + 1 :]
    assert again[0][0] == "reading"
    assert [number for phase, number in again if phase == "backbone"] in ([2, 3], [3])
    metrics = open_bundle(open_store(str(tmp_path / "two"))).document("metrics")
    assert metrics["training"]["num_replicas"] == 2
    for ours, theirs in zip(losses_of(tmp_path / "two"), losses_of(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert not list((tmp_path / "two").glob("checkpoint.*"))


def test_a_cluster_whose_workers_leave_no_core_to_readers_is_refused(
    tmp_path: Path, engine_process: Engine
) -> None:
    write_shards(open_store(str(tmp_path / "shards")), shards=1, images=8)
    two = recipe(tmp_path, "two", "{kind: multi_worker, workers: 2}")
    with open_cluster({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        ended = engine_process("finetune", two, environment={"RAY_ADDRESS": cluster.address})
    assert ended.code == 1
    assert "no core for reading images" in ended.stderr
    assert "ask for fewer strategy.workers" in ended.stderr
