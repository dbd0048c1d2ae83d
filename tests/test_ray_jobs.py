"""What is followed ends at Ctrl-C, whatever comes at the same moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
