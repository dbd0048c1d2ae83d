"""Writes a backbone's weights as its kind reads them again. Not for: where they go."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from engine.backbones.base import Backbone
from engine.backbones.fingerprint import tensor_digest
from engine.backbones.kinds import BackboneConfig, KerasFileConfig

_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can hold


def saved_weights(backbone: Backbone) -> tuple[str, bytes]:
    """Name and content of a file with a backbone's tensors: of a network that came from a .keras file the whole network
    as it is cut and pooled, of any other the tensors. The same tensors give the same bytes.

    Args:
        backbone: uncut, unless it came from a .keras file; no SavedModel.
    """
    is_whole = isinstance(backbone.config, KerasFileConfig)
    name = f"backbone.{tensor_digest(backbone.network)[:8]}" + (".keras" if is_whole else ".weights.h5")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if not is_whole:
            backbone.network.save_weights(path)
            return name, path.read_bytes()
        backbone.network.save(path)
        _without_times(path)
        return name, path.read_bytes()


def config_of_saved(config: BackboneConfig, uri: str, content: bytes) -> BackboneConfig:
    """The recipe block that reads such a file.

    Args:
        config: of the backbone that was saved.
        uri: where the file is.
        content: what is in it.
    """
    fields: dict[str, Any] = {
        "weights": uri,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "layer": None,
    }
    return type(config).model_validate(config.model_dump() | fields)


def _without_times(path: Path) -> None:
    """Keras notes when it saved."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(entries["metadata.json"]) | {"date_saved": ""}
    entries["metadata.json"] = json.dumps(metadata).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(entries.items()):
            archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), content)
