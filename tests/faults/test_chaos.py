"""Something is killed at a random moment of an extraction, and it is run to its end: the table is that of a calm run.

`make chaos` runs twenty rounds. A round is fixed by its number: what is killed, when, whether a second driver works on
the same table, whether a shard is replaced meanwhile.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.parts import path16_of
from engine.storage import open_store
from engine.tables import embeddings_matrix, list_parts
from engine.verification import verify_table
from tests.commands import Engine, rows_of, start, wait_for_parts
from tests.flows.archives import crop_label, extract_recipe, shard_bytes, write_shards

ROUNDS = int(os.environ.get("ENGINE_CHAOS_ROUNDS", "1"))
SHARDS, IMAGES = 20, 200
PARTS = 4 * SHARDS
NEW_CONTENT = 90_000  # number of the first crop of a replaced shard
END_TIMEOUT_S = 240
VICTIMS = ("actor", "driver", "reader", "raylet", "writer")
# How Ray titles the processes of ours; a raylet keeps its command line.
TITLES = {"actor": "EmbedActor", "reader": "ReadShards", "writer": "_write_row", "raylet": "/raylet/raylet"}


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


@pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")
@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_is_killed_the_table_is_that_of_a_calm_run(
    number: int, repository: Path, engine: Engine, calm: Calm, tmp_path: Path
) -> None:
    draw = random.Random(number)
    victim, when = VICTIMS[number % len(VICTIMS)], draw.randrange(1, PARTS // 2)
    two_drivers, replaced = number % 2 == 0, number % 3 == 2
    source = open_store(str(tmp_path / "shards"))
    for info in open_store(str(calm.source)).list():
        os.makedirs(tmp_path / "shards", exist_ok=True)
        os.link(calm.source / info.path, tmp_path / "shards" / info.path)
    table = tmp_path / "table"
    recipe = extract_recipe(tmp_path, source.uri, str(table))

    with drivers(1 + two_drivers, repository, recipe) as running:
        if victim != "reader":  # small shards are read before the first part is written
            wait_for_parts(table, when, running[0].process)
            time.sleep(draw.random())
        if replaced:
            source.write(f"{draw.randrange(SHARDS):05d}.tar", shard_bytes(NEW_CONTENT, IMAGES))
        kill(victim, running[0])
        ends = [driver.process.communicate(timeout=END_TIMEOUT_S)[0] for driver in running]
        codes = [driver.process.returncode for driver in running]
    story = f"round {number}: {victim} killed, {replaced=}, exit codes {codes}\n"
    if not replaced and victim in ("actor", "reader", "writer"):
        assert codes[0] == 0, story + ends[0]  # ridden out
    if not replaced and two_drivers:
        assert codes[1] == 0, story + ends[1]  # not its business

    finished = engine("extract", recipe, "--json")
    assert finished.code == 0, story + finished.stderr
    rerun = engine("extract", recipe, "--json")
    assert (rerun.summary["parts_written"], rerun.summary["bytes_read"]) == (0, 0), story

    rows = rows_of(table, ["key", "shard", "label", "embedding"])
    keys = rows["key"].to_pylist()
    assert len(set(keys)) == len(keys) == SHARDS * IMAGES, story
    assert rows["label"].to_pylist() == [crop_label(int(key)) for key in keys], story
    wanted = np.stack([calm.embeddings[key] for key in keys])
    np.testing.assert_allclose(embeddings_matrix(rows["embedding"]), wanted, rtol=1e-4, atol=1e-5)
    new = {
        shard for key, shard in zip(keys, rows["shard"].to_pylist(), strict=True) if int(key) >= NEW_CONTENT
    }
    assert len(new) == replaced, story
    counts = [name.path16 for name, _ in list_parts(open_store(str(table)))]
    assert len(counts) == PARTS, story  # no part of an old version is left
    checked = verify_table(open_store(str(table)))
    assert not checked.damage and not checked.leftovers and not checked.unfinished, story + str(checked)
    assert set(counts) == {path16_of(f"{shard:05d}.tar") for shard in range(SHARDS)}, story
    print(story, end="")


@dataclass(frozen=True)
class Driver:
    """A running command, and the mark by which its own and its Ray's processes are known."""

    process: subprocess.Popen[str]
    mark: str


@contextmanager
def drivers(count: int, repository: Path, recipe: Path) -> Iterator[list[Driver]]:
    """Drivers that work on one table, each with a Ray of its own; nothing of them is left afterwards."""
    running = []
    try:
        for _ in range(count):
            mark = uuid.uuid4().hex
            process = start("extract", repository, recipe, environment={"ENGINE_TEST_MARK": mark})
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
        for pid in processes_with(driver.mark):
            if TITLES[victim] in title_of(pid):
                kill_process(pid)
                return
    raise AssertionError(f"the driver ended before a {victim} was seen")


def processes_with(mark: str) -> list[int]:
    """Processes that have the mark in the environment they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # ended meanwhile
    return found


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
