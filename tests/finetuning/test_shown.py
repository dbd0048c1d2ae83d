"""Pictures in the report of a fine-tuning are made of the images that the worker has."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.finetuning.images import ELSEWHERE, ImageRows
from engine.finetuning.kinds import FinetuneSettings
from engine.finetuning.shown import shown_of_images

SIDE = 40
METRICS = {"most_confident_mistakes": [{"shard": "b.tar", "index": 5}]}
GALLERY = {"split": "test", "rows": [{"shard": "a.tar", "index": 1}, {"shard": "a.tar", "index": 0}]}


def images() -> ImageRows:
    """Four images of one grey each, the last on another worker's disk; twice as wide as high before."""
    samples = pa.table(
        {
            "shard": ["a.tar", "a.tar", "b.tar", "b.tar"],
            "index": [0, 1, 5, 6],
            "image_width": [80, 80, 80, 80],
            "image_height": [40, 40, 40, 40],
        }
    )
    pixels_MSS3 = np.stack([np.full((SIDE, SIDE, 3), grey, np.uint8) for grey in (30, 110, 190)])
    return ImageRows(samples, {}, pixels_MSS3, np.array([0, 1, 2, ELSEWHERE]))


def settings(**changes: Any) -> FinetuneSettings:
    backbone = {"kind": "efficientnet_lite0", "input_size": SIDE, **changes.pop("backbone", {})}
    return FinetuneSettings.model_validate({"backbone": backbone, "unfreeze": "all", **changes})


def greys(document: dict[str, Any]) -> dict[tuple[str, int], tuple[int, tuple[int, int]]]:
    """Of each picture its grey, to the next ten, and its size."""
    shown = {}
    for one in document["pictures"]:
        image = Image.open(io.BytesIO(base64.b64decode(one["webp"])))
        grey = float(np.asarray(image).mean())
        shown[one["shard"], one["index"]] = (round(grey, -1), image.size)
    return shown


def test_each_sample_has_its_own_image_in_its_own_shape_the_mistakes_first() -> None:
    plane = {"of_rows": 3}
    shown = shown_of_images(images(), METRICS, GALLERY, plane, settings())
    assert list(shown) == ["gallery", "embedding_map", "pictures"]
    assert (shown["gallery"], shown["embedding_map"]) == (GALLERY, plane)
    assert shown["pictures"]["missing"] == []
    assert greys(shown["pictures"]) == {
        ("b.tar", 5): (190, (40, 20)),
        ("a.tar", 1): (110, (40, 20)),
        ("a.tar", 0): (30, (40, 20)),
    }
    assert [one["index"] for one in shown["pictures"]["pictures"]] == [5, 1, 0]


@pytest.mark.parametrize("resize", ["letterbox", "center_crop"])
def test_an_image_that_was_not_stretched_is_shown_as_the_network_saw_it(resize: str) -> None:
    shown = shown_of_images(images(), METRICS, GALLERY, None, settings(backbone={"resize": resize}))
    assert {size for _, size in greys(shown["pictures"]).values()} == {(40, 40)}
    assert "embedding_map" not in shown


def test_an_image_on_another_disk_is_missed_and_said() -> None:
    elsewhere = {"split": "test", "rows": [{"shard": "b.tar", "index": 6}]}
    shown = shown_of_images(images(), METRICS, elsewhere, None, settings())
    assert list(greys(shown["pictures"])) == [("b.tar", 5)]
    assert shown["pictures"]["missing"] == [
        {"why": "the image is on the disk of another worker", "samples": 1}
    ]


def test_a_recipe_without_pictures_has_none() -> None:
    shown = shown_of_images(images(), METRICS, GALLERY, None, settings(report={"pictures": False}))
    assert shown["pictures"] == {
        "wanted": 0,
        "pictures": [],
        "missing": [{"why": "report.pictures is false", "samples": 1}],
    }
