"""The classifier that a network was trained with on ImageNet, where it is one dense layer on pooled features.

Not for: classes' names, or publishing it (`engine.imagenet`). Shape letters: D embedding width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.backbones import efficientnet_lite0, keras_application
from engine.backbones.base import require_keras
from engine.backbones.fingerprint import tensor_digest
from engine.backbones.kinds import (
    EfficientNetLite0Config,
    KerasApplicationConfig,
    KerasFileConfig,
    SavedModelConfig,
)
from engine.errors import RecipeError

if TYPE_CHECKING:
    from engine.backbones.kinds import BackboneConfig
    from engine.storage import StorageConfig

NUM_CLASSES = 1000
_LAYERS_SHOWN = 6  # of a classifier that is something else


@dataclass(frozen=True, slots=True)
class ImageNetTop:
    """A network's classifier: softmax(embeddings_BD @ kernel_DK + bias_K), K = 1,000 in ImageNet's order."""

    kernel_DK: NDArray[np.float32]
    bias_K: NDArray[np.float32]
    tensor_digest: str
    """Of the network below it, as the fingerprint has it."""


def imagenet_top(config: BackboneConfig, storage: StorageConfig) -> ImageNetTop:
    """Build the network with its classifier, load the weights of both, and take the classifier.

    Raises:
        RecipeError: it is cut or pooled otherwise, comes from a file as a whole, or its classifier is something else.
        WeightsError: the weights are absent, or lack the classifier's.
    """
    if isinstance(config, KerasFileConfig | SavedModelConfig):
        raise RecipeError(
            f"imagenet: a network of the kind {config.kind} comes from a file that does not say what its classifier is",
            wanted="keras_application or efficientnet_lite0",
            way_out="fit a head on its embeddings",
        )
    if config.layer is not None or config.pooling != "avg":
        raise RecipeError(
            "imagenet: the classifier takes the network's own embeddings",
            found=f"layer {config.layer}, pooling {config.pooling}",
            wanted="layer null, pooling avg",
        )
    if config.weights != "random":  # a wrong network is refused before its weights are fetched
        bare = config.model_copy(update={"weights": "random", "weights_sha256": None})
        _dense_on_pooled(_with_classifier(bare, storage), config)
    network = _with_classifier(config, storage)
    dense = _dense_on_pooled(network, config)
    kernel_DK, bias_K = (np.asarray(tensor, np.float32) for tensor in dense.get_weights())
    below = require_keras().Model(network.input, dense.input)
    return ImageNetTop(kernel_DK, bias_K, tensor_digest(below))


def _with_classifier(config: KerasApplicationConfig | EfficientNetLite0Config, storage: StorageConfig) -> Any:
    if isinstance(config, KerasApplicationConfig):
        return keras_application.with_classifier(config, storage)
    return efficientnet_lite0.with_classifier(config, storage)


def _dense_on_pooled(network: Any, config: KerasApplicationConfig | EfficientNetLite0Config) -> Any:
    """The last layer, if it is dense and what it takes are means over positions; dropout in between does nothing here.

    Raises:
        RecipeError: the network's classifier is something else.
    """
    layers = require_keras().layers
    *before, dense = network.layers
    pooled = next((layer for layer in reversed(before) if not isinstance(layer, layers.Dropout)), None)
    is_dense = isinstance(dense, layers.Dense) and dense.units == NUM_CLASSES
    if is_dense and isinstance(pooled, layers.GlobalAveragePooling2D) and len(pooled.output.shape) == 2:
        return dense
    name = config.name if isinstance(config, KerasApplicationConfig) else config.kind
    kinds = [type(layer).__name__ for layer in network.layers[-_LAYERS_SHOWN:]]
    raise RecipeError(
        f"imagenet: the classifier of {name} is not one dense layer on its pooled features",
        found=f"it ends in {', '.join(kinds)}",
        wanted="GlobalAveragePooling2D, perhaps Dropout, and a Dense of 1,000 classes",
        way_out="take another network, or fit a head on its embeddings",
    )
