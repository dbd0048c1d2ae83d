"""How a command's log looks: for people, with ENGINE_LOG=quiet warnings and the summary of a run alone, or with
ENGINE_LOG=json one JSON object a line (`engine.log_lines`).

What anybody prints in this process, or in one that it started, becomes such a JSON line too. stdout stays for what was
asked for (`--json`, `--plan`), with nothing of a library between.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from engine import log_lines
from engine.errors import RecipeError
from engine.log_lines import JsonLog, LogContext, use_json_log

VARIABLE = "ENGINE_LOG"
FORMATS = ("text", "json", "quiet")
PATIENCE_S = 2.0  # with what a process that outlives this one may still print


def wanted_format() -> str:
    """One of FORMATS, as the environment asks.

    Raises:
        RecipeError: it asks for something else.
    """
    wanted = os.environ.get(VARIABLE, FORMATS[0])
    if wanted not in FORMATS:
        raise RecipeError(
            f"{VARIABLE}: no format of logs",
            found=repr(wanted),
            wanted=", ".join(FORMATS),
            way_out=f"set it to one of these, or unset it for {FORMATS[0]}",
        )
    return wanted


@contextmanager
def json_logs(context: LogContext) -> Iterator[None]:
    """Inside, stderr is JSON lines, whoever in this process or below it prints; sys.stdout is the real one, and ours.

    The log stays in use behind it, for what the process may still die of.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    real = {number: os.dup(number) for number in (1, 2)}  # not inherited by what is started
    program = [sys.executable, "-I", "-S", log_lines.__file__, context.verb, context.run_id]
    foreign = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=real[2], stderr=real[2])
    assert foreign.stdin is not None
    for number in real:
        os.dup2(foreign.stdin.fileno(), number)
    foreign.stdin.close()
    log = JsonLog(context, _writer_to(real[2]))
    use_json_log(log)
    stdout, sys.stdout = sys.stdout, os.fdopen(real[1], "w", buffering=1, closefd=False)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = stdout
        sys.stderr.flush()
        for number, own in real.items():
            os.dup2(own, number)
        use_json_log(log)  # once more: ray.init puts its own sys.excepthook in the place (Ray 2.60)
        with suppress(subprocess.TimeoutExpired):
            foreign.wait(PATIENCE_S)


def _writer_to(number: int) -> Callable[[str], None]:
    """Writes whole lines to a file descriptor, one thread at a time, and holds none back."""
    stream, lock = os.fdopen(number, "wb", closefd=False), threading.Lock()

    def write(line: str) -> None:
        with lock:
            stream.write(line.encode() + b"\n")
            stream.flush()

    return write
