"""The fit job: an embedding table and labels in, a published bundle out.

engine fit RECIPE            or   ray job submit --working-dir . -- python jobs/fit.py RECIPE
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import run_metrics
from engine.config import Config
from engine.errors import LabelError
from engine.run_metrics import RunMetrics
from engine.storage import StorageConfig, Uri
from engine.training.kinds import FitOutput, FitSettings
from jobs.outcome import Outcome, Run, progress_bar, say

if TYPE_CHECKING:
    from engine.storage import Store
    from engine.tables import Table


# 2.0 GB of rows took 7.2 GB of a worker's memory (and 1.5 GB from the disk; 397,312 x 1280, 2026-11-23): as they are
# read, TensorFlow's copy and what making it takes; standardised ones are one more.
COPIES_IN_MEMORY = 5


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


def run(recipe: FitRecipe, *, as_run: Run | None = None) -> Outcome:
    """Fit on training workers under Ray Train, the first of which publishes the bundle.

    Args:
        as_run: None: one of its own, whose numbers nobody asks for.
    """
    from engine.cluster_head import joins_cluster
    from engine.on_ray import machines_of_cluster, ray_session, run_training
    from engine.sizing import share_of_workers, share_of_workers_here
    from engine.this_machine import machines_here

    as_run = as_run or Run.new("fit")
    run_id, metrics = as_run.run_id, as_run.metrics
    table, columns = _look(recipe)
    say(f"fit: {len(table.parts):,} parts of {recipe.embeddings.uri}")
    if table.incomplete_shards:
        say(
            f"{table.incomplete_shards:,} shards of the table are not complete; their rows so far are used",
            logging.WARNING,
        )
    workers = recipe.strategy.workers
    cpus_here = max(machines_here().cpus, workers)
    # Ray Train's own controller takes part of a core.
    with ray_session(None, cpus_here + 1, metrics, as_run.ends):
        machines = machines_of_cluster()
        if joins_cluster(None):
            share = share_of_workers(recipe.strategy, machines)
        else:
            share = share_of_workers_here(recipe.strategy, machines, cpus_here)
        if not share.fits:
            say(f"the cluster has no room for {workers} workers now; waiting for it to grow")
        with progress_bar("epochs", recipe.training.epochs) as (bar, task):

            def show(epoch: dict[str, Any]) -> None:
                measure_epoch(epoch, metrics)
                bar.update(task, completed=epoch["epoch"], rate=_figures(epoch))

            answer = run_training(functools.partial(fit_on_worker, recipe, columns), show, workers, share)
    for note in answer["notes"]:
        say(f"note: {note}")
    return Outcome({"verb": "fit", "run_id": run_id, **answer["summary"]})


def stores(recipe: FitRecipe) -> list[Store]:
    """What the job makes: a bundle."""
    from engine.storage import open_store

    return [open_store(recipe.output.uri, recipe.storage)]


def cluster_address(_recipe: FitRecipe) -> str | None:
    """The environment's."""
    return None


def measure_epoch(epoch: dict[str, Any], metrics: RunMetrics) -> None:
    """Count a trained epoch for whoever watches the run."""
    metrics.get_on()
    metrics.count(run_metrics.EPOCHS)
    for split in ("train", "validation"):
        if epoch[f"{split}_loss"] is not None:
            metrics.set(run_metrics.EPOCH_LOSS, epoch[f"{split}_loss"], split=split)


def _figures(epoch: dict[str, Any]) -> str:
    """What the progress bar says of an epoch."""
    if epoch["validation_loss"] is None:
        return f"train loss {epoch['train_loss']:.4f}"
    return f"validation loss {epoch['validation_loss']:.4f}, accuracy {epoch['validation_accuracy']:.3f}"


def fit_on_worker(
    recipe: FitRecipe, columns: list[str], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """Body of a training worker: read the table, fit, publish; the fit's summary, and what it had to say.

    None: another worker has it.
    """
    from engine.pictures import documents_of_samples
    from engine.storage import open_store
    from engine.tables import open_table
    from engine.training.fit import fit_head
    from engine.training.rows import RowSource

    table = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    bundle_store = open_store(recipe.output.uri, recipe.storage)
    with warnings_of("engine.training", "engine.pictures", "engine.heads") as notes:
        summary = fit_head(
            table.read(columns),
            table.record,
            recipe,
            recipe.storage,
            bundle_store,
            report,
            RowSource(
                lambda: (part["embedding"] for part in table.read_by_part(["embedding"])),
                functools.partial(_wants_disk, recipe.training.rows, recipe.strategy.workers),
                Path(tempfile.gettempdir()),
            ),
            look=lambda wanted: documents_of_samples(table, wanted, recipe.report.pictures),
        )
    return None if summary is None else {"summary": dict(summary), "notes": notes}


def _wants_disk(choice: str, workers: int, size: int) -> bool:
    """Whether so many bytes of rows are better held in a file; other workers may be on the same machine."""
    from engine.this_machine import free_memory

    return choice == "disk" or (choice == "auto" and COPIES_IN_MEMORY * size > free_memory() / (2 * workers))


@contextmanager
def warnings_of(*logger_names: str) -> Iterator[list[str]]:
    """Collect the texts of some loggers' warnings: a worker's log is not where the person looks."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in logger_names]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield texts
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def plan(recipe: FitRecipe) -> dict[str, Any]:
    """What `run` would do, from validation, listings and one footer; touches nothing."""
    from engine.training.grid import candidates

    table, _ = _look(recipe)
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
        "heads_to_try": len(candidates(recipe)),
        "strategy": recipe.strategy.kind,
        "workers": recipe.strategy.workers,
        "bundle": recipe.output.uri,
    }


def _look(recipe: FitRecipe) -> tuple[Table, list[str]]:
    """The table, and the columns to read; refuses what is known to be wrong before Ray starts."""
    from engine.heads.side_features import side_columns
    from engine.storage import open_store
    from engine.tables import open_table
    from engine.training.grid import candidates

    candidates(recipe)  # refuses a grid that is too large
    table = open_table(open_store(recipe.embeddings.uri, recipe.storage))
    next(
        iter(open_store(recipe.output.uri, recipe.storage).list()), None
    )  # a file, a missing bucket, no rights
    there = table.column_names()
    columns = ["key", "shard", "index"]
    wanted = [name for name in (recipe.split.column, recipe.split.group) if name]
    if recipe.labels.uri is None:
        columns += [recipe.labels.label, *wanted, *side_columns(recipe.side_features)]
    else:  # what is not here must be in the label file
        wanted += side_columns(recipe.side_features)
        columns += [name for name in wanted if name in there]
        columns += [recipe.labels.otherwise] if recipe.labels.otherwise else []
    require_columns(
        table, columns, "labels.label, labels.otherwise, split.column, split.group or side_features"
    )
    return table, list(dict.fromkeys(columns))


def require_columns(table: Table, columns: list[str], wanted_by: str) -> None:
    """Refuse a table without some columns.

    Raises:
        LabelError: with their names, and what the table has.
    """
    there = table.column_names()
    absent = [column for column in columns if column not in there]
    if absent:
        raise LabelError(
            f"{table.store.uri}: no column {', '.join(absent)}",
            found=", ".join(there),
            way_out=f"correct {wanted_by}; labels may also come from a file, as labels.uri",
        )


if __name__ == "__main__":
    from jobs.cli import main

    sys.exit(main(["fit", *sys.argv[1:]]))
