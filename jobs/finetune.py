"""The finetune job: image shards, a backbone and a head in; new weights and their bundle out.

engine finetune RECIPE            or   ray job submit --working-dir . -- python jobs/finetune.py RECIPE
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from engine.config import Config
from engine.errors import ClusterError, LabelError, NotBetter
from engine.finetuning.kinds import FinetuneOutput, FinetuneSettings
from engine.shards.kinds import SourceConfig
from engine.storage import StorageConfig, Uri
from jobs.fit import measure_epoch
from jobs.outcome import Outcome, Run, progress_bar, say

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.extraction import ExtractJob
    from engine.sizing import Machines, WorkerShare
    from engine.storage import Store
    from engine.worklist import WorkList

TOLD_S = 60.0  # how often a worker says that images are still being read


class BundleInput(Config):
    """The bundle whose head is trained further."""

    uri: Uri
    """Its folder."""


class FinetuneCompute(Config):
    """What runs beside the training workers."""

    decode_tasks: int | None = Field(default=None, ge=1, le=4096)
    """Shard readers that run at once, before training begins, of all workers together; null: one per CPU core that no
    worker has. At least one for each worker, which has its own: they read what it has to hold (`training.images`)."""
    decode_threads: int = Field(default=2, ge=1, le=256)
    """Threads that decode images in each reader."""


class FinetuneRecipe(FinetuneSettings):
    """Recipe of `finetune`: image shards and a backbone in, new weights and their bundle out."""

    source: SourceConfig
    """The archive of images, and what a sample of it holds."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    bundle: BundleInput | None = None
    """The head to begin with, fitted on embeddings of this backbone; null: a new one is fitted first."""
    compute: FinetuneCompute = FinetuneCompute()
    """What runs beside the training workers."""
    output: FinetuneOutput
    """Where the new backbone and its bundle are published."""


def run(recipe: FinetuneRecipe, *, as_run: Run | None = None) -> Outcome:
    """Fine-tune on training workers under Ray Train, the first of which publishes.

    Args:
        as_run: None: one of its own, whose numbers nobody asks for.
    """
    from engine.on_ray import machines_of_cluster, ray_session, run_training
    from engine.this_machine import machines_here

    as_run = as_run or Run.new("finetune")
    run_id, metrics = as_run.run_id, as_run.metrics
    works, bundle_id = _look(recipe)
    say(f"finetune: {len(works):,} shards of {recipe.source.uri} ({sum(works.sizes) / 1e6:,.1f} MB)")
    workers, here = recipe.strategy.workers, machines_here()
    # Ray Train's own controller takes part of a core; local readers are beside workers, and done before these begin.
    with ray_session(None, 2 * max(here.cpus, workers) + 1, metrics, as_run.ends):
        share, readers = _layout(recipe, machines_of_cluster(), here.cpus)
        with progress_bar("epochs", recipe.training.epochs) as (bar, task):

            def show(epoch: dict[str, Any]) -> None:
                if epoch["phase"] == "reading":
                    metrics.get_on()
                else:
                    measure_epoch(epoch, metrics)
                total = epoch["epochs"]
                done = 0 if epoch["phase"] == "reading" else epoch["epoch"]
                bar.update(
                    task, description=epoch["phase"], completed=done, total=total, rate=_figures(epoch)
                )

            body = functools.partial(finetune_on_worker, recipe, works, bundle_id, readers)
            answer = run_training(body, show, workers, share)
    for note in answer["notes"]:
        say(f"note: {note}")
    say(f"accuracy {answer['told']}")
    summary = {"verb": "finetune", "run_id": run_id, **answer["summary"]}
    verdict = None
    if summary["bundle"] is None:
        verdict = NotBetter(
            f"finetune: nothing was published to {recipe.output.uri}, for it did not help",
            found=answer["told"],
            wanted="more right answers than before (publish: if_better)",
            way_out="unfreeze other layers, try another learning rate, or set publish: always",
        )
    return Outcome(summary, verdict)


def stores(recipe: FinetuneRecipe) -> list[Store]:
    """What the job makes: a backbone with its bundle."""
    from engine.storage import open_store

    return [open_store(recipe.output.uri, recipe.storage)]


def cluster_address(_recipe: FinetuneRecipe) -> str | None:
    """The environment's."""
    return None


def _layout(recipe: FinetuneRecipe, machines: Machines, cpus_here: float) -> tuple[WorkerShare, int]:
    """What each worker is given, and how many readers it has; in a cluster they are on other cores than the workers.

    Raises:
        RecipeError: this one machine has no room for the workers.
        ClusterError: the workers would take every core that there is, and wait for images for ever.
    """
    from engine.cluster_head import joins_cluster
    from engine.sizing import share_of_workers, share_of_workers_here

    workers = recipe.strategy.workers
    if not joins_cluster(None):
        share = share_of_workers_here(recipe.strategy, machines, cpus_here)
        return share, _each(recipe, max(1, int(cpus_here) - 1))
    share = share_of_workers(recipe.strategy, _without_a_core_each(machines))
    left = int(machines.cpus - workers * share.cpus)
    if left < 1 and share.fits:
        raise ClusterError(
            "finetune: the cluster has no core for reading images",
            found=f"{machines.cpus:g} CPUs; training workers ({workers}) take {share.cpus:g} each",
            wanted="one more at least",
            way_out="add a node" + (", or ask for fewer strategy.workers" if workers > 1 else ""),
        )
    if not share.fits:
        say(f"the cluster has no room for {workers} workers and a reader now; waiting for it to grow")
    return share, _each(recipe, max(1, left))


def _each(recipe: FinetuneRecipe, readers: int) -> int:
    """Of one worker: each has readers of its own."""
    return max(1, min(recipe.compute.decode_tasks or readers, readers) // recipe.strategy.workers)


def _without_a_core_each(machines: Machines) -> Machines:
    """Readers need one where workers would take all."""
    left = tuple(max(1.0, cpus - 1) for cpus in machines.node_cpus)
    return dataclasses.replace(machines, cpus=sum(left), largest_node_cpus=max(left), node_cpus=left)


def _figures(epoch: dict[str, Any]) -> str:
    """What the progress bar says of an epoch."""
    if epoch["phase"] == "reading":
        return "images are decoded"
    if epoch["validation_loss"] is None:
        return f"train loss {epoch['train_loss']:.4f}"
    return f"validation loss {epoch['validation_loss']:.4f}, accuracy {epoch['validation_accuracy']:.3f}"


def finetune_on_worker(
    recipe: FinetuneRecipe,
    works: WorkList,
    bundle_id: str | None,
    readers: int,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Body of a training worker: have the images decoded, fine-tune, publish; summary, and what there is to say.

    None: another worker has it.

    Args:
        bundle_id: of the bundle to begin with, so that all workers take the same one.
        readers: tasks that read for this worker at once.
    """
    from engine.backbones.kinds import built_without_weights
    from engine.finetuning.finetune import finetune_backbone
    from engine.finetuning.images import collect_images, join_images
    from engine.finetuning.unfreeze import unfreeze
    from engine.heads.bundle import open_bundle
    from engine.on_ray import run_read
    from engine.plan import read_tasks
    from engine.storage import open_store
    from engine.strategies.kinds import open_strategy
    from engine.strategies.workers import Workers
    from jobs.fit import warnings_of

    # First, though it imports TensorFlow: one worker may be done with reading long before another.
    strategy = open_strategy(recipe.strategy)
    # What this refuses is refused before images are read.
    unfreeze(built_without_weights(recipe.backbone, recipe.storage), recipe.unfreeze)
    bundle = open_bundle(open_store(recipe.bundle.uri, recipe.storage), bundle_id) if recipe.bundle else None
    report({"phase": "reading", "epoch": 0, "epochs": recipe.training.epochs})
    workers, is_split = Workers(strategy), recipe.training.images == "split"
    groups = read_tasks(_works_of_workers(recipe, works)[workers.rank], readers)
    shards = [work.shard.path for work in works]
    could_be_split = workers.count > 1 and not is_split
    reading = {"phase": "reading", "epoch": 0, "epochs": recipe.training.epochs}
    with (
        contextlib.closing(run_read(_job(recipe), groups, readers)) as rows,
        warnings_of("engine.training", "engine.finetuning", "engine.heads") as notes,
        collect_images(
            _told(rows, lambda: report(reading)),
            shards,
            recipe.backbone.input_size,
            could_be_split=could_be_split,
        ) as collected,
    ):
        found = finetune_backbone(
            strategy,
            join_images(collected, shards, workers) if is_split else collected,
            recipe,
            recipe.storage,
            bundle,
            open_store(recipe.output.uri, recipe.storage),
            report,
        )
    if found is None:
        return None
    summary, comparison = found
    return {"summary": dict(summary), "notes": notes, "told": comparison.in_words()}


def _told(rows: Iterator[pa.Table], tell: Callable[[], None]) -> Iterator[pa.Table]:
    """The rows; now and then it is told that they still come: a large archive is decoded for hours."""
    last = time.monotonic()
    for row in rows:
        if time.monotonic() - last > TOLD_S:
            tell()
            last = time.monotonic()
        yield row


def _works_of_workers(recipe: FinetuneRecipe, works: WorkList) -> list[WorkList]:
    """What each worker decodes."""
    from engine.finetuning.placement import shares_of_workers

    workers = recipe.strategy.workers
    return shares_of_workers(works, workers) if recipe.training.images == "split" else [works] * workers


def _job(recipe: FinetuneRecipe) -> ExtractJob:
    """Reading is extraction's; of the rest of it nothing is used."""
    from engine.extraction import ExtractJob, default_rows_per_part
    from engine.runtimes.kinds import TensorFlowRuntimeConfig

    return ExtractJob(
        source=recipe.source,
        storage=recipe.storage,
        backbone=recipe.backbone,
        runtime=TensorFlowRuntimeConfig(),
        limits=recipe.limits.as_of_extract(),
        table_uri=recipe.output.uri,
        dtype="float32",
        rows_per_part=default_rows_per_part(recipe.backbone.input_size),
        decode_threads=recipe.compute.decode_threads,
        use_gpu=True,  # nothing else computes meanwhile, so that decoding need not give way
    )


def plan(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What `run` would do, from validation, listings and the network's layers; touches nothing."""
    from engine.backbones.kinds import built_without_weights
    from engine.finetuning.placement import bytes_of
    from engine.finetuning.unfreeze import unfreeze
    from engine.quiet_start import quiet_start

    works, _ = _look(recipe)
    with quiet_start():
        import engine.runtimes.tensorflow  # noqa: F401  (before Keras is)
    network = built_without_weights(recipe.backbone, recipe.storage)
    unfrozen = unfreeze(network, recipe.unfreeze)
    return {
        "verb": "finetune",
        "source": recipe.source.uri,
        "shards": len(works),
        "bytes": sum(works.sizes),
        "head": recipe.bundle.uri if recipe.bundle else f"{recipe.head.kind}, fitted first",
        "layers": unfrozen.layers,
        "first_layer_that_learns": unfrozen.first,
        "trainable": unfrozen.trainable,
        "frozen": unfrozen.frozen,
        "bytes_per_image_on_disk": recipe.backbone.input_size**2 * 3,
        "images": recipe.training.images,
        "most_bytes_for_a_worker": max(bytes_of(own) for own in _works_of_workers(recipe, works)),
        "strategy": recipe.strategy.kind,
        "workers": recipe.strategy.workers,
        "bundle": recipe.output.uri,
    }


def _look(recipe: FinetuneRecipe) -> tuple[WorkList, str | None]:
    """The shards, and the id of the bundle to begin with; refuses what is known to be wrong before Ray starts."""
    from engine.errors import ObjectNotFound
    from engine.finetuning.kinds import require_learning_network, require_trainable_head
    from engine.heads.bundle import open_bundle
    from engine.shards.kinds import open_reader
    from engine.storage import open_store
    from engine.worklist import ShardWork, WorkList

    require_learning_network(recipe.backbone)
    _require_columns(recipe)
    bundle_id = None
    if recipe.bundle is not None:
        bundle = open_bundle(open_store(recipe.bundle.uri, recipe.storage))
        require_trainable_head(bundle, recipe.task)
        bundle_id = bundle.id
    next(iter(open_store(recipe.output.uri, recipe.storage).list()), None)  # a file, no bucket, no rights
    source = open_store(recipe.source.uri, recipe.storage)
    reader = open_reader(recipe.source, recipe.limits.max_sample_bytes)
    works = WorkList(
        ShardWork(shard) for shard in sorted(reader.list_shards(source), key=lambda shard: shard.path)
    )
    if not works:
        raise ObjectNotFound(
            f"{recipe.source.uri}: no shards", way_out="correct source.uri or source.pattern"
        )
    return works, bundle_id


def _require_columns(recipe: FinetuneRecipe) -> None:
    """Labels and split must be among what is read of the source, unless a label file has them.

    Raises:
        LabelError: with what there is.
    """
    columns = list(recipe.source.metadata_columns()) + (["label"] if recipe.source.label is not None else [])
    split, labels = recipe.split, recipe.labels
    wanted = [
        ("labels.label", labels.label),
        ("split.column", split.column),
        ("split.group", split.group),
    ]
    for field, name in wanted if labels.uri is None else [("labels.otherwise", labels.otherwise)]:
        if name is not None and name not in columns:
            raise LabelError(
                f"{field}: the images have no {name!r}",
                found=", ".join(columns) or "neither source.label nor source.metadata",
                way_out="name the member or column that holds the label as source.label, others in source.metadata, "
                "or a label file as labels.uri",
            )


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
