"""Fine-tuned by two workers on two nodes: as by one device, though one is killed meanwhile; with all images on each,
and with each image on one of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.heads.bundle import open_bundle
from engine.storage import open_store
from tests.clusters import open_cluster
from tests.commands import Engine
from tests.flows.archives import shard_bytes, write_recipe, write_shards

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two cores."""
    with open_cluster({"num_cpus": 2}, {"num_cpus": 2}) as running:
        yield running


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
    tmp_path: Path, engine_process: Engine, cluster: Cluster
) -> None:
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    write_shards(open_store(str(tmp_path / "shards")), shards=4, images=15)
    two = recipe(tmp_path, "two", "{kind: multi_worker, workers: 2}")
    alone = recipe(tmp_path, "alone", "{kind: one_device}")
    pids = tmp_path / "pids"
    pids.mkdir()
    epochs: list[tuple[str, int]] = []
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


SPLIT = """
source:   {{kind: webdataset, uri: "{folder}/shards", label: cls}}
backbone: {{kind: efficientnet_lite0, input_size: 64}}
unfreeze: {{top_layers: 12}}
split:    {{train: 0.6, validation: 0.2, test: 0.2}}
head:     {{kind: mlp, hidden: [8], dropout: 0.2}}
head_phase: {{training: {{epochs: 2}}}}
augment:  {{crop: 0.3, contrast: 0.2, rand_augment: 1}}
optimizer: {{learning_rate: 0.001}}
training: {{epochs: 3, batch_size: 7, checkpoint_seconds: 0, class_weights: balanced, images: {images}}}
publish:  always
output:   {{uri: "{folder}/{images}"}}
strategy: {strategy}
"""
KILLED_AT = 9  # batches that the second worker has read: in the middle of its second epoch of six


def finetune_split(
    recipe_path: Path, notes: Path
) -> Callable[[Callable[[dict[str, Any]], None]], dict[str, Any] | None]:
    """A training worker that notes which images of each step are its own; the second one kills itself once."""
    from engine.config import load_recipe
    from jobs.finetune import FinetuneRecipe, _look

    loaded = load_recipe(FinetuneRecipe, recipe_path)
    works, bundle_id = _look(loaded)

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        from engine.finetuning.loop import Finetuning
        from jobs.finetune import finetune_on_worker

        rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        read_ahead, read = Finetuning._read_ahead, 0

        def noted(self: Any, batches: Any) -> Iterator[Any]:
            nonlocal read
            first = self._steps_done
            for step, batch in enumerate(batches, first):
                is_image_RB = batch.weights_RB > 0
                rows, places = batch.rows_RB[is_image_RB].tolist(), batch.places_RB[is_image_RB].tolist()
                told = {"epoch": self._epoch, "step": step, "rows": dict(zip(places, rows, strict=True))}
                with (notes / f"steps.{rank}").open("a") as file:
                    file.write(json.dumps({**told, "from": first}) + "\n")
            on_disk = len(self._images.rows._pixels_MSS3)
            (notes / f"on_disk.{rank}").write_text(str(on_disk))
            for feed in read_ahead(self, batches):
                read += 1
                if rank == 1 and read == KILLED_AT and not (notes / "killed").exists():
                    (notes / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield feed

        Finetuning._read_ahead = noted  # type: ignore[method-assign]
        return finetune_on_worker(loaded, works, bundle_id, 1, report)

    return body


def finetune_in_order(
    recipe_path: Path, orders: dict[int, list[int]]
) -> Callable[[Callable[[dict[str, Any]], None]], dict[str, Any] | None]:
    """The one worker of a training whose epochs come in these orders."""
    from engine.config import load_recipe
    from jobs.finetune import FinetuneRecipe, _look

    loaded = load_recipe(FinetuneRecipe, recipe_path)
    works, bundle_id = _look(loaded)

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        import numpy as np

        from engine.finetuning.order import ImagesEverywhere
        from jobs.finetune import finetune_on_worker

        ImagesEverywhere.order = lambda self, rows, epoch: np.array(orders[epoch])  # type: ignore[method-assign]
        return finetune_on_worker(loaded, works, bundle_id, 1, report)

    return body


def steps_noted(notes: Path) -> dict[int, dict[int, dict[int, int]]]:
    """Of each epoch and step: which image was at each place of the batch; what was done again was the same."""
    found: dict[int, dict[int, dict[int, int]]] = {}
    first: dict[tuple[int, int, int], dict[str, int]] = {}
    for rank in (0, 1):
        for line in (notes / f"steps.{rank}").read_text().splitlines():
            told = json.loads(line)
            assert first.setdefault((rank, told["epoch"], told["step"]), told["rows"]) == told["rows"]
    for (_, epoch, step), rows in first.items():
        own = {int(place): row for place, row in rows.items()}
        batch = found.setdefault(epoch, {}).setdefault(step, {})
        assert not batch.keys() & own.keys()
        batch.update(own)
    return found


def test_images_split_between_two_workers_of_which_one_is_killed_train_as_one_device_does(
    tmp_path: Path, cluster: Cluster
) -> None:
    """One device takes the same images in the same order. Shards have 45, 14 and 1 image."""
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    share = WorkerShare(1.0, 0.0)
    store, first = open_store(str(tmp_path / "shards")), 0
    for place, count in enumerate((45, 14, 1)):
        store.write(f"{place:05d}.tar", shard_bytes(first, count))
        first += count
    notes = tmp_path / "notes"
    notes.mkdir()
    paths = {
        images: write_recipe(
            tmp_path,
            f"{images}.yaml",
            SPLIT.format(folder=tmp_path, images=images, strategy=strategy),
        )
        for images, strategy in (
            ("split", "{kind: multi_worker, workers: 2}"),
            ("everywhere", "{kind: one_device}"),
        )
    }
    with ray_session(cluster.address, local_cpus=1):
        answer = run_training(finetune_split(paths["split"], notes), lambda _: None, 2, share)
        epochs = steps_noted(notes)
        orders = {
            epoch: [row for step in sorted(steps) for _, row in sorted(steps[step].items())]
            for epoch, steps in epochs.items()
        }
        alone = run_training(finetune_in_order(paths["everywhere"], orders), lambda _: None, 1, share)
    assert (notes / "killed").exists()
    assert any("goes on from there" in note for note in answer["notes"]), answer["notes"]
    begun = {json.loads(line)["from"] for line in (notes / "steps.0").read_text().splitlines()}
    assert begun & {1, 2, 3}, "it must have been killed in the middle of an epoch"

    documents = {name: open_bundle(open_store(str(tmp_path / name))).documents() for name in paths}
    metrics = {name: document["metrics"] for name, document in documents.items()}
    train = metrics["split"]["split"]["train"]["rows"]
    assert {epoch: len(steps) for epoch, steps in epochs.items()} == dict.fromkeys((1, 2, 3), -(-train // 7))
    for order in orders.values():
        assert len(order) == len(set(order)) == train
        assert set(order) == set(orders[1])
    on_disk = [int((notes / f"on_disk.{rank}").read_text()) for rank in (0, 1)]
    assert sum(on_disk) == 60 and min(on_disk) >= 20
    assert answer["summary"]["images"] == {"placement": "split", "rows_per_worker": on_disk}
    assert metrics["split"]["training"]["images"] == answer["summary"]["images"]
    assert alone["summary"]["images"] == {"placement": "everywhere", "rows_per_worker": [60]}

    for ours, theirs in zip(losses_of(tmp_path / "split"), losses_of(tmp_path / "everywhere"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for split in ("validation", "test"):
        assert metrics["split"][split]["confusion_matrix"] == metrics["everywhere"][split]["confusion_matrix"]
    assert answer["summary"]["comparison"] == pytest.approx(alone["summary"]["comparison"], abs=1e-4)
    assert not list((tmp_path / "split").glob("checkpoint.*"))


def test_a_shard_that_one_worker_cannot_read_ends_all_of_them(tmp_path: Path, cluster: Cluster) -> None:
    from engine.config import load_recipe
    from engine.errors import ShardsFailed
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare
    from jobs.finetune import FinetuneRecipe, _look

    store = open_store(str(tmp_path / "shards"))
    write_shards(store, shards=12, images=2)  # so small a part of all that each is read by one worker
    store.write("00007.tar", store.read("00007.tar")[:-3000])
    strategy = "{kind: multi_worker, workers: 2}"
    path = write_recipe(
        tmp_path, "split.yaml", SPLIT.format(folder=tmp_path, images="split", strategy=strategy)
    )
    loaded = load_recipe(FinetuneRecipe, path)
    works, _ = _look(loaded)

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        from jobs.finetune import finetune_on_worker

        return finetune_on_worker(loaded, works, None, 1, report)

    with (
        ray_session(cluster.address, local_cpus=1),
        pytest.raises(ShardsFailed, match=r"1 of 12 shards cannot be read(.|\n)*00007\.tar"),
    ):
        run_training(body, lambda _: None, 2, WorkerShare(1.0, 0.0))


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
