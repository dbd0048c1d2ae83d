"""Cuts a network at a named layer, pools what comes out to (B, D) and freezes it; loads no weights.

Shape letters: B batch, H, W positions of a feature map, D embedding width.
"""

from __future__ import annotations

import re
from typing import Any

from engine.backbones.base import require_keras
from engine.backbones.kinds import NetworkConfig, unknown_name
from engine.errors import RecipeError


def cut_and_freeze(network: Any, config: NetworkConfig) -> Any:
    """A frozen keras.Model from the network's input to the recipe's layer, pooled if that gives a feature map.

    Args:
        network: keras.Model with loaded weights, whose last layer gives (B, D) or (B, H, W, D).
        config: `layer` says where to cut (null: at the end), `pooling` how to pool.

    Raises:
        RecipeError: no such layer, or its output is neither (B, H, W, D) nor (B, D).
    """
    keras = require_keras()
    features = network.output if config.layer is None else layer_output(network, config.layer)
    if len(features.shape) == 4:
        pool = {
            "avg": keras.layers.GlobalAveragePooling2D,
            "max": keras.layers.GlobalMaxPooling2D,
        }[config.pooling]
        features = pool(name=f"{config.pooling}_over_positions")(features)
    frozen = keras.Model(network.input, features, name=network.name)
    frozen.trainable = False  # BatchNormalization then uses its stored statistics, whatever `training` says
    return frozen


def layer_output(network: Any, name: str) -> Any:
    """The Keras tensor that the layer of that name gives; a feature map (B, H, W, D) or vectors (B, D)."""
    layers = layers_by_name(network)
    if name not in layers:
        raise unknown_name(f"backbone.layer: {network.name} has no such layer", name, list(layers))
    output = layers[name].output
    if not hasattr(output, "shape") or len(output.shape) not in (2, 4) or output.shape[-1] is None:
        raise RecipeError(
            f"backbone.layer: {network.name} cannot be cut at {name!r}",
            found=f"an output of shape {getattr(output, 'shape', 'unknown')}",
            wanted="a feature map (batch, height, width, channels) or vectors (batch, width)",
            way_out="`engine backbones NAME` tells about the network; take a layer near this one",
        )
    return output


def layers_by_name(network: Any) -> dict[str, Any]:
    """Every layer by its name. Names that Keras numbers per process (activation_12) are numbered from 0 here."""
    numbered = {layer.name: _automatic_number(layer) for layer in network.layers}
    first: dict[str, int] = {}
    for base, number in filter(None, numbered.values()):
        first[base] = min(number, first.get(base, number))
    return {_stable_name(layer.name, numbered[layer.name], first): layer for layer in network.layers}


def own_layers(network: Any) -> dict[str, Any]:
    """The network's layers by name, in its order, without the pooling that makes its last feature map an embedding."""
    layers = layers_by_name(network)
    last = next(reversed(layers))
    if type(layers[last]).__name__ in ("GlobalAveragePooling2D", "GlobalMaxPooling2D"):
        del layers[last]
    return layers


def _automatic_number(layer: Any) -> tuple[str, int] | None:
    """(`conv2d`, 12) for a Conv2D that Keras named conv2d_12, (`conv2d`, 0) for conv2d, None for a given name."""
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", layer.name)
    if match is None or match[1].replace("_", "") != type(layer).__name__.lower():
        return None
    return match[1], int(match[2] or 0)


def _stable_name(name: str, automatic: tuple[str, int] | None, first: dict[str, int]) -> str:
    if automatic is None:
        return name
    base, number = automatic
    return base if number == first[base] else f"{base}_{number - first[base]}"
