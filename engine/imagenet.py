"""A network's own ImageNet classifier as a bundle: labels without training. Not for: fitting anything.

Shape letters: D embedding width, K = 1,000 classes.
"""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from engine import __version__
from engine.backbones.fingerprint import fingerprint_contract
from engine.backbones.imagenet_top import ImageNetTop, imagenet_top
from engine.backbones.kinds import BackboneConfig
from engine.errors import RecipeError, WeightsError
from engine.heads.bundle import Bundle, TrainedHead, publish_bundle
from engine.heads.kinds import LinearHeadConfig, build_head
from engine.resolve import Network, Resolution, resolve
from engine.runtimes.kinds import RuntimeConfig, prepare_to_freeze
from engine.schema import SCHEMA_VERSION
from engine.storage import StorageConfig, Store

CLASSES_FILE = "imagenet_classes.tsv"


@dataclass(frozen=True, slots=True)
class ImageNetClass:
    """One of the 1,000 classes.

    Attributes:
        wordnet_id: as in n01440764.
        name: as `keras.applications.*.decode_predictions` gives it; two of them are the names of two classes.
        label: the name, with the id behind it where another class has the same.
    """

    wordnet_id: str
    name: str
    label: str


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """All of them, in the order of a network's outputs."""
    text = (files("engine") / CLASSES_FILE).read_text(encoding="utf-8")
    pairs = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    times = Counter(name for _, name in pairs)
    return tuple(
        ImageNetClass(wordnet_id, name, name if times[name] == 1 else f"{name}_{wordnet_id}")
        for wordnet_id, name in pairs
    )


def publish_imagenet_bundle(
    config: BackboneConfig, runtime: RuntimeConfig, target: Store, storage: StorageConfig
) -> Bundle:
    """Load a network with its classifier, and publish that as a bundle which belongs to the network's embeddings.

    Args:
        config: which network, at which input size.
        runtime: how its embeddings are made; the precision is part of their fingerprint.
        target: the bundle's folder.
        storage: how weights are reached.

    Raises:
        RecipeError: the classifier is not one dense layer on pooled features, or the precision is left open.
        WeightsError, BackboneError: as `engine.backbones.kinds.build_backbone`.
        StorageError: the bundle cannot be written.
    """
    if runtime.precision == "auto":
        raise RecipeError(
            "imagenet: runtime.precision is part of what the bundle belongs to",
            found="auto",
            wanted="that of the embeddings, such as float32",
            way_out="--set runtime.precision=float32",
        )
    prepare_to_freeze(num_threads=None, use_gpu=False)  # before anything is built
    top = imagenet_top(config, storage)
    resolution = resolve(Network(config, runtime, storage), archive=None)
    if top.tensor_digest != resolution.fingerprint_fields["tensor_digest"]:
        raise WeightsError(
            "imagenet: the classifier belongs to other weights than the network has at this input size",
            found=f"a network with tensors {top.tensor_digest[:16]}",
            wanted=resolution.fingerprint_fields["tensor_digest"][:16],
            way_out="take an input size that the network has ImageNet weights of its own for, such as 224",
        )
    return publish_bundle(
        target,
        _head(top),
        table_record=_record(config, resolution),
        metrics={"imagenet": "trained by whoever made the weights; nothing was measured here"},
        recipe={"imagenet": {"backbone": config.model_dump(mode="json")}},
    )


def _head(top: ImageNetTop) -> TrainedHead:
    """A linear head, its classes sorted by their labels as those of every bundle."""
    classes = imagenet_classes()
    order = sorted(range(len(classes)), key=lambda place: classes[place].label)
    network = build_head(LinearHeadConfig(), len(top.kernel_DK), len(classes), seed=0)
    network.set_weights([np.ascontiguousarray(top.kernel_DK[:, order]), top.bias_K[order]])
    return TrainedHead(
        LinearHeadConfig(),
        network,
        tuple(classes[place].label for place in order),
        "single_label",
        class_ids=tuple(classes[place].wordnet_id for place in order),
    )


def _record(config: BackboneConfig, resolution: Resolution) -> dict[str, Any]:
    """What `_table.json` would say of embeddings that nobody has made yet."""
    return {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "contract": fingerprint_contract(resolution.fingerprint_fields),
        "fingerprint": resolution.fingerprint,
        "tensor_digest": resolution.fingerprint_fields["tensor_digest"],
        "width": resolution.graph.width,
        "canary": resolution.canary,
        "backbone": config.model_dump(mode="json"),
        "runtime": resolution.runtime.model_dump(mode="json"),
        "engine_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
