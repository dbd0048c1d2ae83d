"""What TensorFlow and Ray say at every start, kept off a person's terminal. Not for: anything else that goes to stderr.

TensorFlow 2.21 writes lines of INFO before it heeds TF_CPP_MIN_LOG_LEVEL, straight to file descriptor 2, and Ray 2.60
one that it heeds RAY_BACKEND_LOG_LEVEL.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_ROUTINE = re.compile(
    r"I\d{4} |\d{4}-\d\d-\d\d [\d:.]+: I |\[\d{4}-\d\d-\d\d [\d:,]+ I |WARNING: All log messages before absl"
    r"|To enable the following instructions"
)


def without_routine(log: str) -> list[str]:
    """Its lines but for empty ones, glog's INFO lines and what goes with them."""
    return [line for line in log.splitlines() if line.strip() and not _ROUTINE.match(line)]


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Inside, TensorFlow may be imported: as `routine_left_out`. INFO of later is not written either, unless the
    environment asks for it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with routine_left_out():
        yield


@contextlib.contextmanager
def routine_left_out() -> Iterator[None]:
    """Inside, the whole process writes its stderr to a file, and at the end what is not routine in there goes where it
    should have gone."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as ends:
        real = os.dup(2)
        ends.callback(os.close, real)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            log.seek(0)
            for line in without_routine(log.read().decode(errors="replace")):
                print(line, file=sys.stderr, flush=True)
