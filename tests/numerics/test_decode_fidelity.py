"""How far a JPEG that libjpeg reduced is from a full decode and an area resize: at least 40 dB, on natural photos."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from engine.images import Resize, decode_image

MIN_PSNR_DB = 40.0
SIDES_PX = (96, 160, 224)
PHOTOS = ("china", "flower", "astronaut", "coffee", "chelsea", "rocket")
LARGE_PHOTOS = (
    "china",
    "astronaut",
    "flower",
)  # the two worst and the best of the six; the others take seconds more
MAX_PIXELS = 178_956_970


@cache
def photo(name: str) -> Image.Image:
    """A photo that ships with scikit-learn or scikit-image."""
    if name in ("china", "flower"):
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    data = pytest.importorskip("skimage.data", reason="scikit-image, of the extra `demo`, is not installed")
    return Image.fromarray(getattr(data, name)())


@cache
def jpeg(name: str, width: int, height: int, orientation: int = 1) -> bytes:
    """The middle of a photo at that shape, brought to that size, as a camera would write it."""
    whole = photo(name)
    scale = min(whole.width / width, whole.height / height)
    left, upper = (whole.width - width * scale) / 2, (whole.height - height * scale) / 2
    box = (left, upper, left + width * scale, upper + height * scale)
    note, file = Image.Exif(), io.BytesIO()
    note[0x0112] = orientation
    whole.resize((width, height), Image.Resampling.LANCZOS, box=box).save(
        file, "JPEG", quality=92, subsampling=0, exif=note
    )
    return file.getvalue()


@cache
def full(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image


def decoded(encoded: bytes, side_px: int, resize: Resize = "stretch") -> np.ndarray:
    return decode_image(encoded, side_px, resize, MAX_PIXELS).pixels_SS3


def psnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    error = np.mean((found.astype(np.float64) - wanted) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def exact_area(pixels_HW3: np.ndarray, side_px: int) -> np.ndarray:
    """Means over exact areas, pixels on a border counted in part, as tf.image.resize(method="area") has it."""
    means = pixels_HW3.astype(np.float64)
    for _ in range(2):  # first the rows, then (swapped) the columns
        sums = np.concatenate([np.zeros_like(means[:1]), np.cumsum(means, axis=0)])
        at = np.linspace(0, len(means), side_px + 1)
        low = np.minimum(at.astype(int), len(means) - 1)
        until = sums[low] + (at - low)[:, None, None] * (sums[low + 1] - sums[low])
        means = (np.diff(until, axis=0) / (len(means) / side_px)).swapaxes(0, 1)
    return np.rint(means)


CASES = (
    *((name, 500, 375) for name in PHOTOS),
    *((name, 1920, 1080) for name in PHOTOS),
    *((name, 4000, 3000) for name in LARGE_PHOTOS),
)


@pytest.mark.parametrize(("name", "width", "height"), CASES)
def test_psnr_against_full_decode_and_area_resize_is_40_db(name: str, width: int, height: int) -> None:
    encoded = jpeg(name, width, height)
    for side_px in SIDES_PX:
        wanted = np.asarray(full(encoded).resize((side_px, side_px), Image.Resampling.BOX))
        found = decoded(encoded, side_px)
        is_whole = min(width, height) < 10 * side_px
        assert np.array_equal(found, wanted) == is_whole, (
            f"{side_px} px: reduced where it should not be, or not where"
        )
        assert psnr_db(found, wanted) >= MIN_PSNR_DB, side_px


@pytest.mark.parametrize("name", PHOTOS)
def test_reduced_jpegs_are_40_db_from_exact_area_means_too(name: str) -> None:
    encoded = jpeg(name, 1920, 1080)
    assert psnr_db(decoded(encoded, 96), exact_area(np.asarray(full(encoded)), 96)) >= MIN_PSNR_DB


def test_exact_area_means_are_what_they_say() -> None:
    line = np.array([[0, 90, 30]])[..., None].repeat(3, axis=2)
    assert exact_area(line, 2)[..., 0].tolist() == [[30, 50], [30, 50]]


@pytest.mark.parametrize(
    "height", [961, 1153, 1921]
)  # of a square brought to 96 px: just above 10, 12 and 20
def test_it_holds_where_a_stronger_reduction_begins(height: int) -> None:
    for name in ("china", "astronaut"):
        encoded = jpeg(name, height, height)
        wanted = np.asarray(full(encoded).resize((96, 96), Image.Resampling.BOX))
        assert psnr_db(decoded(encoded, 96), wanted) >= MIN_PSNR_DB, name


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_it_holds_for_crops_borders_and_turned_photos(orientation: int) -> None:
    encoded = jpeg("china", 1920, 1080, orientation)
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
    upright = full(encoded) if (turn := turns[orientation]) is None else full(encoded).transpose(turn)
    side = (upright.width - 1080) // 2, (upright.height - 1080) // 2
    square = upright.crop((*side, side[0] + 1080, side[1] + 1080))
    wanted = np.asarray(square.resize((96, 96), Image.Resampling.BOX))
    assert psnr_db(decoded(encoded, 96, "center_crop"), wanted) >= MIN_PSNR_DB
    fitted = (96, 54) if upright.width > upright.height else (54, 96)
    inside = np.asarray(upright.resize(fitted, Image.Resampling.BOX))
    found = decoded(encoded, 96, "letterbox")
    found = found[21:75] if fitted[0] > fitted[1] else found[:, 21:75]
    assert psnr_db(found, inside) >= MIN_PSNR_DB
