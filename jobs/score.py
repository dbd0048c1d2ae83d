"""The score job: an embedding table and bundles in, a prediction table of each out; only what is new is scored.

engine score RECIPE            or   ray job submit --working-dir . -- python jobs/score.py RECIPE
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from engine import __version__
from engine.config import Config
from engine.decisions import PredictionOutput
from engine.errors import HeldBack
from engine.storage import StorageConfig, Uri
from jobs.fit import EmbeddingInput, require_columns
from jobs.outcome import Outcome, new_run_id, progress_bar, say

if TYPE_CHECKING:
    from engine.parts import PartName
    from engine.scoring import BundleJob, PendingPart, ScoreReceipt
    from engine.storage import Store
    from engine.tables import Table


class ScoredBundle(Config):
    """A bundle to score with, and its prediction table."""

    uri: Uri
    """Folder of the bundle."""
    output: PredictionOutput
    """Its prediction table."""


class ScoreRecipe(Config):
    """Recipe of `score`: an embedding table and bundles in, predictions of each bundle out."""

    embeddings: EmbeddingInput
    """The rows to label."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    bundles: tuple[ScoredBundle, ...] = Field(min_length=1)
    """The bundles to score with, each into a table of its own; embeddings are read once for all of them."""

    @field_validator("bundles")
    @classmethod
    def _tables_of_their_own(cls, bundles: tuple[ScoredBundle, ...]) -> tuple[ScoredBundle, ...]:
        uses = Counter(bundle.output.uri for bundle in bundles)
        if shared := [uri for uri, count in uses.items() if count > 1]:
            raise ValueError(f"each bundle needs an output.uri of its own; given twice: {', '.join(shared)}")
        return bundles


@dataclass(frozen=True)
class _Look:
    """What there is: the embedding table; of each bundle its job, its table and the parts that stand in it."""

    embeddings: Table
    bundles: tuple[BundleJob, ...]
    tables: tuple[Store, ...]
    scored: tuple[set[PartName], ...]

    def pending(self) -> list[PendingPart]:
        """What is to be read, and for which bundles."""
        from engine.scoring import pending_parts

        return pending_parts(self.embeddings.parts, self.scored)


def run(recipe: ScoreRecipe, *, held: bool = False, until: float | None = None) -> Outcome:
    """Score the embedding parts that have no predictions yet, then drop predictions of rewritten parts.

    Args:
        held: write them beside each table, where no reader looks, and drop nothing: somebody else publishes them.
        until: stop between two parts when `time.monotonic()` says so; the next run goes on there.
    """
    from engine.tables import claim_table, sweep_predictions

    started, run_id = time.monotonic(), new_run_id("score")
    look = _look(recipe, held)
    pending = look.pending()
    say(f"score: {len(pending):,} of {len(look.embeddings.parts):,} parts pending")
    for bundle, table in zip(look.bundles, look.tables, strict=True):
        _require_same(
            claim_table(table, _record(look, bundle)), _contract(look.embeddings, bundle), table.uri
        )
    receipts = _scored(recipe, look, pending, until) if pending else []
    left = len(pending) - sum(receipt.parts_read for receipt in receipts)
    for table in () if held else look.tables:
        if swept := sweep_predictions(table, lambda: wanted_now(look.embeddings.store)):
            say(f"removed {swept:,} prediction parts of rewritten embeddings")
    summary = _summary(run_id, look, receipts, time.monotonic() - started)
    return Outcome({**summary, "parts_left": left})


def _scored(
    recipe: ScoreRecipe, look: _Look, pending: Sequence[PendingPart], until: float | None
) -> list[ScoreReceipt]:
    """Spread the pending parts over scorers, one for each core."""
    from engine.on_ray import machines_of_cluster, ray_session, run_parts
    from engine.scoring import PartScorer, ScoreJob, ScoreReceipt, score_items
    from engine.this_machine import machines_here

    job = ScoreJob(
        embeddings_uri=look.embeddings.store.uri,
        storage=recipe.storage,
        fingerprint=look.embeddings.record["fingerprint"],
        bundles={place: look.bundles[place] for part in pending for place in part.bundles},
    )
    started = time.monotonic()
    receipts: list[ScoreReceipt] = []
    parts = rows = 0
    with (
        ray_session(None, local_cpus=machines_here().cpus),
        progress_bar("parts", len(pending)) as (bar, task),
    ):
        # Ray 2.60 sets OMP_NUM_THREADS to an actor's CPUs, so that matrix products of all scorers share the cores.
        scorers = max(1, min(len(pending), int(machines_of_cluster().cpus)))
        items = score_items(pending, scorers)
        # Closed while there is a Ray: what Ray Data does afterwards would start another.
        with contextlib.closing(run_parts(PartScorer, (job,), items, scorers, actor_cpus=1)) as answers:
            for receipt in map(ScoreReceipt.from_json, answers):
                receipts.append(receipt)
                parts += receipt.parts_read
                rows += sum(counts.rows for counts in receipt.bundles.values())
                bar.update(task, completed=parts, rate=f"{rows / (time.monotonic() - started):,.0f} rows/s")
                if until is not None and time.monotonic() >= until:
                    break
    return receipts


def _summary(run_id: str, look: _Look, receipts: Sequence[ScoreReceipt], seconds: float) -> dict[str, Any]:
    """Counts of all bundles together, then of each; what only one bundle can have stands above only if it is alone."""
    from engine.scoring import BundleCounts

    totals = [BundleCounts() for _ in look.bundles]
    for receipt in receipts:
        for place, counts in receipt.bundles.items():
            totals[place].add(counts)
    bundles = [
        {
            "table": table.uri,
            "bundle": job.bundle_id,
            "parts_written": total.parts,
            "rows": total.rows,
            "label_counts": _most_first(total.label_counts),
            "abstained": total.abstained,
        }
        for job, table, total in zip(look.bundles, look.tables, totals, strict=True)
    ]
    rows = sum(total.rows for total in totals)
    alone = bundles[0] if len(bundles) == 1 else {"table": None, "bundle": None, "label_counts": {}}
    return {
        "verb": "score",
        "run_id": run_id,
        "table": alone["table"],
        "bundle": alone["bundle"],
        "parts_read": sum(receipt.parts_read for receipt in receipts),
        "parts_written": sum(total.parts for total in totals),
        "rows": rows,
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows / seconds, 1),
        "label_counts": alone["label_counts"],
        "abstained": sum(total.abstained for total in totals),
        "bundles": bundles,
    }


def _most_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda of_label: -of_label[1]))


def plan(recipe: ScoreRecipe, *, held: bool = False) -> dict[str, Any]:
    """What `run` would do, from validation and listings alone; touches nothing."""
    look = _look(recipe, held)
    pending = look.pending()
    facts: dict[str, Any] = {"verb": "score", "embeddings": look.embeddings.store.uri}
    for place, job in enumerate(look.bundles):
        name = "" if len(look.bundles) == 1 else f" {place}"
        facts[f"bundle{name}"] = f"{job.bundle_id} at {job.bundle_uri}"
        facts[f"table{name}"] = job.table_uri
        if len(look.bundles) > 1:
            facts[f"parts_pending{name}"] = sum(place in part.bundles for part in pending)
    return {
        **facts,
        "parts": len(look.embeddings.parts),
        "parts_pending": len(pending),
        "bytes_pending": sum(part.info.size for part in pending),
        "incomplete_shards": look.embeddings.incomplete_shards,
    }


def _look(recipe: ScoreRecipe, held: bool = False) -> _Look:
    """Listings, records and the bundles' manifests; refuses what does not belong together."""
    from engine.night import HELD_FOLDER, is_held_back
    from engine.storage import open_store
    from engine.tables import open_table, part_names, read_record

    embeddings = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    bundles = tuple(_bundle_job(recipe, wanted, embeddings) for wanted in recipe.bundles)
    tables = tuple(open_store(wanted.output.uri, recipe.storage) for wanted in recipe.bundles)
    scored = [set(part_names(table)) for table in tables]
    if held:
        beside = [table.sub(HELD_FOLDER) for table in tables]
        scored = [names | set(part_names(store)) for names, store in zip(scored, beside, strict=True)]
        bundles = tuple(
            dataclasses.replace(job, table_uri=store.uri, counts_in_footers=True)
            for job, store in zip(bundles, beside, strict=True)
        )
    elif found := [table.uri for table in tables if is_held_back(table)]:
        raise HeldBack(
            f"{found[0]}: predictions are held back here, which scoring would show to readers",
            way_out="publish them (`engine nightly --publish`), or delete the folder held/",
        )
    look = _Look(embeddings, bundles, tables, tuple(scored))
    for bundle, table in zip(bundles, tables, strict=True):
        record = read_record(table, "predictions")
        if record is not None:
            _require_same(record, _contract(look.embeddings, bundle), table.uri)
    return look


def _bundle_job(recipe: ScoreRecipe, wanted: ScoredBundle, embeddings: Table) -> BundleJob:
    """One bundle, which must have been fitted on such embeddings."""
    from engine.config import stable_hash
    from engine.decisions import decisions_of
    from engine.heads.bundle import check_fingerprint, open_bundle
    from engine.heads.side_features import side_columns
    from engine.scoring import BundleJob
    from engine.storage import open_store

    bundle = open_bundle(open_store(wanted.uri, recipe.storage))
    check_fingerprint(bundle, embeddings.record)
    if bundle.manifest.side_features:
        require_columns(embeddings, side_columns(bundle.manifest.side_features), "the bundle's side features")
    job = BundleJob(
        bundle_uri=bundle.store.uri,
        bundle_id=bundle.id,
        table_uri=wanted.output.uri,
        decisions=decisions_of(wanted.output, bundle.manifest.classes, recipe.storage, bundle.store.uri),
    )
    return dataclasses.replace(job, recipe_sha256=stable_hash(_contract(embeddings, job)))


def wanted_now(embeddings: Store) -> set[PartName]:
    """Names of the prediction parts that the embedding table calls for at this moment."""
    from engine.parts import prediction_name
    from engine.tables import open_table

    return {prediction_name(name, info.identity) for name, info in open_table(embeddings).parts}


def _require_same(record: Mapping[str, Any], contract: Mapping[str, Any], table_uri: str) -> None:
    """Refuse a table of another contract, also one with fields that this run has not got (they show as null)."""
    from engine.tables import check_contract

    check_contract(record, {**dict.fromkeys(record["contract"]), **contract}, table_uri)


def _contract(embeddings: Table, job: BundleJob) -> dict[str, Any]:
    """Every field that changes what a prediction part contains."""
    from engine.schema import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "embeddings.uri": embeddings.store.uri,
        "fingerprint": embeddings.record["fingerprint"],
        "bundle": job.bundle_id,
        **job.decisions.contract,
    }


def _record(look: _Look, job: BundleJob) -> dict[str, Any]:
    contract = _contract(look.embeddings, job)
    return {
        "kind": "predictions",
        "schema_version": contract["schema_version"],
        "contract": contract,
        "fingerprint": contract["fingerprint"],
        "bundle": job.bundle_id,
        "bundle_uri": job.bundle_uri,
        "source_uri": contract["embeddings.uri"],
        "engine_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["score", *sys.argv[1:]]))
