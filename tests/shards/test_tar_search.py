"""One record of a long tar is found in a few looks, whatever the sizes; what is not found is not guessed."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ObjectChanged
from engine.shards.base import Resume, Sample
from engine.shards.kinds import WebDatasetSource
from engine.shards.tar_search import WINDOW_BYTES, Stretch
from engine.shards.webdataset import WebDatasetReader
from engine.storage import Store, open_store
from tests.shards.archives import member, put, tar_bytes

RECORDS = 300
CONFIG = WebDatasetSource(uri="/unused", label="cls")


def sizes_alike(number: int) -> int:
    return 100_003


def sizes_apart(number: int) -> int:
    """From 1 kB to 400 kB, the large ones behind."""
    return 1_000 + 400_000 * number**3 // RECORDS**3


def archive(size_of: Callable[[int], int], form: int = tarfile.USTAR_FORMAT, prefix: str = "") -> bytes:
    random = np.random.default_rng(4)
    members = []
    for number in range(RECORDS):
        members += [
            member(f"{prefix}k{number:04d}.jpg", random.bytes(size_of(number))),
            member(f"{prefix}k{number:04d}.cls", b"ant"),
        ]
    return tar_bytes(members, form)


def opened(folder: Path, data: bytes) -> tuple[Store, WebDatasetReader, list[Sample], Stretch]:
    store, reader = open_store(str(folder)), WebDatasetReader(CONFIG, 1 << 30)
    samples = list(reader.read(store, put(store, data), Resume()))
    first, last = samples[11], samples[-2]  # a part has other parts on both sides
    assert first.begin_offset is not None and last.end_offset is not None
    indexes = {sample.key: sample.index for sample in samples[11:-1]}
    stretch = Stretch(11, first.begin_offset, last.index + 1, last.end_offset, indexes)
    return store, reader, samples, stretch


@pytest.mark.parametrize("size_of", [sizes_alike, sizes_apart])
@pytest.mark.parametrize(
    ("form", "prefix"),
    [(tarfile.USTAR_FORMAT, ""), (tarfile.PAX_FORMAT, "é" * 60), (tarfile.GNU_FORMAT, "n" * 130)],
    ids=["ustar", "pax", "gnu"],
)
def test_each_record_is_found_as_a_whole_read_has_it(
    tmp_path: Path, size_of: Callable[[int], int], form: int, prefix: str
) -> None:
    store, reader, samples, stretch = opened(tmp_path, archive(size_of, form, prefix))
    whole = sum(sample.size_bytes for sample in samples)
    for wanted in samples[11:-1:29]:
        read: list[int] = []
        found = reader.find(store, store.info("a.tar"), wanted.key, stretch, read.append)
        assert found is not None
        assert (found.image, found.label, found.begin_offset) == (wanted.image, "ant", wanted.begin_offset)
        assert (found.index, found.end_offset) == (-1, wanted.end_offset)
        assert stretch.window_bytes == WINDOW_BYTES
        assert sum(read) <= (1 if size_of is sizes_alike else 5) * WINDOW_BYTES < whole


def test_a_record_that_is_not_there_any_more_is_not_found(tmp_path: Path) -> None:
    store, reader, _, stretch = opened(tmp_path, archive(sizes_alike))
    renamed = archive(sizes_alike).replace(b"k0150.", b"x0150.")
    info = store.write("b.tar", renamed)  # its headers have wrong checksums now
    assert reader.find(store, info, "k0150", stretch) is None
    assert reader.find(store, store.write("c.tar", bytes(40_000_000)), "k0150", stretch) is None
    assert reader.find(store, store.write("d.tar", b""), "k0150", stretch) is None


def test_a_shard_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    store, reader, _, stretch = opened(tmp_path, archive(sizes_alike))
    before = store.info("a.tar")
    store.write("a.tar", archive(sizes_apart))
    with pytest.raises(ObjectChanged):
        reader.find(store, before, "k0150", stretch)
