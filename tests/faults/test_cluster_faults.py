"""Nodes of a Ray cluster are lost, disagree, or have the only GPU: the run rides it out, or says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from engine.storage import open_store
from engine.tables import embeddings_matrix
from engine.verification import verify_table
from tests.clusters import host_name, open_cluster, titles_on
from tests.commands import Engine, rows_of, start, wait_for_parts
from tests.flows.archives import crop_label, extract_recipe, shard_bytes, write_shards
from tests.processes import kill_one, processes_below

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

SHARDS, IMAGES = 16, 200
END_TIMEOUT_S = 250
# Ray waits 60 s for a head that comes back (gcs_rpc_server_reconnect_timeout_s); the rest is for a busy machine.
HEAD_LOSS_TIMEOUT_S = 120
ACTOR, READER = "EmbedActor", "ReadShards"

pytestmark = pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")


@pytest.mark.parametrize("victim", [ACTOR, READER])
def test_a_lost_worker_node_is_ridden_out(victim: str, repository: Path, tmp_path: Path) -> None:
    keys = write_shards(open_store(str(tmp_path / "shards")), SHARDS, IMAGES)
    with (
        open_cluster(*[{"num_cpus": 2}] * 3) as cluster,
        extracting(cluster, repository, tmp_path, "actors: 1, decode_tasks: 3") as process,
    ):
        done_by_node = watch(cluster, process, tmp_path / "table", parts=3)
        lost = next(
            node
            for node, done in done_by_node.items()
            if victim in done and (ACTOR in done) == (victim == ACTOR)
        )
        cluster.remove_node(lost, allow_graceful=False)
        parts, began = count_parts(tmp_path / "table"), time.monotonic()
        printed = process.communicate(timeout=END_TIMEOUT_S)[0]
        print(f"node of {victim} lost at part {parts}; ended {time.monotonic() - began:.0f} s later")
    assert process.returncode == 0, printed
    assert parts < 4 * SHARDS, "the node was lost too late"
    check_whole(tmp_path / "table", keys)


def test_a_lost_head_ends_the_command_and_a_rerun_on_a_new_cluster_completes_the_table(
    repository: Path, engine_process: Engine, tmp_path: Path
) -> None:
    keys = write_shards(open_store(str(tmp_path / "shards")), SHARDS, IMAGES)
    with (
        open_cluster({"num_cpus": 2}, {"num_cpus": 2}) as cluster,
        extracting(cluster, repository, tmp_path, "actors: 1") as process,
    ):
        wait_for_parts(tmp_path / "table", 3, process)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        began = time.monotonic()
        printed = process.communicate(timeout=HEAD_LOSS_TIMEOUT_S)[0]
        parts = count_parts(tmp_path / "table")
        print(f"head lost; ended {time.monotonic() - began:.0f} s later with {parts} parts")
    assert process.returncode == 1, printed
    assert len(re.findall("^error: .* lost its head", printed, re.MULTILINE)) == 1, printed
    assert "run the same command again" in printed, printed
    assert 3 <= parts < 4 * SHARDS, "the head was lost too late"
    with open_cluster({"num_cpus": 2}) as cluster:
        address = f"compute.address={cluster.address}"
        finished = engine_process("extract", tmp_path / "extract.yaml", "--json", "--set", address)
    assert finished.code == 0, finished.stderr
    assert finished.summary["parts_written"] == 4 * SHARDS - parts
    check_whole(tmp_path / "table", keys)


def test_a_node_with_other_weights_is_named_and_adds_nothing_to_the_table(
    engine_process: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "good-cache", tmp_path / "bad-cache"
    monkeypatch.setenv("ENGINE_CACHE_DIR", str(good))
    source = open_store(str(tmp_path / "shards"))
    write_shards(source, 2, IMAGES)
    weights = write_weights(tmp_path)
    with open_cluster({"num_cpus": 3}) as cluster:

        def extract(table: str, cpus_per_actor: int) -> list[object]:
            compute = f"compute: {{cpus_per_actor: {cpus_per_actor}, address: '{cluster.address}'}}"
            recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / table), compute)
            return ["extract", recipe, "--json", "--set", f"backbone.weights={weights}"]

        first = engine_process(*extract("table", cpus_per_actor=2))
        assert first.code == 0, first.stderr
        shutil.copytree(good / "weights", bad / "weights")
        change_weights(bad)
        with host_name("odd-one"):
            odd = cluster.add_node(num_cpus=5, env_vars={"ENGINE_CACHE_DIR": str(bad)})
        for number in range(2, SHARDS):
            source.write(f"{number:05d}.tar", shard_bytes(number * IMAGES, IMAGES))
        began = time.monotonic()
        stopped = engine_process(
            *extract("table", cpus_per_actor=4)
        )  # there is room for that on the odd node only
        print(f"stopped after {time.monotonic() - began:.0f} s with {count_parts(tmp_path / 'table')} parts")
        assert stopped.code == 1, stopped.stderr
        assert stopped.stderr.count("error: host odd-one has loaded another backbone") == 1, stopped.stderr
        assert "tensor_digest" in stopped.stderr and "Traceback" not in stopped.stderr
        before = embeddings_of(tmp_path / "table")
        cluster.remove_node(odd, allow_graceful=False)
        assert engine_process(*extract("table", cpus_per_actor=2)).code == 0
        assert engine_process(*extract("calm", cpus_per_actor=2)).code == 0
    calm, finished = embeddings_of(tmp_path / "calm"), embeddings_of(tmp_path / "table")
    assert len(before) >= 2 * IMAGES and len(finished) == len(calm) == SHARDS * IMAGES
    for found in (before, finished):
        wanted = np.stack([calm[key] for key in found])
        np.testing.assert_allclose(np.stack(list(found.values())), wanted, rtol=1e-4, atol=1e-5)


def test_two_actors_share_the_one_gpu_nodes_without_gpus_read_and_a_killed_writer_is_ridden_out(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # Ray offers no GPU that is hidden; there need not be one
    keys = write_shards(open_store(str(tmp_path / "shards")), SHARDS, IMAGES)
    with (
        open_cluster({"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 2}, {"num_cpus": 2}) as cluster,
        extracting(
            cluster, repository, tmp_path, "actors: 2, gpus_per_actor: 0.5, decode_tasks: 4"
        ) as process,
    ):
        killing = ThreadPoolExecutor(1).submit(
            kill_one, "writer", lambda: processes_below(os.getpid()), patience_s=END_TIMEOUT_S
        )
        done_by_node = watch(cluster, process, tmp_path / "table")
        printed = process.communicate(timeout=END_TIMEOUT_S)[0]
        assert killing.done() and killing.result(), "no writer was seen"
    assert process.returncode == 0, printed
    with_gpu, *others = (
        done
        for _, done in sorted(
            done_by_node.items(), key=lambda item: -item[0].get_resource_and_label_spec().num_gpus
        )
    )
    assert with_gpu[ACTOR] == 2
    assert sum(done[ACTOR] for done in others) == 0
    assert sum(done[READER] for done in others) >= 1
    check_whole(tmp_path / "table", keys)


def test_a_pool_of_actors_grows_when_the_cluster_does(repository: Path, tmp_path: Path) -> None:
    keys = write_shards(open_store(str(tmp_path / "shards")), SHARDS, IMAGES)
    for number in range(1, 2):  # the same content once more: work for the new node
        os.makedirs(tmp_path / "shards" / str(number))
        for shard in range(SHARDS):
            os.link(tmp_path / f"shards/{shard:05d}.tar", tmp_path / f"shards/{number}/{shard:05d}.tar")
    with (
        open_cluster({"num_cpus": 2}) as cluster,
        extracting(
            cluster,
            repository,
            tmp_path,
            "actors: {min: 1, max: 3}, cpus_per_actor: 1, decode_tasks: 1",
            *(
                "--set",
                "backbone.layer=null",
                "--set",
                "backbone.input_size=96",
            ),  # so that actors are what it waits for
        ) as process,
    ):
        wait_for_parts(tmp_path / "table", 1, process)
        new = cluster.add_node(num_cpus=2)
        done_by_node = watch(cluster, process, tmp_path / "table")
        printed = process.communicate(timeout=END_TIMEOUT_S)[0]
    assert process.returncode == 0, printed
    print({node.node_ip_address: dict(done) for node, done in done_by_node.items()})
    assert done_by_node[new][ACTOR] >= 1, "nothing was moved on to the new node"
    rows = rows_of(tmp_path / "table", ["key"])
    assert Counter(rows["key"].to_pylist()) == dict.fromkeys(keys, 2)


@contextmanager
def extracting(
    cluster: Cluster, repository: Path, folder: Path, compute: str, *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    """The command at work on a cluster; it does not outlive its test."""
    block = f"compute: {{{compute}, address: '{cluster.address}'}}"
    recipe = extract_recipe(folder, str(folder / "shards"), str(folder / "table"), block)
    with start("extract", repository, recipe, *arguments) as process:
        try:
            yield process
        finally:
            process.kill()


def watch(
    cluster: Cluster, process: subprocess.Popen[str], table: Path, parts: int | None = None
) -> dict[Node, Counter[str]]:
    """Watch the nodes until the table has so many parts, or to the end of the command.

    Returns:
        For each worker node the most actors and the most readers that were seen there at once.
    """
    seen: dict[Node, Counter[str]] = {node: Counter() for node in cluster.worker_nodes}
    deadline = time.monotonic() + END_TIMEOUT_S
    while process.poll() is None and (parts is None or count_parts(table) < parts):
        assert time.monotonic() < deadline, f"nothing comes of it: {seen}"
        for node, most in seen.items():
            most |= Counter(kind for title in titles_on(node) for kind in (ACTOR, READER) if kind in title)
        time.sleep(0.1)
    assert parts is None or process.poll() is None, f"ended by itself: {process.communicate()[0]}"
    return seen


def count_parts(table: Path) -> int:
    return len(list((table / "data").glob("*.parquet")))


def check_whole(table: Path, keys: list[str]) -> None:
    """Each key once, with its label; nothing damaged, left over or unfinished."""
    rows = rows_of(table, ["key", "label"])
    found = rows["key"].to_pylist()
    assert sorted(found) == keys
    assert rows["label"].to_pylist() == [crop_label(int(key)) for key in found]
    checked = verify_table(open_store(str(table)))
    assert not (checked.damage or checked.leftovers or checked.unfinished), checked


def embeddings_of(table: Path) -> dict[str, np.ndarray]:
    rows = rows_of(table, ["key", "embedding"])
    return dict(zip(rows["key"].to_pylist(), embeddings_matrix(rows["embedding"]), strict=True))


def write_weights(folder: Path) -> Path:
    """A weights file for the network of `extract_recipe`."""
    import keras

    path = folder / "network.weights.h5"
    keras.utils.set_random_seed(7)
    keras.applications.MobileNetV2(input_shape=(32, 32, 3), include_top=False, weights=None).save_weights(
        path
    )
    return path


def change_weights(cache: Path) -> None:
    """Turn the kernels of a cached weights file upside down; its size stays."""
    import h5py

    (path,) = (cache / "weights").glob("*.weights.h5")

    def turn(_name: str, found: h5py.Dataset | h5py.Group) -> None:
        if isinstance(found, h5py.Dataset) and found.ndim == 4:
            found[...] = found[...][::-1, ::-1, ::-1, ::-1]

    with h5py.File(path, "r+") as file:
        file.visititems(turn)
