"""A job as an operator wants it: however it ends, its record says so, and is kept only where something is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.errors import HeldBack, NotBetter, RecipeError, ShardsFailed
from engine.run_metrics import RunMetrics
from engine.storage import Store, open_store
from jobs.outcome import Outcome, Run
from jobs.watched import _count_end, run_watched

RUN_ID = "extract-20260101T000000Z-0a1b"


@dataclass(frozen=True)
class JobThatEnds:
    """A job with nothing to do but to end in some way."""

    table: Store
    raises: BaseException | None = None
    verdict: NotBetter | None = None

    def run(self, recipe: Any, *, as_run: Run, **options: Any) -> Outcome:
        assert {change.metric.name: change.value for change in as_run.metrics.changes()}[
            "engine_run_in_progress"
        ] == 1
        if self.raises is not None:
            raise self.raises
        return Outcome({"run_id": as_run.run_id, **options}, self.verdict)

    def stores(self, recipe: Any) -> Sequence[Store]:
        return [self.table]

    def cluster_address(self, recipe: Any) -> str | None:
        return None


@pytest.fixture
def table(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "table"))


def kept(table: Store) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(table.read(f"runs/{RUN_ID}.json"))
    return record


def test_a_run_that_will_be_ended_says_when(table: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class JobThatLooks(JobThatEnds):
        def run(self, recipe: Any, *, as_run: Run, **options: Any) -> Outcome:
            told = {change.metric.name: change.value for change in as_run.metrics.changes()}
            seconds = told["engine_deadline_timestamp_seconds"] - told["engine_run_start_timestamp_seconds"]
            return Outcome({"seconds": seconds})

    monkeypatch.setenv("ENGINE_ENDED_AFTER_SECONDS", "41400")
    outcome = run_watched("extract", JobThatLooks(table), None, RUN_ID, {})
    assert outcome.summary == {"seconds": pytest.approx(41_400)}


@pytest.mark.parametrize("text", ["", "11h", "0", "-3", "inf", "nan"])
def test_an_end_that_is_no_number_of_seconds_is_refused(
    table: Store, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("ENGINE_ENDED_AFTER_SECONDS", text)
    with pytest.raises(RecipeError, match="ENGINE_ENDED_AFTER_SECONDS: no number of seconds"):
        run_watched("extract", JobThatEnds(table), None, RUN_ID, {})


def test_a_run_that_is_done_is_kept_with_its_summary(table: Store) -> None:
    outcome = run_watched("extract", JobThatEnds(table), None, RUN_ID, {"rows": 7})
    record = kept(table)
    assert (record["exit_code"], record["outcome"], record["error"]) == (0, "done", None)
    assert record["summary"] == outcome.summary == {"run_id": RUN_ID, "rows": 7}
    assert record["began"] <= record["ended"] and record["ended"].endswith("+00:00")


def test_a_run_that_was_judged_is_kept_with_its_summary_and_the_verdict(table: Store) -> None:
    verdict = NotBetter("the head", found="0.8", wanted="0.9")
    run_watched("extract", JobThatEnds(table, verdict=verdict), None, RUN_ID, {})
    record = kept(table)
    assert (record["exit_code"], record["outcome"], record["summary"]) == (3, "judged", {"run_id": RUN_ID})
    parts = {"thing": "the head", "found": "0.8", "wanted": "0.9", "way_out": None}
    assert record["error"] == {"kind": "NotBetter", **parts}


@pytest.mark.parametrize(
    ("error", "code", "outcome", "kind"),
    [
        (ShardsFailed("2 shards"), 1, "failed", "ShardsFailed"),
        (ZeroDivisionError("a fault of ours"), 1, "failed", "ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_broke_is_kept_where_there_is_a_table(
    table: Store, error: BaseException, code: int, outcome: str, kind: str
) -> None:
    with pytest.raises(type(error)):
        run_watched("extract", JobThatEnds(table, raises=error), None, RUN_ID, {})
    assert list(table.names()) == [], "nothing is left where nothing was"
    table.write("_table.json", b"{}")
    with pytest.raises(type(error)):
        run_watched("extract", JobThatEnds(table, raises=error), None, RUN_ID, {})
    record = kept(table)
    assert (record["exit_code"], record["outcome"], record["error"]["kind"]) == (code, outcome, kind)
    assert record["summary"] is None and record["error"]["thing"]


def test_who_is_refused_at_the_door_has_judged_nothing(table: Store) -> None:
    """Held parts make `score` leave with the exit code of a verdict: no night has come to its end by that."""
    metrics = RunMetrics("score")
    _count_end(metrics, HeldBack("parts"), has_judged=False)
    assert "engine_last_finished_timestamp_seconds" not in {one.metric.name for one in metrics.changes()}
    _count_end(metrics, HeldBack("parts"), has_judged=True)
    assert "engine_last_finished_timestamp_seconds" in {one.metric.name for one in metrics.changes()}


def test_a_recipe_that_is_refused_leaves_no_trace(table: Store) -> None:
    table.write("_table.json", b"{}")
    with pytest.raises(RecipeError):
        run_watched("extract", JobThatEnds(table, raises=RecipeError("no")), None, RUN_ID, {})
    assert list(table.names()) == ["_table.json"]


def test_a_record_that_cannot_be_kept_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "runs").write_bytes(b"a file where the folder would be")
    store = open_store(str(tmp_path / "table"))
    assert run_watched("extract", JobThatEnds(store), None, RUN_ID, {}).summary == {"run_id": RUN_ID}
    assert "warning: the run's record is not kept at" in capsys.readouterr().err
