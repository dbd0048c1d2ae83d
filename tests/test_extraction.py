"""The plain stages of extraction in one process: parts are cut, resumed, embedded and committed exactly."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.errors import CanaryMismatch, EngineError
from engine.extraction import (
    ExtractJob,
    Part,
    PartEmbedder,
    PartHeader,
    Receipt,
    Setup,
    _BusyClock,
    _decode_pool,
    _without_unusable,
    decode_part,
    default_rows_per_part,
    read_parts,
    write_part,
)
from engine.images import decode_image
from engine.parts import Progress, parse_part_name, part_name
from engine.recipes import Limits
from engine.resolve import Archive, Network, resolve
from engine.storage import ObjectInfo, open_store
from engine.tables import list_parts, read_embedding_facts, read_part
from engine.worklist import ShardWork
from tests.extract_jobs import job_without_network
from tests.flows.archives import crop_jpeg, shard_bytes
from tests.shards.archives import member, tar_bytes

SIDE_PX, ROWS, WIDTH = 32, 16, 5
FINGERPRINT = "f" * 64


@pytest.fixture
def job(tmp_path: Path) -> ExtractJob:
    """A job whose network is never loaded; its embeddings are made up by `embedded`."""
    return job_without_network(tmp_path, SIDE_PX, rows_per_part=ROWS, decode_threads=3)


def put_shard(job: ExtractJob, data: bytes, path: str = "a.tar") -> ObjectInfo:
    return open_store(job.source.uri).write(path, data)


def parts_of(job: ExtractJob, shard: ObjectInfo, existing: Progress = Progress()) -> list[Part]:  # noqa: B008
    return [Part.from_row(row) for row in read_parts(job, [ShardWork(shard, existing)])]


def embedded(part: Part) -> pa.Table:
    """The part with an embedding for each image: its mean colour and its place."""
    assert part.array is not None
    means = part.array.reshape(len(part.array), -1).mean(axis=1, dtype=np.float32)
    header = replace(part.header, fingerprint=FINGERPRINT)
    return Part(
        header, part.samples, part.rejects, np.stack([means + i for i in range(WIDTH)], axis=1) + 1
    ).to_row()


def commit(job: ExtractJob, part: Part) -> Receipt:
    return Receipt.from_json(write_part(job, embedded(part))["receipt"][0].as_py())


def test_a_shard_is_cut_into_full_parts_and_a_last_one_without_gaps(job: ExtractJob) -> None:
    shard = put_shard(job, shard_bytes(0, 40))
    headers = [part.header for part in parts_of(job, shard)]
    assert [(h.number, h.last, h.samples) for h in headers] == [(0, False, 16), (1, False, 16), (2, True, 8)]
    assert headers[0].begin_offset == 0
    assert [h.end_offset for h in headers[:2]] == [h.begin_offset for h in headers[1:]]
    assert sum(h.bytes_read for h in headers) == shard.size


@pytest.mark.parametrize("samples", [ROWS, 2 * ROWS])
def test_a_shard_that_fills_its_parts_exactly_has_no_empty_part_behind(job: ExtractJob, samples: int) -> None:
    headers = [part.header for part in parts_of(job, put_shard(job, shard_bytes(0, samples)))]
    assert [h.last for h in headers] == [False] * (samples // ROWS - 1) + [True]
    assert sum(h.samples for h in headers) == samples


def test_rows_carry_the_pixels_of_their_own_image(job: ExtractJob) -> None:
    (part,) = parts_of(job, put_shard(job, shard_bytes(5, 11)))
    assert part.array is not None and part.samples is not None
    for number, pixels in zip(range(5, 16), part.array, strict=True):
        wanted = decode_image(crop_jpeg(number)[0], SIDE_PX, "stretch", 10**6).pixels_SS3
        np.testing.assert_array_equal(pixels, wanted)
    assert part.samples["key"].to_pylist() == [f"{number:06d}" for number in range(5, 16)]
    assert part.samples["label"].to_pylist() == [crop_jpeg(number)[1] for number in range(5, 16)]


@pytest.mark.parametrize(
    ("existing", "made"),
    [
        (Progress((0,)), [1, 2, 3]),
        (Progress((0, 1, 2)), [3]),
        (Progress((0, 2)), [1, 3]),
        (Progress((1, 3), last=3), [0, 2]),
        (Progress((0, 1, 3), last=3), [2]),
    ],
)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_only_missing_parts_are_made_and_they_equal_those_of_a_full_read(
    job: ExtractJob, existing: Progress, made: list[int], suffix: str
) -> None:
    import gzip

    data = shard_bytes(0, 60)
    shard = put_shard(job, gzip.compress(data, 1) if suffix == "tar.gz" else data, f"a.{suffix}")
    calm = parts_of(job, shard)
    for part in calm:
        commit(job, part)
    resumed = parts_of(job, shard, existing)
    assert [part.header.number for part in resumed] == made
    for part in resumed:
        wanted = calm[part.header.number]
        for field in ("number", "last", "samples", "begin_offset", "end_offset"):
            assert getattr(part.header, field) == getattr(wanted.header, field)
        assert part.samples is not None and part.samples.equals(wanted.samples)
        np.testing.assert_array_equal(part.array, wanted.array)


def test_resuming_a_plain_tar_does_not_read_what_is_done(job: ExtractJob) -> None:
    shard = put_shard(job, shard_bytes(0, 320))
    for part in parts_of(job, shard):
        commit(job, part)
    (last,) = parts_of(job, shard, Progress(tuple(range(19))))
    assert last.header.number == 19
    assert last.header.bytes_read < shard.size / 10


def test_rejects_take_their_place_in_a_part_and_rows_close_up(job: ExtractJob) -> None:
    good = crop_jpeg(1)[0]
    members = [member(f"{i:02d}.jpg", {3: b"", 7: good[:99], 11: b"GIF99a"}.get(i, good)) for i in range(20)]
    members[5] = member("05.cls", b"no image")
    first, second = parts_of(job, put_shard(job, tar_bytes(members)))
    assert first.rejects is not None and first.samples is not None and first.array is not None
    assert first.rejects["index"].to_pylist() == [3, 5, 7, 11]
    assert first.samples["index"].to_pylist() == [0, 1, 2, 4, 6, 8, 9, 10, 12, 13, 14, 15]
    wanted = decode_image(good, SIDE_PX, "stretch", 10**6).pixels_SS3
    assert all(np.array_equal(pixels, wanted) for pixels in first.array)
    assert second.header.samples == 4
    receipt = commit(job, first)
    assert (receipt.rows, receipt.rejects, sum(receipt.reject_reasons.values())) == (12, 4, 4)


def test_bytes_of_rejects_are_kept_only_on_request(job: ExtractJob) -> None:
    shard = put_shard(job, tar_bytes([member("a.jpg", b"not an image")]))
    (plain,) = parts_of(job, shard)
    assert plain.rejects is not None and "bytes" not in plain.rejects.column_names
    (kept,) = parts_of(replace(job, limits=Limits(keep_reject_bytes=True)), shard)
    assert kept.rejects is not None and kept.rejects["bytes"].to_pylist() == [b"not an image"]


def test_a_damaged_shard_yields_its_good_parts_and_one_row_that_says_why(job: ExtractJob) -> None:
    data = shard_bytes(0, 40)
    shard = put_shard(job, data[: len(data) * 3 // 4])
    *good, damaged = [part.header for part in parts_of(job, shard)]
    assert [(h.number, h.last) for h in good] == [(0, False)]
    assert damaged.damage is not None and "a.tar" in damaged.damage
    assert damaged.number == 1
    again = [part.header for part in parts_of(job, shard, Progress((0,)))]
    assert [header.damage for header in again] == [damaged.damage]


def test_a_shard_that_changed_or_vanished_since_it_was_listed_is_a_failed_shard(job: ExtractJob) -> None:
    listed = put_shard(job, shard_bytes(0, 5))
    put_shard(job, shard_bytes(9, 7))
    (changed,) = parts_of(job, listed)
    assert changed.header.damage is not None
    open_store(job.source.uri).delete("a.tar")
    (vanished,) = parts_of(job, listed)
    assert vanished.header.damage is not None


def test_a_committed_part_names_offsets_counts_and_its_rejects(job: ExtractJob) -> None:
    shard = put_shard(job, tar_bytes([member("a.jpg", crop_jpeg(0)[0]), member("b.jpg", b"")]))
    (part,) = parts_of(job, shard)
    commit(job, part)
    table = open_store(job.table_uri)
    facts = read_embedding_facts(table, part_name("a.tar", shard.identity, 0, True))
    assert (facts.samples, facts.rejects, facts.begin_offset, facts.shard) == (2, 1, 0, "a.tar")
    assert facts.rejects_sha256 is not None and facts.fingerprint == FINGERPRINT
    ((_, info),) = list_parts(table)
    assert read_part(table, info)["key"].to_pylist() == ["a"]
    assert [parse_part_name(found.path) for found in table.list("rejects/")] == [parse_part_name(info.path)]


def test_a_part_that_does_not_account_for_every_sample_is_never_written(job: ExtractJob) -> None:
    (part,) = parts_of(job, put_shard(job, shard_bytes(0, 5)))
    short = replace(part, header=replace(part.header, samples=6))
    with pytest.raises(EngineError, match="does not account for every sample"):
        write_part(job, embedded(short))
    assert list(open_store(job.table_uri).list()) == []


def test_rows_without_a_usable_embedding_become_rejects_in_order(job: ExtractJob) -> None:
    (part,) = parts_of(job, put_shard(job, shard_bytes(0, 5)))
    array = np.ones((5, WIDTH), np.float32)
    array[1], array[3, 2] = 0, np.nan
    left = _without_unusable(replace(part, array=array))
    assert left.samples is not None and left.rejects is not None and left.array is not None
    assert left.samples["index"].to_pylist() == [0, 2, 4]
    assert left.rejects["error"].to_pylist() == ["zero_embedding", "non_finite_embedding"]
    assert left.rejects["stage"].to_pylist() == ["embed", "embed"]
    assert left.array.shape == (3, WIDTH)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3), (3, 2, 2, 3)])
def test_a_part_travels_as_one_row_and_comes_back(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    samples = pa.table({"key": [str(i) for i in range(shape[0])]})
    sent = Part(PartHeader("a.tar", "v1", 7, True, 0, 99, shape[0]), samples, samples.slice(0, 0), array)
    row = sent.to_row()
    assert row.num_rows == 1
    back = Part.from_row(row)
    assert back.header == sent.header
    assert back.samples is not None and back.samples.equals(samples)
    np.testing.assert_array_equal(back.array, array)
    damaged = Part.from_row(Part(PartHeader("a.tar", "v1", 7, damage="cut")).to_row())
    assert (damaged.header.damage, damaged.array, damaged.samples) == ("cut", None, None)


def test_what_travels_in_a_row_is_looked_at_where_it_lies() -> None:
    array = np.zeros((3, 2, 2, 3), np.uint8)
    row = Part(PartHeader("a.tar", "v1", 7), array=array).to_row()
    rows = pa.concat_tables([row, Part(PartHeader("a.tar", "v1", 8), array=array + 1).to_row()])
    back = Part.from_row(row).array
    assert back is not None and back.ctypes.data == array.ctypes.data and not back.flags.writeable
    second = Part.from_row(rows.slice(1)).array  # as Ray cuts rows out of a block
    assert second is not None and second.min() == second.max() == 1
    beside_nothing = pa.concat_tables([row.slice(0, 0), row])
    assert Part.from_row(beside_nothing).header == Part.from_row(row).header


def test_memory_of_pixels_is_used_again_only_when_nobody_holds_a_part_of_it(
    job: ExtractJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[int] = []
    take = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda where, size: fresh.append(size) or take(where, size))
    shard = ShardWork(put_shard(job, shard_bytes(0, 10 * ROWS)))
    held: list[pa.Buffer] = []
    places = []
    for number, row in enumerate(read_parts(job, [shard])):
        array = Part.from_row(row).array
        assert array is not None
        places.append(array.ctypes.data)
        if number == 0:
            held.append(row["array"].chunks[0].buffers()[2])
            wanted = array.copy()
        del array, row
    assert len(set(places[1:])) < 9 and len(fresh) <= 3, "each part has fresh memory"
    assert places[0] not in places[1:], "memory in use is written over"
    np.testing.assert_array_equal(np.frombuffer(held[0], np.uint8), wanted.reshape(-1))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
@pytest.mark.parametrize(("own", "wanted"), [(0, 5), (10, 15), (15, 19)])
def test_decoding_gives_way_to_the_network_however_nice_the_process_is(
    job: ExtractJob, own: int, wanted: int
) -> None:
    found: list[int] = []

    def reader() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, own + os.getpriority(os.PRIO_PROCESS, thread))
        with _decode_pool(job) as pool:
            found.append(
                pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
            )

    thread = threading.Thread(target=reader)
    thread.start()
    thread.join()
    assert found == [min(19, wanted + os.getpriority(os.PRIO_PROCESS, 0))]


@pytest.mark.parametrize(
    ("side_px", "rows"), [(32, 1024), (96, 1024), (160, 832), (224, 384), (331, 192), (1000, 64)]
)
def test_default_part_size_is_about_64_mb_in_steps_of_64_rows(side_px: int, rows: int) -> None:
    assert default_rows_per_part(side_px) == rows


def test_an_actor_that_computes_other_numbers_stops_and_one_that_agrees_works(job: ExtractJob) -> None:
    found = resolve(Network(job.backbone, job.runtime, job.storage), Archive(job.source, job.limits, ()))
    assert (found.graph.width, found.trials) == (1280, ())
    setup = Setup(found.graph, found.runtime, found.fingerprint, found.canary)
    (part,) = parts_of(job, put_shard(job, shard_bytes(0, 3)))
    answer = Part.from_row(PartEmbedder(job, Ready(setup))(part.to_row()))
    assert answer.array is not None and answer.array.shape == (3, 1280)
    assert answer.header.fingerprint == found.fingerprint
    with pytest.raises(CanaryMismatch, match="cosines to the resolved canary: -1.0"):
        PartEmbedder(job, Ready(replace(setup, canary=tuple(tuple(-n for n in row) for row in found.canary))))


@pytest.mark.parametrize(("use_gpu", "at_once"), [(False, 1), (True, 2)])
def test_a_gpu_is_given_two_parts_at_once_and_a_processor_one(
    job: ExtractJob, monkeypatch: pytest.MonkeyPatch, use_gpu: bool, at_once: int
) -> None:
    found = resolve(Network(job.backbone, job.runtime, job.storage), Archive(job.source, job.limits, ()))
    actor = PartEmbedder(
        replace(job, use_gpu=use_gpu),
        Ready(Setup(found.graph, found.runtime, found.fingerprint, found.canary)),
    )
    parts = [part.to_row() for part in parts_of(job, put_shard(job, shard_bytes(0, 3)))] * 2
    meeting, met = threading.Barrier(2), []
    embed = actor._embedder.embed

    def embed_where_others_may_come(pixels_NSS3: np.ndarray) -> np.ndarray:
        try:
            meeting.wait(20 if use_gpu else 0.2)
            met.append(2)
        except threading.BrokenBarrierError:
            met.append(1)
        return embed(pixels_NSS3)

    monkeypatch.setattr(actor._embedder, "embed", embed_where_others_may_come)
    with ThreadPoolExecutor(2) as pool:
        answers = [Part.from_row(row) for row in pool.map(actor, parts)]
    assert set(met) == {at_once}
    first, second = (answer.array for answer in answers)
    assert first is not None and second is not None
    np.testing.assert_array_equal(first, second)


def test_busy_seconds_that_overlap_are_counted_once() -> None:
    now = [0.0]
    clock = _BusyClock(lambda: now[0])

    def at(time: float, call: Callable[[], float | None]) -> float | None:
        now[0] = time
        return call()

    at(1.0, clock.begin)
    at(3.0, clock.begin)
    assert at(4.0, clock.end) == 3.0  # 1 to 4, of both
    assert at(6.0, clock.end) == 2.0
    at(10.0, clock.begin)  # nothing was under way from 6 to 10
    assert at(10.5, clock.end) == 0.5


@dataclass(frozen=True)
class Ready:
    """An answer that is there."""

    setup: Setup

    def get(self) -> Setup:
        return self.setup


@pytest.mark.parametrize("encoded_bytes", [10**9, 5_000])
@pytest.mark.parametrize("keeps_bytes", [False, True])
def test_parts_that_are_decoded_apart_are_those_that_are_decoded_where_they_are_read(
    job: ExtractJob, keeps_bytes: bool, encoded_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.extraction.MAX_ENCODED_BYTES", encoded_bytes)
    job = replace(job, limits=Limits(keep_reject_bytes=keeps_bytes, max_sample_bytes=20_000))
    good = crop_jpeg(1)[0]
    members = [member(f"a{number:03d}.jpg", crop_jpeg(number)[0]) for number in range(20)]
    members += [
        member("b.jpg", b"not an image"),
        member("c.jpg", b""),
        member("d.jpg", b"x" * 30_000),
        member("e.txt", b"no image"),
        member("f.jpg", good),
        member("f.cls", b"\xff\xfe not text"),
        member("g.jpg", good[: len(good) // 2]),
    ]
    shard = put_shard(job, tar_bytes(members))
    work = ShardWork(shard, Progress((1,)))
    wanted = [Part.from_row(row) for row in read_parts(job, [work])]
    rows = list(read_parts(job, [work], apart=True))
    undecoded = [Part.from_row(row).encoded is not None for row in rows]
    assert undecoded == [encoded_bytes == 10**9] * len(rows)
    found = [Part.from_row(decode_part(job, row)) for row in rows]
    assert len(found) == len(wanted) == 1
    for left, right in zip(found, wanted, strict=True):
        times = {"read_s": 0.0, "decode_s": 0.0}
        assert replace(left.header, **times) == replace(right.header, **times)  # type: ignore[arg-type]
        assert left.samples == right.samples and left.rejects == right.rejects
        np.testing.assert_array_equal(left.array, right.array)


def test_a_shard_that_breaks_off_is_told_whether_or_not_it_is_decoded_apart(job: ExtractJob) -> None:
    shard = put_shard(job, shard_bytes(0, 40)[:-20_000])
    wanted = [part.header for part in parts_of(job, shard)]
    found = [
        Part.from_row(decode_part(job, row)).header for row in read_parts(job, [ShardWork(shard)], apart=True)
    ]
    assert [(h.number, h.samples, h.damage) for h in found] == [
        (h.number, h.samples, h.damage) for h in wanted
    ]
    assert found[-1].damage is not None
