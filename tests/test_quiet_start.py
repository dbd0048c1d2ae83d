"""TensorFlow's lines at its start are dropped; what else a process says meanwhile is passed on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.commands import Engine

SCRIPT = """
import os, sys
from engine.quiet_start import quiet_start
print("before", file=sys.stderr)
try:
    with quiet_start():
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
        os.write(2, b"I0000 00:00:1795460698.508267 1 port.cc:153] oneDNN custom operations are on.\\n")
        os.write(2, b"[2026-11-24 00:30:15,171 I 21099 21099] logging.cc:303: Set ray log level\\n")
        os.write(2, b"E0000 00:00:1795460698.508267 1 cuda.cc:1] this is news\\n")
        print("so is this", file=sys.stderr)
        raise ImportError
except ImportError:
    print("after", file=sys.stderr)
os.write(2, b"I0000 00:00:1795460698.508267 1 port.cc:153] later\\n")
"""


def test_what_is_not_routine_is_passed_on_though_the_import_fails(repository: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ended.stderr.splitlines() == [
        "before",
        "E0000 00:00:1795460698.508267 1 cuda.cc:1] this is news",
        "so is this",
        "after",
        "I0000 00:00:1795460698.508267 1 port.cc:153] later",
    ]


def test_a_verb_that_loads_tensorflow_here_starts_in_silence(engine_process: Engine) -> None:
    ended = engine_process("backbones", "MobileNetV2", "--input-size", "32")
    assert (ended.code, ended.stderr) == (0, "")
