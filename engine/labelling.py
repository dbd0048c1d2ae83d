"""Labels straight from images: what an actor does behind the network, and what is then written. No Ray here.

The stages before are `engine.extraction`'s. A prediction is computed from the very numbers that an embedding part would
have, and on the CPU wherever the network is, so that scoring such a part later gives the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from engine import __version__
from engine.extraction import (
    Answer,
    ExtractJob,
    Part,
    PartEmbedder,
    Receipt,
    embedding_rows,
    name_of,
    receipt_of,
    shard_facts,
    write_embeddings,
)
from engine.parts import prediction_name
from engine.predictor import counted
from engine.scoring import BundleJob, open_predictor, prediction_facts
from engine.storage import open_store
from engine.tables import ShardPredictionFacts, write_prediction_part, write_shard_predictions


@dataclass(frozen=True)
class LabelJob:
    """What labelling needs to know beside the `ExtractJob`; small and picklable.

    Attributes:
        bundles: each with the table of its predictions.
        keeps_embeddings: write the embeddings first, and name predictions after the embedding part that they belong to;
            else predictions are all that is written, with the rejects beside them.
    """

    bundles: tuple[BundleJob, ...]
    keeps_embeddings: bool


class PartLabeller:
    """Actor body: pixels of a part -> its embeddings -> predictions of each bundle whose table lacks the part.

    Raises:
        EngineError, CanaryMismatch: as `PartEmbedder`.
        BundleError: a bundle is damaged, or another one was published since the run began.
    """

    def __init__(self, job: ExtractJob, labels: LabelJob, setup: Answer) -> None:
        self._job, self._labels = job, labels
        self._embed = PartEmbedder(job, setup)  # first: a head of Keras takes the threads that it sets
        self._predictors = [open_predictor(one, job.storage) for one in labels.bundles]

    def __call__(self, row: pa.Table) -> pa.Table:
        return self._embed.answered(row, self._labelled)

    def _labelled(self, part: Part) -> Part:
        embedded = self._embed.embedded(part)
        rows = embedding_rows(self._job, embedded)
        wanted = part.header.lacking or range(len(self._predictors))
        predictions = tuple(
            one.predict_table(rows) if place in wanted else None for place, one in enumerate(self._predictors)
        )
        array = embedded.array if self._labels.keeps_embeddings else None
        return replace(embedded, array=array, predictions=predictions)


def write_labelled(job: ExtractJob, labels: LabelJob, row: pa.Table) -> pa.Table:
    """Commit what there is of one part, its embeddings first if they are kept, and answer with its receipt.

    A run that is killed in between leaves embeddings without predictions, which scoring them makes up for, or a part
    in some of the tables, which the next run gives to the others.
    """
    part = Part.from_row(row)
    if part.header.damage is not None:
        return Receipt(part.header).to_row()
    started = time.perf_counter()
    write = _write_beside_embeddings if labels.keeps_embeddings else _write_alone
    write(job, labels.bundles, part)
    bundles = {place: counted(one) for place, one in enumerate(part.predictions) if one is not None}
    return replace(receipt_of(part, started), bundles=bundles).to_row()


def _write_beside_embeddings(job: ExtractJob, bundles: Sequence[BundleJob], part: Part) -> None:
    """As `extract` and then `score` would."""
    embeddings, name = write_embeddings(job, part), name_of(part.header)
    target = prediction_name(name, embeddings.identity)
    for bundle, rows in zip(bundles, part.predictions, strict=True):
        assert rows is not None  # what there was of older embeddings is of no use
        facts = prediction_facts(bundle, part.header.fingerprint, name, embeddings.identity, rows.num_rows)
        write_prediction_part(
            open_store(bundle.table_uri, job.storage), target, rows, facts, bundle.decisions.also
        )


def _write_alone(job: ExtractJob, bundles: Sequence[BundleJob], part: Part) -> None:
    about_shard = asdict(shard_facts(job, part))
    assert part.rejects is not None
    for bundle, rows in zip(bundles, part.predictions, strict=True):
        if rows is None:
            continue
        assert bundle.recipe_sha256 is not None
        facts = ShardPredictionFacts(
            **about_shard,
            bundle=bundle.bundle_id,
            recipe_sha256=bundle.recipe_sha256,
            engine_version=__version__,
        )
        table = open_store(bundle.table_uri, job.storage)
        write_shard_predictions(table, name_of(part.header), rows, part.rejects, facts, bundle.decisions.also)
