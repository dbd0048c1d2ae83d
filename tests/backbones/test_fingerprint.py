from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.backbones.base import Backbone, PixelScaling
from engine.backbones.fingerprint import fingerprint, fingerprint_fields, tensor_digest
from engine.backbones.kinds import KerasApplicationConfig
from tests.backbones.small_networks import fill_with_primes, small_network

CONFIG = KerasApplicationConfig(name="MobileNetV2", input_size=96)
SCALING = PixelScaling("tf", multiply=(0.5, 0.25, 0.125), add=(-1.0, -2.0, -3.0), bgr=True)


def fields_of(config: KerasApplicationConfig = CONFIG, precision: str = "float32") -> dict[str, object]:
    return fingerprint_fields(
        Backbone(config, None, SCALING, config.architecture()), 1, config.resize, precision, "ab" * 32
    )


def test_fingerprint_is_this_one_for_ever() -> None:
    assert fields_of() == {
        "architecture": "keras_application:MobileNetV2",
        "tensor_digest": "ab" * 32,
        "layer": None,
        "pooling": "avg",
        "input_size": 96,
        "decode_version": 1,
        "resize": "stretch",
        "pixel_scaling": {"multiply": [0.5, 0.25, 0.125], "add": [-1.0, -2.0, -3.0], "bgr": True},
        "precision": "float32",
    }
    assert fingerprint(fields_of()) == "460b4a6e0cd7ab7080b70ca5031ed051a7c17972909b5a738bcbb4c246aa8df4"


@pytest.mark.parametrize(
    "change",
    [{"input_size": 97}, {"pooling": "max"}, {"layer": "x"}, {"resize": "letterbox"}, {"name": "MobileNet"}],
)
def test_fingerprint_changes_with_each_field_that_changes_an_embedding(change: dict[str, object]) -> None:
    changed = KerasApplicationConfig.model_validate(CONFIG.model_dump() | change)
    assert fingerprint(fields_of(changed)) != fingerprint(fields_of())


@pytest.mark.parametrize("change", [{"weights": "random"}, {"seed": 5}, {"weights": "copy.h5"}])
def test_fingerprint_does_not_ask_where_the_tensors_came_from(change: dict[str, object]) -> None:
    changed = KerasApplicationConfig.model_validate(CONFIG.model_dump() | change)
    assert fingerprint(fields_of(changed)) == fingerprint(fields_of())


def test_digest_is_this_one_whatever_the_layers_are_called() -> None:
    for _ in range(2):  # the second network's layers have other numbers in their names
        network = small_network()
        fill_with_primes(network)
        assert tensor_digest(network) == "1ef8cf828162fa901bbd2e9888fba041f4e4839732bac56dffbdf243ac7fecf6"


def test_digest_changes_with_one_bit_and_with_one_shape() -> None:
    network = small_network()
    fill_with_primes(network)
    before = tensor_digest(network)
    kernel = network.get_layer("last_conv").kernel
    kernel.assign(kernel.value.numpy() * np.where(np.arange(7) == 3, 1 + 2.0**-23, 1))
    assert tensor_digest(network) != before
    assert tensor_digest(small_network(width=5)) != tensor_digest(small_network(width=7))


def test_digest_leaves_out_the_seeds_of_dropout() -> None:
    import keras

    def with_dropout() -> Any:
        network = small_network()
        fill_with_primes(network)
        return keras.Model(network.input, keras.layers.Dropout(0.3)(network.output))

    assert (
        tensor_digest(with_dropout())
        == tensor_digest(with_dropout())
        == "1ef8cf828162fa901bbd2e9888fba041f4e4839732bac56dffbdf243ac7fecf6"
    )
