"""Small pictures for people, as WebP: of encoded images, or of pixels that are there already. Not for: where from.

Their number and bytes are bounded, for they stand in bundles and pages. Shape letters: S side in pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from engine.images import decode_image, fitted_size
from engine.schema import SampleId

SIDE_PX = 96  # enough to tell a cat from a dog; a phone shows three beside each other
QUALITY = 75  # of WebP: 1 to 4 kB a picture, half of what JPEG takes
# Eight bytes a pixel is what the dearest formats take to decode: half a gigabyte beside a fit.
MOST_PIXELS = 64_000_000
MOST_PICTURES = 120  # twenty rows of a page
MOST_BYTES = 400_000  # of all together in base64: a page that opens at once, and can be sent by mail
REASONS_SHOWN, REASON_SHOWN = 5, 300  # why others are missing; characters of each


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture whose longer side is SIDE_PX, or the image's own where that is smaller."""

    width_px: int
    height_px: int
    webp: bytes


def thumbnail_of_image(encoded: bytes) -> Thumbnail:
    """Of an encoded image, upright, with its own aspect ratio.

    Raises:
        ImageRejected: it cannot be decoded, or has more than MOST_PIXELS.
    """
    image = decode_image(encoded, SIDE_PX, "letterbox", MOST_PIXELS)
    side = min(SIDE_PX, max(image.width_px, image.height_px))
    if side < SIDE_PX:  # enlarged: take it as it is
        image = decode_image(encoded, side, "letterbox", MOST_PIXELS)
    width, height = fitted_size(image.width_px, image.height_px, side)
    left, upper = (side - width) // 2, (side - height) // 2
    return _encoded(image.pixels_SS3[upper : upper + height, left : left + width])


def thumbnail_of_pixels(pixels_SS3: np.ndarray, width_px: int, height_px: int) -> Thumbnail:
    """Of an image that was stretched to a square, as wide and high again as it was in proportion.

    Args:
        pixels_SS3: uint8, shape (S, S, 3), RGB.
        width_px, height_px: of the image before.
    """
    side = min(SIDE_PX, len(pixels_SS3))
    size = fitted_size(width_px, height_px, side)
    return _encoded(np.asarray(Image.fromarray(pixels_SS3).resize(size, Image.Resampling.BOX)))


def pictures_document(
    wanted: Sequence[SampleId], found: Mapping[SampleId, Thumbnail], missing: Mapping[str, int]
) -> dict[str, Any]:
    """For pictures.json: as many as may be, the most wanted first.

    Args:
        wanted: samples, the most wanted first, each once.
        found: their pictures, as far as there are any.
        missing: why pictures could not be had, and of how many samples.

    Returns:
        wanted (how many), pictures (shard, index, width, height, webp in base64), and missing (why, samples), the most
        frequent first.
    """
    pictures: list[dict[str, Any]] = []
    size = 0
    for shard, index in wanted:
        one = found.get((shard, index))
        if one is None or len(pictures) == MOST_PICTURES:
            continue
        text = base64.b64encode(one.webp).decode()
        if size + len(text) <= MOST_BYTES:
            size += len(text)
            pictures.append(
                {"shard": shard, "index": index, "width": one.width_px, "height": one.height_px, "webp": text}
            )
    left_out = len(found) - len(pictures)
    why = {**missing, **({"there is no room for more in a report": left_out} if left_out else {})}
    most_first = sorted(why.items(), key=lambda one: (-one[1], one[0]))[:REASONS_SHOWN]
    return {
        "wanted": len(wanted),
        "pictures": pictures,
        "missing": [{"why": words[:REASON_SHOWN], "samples": count} for words, count in most_first],
    }


def no_pictures(why: str) -> dict[str, Any]:
    """The same where none are looked for."""
    return pictures_document((), {}, {why: 1})


def _encoded(pixels_HW3: np.ndarray) -> Thumbnail:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HW3)).save(buffer, "WEBP", quality=QUALITY)
    return Thumbnail(pixels_HW3.shape[1], pixels_HW3.shape[0], buffer.getvalue())
