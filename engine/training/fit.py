"""From an embedding table to a published bundle, on one screen: the body of a training worker. Imports no Ray.

Shape letters: N labelled rows, D embedding width, K classes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine import __version__
from engine.config import canonical_json
from engine.errors import EngineError, LabelError
from engine.heads.bundle import TrainedHead, for_people, publish_bundle, report_uri
from engine.heads.kinds import open_head
from engine.heads.network import Logits, compile_logits
from engine.heads.reference import Reference, given_classes
from engine.heads.side_features import SideEncoder
from engine.report.page import render_report
from engine.schema import SampleId
from engine.storage import StorageConfig, Store
from engine.strategies.base import agreement, is_chief, require_same
from engine.strategies.kinds import open_strategy
from engine.training.checkpoints import Checkpoints
from engine.training.embedding_map import embedding_map
from engine.training.gallery import wanted_pictures
from engine.training.grid import Candidate, best_of, candidates, grid_report
from engine.training.judgement import JUDGED
from engine.training.kinds import FitSettings
from engine.training.labels import LabelledRows
from engine.training.loop import Report, TrainingRows, out_of_fold_logits, train_heads, unheard
from engine.training.partition import partition
from engine.training.rows import Rows, RowSource, empty_rows, fill_rows
from engine.training.scaling import Scaling
from engine.training.step import hold_rows
from engine.training.suspects import assign_folds
from engine.training.tasks import Targets, Verdict

log = logging.getLogger(__name__)
Look = Callable[[Sequence[SampleId]], Mapping[str, Mapping[str, Any]]]
DIGESTED_ROWS = 1 << 20  # of a digest at most: on a disk a row's first numbers cost as much as all of them


class FitSummary(TypedDict):
    """What a fit says about itself in `--json`; metrics.json in the bundle says everything."""

    bundle: str  # URI of the bundle
    report: str | None  # URI of the page about it; None: it could not be made
    rows: int  # labelled rows that were used, all splits together
    classes: int  # number of classes
    metrics: dict[str, dict[str, float] | None]  # validation, test: a few figures; None where it has no rows
    heads_tried: int  # with different settings
    published: dict[str, Any]  # head and optimizer of the bundle
    suspect_labels: (
        int | None
    )  # labels that are probably wrong: suspects.json; None where none were looked for
    epochs: int  # epochs that were run for the published head
    seconds: float  # wall time


def fit_head(  # noqa: PLR0913
    table: pa.Table,
    record: Mapping[str, Any],
    settings: FitSettings,
    storage: StorageConfig,
    bundle_store: Store,
    report: Report,
    source: RowSource | None = None,
    *,
    look: Look | None = None,
) -> FitSummary | None:
    """Fit a head on labelled embeddings and publish it.

    Where several workers fit it together, all of them call this, and the first one answers and publishes; the others
    have None to say. A fit that was interrupted goes on from its last checkpoint.

    Args:
        table: one version of each shard: key, shard, index, and the columns used for labels, splits and side features.
        record: the table's `_table.json`.
        settings: the recipe; all of it (of a subclass too) goes into the bundle's recipe.json.
        storage: how a label file is reached.
        bundle_store: where the bundle goes.
        report: called once per epoch with epoch, epochs, train_loss, validation_loss, validation_accuracy.
        source: has the table's embeddings; None: the table has them itself.
        look: answers with further documents for the report, by role, given the samples that it shows, the most wanted
            first; None: there are none.

    Raises:
        LabelError: labels or splits that cannot be used without guessing.
        TableDamaged: the embeddings are not as wide as the record says.
        EngineError: the devices are in use, or the loss became infinite.
        StorageError: a label file cannot be read, or the bundle cannot be written.
    """
    started = time.perf_counter()
    split = settings.split
    parted = partition(
        table,
        settings.task,
        settings.labels,
        split,
        storage,
        side=[one.column for one in settings.side_features],
    )
    labelled, splits_N, targets, rows_of = parted.labelled, parted.splits_N, parted.targets, parted.rows_of
    tried = candidates(settings)
    if len(tried) > 1 and not len(rows_of["validation"]):
        raise _nothing_to_choose_by(len(tried), settings)
    strategy = open_strategy(settings.strategy)
    agreed = agreement(strategy)
    side, side_NE = _side_features(settings, table, labelled, rows_of["train"])
    source = source or RowSource.of(table)
    width = int(record["width"])
    place = source.place_for(4 * len(side_NE) * (width + side_NE.shape[1]), agreed)
    embeddings_ND = _gathered(source, labelled.positions_N, width, side_NE, place)
    rows = TrainingRows(embeddings_ND, targets.array, rows_of["train"], rows_of["validation"])
    digest = _training_digest(rows, width, tried, settings, record)
    require_same(
        digest,
        agreed,
        EngineError(
            "training: the workers have read different rows or labels",
            way_out="run again when nothing writes to the embedding table or the label file any more",
        ),
    )
    scaling = None
    if settings.training.standardise:
        scaling = Scaling.of(embeddings_ND, rows.train)
        scaled_ND = scaling.apply(embeddings_ND, empty_rows(embeddings_ND.shape, np.float32, place))
        rows = replace(rows, embeddings_ND=scaled_ND)
    held = hold_rows(strategy, rows.embeddings_ND, rows.targets_N)
    chief = is_chief(strategy)
    checkpoints = Checkpoints(
        bundle_store,
        digest,
        settings.training.checkpoint_seconds,
        writes=chief,
    )
    heard = report if chief else unheard
    trained = train_heads(tried, strategy, rows, settings.training, heard, held, checkpoints)
    best = best_of(trained, tried)
    head, network, training = tried[best].head, trained[best].network, trained[best].result
    names = parted.names(table)
    suspects = None
    if settings.suspects.folds:
        everyone = np.flatnonzero(targets.usable_N & (splits_N != ""))
        unseen_NK = out_of_fold_logits(
            tried[best],
            strategy,
            replace(rows, train=everyone),
            assign_folds(parted.groups, settings.suspects.folds, split.seed),
            max(1, training.best_epoch),
            settings.training,
            held,
        )
        suspects = targets.suspects(unseen_NK[everyone], everyone, names)
    if not chief:
        return None
    if scaling:
        network = open_head(head).absorb_scaling(network, scaling.subtract_D, scaling.multiply_D)
    logits = compile_logits(network)
    judged = {name: logits(embeddings_ND, rows_of[name]) for name in JUDGED}
    verdict = targets.judge(judged, rows_of, names, settings.calibration)

    def shown() -> dict[str, Mapping[str, Any]]:
        gallery = targets.gallery(judged, rows_of, names, verdict)
        usable = np.sort(np.concatenate(list(rows_of.values())))
        plane = embedding_map(embeddings_ND[:, :width], usable, targets.array)
        wanted = wanted_pictures(verdict.metrics, suspects, gallery)
        seen = for_people("pictures of the report", lambda: look(wanted)) if look else None
        return {"gallery": gallery, **({"embedding_map": plane} if plane else {}), **(seen or {})}

    bundle = publish_bundle(
        bundle_store,
        TrainedHead(
            head,
            network,
            targets.names,
            settings.task,
            verdict.calibration,
            verdict.thresholds,
            settings.side_features,
            side,
        ),
        table_record=record,
        metrics={
            **verdict.metrics,
            **parted.facts(),
            "training": {**training.facts(), "num_replicas": strategy.num_replicas_in_sync},
            "grid": grid_report(tried, trained, best),
        },
        recipe=settings.model_dump(mode="json"),
        suspects=suspects,
        shown=for_people("gallery and map of the report", shown),
        reference=_reference(embeddings_ND, width, targets, rows_of, logits, judged, verdict),
        report=render_report,
    )
    checkpoints.clear()
    return FitSummary(
        bundle=bundle.store.uri,
        report=report_uri(bundle),
        rows=sum(len(rows) for rows in rows_of.values()),
        classes=len(targets.names),
        metrics=targets.summary(verdict),
        heads_tried=len(tried),
        published=tried[best].to_json(),
        suspect_labels=None if suspects is None else len(suspects),
        epochs=len(training.history),
        seconds=round(time.perf_counter() - started, 3),
    )


def _side_features(
    settings: FitSettings, table: pa.Table, labelled: LabelledRows, train: NDArray[np.int64]
) -> tuple[SideEncoder | None, NDArray[np.float32]]:
    """What they become, (N, E), and how; E is 0 without any."""
    if not settings.side_features:
        return None, np.empty((len(labelled.positions_N), 0), np.float32)
    rows = table.take(pa.array(labelled.positions_N))
    for one in settings.side_features:
        if one.column not in table.column_names:
            rows = rows.append_column(one.column, pa.array(labelled.values[one.column], pa.string()))
    side = SideEncoder.fitted(settings.side_features, rows, train)
    return side, side.encode(rows)


def _reference(
    embeddings_ND: Rows,
    width: int,
    targets: Targets,
    rows_of: Mapping[str, NDArray[np.int64]],
    logits: Logits,
    judged: Mapping[str, NDArray[np.float32]],
    verdict: Verdict,
) -> Reference:
    """What the bundle remembers of these rows."""
    held_out = np.concatenate([rows_of[name] for name in JUDGED])
    asked_MK = np.concatenate([judged[name] for name in JUDGED])
    if not len(held_out):
        asked_MK = logits(embeddings_ND, rows_of["train"])
    given_MK = given_classes(asked_MK, verdict.calibration, verdict.thresholds)
    return Reference.of(embeddings_ND[:, :width], targets.array, rows_of["train"], held_out, given_MK)


def _gathered(
    source: RowSource,
    positions_N: NDArray[np.int64],
    width: int,
    side_NE: NDArray[np.float32],
    place: Path | None,
) -> Rows:
    """Embeddings of the labelled rows, with their side features behind them.

    Raises:
        TableDamaged: the embeddings have another width.
    """
    portions = iter(source.columns())
    first = next(portions)
    dtype = first.type.value_type.to_pandas_dtype() if not side_NE.shape[1] else np.float32
    shape = (len(positions_N), width + side_NE.shape[1])
    rows_ND = empty_rows(shape, dtype, place)
    fill_rows(rows_ND, chain([first], portions), positions_N, width)
    rows_ND[:, width:] = side_NE
    return rows_ND


def _training_digest(
    rows: TrainingRows,
    width: int,
    tried: Sequence[Candidate],
    settings: FitSettings,
    record: Mapping[str, Any],
) -> str:
    """Of all that training hangs on, as it was read: processors may differ in a last bit of what is computed of it.

    Not of the strategy, which changes no more than that either.
    """
    facts = {
        "engine": __version__,
        "fingerprint": record["fingerprint"],
        "tried": [candidate.to_json() for candidate in tried],
        "heads": [open_head(candidate.head).stated.model_dump(mode="json") for candidate in tried],
        "side_features": [one.model_dump(mode="json") for one in settings.side_features],
        "training": settings.training.model_dump(mode="json", exclude={"checkpoint_seconds", "rows"}),
    }
    digest = hashlib.sha256(canonical_json(facts).encode())
    some_ND = rows.embeddings_ND[:: 1 + len(rows.embeddings_ND) // DIGESTED_ROWS]
    # A few numbers of an embedding tell one image from another.
    for array in (some_ND[:, : min(8, width)], rows.targets_N, rows.train, rows.validation):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _nothing_to_choose_by(count: int, settings: FitSettings) -> LabelError:
    return LabelError(
        "grid: no validation rows to choose a head by",
        found=f"{count} heads, split.validation {settings.split.validation}",
        way_out="give split.validation a share of the rows, or leave the grid out",
    )
