"""What a fine-tuning refuses before it trains: too many samples without an image, a head that does not fit."""

from __future__ import annotations

import logging

from engine.backbones.base import Backbone
from engine.backbones.fingerprint import fingerprint, fingerprint_fields, tensor_digest
from engine.errors import ContractMismatch, LabelError, OverBudget
from engine.finetuning.images import ImageRows
from engine.finetuning.kinds import FinetuneLimits, FinetuneSettings, require_trainable_head
from engine.heads.bundle import Bundle
from engine.images import DECODE_VERSION

log = logging.getLogger(__name__)


def require_budget(rows: ImageRows, limits: FinetuneLimits) -> None:
    """Refuse more samples without an image than the limits allow; fewer are said in the log.

    Raises:
        OverBudget.
    """
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


def require_own_head(
    bundle: Bundle,
    reference: Backbone,
    settings: FinetuneSettings,
    classes: tuple[str, ...],
) -> None:
    """Refuse a bundle that does not belong to this backbone, or does not answer with the classes of these labels.

    Raises:
        ContractMismatch, LabelError, RecipeError: with what it is.
    """
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
