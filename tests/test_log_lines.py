"""Log lines as JSON: every one parses and says when, what, of which run; also those that a library printed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from engine import log_lines
from engine.errors import HeldBack
from engine.log_lines import JsonLog, LogContext, json_log, print_error, use_json_log

CONTEXT = LogContext("nightly", "nightly-20260101T000000Z-abcd")


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What this process logs meanwhile."""
    written: list[str] = []
    use_json_log(JsonLog(CONTEXT, written.append))
    try:
        yield written
    finally:
        use_json_log(None)
    assert json_log() is None


def parsed(lines: list[str]) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_line_says_when_how_grave_of_which_run_and_what(lines: list[str]) -> None:
    log = json_log()
    assert log is not None
    log.tell(logging.WARNING, 'two\nlines and "quotes"', shards=3, loss=float("nan"), verb="another")
    (line,) = lines
    assert "\n" not in line
    (found,) = parsed(lines)
    assert found.pop("time")[-5] == "." and found.pop("message") == 'two\nlines and "quotes"'
    wanted = {"level": "WARNING", "verb": "nightly", "run_id": CONTEXT.run_id, "shards": 3, "loss": "nan"}
    assert found == wanted


def test_an_error_has_its_four_parts_as_fields(lines: list[str]) -> None:
    print_error(HeldBack("the night", found="0.3", wanted="0.2", way_out="--publish"))
    (found,) = parsed(lines)
    assert (found["level"], found["message"], found["error"]) == ("ERROR", "the night", "HeldBack")
    parts = ("the night", "0.3", "0.2", "--publish", 3)
    assert tuple(found[name] for name in ("thing", "found", "wanted", "way_out", "exit_code")) == parts


def test_an_error_is_its_message_where_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(HeldBack("the night", found="0.3"))
    assert capsys.readouterr().err == "error: the night\n  found:   0.3\n"


def test_loggers_and_warnings_of_libraries_are_lines_too(lines: list[str]) -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("some.library").exception("it broke")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this is\nold", UserWarning, stacklevel=1)
    broke, old = parsed(lines)
    assert (broke["logger"], broke["level"], broke["message"]) == ("some.library", "ERROR", "it broke")
    assert "ValueError: inner" in broke["traceback"]
    assert old["logger"] == "py.warnings" and "UserWarning: this is\nold" in old["message"]


def test_what_anybody_prints_becomes_a_line_of_the_run() -> None:
    program = [sys.executable, "-I", "-S", log_lines.__file__, CONTEXT.verb, CONTEXT.run_id]
    printed = b'I0000 00:00 absl: "hello"\n\n\xff\xfe broken utf-8\nno line end'
    ended = subprocess.run(program, input=printed, capture_output=True, check=True)
    assert ended.stderr == b""
    found = parsed(ended.stdout.decode().splitlines())
    assert [line["message"] for line in found] == [
        'I0000 00:00 absl: "hello"',
        "\ufffd\ufffd broken utf-8",
        "no line end",
    ]
    assert {(line["logger"], line["verb"], line["run_id"]) for line in found} == {
        ("output", CONTEXT.verb, CONTEXT.run_id)
    }


def test_what_a_terminal_would_obey_is_spelled_out_in_messages_for_people(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_error(HeldBack("label '\x1b]0;mine\x07'", found="a\rb\nLINE 1: \udcff"))
    assert capsys.readouterr().err == "error: label '\\x1b]0;mine\\x07'\n  found:   a\\rb\nLINE 1: \\udcff\n"
