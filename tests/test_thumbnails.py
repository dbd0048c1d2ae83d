"""Small pictures keep the shape of their image, are never enlarged, and are never more than may be."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from engine.images import ImageRejected
from engine.thumbnails import (
    MOST_BYTES,
    MOST_PICTURES,
    Thumbnail,
    pictures_document,
    thumbnail_of_image,
    thumbnail_of_pixels,
)


def encoded(width: int, height: int, form: str = "PNG") -> bytes:
    """Red left of the middle, blue right of it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def shown(thumbnail: Thumbnail) -> np.ndarray:
    image = Image.open(io.BytesIO(thumbnail.webp))
    assert (image.format, image.size) == ("WEBP", (thumbnail.width_px, thumbnail.height_px))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((640, 480), (96, 72)),
        ((30, 600), (5, 96)),
        ((37, 19), (37, 19)),
        ((1, 1), (1, 1)),
        ((96, 97), (95, 96)),
    ],
)
def test_a_picture_has_the_shape_of_its_image_and_is_not_enlarged(
    size: tuple[int, int], small: tuple[int, int]
) -> None:
    thumbnail = thumbnail_of_image(encoded(*size))
    assert (thumbnail.width_px, thumbnail.height_px) == small
    pixels_HW3 = shown(thumbnail)
    if small[0] > 10:
        red, blue = pixels_HW3[small[1] // 2, 2].tolist(), pixels_HW3[small[1] // 2, -3].tolist()
        assert red[0] > 200 and red[2] < 60
        assert blue[2] > 200 and blue[0] < 60


def test_what_cannot_be_decoded_has_no_picture() -> None:
    with pytest.raises(ImageRejected, match="truncated_image"):
        thumbnail_of_image(encoded(64, 64, "JPEG")[:-200])


def test_pixels_that_were_stretched_to_a_square_get_their_shape_back() -> None:
    pixels_SS3 = np.zeros((160, 160, 3), np.uint8)
    pixels_SS3[:, :80, 0] = pixels_SS3[:, 80:, 2] = 255
    thumbnail = thumbnail_of_pixels(pixels_SS3, 400, 300)
    assert (thumbnail.width_px, thumbnail.height_px) == (96, 72)
    assert shown(thumbnail)[36, 2, 0] > 200
    assert thumbnail_of_pixels(pixels_SS3[:32, :32], 32, 32).width_px == 32


def test_a_document_has_the_most_wanted_pictures_within_number_and_bytes() -> None:
    small = Thumbnail(3, 2, b"x" * 30)
    wanted = [("a.tar", index) for index in range(200)]
    told = pictures_document(wanted, dict.fromkeys(wanted[10:], small), {"gone": 7, "late": 3})
    assert told["wanted"] == 200
    assert [one["index"] for one in told["pictures"]] == list(range(10, 10 + MOST_PICTURES))
    assert told["pictures"][0] == {
        "shard": "a.tar",
        "index": 10,
        "width": 3,
        "height": 2,
        "webp": base64.b64encode(b"x" * 30).decode(),
    }
    assert told["missing"] == [
        {"why": "there is no room for more in a report", "samples": 70},
        {"why": "gone", "samples": 7},
        {"why": "late", "samples": 3},
    ]
    large = {sample: Thumbnail(96, 96, b"y" * 30_000) for sample in wanted}
    told = pictures_document(wanted, large, {})
    assert len(told["pictures"]) == MOST_BYTES // 40_000 == 10
