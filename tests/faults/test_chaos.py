"""Something is killed at a random moment of an extraction, and it is run to its end: the table is that of a calm run.

`make chaos` runs twenty rounds; `make test` a short version. A round is fixed by its number: what is killed, when,
whether a second driver works on the same table, whether a shard is replaced meanwhile. With ENGINE_CHAOS_ON=s3 source
and table are in the test store.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.parts import path16_of
from engine.storage import StorageConfig, Store, open_store
from engine.tables import RECORD_NAME, embeddings_matrix, list_parts
from engine.verification import verify_table
from tests.commands import Engine, rows_of, start, wait_for_parts
from tests.flows.archives import crop_label, extract_recipe, shard_bytes, write_shards
from tests.processes import kill_one, kill_process, new_mark, processes_below, processes_with

ROUNDS = int(os.environ.get("ENGINE_CHAOS_ROUNDS", "1"))
IS_SHORT = "ENGINE_CHAOS_ROUNDS" not in os.environ
SHARDS, IMAGES = (8, 130) if IS_SHORT else (20, 200)
PARTS = -(-IMAGES // 64) * SHARDS
NEW_CONTENT = 90_000  # number of the first crop of a replaced shard
END_TIMEOUT_S = 240
PATIENCE_S = 60
VICTIMS = ("actor", "driver", "reader", "raylet")  # beside GPUs there are writers: test_cluster_faults.py


@dataclass(frozen=True)
class Calm:
    """What one calm run makes of the archive, and of the content that a replaced shard gets."""

    source: Path
    embeddings: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def calm(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    from jobs.cli import main

    folder = tmp_path_factory.mktemp("calm")
    source = open_store(str(folder / "shards"))
    write_shards(source, SHARDS, IMAGES)
    source.write("new.tar", shard_bytes(NEW_CONTENT, IMAGES))
    assert main(["extract", str(extract_recipe(folder, source.uri, str(folder / "table")))]) == 0
    source.delete("new.tar")
    rows = rows_of(folder / "table", ["key", "embedding"])
    assert rows.num_rows == (SHARDS + 1) * IMAGES
    keys, matrix = rows["key"].to_pylist(), embeddings_matrix(rows["embedding"])
    return Calm(folder / "shards", dict(zip(keys, matrix, strict=True)))


@dataclass(frozen=True)
class Scene:
    """A source with the calm run's shards, where the table will be, and a recipe for it."""

    source: Store
    table: Store
    recipe: Path


@pytest.fixture
def scene(calm: Calm, s3_uri: str, s3_config: StorageConfig, tmp_path: Path) -> Scene:
    is_on_s3 = os.environ.get("ENGINE_CHAOS_ON") == "s3"
    root, config = (s3_uri, s3_config) if is_on_s3 else (str(tmp_path), StorageConfig())
    source, table = open_store(f"{root}/shards", config), open_store(f"{root}/table", config)
    for info in open_store(str(calm.source)).list():
        source.write(info.path, (calm.source / info.path).read_bytes())
    storage = (
        f'storage: {{endpoint_url: "{config.endpoint_url}", region: {config.region}}}' if is_on_s3 else ""
    )
    return Scene(source, table, extract_recipe(tmp_path, source.uri, table.uri, storage))


@pytest.mark.skipif(IS_SHORT, reason="`make chaos` runs it")
@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_is_killed_the_table_is_that_of_a_calm_run(
    number: int, repository: Path, engine: Engine, calm: Calm, scene: Scene
) -> None:
    draw = random.Random(number)
    victim, when = VICTIMS[number % len(VICTIMS)], draw.randrange(1, PARTS // 2)
    two_drivers, replaced = number // len(VICTIMS) % 2 == 0, number % 3 == 2

    with drivers(1 + two_drivers, repository, scene.recipe) as running:
        if victim != "reader":  # small shards are read before the first part is written
            wait_for_parts(scene.table, when, running[0].process)
            time.sleep(draw.random())
        if replaced:
            scene.source.write(f"{draw.randrange(SHARDS):05d}.tar", shard_bytes(NEW_CONTENT, IMAGES))
        kill(victim, running[0])
        ends = [driver.process.communicate(timeout=END_TIMEOUT_S)[0] for driver in running]
        codes = [driver.process.returncode for driver in running]
    story = f"round {number}: {victim} killed, {replaced=}, exit codes {codes}\n"
    if not replaced and victim in ("actor", "reader"):
        assert codes[0] == 0, story + ends[0]  # ridden out
    if not replaced and two_drivers:
        assert codes[1] == 0, story + ends[1]  # not its business
    must_be_that_of_a_calm_run(scene, calm, engine, replaced, story)
    print(story, end="")


def test_a_run_rides_out_the_loss_of_its_reader_and_its_actor_while_a_shard_is_replaced(
    engine: Engine, calm: Calm, tmp_path: Path
) -> None:
    """The short version of the rounds: one run on the shared Ray, nothing more is started."""
    source, table = open_store(str(calm.source)), open_store(str(tmp_path / "table"))
    recipe = extract_recipe(tmp_path, source.uri, table.uri)
    # As if it had been resolved: a start less.
    table.write(RECORD_NAME, (calm.source.parent / "table" / RECORD_NAME).read_bytes())
    killed: list[str] = []
    over = threading.Event()

    def strike() -> None:
        for victim, parts in (("reader", 0), ("actor", 2)):
            while sum(1 for _ in table.names("data/")) < parts and not over.is_set():
                time.sleep(0.02)
            if kill_one(victim, lambda: processes_below(os.getpid()), PATIENCE_S):
                killed.append(victim)
        source.write(f"{SHARDS - 1:05d}.tar", shard_bytes(NEW_CONTENT, IMAGES))

    thread = threading.Thread(target=strike)
    thread.start()
    ended = engine("extract", recipe, "--json")
    over.set()
    thread.join()
    story = f"{killed} killed, exit code {ended.code}: {ended.stderr}\n"
    assert killed == ["reader", "actor"], story
    must_be_that_of_a_calm_run(Scene(source, table, recipe), calm, engine, True, story)


def must_be_that_of_a_calm_run(scene: Scene, calm: Calm, engine: Engine, replaced: bool, story: str) -> None:
    """Run it to its end, and compare every row."""
    finished = engine("extract", scene.recipe, "--json")
    assert finished.code == 0, story + finished.stderr
    rerun = engine("extract", scene.recipe, "--json")
    assert (rerun.summary["parts_written"], rerun.summary["bytes_read"]) == (0, 0), story

    rows = rows_of(scene.table, ["key", "shard", "label", "embedding"])
    keys = rows["key"].to_pylist()
    assert len(set(keys)) == len(keys) == SHARDS * IMAGES, story
    assert rows["label"].to_pylist() == [crop_label(int(key)) for key in keys], story
    wanted = np.stack([calm.embeddings[key] for key in keys])
    np.testing.assert_allclose(embeddings_matrix(rows["embedding"]), wanted, rtol=1e-4, atol=1e-5)
    new = {
        shard for key, shard in zip(keys, rows["shard"].to_pylist(), strict=True) if int(key) >= NEW_CONTENT
    }
    assert len(new) == replaced, story
    counts = [name.path16 for name, _ in list_parts(scene.table)]
    assert len(counts) == PARTS, story  # no part of an old version is left
    checked = verify_table(scene.table)
    assert not checked.damage and not checked.leftovers and not checked.unfinished, story + str(checked)
    assert set(counts) == {path16_of(f"{shard:05d}.tar") for shard in range(SHARDS)}, story


@dataclass(frozen=True)
class Driver:
    """A running command, and the mark by which its own and its Ray's processes are known."""

    process: subprocess.Popen[str]
    mark: dict[str, str]


@contextmanager
def drivers(count: int, repository: Path, recipe: Path) -> Iterator[list[Driver]]:
    """Drivers that work on one table, each with a Ray of its own; nothing of them is left afterwards."""
    running = []
    try:
        for _ in range(count):
            mark = new_mark()
            process = start("extract", repository, recipe, environment=mark)
            running.append(Driver(process, mark))
        yield running
    finally:
        for driver in running:
            driver.process.kill()
            driver.process.communicate()
            for pid in processes_with(driver.mark):
                kill_process(pid)


def kill(victim: str, driver: Driver) -> None:
    """Kill -9 the driver, or the first process of that kind which belongs to it, as soon as there is one."""
    if victim == "driver":
        driver.process.kill()
        return
    while driver.process.poll() is None:
        if kill_one(victim, lambda: processes_with(driver.mark), patience_s=0):
            return
    raise AssertionError(f"the driver ended before a {victim} was seen")
