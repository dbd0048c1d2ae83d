from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from engine.backbones.torch_file import MAGIC_NUMBER, read_torch_state
from engine.errors import WeightsError


class _Storage:
    """Pickled as torch pickles a storage: by reference."""

    def __init__(self, key: str, values: np.ndarray, type_name: str = "FloatStorage") -> None:
        self.key, self.values, self.type_name = key, values, type_name


class _Tensor:
    """Pickled as torch pickles a tensor: a call of _rebuild_tensor_v2."""

    def __init__(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[object, ...]:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _Storage):
            return None
        storage_type = getattr(sys.modules["torch"], value.type_name)
        return ("storage", storage_type, value.key, "cpu", len(value.values), None)


@pytest.fixture(autouse=True)
def torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names a real torch would write into the file; torch itself is not installed."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments: object) -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    vars(utils)["_rebuild_tensor_v2"] = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def torch_file(state: object, storages: list[_Storage], magic: int = MAGIC_NUMBER) -> bytes:
    file = io.BytesIO()
    for header in (magic, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(header, file, protocol=2)
    _Pickler(file, protocol=2).dump(state)
    pickle.dump([storage.key for storage in storages], file, protocol=2)
    for storage in storages:
        file.write(struct.pack("<q", len(storage.values)) + storage.values.tobytes())
    return file.getvalue()


def read(data: bytes, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "x.pth"
    path.write_bytes(data)
    return read_torch_state(path)


NUMBERS = _Storage("17", np.arange(100, 130, dtype="<f4"))


def test_tensors_are_read_with_offset_and_strides_from_a_shared_storage(tmp_path: Path) -> None:
    steps = _Storage("3", np.array([7], "<i8"), "LongStorage")
    state = OrderedDict(
        plain=_Tensor(NUMBERS, 0, (2, 3), (3, 1)),
        transposed=_Tensor(NUMBERS, 5, (3, 2), (1, 3)),
        scalar=_Tensor(steps, 0, (), ()),
        empty=_Tensor(NUMBERS, 0, (0, 5), (5, 1)),
    )
    found = read(torch_file(state, [steps, NUMBERS]), tmp_path)
    assert list(found) == ["plain", "transposed", "scalar", "empty"]
    np.testing.assert_array_equal(found["plain"], [[100, 101, 102], [103, 104, 105]])
    np.testing.assert_array_equal(found["transposed"], [[105, 108], [106, 109], [107, 110]])
    assert (found["scalar"].shape, found["scalar"].item(), found["scalar"].dtype) == ((), 7, np.int64)
    assert found["empty"].shape == (0, 5)


class _Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["in the state", "instead of the magic number", "in the list of keys"])
def test_file_that_asks_to_run_code_is_refused_and_runs_nothing(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"
    command = _Command(marker)
    state: object = OrderedDict(x=command) if place == "in the state" else OrderedDict()
    data = torch_file(state, [])
    if place == "instead of the magic number":
        data = pickle.dumps(command, protocol=2) + data
    if place == "in the list of keys":
        data = data[: -len(pickle.dumps([], protocol=2))] + pickle.dumps([command], protocol=2)
    with pytest.raises(WeightsError, match=r"asks for (posix|os|nt)\.mkdir"):
        read(data, tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(28, (3,), (1,)), (0, (2, 2), (30, 1)), (-1, (1,), (1,)), (0, (2,), (-1,))]
)
def test_tensor_that_reaches_outside_its_storage_is_refused(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    data = torch_file(OrderedDict(x=_Tensor(NUMBERS, offset, size, stride)), [NUMBERS])
    with pytest.raises(WeightsError, match="outside its storage of 30"):
        read(data, tmp_path)


def test_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = torch_file(OrderedDict(x=_Tensor(NUMBERS, 0, (30,), (1,))), [NUMBERS])
    for length in range(len(data)):
        with pytest.raises(WeightsError):
            read(data[:length], tmp_path)


@pytest.mark.parametrize("data", [b"PK\x03\x04 a zipped torch file", b"", b"\x80\x02X\x01"])
def test_file_of_another_format_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(WeightsError, match="not a readable torch file"):
        read(data, tmp_path)


def test_wrong_magic_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no magic number"):
        read(torch_file(OrderedDict(), [], magic=MAGIC_NUMBER + 1), tmp_path)
