"""Any network of keras.applications by name, with the pixel scaling that Keras itself applies; runs nothing.

Everything about a network is asked from Keras: there is no table of families here.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.backbones.base import Backbone, PixelScaling, require_keras
from engine.backbones.cut import cut_and_freeze
from engine.backbones.fetch import once_per_node
from engine.backbones.kinds import unknown_name
from engine.backbones.scaling import CONVENTIONS, probed_scaling, same_numbers, stated_scaling
from engine.backbones.weights import load_as_stated, python_random_kept
from engine.errors import RecipeError, WeightsError

if TYPE_CHECKING:
    from engine.backbones.kinds import KerasApplicationConfig
    from engine.storage import StorageConfig

# Keras's spelling of the deviation of ImageNet's channels; efficientnet.py: IMAGENET_STDDEV_RGB
IMAGENET_STDDEV_RGB = (0.229, 0.224, 0.225)


def build(config: KerasApplicationConfig, storage: StorageConfig) -> Backbone:
    """The backbone that the recipe describes; errors as `engine.backbones.kinds.build_backbone`."""
    if config.weights == "imagenet":
        network = _with_imagenet_weights(config)
    else:
        network = _with_keras_random_weights(config)
        load_as_stated(network, config, storage)
        if config.weights_are_a_file:
            network = _as_imagenet_was_trained(network)
    return Backbone(
        config, cut_and_freeze(network, config), pixel_scaling(config.name), config.architecture()
    )


def with_classifier(config: KerasApplicationConfig, storage: StorageConfig) -> Any:
    """The whole network, from scaled pixels to the probabilities of 1,000 classes: at the recipe's input size, or at
    its own where its weights are for that only. Errors as `engine.backbones.kinds.build_backbone`."""
    if config.weights == "imagenet":
        return _with_imagenet_weights(config, include_top=True)
    network = _with_keras_random_weights(config, include_top=True)
    load_as_stated(network, config, storage)
    return network


def network_names() -> list[str]:
    """Every network of the installed keras.applications, in alphabetical order."""
    applications = require_keras().applications
    return sorted(
        name
        for name, value in vars(applications).items()
        if inspect.isfunction(value) and "include_top" in inspect.signature(value).parameters
    )


def pixel_scaling(name: str) -> PixelScaling:
    """What `preprocess_input` of the network's own module does, found by sending known pixels through it.

    Raises:
        RecipeError: no such network.
        BackboneError: it does more than swap channels and scale each by a line.
    """
    applications = require_keras().applications
    module = getattr(applications, _constructor(name).__module__.rsplit(".", 1)[1])
    found = probed_scaling("own", module.preprocess_input)
    return next((known for known in map(stated_scaling, CONVENTIONS) if same_numbers(known, found)), found)


def _constructor(name: str) -> Callable[..., Any]:
    names = network_names()
    if name not in names:
        raise unknown_name("backbone.name: no such network in keras.applications", name, names)
    constructor: Callable[..., Any] = getattr(require_keras().applications, name)
    return constructor


def _with_keras_random_weights(config: KerasApplicationConfig, include_top: bool = False) -> Any:
    constructor, size = _constructor(config.name), config.input_size
    try:
        return _called(constructor, config, None, include_top)
    except ValueError as error:  # how Keras refuses a size: at once, or when a layer's output would be empty
        raise RecipeError(
            f"backbone.input_size: {config.name} cannot take {size} x {size} pixels",
            found=f"{size}",
            wanted=_allowed_size(str(error)),
        ) from None


def _allowed_size(complaint: str) -> str:
    match = re.search(r"at least (\d+)x\1", complaint)
    return f"at least {match[1]}" if match else f"a larger size (Keras: {' '.join(complaint.split())[:200]})"


def _with_imagenet_weights(config: KerasApplicationConfig, include_top: bool = False) -> Any:
    constructor = _constructor(config.name)
    try:
        with once_per_node(f"imagenet-{config.name}-{config.input_size}"):
            return _called(constructor, config, "imagenet", include_top)
    except (
        Exception
    ) as error:  # a failed download is a bare Exception: keras/src/utils/file_utils.py, get_file
        _with_keras_random_weights(config)  # was it the size? then this says so
        raise _no_imagenet_weights(config, error) from error


def _called(
    constructor: Callable[..., Any], config: KerasApplicationConfig, weights: str | None, include_top: bool
) -> Any:
    shape = (config.input_size, config.input_size, 3)
    with warnings.catch_warnings(), python_random_kept():
        # MobileNets have ImageNet weights per size and say when they take those of 224.
        warnings.filterwarnings("ignore", message="`input_shape` is undefined or non-square")
        if not include_top:
            return constructor(include_top=False, weights=weights, input_shape=shape, pooling=config.pooling)
        try:
            return constructor(include_top=True, weights=weights, input_shape=shape)
        except ValueError:  # most have a classifier for one size only, though it does not hang on the size
            return constructor(include_top=True, weights=weights)


def _no_imagenet_weights(config: KerasApplicationConfig, error: Exception) -> WeightsError:
    home = os.environ.get("KERAS_HOME") or "~/.keras"
    if not os.access(os.path.expanduser(home), os.W_OK):
        home = "/tmp/.keras"  # where Keras then looks instead: keras/src/utils/file_utils.py, get_file
    folder = f"{home}/models"
    address = re.search(r"https?://[^\s:]+", str(error))
    file = PurePosixPath(address[0]).name if address else "the file that Keras names"
    return WeightsError(
        f"backbone.weights: imagenet: {config.name} is not in Keras's cache and could not be fetched",
        found=f"{type(error).__name__}: {error}",
        wanted=f"{file} in {folder}",
        way_out=f"put {file} into {folder} on every node, or anywhere you can read: weights: <uri>/{file}",
    )


def _as_imagenet_was_trained(network: Any) -> Any:
    """Give EfficientNetB0-B7 the extra scaling layer that Keras adds for `weights="imagenet"` only.

    Its ImageNet files store the deviation where the Normalization layer keeps a variance, and Keras makes up for it
    (github.com/tensorflow/tensorflow/issues/49930). Without this, a private copy of such a file would give other
    features than `imagenet`. Files trained otherwise carry another variance and are left alone.
    """
    keras = require_keras()
    layers = [
        layer for layer in network.layers if isinstance(layer, keras.layers.Normalization) and layer.weights
    ]
    if not any(np.allclose(_variance(layer), IMAGENET_STDDEV_RGB, rtol=1e-3) for layer in layers):
        return network
    rescaling = keras.layers.Rescaling([float(1.0 / np.sqrt(deviation)) for deviation in IMAGENET_STDDEV_RGB])

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        return rescaling(output) if layer in layers else output

    return keras.models.clone_model(network, clone_function=lambda layer: layer, call_function=call)


def _variance(normalization: Any) -> np.ndarray:
    return np.asarray(normalization.adapt_variance.value)
