"""RandAugment: operations as Pillow does them, of each image for itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from engine.finetuning.augment import Augmenter
from engine.finetuning.kinds import AugmentConfig
from engine.finetuning.rand_augment import OPERATIONS, TRANSLATION, rand_augment
from tests.finetuning.test_augment import photos

SIDE = 24
HALF = {1: 1.45, -1: 0.55}  # factors of a magnitude of 0.5, either side
PILLOW: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "identity": lambda image, side: image,
    "auto_contrast": lambda image, side: ImageOps.autocontrast(image),
    "equalize": lambda image, side: ImageOps.equalize(image),
    "solarize": lambda image, side: ImageOps.solarize(image, 128),
    "posterize": lambda image, side: ImageOps.posterize(image, 6),
    "color": lambda image, side: ImageEnhance.Color(image).enhance(HALF[side]),
    "contrast": lambda image, side: ImageEnhance.Contrast(image).enhance(HALF[side]),
    "brightness": lambda image, side: ImageEnhance.Brightness(image).enhance(HALF[side]),
    "sharpness": lambda image, side: ImageEnhance.Sharpness(image).enhance(HALF[side]),
}
EXACT = {"identity", "equalize", "solarize", "posterize"}


def images() -> np.ndarray:
    """Of a photo: five windows, one of them dull, and one colour all over."""
    found = np.round(photos(6))
    found[1] = np.round(0.3 * found[1] + 20)
    found[5] = 37
    return found


def by(name: str, pixels: np.ndarray, signed: float) -> np.ndarray:
    changed = OPERATIONS[name](tf.constant(pixels), tf.fill([len(pixels)], signed))
    return np.asarray(changed)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("name", list(PILLOW))
def test_colours_are_changed_as_pillow_changes_them(name: str, side: int) -> None:
    expected = [np.asarray(PILLOW[name](Image.fromarray(one), side)) for one in images().astype(np.uint8)]
    # Pillow rounds the grey image, and then cuts off what is behind the point.
    np.testing.assert_allclose(by(name, images(), 0.5 * side), expected, atol=0 if name in EXACT else 1.5)


def test_translation_and_shear_move_by_so_many_pixels() -> None:
    magnitude = 6 / (TRANSLATION * SIDE)
    found = by("translate_x", images(), magnitude)
    np.testing.assert_allclose(found[:, :, :-6], images()[:, :, 6:], atol=1e-3)
    np.testing.assert_allclose(found[:, :, -6:], images()[:, :, :-7:-1], atol=1e-3)  # mirrored
    found = by("translate_y", images(), -magnitude)
    np.testing.assert_allclose(found[:, 6:], images()[:, :-6], atol=1e-3)
    found = by("shear_x", images(), 1.0)
    np.testing.assert_allclose(found[:, 20, :-6], images()[:, 20, 6:], atol=1e-2)
    found = by("shear_y", images(), -1.0)
    np.testing.assert_allclose(found[:, 3:, 10], images()[:, :-3, 10], atol=1e-2)


def test_rotation_is_by_thirty_degrees_at_most_and_around_the_middle() -> None:
    from skimage.transform import rotate

    middle = slice(6, -6)
    for side in (1, -1):
        found = by("rotate", images(), float(side))
        expected = np.stack([rotate(one, 30 * side, order=1) for one in images()])
        np.testing.assert_allclose(found[:, middle, middle], expected[:, middle, middle], atol=0.1)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_magnitude_of_zero_changes_nothing_where_there_is_one(name: str) -> None:
    changed = np.abs(by(name, images(), 0.0) - images()).max()
    assert (changed > 50) if name in {"auto_contrast", "equalize"} else (changed < 1e-3)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_takes_an_empty_portion_and_stays_in_range(name: str) -> None:
    assert by(name, images()[:0], 0.5).shape == (0, SIDE, SIDE, 3)
    noise = np.random.default_rng(0).uniform(0, 255, (5, SIDE, SIDE, 3)).astype(np.float32)
    for signed in (1.0, -1.0):
        found = by(name, noise, signed)
        assert found.dtype == np.float32
        assert found.min() >= 0 and found.max() <= 255.001


def test_levels_are_counted_on_the_host() -> None:
    """On a GPU that would fail: strategies ask TensorFlow for operations that repeat exactly."""
    graph = tf.function(OPERATIONS["equalize"]).get_concrete_function(
        tf.TensorSpec((None, SIDE, SIDE, 3)), tf.TensorSpec((None,))
    )
    counting = [node for node in graph.graph.get_operations() if "Bincount" in node.type]
    assert counting and all("CPU:0" in node.device for node in counting)


def test_each_image_gets_the_operations_that_it_drew_one_after_the_other() -> None:
    names = list(OPERATIONS)
    pixels = np.repeat(images()[:1], 14, axis=0)
    order = np.random.default_rng(0).permutation(14)
    numbers = np.zeros((14, 2, 2), np.float32)
    numbers[:, 0] = np.stack([(order + 0.5) / 14, np.full(14, 0.7)], axis=1)
    numbers[:, 1] = (names.index("posterize") + 0.5) / 14, 0.2
    found = np.asarray(rand_augment(tf.constant(pixels), tf.constant(numbers), 0.75))
    for place, which in enumerate(order):
        expected = by("posterize", by(names[which], pixels[:1], 0.75), -0.75)
        np.testing.assert_allclose(found[place], expected[0], atol=1e-3)


def test_within_a_batch_all_operations_are_drawn_about_evenly_and_to_both_sides() -> None:
    augmenter = Augmenter(AugmentConfig(flip=False, rand_augment=1, rand_magnitude=1), 0)
    pixels = tf.repeat(tf.constant(photos(1)), 1400, axis=0)
    drawn = augmenter.draw(1400, SIDE, tf.constant(3, tf.int64))
    found = augmenter.change(pixels, drawn, tf.range(1400), 1400).numpy().reshape(1400, -1)
    _, counts = np.unique(found.round(1), axis=0, return_counts=True)
    # Nine operations have two sides; five look the same from both.
    assert len(counts) == 2 * 9 + 5
    assert sorted(counts)[0] > 25 and sorted(counts)[-1] < 140
    assert (np.sort(counts)[-5:] > 70).all()
