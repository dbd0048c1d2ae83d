"""Ray clusters of several nodes on this machine: each with a raylet, workers and an object store of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

CLONE_NEWUTS = 0x04000000  # linux/sched.h: a host name of one's own


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
