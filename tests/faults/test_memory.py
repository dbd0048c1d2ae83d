"""What the processes of an extraction hold in memory does not depend on how large the archive is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.storage import open_store
from tests.commands import start
from tests.flows.archives import extract_recipe, shard_bytes
from tests.processes import new_mark, peaks_of

SHARDS, IMAGES = 12, 200
MAX_GROWTH = 1.10


@pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")
def test_ten_times_the_shards_take_no_more_memory(repository: Path, tmp_path: Path) -> None:
    shard = tmp_path / "one.tar"
    shard.write_bytes(shard_bytes(0, IMAGES))
    once = peaks_of_a_run(repository, tmp_path / "once", shard, SHARDS)
    tenfold = peaks_of_a_run(repository, tmp_path / "tenfold", shard, 10 * SHARDS)
    report = {kind: f"{once[kind] / 1e6:.0f} -> {tenfold[kind] / 1e6:.0f} MB" for kind in sorted(once)}
    print(f"{SHARDS} -> {10 * SHARDS} shards of {IMAGES} images: {report}")
    assert set(once) == {"actor", "driver", "task"}
    for kind, peak in once.items():
        assert tenfold[kind] < MAX_GROWTH * peak, report


def peaks_of_a_run(repository: Path, folder: Path, shard: Path, shards: int) -> dict[str, int]:
    """Most bytes that a process of each kind held during the extraction of so many shards."""
    (folder / "shards").mkdir(parents=True)
    for number in range(shards):
        os.link(shard, folder / "shards" / f"{number:05d}.tar")
    recipe = extract_recipe(folder, str(folder / "shards"), str(folder / "table"))
    mark = new_mark()
    process = start("extract", repository, recipe, environment=mark)
    with peaks_of(mark, process.pid) as peaks:
        output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output
    assert sum(1 for _ in open_store(str(folder / "table")).names("data/")) >= shards
    return peaks
