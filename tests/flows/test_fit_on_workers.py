"""Heads fitted by two workers on two nodes: as by one device, whoever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from engine.heads.bundle import open_bundle
from engine.parts import part_name
from engine.schema import embeddings_schema, rejects_schema
from engine.storage import open_store
from engine.tables import EmbeddingPartFacts, claim_table, write_embedding_part
from tests.clusters import open_cluster
from tests.commands import Engine, start
from tests.flows.archives import write_recipe
from tests.processes import kill_with_all_below

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ROWS, WIDTH = 1_501, 24
TWO_WORKERS = "strategy: {kind: multi_worker, workers: 2}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each: two workers are on two nodes."""
    with open_cluster({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        yield cluster


def write_embeddings(folder: Path) -> str:
    """A table of one part, with four classes that overlap."""
    rng = np.random.default_rng(3)
    classes_N = rng.integers(0, 4, ROWS)
    embeddings_ND = np.eye(4, WIDTH)[classes_N] * 2 + rng.normal(size=(ROWS, WIDTH))
    columns: dict[str, Any] = {
        "key": [f"{row:05d}" for row in range(ROWS)],
        "shard": ["a.tar"] * ROWS,
        "index": range(ROWS),
        "embedding": list(embeddings_ND.astype(np.float32)),
        "label": [f"class {number}" for number in classes_N],
        "image_width": [8] * ROWS,
        "image_height": [8] * ROWS,
        "sha256": [bytes(32)] * ROWS,
    }
    store = open_store(str(folder / "embeddings"))
    claim_table(
        store,
        {"kind": "embeddings", "schema_version": 1, "fingerprint": "f" * 64, "width": WIDTH, "contract": {}},
    )
    facts = EmbeddingPartFacts(
        fingerprint="f" * 64,
        source_uri=str(folder),
        shard="a.tar",
        identity="mtime:1:1",
        begin_offset=0,
        end_offset=1,
        samples=ROWS,
        rejects=0,
        rejects_sha256=None,
        embeddings_sha256="",
    )
    data = pa.table(columns, schema=embeddings_schema(WIDTH, "float32", []))
    name = part_name("a.tar", "mtime:1:1", 0, True)
    write_embedding_part(store, name, data, rejects_schema(keep_bytes=False).empty_table(), facts)
    return store.uri


def recipe(folder: Path, name: str, more: str = "") -> Path:
    return write_recipe(
        folder,
        f"{name}.yaml",
        f"""
embeddings: {{uri: "{write_embeddings(folder)}"}}
output:     {{uri: "{folder / name}"}}
training:   {{epochs: 30, patience: 30, batch_size: 64, checkpoint_seconds: 0}}
grid:       {{head: [{{kind: linear}}, {{kind: mlp, hidden: [16]}}]}}
{more}
""",
    )


@pytest.fixture(scope="module")
def calm(cluster: Cluster, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of two workers that nobody killed."""
    folder = tmp_path_factory.mktemp("calm")
    path = recipe(folder, "calm", TWO_WORKERS)
    process = start("fit", repository, path, environment={"RAY_ADDRESS": cluster.address})
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return folder / "calm"


def history_of(bundle: Path) -> list[dict[str, float]]:
    metrics = open_bundle(open_store(str(bundle))).document("metrics")
    history: list[dict[str, float]] = metrics["training"]["history"]
    return history


def assert_same_training(ours: Path, theirs: Path, tolerance: float) -> None:
    for one, other in zip(history_of(ours), history_of(theirs), strict=True):
        assert one == pytest.approx(other, abs=tolerance)
    figures = [open_bundle(open_store(str(bundle))).document("metrics") for bundle in (ours, theirs)]
    for split in ("validation", "test"):
        for name in ("accuracy", "loss", "calibration_error"):
            assert figures[0][split][name] == pytest.approx(figures[1][split][name], abs=tolerance)


def fit_and_be_killed(
    recipe_path: Path, pids: Path, kills: dict[int, int]
) -> Callable[[Callable[[dict[str, Any]], None]], dict[str, Any] | None]:
    """A training worker whose chief kills, at the end of an epoch, the worker of a rank: once each."""
    from engine.config import load_recipe
    from jobs.fit import FitRecipe, _look

    loaded = load_recipe(FitRecipe, recipe_path)
    _, columns = _look(loaded)

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        import json

        from jobs.fit import fit_on_worker

        rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        (pids / str(rank)).write_text(str(os.getpid()))

        def report_and_kill(epoch: dict[str, Any]) -> None:
            report(epoch)
            victim = kills.get(epoch["epoch"])
            mark = pids / f"killed-in-{epoch['epoch']}"
            if victim is not None and not mark.exists():
                mark.touch()
                os.kill(int((pids / str(victim)).read_text()), signal.SIGKILL)
                time.sleep(60)  # the victim ends this one, or Ray does

        return fit_on_worker(loaded, columns, report_and_kill)

    return body


def test_two_workers_on_two_nodes_train_as_one_device_does(
    cluster: Cluster, calm: Path, engine_process: Engine, tmp_path: Path
) -> None:
    metrics = open_bundle(open_store(str(calm))).document("metrics")
    assert metrics["training"]["num_replicas"] == 2
    assert not list(calm.glob("checkpoint.*"))
    alone = recipe(tmp_path, "alone", "strategy: {kind: one_device}")
    assert engine_process("fit", alone, "--json", environment={"RAY_ADDRESS": cluster.address}).code == 0
    assert_same_training(calm, tmp_path / "alone", tolerance=1e-4)


def test_workers_that_are_killed_in_the_middle_change_nothing(
    cluster: Cluster, calm: Path, tmp_path: Path
) -> None:
    """The second one in epoch 3, the chief in epoch 6."""
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    pids = tmp_path / "pids"
    pids.mkdir()
    body = fit_and_be_killed(recipe(tmp_path, "killed", TWO_WORKERS), pids, {3: 1, 6: 0})
    epochs: list[int] = []
    with ray_session(cluster.address, local_cpus=1):
        answer = run_training(body, lambda report: epochs.append(report["epoch"]), 2, WorkerShare(1.0, 0.0))
    assert sorted(path.name for path in pids.glob("killed*")) == ["killed-in-3", "killed-in-6"]
    assert any("interrupted after epoch 5 goes on" in note for note in answer["notes"]), answer["notes"]
    assert epochs == [1, 2, 3, 3, 4, 5, 6, *range(6, 31)]
    assert_same_training(tmp_path / "killed", calm, tolerance=1e-6)


def test_an_error_of_one_worker_is_told_and_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    from engine.errors import TableDamaged
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    tried = tmp_path / "tried"
    tried.mkdir()

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        import json

        from engine.errors import TableDamaged

        del report
        rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        (tried / f"{rank}-{time.monotonic_ns()}").touch()
        if rank == 1:
            while len(list(tried.iterdir())) < 2:  # the other one has begun
                time.sleep(0.05)
            raise TableDamaged("part 7: torn", way_out="delete it")
        time.sleep(60)  # as if it waited for the others' gradients
        return None

    with (
        ray_session(cluster.address, local_cpus=1),
        pytest.raises(TableDamaged, match=r"(?s)part 7: torn.*delete it"),
    ):
        run_training(body, lambda report: None, 2, WorkerShare(1.0, 0.0))
    assert len(list(tried.iterdir())) == 2


def test_a_fault_of_the_code_is_told_with_its_place_and_not_tried_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    from engine.errors import ClusterError
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        del report
        (tmp_path / str(time.monotonic_ns())).touch()
        return {"sum": "one" + 1}  # type: ignore[operator]

    with ray_session(cluster.address, local_cpus=1), pytest.raises(ClusterError) as raised:
        run_training(body, lambda report: None, 1, WorkerShare(1.0, 0.0))
    assert "in body" in str(raised.value) and "TypeError: can only concatenate str" in str(raised.value)
    assert len(list(tmp_path.iterdir())) == 1


def test_workers_that_die_time_and_again_end_in_one_message(cluster: Cluster) -> None:
    from engine.errors import ClusterError
    from engine.on_ray import ray_session, run_training
    from engine.sizing import WorkerShare

    def body(report: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        del report
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    with (
        ray_session(cluster.address, local_cpus=1),
        pytest.raises(ClusterError, match=r"(?s)a worker was lost.*run the same command again"),
    ):
        run_training(body, lambda report: None, 1, WorkerShare(1.0, 0.0))


def test_a_killed_driver_is_taken_up_by_the_same_command(
    engine_process: Engine, repository: Path, tmp_path: Path
) -> None:
    longer = "suspects: {folds: 0}\nstrategy: {kind: one_device}"
    calm, killed = (recipe(tmp_path, name, longer) for name in ("calm", "killed"))
    setting = ["--set", "training.epochs=100", "--set", "training.patience=100"]
    ended = engine_process("fit", calm, "--json", *setting)
    assert ended.code == 0, ended.stderr
    process = start("fit", repository, killed, *setting)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoint.*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill_with_all_below(process.pid)  # a worker left behind would be quick enough to end this training
    process.communicate()
    assert not (tmp_path / "killed" / "bundle.json").exists()
    again = engine_process("fit", killed, *setting)
    assert again.code == 0, again.stderr
    assert "interrupted after epoch" in again.stderr
    assert_same_training(tmp_path / "killed", tmp_path / "calm", tolerance=1e-6)
