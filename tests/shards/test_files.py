"""Loose files: groups that a change hardly moves, read in the version that was listed, and who inherits from whom."""

from __future__ import annotations

import bisect
import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import check_recipe
from engine.errors import ObjectChanged, ObjectNotFound, RecipeError
from engine.schema import RejectReason
from engine.shards.base import Resume
from engine.shards.files import MAX_FILES, FilesReader, groups_of, is_border
from engine.shards.kinds import FilesSource
from engine.storage import ObjectInfo, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "source"))


def reader(store: Store, **fields: Any) -> FilesReader:
    return FilesReader(FilesSource(uri=store.uri, **fields), 1000)


def listed(names: list[str]) -> dict[str, ObjectInfo]:
    """The groups of files that all have one identity."""
    return {g.path: g.to_info() for g in groups_of(ObjectInfo(name, 1, "v1") for name in sorted(names))}


def names_with_borders(folder: str, count: int, borders: int) -> list[str]:
    """Names of which so many end a group, not the last one."""
    plain = (name for n in range(100_000) if not is_border(name := f"{folder}{n:06d}.jpg"))
    ends = (name for n in range(100_000) if is_border(name := f"{folder}{n:06d}.jpg"))
    chosen = [next(ends) for _ in range(borders)] + [next(plain) for _ in range(count - borders - 1)]
    return sorted([*chosen, f"{folder}zzz.jpg"])


def test_one_file_more_or_less_among_many_changes_at_most_two_groups() -> None:
    draw = random.Random(7)
    names = [f"photos/img_{number:06d}.jpg" for number in range(0, 60_000, 3)]
    before = listed(names)
    assert 25 < len(before) < 60
    for _ in range(60):
        changed = list(names)
        if draw.random() < 0.5:
            changed.append(f"photos/img_{draw.randrange(60_000):06d}x.jpg")
        else:
            changed.remove(draw.choice(names))
        after = listed(changed)
        new = [path for path, info in after.items() if before.get(path) != info]
        gone = [path for path in before if path not in after]
        assert 1 <= len(new) <= 2 and len(gone) <= 1, (new, gone)


def test_a_file_that_is_added_to_a_hundred_thousand_leaves_at_most_two_groups_pending() -> None:
    draw = random.Random(11)
    files = [ObjectInfo(f"img_{number:07d}.jpg", 1, "v1") for number in range(0, 1_000_000, 10)]
    before = {group.path: group.files for group in groups_of(files)}
    assert 150 < len(before) < 260
    for _ in range(24):
        added = ObjectInfo(f"img_{draw.randrange(1_000_000):07d}x.jpg", 1, "v1")
        bisect.insort(files, added, key=lambda file: file.path)
        after = {group.path: group.files for group in groups_of(files)}
        pending = [path for path, members in after.items() if before.get(path) != members]
        gone = [path for path in before if path not in after]
        assert 1 <= len(pending) <= 2 and len(gone) <= 1, (added.path, pending, gone)
        before = after


def test_a_group_without_a_list_has_the_identity_that_it_always_had() -> None:
    """Another value would do every table of loose files again."""
    files = [ObjectInfo("cats/a.jpg", 3, "etag:abc:3"), ObjectInfo("cats/b.jpg", 5, "mtime:17:5")]
    (group,) = groups_of(files)
    assert group.to_info() == ObjectInfo("cats/~", 8, "files:0720d01e3f5ff91b8954d5c186e9c1fe")


def test_without_a_border_a_group_ends_at_2048_files() -> None:
    names = [name for n in range(8000) if not is_border(name := f"a/{n:06d}.jpg")][: MAX_FILES + 5]
    first, second = groups_of(ObjectInfo(name, 1, "v1") for name in names)
    assert (first.path, len(first.files)) == ("a/~", MAX_FILES)
    assert (second.path, len(second.files)) == (f"a/~{names[MAX_FILES - 1][2:]}", 5)


def test_every_folder_has_groups_of_its_own_wherever_its_subfolders_are_sorted(store: Store) -> None:
    for name in [
        "1.jpg",
        "a/1.jpg",
        "a/b/2.jpg",
        "a/b/c/3.jpg",
        "a/d.jpg",
        "a-b/4.PNG",
        "z.webp",
        "a/no.txt",
    ]:
        store.write(name, name.encode())
    groups = {shard.path: shard for shard in reader(store).list_shards(store)}
    found = {
        path: [s.key for s in reader(store).read(store, shard, Resume())] for path, shard in groups.items()
    }
    assert found == {
        "~": ["1.jpg", "z.webp"],
        "a/~": ["a/1.jpg", "a/d.jpg"],
        "a/b/~": ["a/b/2.jpg"],
        "a/b/c/~": ["a/b/c/3.jpg"],
        "a-b/~": ["a-b/4.PNG"],
    }


def test_a_file_is_a_sample_with_its_folder_as_label_and_bad_ones_are_rejects(store: Store) -> None:
    for name, data in {
        "cats/a.jpg": b"1",
        "cats/b.jpg": b"",
        "cats/c.jpg": b"x" * 1001,
        "cats/d.jpg": b"4",
    }.items():
        store.write(name, data)
    (shard,) = reader(store).list_shards(store)
    told: list[int] = []
    samples = list(reader(store, label="folder").read(store, shard, Resume(), told.append))
    assert [(s.key, s.index, s.image, s.label, s.size_bytes) for s in samples] == [
        ("cats/a.jpg", 0, b"1", "cats", 1),
        ("cats/b.jpg", 1, None, "cats", 0),
        ("cats/c.jpg", 2, None, "cats", 1001),
        ("cats/d.jpg", 3, b"4", "cats", 1),
    ]
    reasons = [s.problem[0] if s.problem else None for s in samples]
    assert reasons == [None, RejectReason.EMPTY_SAMPLE, RejectReason.SAMPLE_TOO_LARGE, None]
    assert sum(told) == 2
    assert list(reader(store, label="folder").read(store, shard, Resume(2))) == samples[2:]
    with pytest.raises(ValueError, match="byte 5"):
        list(reader(store).read(store, shard, Resume(1, 5)))


def test_many_files_come_in_order_and_a_read_may_be_given_up(store: Store) -> None:
    for number in range(100):
        store.write(f"{number:03d}.jpg", bytes([number]) * 900)
    reading = reader(store)
    shards = list(reading.list_shards(store))
    images = [s.image for shard in shards for s in reading.read(store, shard, Resume())]
    assert images == [bytes([number]) * 900 for number in range(100)]
    one = reading.read(store, shards[0], Resume())
    next(one)
    one.close()  # type: ignore[attr-defined]


def test_a_group_that_changed_since_the_listing_is_not_read(store: Store) -> None:
    for number in range(3):
        store.write(f"a/{number}.jpg", b"old")
    reading = reader(store)
    (shard,) = reading.list_shards(store)
    assert len(list(reading.read(store, shard, Resume()))) == 3
    begun = reading.read(store, shard, Resume())
    store.write("a/1.jpg", b"newer")
    with pytest.raises(ObjectChanged):
        list(begun)
    with pytest.raises(ObjectChanged, match="a/~"):
        list(reader(store).read(store, shard, Resume()))
    assert reading.identity_now(store, "a/~") not in (None, shard.identity)
    for number in range(3):
        store.delete(f"a/{number}.jpg")
    with pytest.raises(ObjectNotFound, match="a/~"):
        list(reader(store).read(store, shard, Resume()))
    assert reading.identity_now(store, "a/~") is None


def test_the_heir_of_a_group_is_the_one_before_it_in_its_folder(store: Store) -> None:
    names = names_with_borders("a/", 6, borders=2)
    for name in [*names, "b/x.jpg"]:
        store.write(name, b"1")
    reading = reader(store)
    first, second, third = sorted(s.path for s in reading.list_shards(store) if s.path.startswith("a/"))
    border = f"a/{second.removeprefix('a/~')}"
    assert is_border(border)
    store.delete(border)
    assert sorted(s.path for s in reading.list_shards(store)) == [first, third, "b/~"]
    assert reading.successor(store, second) == first
    for name in names:
        store.delete(name)
    assert reading.successor(store, second) is None


def test_a_pattern_and_extensions_choose_the_files(store: Store) -> None:
    for name in ["2025/a.jpg", "2026/a.jpg", "2026/b.tif", "2026/x/c.jpg"]:
        store.write(name, b"1")
    paths = [s.path for s in reader(store, pattern="2026/*", image=("jpg", "tif")).list_shards(store)]
    assert paths == ["2026/~"]
    with pytest.raises(RecipeError):
        check_recipe(FilesSource, {"uri": "/x", "label": "file"}, origin="recipe")
