"""Log lines as JSON objects, one a line, for machines that collect them; and whether this process writes them so.

Each has `time` (UTC), `level`, `verb`, `run_id` and `message`, and fields where there are any; an error has its four
parts as fields. Not for: what is said (`jobs.outcome`), or numbers (`engine.run_metrics`).

Imports nothing but Python's own: it is also a program (`python log_lines.py VERB RUN_ID`) that turns what libraries
print into such lines, as a process of its own, so that the last words of one that dies are not lost.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from engine.errors import EngineError

NEW_LINE = "\n"
FOREIGN_LOGGER = "output"  # of what was printed by somebody else, of whom only the line is known
LONGEST_FOREIGN_LINE = 64_000  # characters; collectors of container logs cut at 16 to 256 KiB


@dataclass(frozen=True)
class LogContext:
    """What every line of a process bears.

    Attributes:
        verb: the command that was given.
        run_id: of the run, as in its summary.
    """

    verb: str
    run_id: str


class JsonLog:
    """Where a process writes its lines.

    Args:
        write: takes one line without its end; called by any thread.
    """

    def __init__(self, context: LogContext, write: Callable[[str], object]) -> None:
        self.context, self._write = context, write

    def tell(self, level: int, message: str, **fields: Any) -> None:
        """Write one line; what every line bears wins over fields of the same name."""
        bears = {
            "time": _utc(time.time()),
            "level": logging.getLevelName(level),
            "verb": self.context.verb,
            "run_id": self.context.run_id,
            "message": message,
        }
        self._write(json.dumps(bears | _plain(fields) | bears, default=str))

    def tell_error(self, error: EngineError) -> None:
        """An error with its class, its parts and its exit code."""
        parts = {name: getattr(error, name) for name in ("thing", "found", "wanted", "way_out")}
        self.tell(logging.ERROR, error.thing, error=type(error).__name__, **parts, exit_code=error.exit_code)


_log: JsonLog | None = None


def json_log() -> JsonLog | None:
    """This process's, None where lines are for people."""
    return _log


def use_json_log(log: JsonLog | None) -> None:
    """From now on this process writes its lines here: Python's loggers, warnings and what it dies of, too.

    None: lines are for people again.
    """
    global _log  # noqa: PLW0603 (of a process, as Python's own logging is)
    _log = log
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _LineHandler):
            root.removeHandler(handler)
    logging.captureWarnings(log is not None)
    sys.excepthook = sys.__excepthook__ if log is None else _tell_what_it_dies_of
    if log is not None:
        root.addHandler(_LineHandler(log))


def use_json_log_on_worker(context: LogContext) -> None:
    """The same in a process of Ray, whose stderr is a file of the node's."""
    use_json_log(JsonLog(context, lambda line: print(line, file=sys.stderr, flush=True)))


def print_error(error: EngineError) -> None:
    """An error that ends this process, on stderr: one JSON line, or its message for a person."""
    if _log is not None:
        _log.tell_error(error)
    else:
        print(f"error: {plain_text(str(error), keep=NEW_LINE)}", file=sys.stderr, flush=True)


def plain_text(text: str, keep: str = "") -> str:
    """Text with nothing that a terminal would obey: names, keys and labels come from strangers.

    Args:
        keep: characters that stay although they are not printable.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else repr(one)[1:-1] for one in text)


class _LineHandler(logging.Handler):
    def __init__(self, log: JsonLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {"logger": record.name}
            if record.exc_info:
                fields["traceback"] = logging.Formatter().formatException(record.exc_info)
            self._log.tell(record.levelno, record.getMessage().strip(), **fields)
        except Exception:  # noqa: BLE001 (as Python's own handlers: a bad log call must not end a run)
            self.handleError(record)


def _tell_what_it_dies_of(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if _log is not None:
        lines = traceback.format_exception(kind, error, trace)
        _log.tell(logging.CRITICAL, f"{kind.__name__}: {error}", traceback="".join(lines))


def _utc(moment: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(moment))}.{int(moment % 1 * 1000):03d}Z"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity, and no keys but text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in cast("list[Any]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _wrap_foreign_lines(verb: str, run_id: str) -> None:
    """Turn lines from stdin into JSON on stdout, until there is nobody left who could write some."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the process that it serves
        signal.signal(number, signal.SIG_IGN)
    log = JsonLog(LogContext(verb, run_id), lambda line: print(line, flush=True))
    for line in sys.stdin.buffer:
        text = line.decode(errors="replace").rstrip()
        if text:
            log.tell(logging.INFO, text[:LONGEST_FOREIGN_LINE], logger=FOREIGN_LOGGER)


if __name__ == "__main__":
    _wrap_foreign_lines(*sys.argv[1:])
