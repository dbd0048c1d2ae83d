from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engine.beside import beside
from engine.errors import ClusterError, WeightsError


def doubled(number: int) -> tuple[int, int]:
    return 2 * number, os.getpid()


def refused() -> None:
    raise WeightsError("weights.h5: not there", way_out="bring it")


def killed() -> None:
    print("out of luck", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_tensorflow_starts() -> None:
    print("WARNING: All log messages before absl::InitializeLog() is called are written to STDERR")
    print("I0000 00:00:1795363537.123456   12345 port.cc:153] oneDNN custom operations are on.")
    print("2026-11-22 16:05:37.123456: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.")
    print(
        "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow", flush=True
    )
    os.kill(os.getpid(), signal.SIGKILL)


def broken() -> None:
    raise ZeroDivisionError("unforeseen")


def asleep(note: str) -> None:
    Path(note).write_text(str(os.getpid()))
    time.sleep(600)


def test_the_answer_comes_from_another_process_and_may_be_had_again() -> None:
    with beside(doubled, 21) as answer:
        number, process = answer.get()
        assert (number, process != os.getpid()) == (42, True)
        assert answer.get() == (number, process)


def test_an_error_of_ours_is_raised_as_it_was() -> None:
    with beside(refused) as answer, pytest.raises(WeightsError, match="(?s)weights.h5: not there.*bring it"):
        answer.get()


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (killed, "exit status -9.*out of luck"),
        (killed_while_tensorflow_starts, "exit status -9; its last words: none"),
        (broken, "(?s)ZeroDivisionError.*unforeseen"),
    ],
)
def test_a_process_that_breaks_is_told_of_with_its_last_words(function: object, found: str) -> None:
    with beside(function) as answer, pytest.raises(ClusterError, match=found):  # type: ignore[arg-type]
        answer.get()


def test_the_process_ends_with_the_block(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with beside(asleep, str(note)) as answer:
        while not note.exists() or not note.read_text():
            time.sleep(0.01)
        assert not answer.path.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert not answer.path.parent.exists()
    with pytest.raises(ClusterError, match="is over"):  # whoever still waits does not wait for ever
        answer.get()


IN_A_DRIVER = """
import os, signal, sys, time
from pathlib import Path
from engine.beside import beside
from tests.test_beside import asleep
with beside(asleep, sys.argv[1]):
    while not Path(sys.argv[1]).exists() or not Path(sys.argv[1]).read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_left_is_cleared_away_and_what_is_in_use_stays(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    note = tmp_path / "note"
    driver = subprocess.run([sys.executable, "-c", IN_A_DRIVER, str(note)], cwd=repository, check=False)
    os.kill(int(note.read_text()), signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("engine-beside-*")
    with beside(doubled, 1) as answer:
        assert left.exists(), "younger than a minute: its maker may not have its lock yet"
        in_use = answer.path.parent
        for folder in (left, in_use):
            os.utime(folder, (1, 1))
        with beside(doubled, 2) as another:
            assert not left.exists() and in_use.exists()
            assert (answer.get()[0], another.get()[0]) == (2, 4)
    assert list(tmp_path.glob("engine-beside-*")) == []
