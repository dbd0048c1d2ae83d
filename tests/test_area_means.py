"""Area means against their definition, in float64, and against OpenCV's."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from engine.area_means import area_means
from tests.exact_means import exact_means

PHOTO_SIZES = [(500, 375), (640, 480), (299, 224), (250, 188), (1000, 750), (448, 448)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_each_pixel_is_the_rounded_mean_of_its_area(channels: int) -> None:
    """Sizes and boxes at random, edges at eighths of a pixel: as far from it as rounding is, and float32."""
    random = np.random.default_rng(channels)
    for _ in range(200):
        height, width = random.integers(1, 60, 2)
        noise = random.integers(0, 256, (height, width, channels), np.uint8)
        left, upper = (random.integers(0, 8 * (side - 1) + 1) / 8 for side in (width, height))
        right = left + random.integers(8, 8 * (width - left) + 1) / 8
        lower = upper + random.integers(8, 8 * (height - upper) + 1) / 8
        target = (
            int(random.integers(1, int(right - left) + 1)),
            int(random.integers(1, int(lower - upper) + 1)),
        )
        box = (left, upper, right, lower)
        found = area_means(noise, target, box)
        assert found.shape == (target[1], target[0], min(channels, 3))
        wanted = exact_means(noise, target, box)[..., :3]
        assert np.abs(found - wanted).max() <= 0.5 + 1e-3, (noise.shape, target, box)


@pytest.mark.parametrize(("width", "height"), PHOTO_SIZES)
def test_photos_are_the_same_as_by_opencv_but_for_rounding(
    photo: np.ndarray, width: int, height: int
) -> None:
    """Tables made with OpenCV's means keep their DECODE_VERSION."""
    pixels = cv2.resize(photo, (width, height), interpolation=cv2.INTER_CUBIC)
    for side in (96, 160, 224):
        if side > min(width, height):
            continue
        found = area_means(pixels, (side, side), (0, 0, width, height))
        theirs = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
        apart = np.abs(found.astype(np.int16) - theirs)
        assert apart.max() <= 1, side
        # Means of whole pixels end in .5 often; OpenCV takes the even number.
        is_whole = width % side == 0 == height % side
        assert (apart > 0).mean() < (0.1 if is_whole else 0.002), side


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return pytest.importorskip("skimage.data", reason="scikit-image brings the photo").astronaut()


def test_pixels_that_may_not_be_written_and_grey_ones_without_an_axis_of_channels() -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    grey.flags.writeable = False
    assert area_means(grey, (3, 2), (0, 0, 6, 4))[..., 0].tolist() == [[4, 6, 8], [16, 18, 20]]  # .5 goes up


def test_white_stays_white() -> None:
    """Shares are rounded to float32: their sum may be short of 1, never by half a step."""
    for width in (7, 333, 1999):
        white = np.full((width, width, 3), 255, np.uint8)
        for side in (1, 3, 7):
            assert (area_means(white, (side, side), (0, 0, width, width)) == 255).all()


@pytest.mark.parametrize(
    ("target", "box"),
    [
        ((5, 2), (0, 0, 4, 4)),
        ((2, 5), (0, 0, 4, 4)),
        ((2, 0), (0, 0, 4, 4)),
        ((2, 2), (-0.5, 0, 4, 4)),
        ((2, 2), (0, 0, 4.5, 4)),
        ((2, 2), (0, 1, 4, 5)),
    ],
)
def test_what_would_read_beside_the_image_is_refused(
    target: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    with pytest.raises(ValueError, match="of 4 as"):
        area_means(np.zeros((4, 4, 3), np.uint8), target, box)


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 channels"):
        area_means(np.zeros((4, 4, 2), np.uint8), (2, 2), (0, 0, 4, 4))
