"""Puts weights into a built network: fetched once per node and checked, or random and the same everywhere.

Only tensors are read from weight files, never code or configs. Not for the package weights of Lite0.

The node's cache is the folder `weights` in ENGINE_CACHE_DIR, else in ~/.cache/image-feature-engine. A file in it is
named after its URI and the object's identity, so a replaced object is fetched again; nothing is ever changed
there after its atomic rename, and the folder may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from engine.errors import ObjectNotFound, RecipeError, WeightsError
from engine.storage import open_store

if TYPE_CHECKING:
    from engine.backbones.kinds import NetworkConfig
    from engine.storage import ObjectInfo, StorageConfig, Store

COPY_BLOCK_BYTES = 2**20


def fetch_weights(uri: str, sha256: str | None, storage: StorageConfig) -> Path:
    """A local file with the object's bytes, fetched at most once per node, whoever asks at the same time.

    Args:
        uri: s3://, file:// or a plain path of a weights file.
        sha256: wanted digest, 64 hex digits; None: not checked.
        storage: how to reach the store.

    Raises:
        RecipeError: the URI names no file.
        WeightsError: no such object, or its digest is another.
        StorageError: the store cannot be read.
    """
    store, info = _object_at(uri, storage)
    key = hashlib.sha256(f"{store.uri}/{info.path}\n{info.identity}".encode()).hexdigest()[:32]
    cached = cache_folder() / f"{key}-{info.path}"
    with locked(key):
        if not cached.is_file() or cached.stat().st_size != info.size:
            _download(store, info, cached)
        if sha256 is not None:
            _check_digest(cached, sha256, uri)
    return cached


def _object_at(uri: str, storage: StorageConfig) -> tuple[Store, ObjectInfo]:
    folder, slash, name = uri.rpartition("/")
    if not name:
        raise RecipeError(f"backbone.weights: {uri} names a folder", wanted="the URI of one file")
    if uri.startswith("file:"):
        name = unquote(name)  # as open_store does with the folder
    store = open_store(folder + slash or ".", storage)
    try:
        return store, store.info(name)
    except ObjectNotFound as error:
        raise WeightsError(f"backbone.weights: nothing at {uri}", found=str(error.thing)) from None


def weights_identity(config: NetworkConfig, storage: StorageConfig) -> list[str]:
    """Texts that change when what `weights` means has changed, found without reading the weights.

    Raises:
        RecipeError, WeightsError, StorageError: as `fetch_weights`.
    """
    if config.weights_are_a_file:
        store, info = _object_at(config.weights, storage)
        return [store.uri, info.path, info.identity]
    if config.weights != "imagenet":
        return []  # `random` and `package` are the same everywhere, or refused
    # Where Keras keeps them, or does if it cannot write there: keras/src/utils/file_utils.py, get_file.
    homes = (os.environ.get("KERAS_HOME") or "~/.keras", "/tmp/.keras")
    texts: list[str] = []
    for file in sorted(file for home in homes for file in (Path(home).expanduser() / "models").glob("*")):
        with suppress(FileNotFoundError):  # another process has just given it its name
            texts.append(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
    return texts


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


def load_as_stated(network: Any, config: NetworkConfig, storage: StorageConfig) -> None:
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


@contextmanager
def once_per_node(name: str) -> Iterator[None]:
    """One process of this node at a time until one got through; after that nobody waits any more."""
    done = cache_folder() / f"{name}.done"
    if done.exists():
        yield
        return
    with locked(name):
        yield
        done.touch()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process of this node at a time; the lock ends with its process, however that ends."""
    with (cache_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """The node's weights cache, made if it is not there."""
    folder = node_cache() / "weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(
            f"the weights cache {folder} cannot be made",
            found=str(error),
            way_out="set ENGINE_CACHE_DIR to a folder that can be written",
        ) from None
    return folder


def node_cache() -> Path:
    """What this engine keeps on a node between runs; may not be there yet."""
    user_caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ENGINE_CACHE_DIR") or Path(user_caches) / "image-feature-engine")


def _download(store: Store, info: ObjectInfo, target: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".fetching-", delete=False) as file:
        try:
            with store.open_input(info) as stream:
                shutil.copyfileobj(stream, file, COPY_BLOCK_BYTES)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _check_digest(path: Path, wanted: str, uri: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        path.unlink()
        raise WeightsError(
            f"backbone.weights: {uri} is not the file the recipe means",
            found=f"sha-256 {found}",
            wanted=f"sha-256 {wanted} (backbone.weights_sha256)",
            way_out="correct the URI or the digest",
        )


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
