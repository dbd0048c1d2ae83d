"""How far pixels are from exact area means of the whole file: 40 dB where libjpeg reduced it, else rounding."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from engine import images
from engine.images import Resize, decode_image
from tests.exact_means import exact_means

MIN_PSNR_DB = 40.0
ROUNDED_PSNR_DB = 70.0  # of whole levels, when two computations differ by one in less than 1 % of them
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
def jpeg(name: str, width: int, height: int, orientation: int = 1, is_small: bool = False) -> bytes:
    """The middle of a photo at that shape, brought to that size, as a camera or (small) the web would have it."""
    whole = photo(name)
    scale = min(whole.width / width, whole.height / height)
    left, upper = (whole.width - width * scale) / 2, (whole.height - height * scale) / 2
    box = (left, upper, left + width * scale, upper + height * scale)
    note, file = Image.Exif(), io.BytesIO()
    note[0x0112] = orientation
    whole.resize((width, height), Image.Resampling.LANCZOS, box=box).save(
        file, "JPEG", quality=75 if is_small else 92, subsampling=2 if is_small else 0, exif=note
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


def exact_area(
    pixels_HW3: np.ndarray, target: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """The exact means, rounded."""
    return np.rint(exact_means(pixels_HW3, target, box))


def test_exact_area_means_are_what_they_say() -> None:
    line = np.array([[0, 90, 30]])[..., None].repeat(3, axis=2)
    assert exact_area(line, (2, 2))[..., 0].tolist() == [[30, 50], [30, 50]]
    assert exact_area(line, (1, 1), (0.5, 0, 2, 1))[..., 0].tolist() == [[60]]


CASES = (
    *((name, 500, 375) for name in PHOTOS),
    *((name, 1920, 1080) for name in PHOTOS),
    *((name, 4000, 3000) for name in LARGE_PHOTOS),
)


def divisor(shrink: float) -> int:
    """The reduction that the header of images.py tells for so many pixels under one target pixel."""
    return 8 if shrink >= 18.5 else 4 if shrink >= 8.7 else 2 if shrink >= 3.6 else 1


@pytest.mark.parametrize("is_small", [False, True], ids=["92", "75"])
@pytest.mark.parametrize(("name", "width", "height"), CASES)
def test_pixels_are_exact_area_means_or_of_a_reduced_jpeg_40_db_from_them(
    name: str, width: int, height: int, is_small: bool
) -> None:
    encoded = jpeg(name, width, height, is_small=is_small)
    for side_px in SIDES_PX:
        found = decoded(encoded, side_px)
        wanted = exact_area(np.asarray(full(encoded)), (side_px, side_px))
        reduced = divisor(min(width, height) / side_px) > 1
        assert (psnr_db(found, wanted) < ROUNDED_PSNR_DB) == reduced, (
            f"{side_px} px: reduced where it should not be, or not where"
        )
        assert psnr_db(found, wanted) >= MIN_PSNR_DB, side_px
        assert reduced or np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("is_small", [False, True], ids=["92", "75"])
@pytest.mark.parametrize(  # 3.6, 8.7 and 18.5 times 96 px, and the next one where the shape makes it finer
    ("width", "height", "stronger"), [(461, 346, 2), (500, 346, 2), (1115, 836, 4), (2368, 1776, 8)]
)
def test_it_holds_where_a_stronger_reduction_begins(
    width: int, height: int, stronger: int, is_small: bool
) -> None:
    assert images._divisor((width, height), 96, "stretch") == stronger
    assert images._divisor((width, height - 1), 96, "stretch") < stronger
    for name in ("china", "astronaut"):
        encoded = jpeg(name, width, height, is_small=is_small)
        wanted = exact_area(np.asarray(full(encoded)), (96, 96))
        assert psnr_db(decoded(encoded, 96), wanted) >= MIN_PSNR_DB, name


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(701, 415), (1487, 1003), (3001, 1803)])
def test_it_holds_for_crops_borders_and_turned_photos_of_odd_sizes(
    width: int, height: int, orientation: int
) -> None:
    """At 1/2, 1/4 and 1/8 none of their edges is at a whole pixel."""
    encoded = jpeg("china", width, height, orientation)
    turn = TURNS.get(orientation)
    upright = np.asarray(full(encoded) if turn is None else full(encoded).transpose(turn))
    rows, columns = upright.shape[:2]
    assert psnr_db(decoded(encoded, 96), exact_area(upright, (96, 96))) >= MIN_PSNR_DB
    left, upper = (columns - height) // 2, (rows - height) // 2
    wanted = exact_area(upright, (96, 96), (left, upper, left + height, upper + height))
    assert psnr_db(decoded(encoded, 96, "center_crop"), wanted) >= MIN_PSNR_DB
    shorter = round(96 * height / width)
    begin = (96 - shorter) // 2
    found = decoded(encoded, 96, "letterbox")
    found = found[begin : begin + shorter] if orientation < 5 else found[:, begin : begin + shorter]
    inside = exact_area(upright, (96, shorter) if orientation < 5 else (shorter, 96))
    assert psnr_db(found, inside) >= MIN_PSNR_DB


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_areas_that_begin_or_end_inside_a_pixel_are_exact(depth: int) -> None:
    """On noise, where a shift shows most: parts of 41 x 30 pixels, as reduced JPEGs have them."""
    noise = np.random.default_rng(11).integers(0, 256, (30, 41, depth), np.uint8)
    pixels = noise[..., 0] if depth == 1 else noise
    for box in (
        (0, 0, 40.125, 29.5),
        (0.875, 0, 41, 30),
        (0, 0.5, 41, 29.25),
        (3.25, 2.5, 39.375, 28.75),
    ):
        for target in ((7, 5), (11, 13), (36, 26), (23, 26)):
            found = images._resized(pixels, target, box).reshape(target[1], target[0], -1)
            wanted = exact_area(noise, target, box)[..., : found.shape[2]]
            assert np.abs(found - wanted).max() <= 1, (box, target)


def test_white_stays_white_where_millions_of_pixels_become_one() -> None:
    """255 times so many is more than 31 bits: OpenCV 5.0's sums gave 0."""
    white = np.full((3000, 3000), 255, np.uint8)
    assert images._resized(white, (1, 1), (0, 0, 3000, 3000)).tolist() == [[[255]]]
