"""A head that does not answer is named before Ray is asked, and one that is lost ends the process with a word."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from engine.cluster_head import require_answer
from engine.errors import ClusterError

WATCHED = """
import sys, time
from engine.cluster_head import head_watched
with head_watched(sys.argv[1]):
    print("watching", flush=True)
    time.sleep(float(sys.argv[2]))
print("ended by itself")
"""


def listener(port: int = 0) -> socket.socket:
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("127.0.0.1", port))
    opened.listen(16)
    return opened


def watch(address: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[str]:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, address, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "watching\n"
    return process


def test_an_address_where_nobody_listens_is_named() -> None:
    with listener() as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        require_answer(address)
    with pytest.raises(ClusterError, match=address):
        require_answer(address)
    for not_judged in (None, "auto", "local", "ray://127.0.0.1:1"):
        require_answer(not_judged)


def test_a_lost_head_ends_the_process_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener() as head:
        process = watch(f"127.0.0.1:{head.getsockname()[1]}", 60, monkeypatch)
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert (
        said.startswith("error: the Ray cluster has lost its head") and "run the same command again" in said
    )


def test_a_head_that_comes_back_in_time_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener() as head:
        port = head.getsockname()[1]
        process = watch(f"127.0.0.1:{port}", 8, monkeypatch)
        time.sleep(0.5)
    time.sleep(2.7)  # one look fails
    with listener(port):
        assert process.communicate(timeout=60) == ("ended by itself\n", "")
    assert process.returncode == 0
