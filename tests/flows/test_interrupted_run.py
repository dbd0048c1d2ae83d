"""15 shards; kill -9, SIGTERM, Ctrl-C. Each key once (tests/faults compares with a calm run). 15,000 images in `make
chaos`, 6,000 in `make test`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.storage import open_store
from tests.commands import START_TIMEOUT_S, Engine, rows_of, start, wait_for_parts
from tests.flows.archives import crop_label, extract_recipe, write_recipe, write_shards

SHARDS, IMAGES = 15, 1000 if "ENGINE_CHAOS_ROUNDS" in os.environ else 400
PARTS = SHARDS * -(-IMAGES // 64)
# Makes the terminal on its standard input the one whose Ctrl-C it hears, and becomes the command.
TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, such as these tests may be, ignores it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shards are, and the table that the first test makes of them."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_shards(open_store(str(folder / "shards")), SHARDS, IMAGES)
    return folder


def test_each_image_is_there_once_whatever_kills_the_driver(
    repository: Path, engine: Engine, folder: Path
) -> None:
    table = folder / "table"
    recipe = extract_recipe(folder, str(folder / "shards"), str(table))

    killed = start("extract", repository, recipe)
    wait_for_parts(table, 20, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    parts_after_kill = len(list((table / "data").glob("*.parquet")))
    assert parts_after_kill < PARTS

    interrupted = start("extract", repository, recipe)
    wait_for_parts(table, parts_after_kill + 20, interrupted)
    os.kill(interrupted.pid, signal.SIGTERM)
    output, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, output
    assert "run the same command again" in output
    parts_after_interrupt = len(list((table / "data").glob("*.parquet")))
    assert parts_after_kill < parts_after_interrupt < PARTS

    finished = engine("extract", recipe, "--json")
    assert finished.code == 0, finished.stderr
    assert finished.summary["parts_written"] <= PARTS - parts_after_interrupt
    rerun = engine("extract", recipe, "--json")
    assert (rerun.summary["parts_written"], rerun.summary["bytes_read"]) == (0, 0)

    rows = rows_of(table, ["key", "shard", "index", "label"])
    assert rows["key"].to_pylist() == [f"{number:06d}" for number in range(SHARDS * IMAGES)]
    assert rows["index"].to_pylist() == list(range(IMAGES)) * SHARDS
    assert rows["label"].to_pylist() == [crop_label(number) for number in range(SHARDS * IMAGES)]


def test_ctrl_c_at_the_terminal_ends_a_fit_and_publishes_nothing(repository: Path, folder: Path) -> None:
    """Needs the table of the test before; a terminal of its own shows the epochs, and gets the key."""
    text = f"""
embeddings: {{uri: "{folder}/table"}}
training: {{epochs: 99999, patience: 99999}}
output: {{uri: "{folder}/bundle"}}
"""
    recipe = write_recipe(folder, "fit.yaml", text)
    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, sys.executable, "-m", "jobs.cli", "fit", str(recipe)],
        cwd=repository,
        start_new_session=True,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(its_end)
    try:
        shown = read_until(terminal, rb"[1-9]/99999.*validation loss")
        os.write(terminal, b"\x03")
        shown += read_until(terminal, None)
        assert process.wait(timeout=60) == 130, shown
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert "error: interrupted" in shown and "run the same command again" in shown
    assert "Traceback" not in shown
    assert not (folder / "bundle" / "bundle.json").exists()


def read_until(terminal: int, pattern: bytes | None) -> str:
    """What the terminal shows until it matches, or until the program has closed it."""
    shown, deadline = b"", time.monotonic() + START_TIMEOUT_S
    while not (pattern and re.search(pattern, shown)):
        assert time.monotonic() < deadline, shown
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's end of a terminal
            piece = b""
        if not piece:
            assert pattern is None, shown
            break
        shown += piece
    return shown.decode(errors="replace")
