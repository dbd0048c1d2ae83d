"""The finetune job: image shards, a backbone and a head in; new weights and their bundle out.

engine finetune RECIPE            or   ray job submit --working-dir . -- python jobs/finetune.py RECIPE
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from engine.config import Config
from engine.errors import NotBetter
from engine.finetuning.kinds import FinetuneOutput, FinetuneSettings
from engine.shards.kinds import SourceConfig
from engine.storage import StorageConfig, Uri
from jobs.outcome import Outcome, new_run_id, progress_bar, say

if TYPE_CHECKING:
    from engine.extraction import ExtractJob
    from engine.sizing import Machines
    from engine.worklist import WorkList


class BundleInput(Config):
    """The bundle whose head is trained further."""

    uri: Uri
    """Its folder."""


class FinetuneCompute(Config):
    """What runs beside the training workers."""

    decode_tasks: int | None = Field(default=None, ge=1, le=4096)
    """Shard readers that run at once, before training begins; null: one per CPU core that no worker has, at least 1."""
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


def run(recipe: FinetuneRecipe) -> Outcome:
    """Fine-tune on training workers under Ray Train, the first of which publishes."""
    from engine.cluster_head import joins_cluster
    from engine.on_ray import machines_of_cluster, ray_session, run_training
    from engine.sizing import share_of_workers
    from engine.this_machine import machines_here

    run_id = new_run_id("finetune")
    works = _look(recipe)
    say(f"finetune: {len(works):,} shards of {recipe.source.uri} ({sum(works.sizes) / 1e6:,.1f} MB)")
    workers, here = recipe.strategy.workers, machines_here()
    cpus_here = max(here.cpus, workers)
    readers = recipe.compute.decode_tasks or max(1, int(here.cpus) - 1)
    # Ray Train's own controller takes part of a core; readers are done before training begins.
    with ray_session(None, local_cpus=cpus_here + 1 + readers):
        machines = machines_of_cluster()
        if joins_cluster(None):
            machines = _without_a_core_each(machines)
            share = share_of_workers(recipe.strategy, machines)
            left = machines.cpus + machines.nodes - workers * share.cpus
            readers = recipe.compute.decode_tasks or max(1, int(left))
        else:
            share = share_of_workers(recipe.strategy, machines)
            share = dataclasses.replace(share, cpus=min(share.cpus, max(1.0, cpus_here // workers)))
        if not share.fits:
            say(f"there is no room for {workers} workers now; waiting for the cluster to grow")
        with progress_bar("epochs", recipe.training.epochs) as (bar, task):

            def show(epoch: dict[str, Any]) -> None:
                total = epoch["epochs"]
                done = 0 if epoch["phase"] == "reading" else epoch["epoch"]
                bar.update(
                    task, description=epoch["phase"], completed=done, total=total, rate=_figures(epoch)
                )

            body = functools.partial(finetune_on_worker, recipe, works, readers)
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
    recipe: FinetuneRecipe, works: WorkList, readers: int, report: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """Body of a training worker: have the images decoded, fine-tune, publish; summary, and what there is to say.

    None: another worker has it.
    """
    from engine.finetuning.images import collect_images
    from engine.heads.bundle import open_bundle
    from engine.on_ray import run_read
    from engine.plan import read_tasks
    from engine.storage import open_store
    from jobs.fit import warnings_of

    report({"phase": "reading", "epoch": 0, "epochs": recipe.training.epochs})
    groups = read_tasks(works, readers)
    rows = run_read(_job(recipe), groups, readers)
    shards = [work.shard.path for work in works]
    with (
        warnings_of("engine.training", "engine.finetuning") as notes,
        collect_images(rows, shards, recipe.backbone.input_size) as images,
    ):
        from engine.finetuning.finetune import finetune_backbone  # only now: it imports TensorFlow

        bundle = open_bundle(open_store(recipe.bundle.uri, recipe.storage)) if recipe.bundle else None
        found = finetune_backbone(
            images,
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


def _job(recipe: FinetuneRecipe) -> ExtractJob:
    """Reading is extraction's; of the rest of it nothing is used."""
    from engine.extraction import ExtractJob, default_rows_per_part
    from engine.runtimes.kinds import TensorFlowRuntimeConfig

    return ExtractJob(
        source=recipe.source,
        storage=recipe.storage,
        backbone=recipe.backbone,
        runtime=TensorFlowRuntimeConfig(),
        limits=recipe.limits,
        table_uri=recipe.output.uri,
        dtype="float32",
        rows_per_part=default_rows_per_part(recipe.backbone.input_size),
        decode_threads=recipe.compute.decode_threads,
        use_gpu=True,  # nothing else computes meanwhile, so that decoding need not give way
    )


def plan(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What `run` would do, from validation, listings and the network's layers; touches nothing."""
    from engine.backbones.kinds import built_without_weights
    from engine.finetuning.unfreeze import unfreeze

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded: nothing is computed
    works = _look(recipe)
    network = built_without_weights(recipe.backbone)
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
        "strategy": recipe.strategy.kind,
        "workers": recipe.strategy.workers,
        "bundle": recipe.output.uri,
    }


def _look(recipe: FinetuneRecipe) -> WorkList:
    """The shards; refuses what is known to be wrong before Ray starts."""
    from engine.errors import LabelError, ObjectNotFound
    from engine.finetuning.kinds import require_whole_network
    from engine.heads.bundle import open_bundle
    from engine.shards.kinds import open_reader
    from engine.storage import open_store
    from engine.worklist import ShardWork, WorkList

    require_whole_network(recipe.backbone)
    if recipe.labels.uri is None and recipe.source.label is None:
        raise LabelError(
            "labels: the images have none",
            found="neither source.label nor labels.uri",
            way_out="name the member or column that holds the label as source.label, or a label file as labels.uri",
        )
    if recipe.bundle is not None:
        open_bundle(open_store(recipe.bundle.uri, recipe.storage))
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
    return works


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
