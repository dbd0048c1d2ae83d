"""What a run tells of itself in numbers: the list of all metrics, and a plain recorder that an adapter empties.

The driver counts from receipts as they come, and a receipt that comes twice counts once, so a task that Ray runs again
is not counted twice. Labels are bounded: verbs, stages, reasons, names of errors; never keys, shards or tables' URIs.
Not for: sending them anywhere (`engine.on_ray`), or logs (`engine.log_lines`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

EXPORTED_PREFIX = "ray_"  # Ray puts it before every name that it exports
OBSERVATIONS_KEPT = 10_000  # that nobody has taken yet; where nobody takes them the latest stay


class Kind(StrEnum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: with its unit, as Prometheus wants it; what is scraped begins with EXPORTED_PREFIX besides.
        says: one sentence, which the metrics page shows.
        labels: besides `verb`, the command that was given.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Kind
    says: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


IMAGES = Metric("engine_images_total", Kind.COUNTER, "Images that became rows or rejects.")
REJECTS = Metric("engine_rejects_total", Kind.COUNTER, "Images that became rejects.", ("reason",))
ROWS = Metric("engine_rows_total", Kind.COUNTER, "Rows in committed parts.", ("table",))
PARTS = Metric("engine_parts_written_total", Kind.COUNTER, "Committed parts.", ("table",))
READ_BYTES = Metric(
    "engine_read_bytes_total",
    Kind.COUNTER,
    "Bytes read to make a table: of shards for embeddings, the size of embedding parts for predictions.",
    ("table",),
)
STAGE_SECONDS = Metric(
    "engine_stage_seconds_total",
    Kind.COUNTER,
    "Seconds that a stage was busy with parts that are committed, over all workers.",
    ("stage",),
)
PART_SECONDS = Metric(
    "engine_part_seconds",
    Kind.HISTOGRAM,
    "Seconds that a stage was busy with one part (scoring: with one item of several).",
    ("stage",),
    (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)
SHARDS_DONE = Metric("engine_shards_done_total", Kind.COUNTER, "Shards that were completed.")
SHARDS_FAILED = Metric(
    "engine_shards_failed_total", Kind.COUNTER, "Shards that could not be read to their end."
)
SHARDS_PENDING = Metric("engine_shards_pending", Kind.GAUGE, "Shards that this run has still to complete.")
PARTS_PENDING = Metric(
    "engine_parts_pending", Kind.GAUGE, "Embedding parts that this run has still to score."
)
REJECT_RATIO = Metric("engine_run_reject_ratio", Kind.GAUGE, "Rejects of this run by its images, 0 to 1.")
EPOCHS = Metric(
    "engine_epochs_total",
    Kind.COUNTER,
    "Epochs that were trained; one that is done again after a worker was lost counts twice.",
)
EPOCH_LOSS = Metric("engine_epoch_loss", Kind.GAUGE, "Loss of the last epoch.", ("split",))
IN_PROGRESS = Metric("engine_run_in_progress", Kind.GAUGE, "1 while a run is under way, 0 at its end.")
STARTED = Metric("engine_run_start_timestamp_seconds", Kind.GAUGE, "When this run began.")
PROGRESS = Metric(
    "engine_progress_timestamp_seconds", Kind.GAUGE, "When this run last got on: a part, an epoch, a table."
)
DEADLINE = Metric("engine_deadline_timestamp_seconds", Kind.GAUGE, "When this run stops, done or not.")
LAST_SUCCESS = Metric(
    "engine_last_success_timestamp_seconds", Kind.GAUGE, "When a run ended with exit code 0."
)
LAST_FINISHED = Metric(
    "engine_last_finished_timestamp_seconds",
    Kind.GAUGE,
    "When a run came to its end: exit code 0, or 3 where its work was done and judged.",
)
RUNS = Metric(
    "engine_runs_total",
    Kind.COUNTER,
    "Runs that ended: done, judged (exit code 3), interrupted, refused (2), failed (1); and the error's class.",
    ("outcome", "error"),
)
GATE_DECISIONS = Metric(
    "engine_gate_decisions_total",
    Kind.COUNTER,
    "Tables of a night that the gate let pass or held.",
    ("decision",),
)
HELD_PARTS = Metric(
    "engine_held_parts", Kind.GAUGE, "Prediction parts held back, of all tables of this night."
)
LEASE_HELD = Metric("engine_lease_held", Kind.GAUGE, "1 while this run has the lease, 0 once it has lost it.")
LEASE_AGE = Metric(
    "engine_lease_age_ratio",
    Kind.GAUGE,
    "Time since the lease was renewed by its lifetime: a third at most where all is well, lost at 1.",
)

METRICS = tuple(metric for metric in list(globals().values()) if isinstance(metric, Metric))


@dataclass(frozen=True)
class Change:
    """What is to be handed on of one metric.

    Attributes:
        value: of a counter what is to be added, of a gauge what it is now, of a histogram one observation.
    """

    metric: Metric
    labels: Mapping[str, str]
    value: float


_Series = tuple[Metric, tuple[tuple[str, str], ...]]


class RunMetrics:
    """The numbers of one run, kept until somebody takes them; may be used by several threads.

    Args:
        verb: the command that was given, the label of all of them.
    """

    def __init__(self, verb: str) -> None:
        self._verb, self._lock = verb, threading.Lock()
        self._totals: dict[_Series, float] = {}
        self._taken: dict[_Series, float] = {}
        self._gauges: dict[_Series, float] = {}
        self._looks: dict[_Series, Callable[[], float]] = {}
        self._observations = deque[tuple[_Series, float]](maxlen=OBSERVATIONS_KEPT)

    def count(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        series = self._series(metric, Kind.COUNTER, labels)
        with self._lock:
            self._totals[series] = self._totals.get(series, 0.0) + amount

    def reach(self, metric: Metric, total: float, **labels: str) -> None:
        """Bring a counter up to a total of this run, which never falls."""
        series = self._series(metric, Kind.COUNTER, labels)
        with self._lock:
            self._totals[series] = max(total, self._totals.get(series, 0.0))

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Say what a gauge is now."""
        series = self._series(metric, Kind.GAUGE, labels)
        with self._lock:
            self._gauges[series] = value

    def ends_by(self, moment: float) -> None:
        """Say when this run is ended, done or not, in seconds since 1970; of several such moments the first counts."""
        series = self._series(DEADLINE, Kind.GAUGE, {})
        with self._lock:
            self._gauges[series] = min(moment, self._gauges.get(series, moment))

    def follow(self, metric: Metric, look: Callable[[], float], **labels: str) -> None:
        """Say where to look for a gauge each time it is handed on."""
        series = self._series(metric, Kind.GAUGE, labels)
        with self._lock:
            self._looks[series] = look

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        series = self._series(metric, Kind.HISTOGRAM, labels)
        with self._lock:
            self._observations.append((series, value))

    def wrote(self, table: str, rows: int, parts: int = 1) -> None:
        """Count parts of a kind of table, and their rows."""
        self.count(ROWS, rows, table=table)
        self.count(PARTS, parts, table=table)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Count one part's busy seconds, by stage; a stage that had nothing to do with it is left out."""
        for stage, busy in seconds.items():
            if busy:
                self.count(STAGE_SECONDS, busy, stage=stage)
                self.observe(PART_SECONDS, busy, stage=stage)

    def get_on(self) -> None:
        """Note that the run got on, now."""
        self.set(PROGRESS, time.time())

    def changes(self) -> list[Change]:
        """What counters and histograms got since this was asked last, and all gauges."""
        with self._lock:
            looks = dict(self._looks)
        seen = {series: look() for series, look in looks.items()}  # without the lock: it may ask others
        with self._lock:
            self._gauges |= seen
            found = [
                (series, total - self._taken.get(series, 0.0))
                for series, total in self._totals.items()
                if total > self._taken.get(series, 0.0)
            ]
            found += self._gauges.items()
            found += self._observations
            self._taken |= self._totals
            self._observations.clear()
        return [Change(metric, dict(labels), value) for (metric, labels), value in found]

    def _series(self, metric: Metric, kind: Kind, labels: Mapping[str, str]) -> _Series:
        if metric.kind is not kind or set(labels) != set(metric.labels):
            raise TypeError(
                f"{metric.name} is a {metric.kind} with the labels {metric.labels}, not {kind} {labels}"
            )
        return metric, tuple(sorted({"verb": self._verb, **labels}.items()))
