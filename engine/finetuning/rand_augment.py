"""RandAugment (Cubuk et al., 2020) of each image for itself. Not for: where its random numbers come from.

The fourteen operations are those of the paper, which takes them from Pillow, with the ranges that torchvision gives
them. The layers of Keras 3.15 do others: RandAugment draws one operation for a whole batch; Equalization counts the
levels of a whole batch together; AutoContrast refuses an empty batch; RandomSharpness darkens the border, beyond which
it takes zeros; RandomColorDegeneration only dulls; RandomContrast takes a mean of each channel, not of the grey image;
RandomBrightness adds where Pillow multiplies; RandomPosterization never draws the highest of its bits. Those that move
an image are right, and go by `affine_transform` as it is done here.

Shape letters: P images of a portion, O operations on each, S side in pixels, C the P x 3 channels, N pixels of
one, L its 256 levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import tensorflow as tf

Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""(pixels_PSS3, signed_P) -> pixels of the same shape; the numbers are the magnitude, or less than 0 by as much."""
Row = tuple[tf.Tensor | float, tf.Tensor | float, tf.Tensor | float]

# At a magnitude of 1: torchvision's RandAugment, which has them from AutoAugment (Cubuk et al., 2019).
ROTATION_DEGREES = 30
SHEAR = 0.3
TRANSLATION = 150 / 331  # of the side
BLEND = 0.9
POSTERIZE_BITS = 4  # that are lost


def rand_augment(pixels_PSS3: tf.Tensor, numbers_PO2: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Images after O operations each; every image is computed on O times, whatever it draws.

    Args:
        pixels_PSS3: float32, 0..255.
        numbers_PO2: in [0, 1): which operation, and to which side.
        magnitude: 0..1, of each operation that has one.

    Returns:
        float32, 0..255, of the same shape.
    """
    for place in range(numbers_PO2.shape[1]):
        pixels_PSS3 = _one_on_each(pixels_PSS3, numbers_PO2[:, place], magnitude)
    return pixels_PSS3


def _one_on_each(pixels_PSS3: tf.Tensor, numbers_P2: tf.Tensor, magnitude: float) -> tf.Tensor:
    """Images are sorted by operation, changed, and put back where they were."""
    count = len(OPERATIONS)
    which_P = tf.cast(count * numbers_P2[:, 0], tf.int32)
    signed_P = tf.where(numbers_P2[:, 1] < 0.5, -magnitude, magnitude)
    pixels, signed, places = (
        tf.dynamic_partition(one, which_P, count)
        for one in (pixels_PSS3, signed_P, tf.range(tf.shape(which_P)[0]))
    )
    changed = [operation(*own) for operation, *own in zip(OPERATIONS.values(), pixels, signed, strict=True)]
    return tf.ensure_shape(tf.dynamic_stitch(places, changed), pixels_PSS3.shape)


def _identity(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    del signed_P
    return pixels_PSS3


def _auto_contrast(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    """The darkest level of each channel becomes 0, the brightest 255."""
    del signed_P
    # Whole levels: in an image of one colour it would spread what interpolation made of its last bits.
    levels = tf.round(pixels_PSS3)
    low, high = (find(levels, axis=(1, 2), keepdims=True) for find in (tf.reduce_min, tf.reduce_max))
    return tf.where(high > low, (levels - low) * 255 / tf.maximum(high - low, 1), levels)


def _equalize(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    """Each channel's levels as evenly used as can be; as Pillow's ImageOps.equalize does it, to the last bit."""
    del signed_P
    # On a GPU TensorFlow 2.21 refuses to count where operations must repeat exactly.
    with tf.device("CPU:0"):
        shape = tf.shape(pixels_PSS3)
        swapped = tf.transpose(tf.cast(tf.round(pixels_PSS3), tf.int32), (0, 3, 1, 2))
        levels_CN = tf.reshape(swapped, (-1, shape[1] * shape[2]))
        counts_CL = tf.math.bincount(levels_CN, minlength=256, maxlength=256, axis=-1)
        brightest_C1 = tf.gather(counts_CL, tf.reduce_max(levels_CN, axis=1, keepdims=True), batch_dims=1)
        step_C1 = (tf.reduce_sum(counts_CL, axis=1, keepdims=True) - brightest_C1) // 255
        below_CL = tf.cumsum(counts_CL, axis=1, exclusive=True)
        found_CL = tf.minimum((step_C1 // 2 + below_CL) // tf.maximum(step_C1, 1), 255)
        table_CL = tf.where(step_C1 > 0, found_CL, tf.range(256)[None])
        changed = tf.reshape(tf.gather(table_CL, levels_CN, batch_dims=1), tf.shape(swapped))
        return tf.cast(tf.transpose(changed, (0, 2, 3, 1)), tf.float32)


def _solarize(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    """Levels from a threshold on are inverted."""
    threshold = 256 * (1 - tf.abs(signed_P))[:, None, None, None]
    return tf.where(pixels_PSS3 >= threshold, 255 - pixels_PSS3, pixels_PSS3)


def _posterize(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    """The lowest bits of each level are 0."""
    size = (2 ** tf.round(POSTERIZE_BITS * tf.abs(signed_P)))[:, None, None, None]
    return size * (tf.round(pixels_PSS3) // size)


def _color(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    return _away_from(tf.image.rgb_to_grayscale(pixels_PSS3), pixels_PSS3, signed_P)


def _contrast(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    grey = tf.reduce_mean(tf.image.rgb_to_grayscale(pixels_PSS3), axis=(1, 2), keepdims=True)
    return _away_from(grey, pixels_PSS3, signed_P)


def _brightness(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    return _away_from(tf.zeros_like(pixels_PSS3), pixels_PSS3, signed_P)


def _sharpness(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    """Pillow's: a mean of 3 x 3 pixels in which the one in the middle counts five times; the border stays."""
    rows = pixels_PSS3[:, :-2] + pixels_PSS3[:, 1:-1] + pixels_PSS3[:, 2:]
    inner = pixels_PSS3[:, 1:-1, 1:-1]
    # No convolution: of no images TensorFlow 2.21 gives one of another size.
    smooth = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner) / 13
    lost = tf.pad(inner - smooth, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return _away_from(pixels_PSS3 - lost, pixels_PSS3, signed_P)


def _away_from(plain_PSS3: tf.Tensor, pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    """Further from a plainer image than now, or nearer to it."""
    factor = 1 + BLEND * signed_P[:, None, None, None]
    return tf.clip_by_value(plain_PSS3 + factor * (pixels_PSS3 - plain_PSS3), 0, 255)


def _rotate(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    angle_P, center = math.radians(ROTATION_DEGREES) * signed_P, (pixels_PSS3.shape[1] - 1) / 2
    sin, cos = tf.sin(angle_P), tf.cos(angle_P)
    return _moved(pixels_PSS3, (cos, -sin, center * (1 - cos + sin)), (sin, cos, center * (1 - cos - sin)))


def _shear_x(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    return _moved(pixels_PSS3, (1.0, SHEAR * signed_P, 0.0), (0.0, 1.0, 0.0))


def _shear_y(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    return _moved(pixels_PSS3, (1.0, 0.0, 0.0), (SHEAR * signed_P, 1.0, 0.0))


def _translate_x(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    return _moved(pixels_PSS3, (1.0, 0.0, TRANSLATION * pixels_PSS3.shape[1] * signed_P), (0.0, 1.0, 0.0))


def _translate_y(pixels_PSS3: tf.Tensor, signed_P: tf.Tensor) -> tf.Tensor:
    return _moved(pixels_PSS3, (1.0, 0.0, 0.0), (0.0, 1.0, TRANSLATION * pixels_PSS3.shape[1] * signed_P))


def _moved(pixels_PSS3: tf.Tensor, to_x: Row, to_y: Row) -> tf.Tensor:
    """What lay at (to_x, to_y) . (x, y, 1) comes to (x, y); what comes in from outside is the image, mirrored."""
    numbers = [
        tf.fill(tf.shape(pixels_PSS3)[:1], value) if isinstance(value, float) else value
        for value in (*to_x, *to_y, 0.0, 0.0)
    ]
    return keras.ops.image.affine_transform(
        pixels_PSS3, tf.stack(numbers, axis=1), interpolation="bilinear", fill_mode="reflect"
    )


OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": _solarize,
    "color": _color,
    "posterize": _posterize,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
