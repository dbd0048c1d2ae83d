"""Puts weights into a built network: from a file, or random and the same everywhere. Not for Lite0's package weights.

Only tensors are read from weight files, never code or configs.
"""

from __future__ import annotations

import math
import random
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.backbones.fetch import fetch_weights
from engine.errors import WeightsError

if TYPE_CHECKING:
    from engine.backbones.kinds import BuiltNetworkConfig
    from engine.storage import StorageConfig


def load_weights(network: Any, path: Path, origin: str) -> None:
    """Fill every tensor of the network from a file; layers that only the file has (a classifier) are left out.

    Args:
        network: built keras.Model of the same architecture.
        path: .weights.h5 or .keras of Keras 3, or .h5 of Keras 1 to 3. What it is is told by its content.
        origin: URI for messages.

    Raises:
        WeightsError: not a weights file, it does not fit, or leaves a tensor unset or not finite.
    """
    for weight in network.weights:
        if np.issubdtype(weight.dtype, np.floating):
            weight.assign(np.full(weight.shape, np.nan, weight.dtype))  # so that a tensor left out is noticed
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # Keras warns of what it left out; the check below refuses it
            named_by_content = Path(folder) / f"file{_ending_by_content(path)}"
            named_by_content.symlink_to(path.resolve())  # Keras goes by the ending
            network.load_weights(named_by_content)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise _does_not_fit(network, origin, " ".join(str(error).split())[:400]) from None
    unset = [weight.path for weight in network.weights if not np.isfinite(weight.value.numpy()).all()]
    if unset:
        shown = ", ".join(unset[:3])
        raise _does_not_fit(
            network,
            origin,
            f"{len(unset)} tensors absent from it or not finite, such as {shown}",
        )


def load_as_stated(network: Any, config: BuiltNetworkConfig, storage: StorageConfig) -> None:
    """Fill the network as `weights` says: from the file of a URI, or `random`. Errors as the two functions'."""
    if config.weights_are_a_file:
        load_weights(network, fetch_weights(config.weights, config.weights_sha256, storage), config.weights)
    else:
        randomise(network, config.seed)


def randomise(network: Any, seed: int) -> None:
    """Fill every kernel with LeCun-uniform numbers that depend on nothing but seed, position and shape.

    Keras's initialisers draw from the process's global state and compute logarithms, which differ between
    processors in the last bit; these numbers are raw PCG64 output (whose stream NumPy promises to keep), scaled
    by correctly rounded operations. Vectors (biases, BatchNorm statistics) keep their constant start values.
    """
    for index, weight in enumerate(network.weights):
        if len(weight.shape) >= 2:
            numbers = _uniform((seed, index), math.prod(weight.shape))
            limit = _lecun_limit(tuple(weight.shape))
            weight.assign(((2.0 * numbers - 1.0) * limit).astype(weight.dtype).reshape(weight.shape))


@contextmanager
def python_random_kept() -> Iterator[None]:
    """Keras draws seeds from Python's global generator while layers are made; afterwards it is as before."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _ending_by_content(path: Path) -> str:
    """The ending by which Keras recognises the format that the file really has."""
    import h5py

    if zipfile.is_zipfile(path):
        return ".keras"
    with h5py.File(path, "r") as file:
        legacy = "layer_names" in file.attrs or "model_weights" in file
    return ".h5" if legacy else ".weights.h5"


def _uniform(seed: tuple[int, int], count: int) -> np.ndarray:
    """`count` float64 in [0, 1), multiples of 2^-53."""
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def _lecun_limit(shape: tuple[int, ...]) -> float:
    """sqrt(3 / inputs of one output) of a kernel (..., in, out); a depthwise kernel (height, width, channels, 1)
    has one input per position. Measured on lite0 and ten networks of Keras: Glorot fades towards zero (1e-10 in
    EfficientNetB0), He saturates ReLU6 or explodes (1e4 in ResNet50)."""
    depthwise = len(shape) == 4 and shape[-1] == 1
    return math.sqrt(3.0 / (math.prod(shape[:-2]) * (1 if depthwise else shape[-2])))


def _does_not_fit(network: Any, origin: str, found: str) -> WeightsError:
    return WeightsError(
        f"backbone.weights: {origin} does not fit {network.name}",
        found=found,
        wanted=f"{len(network.weights)} tensors with {network.count_params():,} numbers, as saved by "
        f"save_weights('x.weights.h5') or save('x.keras') of this network without its classifier",
    )
