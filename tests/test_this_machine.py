"""What is free on this machine, as proc(5) and control groups say it."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.utils import estimate_available_memory

from engine.this_machine import OBJECT_STORE_SHARE, free_memory, machines_here

GIB = 1 << 30


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_IS_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n")
    return path


def test_without_a_container_it_is_what_the_machine_has(meminfo: Path, tmp_path: Path) -> None:
    assert free_memory(meminfo, tmp_path / "no-cgroup") == 8 * GIB
    unlimited = write(tmp_path / "a", memory_IS_max="max\n", memory_IS_current=f"{GIB}\n")
    assert free_memory(meminfo, unlimited) == 8 * GIB


def test_a_container_has_its_limit_less_what_it_uses_and_cannot_drop(meminfo: Path, tmp_path: Path) -> None:
    used, cached = f"{3 * GIB}\n", f"anon {2 * GIB}\ninactive_file {GIB}\n"
    group = write(tmp_path / "b", memory_IS_max=f"{4 * GIB}\n", memory_IS_current=used, memory_IS_stat=cached)
    assert free_memory(meminfo, group) == 2 * GIB
    old = write(
        tmp_path / "c",
        memory__memory_IS_limit_in_bytes=f"{4 * GIB}\n",
        memory__memory_IS_usage_in_bytes=used,
        memory__memory_IS_stat=cached.replace("inactive", "total_inactive"),
    )
    assert free_memory(meminfo, old) == 2 * GIB
    write(tmp_path / "b", memory_IS_max=f"{64 * GIB}\n")
    assert free_memory(meminfo, group) == 8 * GIB  # a limit that the machine cannot keep
    write(tmp_path / "b", memory_IS_max=f"{GIB}\n")
    assert free_memory(meminfo, group) == 0


def test_this_machine_is_seen_about_as_ray_sees_it() -> None:
    here = machines_here()
    assert here.memory + here.object_store == pytest.approx(estimate_available_memory(), rel=0.3)
    assert here.object_store / (here.memory + here.object_store) == pytest.approx(OBJECT_STORE_SHARE)
    assert here.nodes == 1 and here.cpus >= 1


def test_gpus_are_counted_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines without NVIDIA devices leave it to Ray, which knows other kinds."""
    devices = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machines_here().gpus == (len(devices) or math.inf)


def test_ray_is_not_imported_for_it(repository: Path) -> None:
    script = "import sys, engine.this_machine as here; here.machines_here(); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=repository, check=True)
