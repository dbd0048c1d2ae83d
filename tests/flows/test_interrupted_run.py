"""15,000 images in 15 shards; the driver killed half-way; Ctrl-C. Each time the table is that of one calm run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from engine.storage import open_store
from engine.tables import open_table
from tests.flows.archives import extract_recipe, write_shards
from tests.flows.conftest import Engine

SHARDS, IMAGES = 15, 1000
START_TIMEOUT_S = 180


def start(verb: str, repository: Path, recipe: Path) -> subprocess.Popen[str]:
    """Start the command in a process group of its own, as a terminal or a job supervisor would."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", verb, str(recipe)],
        cwd=repository,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_parts(table: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(list((table / "data").glob("*.parquet"))) < count:
        assert process.poll() is None, f"ended by itself: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "no parts were written in time"
        time.sleep(0.02)


def keys_of(table: Path) -> Counter[str]:
    return Counter(open_table(open_store(str(table))).read(["key"])["key"].to_pylist())


def test_fifteen_thousand_images_each_once_whatever_kills_the_driver(
    repository: Path, engine: Engine, tmp_path: Path
) -> None:
    keys = write_shards(open_store(str(tmp_path / "shards")), SHARDS, IMAGES)
    table = tmp_path / "table"
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(table))

    killed = start("extract", repository, recipe)
    wait_for_parts(table, 20, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    parts_after_kill = len(list((table / "data").glob("*.parquet")))
    assert parts_after_kill < SHARDS * 16

    interrupted = start("extract", repository, recipe)
    wait_for_parts(table, parts_after_kill + 20, interrupted)
    os.kill(interrupted.pid, signal.SIGTERM)
    output, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, output
    assert "run the same command again" in output
    parts_after_interrupt = len(list((table / "data").glob("*.parquet")))
    assert parts_after_kill < parts_after_interrupt < SHARDS * 16

    finished = engine("extract", recipe, "--json")
    assert finished.code == 0, finished.stderr
    assert keys_of(table) == Counter(keys)
    assert finished.summary["parts_written"] <= SHARDS * 16 - parts_after_interrupt
    rerun = engine("extract", recipe, "--json")
    assert (rerun.summary["parts_written"], rerun.summary["bytes_read"]) == (0, 0)
