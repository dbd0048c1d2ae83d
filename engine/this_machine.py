"""What this machine has for a local Ray: asked before Ray is imported, which takes as long as loading half a network.

Linux only, like a local Ray of this engine. Memory is counted as Ray 2.60 counts it: a container's limit and use where
there is one, else the machine's.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from engine.sizing import Machines

OBJECT_STORE_SHARE = 0.3  # of the free memory: Ray's default for a local one


def machines_here() -> Machines:
    """The cores, GPUs and memory that this process may use."""
    free = float(free_memory())
    return Machines.of_one_node(
        cpus=float(len(os.sched_getaffinity(0))),
        gpus=_gpus_here(),
        memory=(1 - OBJECT_STORE_SHARE) * free,
        object_store=OBJECT_STORE_SHARE * free,
    )


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new processes can have without others being pushed out; files that are merely cached do not count.

    Args:
        meminfo: as in proc(5).
        cgroup: where a container sees its control group, of version 2 or 1.
    """
    machine = _numbers(meminfo)
    free = 1024 * machine.get("MemAvailable:", machine.get("MemFree:", 0))
    for limit_name, use_name, stat_name in _CGROUP_FILES:
        limit, used, kept = (
            _number(cgroup / limit_name),
            _number(cgroup / use_name),
            _numbers(cgroup / stat_name),
        )
        if limit is not None and used is not None:
            cached = kept.get("total_inactive_file", kept.get("inactive_file", 0))
            free = min(free, limit - used + cached)
    return max(0, free)


_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def _number(path: Path) -> int | None:
    """None: the file says `max`, or cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number; without those that are of another form."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _gpus_here() -> float:
    """NVIDIA devices, as far as CUDA_VISIBLE_DEVICES lets them be seen; infinite where /dev has none: Ray knows other
    ways to find some, and is asked again when it runs."""
    devices = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not devices or visible is None:
        return float(len(devices)) or math.inf
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return float(len(named))
