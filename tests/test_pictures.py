"""Pictures of a table's samples come from its archive, are those of the embedded bytes, and never fail a run."""

from __future__ import annotations

import base64
import gzip
import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import pictures
from engine.extraction import ExtractJob, Part, PartHeader, read_parts, write_part
from engine.pictures import Budget, documents_of_samples
from engine.recipes import Limits
from engine.schema import SCHEMA_VERSION, SampleId
from engine.shards.kinds import FilesSource, SourceConfig, open_reader
from engine.storage import open_store
from engine.tables import Table, claim_table, open_table
from engine.worklist import ShardWork
from tests.extract_jobs import job_without_network
from tests.flows.archives import crop_jpeg, shard_bytes
from tests.shards.archives import member, tar_bytes

ROWS = 8


def made_table(
    folder: Path, limits: Limits | None = None, source: SourceConfig | None = None, rows_per_part: int = ROWS
) -> Table:
    """Every part of an archive, with embeddings of width 2 that are made up."""
    fields = {"source": source} if source else {}
    job = job_without_network(folder, 32, rows_per_part=rows_per_part, limits=limits or Limits(), **fields)
    record = {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "fingerprint": "f",
        "width": 2,
        "rows_per_part": rows_per_part,
        "contract": {f"source.{name}": value for name, value in job.source.contract().items()}
        | {f"limits.{name}": value for name, value in job.limits.contract().items()},
    }
    store, archive = open_store(job.table_uri), open_store(job.source.uri)
    claim_table(store, record)
    for shard in open_reader(job.source, 1 << 20).list_shards(archive):
        for row in read_parts(job, [ShardWork(shard)]):
            _commit(job, Part.from_row(row))
    return open_table(store)


def _commit(job: ExtractJob, part: Part) -> None:
    assert part.array is not None
    header: PartHeader = replace(part.header, fingerprint="f")
    embeddings_ND = np.ones((len(part.array), 2), np.float32)
    write_part(job, Part(header, part.samples, part.rejects, embeddings_ND).to_row())


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / name).write_bytes(data)


def asked(
    table: Table, wanted: Sequence[SampleId], **budget: float
) -> tuple[dict[SampleId, np.ndarray], list]:
    """Pixels by sample, and what is missing."""
    document = documents_of_samples(table, wanted, True, Budget(**budget))["pictures"]  # type: ignore[arg-type]
    shown = {
        (one["shard"], one["index"]): np.asarray(Image.open(io.BytesIO(base64.b64decode(one["webp"]))))
        for one in document["pictures"]
    }
    return shown, [(one["why"], one["samples"]) for one in document["missing"]]


def assert_is_crop(shown: np.ndarray, number: int) -> None:
    """WebP moves every pixel a little; another crop is 40 away and more."""
    crop = np.asarray(Image.open(io.BytesIO(crop_jpeg(number)[0])), np.float64)
    assert shown.shape == crop.shape
    assert np.abs(shown - crop).mean() < 12


def test_samples_anywhere_in_a_shard_are_found_by_the_offset_of_their_part(tmp_path: Path) -> None:
    put(tmp_path, "a.tar", shard_bytes(0, 21))
    put(tmp_path, "b.tar", shard_bytes(100, 3))
    table = made_table(tmp_path)
    wanted = [("a.tar", 20), ("a.tar", 0), ("b.tar", 2), ("a.tar", 9), ("a.tar", 11)]
    shown, missing = asked(table, wanted)
    assert list(shown) == wanted and missing == []
    for (shard, index), pixels in shown.items():
        assert_is_crop(pixels, index + (100 if shard == "b.tar" else 0))


def test_only_the_parts_that_are_wanted_are_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    members = []
    for number in range(40):
        encoded, _ = crop_jpeg(number)
        members += [
            member(f"{number:03d}.jpg", encoded),
            member(f"{number:03d}.bin", noise.bytes(300_000)),
        ]
    put(tmp_path, "a.tar", tar_bytes(members))
    table = made_table(tmp_path)
    # Of part 4, which begins at 9.6 of 12 MB: the first sample. Two parts need more than the budget has.
    shown, missing = asked(table, [("a.tar", 32)], size=2_000_000)
    assert list(shown) == [("a.tar", 32)] and missing == []


def test_compressed_shards_are_read_from_their_beginning(tmp_path: Path) -> None:
    put(tmp_path, "a.tar.gz", gzip.compress(shard_bytes(0, 12)))
    source = job_without_network(tmp_path, 32, rows_per_part=ROWS).source
    table = made_table(tmp_path, source=source.model_copy(update={"pattern": "*"}))
    shown, missing = asked(table, [("a.tar.gz", 11), ("a.tar.gz", 3)])
    assert len(shown) == 2 and missing == []
    assert_is_crop(shown["a.tar.gz", 11], 11)
    assert_is_crop(shown["a.tar.gz", 3], 3)


def test_loose_files_are_read_by_themselves(tmp_path: Path) -> None:
    for number in range(11):
        folder = tmp_path / "photos" / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.jpg").write_bytes(crop_jpeg(number)[0])
    source = FilesSource(kind="files", uri=str(tmp_path / "photos"), label="folder")
    table = made_table(tmp_path, source=source)
    (tmp_path / "photos" / "dogs" / "004.jpg").unlink()
    shown, missing = asked(table, [("dogs/~", 1), ("dogs/~", 2), ("cats/~", 4)])
    assert_is_crop(shown["dogs/~", 1], 2)
    assert_is_crop(shown["cats/~", 4], 9)
    assert missing == [(pictures.OTHER_BYTES, 1)]


def test_an_image_that_was_replaced_since_is_not_shown_for_the_one_that_was_embedded(tmp_path: Path) -> None:
    put(tmp_path, "a.tar", shard_bytes(0, 5))
    table = made_table(tmp_path)
    other = crop_jpeg(77)[0]
    members = [
        member(f"{number:06d}.jpg", crop_jpeg(number)[0] if number != 2 else other) for number in range(5)
    ]
    put(tmp_path, "a.tar", tar_bytes(members))
    shown, missing = asked(table, [("a.tar", 2), ("a.tar", 4)])
    assert list(shown) == [("a.tar", 4)]
    assert missing == [(pictures.OTHER_BYTES, 1)]


def test_an_archive_that_is_gone_costs_the_pictures_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.tar", shard_bytes(0, 5))
    table = made_table(tmp_path)
    shutil.rmtree(tmp_path / "shards")
    shown, missing = asked(table, [("a.tar", 2), ("a.tar", 4)])
    assert shown == {}
    ((why, samples),) = missing
    assert samples == 2 and f"{tmp_path}/shards/a.tar" in why
    assert "the report has no pictures" in caplog.text


def test_a_damaged_shard_gives_the_pictures_before_the_damage(tmp_path: Path) -> None:
    data = shard_bytes(0, 5)
    put(tmp_path, "a.tar", data)
    table = made_table(tmp_path)
    put(tmp_path, "a.tar", data[: len(data) // 2])
    shown, missing = asked(table, [("a.tar", 0), ("a.tar", 4)])
    assert list(shown) == [("a.tar", 0)]
    assert "damaged" in missing[0][0] and missing[0][1] == 1


def test_when_the_time_is_up_what_is_missing_is_told(tmp_path: Path) -> None:
    put(tmp_path, "a.tar", shard_bytes(0, 5))
    table = made_table(tmp_path)
    shown, missing = asked(table, [("a.tar", 0), ("a.tar", 4)], seconds=0.0)
    assert shown == {} and missing == [("the 0 seconds for reading pictures had passed", 2)]
    shown, missing = asked(table, [("a.tar", 0)], size=0)
    assert shown == {} and missing == [("the 0 MB for reading pictures were used up", 1)]


def test_a_recipe_without_pictures_asks_the_archive_for_nothing(tmp_path: Path) -> None:
    put(tmp_path, "a.tar", shard_bytes(0, 5))
    table = made_table(tmp_path)
    document = documents_of_samples(table, [("a.tar", 0)], with_pictures=False)["pictures"]
    assert document == {
        "wanted": 0,
        "pictures": [],
        "missing": [{"why": "report.pictures is false", "samples": 1}],
    }


def test_a_table_that_does_not_say_where_its_images_are_has_no_pictures(tmp_path: Path) -> None:
    put(tmp_path, "a.tar", shard_bytes(0, 5))
    table = made_table(tmp_path)
    unknown = replace(table, record={**table.record, "contract": {"source.kind": "zip"}})
    assert asked(unknown, [("a.tar", 0)])[1] == [("the table does not say where its images are", 1)]


@pytest.mark.parametrize("keeps_bytes", [True, False])
def test_rejects_are_counted_with_examples_and_shown_where_their_image_can_be(
    tmp_path: Path, keeps_bytes: bool
) -> None:
    whole, _ = crop_jpeg(1)
    buffer = io.BytesIO()
    Image.effect_noise((120, 90), 60).save(buffer, "PNG")
    samples = [("a", whole, b"ant"), ("b", whole[:300], b"ant"), ("c", buffer.getvalue(), b"ant")]
    samples += [(f"d{number}", b"no image", b"ant") for number in range(5)]
    members = [
        entry
        for key, image, label in samples
        for entry in (member(f"{key}.jpg", image), member(f"{key}.cls", label))
    ]
    put(tmp_path, "a.tar", tar_bytes(members))
    table = made_table(tmp_path, Limits(max_pixels=10_000, keep_reject_bytes=keeps_bytes))
    if keeps_bytes:
        shutil.rmtree(tmp_path / "shards")
    documents = documents_of_samples(table, [], with_pictures=True)
    rejects = documents["rejects"]
    assert rejects["reasons"] == {"too_many_pixels": 1, "truncated_image": 1, "unsupported_format": 5}
    assert (rejects["files_read"], rejects["has_more"]) == (1, False)
    examples = [(one["key"], one["error"]) for one in rejects["examples"]]
    assert examples[:2] == [("c", "too_many_pixels"), ("b", "truncated_image")]
    assert len(examples) == 2 + pictures.EXAMPLES
    (picture,) = documents["pictures"]["pictures"]
    assert (picture["shard"], picture["index"], picture["width"], picture["height"]) == ("a.tar", 2, 96, 72)
    assert documents["pictures"]["missing"] == []


def test_of_very_many_files_of_rejects_some_are_read_and_the_document_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "REJECT_FILES", 2)
    for shard in range(3):
        put(tmp_path, f"{shard}.tar", tar_bytes([member("a.jpg", b"no image")]))
    rejects = documents_of_samples(made_table(tmp_path), [], with_pictures=False)["rejects"]
    assert (rejects["reasons"], rejects["files_read"], rejects["has_more"]) == (
        {"unsupported_format": 2},
        2,
        True,
    )


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_reject_is_shown_if_it_has_the_digest_that_it_had(tmp_path: Path, is_replaced: bool) -> None:
    images = {"dogs/good.jpg": crop_jpeg(0)[0], "dogs/large.jpg": crop_jpeg(1, 110)[0]}
    for path, encoded in images.items():
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / path).write_bytes(encoded)
    source = FilesSource(kind="files", uri=str(tmp_path / "photos"), label="folder")
    table = made_table(tmp_path, Limits(max_pixels=10_000), source)
    if is_replaced:
        (tmp_path / "photos" / "dogs/large.jpg").write_bytes(crop_jpeg(2, 110)[0])
    shown, missing = asked(table, [("dogs/~", 0)])
    assert list(shown) == [("dogs/~", 0)] + [("dogs/~", 1)] * (not is_replaced)
    assert missing == [(pictures.OTHER_BYTES, 1)] * is_replaced


def test_in_a_long_part_samples_are_found_without_reading_what_is_before_them(tmp_path: Path) -> None:
    """Of 60 MB, of which the last sample alone would cost nearly all; one of them is a reject."""
    random = np.random.default_rng(0)
    members = []
    for number in range(160):
        members += [
            member(f"{number:06d}.bin", random.bytes(int(random.integers(60_000, 700_000)))),
            member(f"{number:06d}.jpg", crop_jpeg(number)[0]),
        ]
    members.append(member("000159.cls", b"\xff no text"))
    put(tmp_path, "a.tar", tar_bytes(members))
    table = made_table(tmp_path, rows_per_part=160)
    wanted = [("a.tar", index) for index in (0, 80, 121)]
    shown, missing = asked(table, wanted, size=24_000_000)
    assert list(shown) == [*wanted, ("a.tar", 159)] and missing == []
    for (_, index), pixels in shown.items():
        assert_is_crop(pixels, index)
