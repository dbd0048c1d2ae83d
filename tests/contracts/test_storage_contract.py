"""What every kind of store must do, over a disk and over a real S3 store."""

from __future__ import annotations

import functools
import gzip
import io
import multiprocessing
import pickle
import tarfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ObjectChanged, ObjectNotFound, StorageError
from engine.storage import ObjectInfo, StorageConfig, Store, open_store
from engine.storage.base import BLOCK_BYTES

ODD_NAMES = [
    "a b.tar",
    "a#b?c=d&e.tar",
    "100%.tar",
    "%41.tar",
    "a+b.tar",
    "é/日本語.tar",
    "_x.tar",
    ".hidden",
    "a'b\"c",
]


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return open_store(str(tmp_path / "store"))
    config: StorageConfig = request.getfixturevalue("s3_config")
    return open_store(request.getfixturevalue("s3_uri"), config)


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes without a short period, so that a shifted or repeated block shows."""
    block = noise_block(seed)
    return (block * (size // len(block) + 1))[:size]


@functools.cache
def noise_block(seed: int) -> bytes:
    return bytes((i * i * 31 + i * seed + (i >> 8)) % 251 for i in range(65_521))


def paths(store: Store, prefix: str = "") -> list[str]:
    return [info.path for info in store.list(prefix)]


def test_what_was_written_is_listed_found_and_read(store: Store) -> None:
    written = store.write("2026/01/a.tar", noise(7919))
    assert written == ObjectInfo("2026/01/a.tar", 7919, written.identity)
    assert list(store.list()) == [written]
    assert store.info("2026/01/a.tar") == written
    assert store.read("2026/01/a.tar", expected=written) == noise(7919)


def test_a_listing_says_when_an_object_came(store: Store) -> None:
    """To the second, as S3 says it; by the clock of the store, which is this machine's here."""
    began = time.time()
    store.write("a", b"1")
    (listed,) = store.list()
    assert listed.modified is not None
    assert began - 1 <= listed.modified <= time.time() + 1
    assert store.info("a").modified == pytest.approx(listed.modified, abs=1)


def test_a_range_reaches_as_far_as_the_object(store: Store) -> None:
    store.write("a", bytes(range(101)))
    assert store.read("a", 7, 5) == bytes(range(7, 12))
    assert store.read("a", 97) == bytes(range(97, 101))
    assert store.read("a", 97, 1000) == bytes(range(97, 101))
    assert [store.read("a", 101), store.read("a", 101, 3), store.read("a", 5000), store.read("a", 3, 0)] == [
        b""
    ] * 4


def test_an_empty_object_is_an_object(store: Store) -> None:
    info = store.write("empty", b"")
    assert (info.size, list(store.list()), store.info("empty")) == (0, [info], info)
    assert store.read("empty") == store.read("empty", expected=info) == b""
    with store.open_input(info) as stream:
        assert (stream.read(), stream.bytes_read) == (b"", 0)


def test_listing_is_in_code_point_order_of_the_whole_path(store: Store) -> None:
    names = [
        "a/b",
        "a.tar",
        "a-b/c",
        "a",
        "a/c/d",
        "A",
        "b",
        "a!",
        "ab",
        "a/b.c",
        "é",
        "a\N{GRINNING FACE}",
        "a\ufffd",
    ]
    if store.uri.startswith("/"):
        names.remove("a")  # a disk cannot hold a file and a folder of one name
    for name in names:
        store.write(name, b"x")
    assert paths(store) == sorted(store.names()) == sorted(names)


def test_listing_takes_a_prefix_as_text(store: Store) -> None:
    for name in ["data/1", "data/2/3", "data2/4", "dat", "other"]:
        store.write(name, b"x")
    assert paths(store, "data/") == ["data/1", "data/2/3"]
    assert paths(store, "data") == ["data/1", "data/2/3", "data2/4"]
    assert paths(store, "data/2") == ["data/2/3"]
    for prefix in ("data/", "data", "data/2", "nothing/", "data/1/"):
        assert sorted(store.names(prefix)) == paths(store, prefix)
    assert paths(store, "nothing/") == paths(store, "data/1/") == []
    assert paths(store.sub("data")) == ["1", "2/3"]


def test_a_place_where_nothing_is_yet_lists_nothing(store: Store) -> None:
    assert paths(store) == paths(store.sub("not/yet")) == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_kept_as_they_are(store: Store, name: str) -> None:
    info = store.write(name, name.encode())
    assert paths(store) == [name]
    assert store.info(name) == info
    assert store.read(name, expected=info) == name.encode()
    store.delete(name)
    assert paths(store) == []


def test_odd_folder_names_are_kept_in_the_uri(store: Store) -> None:
    below = store.sub("x y#?%41 é")
    below.write("b", b"1")
    assert paths(store) == ["x y#?%41 é/b"]
    assert open_store(below.uri, below.config).read("b") == b"1"


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "a/..", "..", ".", "./a", "", "/etc/passwd", "a/", "a\0b", "\udcff"]
)
def test_no_path_leaves_the_root(store: Store, path: str) -> None:
    with pytest.raises(StorageError, match="below"):
        store.write(path, b"x")
    with pytest.raises(StorageError, match="below"):
        store.read(path)
    with pytest.raises(StorageError, match="below"):
        list(store.list("../"))


def test_a_missing_object_is_named(store: Store) -> None:
    for request in (store.info, store.read):
        with pytest.raises(ObjectNotFound) as caught:
            request("no/such.tar")
        assert f"{store.uri}/no/such.tar" in str(caught.value)
        assert caught.value.way_out


def test_writing_again_replaces_the_whole_object(store: Store) -> None:
    first, second = store.write("a", noise(1009)), store.write("a", noise(13))
    assert first.identity != second.identity
    assert (store.read("a"), list(store.list())) == (noise(13), [second])


def test_deleting_twice_is_fine(store: Store) -> None:
    store.write("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert paths(store) == []


def test_create_says_whether_the_content_there_is_ours(store: Store) -> None:
    assert store.create("_table.json", b"one") is True
    assert store.create("_table.json", b"two") is False
    assert store.create("_table.json", b"one") is True
    assert store.read("_table.json") == b"one"
    assert paths(store) == ["_table.json"]


def test_of_sixteen_that_create_at_once_one_wins(store: Store) -> None:
    start = threading.Barrier(16)

    def create(i: int) -> tuple[bool, bytes]:
        start.wait()
        won = store.create("_table.json", b"%d" % i * 1000)
        return won, store.read("_table.json")

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(create, range(16)))
    winners = [i for i, (won, _) in enumerate(answers) if won]
    assert len(winners) == 1
    assert {seen for _, seen in answers} == {b"%d" % winners[0] * 1000}


def test_a_copy_has_the_bytes_and_the_source_stays(store: Store) -> None:
    source = store.write("held/a.parquet", noise(7919))
    target = store.copy(source, "data/2026/a.parquet")
    assert target == ObjectInfo("data/2026/a.parquet", 7919, target.identity)
    assert list(store.list()) == [target, source]
    assert store.read(target.path, expected=target) == store.read(source.path, expected=source) == noise(7919)


def test_an_empty_object_is_copied(store: Store) -> None:
    target = store.copy(store.write("a", b""), "b")
    assert (target.size, store.read("b", expected=target)) == (0, b"")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_copied_from_and_to(store: Store, name: str) -> None:
    first = store.write(f"held/{name}", name.encode())
    second = store.copy(first, f"data/{name}")
    assert list(store.list()) == [second, first]
    assert store.read(f"data/{name}", expected=second) == name.encode()


def test_a_copy_replaces_what_was_there_and_can_be_made_again(store: Store) -> None:
    store.write("data/a", noise(1009))
    source = store.write("held/a", noise(13))
    for _ in range(2):
        target = store.copy(source, "data/a")
        assert list(store.list()) == [target, source]
        assert store.read("data/a", expected=target) == noise(13)


def test_a_copy_is_no_longer_tied_to_its_source(store: Store) -> None:
    first, second = (store.copy(store.write("held/a", noise(101, i)), f"data/{i}") for i in (1, 2))
    store.write("held/a", noise(103))
    assert store.read("data/2", expected=second) == noise(101, 2)
    store.delete("held/a")
    assert list(store.list()) == [first, second]
    store.write("data/1", noise(107))
    assert [store.read("data/1"), store.read("data/2")] == [noise(107), noise(101, 2)]


def test_a_replaced_object_is_not_copied(store: Store) -> None:
    before = store.write("data/a", noise(17))
    old = store.write("held/a", noise(1009))
    new = store.write("held/a", noise(1009, seed=2))
    assert new.size == old.size
    for path in ("data/a", "data/b"):
        with pytest.raises(ObjectChanged) as caught:
            store.copy(old, path)
        assert f"{store.uri}/held/a" in str(caught.value)
    assert list(store.list()) == [before, new]


def test_a_vanished_object_is_not_copied(store: Store) -> None:
    info = store.write("held/a", b"123")
    store.delete("held/a")
    with pytest.raises(ObjectNotFound) as caught:
        store.copy(info, "data/a")
    assert f"{store.uri}/held/a" in str(caught.value)
    assert paths(store) == []


@pytest.mark.parametrize(("path", "words"), [("a", "onto itself"), ("../a", "below"), ("", "below")])
def test_a_copy_goes_to_another_place_below_the_root(store: Store, path: str, words: str) -> None:
    info = store.write("a", b"123")
    with pytest.raises(StorageError, match=words):
        store.copy(info, path)
    assert list(store.list()) == [info]


def test_a_reader_never_sees_half_a_copy(store: Store) -> None:
    sources = [store.write(f"held/{seed}", noise(300_007, seed)) for seed in (1, 2, 3)]
    store.copy(sources[0], "a")
    done = threading.Event()

    def copy() -> None:
        for i in range(30):
            store.copy(sources[i % 3], "a")
        done.set()

    copier = threading.Thread(target=copy)
    copier.start()
    seen = []
    while not done.is_set():
        seen.append(store.read("a"))
        assert paths(store, "a") == ["a"]
    copier.join()
    assert seen and set(seen) <= {noise(300_007, seed) for seed in (1, 2, 3)}
    assert paths(store) == ["a", *(source.path for source in sources)]  # no temporary file either


def test_a_reader_never_sees_half_a_write(store: Store) -> None:
    contents = [noise(300_007, seed) for seed in (1, 2, 3)]
    store.write("a", contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(30):
            store.write("a", contents[i % 3])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(store.read("a"))
        assert paths(store) == ["a"]  # no temporary file either
    writer.join()
    assert seen and set(seen) <= set(contents)


@pytest.mark.parametrize(
    "offset", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 3, 2 * BLOCK_BYTES + 4099]
)
def test_a_stream_goes_from_any_offset_to_the_end(store: Store, offset: int) -> None:
    data = noise(2 * BLOCK_BYTES + 4099)
    info = store.write("a", data)
    with store.open_input(info, offset) as stream:
        pieces = [stream.read(1000), stream.read(BLOCK_BYTES), stream.read(), stream.read(5)]
        assert b"".join(pieces) == data[offset:]
        assert stream.bytes_read == len(data) - offset


def test_a_stream_feeds_tar_and_gzip(store: Store) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for i in range(23):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = 500_009
            tar.addfile(member, io.BytesIO(noise(500_009, i)))
    plain = store.write("a.tar", packed.getvalue())
    zipped = store.write("a.tar.gz", gzip.compress(packed.getvalue(), 1))
    assert plain.size > BLOCK_BYTES
    for info, mode in [(plain, "r|"), (zipped, "r|gz")]:
        with store.open_input(info) as stream, tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
            members = {member.name: tar.extractfile(member).read() for member in tar}
        assert members == {f"{i}.jpg": noise(500_009, i) for i in range(23)}
    with store.open_input(zipped) as stream, gzip.GzipFile(fileobj=stream) as unzipped:
        assert unzipped.read() == packed.getvalue()


def test_a_replaced_object_fails_instead_of_mixing(store: Store) -> None:
    old = store.write("a", noise(2 * BLOCK_BYTES + 17))
    stream = store.open_input(old)
    assert stream.read(1) == noise(1)
    new = store.write("a", noise(2 * BLOCK_BYTES + 17, seed=2))
    assert new.size == old.size and new.identity != old.identity
    with stream, pytest.raises(ObjectChanged) as caught:
        stream.read()
    assert f"{store.uri}/a" in str(caught.value)
    with pytest.raises(ObjectChanged):
        store.read("a", 3, 5, expected=old)
    with pytest.raises(ObjectChanged):
        store.open_input(old).read()
    assert store.read("a", 3, 5, expected=new) == noise(100, seed=2)[3:8]


def test_an_object_that_vanished_is_not_found(store: Store) -> None:
    info = store.write("a", b"123")
    store.delete("a")
    with pytest.raises(ObjectNotFound):
        store.open_input(info).read()


def test_streams_closed_early_leave_no_thread(store: Store) -> None:
    info = store.write("a", noise(3 * BLOCK_BYTES))
    store.open_input(info).close()
    before = set(threading.enumerate())
    for _ in range(10):
        stream = store.open_input(info)
        stream.read(10)
        stream.close()
        with pytest.raises(ValueError, match="closed"):
            stream.read(1)
    assert set(threading.enumerate()) <= before


def test_a_pickled_store_is_the_same_store(store: Store) -> None:
    info = store.write("a", b"123")  # it has a connection by now
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.uri, copy.config, list(copy.list())) == (store.uri, store.config, [info])


def test_many_threads_share_one_store(store: Store) -> None:
    def work(i: int) -> bool:
        info = store.write(f"{i:02}", noise(10_007 + i, i))
        with store.open_input(info, i) as stream:
            return stream.read() == noise(10_007 + i, i)[i:] and store.info(info.path) == info

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(32)))
    assert paths(store) == [f"{i:02}" for i in range(32)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_child_process_uses_its_parents_store(store: Store, method: str) -> None:
    store.write("parent", noise(1009))  # the parent's connection is open when the child is made
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=copy_object, args=(store, "parent", "child"))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert store.read("child") == noise(1009)


def copy_object(store: Store, source: str, target: str) -> None:
    with store.open_input(store.info(source)) as stream:
        store.write(target, stream.read())


def test_an_unused_place_is_really_unused(store: Store) -> None:
    """Guards the fixture: where other tests write too, the listings above would pass or fail by chance."""
    assert paths(store) == []
    store.write(uuid.uuid4().hex, b"")
    assert len(paths(store)) == 1
