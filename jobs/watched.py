"""A job run as an operator wants it: counted while it runs, and its end kept beside what it made.

Not for: what a job does, or what a person reads while it runs (`jobs.outcome`).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from engine import __version__, run_metrics
from engine.errors import (
    EXIT_BAD_RECIPE,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_JUDGED,
    ClusterError,
    EngineError,
    RecipeError,
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


# Seconds for which whoever started this process surely lets it run; `engine manifest` writes it into the head's pod.
ENDED_AFTER = "ENGINE_ENDED_AFTER_SECONDS"


class Job(Protocol):
    """A module of `jobs/` with a verb's name."""

    def run(self, recipe: Any, *, as_run: Run, **options: Any) -> Outcome:
        """The whole of it."""

    def stores(self, recipe: Any) -> Sequence[Store]:
        """What it makes: tables, or a bundle."""

    def cluster_address(self, recipe: Any) -> str | None:
        """The recipe's, None where it leaves that to the environment."""


def run_watched(
    verb: str,
    job: Job,
    recipe: Any,
    run_id: str,
    options: Mapping[str, Any],
    command: str | None = None,
) -> Outcome:
    """Run a job; what it raises is raised, after it has been counted and kept.

    Args:
        command: as of `Run`.
    """
    ended_after_s = _ended_after_s()
    stores, metrics, began = job.stores(recipe), RunMetrics(verb), time.time()
    metrics.set(run_metrics.IN_PROGRESS, 1)
    metrics.set(run_metrics.STARTED, began)
    if ended_after_s is not None:
        metrics.ends_by(began + ended_after_s)
    metrics.get_on()
    outcome: Outcome | None = None
    ended: BaseException | None = None
    with ExitStack() as ends:
        run = Run(run_id, metrics, ends, command)
        try:
            outcome = job.run(recipe, as_run=run, **options)
            ended = outcome.verdict
        except BaseException as error:
            ended = error
            raise
        finally:
            _keep(stores, _record(verb, run_id, began, ended, outcome))
            _count_end(metrics, ended, has_judged=outcome is not None)
            if not isinstance(ended, ClusterError):  # then there is nobody to tell
                _connect(run, job.cluster_address(recipe))
    return outcome


def _ended_after_s() -> float | None:
    """What the environment says, None where it says nothing.

    Raises:
        RecipeError: it is no number of seconds.
    """
    text = os.environ.get(ENDED_AFTER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RecipeError(
            f"{ENDED_AFTER}: no number of seconds",
            found=repr(text),
            wanted="for example 41400",
            way_out="correct it where the process is started, or unset it: it only tells when an alert is due",
        )
    return seconds


def _connect(run: Run, address: str | None) -> None:
    """To tell how a run ended that did not come to connect to its cluster.

    Not before the run: when the driver of a submitted job connects, Ray's agents unpack the job's files, and where
    several are on one machine, over each other's, so that nothing can be imported for a while (Ray 2.60).
    """
    from engine.cluster_head import joins_cluster

    if not joins_cluster(address):
        return
    from engine.on_ray import ray_session

    try:
        with ray_session(address, 0, run.metrics, run.ends):
            pass
    except ClusterError as error:
        say(f"how the run ended is not in the metrics: {error.thing}", logging.WARNING)


def _count_end(metrics: RunMetrics, ended: BaseException | None, has_judged: bool) -> None:
    """What is judged has an outcome; who was refused at the door with the same exit code has none."""
    code, now = exit_code_of(ended), time.time()
    error = "none" if ended is None else type(ended).__name__
    metrics.count(run_metrics.RUNS, outcome=OUTCOMES[code], error=error)
    metrics.set(run_metrics.IN_PROGRESS, 0)
    if code == EXIT_DONE or (code == EXIT_JUDGED and has_judged):
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


def error_facts(ended: BaseException) -> dict[str, Any]:
    """What is kept of an error: its kind, and its parts."""
    error: dict[str, Any] = {"thing": "interrupted" if isinstance(ended, KeyboardInterrupt) else str(ended)}
    if isinstance(ended, EngineError):
        error = {name: getattr(ended, name) for name in ("thing", "found", "wanted", "way_out")}
    return {"kind": type(ended).__name__, **error}


def _record(
    verb: str, run_id: str, began: float, ended: BaseException | None, outcome: Outcome | None
) -> dict[str, Any]:
    """What is kept of the run: its end for whoever was not there, and the summary that it came to."""
    return {
        "verb": verb,
        "run_id": run_id,
        "engine_version": __version__,
        "began": utc(began),
        "ended": utc(time.time()),
        "exit_code": exit_code_of(ended),
        "outcome": OUTCOMES[exit_code_of(ended)],
        "error": None if ended is None else error_facts(ended),
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


def utc(moment: float) -> str:
    """Seconds since 1970 as a record spells them."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
