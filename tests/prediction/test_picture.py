"""Images and bars are drawn whatever labels and names hold, and no more of them than fit a page."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.errors import RecipeError
from engine.prediction.classifier import ImagePrediction
from engine.prediction.picture import MAX_PICTURES, draw_predictions, require_picture_name

CAT = ImagePrediction(
    image="photos/cat.jpg",
    label="tabby",
    labels=None,
    confidence=0.625,
    top=(("tabby", 0.625), ("lynx", 0.25)),
    width_px=4,
    height_px=2,
    sha256="0" * 64,
    picture_HW3=np.full((2, 4, 3), 90, np.uint8),
)


def drawn(*predictions: ImagePrediction) -> str:
    return draw_predictions(predictions, "svg").decode()


def test_a_picture_has_the_image_its_candidates_and_what_it_is_called() -> None:
    svg = drawn(CAT)
    for text in ("cat.jpg", "tabby", "lynx", "0.625", "0.250"):
        assert f">{text}<" in svg, text
    assert "no label" not in svg and "<image" in svg
    assert "no label" in drawn(replace(CAT, label=None))
    assert ">ant, bee<" in drawn(replace(CAT, label=None, labels=("ant", "bee")))
    assert "no label" in drawn(replace(CAT, label=None, labels=()))


def test_labels_and_names_from_outside_are_drawn_as_they_are_or_cut_short() -> None:
    svg = drawn(replace(CAT, image="a$x^2$\n\x1b[31m.jpg", top=(("$\\frac{1$", 0.5), ("猫" * 99, 0.25))))
    assert "a$x^2$??[31m.jpg" in svg and "$\\frac{1$" in svg
    assert "猫" * 33 + "…" in svg and "猫" * 34 not in svg


def test_a_grid_grows_with_the_images_up_to_a_bound() -> None:
    sizes = []
    for count in (1, 2, 3, MAX_PICTURES, MAX_PICTURES + 9):
        with Image.open(io.BytesIO(draw_predictions([CAT] * count))) as picture:
            sizes.append(picture.size)
    width, height = sizes[0]
    assert sizes == [
        (width, height),
        (2 * width, height),
        (2 * width, 2 * height),
        *[(2 * width, 12 * height)] * 2,
    ]
    assert drawn(*[CAT] * (MAX_PICTURES + 9)).count(">tabby<") == 2 * MAX_PICTURES  # a title and a bar


def test_another_kind_of_picture_is_refused() -> None:
    require_picture_name("s3://bucket/cat.PNG")
    with pytest.raises(RecipeError, match=r"(?s)cat.bmp.*\.png, \.svg"):
        require_picture_name("cat.bmp")
