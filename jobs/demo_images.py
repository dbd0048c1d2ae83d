"""The demo's archive: crops of twelve bundled photos as WebDataset tar shards, and two broken samples; no download.

Every crop comes with its class (the photo's name, `.cls`) and its half (`.json`). Left halves train and right halves
test, so no pixel is in both. The same Pillow writes the same bytes, and a shard that is there already is left alone,
so a second demo finds nothing new.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from engine.errors import EngineError

# In the folder skimage/data of scikit-image's wheel; licences as the docstrings of the module skimage.data give them.
PHOTOS = {
    "astronaut": "astronaut.png",  # Eileen Collins, NASA Great Images: public domain
    "brick": "brick.png",  # CC0Textures, Bricks25: CC0
    "camera": "camera.png",  # Lav Varshney: CC0
    "cell": "cell.png",  # Paul Müller and others, doi 10.1364/OE.26.010729: CC0
    "chelsea": "chelsea.png",  # Stefan van der Walt: CC0
    "clock": "clock_motion.png",  # Stefan van der Walt: public domain
    "coffee": "coffee.png",  # Rachel Michetti, Pikolo Espresso Bar: CC0
    "grass": "grass.png",  # linolafett, Grass 01: CC0
    "gravel": "gravel.png",  # CC0Textures, Gravel04: CC0
    "hubble": "hubble_deep_field.jpg",  # NASA, HubbleSite, eXtreme Deep Field: public domain
    "retina": "retina.jpg",  # Mikael Häggström, doi 10.15347/wjm/2014.008: CC0
    "rocket": "rocket.jpg",  # SpaceX, launch of DSCOVR: public domain
}
CROP_SIDE_PX = 64
JPEG_QUALITY = 90
SEED = 2

Split = Literal["train", "test"]
SHARDS: dict[Split, int] = {"train": 4, "test": 2}
CROPS_PER_PHOTO = 10  # in each shard, so that every shard has every class
BROKEN_SHARD = "train-00001.tar"

Member = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class DemoArchive:
    """What `write_demo_shards` has made."""

    photos: int
    """Photos, and so classes."""
    shards: int
    """Tar shards."""
    samples: int
    """Samples that are whole crops."""
    broken: int
    """Further samples, broken on purpose."""


def write_demo_shards(folder: Path) -> DemoArchive:
    """Write `train-*.tar` and `test-*.tar` into `folder`, which is made where it is missing.

    Raises:
        EngineError: the installed scikit-image does not bring one of the photos.
    """
    random = np.random.Generator(np.random.PCG64(SEED))
    photos = {name: _open_photo(file) for name, file in PHOTOS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in SHARDS.items():
        crops = {name: _crop_jpegs(photo, split, random) for name, photo in photos.items()}
        for shard in range(shards):
            name = f"{split}-{shard:05d}.tar"
            members = list(_members(crops, split, shard))
            if name == BROKEN_SHARD:
                members += _broken_members(crops["coffee"][0])
            _write_if_other(folder / name, _tar_bytes(members))
    shards = sum(SHARDS.values())
    return DemoArchive(len(PHOTOS), shards, len(PHOTOS) * shards * CROPS_PER_PHOTO, broken=2)


def _open_photo(file: str) -> Image.Image:
    path = files("skimage") / "data" / file
    if not path.is_file():
        raise EngineError(
            f"the demo's photo skimage/data/{file} is missing",
            wanted="a scikit-image whose wheel brings it along, such as 0.26",
            way_out="install the pinned versions: make demo",
        )
    return Image.open(io.BytesIO(path.read_bytes()))


def _crop_jpegs(photo: Image.Image, split: Split, random: np.random.Generator) -> list[bytes]:
    """All crops of one half of a photo, at places of which no two are the same, as JPEG files."""
    middle_px = photo.width // 2
    left_px = 0 if split == "train" else middle_px
    half_px = middle_px if split == "train" else photo.width - middle_px
    columns, rows = half_px - CROP_SIDE_PX + 1, photo.height - CROP_SIDE_PX + 1
    places = random.choice(columns * rows, SHARDS[split] * CROPS_PER_PHOTO, replace=False)
    return [_crop_jpeg(photo, left_px + int(place) % columns, int(place) // columns) for place in places]


def _crop_jpeg(photo: Image.Image, left_px: int, top_px: int) -> bytes:
    encoded = io.BytesIO()
    box = (left_px, top_px, left_px + CROP_SIDE_PX, top_px + CROP_SIDE_PX)
    photo.crop(box).save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


def _members(crops: dict[str, list[bytes]], split: Split, shard: int) -> Iterator[Member]:
    """The files of one shard's samples, the photos taking turns."""
    first = shard * CROPS_PER_PHOTO
    for number in range(first, first + CROPS_PER_PHOTO):
        for name, encoded in crops.items():
            yield from _sample(f"{split}/{name}/{number:04d}", encoded[number], name, split)


def _sample(key: str, image: bytes | None, label: str, split: Split) -> Iterator[Member]:
    if image is not None:
        yield f"{key}.jpg", image
    yield f"{key}.cls", label.encode()
    yield f"{key}.json", json.dumps({"split": split}).encode()


def _broken_members(encoded: bytes) -> list[Member]:
    """A JPEG that ends half-way, and a sample that has no image."""
    cut_short = _sample("train/broken/cut-short", encoded[: len(encoded) // 2], "coffee", "train")
    return [*cut_short, *_sample("train/broken/no-image", None, "coffee", "train")]


def _tar_bytes(members: list[Member]) -> bytes:
    """A plain tar whose bytes depend on the members alone: owner, mode and mtime are tarfile's constants."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _write_if_other(path: Path, content: bytes) -> None:
    """On local disk the mtime is part of an object's identity: writing again would make it another object."""
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
