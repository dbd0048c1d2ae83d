"""Features of EfficientNet-Lite0 against numbers fixed once (TensorFlow 2.21 on a CPU, 2 cores)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.backbones.base import Backbone
from engine.backbones.fingerprint import tensor_digest
from engine.backbones.kinds import EfficientNetLite0Config, build_backbone
from engine.storage import StorageConfig

SIDE = 96


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone(EfficientNetLite0Config(weights="package", input_size=SIDE), StorageConfig())


@pytest.fixture(scope="module")
def features(backbone: Backbone) -> np.ndarray:
    row, column, channel = np.ogrid[:SIDE, :SIDE, :3]
    image = (row * column // 9 + 40 * channel + (row // 12 + column // 12) % 2 * 60) % 256
    return np.asarray(backbone.network(backbone.scaling.apply(image[None]).astype(np.float32)))[0]


def test_tensors_have_this_digest_so_that_tables_of_today_can_be_extended_tomorrow(
    backbone: Backbone,
) -> None:
    assert (
        tensor_digest(backbone.network) == "11e803cdb4a914f5e48e64ca6b8998763152c2ad1d604d1e5fe9cd6156458b12"
    )


def test_features_of_a_known_image_are_these_numbers(features: np.ndarray) -> None:
    found = features[[0, 1, 3, 4, 213, 500, 1021, 1240]]
    expected = [2.524268, 0.027702, 0.0, 0.608352, 0.134275, 0.019057, 0.579470, 5.952876]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_features_as_a_whole_are_these_numbers(features: np.ndarray) -> None:
    assert features.shape == (1280,)
    assert float(features.mean()) == pytest.approx(0.661484, rel=1e-4)
    assert float(np.linalg.norm(features)) == pytest.approx(52.214455, rel=1e-4)
    assert int(features.argmax()) == 1240
