"""One suite over every strategy: for the same global batches, the loss trace of `one_device` within 1e-4.

Strategies of more than one device get a process of their own (this file, run as a program): logical devices must
exist before TensorFlow runs, and one process can hold collectives of one size only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from engine.errors import EngineError
from engine.heads.bundle import TrainedHead, publish_bundle
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig
from engine.storage import open_store
from engine.strategies.kinds import MultiWorker, StrategyConfig, open_strategy
from engine.training import passes
from engine.training.grid import Candidate
from engine.training.kinds import AdamConfig, LbfgsConfig, TrainingConfig
from engine.training.loop import TrainingRows, train_heads
from engine.training.rows import empty_rows

ROOT = Path(__file__).parents[2]


def trace(strategy_json: str, folder: Path) -> dict[str, Any]:
    """Train two small heads under a strategy and publish one; losses, and weights as the bundle gives them back.

    Batches of 101 rows: neither 2 nor 4 divides them, and the last one of an epoch is short. Class weights and
    weight decay are on, since both would show a replica that is counted twice; dropout, whose numbers would differ if
    every device drew its own.
    """
    strategy = open_strategy(TypeAdapter(StrategyConfig).validate_json(strategy_json))
    rng = np.random.default_rng(0)
    embeddings_ND = rng.normal(size=(1009, 37)).astype(np.float32)
    classes_N = (embeddings_ND @ rng.normal(size=(37, 5)) + [2, 0, 0, 0, -1]).argmax(axis=1)
    order = rng.permutation(1009)
    passes.ROWS_AT_ONCE = 100  # several portions of a full batch
    if os.environ.get("TRACE_ROWS") == "disk":
        on_disk_ND = empty_rows(embeddings_ND.shape, np.float32, folder)
        on_disk_ND[:] = embeddings_ND
        embeddings_ND = on_disk_ND
    rows = TrainingRows(embeddings_ND, classes_N, order[:907], order[907:])
    optimizer = AdamConfig(learning_rate=0.01, weight_decay=0.5)
    config = TrainingConfig(epochs=3, batch_size=101, class_weights="balanced", label_smoothing=0.1)
    dropping = MlpHeadConfig(kind="mlp", hidden=(32, 16), dropout=0.2)
    faster = AdamConfig(learning_rate=0.03, weight_decay=0.5)
    tried = [Candidate(LinearHeadConfig(), optimizer), Candidate(dropping, faster)]
    linear, mlp = train_heads(tried, strategy, rows, config, lambda report: None)
    still = MlpHeadConfig(kind="mlp", hidden=(8,), dropout=0, activation="tanh")
    at_once = [Candidate(head, LbfgsConfig(kind="lbfgs", l2=0.01)) for head in (LinearHeadConfig(), still)]
    whole, curved = train_heads(at_once, strategy, rows, config, lambda report: None)
    head = TrainedHead(LinearHeadConfig(), linear.network, tuple("abcde"), "single_label")
    record = {"fingerprint": "f", "width": 37}
    bundle = publish_bundle(open_store(str(folder)), head, table_record=record, metrics={}, recipe={})
    return {
        "replicas": strategy.num_replicas_in_sync,
        "losses": [
            [epoch.train_loss, epoch.validation_loss]
            for one in (linear, mlp, whole, curved)
            for epoch in one.result.history
        ],
        "weights": [
            float(number)
            for network in (bundle.network(), mlp.network, whole.network, curved.network)
            for array in network.get_weights()
            for number in array.flat
        ],
    }


def traces_of_fresh_processes(strategy_json: str, folder: Path, count: int = 1) -> list[dict[str, Any]]:
    """The same in each of so many processes, which know of each other as Ray Train's workers do."""
    addresses = free_addresses(count)
    running = []
    for rank in range(count):
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": str(ROOT)}
        if count > 1:
            task = {"type": "worker", "index": rank}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        own = folder / str(rank)
        own.mkdir()
        command = [sys.executable, __file__, strategy_json, str(own)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    require_done(running)
    return [json.loads((folder / str(rank) / "trace.json").read_text()) for rank in range(count)]


def require_done(running: Sequence[subprocess.Popen[str]]) -> None:
    """Each must end well; none is left behind."""
    try:
        for process in running:
            _, stderr = process.communicate(timeout=170)
            assert process.returncode == 0, stderr[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait(10)


def free_addresses(count: int) -> list[str]:
    """Of this machine, and nobody's now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


@cache
def reference() -> dict[str, Any]:
    """The trace of one device."""
    with tempfile.TemporaryDirectory() as folder:
        return trace('{"kind": "one_device"}', Path(folder))


def assert_same_trace(replicated: dict[str, Any], replicas: int) -> None:
    assert (reference()["replicas"], replicated["replicas"]) == (1, replicas)
    losses = [train_loss for train_loss, _ in reference()["losses"]]
    assert len(losses) == 12  # three epochs of four heads
    for first, last in zip(losses[::3], losses[2::3], strict=True):
        assert last < 0.9 * first, "a head must learn something for the comparison to mean anything"
    for ours, theirs in zip(replicated["losses"], reference()["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert replicated["weights"] == pytest.approx(reference()["weights"], abs=1e-4)


def test_mirrored_on_one_device_gives_the_trace_of_one_device(tmp_path: Path) -> None:
    assert_same_trace(trace('{"kind": "mirrored", "devices_per_worker": 1}', tmp_path), 1)


@pytest.mark.parametrize("devices", [2, 4])
def test_mirrored_on_several_devices_gives_the_trace_of_one_device(devices: int, tmp_path: Path) -> None:
    strategy_json = json.dumps({"kind": "mirrored", "devices_per_worker": devices})
    (found,) = traces_of_fresh_processes(strategy_json, tmp_path)
    assert_same_trace(found, devices)


@pytest.mark.parametrize("workers", [2, 4])
def test_every_one_of_several_workers_gives_the_trace_of_one_device(workers: int, tmp_path: Path) -> None:
    strategy_json = json.dumps({"kind": "multi_worker", "workers": workers})
    for found in traces_of_fresh_processes(strategy_json, tmp_path, workers):
        assert_same_trace(found, workers)


def test_two_workers_with_rows_on_the_disk_give_the_trace_of_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACE_ROWS", "disk")
    for found in traces_of_fresh_processes('{"kind": "multi_worker", "workers": 2}', tmp_path, 2):
        assert_same_trace(found, 2)


def test_a_lone_worker_gives_the_trace_of_one_device(tmp_path: Path) -> None:
    (found,) = traces_of_fresh_processes('{"kind": "multi_worker", "workers": 1}', tmp_path)
    assert_same_trace(found, 1)


def test_a_worker_that_knows_no_others_says_so() -> None:
    with pytest.raises(EngineError, match=r"(?s)not one of 3.*addresses of 3 workers"):
        open_strategy(MultiWorker(kind="multi_worker", workers=3))


if __name__ == "__main__":
    traced = trace(sys.argv[1], Path(sys.argv[2]))
    Path(sys.argv[2], "trace.json").write_text(json.dumps(traced))
