"""The fit job: an embedding table and labels in, a published bundle out.

engine fit RECIPE            or   ray job submit --working-dir . -- python jobs/fit.py RECIPE
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from engine.config import Config
from engine.recipes import Uri
from engine.storage import StorageConfig
from engine.training.kinds import FitOutput, FitSettings
from jobs.outcome import Outcome, new_run_id, say


class EmbeddingInput(Config):
    """The embedding table that a job reads."""

    uri: Uri
    """Folder of the embedding table."""


class FitRecipe(FitSettings):
    """Recipe of `fit`: an embedding table and labels in, a bundle out."""

    embeddings: EmbeddingInput
    """The rows to learn from."""
    storage: StorageConfig = StorageConfig()
    """How to reach object storage; keys come from the usual AWS environment or role."""
    output: FitOutput
    """Where the bundle is published."""


def run(recipe: FitRecipe) -> Outcome:
    """Fit on one training worker under Ray Train, which publishes the bundle."""
    from engine.on_ray import machines_here, machines_of_cluster, ray_session, run_training
    from engine.storage import open_store
    from engine.tables import open_table

    recipe = _located(recipe)
    table = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    say(f"fit: {len(table.parts):,} parts of {recipe.embeddings.uri}")
    if table.incomplete_shards:
        say(
            f"warning: {table.incomplete_shards:,} shards of the table are not complete; their rows so far are used"
        )
    cpus_here = machines_here().cpus
    with ray_session(None, local_cpus=cpus_here + 1):  # Ray Train's own controller takes part of a core
        machines = machines_of_cluster()
        gpus = _gpus_wanted(recipe, machines.largest_node_gpus)
        cpus = 1.0 if gpus else max(1.0, min(cpus_here, machines.largest_node_cpus - 1))
        summary = run_training(functools.partial(fit_on_worker, recipe), cpus, gpus)
    return Outcome({"verb": "fit", "run_id": new_run_id("fit"), **summary})


def fit_on_worker(recipe: FitRecipe) -> dict[str, Any]:
    """Body of the training worker: read the table, fit, publish; returns the fit's summary."""
    from engine.storage import open_store
    from engine.tables import open_table
    from engine.training.fit import fit_head

    table = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    rows = table.read(_columns(recipe))
    bundle_store = open_store(recipe.output.uri, recipe.storage)
    return dict(fit_head(rows, table.record, recipe, recipe.storage, bundle_store, report=lambda _: None))


def plan(recipe: FitRecipe) -> dict[str, Any]:
    """What `run` would do, from validation and listings alone; touches nothing."""
    from engine.storage import open_store
    from engine.tables import open_table

    recipe = _located(recipe)
    table = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    return {
        "verb": "fit",
        "embeddings": recipe.embeddings.uri,
        "parts": len(table.parts),
        "incomplete_shards": table.incomplete_shards,
        "embedding_bytes": sum(info.size for _, info in table.parts),
        "width": table.record["width"],
        "fingerprint": table.record["fingerprint"],
        "labels": recipe.labels.uri or f"column {recipe.labels.label!r} of the table",
        "head": recipe.head.kind,
        "strategy": recipe.strategy.kind,
        "bundle": recipe.output.uri,
    }


def _columns(recipe: FitRecipe) -> list[str]:
    """Columns of the table that a fit with this recipe reads."""
    columns = ["key", "shard", "index", "embedding"]
    if recipe.labels.uri is None:
        columns += [recipe.labels.label, *([recipe.split.column] if recipe.split.column else [])]
    return list(dict.fromkeys(columns))


def _gpus_wanted(recipe: FitRecipe, largest_node_gpus: float) -> float:
    """GPUs for the one training worker: those the strategy names, else one or all of a node; 0 where there are none."""
    if not largest_node_gpus or recipe.strategy.kind == "one_device":
        return min(1.0, largest_node_gpus)
    return float(recipe.strategy.devices_per_worker or largest_node_gpus)


def _located(recipe: FitRecipe) -> FitRecipe:
    """The recipe with every location spelled in full: the worker runs in another folder."""
    from engine.storage import open_store

    def full(uri: str) -> str:
        return open_store(uri, recipe.storage).uri

    labels = recipe.labels
    if labels.uri is not None:
        labels = labels.model_copy(update={"uri": full(labels.uri)})
    return recipe.model_copy(
        update={
            "embeddings": EmbeddingInput(uri=full(recipe.embeddings.uri)),
            "labels": labels,
            "output": FitOutput(uri=full(recipe.output.uri)),
        }
    )


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["fit", *sys.argv[1:]]))
