from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from engine.backbones.cut import cut_and_freeze, layers_by_name
from engine.backbones.kinds import EfficientNetLite0Config, NetworkConfig
from engine.errors import RecipeError
from tests.backbones.small_networks import fill_with_primes, small_network, tensors

PIXELS = (np.arange(2 * 11 * 11 * 3).reshape(2, 11, 11, 3) * 5 % 23).astype(np.float32)


def recipe(**fields: object) -> NetworkConfig:
    return EfficientNetLite0Config.model_validate({"input_size": 11} | fields)


@pytest.mark.parametrize(("pooling", "reduced"), [("avg", np.mean), ("max", np.max)])
def test_feature_map_of_the_cut_layer_is_pooled_over_its_positions(pooling: str, reduced: Any) -> None:
    network = small_network()
    fill_with_primes(network)
    feature_map = np.asarray(keras.Model(network.input, network.layers[1].output)(PIXELS))
    assert feature_map.shape == (2, 6, 6, 5)
    cut = cut_and_freeze(network, recipe(layer="conv2d", pooling=pooling))
    np.testing.assert_allclose(np.asarray(cut(PIXELS)), reduced(feature_map, axis=(1, 2)), rtol=1e-5)


def test_vectors_are_taken_as_they_are() -> None:
    pixels = keras.layers.Input((11, 11, 3))
    vectors = keras.layers.GlobalMaxPooling2D(name="vectors")(pixels)
    network = keras.Model(pixels, keras.layers.Dense(2)(vectors))
    cut = cut_and_freeze(network, recipe(layer="vectors", pooling="avg"))
    np.testing.assert_array_equal(np.asarray(cut(PIXELS)), PIXELS.max(axis=(1, 2)))


def test_network_without_cut_ends_at_its_last_layer() -> None:
    network = small_network(width=13)
    assert cut_and_freeze(network, recipe()).output_shape == (None, 13)


def test_output_that_is_no_map_and_no_vector_is_refused() -> None:
    pixels = keras.layers.Input((11, 11, 3))
    network = keras.Model(pixels, keras.layers.Reshape((121, 3), name="tokens")(pixels), name="tokenizer")
    with pytest.raises(RecipeError) as caught:
        cut_and_freeze(network, recipe(layer="tokens"))
    assert "tokenizer cannot be cut at 'tokens'" in str(caught.value)
    assert "(None, 121, 3)" in str(caught.value)


def test_unknown_layer_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match="did you mean last_conv") as caught:
        cut_and_freeze(small_network(), recipe(layer="last_konv"))
    assert "small has no such layer" in str(caught.value)


def test_layers_numbered_by_keras_have_the_same_names_whatever_was_built_before() -> None:
    first, second = small_network(), small_network()
    assert first.layers[1].name != second.layers[1].name  # Keras numbers per process
    assert list(layers_by_name(second)) == list(layers_by_name(first))
    assert list(layers_by_name(second)) == [
        "input_layer",
        "conv2d",
        "batch_normalization",
        "re_lu",
        "last_conv",
    ]


def test_frozen_network_changes_no_bit_even_when_called_for_training() -> None:
    network = small_network()
    fill_with_primes(network)
    cut = cut_and_freeze(network, recipe())
    before = tensors(cut)
    inference = np.asarray(cut(PIXELS, training=False))
    np.testing.assert_array_equal(np.asarray(cut(PIXELS, training=True)), inference)
    assert cut.trainable_variables == []
    assert [values.tobytes() for values in tensors(cut)] == [values.tobytes() for values in before]
