"""Archives of small real photos for the flow tests: crops of scikit-learn's two photos, as tar shards."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from engine.storage import Store
from tests.shards.archives import member, tar_bytes

PHOTO_NAMES = ("china", "flower")  # the order of load_sample_images: public photos, CC BY


@functools.cache
def _photos() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(photo) for photo in load_sample_images().images)


def crop_label(number: int) -> str:
    """The photo that crop `number` is of."""
    return PHOTO_NAMES[int(np.random.default_rng(number).integers(len(PHOTO_NAMES)))]


def crop_jpeg(number: int, side_px: int = 24) -> tuple[bytes, str]:
    """Crop `number` of a fixed endless series: its JPEG bytes, and the photo it is of."""
    random = np.random.default_rng(number)
    photo_number = int(random.integers(len(PHOTO_NAMES)))  # as `crop_label`
    photo = _photos()[photo_number]
    left = int(random.integers(photo.width - side_px))
    top = int(random.integers(photo.height - side_px))
    buffer = io.BytesIO()
    photo.crop((left, top, left + side_px, top + side_px)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), PHOTO_NAMES[photo_number]


def shard_bytes(first: int, count: int, prefix: str = "") -> bytes:
    """A tar of `count` crops, numbered from `first`: keys `<prefix><number:06d>`, members .jpg and .cls."""
    members = []
    for number in range(first, first + count):
        encoded, label = crop_jpeg(number)
        members.append(member(f"{prefix}{number:06d}.jpg", encoded))
        members.append(member(f"{prefix}{number:06d}.cls", label.encode()))
    return tar_bytes(members)


def write_shards(store: Store, shards: int, images: int) -> list[str]:
    """`shards` shards of `images` crops each; returns every key."""
    for shard in range(shards):
        store.write(f"{shard:05d}.tar", shard_bytes(shard * images, images))
    return [f"{number:06d}" for number in range(shards * images)]


def write_recipe(folder: Path, name: str, text: str) -> Path:
    """Write a recipe file and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def extract_recipe(folder: Path, source: str, table: str, more: str = "") -> Path:
    """An extract recipe with a network cut early, which starts 2 s sooner, and many small parts."""
    return write_recipe(
        folder,
        "extract.yaml",
        f"""
source:   {{kind: webdataset, uri: "{source}", pattern: "*.tar", image: [jpg], label: cls}}
backbone: {{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32, layer: block_2_add}}
output:   {{uri: "{table}", rows_per_part: 64}}
{more}
""",
    )
