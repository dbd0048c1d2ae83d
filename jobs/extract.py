"""The extract job: stream the shards that are new through a frozen backbone and write embedding parts.

    engine extract RECIPE            or   ray job submit --working-dir . -- python jobs/extract.py RECIPE

Killing it anywhere and running it again, or running it twice, gives the same table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import sys
import time
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.backbones.kinds import BackboneConfig
from engine.config import Config
from engine.errors import ObjectNotFound
from engine.recipes import Compute, EmbeddingOutput, Limits
from engine.runtimes.kinds import RuntimeConfig, TensorFlowRuntimeConfig
from engine.shards.kinds import SourceConfig
from engine.storage import StorageConfig
from jobs.outcome import Outcome, new_run_id, progress_bar, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.accounting import RunTotals
    from engine.extraction import Answer, ExtractJob, Receipt, Setup
    from engine.parts import TableProgress
    from engine.plan import PendingShards
    from engine.resolve import Archive, Resolution
    from engine.shards.base import ShardReader
    from engine.sizing import Machines, Sizing
    from engine.storage import Store
    from engine.tables import Record


class ExtractRecipe(Config):
    """Recipe of `extract`: image shards in, an embedding table out."""

    source: SourceConfig
    """The archive of images, and what a sample of it holds."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    backbone: BackboneConfig
    """The frozen network, where it is cut, and how images are fitted to its input."""
    runtime: RuntimeConfig = TensorFlowRuntimeConfig()
    """How the frozen network is run."""
    output: EmbeddingOutput
    """Where the embedding table is."""
    compute: Compute = Compute()
    """What runs where."""
    limits: Limits = Limits()
    """What makes a reject, and how many are too many."""


def run(
    recipe: ExtractRecipe,
    *,
    prune: bool = False,
    prune_up_to: int | None = None,
    replay_rejects: bool = False,
    profile: int | None = None,
    since: float | None = None,
    until: float | None = None,
) -> Outcome:
    """Extract what is pending; the summary's `rejects` are the whole table's, all other counts this run's.

    Args:
        prune: remove the parts of shards that are no longer in the source; refused above a tenth of the table.
        prune_up_to: prune, and allow this many shards instead of a tenth.
        replay_rejects: do again the parts that have rejects.
        profile: stop after about so many images, which stay in the table, and say what held them up.
        since: only shards that came or were replaced after that, in seconds since 1970 UTC; the others stay pending.
        until: stop between two parts when `time.monotonic()` says so; the next run goes on there.
    """
    from engine.accounting import RunTotals, failed_shards_verdict, reject_verdict
    from engine.cluster_head import joins_cluster
    from engine.plan import check_prune
    from engine.tables import require_writable
    from engine.this_machine import machines_here

    started, run_id = time.monotonic(), new_run_id("extract")
    prune = prune or prune_up_to is not None
    source, table, record, pending = _look(recipe, replay_rejects, since)
    _announce(recipe, pending, prune)
    if prune:
        check_prune(pending, prune_up_to)
    totals, here = RunTotals(), machines_here()
    sizing, machines = _sizing(recipe, record, here), here
    totals.start(pending.works)
    if pending.works and not joins_cluster(recipe.compute.address):
        _require_room(sizing, here, can_grow=False)
    if record is None:
        require_writable(table)
    num_groups = 0
    left = len(pending.works)
    if record is None or pending.works or not _names_same_backbone(recipe, record):
        stop = _Stop(profile, until)
        sizing, machines, num_groups, record = _extract(recipe, record, pending, totals, here, stop)
        left -= totals.shards_done + totals.shards.failed
        if not stop.was_asked:
            totals.require_whole()
    pruned = _clean_up(recipe, source, table, pending, prune)
    reasons, over_budget = reject_verdict(table, recipe.limits, record["rows_per_part"])
    seconds = time.monotonic() - started
    summary = {
        "verb": "extract",
        "run_id": run_id,
        "table": table.uri,
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
    return Outcome(summary, failed_shards_verdict(totals, recipe.limits) or over_budget)


def _extract(
    recipe: ExtractRecipe,
    record: Record | None,
    pending: PendingShards,
    totals: RunTotals,
    here: Machines,
    stop: _Stop,
) -> tuple[Sizing, Machines, int, Record]:
    """Resolve the table and stream what is pending; answers with layout, number of read tasks, record."""
    from engine.beside import beside
    from engine.cluster_head import joins_cluster
    from engine.plan import read_tasks

    in_cluster = joins_cluster(recipe.compute.address)
    archive = _archive(recipe, pending)
    with contextlib.ExitStack() as stack:
        setup: Answer
        sizing = _sizing(recipe, record, here)
        if not in_cluster:  # on this machine: it loads the network while Ray starts
            setup = stack.enter_context(beside(settle_table, recipe, archive, sizing, here))
        # Only now: importing Ray takes seconds in which the network is already being loaded.
        from engine.on_ray import machines_of_cluster, ray_session, run_extract, run_on_worker

        stack.enter_context(ray_session(recipe.compute.address, max(sizing.cpus_reserved, here.cpus)))
        machines = machines_of_cluster()
        sizing = _sizing(recipe, record, machines)
        _require_room(sizing, machines, in_cluster)
        if (
            in_cluster
        ):  # a worker of the actors' kind; they start after it: they might hold the GPU it waits for
            setup = run_on_worker(
                settle_table,
                recipe,
                archive,
                sizing,
                machines,
                num_cpus=sizing.actor_cpus,
                num_gpus=sizing.actor_gpus,
            )
            record = _record_of(recipe)
            sizing = _sizing(recipe, record, machines)  # what an actor takes is known now
            _require_room(sizing, machines, in_cluster)
        groups = read_tasks(pending.works, sizing.decode_tasks)
        if groups:
            job = _job(recipe, _rows_per_part(recipe, record), sizing)
            # Closed while there is a Ray: what Ray Data does afterwards would start another.
            with contextlib.closing(run_extract(job, setup, groups, sizing)) as receipts:
                _follow(receipts, totals, pending, stop)
        else:
            setup.get()
        return sizing, machines, len(groups), _record_of(recipe)


def settle_table(recipe: ExtractRecipe, archive: Archive, sizing: Sizing, machines: Machines) -> Setup:
    """Runs where an actor would, once for each run: load the network, and make the table or agree with it.

    Raises:
        EngineError: the network cannot be loaded, is not the table's, or takes more memory than there is.
    """
    from engine.cluster_head import joins_cluster
    from engine.extraction import Setup
    from engine.resolve import Network, resolve
    from engine.storage import open_store
    from engine.tables import read_record

    table = open_store(recipe.output.uri, recipe.storage)
    record = read_record(table, "embeddings")
    same_backbone = record is not None and _names_same_backbone(recipe, record)
    runtime = _runtime(recipe, record)
    network = Network(
        recipe.backbone, runtime, recipe.storage, sizing.embed_threads, use_gpu=sizing.actor_gpus > 0
    )
    resolution = resolve(network, archive if record is None else None, record if same_backbone else None)
    if record is None or not same_backbone:
        _require_actor_room(recipe, record, resolution, machines, joins_cluster(recipe.compute.address))
        record = _claim(recipe, table, record, resolution)
    return Setup(
        resolution.graph, resolution.runtime, record["fingerprint"], tuple(map(tuple, record["canary"]))
    )


def _names_same_backbone(recipe: ExtractRecipe, record: Record) -> bool:
    """Whether the table was made with this very config; another may still be the same network, once it is loaded."""
    return bool(record["backbone"] == recipe.backbone.model_dump(mode="json"))


def _require_actor_room(
    recipe: ExtractRecipe,
    record: Record | None,
    resolution: Resolution,
    machines: Machines,
    in_cluster: bool,
) -> None:
    """Refuse a network that was seen to take more than these machines have."""
    from engine.sizing import check_room

    check_room(_layout(recipe, record, resolution.peak_bytes, machines), machines, in_cluster)


def _runtime(recipe: ExtractRecipe, record: Record | None) -> RuntimeConfig:
    """What the recipe leaves open has been settled when the table was made."""
    from engine.runtimes.kinds import settled_runtime

    return recipe.runtime if record is None else settled_runtime(recipe.runtime, record["runtime"])


def _runtime_in_words(recipe: ExtractRecipe, record: Record | None) -> str:
    runtime = _runtime(recipe, record)
    is_open = "auto" in (runtime.kind, runtime.precision)
    return f"{runtime.kind} {runtime.precision}{' (measured when the table is begun)' if is_open else ''}"


def _record_of(recipe: ExtractRecipe) -> Record:
    from engine.storage import open_store
    from engine.tables import require_record

    return require_record(open_store(recipe.output.uri, recipe.storage), "embeddings")


def _archive(recipe: ExtractRecipe, pending: PendingShards) -> Archive:
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
    from engine.cluster_head import joins_cluster
    from engine.plan import check_prune, read_tasks
    from engine.this_machine import machines_here

    prune = prune or prune_up_to is not None
    _, table, record, pending = _look(recipe, replay_rejects, since)
    _announce(recipe, pending, prune)
    if prune:
        check_prune(pending, prune_up_to)
    machines = machines_here()
    sizing = _sizing(recipe, record, machines)
    if not joins_cluster(recipe.compute.address):
        _require_room(sizing, machines, can_grow=False)
    groups = read_tasks(pending.works, sizing.decode_tasks)
    return {
        "verb": "extract",
        "table": table.uri,
        "table_exists": record is not None,
        "shards_total": pending.shards_total,
        "shards_skipped": pending.shards_done,
        "shards_pending": len(pending.works),
        "shards_older": pending.shards_older,
        "shards_replaced": len(pending.replaced),
        "shards_removed": len(pending.removed),
        "bytes_pending": pending.bytes_total,
        "read_tasks": len(groups),
        "rows_per_part": _rows_per_part(recipe, record),
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


def _look(
    recipe: ExtractRecipe, replay_rejects: bool, since: float | None
) -> tuple[Store, Store, Record | None, PendingShards]:
    """The listings, and the table's record; refuses what is known to be wrong before anything starts."""
    from engine.plan import pending_shards
    from engine.shards.kinds import open_reader
    from engine.storage import open_store
    from engine.tables import check_contract, parts_with_rejects, read_record, table_progress

    source = open_store(recipe.source.uri, recipe.storage)
    table = open_store(recipe.output.uri, recipe.storage)
    record = read_record(table, "embeddings")
    if record is not None:
        check_contract(record, _contract_of_recipe(recipe, record), table.uri)
    reader = open_reader(recipe.source, recipe.limits.max_sample_bytes)
    progress = table_progress(table)
    if replay_rejects:
        progress = progress.without(parts_with_rejects(table))
    pending = pending_shards(reader.list_shards(source), progress, since)
    if reader.regroups and pending.removed:
        pending = _without_regrouped(reader, source, table, pending)
    return source, table, record, pending


def _without_regrouped(
    reader: ShardReader, source: Store, table: Store, pending: PendingShards
) -> PendingShards:
    """Tell groups whose files are in another group now from such that are gone."""
    from engine.tables import shard_paths

    paths = shard_paths(table, frozenset(pending.removed))
    regrouped = frozenset(path16 for path16, path in paths.items() if reader.successor(source, path))
    removed = tuple(path16 for path16 in pending.removed if path16 not in regrouped)
    return dataclasses.replace(pending, removed=removed, regrouped=regrouped)


def _announce(recipe: ExtractRecipe, pending: PendingShards, prune: bool) -> None:
    if not pending.shards_total:
        raise ObjectNotFound(
            f"{recipe.source.uri}: no shards here",
            wanted=f"objects whose names match {recipe.source.pattern!r} (source.pattern)",
            way_out="check source.uri (a typo, a disk that is not mounted) and the pattern",
        )
    say(
        f"extract: {len(pending.works):,} of {pending.shards_total:,} shards pending "
        f"({pending.bytes_total / 1e6:,.1f} MB), {pending.shards_done:,} done"
    )
    if pending.shards_older:
        say(f"{pending.shards_older:,} more are older than --since and stay pending")
    if pending.replaced:
        say(f"{len(pending.replaced):,} shards were replaced since the table was written")
    if pending.removed:
        fate = "will be removed" if prune else "are kept (--prune removes them)"
        say(f"{len(pending.removed):,} shards of the table are no longer in the source; their parts {fate}")


def _sizing(recipe: ExtractRecipe, record: Record | None, machines: Machines) -> Sizing:
    """The layout on these machines; what an actor takes is known once the table's record says it."""
    is_known = record is not None and record["runtime"] == _runtime(recipe, record).model_dump(mode="json")
    actor_peak = record.get("actor_peak_bytes") if record is not None and is_known else None
    return _layout(recipe, record, actor_peak, machines)


def _layout(
    recipe: ExtractRecipe, record: Record | None, actor_peak: int | None, machines: Machines
) -> Sizing:
    from engine.sizing import footprint, size_up

    rows, side = _rows_per_part(recipe, record), recipe.backbone.input_size
    return size_up(recipe.compute, machines, footprint(recipe.compute, recipe.limits, rows, side, actor_peak))


def _require_room(sizing: Sizing, machines: Machines, can_grow: bool) -> None:
    """Refuse what cannot fit; say once what may not."""
    from engine.sizing import check_room

    if warning := check_room(sizing, machines, can_grow):
        _say_once(f"warning: {warning}")


@functools.cache
def _say_once(text: str) -> None:
    say(text)


def _rows_per_part(recipe: ExtractRecipe, record: Record | None) -> int:
    """The recipe's number, else the table's, else the default for the input size."""
    from engine.extraction import default_rows_per_part

    if recipe.output.rows_per_part is not None:
        return recipe.output.rows_per_part
    if record is not None:
        return int(record["rows_per_part"])
    return default_rows_per_part(recipe.backbone.input_size)


def _contract_of_recipe(recipe: ExtractRecipe, record: Record | None) -> dict[str, Any]:
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
        "output.rows_per_part": _rows_per_part(recipe, record),
    }


def _precision_of_recipe(recipe: ExtractRecipe) -> dict[str, str]:
    """Nothing where the recipe leaves it open: the table has settled it, or will."""
    return {"runtime.precision": recipe.runtime.precision} if recipe.runtime.precision != "auto" else {}


def _claim(recipe: ExtractRecipe, table: Store, record: Record | None, resolved: Resolution) -> Record:
    """Write `_table.json`, or agree with the one that is there."""
    from engine.backbones.fingerprint import fingerprint_contract
    from engine.tables import claim_table

    rows_per_part = _rows_per_part(recipe, record)
    contract = {
        **_contract_of_recipe(recipe, record),
        **fingerprint_contract(resolved.fingerprint_fields),
    }
    return claim_table(
        table,
        {
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
        },
    )


def _job(recipe: ExtractRecipe, rows_per_part: int, sizing: Sizing) -> ExtractJob:
    from engine.extraction import ExtractJob

    return ExtractJob(
        source=recipe.source,
        storage=recipe.storage,
        backbone=recipe.backbone,
        runtime=recipe.runtime,
        limits=recipe.limits,
        table_uri=recipe.output.uri,
        dtype=recipe.output.dtype,
        rows_per_part=rows_per_part,
        decode_threads=sizing.decode_threads,
        embed_threads=sizing.embed_threads,
        use_gpu=sizing.actor_gpus > 0,
    )


@dataclasses.dataclass
class _Stop:
    """Whether a run ends before all is done: when a profile has its images, or at a time of `time.monotonic()`."""

    profile: int | None
    until: float | None
    was_asked: bool = False

    def is_now(self, totals: RunTotals) -> bool:
        """To be asked between two parts."""
        has_profile = self.profile is not None and totals.rows + totals.rejects >= self.profile
        is_late = self.until is not None and time.monotonic() >= self.until
        self.was_asked = is_late or bool(has_profile and totals.steady.seconds)
        return self.was_asked


def _follow(receipts: Iterator[Receipt], totals: RunTotals, pending: PendingShards, stop: _Stop) -> None:
    """Count receipts as they come, and show how far the run is."""
    started = time.monotonic()
    with progress_bar("shards", len(pending.works)) as (bar, task):
        for receipt in receipts:
            totals.add(receipt)
            if receipt.header.damage is not None:
                say(f"shard failed: {receipt.header.shard}: {' '.join(receipt.header.damage.split())}")
            rate = totals.rows / (time.monotonic() - started)
            finished = totals.shards_done + totals.shards.failed
            bar.update(task, completed=finished, rate=f"{rate:,.0f} images/s, {totals.rejects:,} rejects")
            if stop.is_now(totals):
                return


def _clean_up(
    recipe: ExtractRecipe, source: Store, table: Store, pending: PendingShards, with_prune: bool
) -> int:
    """Remove parts that are superseded, and if asked those of shards that are gone; how many of the latter."""
    from engine.shards.kinds import open_reader
    from engine.tables import prune, sweep, table_progress

    reader = open_reader(recipe.source, recipe.limits.max_sample_bytes)
    swept = sweep(table, lambda path: _version_now(reader, source, path))
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
    recipe: ExtractRecipe,
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
