"""The nightly job: extract what is new, score it, judge it, publish it; the same recipe every night.

    engine nightly RECIPE            or   ray job submit --working-dir . -- python jobs/nightly.py RECIPE

Every step takes up what an earlier night left, so a night may be killed anywhere, or run twice.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from engine import __version__, run_metrics
from engine.config import Config, stable_hash
from engine.errors import EXIT_BAD_RECIPE, EngineError, HeldBack, PruneRefused, RecipeError, StorageError
from engine.gate import GateConfig
from engine.log_lines import print_error
from engine.recipes import ReportConfig
from engine.run_metrics import RunMetrics
from jobs.extract import ExtractRecipe
from jobs.outcome import Outcome, Run, new_run_id, say
from jobs.score import ScoredBundle, ScoreRecipe
from jobs.watched import error_facts, exit_code_of, utc

if TYPE_CHECKING:
    from engine import gate
    from engine.heads.bundle import Bundle
    from engine.heads.reference import Reference
    from engine.lease import Lease
    from engine.night import Held, Tally
    from engine.night_report import RowsShown
    from engine.storage import Store

LEASE_NAME = "_nightly"
EXTRACTED = ("shards_total", "shards_skipped", "shards_done", "shards_failed", "failed_shards", "shards_left",
             "shards_older", "shards_replaced", "shards_removed", "parts_written", "parts_pruned", "rows", "rejects",
             "seconds", "bottleneck")  # fmt: skip
EXTRACTED_MORE = ("images_per_second", "stage_seconds", "utilisation", "advice")  # for the page
SCORED = ("parts_written", "parts_left", "rows", "seconds")
TALLIED = ("rows", "samples", "rejects", "answer_counts", "abstained", "compared", "agreeing")


class Budget(Config):
    """How long a night may take; it stops between two parts, and the next one goes on there."""

    max_seconds: float | None = Field(default=None, gt=0)
    """From its start; null: as long as it takes."""
    deadline: str | None = Field(default=None, pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    """Time of day, HH:MM on the clock of the machine that runs the command (in containers usually UTC); one that is
    past means tomorrow's. null: none. Where both are given, the earlier one."""

    @field_validator("deadline", mode="before")
    @classmethod
    def _is_quoted(cls, deadline: object) -> object:
        """YAML 1.1 reads 05:30 as text and 22:30 as the number 22 * 60 + 30."""
        if isinstance(deadline, int):
            raise ValueError('put it in quotes: deadline: "22:30" (YAML reads 22:30 as a number of base 60)')
        return deadline

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
    report: ReportConfig = ReportConfig()
    """What the night's page shows."""

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


def run(
    recipe: NightlyRecipe,
    *,
    publish: bool = False,
    prune: bool = False,
    prune_up_to: int | None = None,
    since: float | None = None,
    as_run: Run | None = None,
) -> Outcome:
    """One night.

    Args:
        publish: only publish what an earlier night held back: a person has looked at it.
        prune, prune_up_to, since: as of `extract`.
        as_run: None: one of its own, whose numbers nobody asks for.
    """
    _require_one_task(publish, prune, prune_up_to, since)
    from engine.lease import held_lease, this_run
    from engine.storage import open_store

    started, as_run = time.monotonic(), as_run or Run.new("nightly")
    run_id, metrics = as_run.run_id, as_run.metrics
    table = open_store(recipe.output.uri, recipe.storage)
    with held_lease(
        table,
        LEASE_NAME,
        this_run(run_id),
        recipe.lease.lifetime_seconds,
        recipe.lease.wait_seconds,
        lambda record: say(f"waiting: {record.owner.run_id} on {record.owner.host} is at work here"),
    ) as lease:
        metrics.follow(run_metrics.LEASE_HELD, lambda: 0.0 if lease.lost else 1.0)
        metrics.follow(run_metrics.LEASE_AGE, lambda: lease.age)
        night = _Night({"verb": "nightly", "run_id": run_id, "table": table.uri}, lease, started, as_run)
        night.about.update(_about(recipe, as_run))
        try:
            if publish:
                return _published_by_hand(recipe, night)
            return _one_night(recipe, night, {"prune": prune, "prune_up_to": prune_up_to, "since": since})
        except BaseException as error:
            _keep_failed(recipe, night, error)
            raise


@dataclasses.dataclass(frozen=True)
class _Night:
    """What every step of a night knows.

    Attributes:
        facts: what its summaries begin with; more as it gets on.
        started: by `time.monotonic()`.
        about: what is kept of it in each table's `nights/`, beyond the summary.
        of_table: the same of one table, by its URI.
        tables: what the summary tells of each table that was judged, by its URI.
        rows: that each table's page shows, by its URI.
    """

    facts: dict[str, Any]
    lease: Lease
    started: float
    run: Run
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    of_table: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    rows: dict[str, RowsShown] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> RunMetrics:
        """Where its steps count."""
        return self.run.metrics

    def part(self, verb: str) -> Run:
        """The run of another verb within this night."""
        return dataclasses.replace(self.run, run_id=new_run_id(verb))

    def step(self) -> None:
        """Between two steps that readers see: the lease must still be ours, and whoever watches sees it get on."""
        self.lease.check()
        self.metrics.get_on()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count its seconds; a night that ends in it says so."""
        began, spent = time.monotonic(), self.facts.setdefault("phase_seconds", {})
        try:
            yield
        except BaseException:
            self.facts["ended_in"] = name
            raise
        finally:
            spent[name] = round(spent.get(name, 0.0) + time.monotonic() - began, 3)

    def kept(self, summary: Mapping[str, Any], of_table: Mapping[str, Any]) -> dict[str, Any]:
        """All that is kept of it beside one table."""
        more = self.of_table.get(of_table["table"], {})
        return {**summary, **of_table, "tables": None, "seconds": self.seconds, **self.about, **more}

    @property
    def seconds(self) -> float:
        """Since it began."""
        return round(time.monotonic() - self.started, 3)


def stores(recipe: NightlyRecipe) -> list[Store]:
    """Where its record is kept: the embedding table; prediction tables have the night's summary."""
    from engine.storage import open_store

    return [open_store(recipe.output.uri, recipe.storage)]


def cluster_address(recipe: NightlyRecipe) -> str | None:
    """The recipe's cluster."""
    return recipe.compute.address


def _require_one_task(publish: bool, prune: bool, prune_up_to: int | None, since: float | None) -> None:
    if publish and (prune or prune_up_to is not None or since is not None):
        raise RecipeError(
            "--publish: publishes what is held, extracts and prunes nothing",
            way_out="leave --prune and --since out",
        )


def _one_night(recipe: NightlyRecipe, night: _Night, options: dict[str, Any]) -> Outcome:
    from jobs import extract, score

    started, metrics = night.started, night.metrics
    _scoring_plan(recipe)
    seconds = recipe.budget.seconds(datetime.datetime.now())
    until = None if seconds is None else started + seconds
    extract_until = None if seconds is None else started + recipe.budget.extract_share * seconds
    if until is not None:
        metrics.ends_by(time.time() + until - time.monotonic())
    night.about["seconds_at_most"] = seconds
    with night.phase("extract"):
        extracted = extract.run(
            recipe.extraction(), until=extract_until, as_run=night.part("extract"), **options
        )
    night.facts["fingerprint"] = extracted.summary["fingerprint"]
    night.facts["extract"] = {name: extracted.summary.get(name) for name in EXTRACTED}
    night.about["extract"] = {name: extracted.summary.get(name) for name in (*EXTRACTED, *EXTRACTED_MORE)}
    night.step()
    with night.phase("score"):
        scored = score.run(recipe.scoring(), held=True, until=until, as_run=night.part("score"))
    night.facts["score"] = {name: scored.summary[name] for name in SCORED}
    night.step()
    tables = [
        _judged(recipe, wanted, told["bundle"], night)
        for wanted, told in zip(recipe.bundles, scored.summary["bundles"], strict=True)
    ]
    pruned, too_many = 0, list[EngineError]()
    if _prunes(options):
        with night.phase("prune"):
            pruned, too_many = _prune_predictions(recipe, options["prune_up_to"])
    left = extracted.summary["shards_left"] + scored.summary["parts_left"]
    summary = {
        **night.facts,
        "is_finished": not left,
        "tables": [one for one, _ in tables],
        "published_parts": sum(one["published_parts"] for one, _ in tables),
        "held_parts": sum(one["held_parts"] for one, _ in tables),
        "predictions_pruned": pruned,
        "seconds": night.seconds,
    }
    verdicts = [verdict for _, verdict in tables] + [extracted.verdict, *too_many]
    told = [verdict for verdict in verdicts if verdict is not None]
    night.about["verdicts"] = [error_facts(verdict) for verdict in told]
    for one in summary["tables"]:
        _keep(recipe, night, summary, one)
    metrics.set(run_metrics.HELD_PARTS, summary["held_parts"])
    if left:
        say(f"the time is up: {extracted.summary['shards_left']:,} shards and {scored.summary['parts_left']:,} "
            f"parts are left for the next night")  # fmt: skip
    for other in told[1:]:  # the exit code is the first one's
        print_error(other)
    return Outcome(summary, told[0] if told else None)


def _prunes(options: Mapping[str, Any]) -> bool:
    return bool(options["prune"]) or options["prune_up_to"] is not None


def _prune_predictions(recipe: NightlyRecipe, up_to: int | None) -> tuple[int, list[EngineError]]:
    """Remove predictions of shards that are gone from the embedding table; how many parts, and what was refused."""
    from engine.plan import may_prune
    from engine.storage import open_store
    from engine.tables import prune_predictions
    from jobs.score import wanted_now

    embeddings = open_store(recipe.output.uri, recipe.storage)
    pruned, refused = 0, list[EngineError]()
    for wanted in recipe.bundles:
        table = open_store(wanted.output.uri, recipe.storage)
        parts, too_many = prune_predictions(
            table, lambda: wanted_now(embeddings), lambda shards: may_prune(shards, up_to)
        )
        pruned += parts
        if parts:
            say(f"removed {parts:,} prediction parts of shards that are gone from {table.uri}")
        if too_many:
            refused.append(
                PruneRefused(
                    f"pruning would remove the predictions of {too_many:,} shards from {table.uri}",
                    found=f"{embeddings.uri} has no embeddings of them",
                    wanted="at most a tenth of the table" if up_to is None else f"at most {up_to:,}",
                    way_out=f"if they are meant to go: --prune-up-to {too_many}",
                )
            )
    return pruned, refused


def _scoring_plan(recipe: NightlyRecipe) -> dict[str, Any] | None:
    """What there is to score before anything is extracted, None without a table yet; refuses what scoring would refuse,
    before hours of extraction.

    Raises:
        EngineError: no such bundle, of other embeddings or another contract, or a label map that does not fit.
    """
    from engine.decisions import decisions_of
    from engine.heads.bundle import open_bundle
    from engine.storage import open_store
    from engine.tables import read_record
    from jobs import score

    if read_record(open_store(recipe.output.uri, recipe.storage), "embeddings") is not None:
        return score.plan(recipe.scoring(), held=True)
    for wanted in recipe.bundles:
        bundle = open_bundle(open_store(wanted.uri, recipe.storage))
        decisions_of(wanted.output, bundle.manifest.classes, recipe.storage, wanted.uri)
    return None


def _judged(
    recipe: NightlyRecipe,
    wanted: ScoredBundle,
    bundle_id: str,
    this_night: _Night,
) -> tuple[dict[str, Any], EngineError | None]:
    """Judge what this night holds for one table, and publish it if the gate says so; what an earlier one was refused
    stays held."""
    from engine import night
    from engine.heads.bundle import open_bundle
    from engine.storage import open_store
    from engine.tables import sweep_predictions
    from jobs.score import wanted_now

    table = open_store(wanted.output.uri, recipe.storage)
    embeddings = open_store(recipe.output.uri, recipe.storage)
    more = this_night.of_table.setdefault(table.uri, {"bundle_uri": wanted.uri})
    with this_night.phase("judge"):
        bundle = open_bundle(open_store(wanted.uri, recipe.storage), bundle_id)
        more["task"] = bundle.manifest.task
        # A publishing may have been killed before it.
        sweep_predictions(table, lambda: wanted_now(embeddings))
        if stale := night.drop_stale(table, wanted_now(embeddings)):
            say(f"removed {stale:,} held parts that are rewritten or published")
        held, refused = night.held_parts(table), night.refused(table)
        tonight = [part for part in held if part.info.path not in refused]
        found = night.tally(table, embeddings, tonight, bundle.reference_sha256)
        facts = {"table": table.uri, "bundle": bundle_id, "held_parts": len(held)}
        facts |= {"refused_parts": len(held) - len(tonight), "published_parts": 0, "published_rows": 0}
        facts |= {name: getattr(found, name) for name in TALLIED} | {"gate": None}
        this_night.tables[table.uri] = facts
        broken = None
        if tonight:
            verdict, compared = _verdict(recipe, table, wanted, bundle, found)
            more |= compared | {"predictions_sha256": tonight[0].facts.recipe_sha256}
            if rows := _to_look_at(table, embeddings, tonight, found):
                this_night.rows[table.uri] = rows
                more |= {"rejects_found": rows.rejects, "doubtful": rows.doubtful}
            facts["gate"] = verdict.to_json()
            say(f"{table.uri}: {verdict.in_words()}")
            broken = verdict.error(table.uri)
            decision = "published" if broken is None else "held_back"
            this_night.metrics.count(run_metrics.GATE_DECISIONS, decision=decision)
            if broken is not None:
                night.refuse(table, tonight, this_night.facts["run_id"])
                facts["refused_parts"] = len(held)
                more |= {"refused_tonight": len(tonight), "held_back": error_facts(broken)}
    if tonight and broken is None:
        with this_night.phase("publish"):
            more["is_publishing"] = True
            facts["published_parts"] = night.publish(table, tonight, this_night.step)
            facts |= {"published_rows": found.rows, "held_parts": len(held) - len(tonight)}
            del more["is_publishing"]
    # At once: the next night goes by it.
    night.keep_night(table, this_night.facts["run_id"], this_night.kept(this_night.facts, facts))
    if facts["published_parts"]:
        with this_night.phase("publish"):
            sweep_predictions(table, lambda: wanted_now(embeddings))
    return facts, broken or _still_held(table, held, refused)


def _still_held(table: Store, held: Sequence[Held], refused: Mapping[str, str]) -> HeldBack | None:
    """Nobody has looked at what an earlier night was refused."""
    waiting = [refused[part.info.path] for part in held if part.info.path in refused]
    if not waiting:
        return None
    nights = sorted(set(waiting))
    return HeldBack(
        f"{table.uri}: {len(waiting):,} parts of earlier nights are still held back",
        found=f"refused in {', '.join(nights[-3:])} (nights/ of the predictions says why)",
        way_out="publish them (--publish) if they are as they should be, or delete held/ and they are scored again",
    )


def _verdict(
    recipe: NightlyRecipe, table: Store, wanted: ScoredBundle, bundle: Bundle, found: Tally
) -> tuple[gate.Verdict, dict[str, Any]]:
    """Hold the night against the bundle's reference and the last night that was published; the verdict, and what it was
    held against."""
    from engine.decisions import decisions_of
    from engine.gate import Night, Population, judge
    from engine.night import last_published

    several = bundle.manifest.task == "multi_label"
    reference, remembered = None, bundle.reference()
    if remembered is not None:
        classes = bundle.manifest.classes
        decided = decisions_of(wanted.output, classes, recipe.storage, wanted.uri)
        labels = Counter[str]()  # as the table calls them
        for label, rows in zip(decided.labels, remembered.label_mix(classes).values(), strict=True):
            labels[label] += rows
        if several and any(decided.min_confidences):
            labels.clear()  # the bundle gives labels by its thresholds alone, the table by a floor, too
        reference = dataclasses.replace(Population.remembered(remembered, classes), labels=labels)
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
    compared = {
        "cosine_counts": found.cosine_counts,
        "reference_sha256": bundle.reference_sha256,
        "reference": _reference_facts(reference, remembered),
        "last_night": _last_night(before, bundle, found),
    }
    return judge(night, recipe.gate), compared


def _reference_facts(
    reference: gate.Population | None, remembered: Reference | None
) -> dict[str, Any] | None:
    """What the bundle remembers, without its centroids."""
    if reference is None or remembered is None:
        return None
    return {
        "rows": reference.rows,
        "labels": dict(reference.labels),
        "edges": remembered.edges_E.tolist(),
        "cosine_counts": list(reference.cosines),
    }


def _last_night(before: Mapping[str, Any] | None, bundle: Bundle, found: Tally) -> dict[str, Any] | None:
    """What the night was that published last, and how far tonight's embeddings are from its."""
    from engine.gate import drift

    if before is None:
        return None
    told = {"run_id": before["run_id"], "rows": before["published_rows"]}
    told |= {"answer_counts": before["answer_counts"], "cosine_counts": None, "drift": None}
    counts = before.get("cosine_counts")
    if counts and found.cosine_counts and before.get("reference_sha256") == bundle.reference_sha256:
        distance = drift(counts, found.cosine_counts)
        told |= {"cosine_counts": counts, "drift": distance and dataclasses.asdict(distance)}
    return told


def _to_look_at(table: Store, embeddings: Store, tonight: Sequence[Held], found: Tally) -> RowsShown | None:
    """Rejects and rows for the page; None, and a warning, where they cannot be read."""
    from engine.night_report import rows_shown

    try:
        return rows_shown(table, embeddings, tonight, found.parts_with_rejects)
    except Exception as error:  # noqa: BLE001 (the night is judged whether or not its page has rows)
        say(f"the night's page goes without rows to look at: {_said(error)}", logging.WARNING)
        return None


def _published_by_hand(recipe: NightlyRecipe, this_night: _Night) -> Outcome:
    """Publish what is held for each table, whatever the gate says."""
    from engine import night
    from engine.storage import open_store
    from engine.tables import sweep_predictions
    from jobs.score import wanted_now

    embeddings = open_store(recipe.output.uri, recipe.storage)
    tables: list[dict[str, Any]] = []
    for wanted in recipe.bundles:
        table = open_store(wanted.output.uri, recipe.storage)
        with this_night.phase("publish"):
            night.drop_stale(table, wanted_now(embeddings))
            held = night.held_parts(table)
            references = {part.facts.reference_sha256 for part in held}
            reference_sha256 = references.pop() if len(references) == 1 else None
            found = night.tally(table, embeddings, held, reference_sha256)
            counted = {name: getattr(found, name) for name in (*TALLIED, "cosine_counts")}
            more = counted | {"bundle_uri": wanted.uri, "reference_sha256": reference_sha256}
            this_night.of_table[table.uri] = more | {"is_publishing": True}
            facts: dict[str, Any] = {"table": table.uri, "held_parts": 0, "by_hand": True}
            facts |= {
                "published_parts": night.publish(table, held, this_night.step),
                "published_rows": found.rows,
            }
            facts |= {"answer_counts": found.answer_counts, "abstained": found.abstained}
            this_night.tables[table.uri], this_night.of_table[table.uri] = facts, more
            kept = this_night.kept(this_night.facts, facts)
            night.keep_night(table, this_night.facts["run_id"], kept)
            sweep_predictions(table, lambda: wanted_now(embeddings))
        tables.append(facts)
    this_night.metrics.set(run_metrics.HELD_PARTS, 0)
    summary = {
        **this_night.facts,
        "tables": tables,
        "published_parts": sum(one["published_parts"] for one in tables),
        "held_parts": 0,
        "by_hand": True,
        "seconds": this_night.seconds,
    }
    for one in tables:
        _keep(recipe, this_night, summary, one)
    return Outcome(summary)


def _about(recipe: NightlyRecipe, run: Run) -> dict[str, Any]:
    """What is kept of a night so that its page can say where it came from, and how to go on."""
    document = recipe.model_dump(mode="json")
    return {
        "command": run.command,
        "began": utc(time.time()),
        "engine_version": __version__,
        "recipe_sha256": stable_hash(document),
        "recipe": document,
        "storage": document["storage"],
        "embeddings": recipe.output.uri,
    }


def _keep(
    recipe: NightlyRecipe, this_night: _Night, summary: Mapping[str, Any], facts: dict[str, Any]
) -> None:
    """Beside a prediction table, before a cluster goes away: its summary, and its page."""
    from engine.night import keep_night
    from engine.storage import open_store

    table, kept = open_store(facts["table"], recipe.storage), this_night.kept(summary, facts)
    keep_night(table, summary["run_id"], kept)
    facts["page"] = _write_page(table, kept, _pictures(recipe, this_night, table))


def _pictures(recipe: NightlyRecipe, this_night: _Night, table: Store) -> dict[str, Any] | None:
    """Of the rows that a table's page shows, when readers have what they are to get; None where it shows none."""
    from engine.night_report import PICTURES_BUDGET, pictures_of
    from engine.pictures import SWITCHED_OFF, Budget
    from engine.thumbnails import no_pictures

    rows, pages = this_night.rows.get(table.uri), len(recipe.bundles)
    if rows is None:
        return None
    if not recipe.report.pictures:
        return no_pictures(SWITCHED_OFF)
    if this_night.about.get("error", {}).get("kind") in ("Interrupted", "KeyboardInterrupt"):  # nobody waits
        return no_pictures("the night was interrupted")
    try:
        return pictures_of(rows, Budget(PICTURES_BUDGET.seconds / pages, PICTURES_BUDGET.size // pages))
    except Exception as error:  # noqa: BLE001 (the page is as good without them)
        return no_pictures(f"reading them failed: {_said(error)}")


def _write_page(table: Store, kept: Mapping[str, Any], pictures: Mapping[str, Any] | None) -> str | None:
    """The page for people, where it lies; None, and a warning: the night is as good without it."""
    from engine.night_report import write_page

    try:
        uri = f"{table.uri}/{write_page(table, kept, pictures)}"
    except Exception as error:  # noqa: BLE001 (whatever is wrong with a page, the night has ended as it has)
        say(f"the night has no page in {table.uri}: {_said(error)}", logging.WARNING)
        return None
    say(f"page of the night: {uri}")
    return uri


def _said(error: Exception) -> str:
    return error.thing if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"


def _keep_failed(recipe: NightlyRecipe, this_night: _Night, error: BaseException) -> None:
    """What is known of a night that failed or was interrupted, beside tables that are there already."""
    from engine.night import held_store
    from engine.storage import open_store
    from engine.tables import part_names

    if exit_code_of(error) == EXIT_BAD_RECIPE:  # nothing was begun
        return
    this_night.about["error"] = error_facts(error)
    for wanted in recipe.bundles:
        try:
            table = open_store(wanted.output.uri, recipe.storage)
            if next(iter(table.names()), None) is None:
                continue
            facts = {"table": table.uri, "held_parts": sum(1 for _ in part_names(held_store(table)))}
            facts |= this_night.tables.get(table.uri, {})
            _keep(recipe, this_night, this_night.facts, facts)
        except StorageError as other:
            say(f"what is known of the night is not kept: {other.thing}", logging.WARNING)


def plan(
    recipe: NightlyRecipe,
    *,
    publish: bool = False,
    prune: bool = False,
    prune_up_to: int | None = None,
    since: float | None = None,
) -> dict[str, Any]:
    """What a night would do, from validation and listings alone; touches nothing."""
    from engine.night import held_store
    from engine.storage import open_store
    from engine.tables import part_names
    from jobs import extract

    _require_one_task(publish, prune, prune_up_to, since)
    facts: dict[str, Any] = {"verb": "nightly"}
    if not publish:
        scoring = _scoring_plan(recipe)
        found = extract.plan(recipe.extraction(), prune=prune, prune_up_to=prune_up_to, since=since)
        facts |= {name: value for name, value in found.items() if name not in ("verb", "table_exists")}
        facts["seconds_at_most"] = recipe.budget.seconds(datetime.datetime.now())
        if scoring is not None:
            facts["parts_to_score_now"] = scoring["parts_pending"]
    counts = Counter[str]()
    for wanted in recipe.bundles:
        held = held_store(open_store(wanted.output.uri, recipe.storage))
        counts[wanted.output.uri] = sum(1 for _ in part_names(held))
    return facts | {"held_parts": dict(counts)}


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["nightly", *sys.argv[1:]]))
