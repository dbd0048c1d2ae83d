"""Changes training images inside the compiled step, with layers of Keras; the same whatever the number of devices.

Keras' layers draw random numbers from a state of their own, which every device would have once. Here a step's numbers
are drawn for the whole batch at once, from seed and step, and each device takes those of its images.

Shape letters: B images of the whole batch, P images of a portion of it, S side in pixels.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from engine.finetuning.kinds import AugmentConfig
from engine.finetuning.rand_augment import rand_augment

PIXEL_RANGE = (0.0, 255.0)
ASPECT_RATIOS = (3 / 4, 4 / 3)
_DRAWS_PER_STEP = 64  # more than all layers together draw


class _StepSeeds(keras.random.SeedGenerator):  # type: ignore[misc]  # Keras has no types
    """What Keras' layers take seeds from: each is a function of seed, step, and how many came before in the step."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=0)
        self._seed = seed
        self._step: Any = None
        self._drawn = 0

    def begin(self, step: tf.Tensor) -> None:
        """A step's first draw comes next."""
        self._step, self._drawn = tf.cast(step, tf.int64), 0

    def next(self, ordered: bool = True) -> Any:
        del ordered
        number = self._step * _DRAWS_PER_STEP + self._drawn
        self._drawn += 1
        mixed = tf.stack([tf.constant(self._seed, tf.int64), number])
        return tf.cast(mixed, keras.src.backend.random_seed_dtype())


class Augmenter:
    """Draws what happens to the images of a step, and does it.

    Args:
        config: what may happen.
        seed: with the step's number decides what does.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._config, self._seeds = config, _StepSeeds(seed)
        self._layers = list(_layers(config))

    @property
    def mixes(self) -> bool:
        """Whether images and labels of a batch are mixed."""
        return bool(self._config.mixup or self._config.cutmix)

    def draw(self, count: int, side_px: int, step: tf.Tensor) -> dict[str, Any]:
        """Numbers for B images of one step. On the host: there the n-th of them does not depend on B, which padding
        changes."""
        with tf.device("CPU:0"):
            self._seeds.begin(step)
            shown = tf.zeros((count, side_px, side_px, 3))  # only its shape counts
            drawn: dict[str, Any] = {
                str(place): layer.get_random_transformation(shown, training=True, seed=self._seeds)
                for place, layer in enumerate(self._layers)
            }
            if self._config.crop:
                drawn["crop"] = self._uniform((count, 4))
            if self.mixes:
                drawn["share"] = self._shares(count)
                drawn["center"] = self._uniform((count, 2))
            if self._config.rand_augment:
                drawn["operations"] = self._uniform((count, self._config.rand_augment, 2))
            return drawn

    def _uniform(self, shape: tuple[int, ...]) -> tf.Tensor:
        return keras.random.uniform(shape, seed=self._seeds)

    def _shares(self, count: int) -> tf.Tensor:
        """Of the image itself, (B,), each from Beta(a, a): X / (X + Y) of two Gamma(a)."""
        parameter = self._config.mixup or self._config.cutmix
        seeds = [tf.cast(self._seeds.next(), tf.int32) for _ in range(2)]
        one_B, other_B = (tf.random.stateless_gamma((count,), seed, parameter) for seed in seeds)
        return one_B / (one_B + other_B)

    def change(
        self, pixels_PSS3: tf.Tensor, drawn: dict[str, Any], places_P: tf.Tensor, count: int
    ) -> tf.Tensor:
        """Images as a step sees them, float32 0..255, (P, S, S, 3).

        Args:
            pixels_PSS3: float32, 0..255.
            drawn: as `draw` gave it.
            places_P: which of the B images these are.
            count: B.
        """

        def own(value: Any) -> Any:
            is_for_each = tf.is_tensor(value) and value.shape.rank and value.shape[0] == count
            return tf.gather(value, places_P) if is_for_each else value

        if self._config.crop:
            pixels_PSS3 = _cropped(pixels_PSS3, own(drawn["crop"]), self._config.crop)
        for place, layer in enumerate(self._layers):
            transformation = tf.nest.map_structure(own, drawn[str(place)])
            # Colours of 0..1: of others RandomSaturation leaves the range (Keras 3.15).
            scale = 255.0 if isinstance(layer, keras.layers.RandomSaturation) else 1.0
            pixels_PSS3 = scale * layer.transform_images(pixels_PSS3 / scale, transformation, training=True)
        if self._config.rand_augment:
            pixels_PSS3 = rand_augment(pixels_PSS3, own(drawn["operations"]), self._config.rand_magnitude)
        return pixels_PSS3

    def mix(
        self, pixels_PSS3: tf.Tensor, others_PSS3: tf.Tensor, drawn: dict[str, Any], places_P: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Images with some of the others in them, and what share of each, (P,), is its own."""
        share_P = tf.gather(drawn["share"], places_P)
        if self._config.mixup:
            weight = share_P[:, None, None, None]
            return weight * pixels_PSS3 + (1 - weight) * others_PSS3, share_P
        is_own_PSS, share_P = _outside_of_box(
            share_P, tf.gather(drawn["center"], places_P), pixels_PSS3.shape[1]
        )
        return tf.where(is_own_PSS[..., None], pixels_PSS3, others_PSS3), share_P


def _layers(config: AugmentConfig) -> Any:
    """Those that have something to do."""
    layers = keras.layers
    outside = {"fill_mode": "reflect", "interpolation": "bilinear"}
    if config.flip:
        yield layers.RandomFlip("horizontal")
    if config.rotation:
        yield layers.RandomRotation(config.rotation / 360, **outside)
    if config.translation:
        yield layers.RandomTranslation(config.translation, config.translation, **outside)
    if config.brightness:
        yield layers.RandomBrightness(config.brightness, value_range=PIXEL_RANGE)
    if config.contrast:
        # Of one number Keras would only raise contrast (3.15).
        yield layers.RandomContrast((config.contrast, config.contrast), value_range=PIXEL_RANGE)
    if config.saturation:
        factor = (0.5 - config.saturation, 0.5 + config.saturation)
        yield layers.RandomSaturation(factor, value_range=(0.0, 1.0))
    if config.hue:
        yield layers.RandomHue(config.hue, value_range=PIXEL_RANGE)


def _cropped(pixels_PSS3: tf.Tensor, numbers_P4: tf.Tensor, most: float) -> tf.Tensor:
    """A box of each image, brought to the whole size (Szegedy et al., 2015); `numbers_P4` in [0, 1): its area, its
    aspect ratio, and where it is."""
    area_P = 1 - most * numbers_P4[:, 0]
    low, high = (float(tf.math.log(ratio)) for ratio in ASPECT_RATIOS)
    ratio_P = tf.clip_by_value(tf.exp(low + (high - low) * numbers_P4[:, 1]), area_P, 1 / area_P)
    height_P, width_P = tf.sqrt(area_P / ratio_P), tf.sqrt(area_P * ratio_P)
    upper_P, left_P = numbers_P4[:, 2] * (1 - height_P), numbers_P4[:, 3] * (1 - width_P)
    boxes_P4 = tf.stack([upper_P, left_P, upper_P + height_P, left_P + width_P], axis=1)
    side = pixels_PSS3.shape[1]
    return tf.image.crop_and_resize(pixels_PSS3, boxes_P4, tf.range(tf.shape(boxes_P4)[0]), (side, side))


def _outside_of_box(share_P: tf.Tensor, center_P2: tf.Tensor, side_px: int) -> tuple[tf.Tensor, tf.Tensor]:
    """What stays of each image, bool (P, S, S), where a box of 1 - share of its area is taken; and how much that is."""
    half_P = tf.sqrt(1 - share_P) / 2
    place_S = (tf.range(side_px, dtype=tf.float32) + 0.5) / side_px
    in_row_PS = tf.abs(place_S[None] - center_P2[:, :1]) < half_P[:, None]
    in_column_PS = tf.abs(place_S[None] - center_P2[:, 1:]) < half_P[:, None]
    is_own_PSS = tf.logical_not(in_row_PS[:, :, None] & in_column_PS[:, None, :])
    return is_own_PSS, tf.reduce_mean(tf.cast(is_own_PSS, tf.float32), axis=(1, 2))
