"""The extract job: stream the shards that are new through a frozen backbone and write embedding parts.

    engine extract RECIPE            or   ray job submit --working-dir . -- python jobs/extract.py RECIPE

Killing it anywhere and running it again, or running it twice, gives the same table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from engine import __version__, run_metrics
from engine.backbones.kinds import BackboneConfig
from engine.config import Config
from engine.errors import ContractMismatch, ObjectNotFound, RecipeError
from engine.recipes import Compute, EmbeddingForm, EmbeddingOutput, Limits
from engine.runtimes.kinds import RuntimeConfig, TensorFlowRuntimeConfig
from engine.shards.kinds import SourceConfig
from engine.storage import StorageConfig
from jobs.outcome import Outcome, Run, progress_bar, say

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator, Sequence

    from engine.accounting import RunTotals
    from engine.errors import EngineError, OverBudget
    from engine.extraction import Answer, ExtractJob, Receipt, Setup
    from engine.labelling import LabelJob
    from engine.parts import TableProgress
    from engine.plan import PendingShards
    from engine.resolve import Archive, Resolution
    from engine.shards.base import ShardReader
    from engine.sizing import Footprint, Machines, Sizing
    from engine.storage import Store
    from engine.tables import Record


class ImageRecipe(Config):
    """What turns image shards into embeddings."""

    source: SourceConfig
    """The archive of images, and what a sample of it holds."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    backbone: BackboneConfig
    """The frozen network, where it is cut, and how images are fitted to its input."""
    runtime: RuntimeConfig = TensorFlowRuntimeConfig()
    """How the frozen network is run."""
    output: EmbeddingForm
    """In which form they are made."""
    compute: Compute = Compute()
    """What runs where."""
    limits: Limits = Limits()
    """What makes a reject, and how many are too many."""


class ExtractRecipe(ImageRecipe):
    """Recipe of `extract`: image shards in, an embedding table out."""

    output: EmbeddingOutput
    """Where the embedding table is."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a pass over images makes of its embeddings besides keeping them, or instead; picklable.

    Attributes:
        job: the bundles, and whether embeddings are kept.
        made_with: `_table.json` of the embeddings that the bundles were fitted on: the network must be that one.
        records: of each bundle what its table's record says: all of it where embeddings are kept, else what it says
            besides how they were made.
        head_bytes: of the bundles' files that an actor loads to answer with.
    """

    job: LabelJob
    made_with: Record
    records: tuple[Record, ...]
    head_bytes: int


@dataclasses.dataclass(frozen=True)
class ImagePass:
    """Shards through a backbone into tables: what `extract` does, and `score` with images; picklable.

    Attributes:
        verb: for messages.
        tables: URIs of those that are filled part by part; a shard is done when it is whole in all of them.
        labels: None: embeddings are all that is made.
    """

    verb: str
    recipe: ImageRecipe
    tables: tuple[str, ...]
    labels: Labels | None = None

    @property
    def kind(self) -> str:
        """Of those tables."""
        return "embeddings" if self.labels is None or self.labels.job.keeps_embeddings else "predictions"

    def stores(self) -> list[Store]:
        """The tables."""
        from engine.storage import open_store

        return [open_store(uri, self.recipe.storage) for uri in self.tables]

    def records(self) -> list[Record | None]:
        """Of each table what it says of itself; None where it has not been begun."""
        from engine.tables import read_record

        return [read_record(store, self.kind) for store in self.stores()]


@dataclasses.dataclass(frozen=True)
class Passed:
    """How a pass went.

    Attributes:
        summary: its counts, without what the verb is called and what it fills.
        verdict: what decides the exit code although the work is done.
    """

    totals: RunTotals
    summary: dict[str, Any]
    verdict: EngineError | None


def run(  # noqa: PLR0913
    recipe: ExtractRecipe,
    *,
    prune: bool = False,
    prune_up_to: int | None = None,
    replay_rejects: bool = False,
    profile: int | None = None,
    since: float | None = None,
    until: float | None = None,
    as_run: Run | None = None,
) -> Outcome:
    """Extract what is pending; the summary's `rejects` are the whole table's, all other counts this run's.

    Args:
        prune: remove the parts of shards that are no longer in the source; refused above a tenth of the table.
        prune_up_to: prune, and allow this many shards instead of a tenth.
        replay_rejects: do again the parts that have rejects.
        profile: stop after about so many images, which stay in the table, and say what held them up.
        since: only shards that came or were replaced after that, in seconds since 1970 UTC; the others stay pending.
        until: stop between two parts when `time.monotonic()` says so; the next run goes on there.
        as_run: None: one of its own, whose numbers nobody asks for.
    """
    as_run = as_run or Run.new("extract")
    passed = run_pass(
        _pass_of(recipe),
        as_run,
        prune=prune,
        prune_up_to=prune_up_to,
        replay_rejects=replay_rejects,
        since=since,
        stop=Stop(profile, until),
    )
    summary = {"verb": "extract", "run_id": as_run.run_id, "table": recipe.output.uri, **passed.summary}
    return Outcome(summary, passed.verdict)


def _pass_of(recipe: ExtractRecipe) -> ImagePass:
    return ImagePass("extract", recipe, (recipe.output.uri,))


def run_pass(
    work: ImagePass,
    as_run: Run,
    *,
    prune: bool,
    prune_up_to: int | None,
    replay_rejects: bool,
    since: float | None,
    stop: Stop,
) -> Passed:
    """Do what is pending, clean up, and judge the tables; arguments as of `run`."""
    from engine.accounting import RunTotals, failed_shards_verdict
    from engine.cluster_head import joins_cluster
    from engine.plan import check_prune
    from engine.tables import require_writable
    from engine.this_machine import machines_here

    started, recipe = time.monotonic(), work.recipe
    prune = prune or prune_up_to is not None
    source, records, pending = _look(work, replay_rejects, since)
    _announce(work, pending, prune)
    if prune:
        check_prune(pending, prune_up_to)
    totals, here, record = RunTotals(), machines_here(), any_of(records)
    sizing, machines = _sizing(work, record, here), here
    totals.start(pending.works)
    if pending.works and not joins_cluster(recipe.compute.address):
        _require_room(sizing, here, can_grow=False)
    for table, found in zip(work.stores(), records, strict=True):
        if found is None:
            require_writable(table)
    fills_embeddings = work.labels is None or work.labels.job.keeps_embeddings
    num_groups = 0
    left = len(pending.works)
    if record is None or None in records or pending.works or not _names_same_backbone(recipe, record):
        told = _Told(pending, totals, stop, as_run, fills_embeddings)
        sizing, machines, num_groups, record = _extract(work, record, told, here)
        left -= totals.shards_done + totals.shards.failed
        if not stop.was_asked:
            totals.require_whole()
    pruned = sum(
        _clean_up(recipe, source, table, pending, prune, may_have_copies=not fills_embeddings)
        for table in work.stores()
    )
    reasons, over_budget = _judged(work, record)
    seconds = time.monotonic() - started
    summary = {
        "fingerprint": record["fingerprint"],
        "shards_total": pending.shards_total,
        "shards_skipped": pending.shards_done,
        "shards_done": totals.shards_done,
        "shards_failed": totals.shards.failed,
        "failed_shards": totals.damage,
        "shards_left": left,
        "shards_older": pending.shards_older,
        "shards_replaced": len(pending.replaced),
        "shards_removed": len(pending.removed),
        "parts_written": totals.parts_written,
        "parts_pruned": pruned,
        "rows": totals.rows,
        "rejects": reasons.total(),
        "rejects_by_reason": dict(reasons.most_common()),
        "bytes_read": totals.bytes_read,
        "seconds": round(seconds, 3),
        "images_per_second": round(totals.rows / seconds, 1),
        **_diagnosis(recipe, record, totals, machines, _parallelism(sizing, num_groups, pending.bytes_total)),
    }
    return Passed(totals, summary, failed_shards_verdict(totals, recipe.limits) or over_budget)


def any_of(records: Sequence[Record | None]) -> Record | None:
    """What the tables say of how their parts are made; all that there are say the same."""
    return next((record for record in records if record is not None), None)


def _judged(work: ImagePass, record: Record) -> tuple[Counter[str], OverBudget | None]:
    """The rejects of the table that has most (whole ones have the same), and the error if they are over the budget."""
    from engine.accounting import reject_verdict

    verdicts = [reject_verdict(table, work.recipe.limits, record["rows_per_part"]) for table in work.stores()]
    return max(verdicts, key=lambda verdict: (verdict[1] is not None, verdict[0].total()))


def stores(recipe: ExtractRecipe) -> list[Store]:
    """What the job makes: the embedding table."""
    from engine.storage import open_store

    return [open_store(recipe.output.uri, recipe.storage)]


def cluster_address(recipe: ExtractRecipe) -> str | None:
    """The recipe's cluster."""
    return recipe.compute.address


def _extract(
    work: ImagePass, record: Record | None, told: _Told, here: Machines
) -> tuple[Sizing, Machines, int, Record]:
    """Resolve the tables and stream what is pending; answers with layout, number of read tasks, record."""
    from engine.beside import beside
    from engine.cluster_head import joins_cluster
    from engine.plan import read_tasks

    recipe = work.recipe
    in_cluster = joins_cluster(recipe.compute.address)
    pending = told.pending
    archive = _archive(recipe, pending)
    with contextlib.ExitStack() as stack:
        setup: Answer
        sizing = _sizing(work, record, here)
        if not in_cluster:  # on this machine: it loads the network while Ray starts
            setup = stack.enter_context(beside(settle_tables, work, archive, sizing, here, False))
        # Only now: importing Ray takes seconds in which the network is already being loaded.
        from engine.on_ray import machines_of_cluster, ray_session, run_extract, run_on_worker

        cpus = max(sizing.cpus_reserved, here.cpus)
        stack.enter_context(ray_session(recipe.compute.address, cpus, told.run.metrics, told.run.ends))
        machines = machines_of_cluster()
        sizing = _sizing(work, record, machines)
        _require_room(sizing, machines, in_cluster)
        if (
            in_cluster
        ):  # a worker of the actors' kind; they start after it: they might hold the GPU it waits for
            setup = run_on_worker(
                settle_tables,
                work,
                archive,
                sizing,
                machines,
                True,
                num_cpus=sizing.actor_cpus,
                num_gpus=sizing.actor_gpus,
            )
            record = _record_of(work)
            sizing = _sizing(work, record, machines)  # what an actor takes is known now
            _require_room(sizing, machines, in_cluster)
        groups = read_tasks(pending.works, sizing.decode_tasks)
        if groups:
            job = _job(work, rows_per_part_of(recipe, record), sizing)
            labels = None if work.labels is None else work.labels.job
            # Closed while there is a Ray: what Ray Data does afterwards would start another.
            with contextlib.closing(run_extract(job, setup, groups, sizing, labels)) as receipts:
                _follow(receipts, told)
        else:
            setup.get()
        return sizing, machines, len(groups), _record_of(work)


def settle_tables(
    work: ImagePass, archive: Archive, sizing: Sizing, machines: Machines, can_grow: bool
) -> Setup:
    """Runs where an actor would, once for each run: load the network, and make the tables or agree with them.

    Args:
        can_grow: the machines are a cluster's; the driver knows, for RAY_ADDRESS is set for a job, not for its workers.

    Raises:
        EngineError: the network cannot be loaded, is not that of the tables or bundles, or takes more memory than
            there is.
    """
    from engine.extraction import Setup
    from engine.resolve import Network, resolve

    recipe, records = work.recipe, work.records()
    record = any_of(records)
    same_backbone = record is not None and _names_same_backbone(recipe, record)
    runtime = _runtime(recipe, record)
    network = Network(
        recipe.backbone, runtime, recipe.storage, sizing.embed_threads, use_gpu=sizing.actor_gpus > 0
    )
    # Bundles come from a table for which the runtime was tried; their canary tells whether it is good here.
    is_open = record is None and work.labels is None
    resolution = resolve(network, archive if is_open else None, record if same_backbone else None)
    if work.labels is not None:
        resolution = _as_fitted_on(work.labels.made_with, resolution)
    if record is None or None in records or not same_backbone:
        _require_actor_room(work, record, resolution, machines, can_grow)
        record = _claim(work, record, resolution)
    if work.labels is not None and work.labels.job.keeps_embeddings:
        _claim_beside_embeddings(work, work.labels)
    return Setup(
        resolution.graph, resolution.runtime, record["fingerprint"], tuple(map(tuple, record["canary"]))
    )


def _as_fitted_on(made_with: Record, resolution: Resolution) -> Resolution:
    """With the canary of the embeddings that the bundles were fitted on, so that every actor must compute the same.

    Raises:
        ContractMismatch: it is another network.
    """
    if resolution.fingerprint != made_with["fingerprint"]:
        wanted = made_with["contract"]
        here = {f"fingerprint.{name}": value for name, value in resolution.fingerprint_fields.items()}
        other = [name for name, value in here.items() if wanted.get(name) != value]
        raise ContractMismatch(
            "backbone: another network than the bundles were fitted on",
            found=", ".join(f"{name.partition('.')[2]} {here[name]}" for name in other),
            wanted=", ".join(f"{name.partition('.')[2]} {wanted.get(name)}" for name in other),
            way_out="leave the block `backbone` out, or give the place where the same weights lie now",
        )
    canary = tuple(map(tuple, made_with.get("canary", ())))
    return dataclasses.replace(resolution, canary=canary) if canary else resolution


def _names_same_backbone(recipe: ImageRecipe, record: Record) -> bool:
    """Whether the table was made with this very config; another may still be the same network, once it is loaded."""
    return bool(record["backbone"] == recipe.backbone.model_dump(mode="json"))


def _require_actor_room(
    work: ImagePass,
    record: Record | None,
    resolution: Resolution,
    machines: Machines,
    in_cluster: bool,
) -> None:
    """Refuse a network that was seen to take more than these machines have."""
    from engine.sizing import check_room

    check_room(_layout(work, record, resolution.peak_bytes, machines), machines, in_cluster)


def _runtime(recipe: ImageRecipe, record: Record | None) -> RuntimeConfig:
    """What the recipe leaves open has been settled when the table was made."""
    from engine.runtimes.kinds import settled_runtime

    return recipe.runtime if record is None else settled_runtime(recipe.runtime, record["runtime"])


def _runtime_in_words(recipe: ImageRecipe, record: Record | None) -> str:
    runtime = _runtime(recipe, record)
    is_open = "auto" in (runtime.kind, runtime.precision)
    return f"{runtime.kind} {runtime.precision}{' (measured when the table is begun)' if is_open else ''}"


def _record_of(work: ImagePass) -> Record:
    from engine.tables import require_record

    return require_record(work.stores()[0], work.kind)


def _archive(recipe: ImageRecipe, pending: PendingShards) -> Archive:
    """A few of the pending shards, for trying runtimes on their images."""
    from engine.resolve import SHARDS_TRIED, Archive

    step = max(1, len(pending.works) // SHARDS_TRIED)
    shards = tuple(pending.works[place].shard for place in range(0, len(pending.works), step))
    return Archive(recipe.source, recipe.limits, shards[:SHARDS_TRIED])


def plan(
    recipe: ExtractRecipe,
    *,
    prune: bool = False,
    prune_up_to: int | None = None,
    replay_rejects: bool = False,
    profile: int | None = None,
    since: float | None = None,
) -> dict[str, Any]:
    """What `run` would do, from validation and listings alone; touches nothing. A profile would do less of the same."""
    found = plan_pass(
        _pass_of(recipe), prune=prune, prune_up_to=prune_up_to, replay_rejects=replay_rejects, since=since
    )
    return {"verb": "extract", "table": recipe.output.uri, **found}


def plan_pass(
    work: ImagePass,
    *,
    prune: bool,
    prune_up_to: int | None,
    replay_rejects: bool,
    since: float | None,
) -> dict[str, Any]:
    """What `run_pass` would do."""
    from engine.cluster_head import joins_cluster
    from engine.plan import check_prune, read_tasks
    from engine.this_machine import machines_here

    prune, recipe = prune or prune_up_to is not None, work.recipe
    _, records, pending = _look(work, replay_rejects, since)
    _announce(work, pending, prune)
    if prune:
        check_prune(pending, prune_up_to)
    machines, record = machines_here(), any_of(records)
    sizing = _sizing(work, record, machines)
    if not joins_cluster(recipe.compute.address):
        _require_room(sizing, machines, can_grow=False)
    groups = read_tasks(pending.works, sizing.decode_tasks)
    return {
        "table_exists": None not in records,
        "shards_total": pending.shards_total,
        "shards_skipped": pending.shards_done,
        "shards_pending": len(pending.works),
        "shards_older": pending.shards_older,
        "shards_replaced": len(pending.replaced),
        "shards_removed": len(pending.removed),
        "bytes_pending": pending.bytes_total,
        "read_tasks": len(groups),
        "rows_per_part": rows_per_part_of(recipe, record),
        "pixel_bytes_per_part": sizing.footprint.part,
        "runtime": _runtime_in_words(recipe, record),
        "actors": sizing.start_actors,
        "actors_at_most": sizing.actors,
        "threads_per_actor": sizing.embed_threads,
        "decode_tasks": sizing.decode_tasks,
        "decode_threads": sizing.decode_threads,
        "tasks_that_only_decode": sizing.decoders(len(groups), pending.bytes_total),
        "memory_per_actor": sizing.footprint.actor,
        "memory_per_reader": sizing.reader_bytes,
        "memory_in_all": sizing.bytes_in_all,
        "parts_in_flight_at_most": sizing.bytes_in_flight // sizing.footprint.part,
        "runs_on": recipe.compute.address or "the cluster of RAY_ADDRESS if that is set, else a local Ray",
    }


Demand = tuple["Footprint", "Callable[[int], int] | None"]
"""What the processes of a run take, and how many read tasks there are for so many readers at once; None: nobody has
looked."""


def demand(recipe: ExtractRecipe, *, is_reachable: bool) -> Demand:
    """For those who make room for a run.

    Args:
        is_reachable: look at the archive and at the table; else sizes are the recipe's, and the tasks None.
    """
    return demand_of_pass(_pass_of(recipe)) if is_reachable else demand_of_recipe(recipe)


def demand_of_pass(work: ImagePass) -> Demand:
    """From a look at the archive and at the tables."""
    from engine.plan import read_tasks

    _, records, pending = _look(work, replay_rejects=False, since=None)
    _announce(work, pending, prune=False)
    needs = _sizing(work, any_of(records), _anywhere()).footprint
    return needs, lambda readers: len(read_tasks(pending.works, readers))


def demand_of_recipe(recipe: ImageRecipe) -> Demand:
    """From the recipe alone, without heads."""
    return _layout(ImagePass("plan", recipe, ()), None, None, _anywhere()).footprint, None


def _anywhere() -> Machines:
    from engine.sizing import Machines

    return Machines.of_one_node(cpus=1, gpus=0, memory=math.inf, object_store=math.inf)


def _look(
    work: ImagePass, replay_rejects: bool, since: float | None
) -> tuple[Store, list[Record | None], PendingShards]:
    """The listings, and the tables' records; refuses what is known to be wrong before anything starts."""
    from engine.plan import pending_shards
    from engine.shards.kinds import open_reader
    from engine.storage import open_store
    from engine.tables import check_contract, parts_with_rejects, table_progress

    recipe, tables, records = work.recipe, work.stores(), work.records()
    source = open_store(recipe.source.uri, recipe.storage)
    contract = contract_of_recipe(recipe, any_of(records))
    for place, (table, record) in enumerate(zip(tables, records, strict=True)):
        if record is not None:
            check_contract(record, _contract_of_table(work, place, contract, record), table.uri)
    reader = open_reader(recipe.source, recipe.limits.max_sample_bytes)
    if since is not None and reader.regroups:
        raise RecipeError(
            "--since: not for single files",
            found=f"source.kind {recipe.source.kind}, whose files are grouped anew as others come and go",
            wanted="shards that are objects of their own",
            way_out="leave --since out: what is done is not read again",
        )
    progress = [table_progress(table) for table in tables]
    if replay_rejects:
        progress = [
            one.without(parts_with_rejects(table)) for one, table in zip(progress, tables, strict=True)
        ]
    pending = pending_shards(reader.list_shards(source), *progress, since=since)
    if reader.regroups and pending.removed:
        pending = _without_regrouped(reader, source, tables, pending)
    return source, records, pending


def _without_regrouped(
    reader: ShardReader, source: Store, tables: Sequence[Store], pending: PendingShards
) -> PendingShards:
    """Tell groups whose files are in another group now from such that are gone."""
    from engine.tables import shard_paths

    removed_here = frozenset(pending.removed)
    paths: dict[str, str] = {}
    for table in tables:
        paths |= shard_paths(table, removed_here)
    regrouped = frozenset(path16 for path16, path in paths.items() if reader.successor(source, path))
    removed = tuple(path16 for path16 in pending.removed if path16 not in regrouped)
    return dataclasses.replace(pending, removed=removed, regrouped=regrouped)


def _announce(work: ImagePass, pending: PendingShards, prune: bool) -> None:
    recipe = work.recipe
    if not pending.shards_total:
        raise ObjectNotFound(
            f"{recipe.source.uri}: no shards here",
            wanted=f"objects whose names match {recipe.source.pattern!r} (source.pattern)",
            way_out="check source.uri (a typo, a disk that is not mounted) and the pattern",
        )
    say(
        f"{work.verb}: {len(pending.works):,} of {pending.shards_total:,} shards pending "
        f"({pending.bytes_total / 1e6:,.1f} MB), {pending.shards_done:,} done"
    )
    if pending.shards_older:
        say(f"{pending.shards_older:,} more are older than --since and stay pending")
    if pending.replaced:
        say(f"{len(pending.replaced):,} shards were replaced since the table was written")
    if pending.removed:
        fate = "will be removed" if prune else "are kept (--prune removes them)"
        say(f"{len(pending.removed):,} shards of the table are no longer in the source; their parts {fate}")


def _sizing(work: ImagePass, record: Record | None, machines: Machines) -> Sizing:
    """The layout on these machines; what an actor takes is known once the table's record says it."""
    recipe = work.recipe
    is_known = record is not None and record["runtime"] == _runtime(recipe, record).model_dump(mode="json")
    actor_peak = record.get("actor_peak_bytes") if record is not None and is_known else None
    return _layout(work, record, actor_peak, machines)


def _layout(work: ImagePass, record: Record | None, actor_peak: int | None, machines: Machines) -> Sizing:
    from engine.sizing import footprint, size_up

    recipe, heads = work.recipe, 0 if work.labels is None else work.labels.head_bytes
    rows, side = rows_per_part_of(recipe, record), recipe.backbone.input_size
    needs = footprint(recipe.compute, recipe.limits, rows, side, actor_peak, heads)
    return size_up(recipe.compute, machines, needs)


def _require_room(sizing: Sizing, machines: Machines, can_grow: bool) -> None:
    """Refuse what cannot fit; say once what may not."""
    from engine.sizing import check_room

    if warning := check_room(sizing, machines, can_grow):
        _say_once(warning)


@functools.cache
def _say_once(warning: str) -> None:
    say(warning, logging.WARNING)


def rows_per_part_of(recipe: ImageRecipe, record: Record | None) -> int:
    """The recipe's number, else the table's, else the default for the input size."""
    from engine.extraction import default_rows_per_part

    if recipe.output.rows_per_part is not None:
        return recipe.output.rows_per_part
    if record is not None:
        return int(record["rows_per_part"])
    return default_rows_per_part(recipe.backbone.input_size)


def contract_of_recipe(recipe: ImageRecipe, record: Record | None) -> dict[str, Any]:
    """Contract fields that the recipe alone decides; the fingerprint's fields are added once resolved."""
    from engine.schema import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        **{f"source.{name}": value for name, value in recipe.source.contract().items()},
        **{f"limits.{name}": value for name, value in recipe.limits.contract().items()},
        "backbone.input_size": recipe.backbone.input_size,
        "backbone.pooling": recipe.backbone.pooling,
        "backbone.layer": recipe.backbone.layer,
        "backbone.resize": recipe.backbone.resize,
        "backbone.kind": recipe.backbone.kind,
        **_precision_of_recipe(recipe),
        "output.dtype": recipe.output.dtype,
        "output.rows_per_part": rows_per_part_of(recipe, record),
    }


def _contract_of_table(
    work: ImagePass, place: int, contract: dict[str, Any], record: Record
) -> dict[str, Any]:
    """The contract of one table as far as it is known before the network is loaded; with labels alone, all of it.

    Args:
        contract: what the recipe says of every table.
        record: of this one; fields that this run has not got show as null.
    """
    if work.kind == "embeddings":
        return contract
    assert work.labels is not None
    network = network_contract(work.labels.made_with)
    own = work.labels.records[place]["contract"]
    return {**dict.fromkeys(record["contract"]), **contract, **network, **own}


def network_contract(made_with: Record) -> dict[str, Any]:
    """What a contract says of the network, from that of another table."""
    names = ("runtime.precision", "fingerprint")
    return {
        name: value
        for name, value in made_with["contract"].items()
        if name in names or name.startswith("fingerprint.")
    }


def _precision_of_recipe(recipe: ImageRecipe) -> dict[str, str]:
    """Nothing where the recipe leaves it open: the table has settled it, or will."""
    return {"runtime.precision": recipe.runtime.precision} if recipe.runtime.precision != "auto" else {}


def _claim(work: ImagePass, record: Record | None, resolved: Resolution) -> Record:
    """Write `_table.json` of each table, or agree with the one that is there; answers with the first."""
    from engine.tables import claim_table

    made = _record_of_embeddings(work.recipe, record, resolved)
    if work.kind == "embeddings":
        return claim_table(work.stores()[0], made)
    assert work.labels is not None
    claimed = []
    for table, labels in zip(work.stores(), work.labels.records, strict=True):
        contract = {**made["contract"], **labels["contract"]}
        claimed.append(claim_table(table, {**made, **labels, "contract": contract}))
    return claimed[0]


def _claim_beside_embeddings(work: ImagePass, labels: Labels) -> None:
    """Begin the tables of predictions that are made of embeddings that are kept, or agree with them."""
    from engine.storage import open_store
    from engine.tables import claim_table

    for bundle, record in zip(labels.job.bundles, labels.records, strict=True):
        claim_table(open_store(bundle.table_uri, work.recipe.storage), record)


def _record_of_embeddings(recipe: ImageRecipe, record: Record | None, resolved: Resolution) -> dict[str, Any]:
    """What a table says of how embeddings are made."""
    from engine.backbones.fingerprint import fingerprint_contract

    rows_per_part = rows_per_part_of(recipe, record)
    contract = {
        **contract_of_recipe(recipe, record),
        **fingerprint_contract(resolved.fingerprint_fields),
    }
    return {
        "kind": "embeddings",
        "schema_version": contract["schema_version"],
        "contract": contract,
        "fingerprint": resolved.fingerprint,
        "tensor_digest": resolved.fingerprint_fields["tensor_digest"],
        "width": resolved.graph.width,
        "canary": resolved.canary,
        "rows_per_part": rows_per_part,
        "source_uri": contract["source.uri"],
        "backbone": recipe.backbone.model_dump(mode="json"),
        "runtime": resolved.runtime.model_dump(mode="json"),
        "runtimes_tried": [trial.to_json() for trial in resolved.trials],
        "actor_peak_bytes": resolved.peak_bytes,
        "engine_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _job(work: ImagePass, rows_per_part: int, sizing: Sizing) -> ExtractJob:
    from engine.extraction import ExtractJob

    recipe = work.recipe
    return ExtractJob(
        source=recipe.source,
        storage=recipe.storage,
        backbone=recipe.backbone,
        runtime=recipe.runtime,
        limits=recipe.limits,
        table_uri=work.tables[0],
        dtype=recipe.output.dtype,
        rows_per_part=rows_per_part,
        decode_threads=sizing.decode_threads,
        embed_threads=sizing.embed_threads,
        use_gpu=sizing.actor_gpus > 0,
    )


@dataclasses.dataclass
class Stop:
    """Whether a run ends before all is done: when a profile has its images, or at a time of `time.monotonic()`."""

    profile: int | None = None
    until: float | None = None
    was_asked: bool = False

    def is_now(self, totals: RunTotals) -> bool:
        """To be asked between two parts."""
        has_profile = self.profile is not None and totals.rows + totals.rejects >= self.profile
        is_late = self.until is not None and time.monotonic() >= self.until
        self.was_asked = is_late or bool(has_profile and totals.steady.seconds)
        return self.was_asked


@dataclasses.dataclass(frozen=True)
class _Told:
    """What there is to do, and what hears of what is done."""

    pending: PendingShards
    totals: RunTotals
    stop: Stop
    run: Run
    keeps_embeddings: bool


def _follow(receipts: Iterator[Receipt], told: _Told) -> None:
    """Count receipts as they come, and show how far the run is."""
    started, pending, totals = time.monotonic(), told.pending, told.totals
    _measure_shards(told)
    shards = len(pending.works)
    with progress_bar("shards", shards) as (bar, task):
        for receipt in receipts:
            _measure(receipt, told, is_new=totals.add(receipt))
            if receipt.header.damage is not None:
                shard, reason = receipt.header.shard, " ".join(receipt.header.damage.split())
                say(f"shard failed: {shard}: {reason}", shard=shard, reason=reason)
            rate = totals.rows / (time.monotonic() - started)
            finished = totals.shards_done + totals.shards.failed
            # A few large shards are under way for hours before the first one is done.
            share = min(1.0, totals.bytes_read / pending.bytes_total) if pending.bytes_total else 0.0
            bar.update(
                task,
                completed=max(finished, share * shards),
                finished=finished,
                rate=f"{rate:,.0f} images/s, {totals.rejects:,} rejects",
            )
            if told.stop.is_now(totals):
                return


def _measure(receipt: Receipt, told: _Told, is_new: bool) -> None:
    """Count a receipt for whoever watches the run; what was read is counted as often as it was read."""
    from engine.doctor import STAGES

    header, metrics, totals = receipt.header, told.run.metrics, told.totals
    metrics.count(
        run_metrics.READ_BYTES,
        header.bytes_read,
        table="embeddings" if told.keeps_embeddings else "predictions",
    )
    if is_new:
        metrics.get_on()
        metrics.count(run_metrics.IMAGES, header.samples)
        if told.keeps_embeddings:
            metrics.wrote("embeddings", receipt.rows)
        for counts in receipt.bundles.values():
            metrics.wrote("predictions", counts.rows, counts.parts)
        for reason, count in receipt.reject_reasons.items():
            metrics.count(run_metrics.REJECTS, count, reason=reason)
        metrics.stages({stage: getattr(header, f"{stage}_s") for stage in STAGES})
        if seen := totals.rows + totals.rejects:
            metrics.set(run_metrics.REJECT_RATIO, totals.rejects / seen)
    _measure_shards(told)


def _measure_shards(told: _Told) -> None:
    metrics, done, failed = told.run.metrics, told.totals.shards_done, told.totals.shards.failed
    metrics.reach(run_metrics.SHARDS_DONE, done)
    metrics.reach(run_metrics.SHARDS_FAILED, failed)
    metrics.set(run_metrics.SHARDS_PENDING, len(told.pending.works) - done - failed)


def _clean_up(
    recipe: ImageRecipe,
    source: Store,
    table: Store,
    pending: PendingShards,
    with_prune: bool,
    *,
    may_have_copies: bool,
) -> int:
    """Remove parts that are superseded, and if asked those of shards that are gone; how many of the latter."""
    from engine.shards.kinds import open_reader
    from engine.tables import prune, sweep, table_progress

    reader = open_reader(recipe.source, recipe.limits.max_sample_bytes)
    swept = sweep(table, lambda path: _version_now(reader, source, path), may_have_copies)
    if pending.regrouped:
        progress = table_progress(table)
        taken_over, _ = prune(
            table, pending.regrouped, lambda path: _is_taken_over(reader, source, path, progress)
        )
        swept += taken_over
    if swept:
        say(f"removed {swept:,} parts of replaced shards")
    if not with_prune:
        return 0
    removed = frozenset(pending.removed)
    pruned, kept = prune(table, removed, lambda path: reader.identity_now(source, path) is None)
    if pruned:
        say(f"removed {pruned:,} parts of shards that are no longer in the source")
    if kept:
        say(f"kept {len(kept):,} shards that the source still has but source.pattern leaves out: {kept[0]}")
    return pruned


def _version_now(reader: ShardReader, source: Store, path: str) -> str | None:
    """The version (source8) that a shard has at this moment; None where it is gone."""
    from engine.parts import hash8_of

    identity = reader.identity_now(source, path)
    return hash8_of(identity) if identity is not None else None


def _is_taken_over(reader: ShardReader, source: Store, path: str, progress: TableProgress) -> bool:
    """Whether a group is gone and the one that has its files now is whole in the table."""
    from engine.parts import path16_of

    heir = reader.successor(source, path)
    if heir is None or reader.identity_now(source, path) is not None:
        return False
    versions = progress.get(path16_of(heir), {})
    version = _version_now(reader, source, heir)
    return version in versions and versions[version].is_complete


def _diagnosis(
    recipe: ImageRecipe,
    record: Record,
    totals: RunTotals,
    machines: Machines,
    parallelism: dict[str, float],
) -> dict[str, Any]:
    """The summary's words on speed: of the stretch after the first part, where there is one."""
    from engine.doctor import Observed, cost_per_million, diagnose

    steady = totals.steady
    if not steady.seconds:
        return {"bottleneck": totals.bottleneck(parallelism)}
    observed = Observed(
        images=steady.samples,
        seconds=steady.seconds,
        stage_s=steady.stage_s,
        workers=parallelism,
        cores=machines.cpus,
        on_gpu=recipe.compute.gpus_per_actor > 0,
        runtime=_runtime(recipe, record).model_dump(),
        trials=record.get("runtimes_tried", ()),
    )
    found = diagnose(observed)
    price = recipe.compute.node_price_per_hour
    return {
        "steady_images_per_second": round(observed.rate, 1),
        "bottleneck": found.bottleneck,
        "stage_seconds": {stage: round(seconds, 1) for stage, seconds in steady.stage_s.items()},
        "utilisation": found.utilisation,
        "advice": list(found.advice),
        "cost_per_million_images": cost_per_million(observed.rate, machines.nodes, price)
        if price is not None
        else None,
    }


def _parallelism(sizing: Sizing, num_groups: int, bytes_total: int) -> dict[str, float]:
    """Workers of each stage that had something to do, for naming the bottleneck."""
    readers = max(1, min(sizing.decode_tasks, num_groups))
    return {
        "read": readers,
        "decode": (sizing.decoders(num_groups, bytes_total) or readers) * sizing.decode_threads,
        "embed": sizing.start_actors,
        "write": sizing.writers or sizing.start_actors,
    }


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["extract", *sys.argv[1:]]))
