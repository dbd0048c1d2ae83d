"""What a run says while it works where there is no terminal, and how little of it if a person asks for less."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.progress import Progress

from jobs import outcome
from jobs.outcome import only_warnings, print_summary, progress_bar, say


def test_a_log_for_people_has_lines_of_progress_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "PROGRESS_EVERY_S", 0.0)
    with progress_bar("shards", 1009) as (bar, task):
        bar.update(task, completed=0)
        bar.update(task, completed=1008, rate="5 images/s, 2 rejects")
        bar.update(task, completed=1009, rate="7 images/s, 2 rejects")
    assert capsys.readouterr().err.splitlines() == [
        "0 of 1,009 shards",
        "1,008 of 1,009 shards, 5 images/s, 2 rejects, 0:00:00 left",
        "1,009 of 1,009 shards, 7 images/s, 2 rejects",
    ]


def test_the_time_left_goes_by_what_is_under_way_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "PROGRESS_EVERY_S", 0.0)
    with progress_bar("shards", 2) as (bar, task):
        bar.update(task, completed=1.75, finished=0, rate="5 images/s")
        bar.update(task, completed=2.0, finished=1, rate="5 images/s")
    assert capsys.readouterr().err.splitlines() == [
        "0 of 2 shards, 5 images/s, 0:00:00 left",
        "1 of 2 shards, 5 images/s",
    ]


def test_a_terminal_tells_whole_ones_beside_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(force_terminal=True, width=100, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(outcome, "console", terminal)
    with progress_bar("shards", 2) as (bar, task):
        bar.update(task, completed=1.75, finished=0, rate="5 images/s")
        assert isinstance(bar, Progress)
        bar.refresh()
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert "0/2 5 images/s" in shown and "1/2" not in shown


def test_a_run_of_less_than_half_a_minute_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("shards", 7) as (bar, task):
        bar.update(task, completed=3)
    assert capsys.readouterr().err == ""


def test_a_quiet_log_has_warnings_and_the_summary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "PROGRESS_EVERY_S", 0.0)
    with only_warnings():
        say("3 of 7 shards pending")
        with progress_bar("shards", 7) as (bar, task):
            bar.update(task, completed=3)
        say("the disk is nearly full", logging.WARNING)
        print_summary({"rows": 1009})
    say("told again")
    assert capsys.readouterr().err.splitlines() == [
        "warning: the disk is nearly full",
        "  rows  1,009",
        "told again",
    ]


def test_the_summary_for_people_says_yes_and_sentences_and_not_what_did_not_happen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    extract = {"shards_total": 4, "shards_failed": 0, "rows": 0}
    advice = ["more readers", "larger shards"]
    nested = {**extract, "mix": {"cat": 2}}
    print_summary(
        {"rows": 0, "parts_pruned": 0, "is_finished": False, "has_profile": True, "extract": nested}
    )
    print_summary({"advice": advice, "classes": [], "seconds": 0.25})
    assert capsys.readouterr().err.splitlines() == [
        "  rows                  0",
        "  is_finished           no",
        "  has_profile           yes",
        "  extract shards_total  4",
        "  extract rows          0",
        "  extract mix           cat 2",
        "  advice   more readers; larger shards",
        "  classes  none",
        "  seconds  0.25",
    ]
