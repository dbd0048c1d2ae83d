"""A plain function in a process of its own, beside this one; whoever needs its answer waits for a file.

For work that should begin before anything else has started. The process ends with this one's `with` block. Folders of
processes that were killed inside it are cleared away by the next: their lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ClusterError, EngineError
from engine.quiet_start import without_routine

_POLL_S = 0.02
_PREFIX = "engine-beside-"
_SURELY_LOCKED_S = 60.0  # after that a folder's maker has its lock, or is gone


@dataclass(frozen=True)
class FileAnswer:
    """What the function will have answered; may be pickled and waited for in any process of this machine."""

    path: Path

    def get(self) -> Any:
        """Wait for the answer.

        Raises:
            EngineError: as the function raised it, or that its process broke.
        """
        while not self.path.exists():
            if not self.path.parent.exists():
                raise ClusterError("the run that this process belongs to is over")
            time.sleep(_POLL_S)
        answer, error = pickle.loads(self.path.read_bytes())
        if error is not None:
            raise error
        return answer


@contextlib.contextmanager
def beside(function: Callable[..., Any], *arguments: Any) -> Iterator[FileAnswer]:
    """Run a function of a module, with arguments that can be pickled; inside the block it is under way."""
    _clear_away_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as scratch, (Path(scratch) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with this process, however that ends
        folder = Path(scratch)
        answer = FileAnswer(folder / "answer")
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.beside", scratch],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                process_group=0,  # Ctrl-C is for the process that waits; it ends this one
            )
        watch = threading.Thread(target=_tell_of_its_end, args=(process, folder), daemon=True)
        watch.start()
        try:
            yield answer
        finally:
            process.kill()
            watch.join()


def _clear_away_abandoned() -> None:
    """Folders whose maker is gone, which a SIGKILL left: up to a frozen network's size each."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another process is at it
            if time.time() - folder.stat().st_mtime < _SURELY_LOCKED_S:
                continue
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _tell_of_its_end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """An answer for those who wait, where the process ended without one."""
    status = process.wait()
    if not (folder / "answer").exists():
        words = _last_words((folder / "log").read_text(encoding="utf-8", errors="replace"))
        error = ClusterError(
            "the process that loads the network ended before its time",
            found=f"exit status {status}; its last words: {words or 'none'}",
            way_out="run the same command again; status -9: the machine ran out of memory",
        )
        _write_answer(folder, None, error)


def _last_words(log: str) -> str:
    """The end of a log without what TensorFlow says at every start."""
    return "\n".join(without_routine(log))[-2000:]


def _write_answer(folder: Path, answer: Any, error: EngineError | None) -> None:
    (folder / "answer.part").write_bytes(pickle.dumps((answer, error), protocol=5))
    (folder / "answer.part").rename(folder / "answer")


def _main(folder: Path) -> None:
    function, arguments = pickle.loads((folder / "call").read_bytes())
    try:
        answer, failure = function(*arguments), None
    except EngineError as error:
        answer, failure = None, error
    with contextlib.suppress(FileNotFoundError):  # nobody waits any more
        _write_answer(folder, answer, failure)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
