"""What every kind of backbone keeps. A new kind adds one line to KINDS and passes."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
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
    KerasFileConfig,
    SavedModelConfig,
    build_backbone,
)
from engine.backbones.save import config_of_saved, saved_weights
from engine.runtimes.freeze import freeze
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.runtimes.tensorflow import TensorFlowRuntime
from engine.storage import StorageConfig
from tests.backbones.small_networks import uneven_network

SIDE = 64
FILES = ("keras_file", "saved_model")  # kinds that are a file, made once from `uneven_network`
# kind -> (how to make its config, width, parameters, a layer to cut at or None, the width there)
KINDS: dict[str, tuple[Any, int, int, str | None, int]] = {
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
    "keras_file": (
        lambda **fields: KerasFileConfig(kind="keras_file", input_size=SIDE, scaling="none", **fields),
        24,
        576,
        "stem_bn",
        8,
    ),
    "saved_model": (
        lambda **fields: SavedModelConfig(kind="saved_model", input_size=SIDE, scaling="none", **fields),
        24,
        576,
        None,
        0,
    ),
}

# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@cache
def file_of(kind: str) -> str:
    """URI of the network's file."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    network = uneven_network(SIDE)
    if kind == "keras_file":
        network.save(folder / "network.keras")
        return f"{folder}/network.keras"
    network.export(folder / "network", format="tf_saved_model", verbose=False)
    return f"{folder}/network"


def built(kind: str, **fields: object) -> Backbone:
    start = {"weights": file_of(kind)} if kind in FILES else {"weights": "random", "seed": 11}
    config: BackboneConfig = KINDS[kind][0](**start | fields)
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
    kind: str, backbone: Backbone, tmp_path: Path, scaled_pixels: np.ndarray
) -> None:
    if kind == "saved_model":
        pytest.skip("a SavedModel is only read")
    name, content = saved_weights(backbone)
    assert saved_weights(backbone) == (name, content)
    (tmp_path / name).write_bytes(content)
    again = build_backbone(config_of_saved(backbone.config, f"{tmp_path}/{name}", content), StorageConfig())
    assert tensor_digest(again.network) == tensor_digest(backbone.network)
    np.testing.assert_array_equal(
        np.asarray(again.network(scaled_pixels)), np.asarray(backbone.network(scaled_pixels))
    )


def test_frozen_graph_gives_the_embeddings_of_the_network(backbone: Backbone) -> None:
    pixels = (np.arange(3 * SIDE * SIDE * 3).reshape(3, SIDE, SIDE, 3) ** 2 % 253).astype(np.uint8)
    graph = freeze(backbone.network, backbone.scaling, SIDE)
    wanted = np.asarray(backbone.network(backbone.scaling.apply(pixels.astype(np.float32))))
    found = TensorFlowRuntime(TensorFlowRuntimeConfig(), graph, None, False).run(pixels)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))


def test_network_can_be_cut_at_a_layer_and_pooled_by_maximum(
    kind: str, backbone: Backbone, scaled_pixels: np.ndarray
) -> None:
    _, _, _, layer, width = KINDS[kind]
    if layer is None:
        pytest.skip("a SavedModel has no layers")
    whole = backbone.network
    feature_map = np.asarray(keras.Model(whole.input, whole.get_layer(layer).output)(scaled_pixels))
    cut = built(kind, layer=layer, pooling="max")
    assert (feature_map.shape, cut.width) == ((3, *feature_map.shape[1:3], width), width)
    np.testing.assert_array_equal(np.asarray(cut.network(scaled_pixels)), feature_map.max(axis=(1, 2)))
