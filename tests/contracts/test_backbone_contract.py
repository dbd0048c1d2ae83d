"""What every kind of backbone keeps. A new kind adds one line to KINDS and passes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from engine.backbones.base import Backbone
from engine.backbones.fingerprint import tensor_digest
from engine.backbones.kinds import (
    BackboneConfig,
    EfficientNetLite0Config,
    KerasApplicationConfig,
    build_backbone,
)
from engine.storage import StorageConfig

SIDE = 64
# kind -> (how to make its config, width, parameters, a layer to cut at, the width there)
KINDS: dict[str, tuple[Any, int, int, str, int]] = {
    "keras_application": (
        lambda **fields: KerasApplicationConfig(name="MobileNetV2", input_size=SIDE, **fields),
        1280,
        2_257_984,
        "block_12_add",
        96,
    ),
    "efficientnet_lite0": (
        lambda **fields: EfficientNetLite0Config(input_size=SIDE, **fields),
        1280,
        3_413_024,
        "block9_add",
        112,
    ),
}

# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def built(kind: str, **fields: object) -> Backbone:
    config: BackboneConfig = KINDS[kind][0](**{"weights": "random", "seed": 11} | fields)
    return build_backbone(config, StorageConfig())


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backbone(kind: str) -> Backbone:
    return built(kind)


@pytest.fixture(scope="module")
def scaled_pixels(backbone: Backbone) -> np.ndarray:
    pixels = np.arange(3 * SIDE * SIDE * 3).reshape(3, SIDE, SIDE, 3) ** 2 % 253
    return np.asarray(backbone.scaling.apply(pixels.astype(np.float32)), np.float32)


def test_network_gives_float32_vectors_of_its_width(
    kind: str, backbone: Backbone, scaled_pixels: np.ndarray
) -> None:
    _, width, parameters, _, _ = KINDS[kind]
    embeddings = np.asarray(backbone.network(scaled_pixels))
    assert (embeddings.shape, embeddings.dtype) == ((3, width), np.float32)
    assert (backbone.width, backbone.input_size, backbone.network.count_params()) == (width, SIDE, parameters)
    assert np.isfinite(embeddings).all()


def test_frozen_means_that_nothing_is_trainable_and_no_bit_changes(
    backbone: Backbone, scaled_pixels: np.ndarray
) -> None:
    before = tensor_digest(backbone.network)
    inference = np.asarray(backbone.network(scaled_pixels, training=False))
    np.testing.assert_array_equal(np.asarray(backbone.network(scaled_pixels, training=True)), inference)
    assert backbone.network.trainable_variables == []
    assert tensor_digest(backbone.network) == before


def test_same_seed_gives_the_same_tensors(kind: str, backbone: Backbone) -> None:
    assert tensor_digest(built(kind).network) == tensor_digest(backbone.network)


def test_weights_saved_from_a_backbone_come_back_from_a_uri(
    kind: str, backbone: Backbone, tmp_path: Any
) -> None:
    backbone.network.save_weights(tmp_path / "saved.weights.h5")
    again = built(kind, weights=str(tmp_path / "saved.weights.h5"))
    assert tensor_digest(again.network) == tensor_digest(backbone.network)


def test_network_can_be_cut_at_a_layer_and_pooled_by_maximum(
    kind: str, backbone: Backbone, scaled_pixels: np.ndarray
) -> None:
    _, _, _, layer, width = KINDS[kind]
    whole = backbone.network
    feature_map = np.asarray(keras.Model(whole.input, whole.get_layer(layer).output)(scaled_pixels))
    cut = built(kind, layer=layer, pooling="max")
    assert (feature_map.shape, cut.width) == ((3, 4, 4, width), width)
    np.testing.assert_array_equal(np.asarray(cut.network(scaled_pixels)), feature_map.max(axis=(1, 2)))
