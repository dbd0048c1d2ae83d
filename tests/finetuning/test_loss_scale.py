"""Scaling of the loss for float16: exact where nothing overflows, and a step that does changes nothing.

Two devices get a process of their own (this file, run as a program): logical devices must exist before TensorFlow runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from engine.backbones.base import PixelScaling
from engine.finetuning import step as steps
from engine.finetuning.augment import Augmenter
from engine.finetuning.finetune import _policy
from engine.finetuning.kinds import AugmentConfig, FinetuneTrainingConfig
from engine.finetuning.order import Feed
from engine.finetuning.step import Classifier, compile_step, overflows_unscaled, with_loss_scale
from engine.heads.kinds import LinearHeadConfig, open_head
from engine.strategies.kinds import Mirrored, OneDevice, open_strategy

ROOT = Path(__file__).parents[2]
SIDE, CLASSES, COUNT = 12, 3, 7
SMALL = PixelScaling("small", (1 / 128,) * 3, (-1.0,) * 3)
OVERFLOWING = 2.0**18


class Training:
    """Seven images of noise, three classes, one convolution."""

    def __init__(self, strategy: tf.distribute.Strategy, precision: str, growth_steps: int = 0) -> None:
        config = FinetuneTrainingConfig(batch_size=COUNT, images_at_once=3, clip_norm=0.05)
        with strategy.scope(), _policy(precision):
            keras.utils.set_random_seed(3)
            backbone = keras.Sequential(
                [
                    keras.Input((SIDE, SIDE, 3)),
                    keras.layers.Conv2D(5, 3, activation="relu"),
                    keras.layers.GlobalAveragePooling2D(),
                ]
            )
            with _policy("float32"):
                head = open_head(LinearHeadConfig())
                network = head.build(5, CLASSES, 0)
            start = np.random.default_rng(1).normal(size=(5, CLASSES))
            network.trainable_variables[0].assign(start)
            self.classifier = Classifier(SMALL, backbone, head, network)
            self.optimizer: Any = keras.optimizers.Adam(0.02)
            if growth_steps:
                self.optimizer = with_loss_scale(self.optimizer, COUNT, growth_steps)
            self.optimizer.build(self.classifier.learning)
        augmenter = Augmenter(AugmentConfig(rand_augment=2), 0)
        self._step = compile_step(strategy, self.classifier, self.optimizer, augmenter, config, COUNT)
        self._shape = strategy.num_replicas_in_sync, -(-COUNT // strategy.num_replicas_in_sync)
        self._number = 0

    def step(self) -> float:
        random = np.random.default_rng(self._number)
        replicas, share = self._shape
        pixels = np.zeros((replicas * share, SIDE, SIDE, 3), np.uint8)
        pixels[:COUNT] = random.integers(0, 256, (COUNT, SIDE, SIDE, 3))
        targets = np.zeros(replicas * share, np.int64)
        targets[:COUNT] = np.arange(COUNT) % CLASSES
        weights = np.zeros(self._shape, np.float32)
        weights.flat[:COUNT] = 1
        self._number += 1
        places = np.arange(weights.size).reshape(self._shape)
        return float(self._step(self._number - 1, Feed(pixels, targets, weights, places, weights.sum())))

    @property
    def scale(self) -> float:
        return float(self.optimizer.dynamic_scale.numpy())

    def weights(self) -> list[np.ndarray]:
        return [np.array(one) for one in self.classifier.learning]

    def moments(self) -> list[np.ndarray]:
        return [np.array(one) for one in self.optimizer.inner_optimizer.variables]


def one_device() -> tf.distribute.Strategy:
    return open_strategy(OneDevice())


def trace(
    strategy: tf.distribute.Strategy, precision: str, growth_steps: int = 0, overflows: bool = False
) -> dict[str, Any]:
    """Nine steps; the fourth of them overflows if asked for."""
    training = Training(strategy, precision, growth_steps)
    losses, scales = [], []
    for number in range(9):
        if number == 3 and overflows:
            training.optimizer.dynamic_scale.assign(OVERFLOWING)
        losses.append(training.step())
        scales.append(training.scale if growth_steps else 1.0)
    return {
        "losses": losses,
        "scales": scales,
        "taken": int(training.optimizer.iterations.numpy()),
        "sums": [float(np.abs(one).sum(dtype=np.float64)) for one in training.weights()],
    }


@cache
def plain() -> dict[str, Any]:
    """In float32, with no scaling."""
    return trace(one_device(), "float32")


def test_a_step_that_overflows_changes_nothing_but_the_scale() -> None:
    training = Training(one_device(), "mixed_float16", 2000)
    training.step()
    training.optimizer.dynamic_scale.assign(OVERFLOWING)
    weights, moments = training.weights(), training.moments()
    loss = training.step()
    assert np.isfinite(loss)
    for before, after in zip(weights + moments, training.weights() + training.moments(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (training.scale, int(training.optimizer.iterations.numpy())) == (OVERFLOWING / 2, 1)
    while int(training.optimizer.iterations.numpy()) == 1:
        training.step()
    assert training.scale < OVERFLOWING / 2
    assert any((one != other).any() for one, other in zip(weights, training.weights(), strict=True))


def test_the_scale_begins_as_for_a_mean_and_doubles_after_steps_without_overflow() -> None:
    found = trace(one_device(), "mixed_float16", growth_steps=4)
    assert found["scales"] == [4096.0] * 3 + [8192.0] * 4 + [16384.0] * 2
    assert found["taken"] == 9


def test_the_scale_has_a_least_and_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LOSS_SCALES", (OVERFLOWING, 2 * OVERFLOWING))
    training = Training(one_device(), "mixed_float16", 2000)
    for _ in range(3):
        training.step()
        assert training.scale == OVERFLOWING
        assert overflows_unscaled(training.optimizer)
    monkeypatch.setattr(steps, "LOSS_SCALES", (1.0, 4096.0))
    training = Training(one_device(), "mixed_float16", 1)
    training.step()
    assert training.scale == 4096.0
    assert not overflows_unscaled(training.optimizer)


def test_scaling_changes_nothing_in_float32() -> None:
    found = trace(one_device(), "float32", growth_steps=2)
    assert found["scales"][-1] == 2.0**16
    np.testing.assert_allclose(found["losses"], plain()["losses"], rtol=1e-6)
    np.testing.assert_allclose(found["sums"], plain()["sums"], rtol=1e-6)
    assert plain()["losses"][-1] < plain()["losses"][0] - 0.05  # it learns, so that equality means something


def test_float16_is_near_float32() -> None:
    found = trace(one_device(), "mixed_float16", growth_steps=2000)
    np.testing.assert_allclose(found["losses"], plain()["losses"], rtol=5e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("mixed_float16", 1e-3)])
def test_two_devices_give_the_trace_of_one(precision: str, tolerance: float, tmp_path: Path) -> None:
    overflows = precision == "mixed_float16"
    expected = trace(one_device(), precision, 2, overflows)
    command = [sys.executable, __file__, json.dumps([precision, 2, overflows]), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "trace.json").read_text())
    assert (found["taken"], found["scales"]) == (expected["taken"], expected["scales"])
    assert (found["taken"] < 9) == overflows
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=tolerance)
    np.testing.assert_allclose(found["sums"], expected["sums"], rtol=tolerance)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    strategy = open_strategy(Mirrored(devices_per_worker=2))
    (Path(sys.argv[2]) / "trace.json").write_text(json.dumps(trace(strategy, *given)))
