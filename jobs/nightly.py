"""The nightly job: extract what is new, score it, judge it, publish it; the same recipe every night.

    engine nightly RECIPE            or   ray job submit --working-dir . -- python jobs/nightly.py RECIPE

Every step takes up what an earlier night left, so a night may be killed anywhere, or run twice.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from engine.config import Config
from engine.errors import ContractMismatch, EngineError
from engine.gate import GateConfig
from jobs.extract import ExtractRecipe
from jobs.outcome import Outcome, new_run_id, say
from jobs.score import ScoredBundle, ScoreRecipe

if TYPE_CHECKING:
    from engine.gate import Verdict
    from engine.lease import Lease
    from engine.night import Tally
    from engine.storage import Store

LEASE_NAME = "_nightly"


class Budget(Config):
    """How long a night may take; it stops between two parts, and the next one goes on there."""

    max_seconds: float | None = Field(default=None, gt=0)
    """From its start; null: as long as it takes."""
    deadline: str | None = Field(default=None, pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    """Time of day, HH:MM on the clock of the machine that runs the command (in containers usually UTC); one that is
    past means tomorrow's. null: none. Where both are given, the earlier one."""
    extract_share: float = Field(default=0.8, gt=0, le=1)
    """Share of that time after which extraction stops, so that there is time to score and publish what there is."""

    def seconds(self, now: datetime.datetime) -> float | None:
        """From now; None: as long as it takes."""
        found = [] if self.max_seconds is None else [self.max_seconds]
        if self.deadline is not None:
            hour, minute = map(int, self.deadline.split(":"))
            end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            found.append((end - now).total_seconds() % 86_400.0)
        return min(found, default=None)


class LeaseConfig(Config):
    """What keeps two nights of one table from running together by mistake; the table stays right without it."""

    lifetime_seconds: float = Field(default=600.0, gt=0)
    """For so long a night that was killed keeps others out; it is renewed while the night runs."""
    wait_seconds: float = Field(default=0.0, ge=0)
    """How long to wait for another night to end before giving up."""


class NightlyRecipe(ExtractRecipe):
    """Recipe of `nightly`: that of `extract`, and what becomes of the embeddings."""

    bundles: tuple[ScoredBundle, ...] = Field(min_length=1)
    """As of `score`: bundles fitted on this embedding table, each with its prediction table."""
    gate: GateConfig = GateConfig()
    """When a night's predictions are published, and when a person must look at them first."""
    budget: Budget = Budget()
    """How long a night may take."""
    lease: LeaseConfig = LeaseConfig()
    """What keeps two nights apart."""

    @model_validator(mode="after")
    def _scores(self) -> Self:
        self.scoring()  # what it refuses is refused now
        return self

    def extraction(self) -> ExtractRecipe:
        """The first half."""
        return ExtractRecipe(**{name: getattr(self, name) for name in ExtractRecipe.model_fields})

    def scoring(self) -> ScoreRecipe:
        """The second half."""
        fields = {"embeddings": {"uri": self.output.uri}, "storage": self.storage, "bundles": self.bundles}
        return ScoreRecipe.model_validate(fields)


def run(recipe: NightlyRecipe, *, publish: bool = False, prune: bool = False) -> Outcome:
    """One night.

    Args:
        publish: only publish what an earlier night held back: a person has looked at it.
        prune: as of `extract`.
    """
    from engine.lease import held_lease, this_run
    from engine.storage import open_store

    run_id, started = new_run_id("nightly"), time.monotonic()
    table = open_store(recipe.output.uri, recipe.storage)
    with held_lease(
        table,
        LEASE_NAME,
        this_run(run_id),
        recipe.lease.lifetime_seconds,
        recipe.lease.wait_seconds,
        lambda record: say(f"waiting: {record.owner.run_id} on {record.owner.host} is at work here"),
    ) as lease:
        night = {"verb": "nightly", "run_id": run_id, "table": table.uri}
        if publish:
            return _published_by_hand(recipe, night, lease, started)
        return _one_night(recipe, night, lease, started, prune)


def _one_night(
    recipe: NightlyRecipe, night: dict[str, Any], lease: Lease, started: float, prune: bool
) -> Outcome:
    from jobs import extract, score

    seconds = recipe.budget.seconds(datetime.datetime.now())
    until = None if seconds is None else started + seconds
    extract_until = None if seconds is None else started + recipe.budget.extract_share * seconds
    extracted = extract.run(recipe.extraction(), prune=prune, until=extract_until)
    lease.check()
    scored = score.run(recipe.scoring(), held=True, until=until)
    lease.check()
    tables = [
        _judged(recipe, wanted, told["bundle"], lease)
        for wanted, told in zip(recipe.bundles, scored.summary["bundles"], strict=True)
    ]
    wanted = ("shards_total", "shards_skipped", "shards_done", "shards_failed", "failed_shards", "shards_left",
              "shards_replaced", "shards_removed", "parts_written", "parts_pruned", "rows", "rejects", "seconds",
              "bottleneck")  # fmt: skip
    left = extracted.summary["shards_left"] + scored.summary["parts_left"]
    summary = {
        **night,
        "fingerprint": extracted.summary["fingerprint"],
        "is_finished": not left,
        "extract": {name: extracted.summary.get(name) for name in wanted},
        "score": {name: scored.summary[name] for name in ("parts_written", "parts_left", "rows", "seconds")},
        "tables": [one for one, _ in tables],
        "published_parts": sum(one["published_parts"] for one, _ in tables),
        "held_parts": sum(one["held_parts"] for one, _ in tables),
        "seconds": round(time.monotonic() - started, 3),
    }
    _keep(recipe, summary)
    if left:
        say(f"the time is up: {extracted.summary['shards_left']:,} shards and {scored.summary['parts_left']:,} "
            f"parts are left for the next night")  # fmt: skip
    verdicts = [verdict for _, verdict in tables]
    return Outcome(summary, next(filter(None, [*verdicts, extracted.verdict]), None))


def _judged(
    recipe: NightlyRecipe, wanted: ScoredBundle, bundle_id: str, lease: Lease
) -> tuple[dict[str, Any], EngineError | None]:
    """Judge what is held for one table, and publish it if the gate says so."""
    from engine import night
    from engine.storage import open_store
    from engine.tables import sweep_predictions
    from jobs.score import wanted_now

    table = open_store(wanted.output.uri, recipe.storage)
    embeddings = open_store(recipe.output.uri, recipe.storage)
    if stale := night.drop_stale(table, wanted_now(embeddings)):
        say(f"removed {stale:,} held parts of rewritten embeddings")
    held = night.held_parts(table)
    if others := {part.facts.bundle for part in held} - {bundle_id}:
        raise ContractMismatch(
            f"{night.held_store(table).uri}: holds predictions of another bundle",
            found=", ".join(sorted(others)),
            wanted=bundle_id,
            way_out="publish them with the recipe of that bundle (`engine nightly --publish`), or delete the folder",
        )
    found = night.tally(table, embeddings, held)
    facts: dict[str, Any] = {
        "table": table.uri,
        "bundle": bundle_id,
        "held_parts": len(held),
        "published_parts": 0,
        "published_rows": 0,
        "rows": found.rows,
        "answer_counts": found.answer_counts,
        "abstained": found.abstained,
        "gate": None,
    }
    if not held:
        sweep_predictions(table, lambda: wanted_now(embeddings))
        return facts, None
    verdict = _verdict(recipe, table, wanted, found)
    facts["gate"] = verdict.to_json()
    say(f"{table.uri}: {verdict.in_words()}")
    if not verdict.passes:
        return facts, verdict.error(table.uri)
    published = night.publish(table, lease.check)
    sweep_predictions(table, lambda: wanted_now(embeddings))
    return facts | {"published_parts": published, "published_rows": found.rows, "held_parts": 0}, None


def _verdict(recipe: NightlyRecipe, table: Store, wanted: ScoredBundle, found: Tally) -> Verdict:
    """Hold what is held against the bundle's reference and the last night that was published."""
    from engine.decisions import decisions_of
    from engine.gate import Night, Population, judge
    from engine.heads.bundle import open_bundle
    from engine.night import last_published
    from engine.storage import open_store

    bundle = open_bundle(open_store(wanted.uri, recipe.storage))
    several = bundle.manifest.task == "multi_label"
    reference = None
    if (remembered := bundle.reference()) is not None:
        classes = bundle.manifest.classes
        labels = Counter[str]()  # as the table calls them
        for name, label in zip(
            classes, decisions_of(wanted.output, classes, recipe.storage, wanted.uri).labels, strict=True
        ):
            labels[label] += remembered.label_mix(classes)[name]
        cosines = remembered.cosine_counts.tolist()
        reference = Population(remembered.rows, labels, remembered.unlabelled, cosines)
    before, last = last_published(table), None
    if before is not None:
        unlabelled = before["abstained"] if several else 0
        last = Population(before["published_rows"], before["answer_counts"], unlabelled)
    night = Night(
        expected_rows=found.rows_expected,
        found=Population(
            found.rows, found.answer_counts, found.abstained if several else 0, found.cosine_counts or ()
        ),
        rejects=found.rejects,
        abstained=found.abstained,
        compared=found.compared,
        agreeing=found.agreeing,
        reference=reference,
        last=last,
    )
    return judge(night, recipe.gate)


def _published_by_hand(
    recipe: NightlyRecipe, night_facts: dict[str, Any], lease: Lease, started: float
) -> Outcome:
    """Publish what is held for each table, whatever the gate says."""
    from engine import night
    from engine.storage import open_store
    from engine.tables import sweep_predictions
    from jobs.score import wanted_now

    embeddings = open_store(recipe.output.uri, recipe.storage)
    tables: list[dict[str, Any]] = []
    for wanted in recipe.bundles:
        table = open_store(wanted.output.uri, recipe.storage)
        night.drop_stale(table, wanted_now(embeddings))
        held = night.held_parts(table)
        found = night.tally(table, embeddings, held)
        published = night.publish(table, lease.check)
        sweep_predictions(table, lambda: wanted_now(embeddings))
        facts = {"table": table.uri, "published_parts": published, "published_rows": found.rows}
        tables.append(
            {**facts, "held_parts": 0, "answer_counts": found.answer_counts, "abstained": found.abstained}
        )
    summary = {
        **night_facts,
        "tables": tables,
        "published_parts": sum(one["published_parts"] for one in tables),
        "held_parts": 0,
        "by_hand": True,
        "seconds": round(time.monotonic() - started, 3),
    }
    _keep(recipe, summary)
    return Outcome(summary)


def _keep(recipe: NightlyRecipe, summary: Mapping[str, Any]) -> None:
    """Beside each prediction table, before a cluster goes away."""
    from engine.night import keep_night
    from engine.storage import open_store

    for facts in summary["tables"]:
        of_table = {**summary, **facts, "tables": None}
        keep_night(open_store(facts["table"], recipe.storage), summary["run_id"], of_table)


def plan(recipe: NightlyRecipe, *, publish: bool = False, prune: bool = False) -> dict[str, Any]:
    """What a night would do, from validation and listings alone; touches nothing."""
    from engine.night import held_store
    from engine.storage import open_store
    from engine.tables import part_names, read_record
    from jobs import extract, score

    facts: dict[str, Any] = {"verb": "nightly"}
    if not publish:
        found = extract.plan(recipe.extraction(), prune=prune)
        facts |= {name: value for name, value in found.items() if name not in ("verb", "table_exists")}
        facts["seconds_at_most"] = recipe.budget.seconds(datetime.datetime.now())
        if read_record(open_store(recipe.output.uri, recipe.storage), "embeddings") is not None:
            facts["parts_to_score_now"] = score.plan(recipe.scoring())["parts_pending"]
    counts = Counter[str]()
    for wanted in recipe.bundles:
        held = held_store(open_store(wanted.output.uri, recipe.storage))
        counts[wanted.output.uri] = sum(1 for _ in part_names(held))
    return facts | {"held_parts": dict(counts)}


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["nightly", *sys.argv[1:]]))
