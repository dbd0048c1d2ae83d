"""Decoded images: all of them, in the order of the shards whatever the order of arrival; damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineError, ShardsFailed
from engine.extraction import Part, PartHeader, read_parts
from engine.finetuning import images as module
from engine.finetuning.images import collect_images
from engine.images import decode_image
from engine.storage import open_store
from engine.worklist import ShardWork
from tests.extract_jobs import job_without_network
from tests.flows.archives import crop_jpeg, write_shards
from tests.shards.archives import member, tar_bytes


def rows_and_shards(folder: Path) -> tuple[list, list[str]]:
    job = job_without_network(folder, 32, rows_per_part=4)
    store = open_store(job.source.uri)
    works = [ShardWork(shard) for shard in sorted(store.list(), key=lambda one: one.path)]
    return list(read_parts(job, works)), [work.shard.path for work in works]


def test_rows_are_in_the_order_of_shards_and_samples_whatever_came_first(tmp_path: Path) -> None:
    keys = write_shards(open_store(str(tmp_path / "shards")), shards=3, images=7)
    rows, shards = rows_and_shards(tmp_path)
    assert len(rows) == 6  # two parts of each shard
    with collect_images(rows[::-1], shards, 32, tmp_path) as images:
        assert images.samples["key"].to_pylist() == keys
        assert len(images) == 21
        for row in (0, 6, 7, 20):
            expected = decode_image(crop_jpeg(row)[0], 32, "stretch", 10**6).pixels_SS3
            np.testing.assert_array_equal(images.pixels(np.array([row]))[0], expected)
        picked = images.pixels(np.array([20, 0, 20]))
        np.testing.assert_array_equal(picked[0], picked[2])
        assert picked.shape == (3, 32, 32, 3)
    assert not list(tmp_path.glob("engine-images-*"))


def test_samples_without_an_image_are_counted_by_reason(tmp_path: Path) -> None:
    members = [
        member("a.jpg", crop_jpeg(0)[0]),
        member("a.cls", b"x"),
        member("b.jpg", crop_jpeg(1)[0][:200]),
        member("b.cls", b"x"),
        member("c.cls", b"x"),
    ]
    open_store(str(tmp_path / "shards")).write("0.tar", tar_bytes(members))
    rows, shards = rows_and_shards(tmp_path)
    with collect_images(rows, shards, 32, tmp_path) as images:
        assert images.samples["key"].to_pylist() == ["a"]
        assert images.rejects == {"truncated_image": 1, "no_image": 1}


def test_a_shard_that_cannot_be_read_stops_it_by_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "shards"))
    write_shards(store, shards=2, images=3)
    store.write("00001.tar", store.read("00001.tar")[:-3000])
    rows, shards = rows_and_shards(tmp_path)
    told = r"1 of 2 shards cannot be read(.|\n)*00001\.tar"
    with pytest.raises(ShardsFailed, match=told), collect_images(rows, shards, 32, tmp_path):
        pass


def test_a_disk_without_room_is_named_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(open_store(str(tmp_path / "shards")), shards=1, images=3)
    rows, shards = rows_and_shards(tmp_path)
    monkeypatch.setattr(module, "NO_ROOM_LEFT", 1 << 60)
    with pytest.raises(EngineError, match="set TMPDIR") as told, collect_images(rows, shards, 32, tmp_path):
        pass
    assert "training.images" not in str(told.value)
    split = "set training.images: split, so that each worker has its share, set TMPDIR"
    with (
        pytest.raises(EngineError, match=split),
        collect_images(rows, shards, 32, tmp_path, could_be_split=True),
    ):
        pass


def test_no_images_at_all_are_no_rows(tmp_path: Path) -> None:
    with collect_images([], [], 32, tmp_path) as images:
        assert len(images) == 0
        assert images.pixels(np.empty(0, np.int64)).shape == (0, 32, 32, 3)


def test_a_header_without_samples_is_what_damage_looks_like() -> None:
    row = Part(PartHeader("x.tar", "1", 0, damage="gone")).to_row()
    with pytest.raises(ShardsFailed, match=r"x\.tar: gone"), collect_images([row], ["x.tar"], 32):
        pass
