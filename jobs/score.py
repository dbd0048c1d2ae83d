"""The score job: an embedding table and a bundle in, a prediction table out; only what is new is scored.

engine score RECIPE            or   ray job submit --working-dir . -- python jobs/score.py RECIPE
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from engine import __version__
from engine.config import Config
from engine.storage import StorageConfig, Uri
from jobs.fit import EmbeddingInput, require_columns
from jobs.outcome import Outcome, new_run_id, progress_bar, say

if TYPE_CHECKING:
    from engine.parts import PartName
    from engine.scoring import ScoreJob
    from engine.storage import ObjectInfo, Store
    from engine.tables import Table


class PredictionOutput(Config):
    """Where predictions are written, and what they say."""

    uri: Uri
    """Folder of the prediction table."""
    top_k: int = Field(5, ge=1, le=1000)
    """Candidates kept for each row; never more than there are classes."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Confidence below which `label` is null; the candidates stay."""


class ScoredBundle(Config):
    """A bundle to score with, and its prediction table."""

    uri: Uri
    """Folder of the bundle."""
    output: PredictionOutput
    """Its prediction table."""


class ScoreRecipe(Config):
    """Recipe of `score`: an embedding table and a bundle in, predictions out."""

    embeddings: EmbeddingInput
    """The rows to label."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    bundles: tuple[ScoredBundle, ...]
    """The bundle to score with: one entry."""

    @field_validator("bundles")
    @classmethod
    def _one_bundle(cls, bundles: tuple[ScoredBundle, ...]) -> tuple[ScoredBundle, ...]:
        if len(bundles) != 1:
            raise ValueError(f"one entry is supported, not {len(bundles)}; run the job once for each bundle")
        return bundles


def run(recipe: ScoreRecipe) -> Outcome:
    """Score the embedding parts that have no predictions yet, then drop predictions of rewritten parts."""
    from engine.on_ray import machines_of_cluster, ray_session, run_parts
    from engine.scoring import PartScorer, score_items
    from engine.tables import claim_table, sweep_predictions
    from engine.this_machine import machines_here

    started, run_id = time.monotonic(), new_run_id("score")
    job, embeddings, predictions, pending = _look(recipe)
    say(f"score: {len(pending):,} of {len(embeddings.parts):,} parts pending")
    claim_table(predictions, _record(job))
    counts: Counter[str] = Counter()
    rows = abstained = parts = 0
    if pending:
        with (
            ray_session(None, local_cpus=machines_here().cpus),
            progress_bar("parts", len(pending)) as (bar, task),
        ):
            scorers = max(1, min(len(pending), int(machines_of_cluster().cpus)))
            items = score_items(pending, scorers)
            for receipt in map(json.loads, run_parts(PartScorer, (job,), items, scorers, actor_cpus=1)):
                counts.update(receipt["label_counts"])
                rows, abstained = rows + receipt["rows"], abstained + receipt["abstained"]
                parts += receipt["parts"]
                bar.update(task, completed=parts, rate=f"{rows / (time.monotonic() - started):,.0f} rows/s")
    swept = sweep_predictions(predictions, lambda: _wanted_now(embeddings.store))
    if swept:
        say(f"removed {swept:,} prediction parts of rewritten embeddings")
    seconds = time.monotonic() - started
    return Outcome(
        {
            "verb": "score",
            "run_id": run_id,
            "table": predictions.uri,
            "bundle": job.bundle_id,
            "parts_written": parts,
            "rows": rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(rows / seconds, 1),
            "label_counts": dict(counts.most_common()),
            "abstained": abstained,
        }
    )


def plan(recipe: ScoreRecipe) -> dict[str, Any]:
    """What `run` would do, from validation and listings alone; touches nothing."""
    job, embeddings, predictions, pending = _look(recipe)
    return {
        "verb": "score",
        "embeddings": job.embeddings_uri,
        "bundle": f"{job.bundle_id} at {job.bundle_uri}",
        "table": predictions.uri,
        "parts": len(embeddings.parts),
        "parts_pending": len(pending),
        "bytes_pending": sum(info.size for _, info in pending),
        "incomplete_shards": embeddings.incomplete_shards,
    }


def _look(recipe: ScoreRecipe) -> tuple[ScoreJob, Table, Store, list[tuple[PartName, ObjectInfo]]]:
    """Listings, records and the bundle's manifest; refuses what does not belong together."""
    from engine.heads.bundle import check_fingerprint, open_bundle
    from engine.heads.side_features import side_columns
    from engine.scoring import ScoreJob, pending_parts
    from engine.storage import open_store
    from engine.tables import check_contract, list_parts, open_table, read_record

    (wanted,) = recipe.bundles
    embeddings = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    bundle = open_bundle(open_store(wanted.uri, recipe.storage))
    check_fingerprint(bundle, embeddings.record)
    if bundle.manifest.side_features:
        require_columns(embeddings, side_columns(bundle.manifest.side_features), "the bundle's side features")
    predictions = open_store(wanted.output.uri, recipe.storage)
    job = ScoreJob(
        embeddings_uri=embeddings.store.uri,
        bundle_uri=bundle.store.uri,
        bundle_id=bundle.id,
        table_uri=predictions.uri,
        storage=recipe.storage,
        fingerprint=embeddings.record["fingerprint"],
        top_k=wanted.output.top_k,
        min_confidence=wanted.output.min_confidence,
    )
    record = read_record(predictions, "predictions")
    if record is not None:
        check_contract(record, _contract(job), predictions.uri)
    scored = {name for name, _ in list_parts(predictions)}
    return job, embeddings, predictions, pending_parts(embeddings.parts, scored)


def _wanted_now(embeddings: Store) -> set[PartName]:
    """Names of the prediction parts that the embedding table calls for at this moment."""
    from engine.parts import prediction_name
    from engine.tables import open_table

    return {prediction_name(name, info.identity) for name, info in open_table(embeddings).parts}


def _contract(job: ScoreJob) -> dict[str, Any]:
    """Every field that changes what a prediction part contains."""
    from engine.schema import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "embeddings.uri": job.embeddings_uri,
        "fingerprint": job.fingerprint,
        "bundle": job.bundle_id,
        "top_k": job.top_k,
        "min_confidence": job.min_confidence,
    }


def _record(job: ScoreJob) -> dict[str, Any]:
    contract = _contract(job)
    return {
        "kind": "predictions",
        "schema_version": contract["schema_version"],
        "contract": contract,
        "fingerprint": job.fingerprint,
        "bundle": job.bundle_id,
        "bundle_uri": job.bundle_uri,
        "source_uri": job.embeddings_uri,
        "engine_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["score", *sys.argv[1:]]))
