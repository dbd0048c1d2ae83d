"""The custom head: a function of yours that builds a network. Its code is imported, never stored or read from a bundle.

Shape letters: D embedding width, K classes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import RecipeError
from engine.heads.base import SCALED, SCALING, Head, scaled_before
from engine.heads.kinds import CustomHeadConfig

if TYPE_CHECKING:
    import keras

_WEIGHT, _MULTIPLY, _ADD = "weight_", "scaling_multiply", "scaling_add"  # names of tensors in a bundle


class CustomHead(Head):
    """What `head.build` names.

    Raises:
        RecipeError: no such module or function, or its source is not the wanted one.
    """

    def __init__(self, config: CustomHeadConfig) -> None:
        self.config = config
        module, self._function = _imported(config.build)
        found = _source_sha256(module, config.build)
        if config.source_sha256 not in (None, found):
            raise RecipeError(
                f"head.build {config.build}: its source is not the one that is meant",
                found=f"sha-256 {found} of {module.__file__}",
                wanted=f"sha-256 {config.source_sha256}",
                way_out="bring the version of the file that the head was fitted with, or fit again",
            )
        self._stated = config.model_copy(update={"source_sha256": found})

    @property
    def stated(self) -> CustomHeadConfig:
        """With the sha-256 of the source as it is here."""
        return self._stated

    def build(self, width: int, num_classes: int, seed: int) -> keras.Model:
        """What the function answers, with Keras' own generators at `seed`.

        Raises:
            RecipeError: the function fails, or answers with something else than a network from (None, D) to (None, K).
        """
        import keras

        keras.utils.set_random_seed(seed)
        try:
            network = self._function(width, num_classes)
        except Exception as error:
            raise RecipeError(
                f"head.build {self.config.build}: the function failed for width {width} and {num_classes} classes",
                found=f"{type(error).__name__}: {error}",
            ) from error
        if not isinstance(network, keras.Model):
            raise self._unfit(type(network).__name__, width, num_classes)
        answer = network(np.zeros((2, width), np.float32))  # subclassed networks get their weights now
        if tuple(answer.shape) != (2, num_classes):
            raise self._unfit(f"{tuple(answer.shape)} for two rows", width, num_classes)
        return network

    def _unfit(self, found: str, width: int, num_classes: int) -> RecipeError:
        return RecipeError(
            f"head.build {self.config.build}: not a head",
            found=found,
            wanted=f"a keras.Model from (None, {width}) to (None, {num_classes})",
        )


def tensors_of(network: keras.Model) -> dict[str, NDArray[np.floating[Any]]]:
    """All that a bundle keeps of a custom head: its weights in order, and the scaling before it."""
    tensors = {f"{_WEIGHT}{place:04d}": values for place, values in enumerate(network.get_weights())}
    if network.name == SCALED:
        layer = network.get_layer(SCALING)
        tensors |= {_MULTIPLY: np.asarray(layer.scale), _ADD: np.asarray(layer.offset)}
    return tensors


def rebuilt(
    config: CustomHeadConfig, width: int, num_classes: int, tensors: Mapping[str, NDArray[np.floating[Any]]]
) -> keras.Model:
    """The network of a bundle: built by its function anew, with the weights that it had.

    Raises:
        RecipeError: as `CustomHead`.
        ValueError: the function builds a network that these weights do not fit.
    """
    network = CustomHead(config).build(width, num_classes, seed=0)
    network.set_weights([tensors[name] for name in sorted(tensors) if name.startswith(_WEIGHT)])
    return scaled_before(network, tensors[_MULTIPLY], tensors[_ADD]) if _MULTIPLY in tensors else network


def _imported(path: str) -> tuple[ModuleType, Callable[[int, int], Any]]:
    name, _, function = path.rpartition(".")
    try:
        module = importlib.import_module(name)
        found = getattr(module, function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"head.build {path}: cannot be imported here",
            found=str(error),
            wanted=f"a function {function} in a module {name}",
            way_out=f"install the module or put its folder on PYTHONPATH; searched: {', '.join(sys.path[:3])}, ...",
        ) from None
    if not callable(found):
        raise RecipeError(f"head.build {path}: not a function", found=type(found).__name__)
    return module, found


def _source_sha256(module: ModuleType, path: str) -> str:
    file = inspect.getsourcefile(module)
    if file is None:
        raise RecipeError(f"head.build {path}: its module has no source file", found=str(module))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
