"""One suite over every strategy: for the same global batches, the loss trace of `one_device` within 1e-4.

Strategies of more than one device get a process of their own (this file, run as a program): logical devices must
exist before TensorFlow runs, and one process can hold collectives of one size only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from engine.heads.bundle import TrainedHead, publish_bundle
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig
from engine.storage import open_store
from engine.strategies.kinds import StrategyConfig, open_strategy
from engine.training.grid import Candidate
from engine.training.kinds import AdamConfig, TrainingConfig
from engine.training.loop import TrainingRows, train_heads

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
    rows = TrainingRows(embeddings_ND, classes_N, order[:907], order[907:])
    optimizer = AdamConfig(learning_rate=0.01, weight_decay=0.5)
    config = TrainingConfig(epochs=3, batch_size=101, class_weights="balanced", label_smoothing=0.1)
    dropping = MlpHeadConfig(kind="mlp", hidden=(32, 16), dropout=0.2)
    faster = AdamConfig(learning_rate=0.03, weight_decay=0.5)
    tried = [Candidate(LinearHeadConfig(), optimizer), Candidate(dropping, faster)]
    linear, mlp = train_heads(tried, strategy, rows, config, lambda report: None)
    head = TrainedHead(LinearHeadConfig(), linear.network, tuple("abcde"), "single_label")
    record = {"fingerprint": "f", "width": 37}
    bundle = publish_bundle(open_store(str(folder)), head, table_record=record, metrics={}, recipe={})
    return {
        "replicas": strategy.num_replicas_in_sync,
        "losses": [
            [epoch.train_loss, epoch.validation_loss] for one in (linear, mlp) for epoch in one.result.history
        ],
        "weights": [
            float(number)
            for network in (bundle.network(), mlp.network)
            for array in network.get_weights()
            for number in array.flat
        ],
    }


def trace_in_a_fresh_process(strategy_json: str, folder: Path) -> dict[str, Any]:
    """The same, with the environment that Ray Train gives its workers."""
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, strategy_json, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "trace.json").read_text())
    return result


@cache
def reference() -> dict[str, Any]:
    """The trace of one device."""
    with tempfile.TemporaryDirectory() as folder:
        return trace('{"kind": "one_device"}', Path(folder))


def assert_same_trace(replicated: dict[str, Any], replicas: int) -> None:
    assert (reference()["replicas"], replicated["replicas"]) == (1, replicas)
    losses = [train_loss for train_loss, _ in reference()["losses"]]
    for first, last in ((losses[0], losses[2]), (losses[3], losses[5])):
        assert last < 0.9 * first, "a head must learn something for the comparison to mean anything"
    for ours, theirs in zip(replicated["losses"], reference()["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert replicated["weights"] == pytest.approx(reference()["weights"], abs=1e-4)


def test_mirrored_on_one_device_gives_the_trace_of_one_device(tmp_path: Path) -> None:
    assert_same_trace(trace('{"kind": "mirrored", "devices_per_worker": 1}', tmp_path), 1)


@pytest.mark.parametrize("devices", [2, 4])
def test_mirrored_on_several_devices_gives_the_trace_of_one_device(devices: int, tmp_path: Path) -> None:
    strategy_json = json.dumps({"kind": "mirrored", "devices_per_worker": devices})
    assert_same_trace(trace_in_a_fresh_process(strategy_json, tmp_path), devices)


if __name__ == "__main__":
    traced = trace(sys.argv[1], Path(sys.argv[2]))
    Path(sys.argv[2], "trace.json").write_text(json.dumps(traced))
