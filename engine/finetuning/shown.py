"""What the report of a fine-tuning shows of its images. Not for: choosing them, or the page.

Shape letters: S side in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from engine.finetuning.images import ImageRows
from engine.finetuning.kinds import FinetuneSettings
from engine.schema import SampleId
from engine.thumbnails import Thumbnail, no_pictures, pictures_document, thumbnail_of_pixels
from engine.training.gallery import wanted_pictures


def shown_of_images(
    rows: ImageRows,
    metrics: Mapping[str, Any],
    gallery: Mapping[str, Any],
    plane: Mapping[str, Any] | None,
    settings: FinetuneSettings,
) -> dict[str, Mapping[str, Any]]:
    """Further documents for the report, by role; pictures are made of the images that this worker has decoded.

    Args:
        metrics: has most_confident_mistakes.
        gallery, plane: gallery.json and embedding_map.json; None: there is no map.
    """
    shown: dict[str, Mapping[str, Any]] = {"gallery": gallery}
    if plane is not None:
        shown["embedding_map"] = plane
    if not settings.report.pictures:
        return shown | {"pictures": no_pictures("report.pictures is false")}
    wanted = wanted_pictures(metrics, None, gallery)
    found, missing = dict[SampleId, Thumbnail](), Counter[str]()
    for sample, place in _places_of(rows, wanted).items():
        try:
            pixels_SS3 = rows.pixels(np.array([place]))[0]
        except IndexError:
            missing["the image is on the disk of another worker"] += 1
            continue
        width, height = rows.side_px, rows.side_px
        if settings.backbone.resize == "stretch":
            width, height = (rows.samples[name][place].as_py() for name in ("image_width", "image_height"))
        found[sample] = thumbnail_of_pixels(pixels_SS3, width, height)
    return shown | {"pictures": pictures_document(wanted, found, missing)}


def _places_of(rows: ImageRows, wanted: Collection[SampleId]) -> dict[SampleId, int]:
    """Which row each of these samples is."""
    asked = set(wanted)
    samples = zip(rows.samples["shard"].to_pylist(), rows.samples["index"].to_pylist(), strict=True)
    return {sample: place for place, sample in enumerate(samples) if sample in asked}
