"""What is followed ends at Ctrl-C, whatever comes at the same moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, os, signal
from engine.ray_jobs import hand_on

async def pieces():
    for text in ("first", "with Ctrl-C", "after it"):
        await asyncio.sleep(0.01)
        if text == "with Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        yield text

asyncio.run(hand_on(pieces(), lambda text: print(text, flush=True)))
"""


def test_a_piece_of_a_log_that_comes_with_ctrl_c_does_not_swallow_it(repository: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=repository, capture_output=True, text=True, check=False
    )
    assert ended.stderr.endswith("\nKeyboardInterrupt\n"), ended.stderr
    assert ended.stdout.splitlines()[:1] == ["first"] and "after it" not in ended.stdout


@pytest.mark.parametrize("made_of_it", ["pass", "raise OSError('the connection is gone')"])
def test_ctrl_c_ends_it_even_if_the_connection_makes_something_else_of_it(
    repository: Path, made_of_it: str
) -> None:
    script = f"""
import asyncio, os, signal
from types import SimpleNamespace
from engine.ray_jobs import RayJobs

async def pieces(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        {made_of_it}
    for number in range(3):
        yield "a piece\\n"

jobs = RayJobs.__new__(RayJobs)
jobs._client = SimpleNamespace(tail_job_logs=pieces)
asyncio.run(jobs._listen("a job", SimpleNamespace(restart=lambda: None, add=print)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False
    )
    assert ended.stderr.endswith("\nKeyboardInterrupt\n"), ended.stderr
    assert ended.stdout.count("a piece") <= 1
