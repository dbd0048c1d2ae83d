"""Pods of a RayJob on this machine: the image's file tree, nobody's user, a read-only root, volumes as they say.

As in a cluster: `ray start --block` with the manifest's parameters and environment, /opt/engine as `k8s/build_tree.sh`
makes it, the recipes where the ConfigMap would lie. Unlike there: all pods share one network of their own and its only
address, so /tmp, too, where Ray looks for its neighbours; workers have other ports, and nothing limits their processor
time or memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.processes import kill_process

UID = 10001
START_TIMEOUT_S = 120
# As k8s/Dockerfile has it.
IMAGE_ENVIRONMENT = {
    "PATH": "/opt/engine/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}

# $1 a folder for this pod, $2 the image's /opt, $3 the pods' /tmp; then "PATH=SOURCE" of read-only folders, "PATH=" of
# empty ones, "--", the command. What is mounted is gone with the last process of the namespace.
_ENTER = r"""
set -e
here=$1 opt=$2 tmp=$3; shift 3
mount -t tmpfs none "$here"
mkdir "$here/upper" "$here/work" "$here/root"; root=$here/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$here/upper,workdir=$here/work" "$root"
for open in /root /work /home; do [ ! -d "$open" ] || chmod o+x "$root$open"; done  # a Python may lie there
for system in /proc /dev /sys; do mount --rbind "$system" "$root$system"; done
mount --bind "$opt" "$root/opt"; mount -o remount,bind,ro "$root/opt"
mount --bind "$tmp" "$root/tmp"
while [ "$1" != -- ]; do
  path=${1%%=*} source=${1#*=}; shift
  mkdir -p "$root$path"
  if [ "$source" ]; then mount --bind "$source" "$root$path"; mount -o remount,bind,ro "$root$path"
  else mount -t tmpfs -o mode=1777 none "$root$path"; fi
done
shift
mount -o remount,ro "$root"
exec /usr/sbin/chroot "$root" "$@"
"""
_OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]
_AS_NOBODY = [
    *("setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "--no-new-privs"),
    *("--inh-caps=-all", "--bounding-set=-all"),
]


@dataclass
class Pods:
    """Pods that are up.

    Attributes:
        folder: what they need on this machine.
        recipes: files of the ConfigMap.
        environment: that all of them get: keys of the store, Ray's token.
        network: a process that is in theirs.
        nodes: of each its command, and its mount namespace as /proc names it.
    """

    folder: Path
    recipes: Path
    environment: dict[str, str]
    network: int
    nodes: dict[str, tuple[subprocess.Popen[bytes], str]] = field(default_factory=dict)

    def run(self, container: Mapping[str, Any], command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end in a pod like that of a container."""
        return subprocess.run(
            self._entered(f"run-{time.monotonic_ns()}", container, command),
            env=self._environment_of(container),
            capture_output=True,
            text=True,
            check=False,
        )

    def lose(self, name: str) -> None:
        """Kill every process of a pod at once, as a node that is taken away."""
        process, mounts = self.nodes.pop(name)
        for _ in range(3):  # a process may start another meanwhile
            for pid in _processes_in(mounts):
                kill_process(pid)
        process.wait()

    def start(self, name: str, container: Mapping[str, Any], command: list[str]) -> None:
        """Start a node, and wait until it has joined."""
        log = self.folder / f"{name}.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                self._entered(name, container, command),
                env=self._environment_of(container),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        own, deadline = os.readlink("/proc/self/ns/mnt"), time.monotonic() + START_TIMEOUT_S
        mounts = own
        while mounts == own:  # until it has unshared them
            assert process.poll() is None, f"{name} has ended: {log.read_text()}"
            with contextlib.suppress(OSError):
                mounts = os.readlink(f"/proc/{process.pid}/ns/mnt")
        self.nodes[name] = (process, mounts)
        while "Ray runtime started" not in (told := log.read_text()):
            assert process.poll() is None, f"{name} has ended: {told}"
            assert time.monotonic() < deadline, f"{name} does not start: {told}"
            time.sleep(0.2)

    def end(self) -> None:
        for process, _ in self.nodes.values():
            process.send_signal(signal.SIGTERM)
        for name, (process, _) in list(self.nodes.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            self.lose(name)

    def _entered(self, name: str, container: Mapping[str, Any], command: list[str]) -> list[str]:
        """The command in a namespace of its own, with the container's volumes."""
        here = self.folder / name
        here.mkdir()
        # Pods have another /tmp: an environment that lies there would be hidden from them.
        mounts = [f"{venv}={venv}"] if (venv := _own_environment()).is_relative_to("/tmp") else []
        for volume in container["volumeMounts"]:
            path = volume["mountPath"]
            if path == "/etc/engine/recipes":
                mounts.append(f"{path}={self.recipes}")
            elif path != "/tmp":
                mounts.append(f"{path}=")
        return [
            *("nsenter", f"--net=/proc/{self.network}/ns/net"),
            *_OWN_MOUNTS,
            *("bash", "-c", _ENTER, "bash", str(here)),
            str(self.folder / "opt"),
            str(self.folder / "tmp"),
            *mounts,
            "--",
            *_AS_NOBODY,
            *command,
        ]

    def _environment_of(self, container: Mapping[str, Any]) -> dict[str, str]:
        own = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
        return {**IMAGE_ENVIRONMENT, **own, **self.environment}


def _processes_in(mounts: str) -> list[int]:
    """Processes of a mount namespace; a mark in the environment would not do, over which Ray writes titles."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile
            if folder.name.isdecimal() and os.readlink(folder / "ns" / "mnt") == mounts:
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def open_pods(
    folder: Path, repository: Path, environment: Mapping[str, str], store_port: int
) -> Iterator[Pods]:
    """Build the image's file tree, and be ready for pods; skips where nobody may mount or give up being root.

    Args:
        store_port: of a server on this machine's loopback, which pods find on theirs.
    """
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("nobody but root mounts a root file system and gives up being root")
    mount = [*_OWN_MOUNTS, "--net", "mount", "-t", "tmpfs", "none", str(folder)]
    if (probe := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"this machine lets nobody mount, or have a network: {probe.stderr.strip()}")
    for name in ("opt", "tmp", "recipes"):
        (folder / name).mkdir()
    (folder / "tmp").chmod(0o1777)
    _build_tree(folder, repository)
    door, port = str(folder / "door"), str(store_port)
    with _relay(repository, "outside", door, port), _relay(repository, "inside", port, door) as network:
        pods = Pods(folder, folder / "recipes", dict(environment), network)
        tried = pods.run({"volumeMounts": []}, ["sh", "-c", "id -u; touch /usr/new"])
        assert tried.stdout.strip() == str(UID), tried.stderr
        assert "Read-only file system" in tried.stderr, tried.stderr
        try:
            yield pods
        finally:
            pods.end()


@contextlib.contextmanager
def _relay(repository: Path, *arguments: str) -> Iterator[int]:
    """One side of the door (see `tests/k8s/network.py`); its process id."""
    command = [sys.executable, "-m", "tests.k8s.network", *arguments]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n", arguments
            yield process.pid
        finally:
            process.kill()


def _own_environment() -> Path:
    """Where this test's packages lie, whatever links lead there."""
    return Path(sys.executable).parent.parent.resolve()


def _build_tree(folder: Path, repository: Path) -> None:
    """/opt/engine of the image, made at that very place, since an environment knows where it lies."""
    build = f"{repository}/k8s/build_tree.sh cpu /opt/engine --reuse {_own_environment()}"
    script = f"mount --bind {folder / 'opt'} /opt && {build}"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    ended = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def start_command(params: Mapping[str, str], *flags: str, **local: object) -> list[str]:
    """`ray start` as KubeRay makes it of rayStartParams, and what this machine needs besides."""
    # KubeRay's own additions: ray-operator/controllers/ray/common/pod.go, setMissingRayStartParams.
    added = {"dashboard-agent-listen-port": 52365, "metrics-export-port": 8080}
    here = {name.replace("_", "-"): value for name, value in local.items()}
    # Ports for workers are taken as they come: of a fixed range all nodes of one address would take the same.
    here |= {"node-ip-address": "127.0.0.1", "min-worker-port": 0, "max-worker-port": 0}
    options = [f"--{name}={value}" for name, value in {**added, **params, **here}.items()]
    return ["ray", "start", *flags, "--block", *options]
