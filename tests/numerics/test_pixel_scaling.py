"""Pixels in the graph are what `preprocess_input` of each network's own module makes of them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from engine.backbones.base import PixelScaling
from engine.backbones.efficientnet_lite0 import PIXEL_SCALING
from engine.backbones.keras_application import network_names, pixel_scaling
from engine.runtimes.kinds import TensorFlowRuntimeConfig, freeze_network, open_runtime

FAMILIES = {getattr(keras.applications, name).__module__.rsplit(".", 1)[1]: name for name in network_names()}
CONVENTIONS = {
    "convnext": "none",
    "densenet": "torch",
    "efficientnet": "none",
    "efficientnet_v2": "none",
    "inception_resnet_v2": "tf",
    "inception_v3": "tf",
    "mobilenet": "tf",
    "mobilenet_v2": "tf",
    "mobilenet_v3": "none",
    "nasnet": "tf",
    "resnet": "caffe",
    "resnet_v2": "tf",
    "vgg16": "caffe",
    "vgg19": "caffe",
    "xception": "tf",
}
# All 256 values in each channel, never the same in two.
BYTES = (
    np.stack([np.arange(256), np.arange(256) * 7 + 1, np.arange(256) * 11 + 2], axis=-1).reshape(1, 16, 16, 3)
    % 256
)


def scaled_in_the_graph(scaling: PixelScaling) -> np.ndarray:
    pixels = keras.layers.Input((16, 16, 3))
    unchanged = keras.Model(pixels, keras.layers.Flatten()(pixels))
    graph = freeze_network(unchanged, scaling, 16)
    flat = open_runtime(TensorFlowRuntimeConfig(), graph, None).run(BYTES.astype(np.uint8))
    return flat.reshape(1, 16, 16, 3)


def test_every_family_of_keras_is_covered() -> None:
    assert FAMILIES.keys() == CONVENTIONS.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_graph_scales_bytes_as_the_family_does(family: str) -> None:
    module: Any = getattr(keras.applications, family)
    scaling = pixel_scaling(FAMILIES[family])
    expected = np.asarray(module.preprocess_input(BYTES.astype(np.float32)))
    np.testing.assert_allclose(scaled_in_the_graph(scaling), expected, rtol=0, atol=1e-5)
    assert scaling.name == CONVENTIONS[family]


def test_networks_of_one_module_share_its_scaling() -> None:
    assert pixel_scaling("ResNet152") == pixel_scaling("ResNet50")
    assert pixel_scaling("ResNet152V2") == pixel_scaling("ResNet50V2") != pixel_scaling("ResNet50")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MobileNetV2", (-0.945098, -0.207843, 0.968627)),
        ("ResNet50", (147.061, -15.779, -116.68)),
        ("DenseNet121", (-1.998031, -0.267507, 2.570283)),
        ("EfficientNetB0", (7, 101, 251)),
    ],
)
def test_one_pixel_becomes_these_numbers(name: str, expected: tuple[float, float, float]) -> None:
    pixel = np.array([7, 101, 251], np.float32).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(np.ravel(pixel_scaling(name).apply(pixel)), expected, atol=1e-6)


def test_lite0_scales_by_its_own_rule() -> None:
    np.testing.assert_allclose(scaled_in_the_graph(PIXEL_SCALING), (BYTES - 127.0) / 128.0, rtol=0, atol=1e-6)
