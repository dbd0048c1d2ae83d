"""A step whose images several workers hand in: what each of them adds is, together, the step of one that has them all.

Each worker's part is computed by itself from the same weights; gradients add up, so what plain descent does to the
weights does, too.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from engine.backbones.base import PixelScaling
from engine.finetuning.augment import Augmenter
from engine.finetuning.kinds import AugmentConfig, FinetuneTrainingConfig
from engine.finetuning.order import Feed
from engine.finetuning.step import Classifier, compile_step
from engine.heads.kinds import MlpHeadConfig, open_head
from engine.strategies.kinds import OneDevice, open_strategy

SIDE, CLASSES, COUNT = 12, 3, 11
SMALL = PixelScaling("small", (1 / 128,) * 3, (-1.0,) * 3)
CHANGING = AugmentConfig(crop=0.5, rotation=20, contrast=0.3, rand_augment=1)


def step_of(feed: Feed, augment: AugmentConfig, images_at_once: int | None = None) -> tuple[float, list[Any]]:
    """Loss of step 3, and how it moved each weight."""
    strategy = open_strategy(OneDevice())
    config = FinetuneTrainingConfig(
        batch_size=COUNT, images_at_once=images_at_once, clip_norm=None, label_smoothing=0.1
    )
    with strategy.scope():
        keras.utils.set_random_seed(3)
        backbone = keras.Sequential(
            [
                keras.Input((SIDE, SIDE, 3)),
                keras.layers.Conv2D(5, 3, activation="relu"),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )
        head = open_head(MlpHeadConfig(kind="mlp", hidden=(7,), dropout=0.4))
        network = head.build(5, CLASSES, 0)
        random = np.random.default_rng(1)
        for variable in network.trainable_variables:  # a new head answers 0, whatever it sees
            variable.assign(random.normal(size=variable.shape))
        classifier = Classifier(SMALL, backbone, head, network)
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build(classifier.learning)
    before = [np.array(one) for one in classifier.learning]
    step = compile_step(strategy, classifier, optimizer, Augmenter(augment, 5), config, COUNT)
    loss = float(step(3, feed))
    return loss, [np.array(one) - old for one, old in zip(classifier.learning, before, strict=True)]


def feed_of(places: list[int], padding: int) -> Feed:
    """Of a batch of eleven images those at some places, and padding behind them."""
    random = np.random.default_rng(0)
    pixels_BSS3 = random.integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
    weights_B = (1 + np.arange(COUNT) % 3).astype(np.float32)
    count = len(places) + padding
    own = Feed(
        np.zeros((count, SIDE, SIDE, 3), np.uint8),
        np.zeros(count, np.int64),
        np.zeros((1, count), np.float32),
        np.zeros((1, count), np.int64),
        weights_B.sum(),
    )
    own.pixels_BSS3[: len(places)] = pixels_BSS3[places]
    own.targets_B[: len(places)] = np.arange(COUNT)[places] % CLASSES
    own.weights_RB[0, : len(places)] = weights_B[places]
    own.places_RB[0, : len(places)] = places
    return own


@pytest.mark.parametrize("images_at_once", [None, 2])
def test_steps_of_workers_add_up_to_the_step_of_one(images_at_once: int | None) -> None:
    loss, moves = step_of(feed_of(list(range(COUNT)), 0), CHANGING)
    parts = [
        step_of(feed_of(places, padding), CHANGING, images_at_once)
        for places, padding in (([0, 2, 3, 7, 9, 10], 1), ([1, 4, 5, 6], 0), ([8], 4))
    ]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for place, moved in enumerate(moves):
        assert np.abs(moved).max() > 1e-4, "or equality means nothing"
        np.testing.assert_allclose(sum(part[place] for _, part in parts), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("augment", [CHANGING, AugmentConfig(mixup=0.4), AugmentConfig(cutmix=0.4)])
def test_a_worker_without_an_image_in_a_batch_adds_nothing(augment: AugmentConfig) -> None:
    loss, moves = step_of(feed_of([], 3), augment)
    assert loss == 0.0
    assert not any(moved.any() for moved in moves)


def test_what_happens_to_an_image_hangs_on_its_place_in_the_whole_batch() -> None:
    here, there = feed_of([4], 0), feed_of([4], 0)
    there.places_RB[:] = 5
    assert step_of(here, CHANGING)[0] != step_of(there, CHANGING)[0]
