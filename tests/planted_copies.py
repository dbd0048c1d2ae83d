"""Distinct real images, and copies of some of them: the same bytes, compressed anew, smaller. As encoded JPEGs.

Images are tiles of photos of scikit-image and scikit-learn that do not overlap; tiles without anything in them (the
black around a retina) are left out, for they are duplicates in truth.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from jobs.demo_images import PHOTOS

MORE_PHOTOS = ("motorcycle_left.png", "ihc.png", "coins.png", "moon.png", "page.png")
LEAST_CONTRAST = 8.0  # standard deviation of grey values, 0..255
QUALITY = 92
SEED = 7

Kind = Literal["image", "exact", "encoded", "resized"]


@dataclass(frozen=True, slots=True)
class PlantedImage:
    """One image of the archive.

    Attributes:
        base: number of the tile that it shows.
        kind: the image itself, or which copy of it.
    """

    base: int
    kind: Kind
    encoded: bytes

    @property
    def key(self) -> str:
        return f"{self.base:04d}-{self.kind}"


def planted_images(
    distinct: int, copied: int, side_px: int, quality: int, scale: float
) -> list[PlantedImage]:
    """`distinct` images, of which `copied` stand there four times; in an order that does not tell.

    Args:
        side_px: of a tile.
        quality: of JPEGs that were compressed anew, from the decoded image.
        scale: of the smaller copies.
    """
    tiles, random = _tiles(side_px), np.random.default_rng(SEED)
    if len(tiles) < distinct:
        raise ValueError(f"{len(tiles)} tiles of {side_px} px, wanted {distinct}")
    chosen = [tiles[place] for place in random.permutation(len(tiles))[:distinct]]
    found = []
    for base, tile in enumerate(chosen):
        encoded = _jpeg(tile, QUALITY)
        found.append(PlantedImage(base, "image", encoded))
        if base < copied:
            decoded = Image.open(io.BytesIO(encoded))
            side = round(scale * side_px)
            smaller = decoded.resize((side, side), Image.Resampling.LANCZOS)
            found.append(PlantedImage(base, "exact", encoded))
            found.append(PlantedImage(base, "encoded", _jpeg(decoded, quality)))
            found.append(PlantedImage(base, "resized", _jpeg(smaller, QUALITY)))
    return [found[place] for place in random.permutation(len(found))]


def _tiles(side_px: int) -> list[Image.Image]:
    folder = files("skimage") / "data"
    photos = [
        Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
        for name in (*PHOTOS.values(), *MORE_PHOTOS)
    ]
    photos += [Image.fromarray(photo) for photo in load_sample_images().images]
    tiles = [
        photo.crop((left, top, left + side_px, top + side_px))
        for photo in photos
        for top in range(0, photo.height - side_px + 1, side_px)
        for left in range(0, photo.width - side_px + 1, side_px)
    ]
    return [tile for tile in tiles if np.asarray(tile.convert("L")).std() >= LEAST_CONTRAST]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()
