"""Brings weights onto a node: once, whoever asks at the same time, and checked. Not for: reading what is in them.

The node's cache is the folder `weights` in ENGINE_CACHE_DIR, else in ~/.cache/image-feature-engine. A file in it is
named after its URI and the object's identity, so a replaced object is fetched again; nothing is ever changed
there after its atomic rename, and the folder may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote

from engine.errors import ObjectNotFound, RecipeError, WeightsError
from engine.storage import open_store

if TYPE_CHECKING:
    from engine.backbones.kinds import NetworkConfig
    from engine.storage import ObjectInfo, StorageConfig, Store

COPY_BLOCK_BYTES = 2**20
MAX_UNPACKED_BYTES = 16 << 30  # of an archive; the largest networks of keras.applications have 1.4 GB
SAVED_MODEL_GRAPH = "saved_model.pb"
SAVED_MODEL_VARIABLES = "variables/"


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


def fetch_saved_model(uri: str, is_archive: bool, sha256: str | None, storage: StorageConfig) -> Path:
    """A local folder with a SavedModel's graph and variables, fetched at most once per node; nothing else of it.

    Args:
        uri: of its folder, or of a tar archive of that.
        sha256: wanted digest of the archive; None: not checked.

    Raises:
        RecipeError, WeightsError, StorageError: as `fetch_weights`.
        WeightsError: there is no SavedModel.
    """
    if is_archive:
        archive = fetch_weights(uri, sha256, storage)
        return _cached_folder(f"{archive.name}.unpacked", uri, lambda folder: _unpack(archive, folder, uri))
    store, infos = _saved_model_at(uri, storage)
    texts = [store.uri, *(f"{info.path} {info.identity}" for info in infos)]
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]

    def download(folder: Path) -> None:
        for info in infos:
            (folder / info.path).parent.mkdir(exist_ok=True)
            _download(store, info, folder / info.path)

    return _cached_folder(f"{key}-saved_model", uri, download)


def _saved_model_at(uri: str, storage: StorageConfig) -> tuple[Store, list[ObjectInfo]]:
    store = open_store(uri, storage)
    found = [*store.list(SAVED_MODEL_GRAPH), *store.list(SAVED_MODEL_VARIABLES)]
    return store, [info for info in found if _is_of_saved_model(info.path)]


def _is_of_saved_model(path: str) -> bool:
    return path == SAVED_MODEL_GRAPH or re.fullmatch(rf"{SAVED_MODEL_VARIABLES}[\w.-]+", path) is not None


def _cached_folder(name: str, uri: str, fill: Callable[[Path], None]) -> Path:
    cached = cache_folder() / name
    with locked(name):
        if not cached.is_dir():
            with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetching-") as folder:
                inside = Path(folder) / "saved_model"
                inside.mkdir()
                fill(inside)
                if not (inside / SAVED_MODEL_GRAPH).is_file():
                    raise WeightsError(
                        f"backbone.weights: no SavedModel at {uri}",
                        wanted=f"a folder with {SAVED_MODEL_GRAPH} and {SAVED_MODEL_VARIABLES}, or a tar of one",
                    )
                os.replace(inside, cached)
    return cached


def _unpack(archive: Path, folder: Path, uri: str) -> None:
    """Only what belongs to it, whatever else the archive holds, and only as files."""
    try:
        unpacked = 0
        with tarfile.open(archive) as tar:
            for member in tar:
                path = str(PurePosixPath(member.name))
                if member.isfile() and _is_of_saved_model(path):
                    unpacked += member.size
                    if member.issparse() or unpacked > MAX_UNPACKED_BYTES:
                        raise tarfile.TarError(f"{path} with {member.size:,} bytes, which is not unpacked")
                    (folder / path).parent.mkdir(exist_ok=True)
                    with (folder / path).open("wb") as file:
                        content = tar.extractfile(member)
                        assert content is not None
                        shutil.copyfileobj(content, file, COPY_BLOCK_BYTES)
                        file.flush()
                        os.fsync(file.fileno())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise WeightsError(f"backbone.weights: {uri} is not a whole tar archive", found=str(error)) from None


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
    if config.is_folder:
        store, infos = _saved_model_at(config.weights, storage)
        return [store.uri, *(f"{info.path} {info.identity}" for info in infos)]
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
