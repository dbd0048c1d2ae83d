"""From decoded images to a new backbone and its bundle, on one screen: the body of a training worker. Imports no Ray.

Shape letters: N labelled images, S side in pixels, D embedding width, K classes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine import __version__
from engine.backbones.base import Backbone
from engine.backbones.fingerprint import fingerprint_fields, tensor_digest
from engine.backbones.kinds import build_backbone
from engine.config import canonical_json
from engine.errors import EngineError, LabelError
from engine.finetuning.augment import Augmenter
from engine.finetuning.comparison import Comparison, compare
from engine.finetuning.embeddings import embedded, watch_of
from engine.finetuning.head_phase import FirstHead, first_head
from engine.finetuning.images import ImageRows
from engine.finetuning.kinds import FinetuneSettings, require_learning_network
from engine.finetuning.loop import STATE_VERSION, Course, Finetuning, Images, Trainee
from engine.finetuning.publish import publish_backbone, remembered
from engine.finetuning.refusals import require_budget, require_own_head
from engine.finetuning.shown import shown_of_images
from engine.finetuning.step import Classifier, compile_embed, compile_step, with_loss_scale
from engine.finetuning.unfreeze import Unfrozen, unfreeze
from engine.heads.bundle import Bundle, TrainedHead, for_people, publish_bundle, report_uri
from engine.heads.kinds import open_head
from engine.images import DECODE_VERSION
from engine.report.page import render_report
from engine.storage import StorageConfig, Store
from engine.strategies.base import agreement, is_chief, require_same
from engine.strategies.workers import Workers
from engine.training.checkpoints import Checkpoints
from engine.training.embedding_map import embedding_map
from engine.training.judgement import JUDGED
from engine.training.loop import Report, TrainingResult, unheard
from engine.training.partition import Partition, partition
from engine.training.passes import row_weights
from engine.training.step import build_optimizer


class FinetuneSummary(TypedDict):
    """What a fine-tuning says about itself in `--json`; metrics.json in the bundle says everything."""

    bundle: str | None  # URI of the bundle; None: the one that was there stays
    report: str | None  # URI of the page about it
    fingerprint: str | None  # of the new backbone
    backbone: dict[str, Any] | None  # the recipe block to extract with
    rows: int  # labelled images that were used, all splits together
    rejects: int  # samples without an image that can be decoded
    classes: int
    trainable: int  # parameters of the backbone that learnt
    frozen: int  # and that did not
    comparison: dict[str, Any]  # before and after on the same images
    metrics: dict[str, dict[str, float] | None]  # validation, test: a few figures of what came out
    head_epochs: int  # of the phase before
    epochs: int
    best_epoch: int  # 0: none was better than what it began with
    skipped_steps: int  # whose gradients were infinite or NaN: under mixed_float16
    waiting_for_images: float  # share of the time of the steps, of the worker that waited longest
    images: dict[str, Any]  # their placement, and how many are on each worker's disk
    seconds: float  # wall time


def finetune_backbone(
    strategy: tf.distribute.Strategy,
    rows: ImageRows,
    settings: FinetuneSettings,
    storage: StorageConfig,
    bundle: Bundle | None,
    bundle_store: Store,
    report: Report,
) -> tuple[FinetuneSummary, Comparison] | None:
    """Fit or take a head, train backbone and head together, and publish both if that helped.

    Where several workers do it together, all of them call this with the same images, or with images that they have
    joined, and the first one answers and publishes; the others have None to say. What was interrupted goes on from its
    last checkpoint.

    Args:
        strategy: opened, before images were read: that is when workers meet.
        rows: all images, as `collect_images` or `join_images` give them.
        settings: the recipe; all of it (of a subclass too) goes into the bundle's recipe.json.
        bundle: the head to begin with; None: `settings.head` is fitted first.
        bundle_store: where the new bundle and the new weights go.
        report: called once per epoch with phase, epoch, epochs, train_loss, validation_loss, validation_accuracy.

    Raises:
        LabelError, RecipeError, ContractMismatch: something does not go together.
        OverBudget: more samples without an image than the limits allow.
        WeightsError, StorageError: something cannot be read or written.
        EngineError: the loss became infinite.
    """
    started = time.perf_counter()
    config = settings.backbone
    require_learning_network(config)
    require_budget(rows, settings.limits)
    chief = is_chief(strategy)
    heard = report if chief else unheard
    parted = partition(rows.samples, settings.task, settings.labels, settings.split, storage)
    targets, rows_of = parted.targets, parted.rows_of
    if not any(len(rows_of[name]) for name in JUDGED):
        raise LabelError(
            "split: no image to judge by, so nobody could say whether fine-tuning helped",
            way_out="give split.validation and split.test a share of the images",
        )
    reference = build_backbone(config, storage)  # in float32, and as it answers
    embed = compile_embed(reference.network, reference.scaling)
    workers = Workers(strategy)
    images = _images(rows, parted, settings, workers)
    training = _digest(images, parted, reference, bundle, settings)
    require_same(
        training,
        agreement(strategy),
        EngineError(
            "finetune: the workers have read different images, labels or weights",
            way_out="run again when nothing writes to the source, the label file or the weights any more",
        ),
    )
    if bundle is not None:
        require_own_head(bundle, reference, settings, targets.names)
    first = first_head(strategy, bundle, embed, images, parted, settings, heard)
    head_epochs = len(first.course.history) if first.course else 0
    checkpoints = Checkpoints(bundle_store, training, settings.training.checkpoint_seconds, writes=chief)
    learnt = _learn(
        strategy,
        first,
        images,
        rows_of["validation"],
        settings,
        lambda epoch: heard({**epoch, "phase": "backbone", "initial_epoch": head_epochs}),
        checkpoints,
        storage,
    )
    if not chief and images.are_everywhere:
        return None
    unfrozen, course = learnt.unfrozen, learnt.course
    reference.network.set_weights(learnt.tensors)
    judged = {name: embedded(embed, images, rows_of[name]) for name in JUDGED}
    after = {name: first.logits(judged[name]) for name in JUDGED}
    split = "test" if len(rows_of["test"]) else "validation"
    comparison = compare(split, first.before[split], after[split], targets.array[rows_of[split]])
    names = parted.names(rows.samples)
    verdict = targets.judge(after, rows_of, names, settings.calibration)
    publishes = comparison.is_better or settings.publish == "always"
    if not images.are_everywhere:  # others round otherwise, perhaps: the chief's word
        publishes = bool(workers.each(publishes)[0])
    memory = remembered(embed, images, parted, judged, after, verdict) if publishes else None
    if not chief:
        return None
    placed = {
        "placement": "everywhere" if images.are_everywhere else "split",
        "rows_per_worker": rows.rows_per_worker(workers.count),
    }

    def shown() -> Mapping[str, Mapping[str, Any]]:
        return shown_of_images(
            rows,
            verdict.metrics,
            targets.gallery(after, rows_of, names, verdict),
            embedding_map(judged[split], np.arange(len(rows_of[split])), targets.array[rows_of[split]]),
            settings,
        )

    record: Mapping[str, Any] | None = None
    page: str | None = None
    if publishes:
        record = publish_backbone(bundle_store, reference, storage)
        trained = TrainedHead(
            first.config, first.network, targets.names, settings.task, verdict.calibration, verdict.thresholds
        )
        published = publish_bundle(
            bundle_store,
            trained,
            table_record=record,
            metrics={
                **verdict.metrics,
                **parted.facts(),
                "rejects": dict(rows.rejects),
                "comparison": comparison.to_json(),
                "training": {
                    "num_replicas": strategy.num_replicas_in_sync,
                    "images": placed,
                    "unfrozen": asdict(unfrozen),
                    **_phases(first.course, course),
                },
            },
            recipe=settings.model_dump(mode="json"),
            shown=for_people("gallery, map and pictures of the report", shown),
            reference=memory,
            report=render_report,
        )
        page = report_uri(published)
    checkpoints.clear()
    summary = FinetuneSummary(
        bundle=bundle_store.uri if record else None,
        report=page,
        fingerprint=record["fingerprint"] if record else None,
        backbone=record["backbone"] if record else None,
        rows=sum(len(some) for some in rows_of.values()),
        rejects=sum(rows.rejects.values()),
        classes=len(targets.names),
        trainable=unfrozen.trainable,
        frozen=unfrozen.frozen,
        comparison=comparison.to_json(),
        metrics=targets.summary(verdict),
        head_epochs=head_epochs,
        epochs=len(course.history),
        best_epoch=course.best_epoch,
        skipped_steps=course.skipped_steps,
        waiting_for_images=course.waiting,
        images=placed,
        seconds=round(time.perf_counter() - started, 3),
    )
    return summary, comparison


@dataclass(frozen=True, slots=True)
class _Learnt:
    """What training the backbone came to; the head's network holds what it learnt itself."""

    unfrozen: Unfrozen
    course: Course
    tensors: list[NDArray[Any]]  # of the backbone


def _learn(  # noqa: PLR0913, PLR0917
    strategy: tf.distribute.Strategy,
    first: FirstHead,
    images: Images,
    validation: NDArray[np.int64],
    settings: FinetuneSettings,
    report: Report,
    checkpoints: Checkpoints,
    storage: StorageConfig,
) -> _Learnt:
    """Train a second copy of the backbone, which computes in its own precision and is on every device."""
    config = settings.training
    with strategy.scope(), _policy(config.precision):
        learner = build_backbone(settings.backbone, storage)
        unfrozen = unfreeze(learner.network, settings.unfreeze)
        classifier = Classifier(learner.scaling, learner.network, open_head(first.config), first.network)
        steps_per_epoch = math.ceil(len(images.train) / config.batch_size)
        optimizer = build_optimizer(settings.optimizer, steps_per_epoch, config.epochs)
        if config.precision == "mixed_float16":
            optimizer = with_loss_scale(optimizer, config.batch_size)
        optimizer.build(classifier.learning)
    augmenter, most = Augmenter(settings.augment, config.seed), min(config.batch_size, len(images.train))
    step = compile_step(strategy, classifier, optimizer, augmenter, config, most)
    trainee = Trainee(strategy, classifier, optimizer, step)
    watch = watch_of(classifier, images, validation, config.label_smoothing)
    course = Finetuning(trainee, images, watch, config, report, checkpoints).run()
    return _Learnt(unfrozen, course, [np.array(weight) for weight in learner.network.weights])


def _images(rows: ImageRows, parted: Partition, settings: FinetuneSettings, workers: Workers) -> Images:
    """The labelled ones, and what each counts."""
    targets_N, train = parted.targets.array, parted.rows_of["train"]
    weights_N = np.ones(len(targets_N), np.float32)
    if targets_N.ndim == 1:
        weights_N = row_weights(targets_N, train, settings.training.class_weights)
    return Images(rows, parted.labelled.positions_N, targets_N, weights_N, train, workers)


@contextmanager
def _policy(precision: str) -> Iterator[None]:
    """Layers that are made meanwhile compute in that precision."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _digest(
    images: Images,
    parted: Partition,
    reference: Backbone,
    bundle: Bundle | None,
    settings: FinetuneSettings,
) -> str:
    """Of all that training hangs on. Not of the strategy, which changes no more than a last bit, nor of which worker
    has an image: fewer workers may go on with what more have begun."""
    config, network = settings.backbone, reference.network
    facts = {
        "engine": __version__,
        "state": STATE_VERSION,
        "backbone": fingerprint_fields(
            reference, DECODE_VERSION, config.resize, "float32", tensor_digest(network)
        ),
        "head": open_head(bundle.manifest.head if bundle else settings.head).stated.model_dump(mode="json"),
        "bundle": bundle and bundle.id,
        "settings": settings.model_dump(
            mode="json",
            include={"head_phase", "unfreeze", "augment", "optimizer", "training"},
            exclude={"training": {"checkpoint_seconds", "images_at_once", "images"}},
        ),
    }
    digest = hashlib.sha256(canonical_json(facts).encode())
    for text in images.rows.samples["sha256"].to_pylist():
        digest.update(text)
    for array in (
        images.numbers_N,
        images.targets_N,
        images.train,
        images.weights_N,
        parted.rows_of["validation"],
    ):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _phases(head: TrainingResult | None, course: Course) -> dict[str, Any]:
    """How training went, for metrics.json: epochs of the second phase count on from those of the first."""
    head_epochs = len(head.history) if head else 0
    second = {
        "initial_epoch": head_epochs,
        "history": [{**asdict(epoch), "epoch": head_epochs + epoch.epoch} for epoch in course.history],
        "best_epoch": head_epochs + course.best_epoch,
        "stopped": course.stopped,
        "skipped_steps": course.skipped_steps,
        "waiting_for_images": course.waiting,
    }
    return {"head": head and head.facts(), "backbone": second}
