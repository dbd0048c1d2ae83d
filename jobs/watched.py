"""A job run as an operator wants it: counted while it runs, and its end kept beside what it made.

Not for: what a job does, or what a person reads while it runs (`jobs.outcome`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from engine import __version__, run_metrics
from engine.errors import (
    EXIT_BAD_RECIPE,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_JUDGED,
    EngineError,
    StorageError,
)
from engine.run_metrics import RunMetrics
from jobs.outcome import Outcome, Run, say

if TYPE_CHECKING:
    from engine.storage import Store

OUTCOMES = {
    EXIT_DONE: "done",
    EXIT_FAILED: "failed",
    EXIT_BAD_RECIPE: "refused",
    EXIT_JUDGED: "judged",
    EXIT_INTERRUPTED: "interrupted",
}


class Job(Protocol):
    """A module of `jobs/` with a verb's name."""

    def run(self, recipe: Any, *, as_run: Run, **options: Any) -> Outcome:
        """The whole of it."""

    def stores(self, recipe: Any) -> Sequence[Store]:
        """What it makes: tables, or a bundle."""

    def cluster_address(self, recipe: Any) -> str | None:
        """The recipe's, None where it leaves that to the environment."""


def run_watched(verb: str, job: Job, recipe: Any, run_id: str, options: Mapping[str, Any]) -> Outcome:
    """Run a job; what it raises is raised, after it has been counted and kept.

    In a cluster one session spans the run, so that its last numbers leave with it. A local Ray has nobody who would
    scrape it: there the record has to do.
    """
    stores, metrics, began = job.stores(recipe), RunMetrics(verb), time.time()
    metrics.set(run_metrics.IN_PROGRESS, 1)
    metrics.set(run_metrics.STARTED, began)
    metrics.get_on()
    outcome: Outcome | None = None

    def count_end(_kind: object, error: BaseException | None, _trace: object) -> None:
        _count_end(metrics, _verdict(error, outcome))

    def keep(_kind: object, error: BaseException | None, _trace: object) -> None:
        _keep(stores, _record(verb, run_id, began, _verdict(error, outcome), outcome))

    with contextlib.ExitStack() as stack:
        stack.push(keep)
        stack.enter_context(_exported(job.cluster_address(recipe), metrics))
        stack.push(count_end)
        outcome = job.run(recipe, as_run=Run(run_id, metrics), **options)
    return outcome


def _verdict(error: BaseException | None, outcome: Outcome | None) -> BaseException | None:
    """What decides the exit code."""
    return outcome.verdict if error is None and outcome is not None else error


@contextlib.contextmanager
def _exported(address: str | None, metrics: RunMetrics) -> Iterator[None]:
    from engine.cluster_head import joins_cluster

    if not joins_cluster(address):
        yield
        return
    from engine.on_ray import metrics_exported, ray_session

    with ray_session(address, local_cpus=0), metrics_exported(metrics):
        yield


def _count_end(metrics: RunMetrics, ended: BaseException | None) -> None:
    code, now = exit_code_of(ended), time.time()
    error = "none" if ended is None else type(ended).__name__
    metrics.count(run_metrics.RUNS, outcome=OUTCOMES[code], error=error)
    metrics.set(run_metrics.IN_PROGRESS, 0)
    if code in (EXIT_DONE, EXIT_JUDGED):
        metrics.set(run_metrics.LAST_FINISHED, now)
    if code == EXIT_DONE:
        metrics.set(run_metrics.LAST_SUCCESS, now)


def exit_code_of(ended: BaseException | None) -> int:
    """The exit code of a command that ended with this error, or with none."""
    if ended is None:
        return EXIT_DONE
    if isinstance(ended, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return ended.exit_code if isinstance(ended, EngineError) else EXIT_FAILED


def _record(
    verb: str, run_id: str, began: float, ended: BaseException | None, outcome: Outcome | None
) -> dict[str, Any]:
    """What is kept of the run: its end for whoever was not there, and the summary that it came to."""
    error: dict[str, Any] | None = None
    if isinstance(ended, EngineError):
        error = {name: getattr(ended, name) for name in ("thing", "found", "wanted", "way_out")}
    elif ended is not None:
        error = {"thing": "interrupted" if isinstance(ended, KeyboardInterrupt) else str(ended)}
    return {
        "verb": verb,
        "run_id": run_id,
        "engine_version": __version__,
        "began": _utc(began),
        "ended": _utc(time.time()),
        "exit_code": exit_code_of(ended),
        "outcome": OUTCOMES[exit_code_of(ended)],
        "error": None if ended is None else {"kind": type(ended).__name__, **(error or {})},
        "summary": None if outcome is None else outcome.summary,
    }


def _keep(stores: Sequence[Store], record: dict[str, Any]) -> None:
    """Beside what is there already: a run that failed leaves nothing where nothing was, and one refused no trace."""
    from engine.run_record import keep_run

    if record["exit_code"] == EXIT_BAD_RECIPE:
        return
    for store in stores:
        try:
            if record["summary"] is not None or next(iter(store.names()), None) is not None:
                keep_run(store, record["run_id"], record)
        except StorageError as error:
            say(f"the run's record is not kept at {store.uri}: {error.thing}", logging.WARNING)


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
