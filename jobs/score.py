"""The score job: embeddings or images, and bundles in, a prediction table of each out; only what is new is scored.

What is only done with images is in `jobs.score_images`.

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
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from engine import __version__, run_metrics
from engine.backbones.kinds import BackboneConfig
from engine.config import Config
from engine.decisions import PredictionOutput
from engine.errors import ContractMismatch, HeldBack, RecipeError
from engine.recipes import Compute, Limits, PassingEmbeddings
from engine.run_metrics import RunMetrics
from engine.runtimes.kinds import RuntimeConfig
from engine.shards.kinds import SourceConfig
from engine.storage import StorageConfig, Uri
from jobs.fit import EmbeddingInput, require_columns
from jobs.outcome import Outcome, Run, progress_bar, say

if TYPE_CHECKING:
    from engine.heads.bundle import Bundle
    from engine.parts import PartName
    from engine.predictor import BundleCounts
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
    """Recipe of `score`: an embedding table or images, and bundles in, predictions of each bundle out."""

    embeddings: EmbeddingInput | None = None
    """The rows to label; null: images are, those of `source`."""
    source: SourceConfig | None = None
    """In place of `embeddings`: an archive of images, which go through the bundles' backbone and their heads in one
    pass."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    bundles: tuple[ScoredBundle, ...] = Field(min_length=1)
    """The bundles to score with, each into a table of its own; embeddings are read once for all of them. Of images they
    are computed once, so that all bundles must have been fitted on those of one network."""
    backbone: BackboneConfig | None = None
    """With `source`: how the bundles' network is loaded, for example from where its weights lie now; null: as it was
    for the embeddings that they were fitted on. Another network is refused."""
    runtime: RuntimeConfig | None = None
    """With `source`: how the network is run; null: as for those embeddings. Another precision is refused."""
    output: PassingEmbeddings = PassingEmbeddings()
    """With `source`: in which form embeddings are made, and where they are kept, if at all."""
    compute: Compute = Compute()
    """With `source`: what runs where."""
    limits: Limits = Limits()
    """With `source`: what makes a reject, and how many are too many."""

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        if (self.embeddings is None) == (self.source is None):
            raise ValueError("give either embeddings or source")
        if self.source is None and (stray := sorted(self.model_fields_set & set(_OF_IMAGES))):
            raise ValueError(f"{', '.join(stray)}: only with source, for embeddings are made already")
        return self

    @model_validator(mode="after")
    def _tables_of_their_own(self) -> Self:
        uses = Counter(bundle.output.uri for bundle in self.bundles)
        if shared := [uri for uri, count in uses.items() if count > 1]:
            raise ValueError(f"each bundle needs an output.uri of its own; given twice: {', '.join(shared)}")
        embeddings = self.output.uri if self.embeddings is None else self.embeddings.uri
        if embeddings in uses:
            raise ValueError(
                f"{embeddings} is the place of embeddings, and cannot be a bundle's output.uri too"
            )
        return self


_OF_IMAGES = ("backbone", "runtime", "output", "compute", "limits")


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


def run(
    recipe: ScoreRecipe,
    *,
    held: bool = False,
    until: float | None = None,
    prune: bool = False,
    prune_up_to: int | None = None,
    replay_rejects: bool = False,
    as_run: Run | None = None,
) -> Outcome:
    """Score what has no predictions yet, then drop predictions of what was rewritten.

    Args:
        held: write them beside each table, where no reader looks, and drop nothing: somebody else publishes them. Of
            embeddings only.
        until: stop between two parts when `time.monotonic()` says so; the next run goes on there.
        prune, prune_up_to, replay_rejects: as of `extract`; of images only.
        as_run: None: one of its own, whose numbers nobody asks for.
    """
    started, as_run = time.monotonic(), as_run or Run.new("score")
    if recipe.source is not None:
        from jobs import score_images

        return score_images.run(recipe, as_run, until, prune, prune_up_to, replay_rejects)
    _require_images(prune, prune_up_to, replay_rejects)
    scored = score_embeddings(recipe, as_run, held, until)
    summary = summary_of(as_run.run_id, scored, time.monotonic() - started)
    return Outcome({**summary, "parts_left": scored.parts_left})


def _require_images(prune: bool, prune_up_to: int | None, replay_rejects: bool) -> None:
    given = {
        "--prune": prune,
        "--prune-up-to": prune_up_to is not None,
        "--replay-rejects": replay_rejects,
    }
    if stray := [name for name, is_given in given.items() if is_given]:
        raise RecipeError(
            f"{', '.join(stray)}: only for a recipe with `source`",
            way_out="run `engine extract` with it, and then this",
        )


@dataclass(frozen=True)
class Scored:
    """What was written, and where.

    Attributes:
        jobs, tables: of each bundle, with the URI of its table.
        totals: of each bundle.
        parts_read, parts_left: embedding parts that were scored, and that are still to be.
    """

    jobs: tuple[BundleJob, ...]
    tables: tuple[str, ...]
    totals: tuple[BundleCounts, ...]
    parts_read: int
    parts_left: int


def score_embeddings(
    recipe: ScoreRecipe, as_run: Run, held: bool, until: float | None, address: str | None = None
) -> Scored:
    """Score the embedding parts that have no predictions yet; nothing when it is too late already.

    Args:
        as_run, held, until: as of `run`.
        address: as of `compute`, of which a recipe that scores embeddings has none.
    """
    from engine.predictor import BundleCounts
    from engine.tables import claim_table, sweep_predictions

    look = _look(recipe, held)
    pending = look.pending()
    say(f"score: {len(pending):,} of {len(look.embeddings.parts):,} parts pending")
    for bundle, table in zip(look.bundles, look.tables, strict=True):
        record = record_of(look.embeddings.store.uri, look.embeddings.record["fingerprint"], bundle)
        require_same(claim_table(table, record), record["contract"], table.uri)
    is_late = until is not None and time.monotonic() >= until
    receipts = _scored(recipe, look, pending, until, as_run, address) if pending and not is_late else []
    left = len(pending) - sum(receipt.parts_read for receipt in receipts)
    for table in () if held else look.tables:
        if swept := sweep_predictions(table, lambda: wanted_now(look.embeddings.store)):
            say(f"removed {swept:,} prediction parts of rewritten embeddings")
    totals = tuple(BundleCounts() for _ in look.bundles)
    for receipt in receipts:
        for place, counts in receipt.bundles.items():
            totals[place].add(counts)
    tables = tuple(table.uri for table in look.tables)
    return Scored(look.bundles, tables, totals, len(pending) - left, left)


def stores(recipe: ScoreRecipe) -> list[Store]:
    """What the job makes: a prediction table of each bundle."""
    from engine.storage import open_store

    return [open_store(wanted.output.uri, recipe.storage) for wanted in recipe.bundles]


def cluster_address(recipe: ScoreRecipe) -> str | None:
    """The recipe's cluster."""
    return recipe.compute.address


def _scored(
    recipe: ScoreRecipe,
    look: _Look,
    pending: Sequence[PendingPart],
    until: float | None,
    run: Run,
    address: str | None,
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
    metrics = run.metrics
    metrics.set(run_metrics.PARTS_PENDING, len(pending))
    with (
        ray_session(address, machines_here().cpus, metrics, run.ends),
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
                _measure(receipt, metrics)
                metrics.set(run_metrics.PARTS_PENDING, len(pending) - parts)
                bar.update(task, completed=parts, rate=f"{rows / (time.monotonic() - started):,.0f} rows/s")
                if until is not None and time.monotonic() >= until:
                    break
    return receipts


def _measure(receipt: ScoreReceipt, metrics: RunMetrics) -> None:
    """Count a receipt for whoever watches the run."""
    metrics.get_on()
    for counts in receipt.bundles.values():
        metrics.wrote("predictions", counts.rows, counts.parts)
    metrics.count(run_metrics.READ_BYTES, receipt.bytes_read, table="predictions")
    metrics.stages(receipt.stage_s)


def summary_of(run_id: str, scored: Scored, seconds: float) -> dict[str, Any]:
    """Counts of all bundles together, then of each; what only one bundle can have stands above only if it is alone."""
    totals = scored.totals
    bundles = [
        {
            "table": table,
            "bundle": job.bundle_id,
            "parts_written": total.parts,
            "rows": total.rows,
            "label_counts": _most_first(total.label_counts),
            "abstained": total.abstained,
        }
        for job, table, total in zip(scored.jobs, scored.tables, totals, strict=True)
    ]
    rows = sum(total.rows for total in totals)
    alone = bundles[0] if len(bundles) == 1 else {"table": None, "bundle": None, "label_counts": {}}
    return {
        "verb": "score",
        "run_id": run_id,
        "table": alone["table"],
        "bundle": alone["bundle"],
        "parts_read": scored.parts_read,
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


def plan(
    recipe: ScoreRecipe,
    *,
    held: bool = False,
    prune: bool = False,
    prune_up_to: int | None = None,
    replay_rejects: bool = False,
) -> dict[str, Any]:
    """What `run` would do, from validation and listings alone; touches nothing."""
    if recipe.source is not None:
        from jobs import score_images

        return score_images.plan(recipe, prune, prune_up_to, replay_rejects)
    _require_images(prune, prune_up_to, replay_rejects)
    look = _look(recipe, held)
    pending = look.pending()
    facts: dict[str, Any] = {"verb": "score", "embeddings": look.embeddings.store.uri}
    facts |= bundles_in_words(look.bundles)
    for place in range(len(look.bundles)):
        name = "" if len(look.bundles) == 1 else f" {place}"
        if len(look.bundles) > 1:
            facts[f"parts_pending{name}"] = sum(place in part.bundles for part in pending)
    return {
        **facts,
        "parts": len(look.embeddings.parts),
        "parts_pending": len(pending),
        "bytes_pending": sum(part.info.size for part in pending),
        "incomplete_shards": look.embeddings.incomplete_shards,
    }


def bundles_in_words(jobs: Sequence[BundleJob]) -> dict[str, str]:
    """Of a plan: each bundle and its table."""
    facts = {}
    for place, job in enumerate(jobs):
        name = "" if len(jobs) == 1 else f" {place}"
        facts[f"bundle{name}"] = f"{job.bundle_id} at {job.bundle_uri}"
        facts[f"table{name}"] = job.table_uri
    return facts


def pending_embeddings(recipe: ScoreRecipe) -> int:
    """Embedding parts without predictions."""
    return len(_look(recipe).pending())


def _look(recipe: ScoreRecipe, held: bool = False) -> _Look:
    """Listings, records and the bundles' manifests; refuses what does not belong together."""
    from engine.night import HELD_FOLDER
    from engine.storage import open_store
    from engine.tables import open_table, part_names

    assert recipe.embeddings is not None
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
    else:
        require_published(tables)
    for bundle, table in zip(bundles, tables, strict=True):
        contract = _contract(embeddings.store.uri, embeddings.record["fingerprint"], bundle)
        require_same_if_begun(table, contract)
    return _Look(embeddings, bundles, tables, tuple(scored))


def require_published(tables: Sequence[Store]) -> None:
    """Refuse tables of which predictions are held back.

    Raises:
        HeldBack: with the first of them.
    """
    from engine.night import is_held_back

    if found := [table.uri for table in tables if is_held_back(table)]:
        raise HeldBack(
            f"{found[0]}: predictions are held back here, which scoring would show to readers",
            way_out="publish them (`engine nightly --publish`), or delete the folder held/",
        )


def require_same_if_begun(table: Store, contract: Mapping[str, Any]) -> None:
    """Refuse a prediction table that was made with another contract.

    Raises:
        ContractMismatch: field by field.
    """
    from engine.tables import is_of_images, read_record

    record = read_record(table, "predictions")
    if record is None:
        return
    if is_of_images(record):
        raise ContractMismatch(
            f"{table.uri}: holds predictions that were made straight from images",
            found=f"source.uri {record['contract']['source.uri']}",
            wanted="predictions of an embedding table",
            way_out="name another output.uri for these",
        )
    require_same(record, contract, table.uri)


def _bundle_job(recipe: ScoreRecipe, wanted: ScoredBundle, embeddings: Table) -> BundleJob:
    """One bundle, which must have been fitted on such embeddings."""
    from engine.heads.bundle import check_fingerprint, open_bundle
    from engine.heads.side_features import side_columns
    from engine.storage import open_store

    bundle = open_bundle(open_store(wanted.uri, recipe.storage))
    check_fingerprint(bundle, embeddings.record)
    if bundle.manifest.side_features:
        require_columns(embeddings, side_columns(bundle.manifest.side_features), "the bundle's side features")
    job = job_of(wanted, bundle, recipe.storage)
    return of_embeddings(job, embeddings.store.uri, embeddings.record["fingerprint"])


def job_of(wanted: ScoredBundle, bundle: Bundle, storage: StorageConfig) -> BundleJob:
    """A bundle and its table, without the digest of what decides its predictions."""
    from engine.decisions import decisions_of
    from engine.scoring import BundleJob

    return BundleJob(
        bundle_uri=bundle.store.uri,
        bundle_id=bundle.id,
        table_uri=wanted.output.uri,
        decisions=decisions_of(
            wanted.output,
            bundle.manifest.classes,
            storage,
            bundle.store.uri,
            bundle.manifest.class_ids,
        ),
    )


def of_embeddings(job: BundleJob, embeddings_uri: str, fingerprint: str) -> BundleJob:
    """With that digest, where an embedding table is scored."""
    from engine.config import stable_hash

    contract = _contract(embeddings_uri, fingerprint, job)
    return dataclasses.replace(job, recipe_sha256=stable_hash(contract))


def wanted_now(embeddings: Store) -> set[PartName]:
    """Names of the prediction parts that the embedding table calls for at this moment."""
    from engine.parts import prediction_name
    from engine.tables import open_table

    return {prediction_name(name, info.identity) for name, info in open_table(embeddings).parts}


def require_same(record: Mapping[str, Any], contract: Mapping[str, Any], table_uri: str) -> None:
    """Refuse a table of another contract, also one with fields that this run has not got (they show as null)."""
    from engine.tables import check_contract

    check_contract(record, {**dict.fromkeys(record["contract"]), **contract}, table_uri)


def _contract(embeddings_uri: str, fingerprint: str, job: BundleJob) -> dict[str, Any]:
    """Every field that changes what a prediction part contains."""
    from engine.schema import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "embeddings.uri": embeddings_uri,
        "fingerprint": fingerprint,
        "bundle": job.bundle_id,
        **job.decisions.contract,
    }


def record_of(embeddings_uri: str, fingerprint: str, job: BundleJob) -> dict[str, Any]:
    """`_table.json` of predictions for an embedding table."""
    contract = _contract(embeddings_uri, fingerprint, job)
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
