"""ENGINE_LOG=json: whatever prints, every line of stderr is JSON, and stdout has what was asked for alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Engine

RUN = """
import ctypes, logging, os, subprocess, sys, warnings
from engine.log_lines import LogContext
from jobs.logs import json_logs
from jobs.outcome import progress_bar, say

with json_logs(LogContext("extract", "extract-20260101T000000Z-0a1b")):
{body}
"""
NOISE = """
    libc = ctypes.CDLL(None)
    libc.printf(b"from C, to stdout\\n"); libc.fflush(None)
    os.write(2, b"from C, to stderr\\n")
    subprocess.run(["sh", "-c", "echo from a child; echo from a child too >&2"])
    print("from Python", file=sys.stderr)
    warnings.warn("old")
    logging.getLogger("library").error("from a logger")
    say("ours", shards=3)
    with progress_bar("shards", 7) as (bar, task):
        for number in range(1, 4):
            bar.update(task, completed=number, rate="5 images/s")
    print("the answer")
"""


def run(repository: Path, body: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, stdout, and the lines of stderr."""
    script = RUN.format(body=body)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ended.returncode, ended.stdout, [json.loads(line) for line in ended.stderr.splitlines()]


def test_every_line_is_json_whoever_printed_it(repository: Path) -> None:
    code, stdout, lines = run(repository, NOISE)
    assert (code, stdout) == (0, "the answer\n")
    assert {(line["verb"], line["run_id"]) for line in lines} == {
        ("extract", "extract-20260101T000000Z-0a1b")
    }
    foreign = {line["message"] for line in lines if line.get("logger") == "output"}
    wanted = {"from C, to stdout", "from C, to stderr", "from a child", "from a child too", "from Python"}
    assert foreign == wanted
    by_message = {line["message"]: line for line in lines}
    assert by_message["ours"]["shards"] == 3
    assert by_message["from a logger"]["level"] == "ERROR"
    assert any("UserWarning: old" in line["message"] for line in lines if line.get("logger") == "py.warnings")
    (progress,) = [line for line in lines if "progress" in line]  # the next would come 30 s later
    assert (progress["progress"], progress["done"], progress["of"]) == ("shards", 1, 7)


def test_a_librarys_bad_log_call_ends_nothing(repository: Path) -> None:
    body = '    logging.getLogger("library").error("%d", "not a number")\n    print("on")\n'
    code, stdout, lines = run(repository, body)
    assert (code, stdout) == (0, "on\n")
    assert any("Logging error" in line["message"] for line in lines)


@pytest.mark.parametrize(
    ("end", "code"), [("os._exit(7)", 7), ("os.kill(os.getpid(), 9)", -9)], ids=["_exit", "SIGKILL"]
)
def test_the_last_words_of_a_process_that_dies_are_kept(repository: Path, end: str, code: int) -> None:
    found, _, lines = run(repository, f"    say('ours')\n    os.write(2, b'a C++ stack trace')\n    {end}")
    assert found == code
    assert [line["message"] for line in lines] == ["ours", "a C++ stack trace"]


def test_an_error_that_nobody_foresaw_is_one_line_with_its_trace(repository: Path) -> None:
    code, _, lines = run(repository, "    {}['absent']")
    assert code == 1
    (line,) = lines
    assert (line["level"], line["message"]) == ("CRITICAL", "KeyError: 'absent'")
    assert line["traceback"].startswith("Traceback")


def test_a_recipe_that_is_not_there_is_an_error_with_its_parts(engine_process: Engine) -> None:
    ended = engine_process("extract", "no-such.yaml", "--json", environment={"ENGINE_LOG": "json"})
    assert (ended.code, ended.stdout) == (2, "")
    (line,) = [json.loads(line) for line in ended.stderr.splitlines()]
    assert (line["level"], line["error"], line["exit_code"]) == ("ERROR", "RecipeError", 2)
    assert "no-such.yaml" in line["thing"] and line["verb"] == "extract"


def test_wrong_arguments_are_json_lines_too(engine_process: Engine) -> None:
    ended = engine_process("extract", environment={"ENGINE_LOG": "json"})
    assert (ended.code, ended.stdout) == (2, "")
    assert any(
        "Missing argument 'recipe'" in json.loads(line)["message"] for line in ended.stderr.splitlines()
    )


def test_what_is_asked_for_stays_as_it_is(engine_process: Engine) -> None:
    ended = engine_process("schema", "extract", environment={"ENGINE_LOG": "json"})
    assert (ended.code, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["title"] == "ExtractRecipe"


def test_a_format_that_there_is_not_is_refused(engine_process: Engine) -> None:
    ended = engine_process("backbones", environment={"ENGINE_LOG": "yaml"})
    assert ended.code == 2
    assert "ENGINE_LOG" in ended.stderr and "text, json, quiet" in ended.stderr
