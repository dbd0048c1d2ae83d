"""What a fine-tuning publishes: weights of its backbone, what a table of it would say, and what the bundle remembers.

Not for: whether it is worth publishing. Shape letters: N labelled images, D embedding width, M judged ones, K classes.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import __version__
from engine.backbones.base import Backbone
from engine.backbones.fingerprint import (
    fingerprint,
    fingerprint_contract,
    fingerprint_fields,
    tensor_digest,
)
from engine.backbones.kinds import build_backbone
from engine.backbones.save import config_of_saved, saved_weights
from engine.embedder import canary_pixels
from engine.errors import ContractMismatch
from engine.finetuning.embeddings import Embed, embedded
from engine.finetuning.loop import Images
from engine.finetuning.step import compile_embed
from engine.heads.reference import Reference, given_classes, representatives
from engine.images import DECODE_VERSION
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.schema import SCHEMA_VERSION
from engine.storage import StorageConfig, Store
from engine.training.judgement import JUDGED
from engine.training.partition import Partition
from engine.training.tasks import Verdict


def publish_backbone(store: Store, backbone: Backbone, storage: StorageConfig) -> dict[str, Any]:
    """Write the weights of a network beside its bundle, load them again, and say what a table of it would say.

    Returns:
        A record as `_table.json` has it, of a table that nobody has extracted yet.

    Raises:
        StorageError: they cannot be written, or read again.
        WeightsError: what was written does not load.
    """
    digest = tensor_digest(backbone.network)
    name, content = saved_weights(backbone)
    store.write(name, content)
    config = config_of_saved(backbone.config, f"{store.uri}/{name}", content)
    loaded = build_backbone(config, storage)
    if tensor_digest(loaded.network) != digest:
        raise ContractMismatch(
            f"{store.uri}/{name}: the weights that were written are not those that are read",
            way_out="this is a defect of the engine: nothing was published",
        )
    named = fingerprint_fields(loaded, DECODE_VERSION, config.resize, "float32", digest)
    embed = compile_embed(loaded.network, loaded.scaling)
    runtime = TensorFlowRuntimeConfig()
    return {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "contract": fingerprint_contract(named),
        "fingerprint": fingerprint(named),
        "tensor_digest": digest,
        "width": loaded.width,
        "canary": embed(canary_pixels(loaded.input_size)).tolist(),
        "backbone": config.model_dump(mode="json"),
        "runtime": runtime.model_dump(mode="json"),
        "engine_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def remembered(
    embed: Embed,
    images: Images,
    parted: Partition,
    judged: Mapping[str, NDArray[np.float32]],
    after: Mapping[str, NDArray[np.float32]],
    verdict: Verdict,
) -> Reference:
    """What the bundle remembers of these images as the new backbone sees them.

    Of the training images only those are embedded again that become centroids. Where images are split between workers
    all must call this.

    Args:
        judged: embeddings of each split that is judged.
        after: their logits.
    """
    targets = parted.targets
    train = np.unique(representatives(targets.array, parted.rows_of["train"], len(targets.names))[0])
    embeddings_ND = np.concatenate([embedded(embed, images, train), *(judged[name] for name in JUDGED)])
    rows = np.concatenate([train, *(parted.rows_of[name] for name in JUDGED)])
    places = np.arange(len(rows))
    given_MK = given_classes(
        np.concatenate([after[name] for name in JUDGED]), verdict.calibration, verdict.thresholds
    )
    return Reference.of(
        embeddings_ND, targets.array[rows], places[: len(train)], places[len(train) :], given_MK
    )
