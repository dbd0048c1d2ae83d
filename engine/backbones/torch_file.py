"""Reads tensors from a torch file of the old format (before torch 1.6) without torch; runs no code from it.

Such a file is a row of pickles (magic number, protocol version, facts about the writer, the object, the list of
storage keys), then per storage an int64 count and that many little-endian numbers. Tensors inside the object are
views: storage key, offset, shape and strides, in elements.
Source: torch/serialization.py, `_legacy_save` (described, not copied). Newer, zipped files are refused.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.errors import WeightsError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
STORAGE_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


def read_torch_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, as new arrays.

    Raises:
        WeightsError: not such a file, damaged, or it asks for anything but tensors in an ordered dict.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    # What pickle raises on damaged input, by its documentation ("other exceptions may also be raised").
    except (
        pickle.UnpicklingError, struct.error, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
        OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise _unreadable(path, f"{type(error).__name__}: {error}") from None


def _read(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
    if _NoClasses(file).load() != MAGIC_NUMBER or _NoClasses(file).load() != PROTOCOL_VERSION:
        raise _unreadable(path, "no magic number of the old torch format")
    facts = _NoClasses(file).load()
    if facts["little_endian"] is not True:
        raise _unreadable(path, "written on a big-endian machine")
    state = _TensorsOnly(file).load()
    if not isinstance(state, Mapping) or not all(isinstance(view, _TensorView) for view in state.values()):
        raise _unreadable(path, "its object is not a mapping of tensors")
    keys = _NoClasses(file).load()
    dtypes = {view.storage.key: view.storage.dtype for view in state.values()}
    storages = {key: _read_storage(file, np.dtype(dtypes[key]), path) for key in keys}
    return {str(name): _materialised(view, storages, path) for name, view in state.items()}


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True)
class _TensorView:
    """Stands where torch would call `_rebuild_tensor_v2`; offset, size and stride count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    backward_hooks: object = None


class _NoClasses(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; refuses every class and function."""

    def find_class(self, module: str, name: str) -> Any:
        raise WeightsError(
            f"torch file asks for {module}.{name}",
            wanted="OrderedDict, _rebuild_tensor_v2 and storage types, nothing else",
            way_out="do not open this file: it may run code on your machine",
        )


class _TensorsOnly(_NoClasses):
    """Reads a state dict; everything but ordered dicts and tensors is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _TensorView
        if module == "torch" and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        tag, storage_type, key, _location, _count, view_metadata = pid
        if tag != "storage" or not isinstance(storage_type, _StorageType) or view_metadata is not None:
            raise pickle.UnpicklingError(f"persistent id {tag!r} is not a plain storage")
        return _Storage(str(key), storage_type.dtype)


def _read_storage(file: BinaryIO, dtype: np.dtype[Any], path: Path) -> np.ndarray:
    (count,) = struct.unpack("<q", file.read(8))
    data = file.read(count * dtype.itemsize) if count >= 0 else b""
    if count < 0 or len(data) != count * dtype.itemsize:
        raise _unreadable(
            path,
            f"ends inside a storage: {len(data)} of {count * dtype.itemsize} bytes",
        )
    return np.frombuffer(data, dtype)


def _materialised(view: _TensorView, storages: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    storage = storages[view.storage.key]
    steps = [(size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True)]
    fits = min(view.offset, *view.size, *view.stride, 0) == 0
    if not fits or (0 not in view.size and view.offset + sum(steps) >= len(storage)):
        raise _unreadable(
            path,
            f"a tensor of shape {view.size} reaches outside its storage of {len(storage)}",
        )
    byte_strides = [stride * storage.itemsize for stride in view.stride]
    return np.lib.stride_tricks.as_strided(storage[view.offset :], view.size, byte_strides).copy()


def _unreadable(path: Path, found: str) -> WeightsError:
    return WeightsError(
        f"{path}: not a readable torch file",
        found=found,
        wanted="a state dict in the format before torch 1.6",
    )
