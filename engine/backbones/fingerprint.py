"""The fingerprint: one sha-256 over everything that changes an embedding, and nothing else; not who compares it.

What goes in, and why (`fingerprint_fields` is the list; adding, dropping or respelling a field changes every
fingerprint there is, so it is pinned by a golden test):

    architecture    kind and name of the network, or a digest of its layers or graph where it comes from a file; with
                    the tensors it says which function is computed
    tensor_digest   sha-256 over the tensors as loaded: their shapes, types and bytes, in the network's own order.
                    Names are left out, because Keras numbers them per process; so is where the weights came
                    from, so that a private copy of the ImageNet file has the fingerprint of the original
    layer, pooling  where the network is cut, and how its feature map becomes a vector
    input_size      pixels; another size gives other features from the same tensors
    decode_version  of the decode and resize recipe of engine.images
    resize          stretch, letterbox or center_crop
    pixel_scaling   the numbers, not their name
    precision       of the runtime; its brand stays out
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.config import stable_hash

if TYPE_CHECKING:
    from engine.backbones.base import Backbone


def fingerprint_fields(
    backbone: Backbone,
    decode_version: int,
    resize: str,
    precision: str,
    tensor_digest: str,
) -> dict[str, Any]:
    """The plain mapping that `fingerprint` hashes and `_table.json` keeps, so that two can be told apart by field."""
    scaling = backbone.scaling
    return {
        "architecture": backbone.architecture,
        "tensor_digest": tensor_digest,
        "layer": backbone.config.layer,
        "pooling": backbone.config.pooling,
        "input_size": backbone.input_size,
        "decode_version": decode_version,
        "resize": resize,
        "pixel_scaling": {
            "multiply": list(scaling.multiply),
            "add": list(scaling.add),
            "bgr": scaling.bgr,
        },
        "precision": precision,
    }


def fingerprint(fields: Mapping[str, Any]) -> str:
    """sha-256, 64 hex digits, over the canonical JSON of `fingerprint_fields`."""
    return stable_hash(dict(fields))


def fingerprint_contract(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a table's contract says of the network that made it."""
    return {
        "runtime.precision": fields["precision"],
        **{f"fingerprint.{name}": value for name, value in fields.items()},
        "fingerprint": fingerprint(fields),
    }


def tensor_digest(network: Any) -> str:
    """sha-256, 64 hex digits, over shape, type and little-endian bytes of each weight, in the network's order.

    Args:
        network: keras.Model, after its weights were loaded. Seeds of dropout layers are not weights and stay out.
    """
    import numpy as np

    digest = hashlib.sha256()
    for weight in network.weights:
        values = weight.value.numpy()
        little_endian = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        digest.update(f"{values.dtype.name}{list(values.shape)}\n".encode())
        digest.update(little_endian.tobytes())
    return digest.hexdigest()
