"""The head that the backbone learns with: a bundle's, or a new one, fitted on what the frozen backbone says.

Shape letters: N labelled images, M of a split that is judged, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.finetuning.embeddings import Embed, embedded
from engine.finetuning.kinds import FinetuneSettings
from engine.finetuning.loop import Images
from engine.heads.bundle import Bundle
from engine.heads.kinds import AnyHeadConfig, open_head
from engine.heads.network import compile_logits
from engine.training.grid import Candidate
from engine.training.judgement import JUDGED
from engine.training.loop import Report, TrainingResult, TrainingRows, train_heads
from engine.training.partition import Partition
from engine.training.scaling import Scaling
from engine.training.step import hold_rows


@dataclass(frozen=True, slots=True)
class FirstHead:
    """A head before the backbone learns.

    Attributes:
        course: how it was fitted; None: it came with a bundle.
        logits: (M, D) -> (M, K), with the weights that the network has when it is called.
        before: logits of the splits that are judged, of the frozen backbone.
    """

    config: AnyHeadConfig
    network: keras.Model
    course: TrainingResult | None
    logits: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    before: Mapping[str, NDArray[np.float32]]


def first_head(
    strategy: tf.distribute.Strategy,
    bundle: Bundle | None,
    embed: Embed,
    images: Images,
    parted: Partition,
    settings: FinetuneSettings,
    report: Report,
) -> FirstHead:
    """Take the bundle's, or fit a new one exactly as `fit` does it; all workers must call this.

    Args:
        embed: of the frozen backbone.
        report: called once per epoch.
    """
    rows_of = parted.rows_of
    if bundle is not None:
        config, course = bundle.manifest.head, None
        with strategy.scope():
            network = bundle.network()
        frozen = {name: embedded(embed, images, rows_of[name]) for name in JUDGED}
    else:
        embeddings_ND = embedded(embed, images, np.arange(len(parted.targets.array)))
        config = settings.head
        network, course = _fitted(strategy, embeddings_ND, parted, settings, report)
        frozen = {name: embeddings_ND[rows_of[name]] for name in JUDGED}
    logits = compile_logits(network)
    return FirstHead(config, network, course, logits, {name: logits(frozen[name]) for name in JUDGED})


def _fitted(
    strategy: tf.distribute.Strategy,
    embeddings_ND: NDArray[np.float32],
    parted: Partition,
    settings: FinetuneSettings,
    report: Report,
) -> tuple[keras.Model, TrainingResult]:
    """Its network, with scaling in it, and how it was trained."""
    phase, rows_of = settings.head_phase, parted.rows_of
    rows = TrainingRows(embeddings_ND, parted.targets.array, rows_of["train"], rows_of["validation"])
    scaling = None
    if phase.training.standardise:
        scaling = Scaling.of(embeddings_ND, rows.train)
        rows = replace(
            rows, embeddings_ND=scaling.apply(embeddings_ND, np.empty(embeddings_ND.shape, np.float32))
        )
    held = hold_rows(strategy, rows.embeddings_ND, rows.targets_N)
    candidate = Candidate(settings.head, phase.optimizer)
    (trained,) = train_heads(
        [candidate],
        strategy,
        rows,
        phase.training.as_of_fit(),
        lambda epoch: report({**epoch, "phase": "head"}),
        held,
    )
    network = trained.network
    if scaling:
        with strategy.scope():
            head = open_head(settings.head)
            network = head.absorb_scaling(network, scaling.subtract_D, scaling.multiply_D)
    return network, trained.result
