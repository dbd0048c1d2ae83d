"""Unfreezing: which layers learn, how many parameters that is, and BatchNorm that never does."""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import pytest
from pydantic import TypeAdapter, ValidationError

from engine.backbones.cut import own_layers
from engine.backbones.kinds import EfficientNetLite0Config, KerasApplicationConfig, built_without_weights
from engine.errors import RecipeError
from engine.finetuning.kinds import Unfreeze, UnfreezeConfig
from engine.finetuning.unfreeze import unfreeze
from engine.storage import StorageConfig


@cache
def network(name: str = "EfficientNetB0") -> Any:
    if name == "lite0":
        return built_without_weights(EfficientNetLite0Config(input_size=64), StorageConfig())
    return built_without_weights(KerasApplicationConfig(name=name, input_size=64), StorageConfig())


def test_efficientnetb0_has_the_layers_and_parameters_that_keras_gives_it() -> None:
    assert network().count_params() == 4_049_571
    assert len(own_layers(network())) == 237  # and the pooling


def test_its_last_two_layers_are_a_batchnorm_and_an_activation() -> None:
    found = unfreeze(network(), UnfreezeConfig(top_layers=2, batch_norm="scale_and_shift"))
    assert (found.first, found.trainable, found.frozen) == (235, 2_560, 4_047_011)
    with pytest.raises(RecipeError, match="nothing of efficientnetb0 would learn"):
        unfreeze(network(), UnfreezeConfig(top_layers=2))


def test_nasnetlarge_is_cut_at_700_of_1039() -> None:
    whole = keras.applications.NASNetLarge(include_top=False, weights=None, input_shape=(64, 64, 3))
    found = unfreeze(whole, UnfreezeConfig(below=700))
    assert (found.first, found.layers) == (700, 1039)
    assert [layer.trainable for layer in whole.layers[:700]] == [False] * 700


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"below": 0}, 0),
        ({"below": 100}, 100),
        ({"top_layers": 500}, 0),
        ({"fraction": 0.5}, 119),
        ({"fraction": 1e-6}, 236),
        ("all", 0),
        ({"from_layer": "block6a_expand_conv"}, None),
    ],
)
def test_layers_are_named_or_counted_from_either_end(config: Any, first: int | None) -> None:
    parsed = TypeAdapter(Unfreeze).validate_python(config)
    if first == 236:  # an activation alone
        with pytest.raises(RecipeError):
            unfreeze(network(), parsed)
        return
    found = unfreeze(network(), parsed)
    layers = list(own_layers(network()).items())
    if first is None:
        assert layers[found.first][0] == "block6a_expand_conv"
    else:
        assert found.first == first
    learning = {id(weight) for weight in network().trainable_weights}
    for place, (name, layer) in enumerate(layers):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        learns = any(id(weight) in learning for weight in layer.weights)
        assert learns == (place >= found.first and not is_norm and bool(layer.trainable_weights)), name


def test_all_but_batchnorm_learns_where_all_is_asked_for() -> None:
    found = unfreeze(network("lite0"), TypeAdapter(Unfreeze).validate_python("all"))
    norms = [layer for layer in network("lite0").layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert found.frozen == sum(layer.count_params() for layer in norms)


def test_a_layer_that_is_not_there_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match="did you mean block6a_expand_conv"):
        unfreeze(network(), UnfreezeConfig(from_layer="block6a_expand_convolution"))
    with pytest.raises(RecipeError, match="at most 236"):
        unfreeze(network(), UnfreezeConfig(below=237))


@pytest.mark.parametrize("fields", [{}, {"top_layers": 2, "below": 3}])
def test_what_is_unfrozen_is_said_once(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="exactly one of from_layer, top_layers, below, fraction"):
        UnfreezeConfig(**fields)
