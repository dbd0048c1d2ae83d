"""Augmentation: seeded, of each image for itself, and the same whatever the number of devices."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from engine.finetuning.augment import Augmenter, _cropped
from engine.finetuning.kinds import AugmentConfig

SIDE = 24
KINDS = {
    "flip": AugmentConfig(),
    "crop": AugmentConfig(flip=False, crop=0.5),
    "rotation": AugmentConfig(flip=False, rotation=20),
    "translation": AugmentConfig(flip=False, translation=0.2),
    "brightness": AugmentConfig(flip=False, brightness=0.3),
    "contrast": AugmentConfig(flip=False, contrast=0.4),
    "saturation": AugmentConfig(flip=False, saturation=0.3),
    "hue": AugmentConfig(flip=False, hue=0.3),
    "rand_augment": AugmentConfig(flip=False, rand_augment=3),
    "all": AugmentConfig(
        crop=0.5, rotation=20, translation=0.2, brightness=0.3, contrast=0.4, saturation=0.3, hue=0.3
    ),
}


def photos(count: int) -> np.ndarray:
    """Windows of a real photo: float32 0..255, (B, S, S, 3)."""
    from skimage import data

    chelsea = data.chelsea()
    return np.stack([chelsea[10 * n : 10 * n + SIDE, 12 * n : 12 * n + SIDE] for n in range(count)]).astype(
        np.float32
    )


def changed(config: AugmentConfig, step: int, places: list[int], count: int = 8, seed: int = 3) -> np.ndarray:
    """As a compiled step does it, of some of the images of a batch."""
    augmenter = Augmenter(config, seed)
    images = photos(8)

    @tf.function
    def run(number: tf.Tensor, places_P: tf.Tensor) -> tf.Tensor:
        drawn = augmenter.draw(count, SIDE, number)
        return augmenter.change(tf.gather(tf.constant(images), places_P), drawn, places_P, count)

    return run(tf.constant(step, tf.int64), tf.constant(places)).numpy()


@pytest.mark.parametrize("name", list(KINDS))
def test_images_are_changed_each_in_its_own_way_and_again_in_the_same(name: str) -> None:
    everyone = list(range(8))
    found = changed(KINDS[name], 0, everyone)
    assert found.shape == (8, SIDE, SIDE, 3)
    assert np.isfinite(found).all()
    assert found.min() >= -1e-3 and found.max() <= 255.001
    np.testing.assert_array_equal(found, changed(KINDS[name], 0, everyone))
    differs = np.abs(found - photos(8)).max(axis=(1, 2, 3)) > 1
    assert differs.any()
    other_step = changed(KINDS[name], 1, everyone)
    other_seed = changed(KINDS[name], 0, everyone, seed=4)
    assert np.abs(found - other_step).max() > 1
    assert np.abs(found - other_seed).max() > 1
    same = changed(KINDS[name], 0, [2] * 8) if name == "all" else None
    if same is not None:  # the same place of the batch
        np.testing.assert_allclose(same, np.broadcast_to(found[2], same.shape), atol=1e-2)


@pytest.mark.parametrize("name", list(KINDS))
def test_what_happens_to_an_image_does_not_depend_on_who_else_is_on_its_device(name: str) -> None:
    whole = changed(KINDS[name], 5, list(range(8)))
    np.testing.assert_allclose(changed(KINDS[name], 5, [4, 5, 6, 7]), whole[4:], atol=1e-3)
    # Padding at the end makes the batch longer.
    np.testing.assert_allclose(changed(KINDS[name], 5, [0, 3], count=9), whole[[0, 3]], atol=1e-3)


def test_nothing_asked_for_is_nothing_done() -> None:
    np.testing.assert_array_equal(changed(AugmentConfig(flip=False), 0, [0, 1, 2]), photos(3))


@pytest.mark.parametrize(
    "config", [AugmentConfig(flip=False, mixup=0.4), AugmentConfig(flip=False, cutmix=1.0)]
)
def test_mixing_takes_of_another_image_what_it_takes_of_its_label(config: AugmentConfig) -> None:
    augmenter = Augmenter(config, 0)
    own, others = np.zeros((200, SIDE, SIDE, 3), np.float32), np.full((200, SIDE, SIDE, 3), 255, np.float32)
    places = tf.range(200)
    drawn = augmenter.draw(200, SIDE, tf.constant(0, tf.int64))
    mixed, share = augmenter.mix(tf.constant(own), tf.constant(others), drawn, places)
    taken = mixed.numpy().mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(1 - taken, share.numpy(), atol=1e-4)
    assert share.numpy().std() > 0.1
    assert 0.3 < share.numpy().mean() < 0.95


def test_contrast_is_raised_and_lowered() -> None:
    spread = np.concatenate(
        [
            changed(KINDS["contrast"], step, list(range(8))).std(axis=(1, 2, 3))
            / photos(8).std(axis=(1, 2, 3))
            for step in range(4)
        ]
    )
    assert (spread < 0.95).any() and (spread > 1.05).any()


@pytest.mark.parametrize("most", [0.05, 0.5])
def test_no_more_is_cut_away_than_is_allowed(most: float) -> None:
    """Of an image that is a ramp from left to right and from top to bottom, by how steep its cut is."""
    ramp = np.arange(SIDE, dtype=np.float32)
    image = np.zeros((1, SIDE, SIDE, 3), np.float32)
    image[0, :, :, 0], image[0, :, :, 1] = ramp[None, :], ramp[:, None]
    numbers = np.random.default_rng(0).random((500, 4)).astype(np.float32)
    cut = _cropped(tf.repeat(tf.constant(image), 500, axis=0), tf.constant(numbers), most).numpy()
    width = (cut[:, 0, -1, 0] - cut[:, 0, 0, 0]) / (SIDE - 1)
    height = (cut[:, -1, 0, 1] - cut[:, 0, 0, 1]) / (SIDE - 1)
    assert (width * height).min() >= 1 - most - 1e-3
    assert (width * height).min() < 1 - 0.9 * most
    assert np.abs(np.log(width / height)).max() > 0.8 * min(np.log(4 / 3), -np.log(1 - most))


def test_flips_happen_to_about_half_of_the_images() -> None:
    flips = sum(
        float(
            (
                np.abs(changed(AugmentConfig(), step, list(range(8))) - photos(8)).max(axis=(1, 2, 3)) > 1
            ).mean()
        )
        for step in range(12)
    )
    assert 0.3 < flips / 12 < 0.7
