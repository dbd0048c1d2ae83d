"""Which layers of a backbone learn. Not for: how they do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.backbones.cut import own_layers
from engine.backbones.kinds import unknown_name
from engine.errors import RecipeError
from engine.finetuning.kinds import UnfreezeConfig


@dataclass(frozen=True, slots=True)
class Unfrozen:
    """What came of it.

    Attributes:
        first: number of the first layer that may learn, from 0.
        layers: of the network itself.
        trainable, frozen: parameters.
    """

    first: int
    layers: int
    trainable: int
    frozen: int


def unfreeze(network: Any, config: UnfreezeConfig) -> Unfrozen:
    """Let some layers of a frozen backbone learn.

    The network is still to be called with training=False: BatchNorm then uses its stored statistics and leaves them as
    they are, to the last bit, and nothing is dropped.

    Args:
        network: keras.Model as `build_backbone` gives it; its layers are marked in place.

    Raises:
        RecipeError: no such layer, or nothing of the backbone would learn.
    """
    layers = own_layers(network)
    first = _first(network, config)
    network.trainable = True
    for place, layer in enumerate(layers.values()):
        layer.trainable = place >= first
        for inner in layer._flatten_layers():
            if type(inner).__name__ == "BatchNormalization" and config.batch_norm == "frozen":
                inner.trainable = False
    trainable = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    found = Unfrozen(first, len(layers), trainable, network.count_params() - trainable)
    if not trainable:
        raise RecipeError(
            f"unfreeze: nothing of {network.name} would learn",
            found=f"layers {first} to {len(layers) - 1}, none of which has weights that may",
            way_out="unfreeze more layers (`engine backbones NAME --layers` shows which have parameters), or "
            "fit a head with `engine fit`",
        )
    return found


def _first(network: Any, config: UnfreezeConfig) -> int:
    names = list(own_layers(network))
    count = len(names)
    if config.from_layer is not None:
        if config.from_layer not in names:
            raise unknown_name(
                f"unfreeze.from_layer: {network.name} has no such layer", config.from_layer, names
            )
        return names.index(config.from_layer)
    if config.top_layers is not None:
        return max(0, count - config.top_layers)
    if config.below is not None:
        if config.below >= count:
            raise RecipeError(
                f"unfreeze.below: {network.name} has {count} layers",
                found=str(config.below),
                wanted=f"at most {count - 1}",
            )
        return config.below
    assert config.fraction is not None
    return min(count - 1, count - round(config.fraction * count))
