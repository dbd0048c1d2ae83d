"""Whether the head of a Ray cluster answers: asked before connecting to it, and all the while a run needs it.

Ray itself tries a silent address for about 12 minutes, and ends a process whose head is gone from within, without a
word that a user could act on (Ray 2.60: exit code 1 after 60 s). Knows no Ray, only sockets.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

from engine.errors import ClusterError
from engine.log_lines import print_error

CONNECT_TIMEOUT_S = 10.0
LOOK_EVERY_S = 3.0
RAY_PATIENCE_S = 60.0  # Ray's default: so long it waits for a head that comes back
PATIENCE = 0.7  # of it: a word from us before Ray ends the process
_RAY_PATIENCE_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


def joins_cluster(address: str | None) -> bool:
    """Whether a run would connect to a running cluster, which may grow, rather than start a local Ray.

    Args:
        address: the recipe's; None: what RAY_ADDRESS says.
    """
    return bool(address or os.environ.get("RAY_ADDRESS"))


def require_answer(address: str | None) -> None:
    """Make sure that somebody listens at `host:port`; other forms of address are not judged.

    Raises:
        ClusterError: nobody does.
    """
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return
    try:
        _connect(host, port)
    except OSError as error:
        raise unreachable(address, str(error)) from None


def _connect(host: str, port: str) -> None:
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def unreachable(address: str | None, found: str) -> ClusterError:
    """The error for a cluster that cannot be connected to."""
    return ClusterError(
        f"Ray at {address or 'this machine'} cannot be used",
        found=found,
        way_out="check compute.address or RAY_ADDRESS (`ray status` there), or leave both out for a local Ray",
    )


@contextlib.contextmanager
def head_watched(address: str) -> Iterator[None]:
    """Say in our words that the head is lost, and end the process: Ray would do so a little later, in no words.

    Args:
        address: `host:port` of the head.
    """
    over = threading.Event()
    threading.Thread(target=_watch, args=(address, over), name="head-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(address: str, over: threading.Event) -> None:
    patience_s = PATIENCE * RAY_PATIENCE_S
    with contextlib.suppress(ValueError):  # Ray complains about it itself
        patience_s = PATIENCE * float(os.environ.get(_RAY_PATIENCE_VARIABLE, RAY_PATIENCE_S))
    answered = time.monotonic()
    while not over.wait(LOOK_EVERY_S):
        silence = _silence_of(address)
        if silence is None:
            answered = time.monotonic()
        elif (silent_s := time.monotonic() - answered) >= patience_s and not over.is_set():
            _end(address, silent_s, silence)


def _silence_of(address: str) -> str | None:
    """How a connection was refused; None where there is one, or none because of this process itself."""
    host, _, port = address.rpartition(":")
    try:
        _connect(host, port)
    except (ConnectionError, TimeoutError) as error:
        return str(error)
    except OSError as error:
        return str(error) if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH) else None
    return None


def _end(address: str, silent_s: float, found: str) -> None:
    """Nothing of ours is left to be tidied: Ray ends the process likewise, and a rerun goes on."""
    lost = ClusterError(
        "the Ray cluster has lost its head",
        found=f"nobody has answered at {address} for {silent_s:.0f} s: {found}",
        way_out="nothing committed is lost; when the cluster is up, run the same command again: it makes only "
        "what is missing",
    )
    print_error(lost)
    os._exit(lost.exit_code)
