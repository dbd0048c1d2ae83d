"""Ray clusters of several nodes on this machine: each with a raylet, workers and an object store of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.processes import kill_process, new_mark, processes_below, processes_with

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

CLONE_NEWUTS = 0x04000000  # linux/sched.h: a host name of one's own
NODE_START_TIMEOUT_S = 90


@contextlib.contextmanager
def open_cluster(*workers: dict[str, Any]) -> Iterator[Cluster]:
    """A running cluster: a head without CPUs, and one worker node for each set of arguments.

    Args:
        workers: arguments of `Cluster.add_node`, such as {"num_cpus": 2}.
    """
    from ray.cluster_utils import Cluster  # slow: only when it runs

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,  # the default may be another Ray's on this machine
        },
    )
    try:
        for arguments in workers:
            cluster.add_node(**arguments)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@dataclass
class StartedHead:
    """A cluster of one node, which `ray start --block` runs, as a pod does: none of it is in this process.

    Attributes:
        job_server: its http address.
        folder: sessions, logs and packages lie below it.
    """

    job_server: str
    folder: Path


@contextlib.contextmanager
def start_head(environment: Mapping[str, str], num_cpus: int) -> Iterator[StartedHead]:
    """A head that works as well, with a Python environment that is ours.

    Args:
        environment: on top of this process' own.
    """
    dashboard, mark = _free_port(), new_mark()
    # Sockets lie in there: their names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ports = {
            "port": _free_port(),
            "dashboard-port": dashboard,
            "ray-client-server-port": _free_port(),
            "dashboard-agent-listen-port": _free_port(),
            "metrics-export-port": _free_port(),
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        options = {"num-cpus": num_cpus, "temp-dir": temporary, "object-store-memory": 100_000_000, **ports}
        bin_folder = Path(sys.executable).parent
        command = [str(bin_folder / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--{name}={value}" for name, value in options.items()]
        path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        log = Path(temporary) / "node.log"
        with open(log, "wb") as out:
            node = subprocess.Popen(
                command,
                env={**os.environ, "PATH": path, **environment, **mark},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + NODE_START_TIMEOUT_S
            while "Ray runtime started" not in (told := log.read_text()):
                assert node.poll() is None, f"the head has ended: {told}"
                assert time.monotonic() < deadline, f"the head does not start: {told}"
                time.sleep(0.2)
            yield StartedHead(f"http://127.0.0.1:{dashboard}", Path(temporary))
        finally:
            begun = processes_below(node.pid)  # before those that outlive it have another parent
            node.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(10)
            for pid in {*begun, *processes_with(mark)}:  # Ray writes titles over some environments
                kill_process(pid)
            node.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def host_name(name: str) -> Iterator[None]:
    """What this thread starts meanwhile believes that it is on a host of this name; needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/uts", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWUTS):
            pytest.skip(f"nobody but root gives out host names: {os.strerror(ctypes.get_errno())}")
        socket.sethostname(name)
        yield
    finally:
        libc.setns(own, CLONE_NEWUTS)
        os.close(own)


def titles_on(node: Node) -> list[str]:
    """What the workers of a node do now, as Ray titles their processes: `ray::ReadShards`, `ray::IDLE` ..."""
    (raylet,) = node.all_processes["raylet"]
    titles = [_title(folder) for folder in Path("/proc").iterdir() if _parent(folder) == raylet.process.pid]
    return [title for title in titles if title.startswith("ray::")]


def _parent(folder: Path) -> int | None:
    """Of the process that a folder in /proc stands for; None: it stands for none, or the process has ended."""
    try:
        status = (folder / "stat").read_text()
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # pid (name) state parent ...; the name may hold anything
    return int(fields[1]) if len(fields) > 1 else None


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
