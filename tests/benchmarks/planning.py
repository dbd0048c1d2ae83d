"""How long it takes to find out what is pending, and what a million shards cost the driver: `make bench-planning`.

    python -m tests.benchmarks.planning [FOLDER]

Makes 100,000 shards and their 1,000,000 parts (empty ones: planning reads listings only) and 1,000,000 shards without
parts in FOLDER, or a temporary one. Times are wall-clock of one process beside whatever else runs on the machine.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS, PARTS_PER_SHARD = 100_000, 10
MANY_SHARDS = 1_000_000
ENOUGH_PARTS = 300
EMPTY_TAR_BYTES = 1024  # two blocks of zeros: the end marker and nothing before it


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        make_shards(folder / "shards", SHARDS)
        make_parts(folder / "shards", folder / "table")
        make_shards(folder / "many", MANY_SHARDS)
        for part in ("planned", "begun"):
            subprocess.run([sys.executable, "-m", "tests.benchmarks.planning", part, str(folder)], check=True)


def make_shards(folder: Path, count: int) -> None:
    if folder.exists():
        return
    for number in range(count):
        if number % 10_000 == 0:
            (folder / f"{number // 10_000:03d}").mkdir(parents=True)
        with open(folder / f"{number // 10_000:03d}" / f"{number:08d}.tar", "wb") as file:
            file.truncate(EMPTY_TAR_BYTES)


def make_parts(shards: Path, table: Path) -> None:
    from engine.parts import part_name
    from engine.storage import open_store

    if table.exists():
        return
    (table / "data").mkdir(parents=True)
    for info in open_store(str(shards)).list():
        for number in range(PARTS_PER_SHARD):
            name = part_name(info.path, info.identity, number, number == PARTS_PER_SHARD - 1)
            (table / "data" / str(name)).touch()


def planned(folder: Path) -> None:
    """Listings, and their difference, where everything is done."""
    from engine.plan import pending_shards
    from engine.shards.kinds import WebDatasetSource, open_reader
    from engine.storage import open_store
    from engine.tables import table_progress

    source, table = open_store(str(folder / "shards")), open_store(str(folder / "table"))
    started, before = time.monotonic(), peak_mb()
    progress = table_progress(table)
    listed = time.monotonic()
    reader = open_reader(WebDatasetSource(uri=source.uri), max_sample_bytes=1)
    pending = pending_shards(reader.list_shards(source), progress)
    print(
        f"{pending.shards_total:,} shards, {SHARDS * PARTS_PER_SHARD:,} parts, {len(pending.works)} pending: "
        f"{time.monotonic() - started:.1f} s ({listed - started:.1f} s of it for the table), "
        f"{peak_mb() - before:.0f} MB"
    )


def begun(folder: Path) -> None:
    """A real run over a million shards; ended some time after its first parts are written."""
    table = folder / "begun"
    recipe = folder / "begun.yaml"
    recipe.write_text(
        f"source: {{kind: webdataset, uri: {folder / 'many'}}}\n"
        "backbone: {kind: keras_application, name: MobileNetV2, weights: random, input_size: 32}\n"
        f"output: {{uri: {table}}}\n"
    )
    command = [sys.executable, "-m", "jobs.cli", "extract", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        started = time.monotonic()
        while process.poll() is None and len(parts_in(table)) < ENOUGH_PARTS:
            time.sleep(1)
        seconds, high, own = (
            time.monotonic() - started,
            status_mb(process, "VmHWM"),
            status_mb(process, "RssAnon"),
        )
        process.terminate()
        output = process.communicate()[0].decode()
    assert process.returncode == 130, output
    print(
        f"{MANY_SHARDS:,} shards begun, {ENOUGH_PARTS} done after {seconds:.0f} s: the driver holds {own:.0f} MB "
        f"of its own ({high:.0f} MB resident at its peak, libraries and object store included)"
    )


def parts_in(table: Path) -> list[str]:
    return os.listdir(table / "data") if (table / "data").exists() else []


def status_mb(process: subprocess.Popen[bytes], field: str) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("planned", "begun"):
        {"planned": planned, "begun": begun}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
