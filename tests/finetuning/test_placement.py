"""Shares of training workers: every sample in one of them, and none of them empty; together, as if one had read all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.extraction import Part, read_parts
from engine.finetuning.images import ImageRows, collect_images, join_images
from engine.finetuning.placement import bytes_of, shares_of_workers
from engine.storage import ObjectInfo, open_store
from engine.worklist import ShardWork, WorkList
from tests.extract_jobs import job_without_network
from tests.flows.archives import crop_jpeg, shard_bytes
from tests.shards.archives import member, tar_bytes

SIDE = 32


def works_of(*sizes: int) -> list[ShardWork]:
    return [ShardWork(ObjectInfo(f"{place}.tar", size, "etag")) for place, size in enumerate(sizes)]


def turns(share: WorkList) -> list[tuple[str, tuple[int, int]]]:
    return [(work.shard.path, work.turn) for work in share]


def test_many_shards_stay_whole_and_loads_differ_by_one_of_them_at_most() -> None:
    works = works_of(*[100] * 23, 37)
    shares = shares_of_workers(works, 3)
    assert sorted(path for share in shares for path, _ in turns(share)) == sorted(
        work.shard.path for work in works
    )
    assert {turn for share in shares for _, turn in turns(share)} == {(0, 1)}
    assert sorted(bytes_of(share) for share in shares) == [737, 800, 800]


def test_a_large_shard_is_shared_by_workers_that_each_take_it_once() -> None:
    shares = shares_of_workers(works_of(4000, 700, 1), 2)
    assert turns(shares[0]) == [("0.tar", (0, 2)), ("1.tar", (0, 2)), ("2.tar", (0, 1))]
    assert turns(shares[1]) == [("0.tar", (1, 2)), ("1.tar", (1, 2))]
    assert [bytes_of(share) for share in shares] == [2351, 2350]


@pytest.mark.parametrize("sizes", [(5,), (1, 1), (0, 0, 0), (10**12, 1, 1), (7, 7, 7, 7, 7, 7)])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_no_worker_is_left_without_anything(sizes: tuple[int, ...], workers: int) -> None:
    shares = shares_of_workers(works_of(*sizes), workers)
    assert all(len(share) for share in shares)
    for place in range(len(sizes)):
        taken = [turn for share in shares for path, turn in turns(share) if path == f"{place}.tar"]
        assert sorted(taken) == [(turn, len(taken)) for turn in range(len(taken))]


def test_without_shards_there_is_nothing_to_share() -> None:
    assert [len(share) for share in shares_of_workers([], 3)] == [0, 0, 0]


class Threads:
    """What `Workers` are to each other, for workers that are threads of this process."""

    def __init__(self, rank: int, told: list[bytes], barrier: threading.Barrier) -> None:
        self.rank, self._told, self._barrier = rank, told, barrier

    def gathered(self, content: bytes) -> list[bytes]:
        self._told[self.rank] = content
        self._barrier.wait(30)
        return list(self._told)


def collect_split(folder: Path, workers: int, rows_per_part: int = 16) -> list[tuple[ImageRows, np.ndarray]]:
    """Of each worker: all rows, and the pixels of its own."""
    job = job_without_network(folder, SIDE, rows_per_part=rows_per_part)
    works = [
        ShardWork(shard) for shard in sorted(open_store(job.source.uri).list(), key=lambda one: one.path)
    ]
    shards = [work.shard.path for work in works]
    told, barrier = [b""] * workers, threading.Barrier(workers)
    found: list[tuple[ImageRows, np.ndarray] | None] = [None] * workers

    def work(rank: int, share: Sequence[ShardWork]) -> None:
        with collect_images(read_parts(job, share), shards, SIDE, folder) as own:
            joined = join_images(own, shards, Threads(rank, told, barrier))  # type: ignore[arg-type]
            assert joined.holders_N is not None
            found[rank] = joined, joined.pixels(np.flatnonzero(joined.holders_N == rank))

    threads = [
        threading.Thread(target=work, args=(rank, share))
        for rank, share in enumerate(shares_of_workers(works, workers))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [one for one in found if one is not None]


def write_uneven_shards(folder: Path) -> list[str]:
    """Of 40, 7 and 1 images; every key."""
    store, first = open_store(str(folder / "shards")), 0
    for place, count in enumerate((40, 7, 1)):
        store.write(f"{place:05d}.tar", shard_bytes(first, count))
        first += count
    return [f"{number:06d}" for number in range(48)]


@pytest.mark.parametrize("workers", [2, 3])
def test_split_images_joined_are_those_that_one_worker_collects(workers: int, tmp_path: Path) -> None:
    keys = write_uneven_shards(tmp_path)
    ((alone, pixels_NSS3),) = collect_split(tmp_path, 1)
    assert alone.samples["key"].to_pylist() == keys
    found = collect_split(tmp_path, workers, rows_per_part=3)
    assert len(found) == workers
    for rank, (joined, own_SS3) in enumerate(found):
        assert joined.samples.equals(alone.samples)
        assert joined.holders_N is not None
        own = np.flatnonzero(joined.holders_N == rank)
        assert 0 < len(own) <= 27
        np.testing.assert_array_equal(own_SS3, pixels_NSS3[own])
        np.testing.assert_array_equal(joined.holders_N, found[0][0].holders_N)
        assert joined.rows_per_worker(workers)[rank] == len(joined._pixels_MSS3) == len(own)
    counts = found[0][0].rows_per_worker(workers)
    assert counts == {2: [25, 23], 3: [18, 16, 14]}[workers]


def test_an_image_on_another_worker_is_not_taken_for_another_image(tmp_path: Path) -> None:
    write_uneven_shards(tmp_path)
    (joined, _), _ = collect_split(tmp_path, 2)
    assert joined.holders_N is not None
    elsewhere = np.flatnonzero(joined.holders_N == 1)[:1]
    with pytest.raises(IndexError, match="on the disks of other workers"):
        joined.pixels(elsewhere)


def test_rejects_of_all_workers_are_counted_once_each(tmp_path: Path) -> None:
    whole, half = crop_jpeg(0)[0], crop_jpeg(1)[0][:200]
    members = []
    for number in range(9):  # every third is damaged
        members += [
            member(f"{number}.jpg", half if number % 3 == 0 else whole),
            member(f"{number}.cls", b"x"),
        ]
    open_store(str(tmp_path / "shards")).write("0.tar", tar_bytes([*members, member("9.cls", b"x")]))
    for joined, _ in collect_split(tmp_path, 2):
        assert joined.rejects == {"truncated_image": 3, "no_image": 1}
        assert joined.samples["index"].to_pylist() == [1, 2, 4, 5, 7, 8]


def test_a_worker_whose_share_has_no_image_has_none(tmp_path: Path) -> None:
    open_store(str(tmp_path / "shards")).write("0.tar", shard_bytes(0, 1))
    (first, pixels_SS3), (second, none_SS3) = collect_split(tmp_path, 2)
    assert (len(first), len(second)) == (1, 1)
    assert (pixels_SS3.shape, none_SS3.shape) == ((1, SIDE, SIDE, 3), (0, SIDE, SIDE, 3))
    assert first.rows_per_worker(2) == [1, 0]


def test_readers_that_share_a_shard_read_every_sample_once(tmp_path: Path) -> None:
    write_uneven_shards(tmp_path)
    job = job_without_network(tmp_path, SIDE, rows_per_part=5)
    works = [ShardWork(shard) for shard in open_store(job.source.uri).list()]
    read: Counter[str] = Counter()
    for share in shares_of_workers(works, 3):
        for row in read_parts(job, share):
            samples = Part.from_row(row).samples
            assert samples is not None and samples.num_rows <= 5
            read.update(samples["key"].to_pylist())
    assert read == {f"{number:06d}": 1 for number in range(48)}
