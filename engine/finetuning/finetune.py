"""From decoded images to a new backbone and its bundle, on one screen: the body of a training worker. Imports no Ray.

Shape letters: N labelled images, S side in pixels, D embedding width, K classes.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import keras
import numpy as np
import tensorflow as tf
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
from engine.config import canonical_json
from engine.embedder import canary_pixels
from engine.errors import ContractMismatch, EngineError, LabelError, OverBudget
from engine.finetuning.augment import Augmenter
from engine.finetuning.comparison import Comparison, compare
from engine.finetuning.images import ImageRows
from engine.finetuning.kinds import (
    FinetuneLimits,
    FinetuneSettings,
    require_learning_network,
    require_trainable_head,
)
from engine.finetuning.loop import Course, Finetuning, Images, Trainee, Watch
from engine.finetuning.step import Classifier, compile_embed, compile_step, with_loss_scale
from engine.finetuning.unfreeze import Unfrozen, unfreeze
from engine.heads.bundle import REPORT, Bundle, TrainedHead, publish_bundle
from engine.heads.kinds import AnyHeadConfig, open_head
from engine.heads.network import compile_logits
from engine.heads.reference import Reference, given_classes, representatives
from engine.images import DECODE_VERSION
from engine.report.page import render_report
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.schema import SCHEMA_VERSION
from engine.storage import StorageConfig, Store
from engine.strategies.base import agreement, is_chief, require_same
from engine.training import metrics
from engine.training.checkpoints import Checkpoints
from engine.training.grid import Candidate
from engine.training.judgement import JUDGED
from engine.training.loop import Report, TrainingResult, TrainingRows, train_heads, unheard
from engine.training.multi_label import share_right
from engine.training.partition import Partition, partition
from engine.training.passes import row_weights
from engine.training.scaling import Scaling
from engine.training.step import build_optimizer, cross_entropies, hold_rows
from engine.training.tasks import Verdict

log = logging.getLogger(__name__)
Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
WATCHED_AT_ONCE = 1024  # images that are read from the disk for judging


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
    waiting_for_images: float  # share of the time of the steps
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

    Where several workers do it together, all of them call this with the same images, and the first one answers and
    publishes; the others have None to say. What was interrupted goes on from its last checkpoint.

    Args:
        strategy: opened, before images were read: that is when workers meet.
        rows: all images.
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
    _require_budget(rows, settings.limits)
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
    images = _images(rows, parted, settings)
    training = _digest(images, parted, reference, bundle, settings)
    require_same(
        training,
        agreement(strategy),
        EngineError(
            "finetune: the workers have read different images, labels or weights",
            way_out="run again when nothing writes to the source, the label file or the weights any more",
        ),
    )
    head_config: AnyHeadConfig
    if bundle is not None:
        _refuse_other_head(bundle, reference, settings, targets.names)
        head_config, head_course = bundle.manifest.head, None
        with strategy.scope():
            head_network = bundle.network()
        frozen = {name: _embedded(embed, images, rows_of[name]) for name in JUDGED}
    else:
        embeddings_ND = _embedded(embed, images, np.arange(len(targets.array)))
        head_config = settings.head
        head_network, head_course = _head_phase(strategy, embeddings_ND, parted, settings, heard)
        frozen = {name: embeddings_ND[rows_of[name]] for name in JUDGED}
        del embeddings_ND
    logits = compile_logits(head_network)
    before = {name: logits(frozen.pop(name)) for name in JUDGED}
    head_epochs = len(head_course.history) if head_course else 0
    checkpoints = Checkpoints(bundle_store, training, settings.training.checkpoint_seconds, writes=chief)
    learnt = _learn(
        strategy,
        (head_config, head_network),
        images,
        rows_of["validation"],
        settings,
        lambda epoch: heard({**epoch, "phase": "backbone", "initial_epoch": head_epochs}),
        checkpoints,
        storage,
    )
    if not chief:
        return None
    unfrozen, course = learnt.unfrozen, learnt.course
    reference.network.set_weights(learnt.tensors)
    judged = {name: _embedded(embed, images, rows_of[name]) for name in JUDGED}
    after = {name: logits(judged[name]) for name in JUDGED}
    split = "test" if len(rows_of["test"]) else "validation"
    comparison = compare(split, before[split], after[split], targets.array[rows_of[split]])
    verdict = targets.judge(after, rows_of, parted.names(rows.samples), settings.calibration)
    record: Mapping[str, Any] | None = None
    if comparison.is_better or settings.publish == "always":
        record = publish_backbone(bundle_store, reference, storage)
        trained = TrainedHead(
            head_config, head_network, targets.names, settings.task, verdict.calibration, verdict.thresholds
        )
        publish_bundle(
            bundle_store,
            trained,
            table_record=record,
            metrics={
                **verdict.metrics,
                **parted.facts(),
                "rejects": dict(rows.rejects),
                "comparison": comparison.to_json(),
                "training": _phases(head_course, course, unfrozen, strategy.num_replicas_in_sync),
            },
            recipe=settings.model_dump(mode="json"),
            reference=_reference(embed, images, parted, judged, after, verdict),
            report=render_report,
        )
    checkpoints.clear()
    summary = FinetuneSummary(
        bundle=bundle_store.uri if record else None,
        report=f"{bundle_store.uri}/{REPORT}" if record else None,
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
    head: tuple[AnyHeadConfig, keras.Model],
    images: Images,
    validation: NDArray[np.int64],
    settings: FinetuneSettings,
    report: Report,
    checkpoints: Checkpoints,
    storage: StorageConfig,
) -> _Learnt:
    """Train a second copy of the backbone, which computes in its own precision and is on every device."""
    head_config, head_network = head
    config = settings.training
    with strategy.scope(), _policy(config.precision):
        learner = build_backbone(settings.backbone, storage)
        unfrozen = unfreeze(learner.network, settings.unfreeze)
        classifier = Classifier(learner.scaling, learner.network, open_head(head_config), head_network)
        steps_per_epoch = math.ceil(len(images.train) / config.batch_size)
        optimizer = build_optimizer(settings.optimizer, steps_per_epoch, config.epochs)
        if config.precision == "mixed_float16":
            optimizer = with_loss_scale(optimizer, config.batch_size)
        optimizer.build(classifier.learning)
    step = compile_step(strategy, classifier, optimizer, Augmenter(settings.augment, config.seed), config)
    trainee = Trainee(strategy, classifier, optimizer, step)
    watch = _watch(classifier, images, validation, config.label_smoothing)
    course = Finetuning(trainee, images, watch, config, report, checkpoints).run()
    return _Learnt(unfrozen, course, [np.array(weight) for weight in learner.network.weights])


def _images(rows: ImageRows, parted: Partition, settings: FinetuneSettings) -> Images:
    """The labelled ones, and what each counts."""
    targets_N, train = parted.targets.array, parted.rows_of["train"]
    weights_N = np.ones(len(targets_N), np.float32)
    if targets_N.ndim == 1:
        weights_N = row_weights(targets_N, train, settings.training.class_weights)
    return Images(rows, parted.labelled.positions_N, targets_N, weights_N, train)


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


def _head_phase(
    strategy: tf.distribute.Strategy,
    embeddings_ND: NDArray[np.float32],
    parted: Partition,
    settings: FinetuneSettings,
    report: Report,
) -> tuple[keras.Model, TrainingResult]:
    """A new head, fitted on what the frozen backbone says; exactly as `fit` does it."""
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


def _embedded(embed: Embed, images: Images, labelled: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N, D) of some labelled images; no more of them are in memory at once than are computed on."""
    portions = [
        embed(images.pixels(labelled[start : start + WATCHED_AT_ONCE]))
        for start in range(0, max(1, len(labelled)), WATCHED_AT_ONCE)
    ]
    return np.concatenate(portions)


def _reference(
    embed: Embed,
    images: Images,
    parted: Partition,
    judged: Mapping[str, NDArray[np.float32]],
    after: Mapping[str, NDArray[np.float32]],
    verdict: Verdict,
) -> Reference:
    """What the bundle remembers of these images as the new backbone sees them.

    Of the training images only those are embedded again that become centroids.
    """
    targets = parted.targets
    train = np.unique(representatives(targets.array, parted.rows_of["train"], len(targets.names))[0])
    embeddings_ND = np.concatenate([_embedded(embed, images, train), *(judged[name] for name in JUDGED)])
    rows = np.concatenate([train, *(parted.rows_of[name] for name in JUDGED)])
    places = np.arange(len(rows))
    given_MK = given_classes(
        np.concatenate([after[name] for name in JUDGED]), verdict.calibration, verdict.thresholds
    )
    return Reference.of(
        embeddings_ND, targets.array[rows], places[: len(train)], places[len(train) :], given_MK
    )


def _watch(
    classifier: Classifier, images: Images, validation: NDArray[np.int64], label_smoothing: float
) -> Watch:
    """Loss and accuracy on the validation images with the weights that there are. The loss is the one that is trained:
    without its label smoothing the confident head of the first phase would look better than what follows it."""
    embed = compile_embed(classifier.backbone, classifier.scaling)
    logits = compile_logits(classifier.head_network)
    wanted = images.targets_N[validation]

    def watch() -> tuple[float, ...]:
        if not len(validation):
            return ()
        found_VK = logits(_embedded(embed, images, validation))
        loss = float(np.mean(cross_entropies(tf.constant(found_VK), tf.constant(wanted), label_smoothing)))
        return loss, (share_right if wanted.ndim == 2 else metrics.accuracy)(found_VK, wanted)

    return watch


def _refuse_other_head(
    bundle: Bundle,
    reference: Backbone,
    settings: FinetuneSettings,
    classes: tuple[str, ...],
) -> None:
    """The bundle must belong to this backbone and answer with the classes of these labels."""
    manifest = bundle.manifest
    precision = bundle.document("embeddings_table")["contract"]["fingerprint.precision"]
    fields = fingerprint_fields(
        reference, DECODE_VERSION, settings.backbone.resize, precision, tensor_digest(reference.network)
    )
    if fingerprint(fields) != manifest.fingerprint:
        raise ContractMismatch(
            f"bundle {bundle.store.uri}: its head was fitted on another backbone",
            found=f"fingerprint {manifest.fingerprint}",
            wanted=fingerprint(fields),
            way_out="give the backbone of the table that it was fitted on, or leave `bundle` out: a new head is fitted",
        )
    require_trainable_head(bundle, settings.task)
    if manifest.classes != classes:
        raise LabelError(
            f"bundle {bundle.store.uri}: it answers with other classes than these images have",
            found=_named(manifest.classes),
            wanted=_named(classes),
            way_out="correct the labels, or leave `bundle` out: a new head is fitted",
        )


def _named(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")


def _require_budget(rows: ImageRows, limits: FinetuneLimits) -> None:
    rejects = sum(rows.rejects.values())
    samples = len(rows) + rejects
    if rejects > limits.max_reject_fraction * samples or (
        limits.max_rejects is not None and rejects > limits.max_rejects
    ):
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rows.rejects.items()))
        raise OverBudget(
            f"finetune: {rejects:,} of {samples:,} samples have no image that can be decoded",
            found=reasons,
            wanted=f"at most {limits.max_reject_fraction:.2%} (limits.max_reject_fraction)"
            + (f" and {limits.max_rejects} (limits.max_rejects)" if limits.max_rejects is not None else ""),
            way_out="`engine extract` names each in its rejects; repair them, or allow more",
        )
    if rejects:
        log.warning("%d of %d samples have no image that can be decoded and are left out", rejects, samples)


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
    """Of all that training hangs on. Not of the strategy, which changes no more than a last bit."""
    config, network = settings.backbone, reference.network
    facts = {
        "engine": __version__,
        "backbone": fingerprint_fields(
            reference, DECODE_VERSION, config.resize, "float32", tensor_digest(network)
        ),
        "head": open_head(bundle.manifest.head if bundle else settings.head).stated.model_dump(mode="json"),
        "bundle": bundle and bundle.id,
        "settings": settings.model_dump(
            mode="json",
            include={"head_phase", "unfreeze", "augment", "optimizer", "training"},
            exclude={"training": {"checkpoint_seconds", "images_at_once"}},
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


def _phases(
    head: TrainingResult | None, course: Course, unfrozen: Unfrozen, num_replicas: int
) -> dict[str, Any]:
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
    return {
        "num_replicas": num_replicas,
        "unfrozen": asdict(unfrozen),
        "head": head and head.facts(),
        "backbone": second,
    }
