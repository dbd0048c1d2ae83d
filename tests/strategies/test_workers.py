"""What training workers tell each other, in two processes that do: each gets the same, and of each what it said.

The processes run this file as a program: collectives of one size are all that a process can hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.strategies.kinds import Mirrored, MultiWorker, OneDevice, open_strategy
from engine.strategies.workers import Workers
from tests.contracts.test_strategy_contract import free_addresses, require_done

ROOT = Path(__file__).parents[2]
COUNT = 2


def said_by(rank: int) -> list[bytes]:
    """Of very different lengths: none is a multiple of four bytes, one takes several sums, and nothing at all."""
    lengths = ((7, 0, 0), (250_001, 3, 0))[rank]
    return [np.random.default_rng(rank).bytes(length) for length in lengths]


def said(workers: Workers) -> dict[str, list[float] | list[str]]:
    """What this worker heard."""
    from engine.strategies import workers as module

    module.SUMMED_AT_ONCE = 10_000
    rank = workers.rank
    found = {
        "each": workers.each(2.5 * rank),
        "float32": workers.summed(np.full((2, 3), rank + 0.25, np.float32)),
        "float64": workers.summed(np.array([1e-17 if rank else 1.0, np.inf if rank == 1 else 0.0])),
        "int32": workers.summed(np.arange(3, dtype=np.int32) * (rank - 1)),
        "none": workers.summed(np.empty(0, np.float32)),
    }
    heard = {name: np.asarray(one).ravel().tolist() for name, one in found.items()}
    return heard | {
        "gathered": [one.hex() for content in said_by(rank) for one in workers.gathered(content)],
        "who": [workers.rank, workers.count, workers.devices],
    }


def test_two_workers_hear_the_same_sums_and_the_bytes_of_each(tmp_path: Path) -> None:
    addresses, running = free_addresses(COUNT), []
    for rank in range(COUNT):
        task = {"type": "worker", "index": rank}
        described = json.dumps({"cluster": {"worker": addresses}, "task": task})
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": described}
        command = [sys.executable, __file__, str(tmp_path / f"{rank}.json")]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    require_done(running)
    for rank in range(COUNT):
        heard = json.loads((tmp_path / f"{rank}.json").read_text())
        assert heard["who"] == [rank, 2, 1]
        assert heard["each"] == [0.0, 2.5]
        assert heard["float32"] == [1.5] * 6
        assert heard["float64"] == [1.0, float("inf")]
        assert heard["int32"] == [0, -1, -2]
        assert heard["none"] == []
        together = [content for both in zip(*map(said_by, range(COUNT)), strict=True) for content in both]
        assert [bytes.fromhex(text) for text in heard["gathered"]] == together


@pytest.mark.parametrize("config", [OneDevice(), Mirrored()])
def test_a_worker_alone_hears_itself(config: OneDevice | Mirrored) -> None:
    workers = Workers(open_strategy(config))
    assert (workers.rank, workers.count, workers.devices) == (0, 1, 1)
    numbers = np.array([1.5, 2.5])
    summed = workers.summed(numbers)
    assert summed.tolist() == [1.5, 2.5] and summed is not numbers
    assert workers.each(3) == [3.0]
    assert workers.gathered(b"abcde") == [b"abcde"]


if __name__ == "__main__":
    opened = open_strategy(MultiWorker(kind="multi_worker", workers=COUNT))
    Path(sys.argv[1]).write_text(json.dumps(said(Workers(opened))))
