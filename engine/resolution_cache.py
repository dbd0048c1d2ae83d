"""Resolutions kept on this node: a network that was frozen and judged here before needs no Keras and no TensorFlow.

An entry is named after all that decides what is in it: the recipe's backbone and runtime, the state of the weights (a
file's identity, as `engine.backbones.fetch` uses it), this engine's own source, the libraries' versions, the
processor. So an entry is never wrong and never brought up to date; what is old goes when room is needed, and the
folder `networks` of the cache may be deleted at any time. Where it cannot be written there are simply no entries.

An entry is one line of JSON, then the frozen graph; no code is read from it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine
from engine.backbones.fetch import node_cache, weights_identity
from engine.config import stable_hash

if TYPE_CHECKING:
    from engine.backbones.kinds import BackboneConfig
    from engine.storage import StorageConfig

KEPT_BYTES = 2 << 30  # of all entries; the newest stays, whatever its size
_LIBRARIES = ("tensorflow", "tensorflow-cpu", "keras", "openvino", "numpy", "h5py")
_ENDING = ".network"


def entry_name(backbone: BackboneConfig, storage: StorageConfig, settings: Mapping[str, Any]) -> str:
    """The name of the entry for this network as it is here and now: 64 hex digits.

    Args:
        settings: whatever else decides what is kept, as JSON has it.

    Raises:
        RecipeError, WeightsError, StorageError: the weights file is not there, or cannot be asked about.
    """
    return stable_hash(
        {
            "backbone": backbone.model_dump(mode="json"),
            "weights": weights_identity(backbone, storage),
            "settings": dict(settings),
            "engine": _source_digest(),
            "libraries": {name: _version(name) for name in _LIBRARIES},
            "python": platform.python_version(),
            "processor": _processor(),
        }
    )


def load(name: str) -> tuple[dict[str, Any], bytes] | None:
    """The facts and the graph that were saved under this name; None: there is no such entry, or it is damaged."""
    path = _folder() / (name + _ENDING)
    try:
        line, _, graph = path.read_bytes().partition(b"\n")
        entry = json.loads(line)
        if entry["sha256"] != hashlib.sha256(graph).hexdigest():
            raise ValueError("cut off or changed")
        os.utime(path)  # it was used
        facts: dict[str, Any] = entry["facts"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    return facts, graph


def save(name: str, facts: Mapping[str, Any], graph: bytes) -> None:
    """Keep them for the next process of this node, whole or not at all."""
    line = json.dumps({"sha256": hashlib.sha256(graph).hexdigest(), "facts": dict(facts)}).encode()
    with contextlib.suppress(OSError):  # a full or read-only disk: the next process does the work again
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            file = Path(scratch) / "entry"
            file.write_bytes(line + b"\n" + graph)
            file.replace(folder / (name + _ENDING))
        _make_room(folder)


def _folder() -> Path:
    return node_cache() / "networks"


def _make_room(folder: Path) -> None:
    used = 0
    entries = sorted(folder.glob("*" + _ENDING), key=lambda path: path.stat().st_mtime, reverse=True)
    for place, path in enumerate(entries):
        used += path.stat().st_size
        if place and used > KEPT_BYTES:
            path.unlink(missing_ok=True)


@functools.cache
def _source_digest() -> str:
    """Of this package's own files: a change in any of them may change what a network becomes."""
    digest = hashlib.sha256()
    root = Path(engine.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> list[str]:
    """Its name and what it can do: libraries choose their routines by that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)  # the first core's
    return [platform.machine(), *(value.strip() for key, value in told.items() if key.strip() in _TOLD)]


_TOLD = ("model name", "flags", "Features")
