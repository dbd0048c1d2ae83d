from __future__ import annotations

import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from engine.backbones.fingerprint import tensor_digest
from engine.backbones.keras_application import IMAGENET_STDDEV_RGB, _as_imagenet_was_trained, build
from engine.backbones.kinds import KerasApplicationConfig
from engine.backbones.weights import randomise
from engine.errors import RecipeError, WeightsError
from engine.storage import StorageConfig

IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)  # keras/src/applications/imagenet_utils.py, mode torch

# The smallest network of each family at the smallest size it takes: width, parameters without top (Keras 3.15).
QUICK = [
    ("ConvNeXtTiny", 32, 768, 27_820_128),  # no BatchNorm, and a layer after its pooling
    ("MobileNet", 32, 1024, 3_228_864),
    ("MobileNetV3Small", 32, 576, 939_120),  # scales inside
    ("VGG16", 32, 512, 14_714_688),
    ("Xception", 71, 2048, 20_861_480),
]
SLOW = [
    ("DenseNet121", 32, 1024, 7_037_504),
    ("EfficientNetV2B0", 32, 1280, 5_919_312),
    ("InceptionResNetV2", 75, 1536, 54_336_736),
    ("InceptionV3", 75, 2048, 21_802_784),
    ("NASNetMobile", 32, 1056, 4_269_716),
    ("ResNet50", 32, 2048, 23_587_712),
    ("ResNet50V2", 32, 2048, 23_564_800),
    ("VGG19", 32, 512, 20_024_384),
]
ASKED_FOR_ALL = "ENGINE_TEST_ALL_NETWORKS" in os.environ
only_if_asked = pytest.mark.skipif(
    not ASKED_FOR_ALL, reason="a minute; set ENGINE_TEST_ALL_NETWORKS=1 to run it"
)
FAMILIES = [*QUICK, *(pytest.param(*family, marks=only_if_asked) for family in SLOW)]

# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def config(name: str, input_size: int, weights: str = "random") -> KerasApplicationConfig:
    return KerasApplicationConfig(name=name, input_size=input_size, weights=weights)


@pytest.mark.parametrize(("name", "side", "width", "parameters"), FAMILIES)
def test_one_network_of_each_family_gives_different_features_for_different_images(
    name: str, side: int, width: int, parameters: int
) -> None:
    backbone = build(config(name, side), StorageConfig())
    assert (backbone.width, backbone.network.count_params()) == (width, parameters)
    pixels = (np.arange(2 * side * side * 3).reshape(2, side, side, 3) ** 2 % 251).astype(np.float32)
    features = np.asarray(backbone.network(backbone.scaling.apply(pixels).astype(np.float32)))
    assert features.shape == (2, width)
    assert np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-3 * np.abs(features).max() > 0


def test_unknown_network_is_refused_with_the_nearest_names_and_the_list() -> None:
    with pytest.raises(RecipeError) as caught:
        build(config("MobilenetV4", 96), StorageConfig())
    message = str(caught.value)
    assert "backbone.name" in message
    assert "did you mean MobileNet" in message
    assert "EfficientNetB0, EfficientNetB1" in message


@pytest.mark.parametrize(
    ("name", "side", "allowed"), [("InceptionV3", 74, "75"), ("MobileNetV3Small", 31, "32")]
)
def test_size_below_the_networks_minimum_is_refused_with_the_minimum(
    name: str, side: int, allowed: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        build(config(name, side), StorageConfig())
    assert str(caught.value).splitlines() == [
        f"backbone.input_size: {name} cannot take {side} x {side} pixels",
        f"  found:   {side}",
        f"  wanted:  at least {allowed}",
    ]


def test_imagenet_weights_that_cannot_be_fetched_name_file_folder_and_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # made once per process, with the proxies of then
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(WeightsError) as caught:
        build(config("MobileNet", 128, "imagenet"), StorageConfig())
    message = str(caught.value)
    assert f"wanted:  mobilenet_1_0_128_tf_no_top.h5 in {os.environ['KERAS_HOME']}/models" in message
    assert "weights: <uri>/mobilenet_1_0_128_tf_no_top.h5" in message


def test_imagenet_with_a_size_below_the_minimum_speaks_of_the_size() -> None:
    with pytest.raises(RecipeError, match="at least 32"):
        build(config("MobileNet", 31, "imagenet"), StorageConfig())


def test_imagenet_file_in_the_cache_of_keras_is_used_and_equals_its_private_copy(tmp_path: Path) -> None:
    original = keras.applications.MobileNet(include_top=False, weights=None, input_shape=(128, 128, 3))
    randomise(original, 5)
    models = Path(os.environ["KERAS_HOME"]) / "models"
    models.mkdir(parents=True, exist_ok=True)
    cached, private = models / "mobilenet_1_0_128_tf_no_top.h5", tmp_path / "copy.h5"
    original.save(private)
    cached.write_bytes(private.read_bytes())
    try:
        from_cache = build(config("MobileNet", 128, "imagenet"), StorageConfig())
    finally:
        cached.unlink()
    from_copy = build(config("MobileNet", 128, str(private)), StorageConfig())
    assert tensor_digest(from_cache.network) == tensor_digest(from_copy.network) == tensor_digest(original)


def with_normalization(network: Any, variance: Sequence[float]) -> Any:
    """The network, its Normalization layer filled as a weights file would fill it; mean as in ImageNet."""
    (normalization,) = (layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    normalization.set_weights([np.array(IMAGENET_MEAN_RGB), np.array(variance), np.array(1)])
    normalization.finalize_state()
    return network


def test_private_copy_of_an_efficientnet_imagenet_file_is_scaled_as_keras_scales_it(tmp_path: Path) -> None:
    shape = (32, 32, 3)
    trained = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=shape, pooling="avg"
    )
    randomise(trained, 3)
    with_normalization(trained, IMAGENET_STDDEV_RGB).save_weights(tmp_path / "copy.weights.h5")
    backbone = build(config("EfficientNetB0", 32, str(tmp_path / "copy.weights.h5")), StorageConfig())
    assert (backbone.width, backbone.network.count_params()) == (1280, 4_049_571)

    # Keras's imagenet variant computes (x / 255 - mean) / deviation; the plain network divides by sqrt(deviation)
    # only, so it gets pixels that bring the other factor along.
    pixels = (np.arange(32 * 32 * 3).reshape(1, *shape) ** 2 % 251).astype(np.float32)
    mean, root = np.array(IMAGENET_MEAN_RGB), np.sqrt(IMAGENET_STDDEV_RGB)
    stretched = (((pixels / 255 - mean) / root + mean) * 255).astype(np.float32)
    expected, unscaled = np.split(np.asarray(trained(np.concatenate([stretched, pixels]))), 2)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(backbone.network(pixels)), expected, atol=1e-4 * largest)
    assert np.abs(unscaled - expected).max() > 0.1 * largest


def test_network_with_its_own_pixel_statistics_is_left_alone() -> None:
    pixels = keras.layers.Input((5, 5, 3))
    network = keras.Model(pixels, keras.layers.Normalization()(pixels))
    assert _as_imagenet_was_trained(with_normalization(network, (0.05, 0.06, 0.07))) is network
    assert _as_imagenet_was_trained(with_normalization(network, IMAGENET_STDDEV_RGB)) is not network
