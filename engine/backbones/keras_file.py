"""Any network of Keras' own layers, from a .keras file; runs no code from it. Not for: SavedModels, or weights alone.

Such a file is a zip with the network's config as JSON and its tensors as HDF5. A config names classes and functions,
and Keras imports what it names; so what it may name is checked before Keras sees it, besides Keras' own safe mode.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.backbones.base import Backbone, require_keras
from engine.backbones.cut import cut_and_freeze
from engine.backbones.fetch import fetch_weights
from engine.backbones.scaling import stated_scaling
from engine.backbones.weights import python_random_kept
from engine.config import stable_hash
from engine.errors import RecipeError, WeightsError

if TYPE_CHECKING:
    from engine.backbones.kinds import KerasFileConfig
    from engine.storage import StorageConfig

CONFIG = "config.json"
MAX_CONFIG_BYTES = 64 << 20  # NASNetLarge, the largest of keras.applications: 1.1 MB
# What a config may name is in one of these, or in a module below them.
COMPUTING = (
    "layers",
    "models",
    "ops",
    "applications",
    "activations",
    "initializers",
    "regularizers",
    "constraints",
)
KERAS_MODULES = frozenset(
    f"{root}.{room}" for root in ("keras", "keras.src") for room in (*COMPUTING, "dtype_policies")
)
# What runs Python, another program's graph, or reads further files.
REFUSED_CLASSES = frozenset(
    {
        "Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "StringLookup", "IntegerLookup",
        "TextVectorization", "FeatureSpace", "__lambda__",
    }
)  # fmt: skip
# Of what training and saving left in a config and no embedding hangs on.
NOT_OF_THE_FUNCTION = frozenset({"compile_config", "build_config", "trainable"})


def build(config: KerasFileConfig, storage: StorageConfig) -> Backbone:
    """The backbone that the recipe describes; errors as `engine.backbones.kinds.build_backbone`."""
    path = fetch_weights(config.weights, config.weights_sha256, storage)
    described = _described(path, config.weights)
    network = _loaded(path, config.weights)
    _require_images(network, config)
    architecture = f"{config.kind}:{stable_hash(_function_of(described))}"
    return Backbone(config, cut_and_freeze(network, config), stated_scaling(config.scaling), architecture)


def _described(path: Path, uri: str) -> Any:
    """The network's config, after a look at all that it names."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(CONFIG).file_size > MAX_CONFIG_BYTES:
                raise _unreadable(uri, f"its {CONFIG} has more than {MAX_CONFIG_BYTES >> 20} MiB")
            described = json.loads(archive.read(CONFIG))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RecursionError) as error:
        raise _unreadable(uri, f"{type(error).__name__}: {error}") from None
    for module, name in _named(described):
        if name in REFUSED_CLASSES or not _is_computing(module, name):
            raise WeightsError(
                f"backbone.weights: {uri} names something that is not opened",
                found=f"{module}.{name}" if module else name,
                wanted="layers of Keras that only compute: no Lambda, no classes of your own, none that read files",
                way_out="save the network without it (Rescaling, Normalization and keras.ops can say most of what a "
                "Lambda does), or export it: `model.export(folder)`, and kind: saved_model",
            )
    return described


def _is_computing(module: str, name: str) -> bool:
    """Whether it is Keras' own, and of what only computes."""
    if "." in name:  # Keras would go on from the module, to wherever it leads
        return False
    parts = module.split(".")
    return module == "keras" or any(".".join(parts[:count]) in KERAS_MODULES for count in (2, 3))


def _named(described: Any) -> Iterator[tuple[str, str]]:
    """(module, name) of all that the config has Keras look up."""
    todo = [described]
    while todo:
        found = todo.pop()
        if isinstance(found, list):
            todo.extend(found)
        elif isinstance(found, dict):
            todo.extend(found.values())
            name = found.get("class_name")
            if name is None or str(name) in (
                "__keras_tensor__",
                "__tuple__",
                "__numpy__",
                "__ellipsis__",
                "__slice__",
            ):
                continue  # values, in Keras' own spelling
            if name == "function" and found.get("module") == "builtins":
                yield "keras", str(found.get("config"))  # a name that Keras looks for among its own
            else:
                yield str(found.get("module") or ""), str(name)


def _loaded(path: Path, uri: str) -> Any:
    keras = require_keras()
    import tensorflow as tf

    try:
        with python_random_kept():
            network = keras.saving.load_model(path, compile=False, safe_mode=True)
    # What Keras raises on a config or tensors that do not fit is not documented: any of these was seen.
    except (
        ValueError, TypeError, KeyError, AttributeError, OSError, NotImplementedError, IndexError, RecursionError,
        MemoryError, zipfile.BadZipFile, zlib.error, tf.errors.OpError,
    ) as error:  # fmt: skip
        raise _unreadable(uri, " ".join(str(error).split())[:400]) from None
    if isinstance(network, keras.Sequential):  # which has no `output` before it is called (Keras 3.15)
        network = keras.Model(network.inputs, network.outputs[0], name=network.name)
    policy = keras.config.dtype_policy()
    if policy.name != "float32":  # as of networks that are built here: what whoever trains has set
        for layer in network._flatten_layers(include_self=False):
            layer.dtype_policy = policy
    broken = [weight.path for weight in network.weights if not np.isfinite(_float(weight)).all()]
    if broken:
        raise _unreadable(uri, f"{len(broken)} tensors are not finite, such as {', '.join(broken[:3])}")
    return network


def _float(weight: Any) -> np.ndarray:
    values: np.ndarray = np.asarray(
        weight.value, np.float32
    )  # bfloat16 too, which NumPy's isfinite does not know
    return values


def _require_images(network: Any, config: KerasFileConfig) -> None:
    """One input, of colour images as large as the recipe says."""
    shapes = [tuple(tensor.shape) for tensor in network.inputs or ()]
    side = config.input_size
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] is not None or shapes[0][3] != 3:
        raise WeightsError(
            f"backbone.weights: {config.weights} does not take images",
            found=f"inputs of shape {', '.join(map(str, shapes)) or 'unknown'}",
            wanted="one input of shape (batch, height, width, 3)",
        )
    if shapes[0][1] not in (None, side) or shapes[0][2] not in (None, side):
        raise RecipeError(
            f"backbone.input_size: {config.weights} takes images of {shapes[0][1]} x {shapes[0][2]} pixels",
            found=f"{side}",
            wanted=f"{shapes[0][1]}" if shapes[0][1] == shapes[0][2] else "a network of square images",
        )


def _function_of(described: Any) -> Any:
    """The config without what no embedding hangs on."""
    if isinstance(described, list):
        return [_function_of(one) for one in described]
    if isinstance(described, dict):
        return {name: _function_of(one) for name, one in described.items() if name not in NOT_OF_THE_FUNCTION}
    return described


def _unreadable(uri: str, found: str) -> WeightsError:
    return WeightsError(
        f"backbone.weights: {uri} is not a network that can be read",
        found=found,
        wanted="a .keras file, as `model.save('x.keras')` of Keras 3 writes it, of a network made of Keras' own layers",
    )
