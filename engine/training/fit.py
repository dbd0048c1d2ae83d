"""From an embedding table to a published bundle, on one screen: the body of a training worker. Imports no Ray.

Shape letters: N labelled rows, D embedding width, K classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import TableDamaged
from engine.heads.bundle import Calibration, TrainedHead, publish_bundle
from engine.heads.kinds import build_head
from engine.heads.network import compile_logits
from engine.storage import StorageConfig, Store
from engine.strategies.kinds import open_strategy
from engine.training.judgement import JUDGED, JudgedRows, judge
from engine.training.kinds import SPLIT_NAMES, FitSettings
from engine.training.labels import Classes, LabelledRows, encode_classes, join_labels
from engine.training.loop import Report, TrainingResult, TrainingRows, train_network
from engine.training.split import assign_splits

log = logging.getLogger(__name__)
SUMMARY_METRICS = ("accuracy", "top_3_accuracy", "loss", "calibration_error")


class FitSummary(TypedDict):
    """What a fit says about itself in `--json`; metrics.json in the bundle says everything."""

    bundle: str  # URI of the bundle
    rows: int  # labelled rows that were used, all splits together
    classes: int  # number of classes
    metrics: dict[
        str, dict[str, float] | None
    ]  # validation, test: SUMMARY_METRICS; None where it has no rows
    epochs: int  # epochs that were run
    seconds: float  # wall time


def fit_head(
    table: pa.Table,
    record: Mapping[str, Any],
    settings: FitSettings,
    storage: StorageConfig,
    bundle_store: Store,
    report: Report,
) -> FitSummary:
    """Fit a head on labelled embeddings and publish it.

    Args:
        table: one version of each shard: key, shard, index, embedding, and the label and split columns used.
        record: the table's `_table.json`.
        settings: the recipe; all of it (of a subclass too) goes into the bundle's recipe.json.
        storage: how a label file is reached.
        bundle_store: where the bundle goes.
        report: called once per epoch with epoch, epochs, train_loss, validation_loss, validation_accuracy.

    Raises:
        LabelError: labels or splits that cannot be used without guessing.
        TableDamaged: the embeddings are not as wide as the record says.
        EngineError: the devices are in use, or the loss became infinite.
        StorageError: a label file cannot be read, or the bundle cannot be written.
    """
    started = time.perf_counter()
    labelled = join_labels(table, settings.labels, settings.split.column, storage)
    splits_N = assign_splits(labelled.keys, labelled.split_values, settings.split)
    classes = encode_classes(labelled.labels, splits_N == "train")
    rows_of: dict[str, NDArray[np.int64]] = {
        name: np.flatnonzero((splits_N == name) & (classes.numbers_N >= 0)) for name in SPLIT_NAMES
    }
    embeddings_ND = labelled_embeddings(table["embedding"], labelled.positions_N, int(record["width"]))
    _say_what_is_left_out(labelled, classes, rows_of)

    strategy = open_strategy(settings.strategy)
    with strategy.scope():
        network = build_head(
            settings.head, embeddings_ND.shape[1], len(classes.names), settings.training.seed
        )
    rows = TrainingRows(embeddings_ND, classes.numbers_N, rows_of["train"], rows_of["validation"])
    training = train_network(network, strategy, rows, settings.optimizer, settings.training, report)

    logits = compile_logits(network)
    shards = table["shard"].take(labelled.positions_N).to_pylist()
    splits = {
        name: JudgedRows(
            logits(embeddings_ND[rows_of[name]]),
            classes.numbers_N[rows_of[name]],
            [labelled.keys[row] for row in rows_of[name]],
            [shards[row] for row in rows_of[name]],
        )
        for name in JUDGED
    }
    judgement = judge(splits, classes.names, settings.calibration)
    bundle = publish_bundle(
        bundle_store,
        TrainedHead(
            settings.head,
            network,
            classes.names,
            settings.task,
            Calibration(temperature=judgement.temperature),
        ),
        table_record=record,
        metrics={
            **judgement.metrics,
            **_circumstances(labelled, classes, rows_of, training, strategy.num_replicas_in_sync),
        },
        recipe=settings.model_dump(mode="json"),
    )
    return FitSummary(
        bundle=bundle.store.uri,
        rows=sum(len(rows) for rows in rows_of.values()),
        classes=len(classes.names),
        metrics={
            name: (figures := judgement.metrics[name]) and {word: figures[word] for word in SUMMARY_METRICS}
            for name in JUDGED
        },
        epochs=len(training.history),
        seconds=round(time.perf_counter() - started, 3),
    )


def labelled_embeddings(
    column: pa.ChunkedArray, positions_N: NDArray[np.int64], width: int
) -> NDArray[np.floating[Any]]:
    """The embeddings of some rows as one array, in the table's dtype; chunk by chunk, so that only they are copied.

    Args:
        column: fixed_size_list<float32 | float16>[width] without nulls.
        positions_N: ascending row numbers.
        width: D.

    Raises:
        TableDamaged: the column has another width.
    """
    if column.type.list_size != width:
        raise TableDamaged(
            "embedding table: the embeddings do not have the width that _table.json says",
            found=str(column.type.list_size),
            wanted=str(width),
            way_out="the table was not written by one contract: extract it again to a new output.uri",
        )
    gathered_ND = np.empty((len(positions_N), width), column.type.value_type.to_pandas_dtype())
    first_row = 0
    for chunk in column.chunks:
        low, high = np.searchsorted(positions_N, [first_row, first_row + len(chunk)])
        chunk_CD = chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), width)
        gathered_ND[low:high] = chunk_CD[positions_N[low:high] - first_row]
        first_row += len(chunk)
    return gathered_ND


def _say_what_is_left_out(
    labelled: LabelledRows, classes: Classes, rows_of: Mapping[str, NDArray[np.int64]]
) -> None:
    counts = labelled.counts
    if counts.unlabelled:
        log.warning("%d of %d rows have no label and are left out", counts.unlabelled, counts.rows_in_table)
    if counts.unknown_keys:
        log.warning("%d labels belong to no row of the table and are ignored", counts.unknown_keys)
    for name, rows in classes.unseen.items():
        log.warning(
            "class %r has no training row: its %d rows are left out of validation and test", name, rows
        )
    if not len(rows_of["validation"]):
        log.warning("no validation rows: training runs all epochs and keeps the last weights")
    if not len(rows_of["test"]):
        log.warning("no test rows: the bundle's test metrics are null")


def _circumstances(
    labelled: LabelledRows,
    classes: Classes,
    rows_of: Mapping[str, NDArray[np.int64]],
    training: TrainingResult,
    num_replicas: int,
) -> dict[str, Any]:
    """What metrics.json says beside the metrics: which rows they rest on, and how training went."""
    return {
        "labels": {**labelled.counts.as_dict(), "classes_without_training_rows": classes.unseen},
        "split": {
            name: {
                "rows": len(rows_of[name]),
                "rows_per_class": _rows_per_class(classes, rows_of[name]),
            }
            for name in SPLIT_NAMES
        },
        "training": {
            "epochs": len(training.history),
            "best_epoch": training.best_epoch,
            "stopped": training.stopped,
            "num_replicas": num_replicas,
            "history": [asdict(epoch) for epoch in training.history],
        },
    }


def _rows_per_class(classes: Classes, rows: NDArray[np.int64]) -> dict[str, int]:
    counts_K = np.bincount(classes.numbers_N[rows], minlength=len(classes.names))
    return dict(zip(classes.names, counts_K.tolist(), strict=True))
