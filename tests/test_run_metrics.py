"""What a run tells of itself in numbers: names as Prometheus wants them, and nothing counted twice."""

from __future__ import annotations

import re

import pytest

from engine import run_metrics
from engine.run_metrics import METRICS, Kind, RunMetrics


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_named_as_prometheus_wants_it(metric: run_metrics.Metric) -> None:
    assert re.fullmatch(r"engine_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert metric.name.endswith("_seconds") or metric.kind is not Kind.HISTOGRAM
    assert metric.says.endswith(".")
    assert not {"key", "shard", "uri", "run_id"} & set(metric.labels), "labels are bounded"


def told(metrics: RunMetrics) -> list[tuple[str, dict[str, str], float]]:
    return [(change.metric.name, dict(change.labels), change.value) for change in metrics.changes()]


def test_a_counter_hands_on_what_came_since_it_was_asked_last() -> None:
    metrics = RunMetrics("extract")
    metrics.count(run_metrics.IMAGES, 5)
    metrics.count(run_metrics.IMAGES, 7)
    metrics.count(run_metrics.REJECTS, 3, reason="no_image")
    assert told(metrics) == [
        ("engine_images_total", {"verb": "extract"}, 12.0),
        ("engine_rejects_total", {"verb": "extract", "reason": "no_image"}, 3.0),
    ]
    assert told(metrics) == []
    metrics.count(run_metrics.IMAGES, 2)
    assert told(metrics) == [("engine_images_total", {"verb": "extract"}, 2.0)]


def test_a_counter_that_is_brought_up_to_a_total_counts_each_step_once() -> None:
    metrics = RunMetrics("extract")
    for total in (3, 3, 2, 5):
        metrics.reach(run_metrics.SHARDS_DONE, total)
    assert [value for _, _, value in told(metrics)] == [5.0]
    metrics.reach(run_metrics.SHARDS_DONE, 5)
    assert told(metrics) == []


def test_a_gauge_is_handed_on_each_time_since_an_agent_forgets_it() -> None:
    metrics, ages = RunMetrics("nightly"), iter([0.25, 0.5])
    metrics.set(run_metrics.SHARDS_PENDING, 11)
    metrics.follow(run_metrics.LEASE_AGE, lambda: next(ages))
    for age in (0.25, 0.5):
        assert told(metrics) == [
            ("engine_shards_pending", {"verb": "nightly"}, 11),
            ("engine_lease_age_ratio", {"verb": "nightly"}, age),
        ]


def test_of_two_ends_of_a_run_the_first_counts() -> None:
    metrics = RunMetrics("nightly")
    for moment, first in ((1700.0, 1700.0), (1900.0, 1700.0), (1300.0, 1300.0)):
        metrics.ends_by(moment)
        assert told(metrics) == [("engine_deadline_timestamp_seconds", {"verb": "nightly"}, first)]


def test_busy_stages_are_a_sum_and_a_distribution_and_idle_ones_nothing() -> None:
    metrics = RunMetrics("score")
    metrics.stages({"read": 0.25, "write": 0.0})
    metrics.stages({"read": 0.5, "write": 0.0})
    labels = {"verb": "score", "stage": "read"}
    assert told(metrics) == [
        ("engine_stage_seconds_total", labels, 0.75),
        ("engine_part_seconds", labels, 0.25),
        ("engine_part_seconds", labels, 0.5),
    ]


def test_observations_that_nobody_takes_do_not_fill_the_memory() -> None:
    metrics = RunMetrics("extract")
    for number in range(run_metrics.OBSERVATIONS_KEPT + 7):
        metrics.observe(run_metrics.PART_SECONDS, float(number), stage="read")
    found = metrics.changes()
    assert (len(found), found[0].value) == (run_metrics.OBSERVATIONS_KEPT, 7.0)


def test_a_label_that_the_metric_has_not_got_is_refused() -> None:
    metrics = RunMetrics("extract")
    with pytest.raises(TypeError, match="engine_rejects_total"):
        metrics.count(run_metrics.REJECTS, 1, shard="a.tar")
    with pytest.raises(TypeError, match="engine_images_total"):
        metrics.set(run_metrics.IMAGES, 1)
