"""TFRecord's own rules: framing, tf.train.Example, prepared datasets and their slices; not what all kinds share."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from engine.errors import ObjectChanged, ObjectNotFound, RecipeError, ShardDamaged
from engine.schema import RejectReason
from engine.shards.base import Resume, Sample, ShardReader
from engine.shards.kinds import TFRecordSource, open_reader
from engine.shards.tf_example import Example
from engine.storage import ObjectInfo, Store, open_store
from tests.shards.reading import read_until_damage
from tests.shards.tfrecords import Value, example, tfrecord_bytes

MAX_SAMPLE_BYTES = 1000
# What TensorFlow Datasets 4.9.10 wrote for a FeaturesDict of these features, without blanks; `photo` is nested.
FEATURES = {
    "featuresDict": {
        "features": {
            "caption": {
                "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
                "text": {},
            },
            "label": {
                "classLabel": {"numClasses": "3"},
                "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
            },
            "photo": {
                "featuresDict": {
                    "features": {
                        "front": {
                            "image": {
                                "dtype": "uint8",
                                "encodingFormat": "png",
                                "shape": {"dimensions": ["-1", "-1", "3"]},
                            },
                            "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
                        },
                        "kind": {
                            "classLabel": {"numClasses": "2"},
                            "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
                        },
                    }
                },
                "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            },
            "pixels": {
                "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
                "tensor": {"dtype": "uint8", "encoding": "none", "shape": {"dimensions": ["2", "2"]}},
            },
            "views": {
                "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
                "sequence": {
                    "feature": {
                        "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
                        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
                    },
                    "length": "-1",
                },
            },
        }
    },
    "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
}
LENGTHS = {"train": (7, 0, 5, 6), "test": (3,)}  # 18 and 3 records


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "source"))


def reader_of(store: Store, **fields: Any) -> ShardReader:
    return open_reader(TFRecordSource(uri=store.uri, **fields), MAX_SAMPLE_BYTES)


def read_all(
    store: Store,
    shard: ObjectInfo,
    resume: Resume = Resume(),
    max_bytes: int = MAX_SAMPLE_BYTES,
    **fields: Any,
) -> list[Sample]:
    reader = open_reader(TFRecordSource(uri=store.uri, **fields), max_bytes)
    return list(reader.read(store, shard, resume))


def sample_of(store: Store, features: Mapping[str, Value], **fields: Any) -> Sample:
    """The one sample of a file with one record."""
    shard = store.write("x.tfrecord", tfrecord_bytes([example(features)]))
    (sample,) = read_all(store, shard, **fields)
    return sample


def until_damage(store: Store, name: str, data: bytes, **fields: Any) -> tuple[list[Sample], str]:
    """The samples of a file, and the message of the damage behind them ("" for none)."""
    write_fast(store, name, data)
    samples, damage = read_until_damage(reader_of(store, **fields), store, store.info(name))
    return samples, str(damage) if damage is not None else ""


def write_fast(store: Store, name: str, data: bytes) -> None:
    """Without the flush to the disk that a store's own write waits for: hundreds of mutations are written."""
    Path(store.uri).mkdir(parents=True, exist_ok=True)
    (Path(store.uri) / name).write_bytes(data)


def framed(data: bytes, length: int | None = None) -> bytes:
    """One record with right checksums, written by hand; `length` is what its header says."""

    def masked(checked: bytes) -> bytes:
        crc = google_crc32c.value(checked)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    header = struct.pack("<Q", len(data) if length is None else length)
    return header + masked(header) + data + masked(data)


# Examples


def test_500_examples_are_read_as_tensorflow_reads_them() -> None:
    import tensorflow as tf

    choose = random.Random(17)
    for _ in range(500):
        features: dict[str, Value] = {}
        for name in choose.sample(["", "a", "image/encoded", "žába", "z" * 300], choose.randrange(6)):
            count = choose.choice([0, 1, 1, 2, 50])
            features[name] = choose.choice(
                [
                    [choose.randbytes(choose.randrange(300)) for _ in range(count)],
                    [choose.gauss(0, 1e6) for _ in range(count)],
                    [choose.randrange(-(2**63), 2**63) for _ in range(count)],
                ]
            )
        data = example(features)
        data += (
            example({"a": 7}) if choose.random() < 0.2 else b""
        )  # messages that follow each other are merged
        theirs, ours = tf.train.Example.FromString(data).features.feature, Example(data)
        for name in theirs:
            kind = theirs[name].WhichOneof("kind")
            values = list(getattr(theirs[name], kind).value)
            found = ours.feature(name)
            assert (found and (f"{found.kind}_list", list(found.values))) == (
                (kind, values) if values else None
            )
        assert "missing" not in ours and ours.feature("missing") is None


def test_reading_does_not_import_tensorflow() -> None:
    code = "import engine.shards.tfrecord, sys; print({'tensorflow', 'keras', 'ray'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("features", "reason", "words", "size_bytes"),
    [
        ({}, RejectReason.NO_IMAGE, "'image/encoded' or 'image'", 0),
        ({"image/encoded": []}, RejectReason.NO_IMAGE, "no value", 0),
        ({"image/encoded": b""}, RejectReason.EMPTY_SAMPLE, "no bytes", 0),
        ({"image/encoded": b"x" * 1001}, RejectReason.SAMPLE_TOO_LARGE, "1,001 bytes", 1001),
        ({"image/encoded": 7}, RejectReason.NO_IMAGE, "int64 numbers", 0),
        ({"image/encoded": [0.5, 1.5]}, RejectReason.NO_IMAGE, "float numbers", 0),
        ({"image/encoded": [b"a", b"b", b"c"]}, RejectReason.NO_IMAGE, "3 values", 0),
        ({"image/encoded": 7, "image": b"good"}, RejectReason.NO_IMAGE, "'image/encoded' holds", 0),
    ],
)
def test_what_is_no_image_is_a_reject_that_says_why(
    store: Store, features: dict[str, Value], reason: RejectReason, words: str, size_bytes: int
) -> None:
    sample = sample_of(store, features)
    assert sample.problem is not None and sample.problem[0] == reason and words in sample.problem[1]
    assert (sample.image, sample.size_bytes) == (None, size_bytes)


def test_the_image_is_the_recipes_feature_or_image_encoded_or_image(store: Store) -> None:
    both: dict[str, Value] = {"image": b"second", "image/encoded": b"first", "mine": b"third"}
    assert sample_of(store, both).image == b"first"
    assert sample_of(store, {"image": b"second"}).image == b"second"
    assert sample_of(store, both, image="mine").image == b"third"
    assert sample_of(store, {"image": b"x" * 1000}).image == b"x" * 1000


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (b" cat\n", "cat"),
        ("žába".encode(), "žába"),
        (b"", None),
        (b" \n", None),
        ([], None),
        (7, "7"),
        (-(2**63), "-9223372036854775808"),
        (0.1, "0.1"),
        (2.0, "2.0"),
        (1e-7, "1e-07"),
        ([b"a", b"b"], RejectReason.BAD_LABEL),
        ([1, 2], RejectReason.BAD_LABEL),
        (b"\xff\xfe", RejectReason.BAD_LABEL),
        (b"x" * 4096, "x" * 4096),
        (b"x" * 4097, RejectReason.BAD_LABEL),
        (b" " * 2**21, RejectReason.BAD_LABEL),
        (float("nan"), RejectReason.BAD_LABEL),
        (float("-inf"), RejectReason.BAD_LABEL),
    ],
)
def test_a_label_is_one_text_or_number(store: Store, value: Value, label: str | None) -> None:
    sample = sample_of(store, {"image": b"x", "y": value}, label="y")
    if isinstance(label, RejectReason):
        assert sample.problem is not None and sample.problem[0] == label and "'y'" in sample.problem[1]
        assert (sample.label, sample.image) == (None, b"x")
    else:
        assert (sample.label, sample.problem) == (label, None)


def test_a_missing_label_is_null_and_a_bad_image_is_the_reason_before_a_bad_label(store: Store) -> None:
    assert sample_of(store, {"image": b"x"}, label="y").label is None
    sample = sample_of(store, {"image": b"", "y": [1, 2]}, label="y")
    assert sample.problem is not None and sample.problem[0] == RejectReason.EMPTY_SAMPLE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b" Leica ", "Leica"),
        (b"", ""),
        ([], None),
        (b"a\xffb", "a\\xffb"),
        (7, "7"),
        (float("nan"), "NaN"),
        ([1, 2, -3], "[1, 2, -3]"),
        ([0.5, 0.1], "[0.5, 0.1]"),
        ([b'say "a"', "ž".encode(), b"\xff"], '["say \\"a\\"", "ž", "\\\\xff"]'),
        ([0] * 2**16, json.dumps([0] * 2**16)),
        ([0] * (2**16 + 1), None),
        (b"x" * (2**20 + 1), None),
        ([b"x" * 2**19] * 3, None),
    ],
)
def test_metadata_is_text_whatever_is_there(store: Store, value: Value, text: str | None) -> None:
    sample = sample_of(store, {"image": b"x", "a/camera": value}, metadata=("a/camera", "missing"))
    assert sample.metadata == (text, None) and sample.problem is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"a/b 1", "a/b 1"),
        (42, "42"),
        (b"\xff", "\\xff"),
        (b"", "000000000"),
        ([], "000000000"),
        ([b"a", b"b"], "000000000"),
    ],
)
def test_a_key_is_a_text_or_number_and_else_the_position(store: Store, value: Value, key: str) -> None:
    assert sample_of(store, {"id": value}, key="id").key == key


def test_keys_are_positions_of_9_digits_without_a_field_for_them(store: Store) -> None:
    shard = store.write("x.tfrecord", tfrecord_bytes([example({"image": b"x"})] * 3))
    assert [s.key for s in read_all(store, shard)] == ["000000000", "000000001", "000000002"]
    assert [s.key for s in read_all(store, shard, Resume(2), key="id")] == ["000000002"]


# Framing


def test_offsets_are_those_of_the_records_in_the_file(store: Store) -> None:
    records = [example({"image": bytes([n]) * (100 + n)}) for n in range(7)]
    data = tfrecord_bytes(records)
    for sample, record in zip(read_all(store, store.write("x.tfrecord", data)), records, strict=True):
        assert data[sample.begin_offset : sample.end_offset] == framed(record)


@pytest.mark.parametrize(
    ("tail", "found"),
    [
        (framed(b"\xff\xff\xff"), "no tf.train.Example"),
        (framed(b"\x0a\x05hello"), "no tf.train.Example"),
        (framed(b"", length=2**62), "at most 1,073,741,824"),
        (framed(b"", length=2**30 + 1), "at most 1,073,741,824"),
        (framed(b"", length=2**30), "4 are left in the file"),
        (framed(b"abc")[:-1], "a record of 3 bytes, where 6 are left"),
        (framed(b"abc")[:5], "inside a record's header"),
        (b"\0" * 16, "checksum of a record's length"),
        (framed(b"abc").replace(b"abc", b"abd"), "checksum of a record is wrong"),
    ],
)
def test_every_break_of_the_framing_is_damage_that_names_the_byte(
    store: Store, tail: bytes, found: str
) -> None:
    good = tfrecord_bytes([example({"image": b"a"}), example({"image": b"b"})])
    samples, message = until_damage(store, "x.tfrecord", good + tail)
    assert [s.image for s in samples] == [b"a", b"b"]
    assert found in message and f"byte {len(good):,}\n" in message
    if "left in the file" not in found and "where" not in found:  # a packed file does not say what is left
        samples, message = until_damage(store, "x.tfrecord.gz", gzip.compress(good + tail, mtime=0))
        assert len(samples) == 2 and found in message and "of the unpacked file" in message


def test_a_huge_record_that_a_packed_file_only_promises_is_damage(store: Store) -> None:
    promised = gzip.compress(framed(b"abc", length=2**30), mtime=0)
    samples, message = until_damage(store, "x.tfrecord.gz", promised)
    assert samples == [] and "ends inside a record" in message


def test_a_packed_file_under_a_plain_name_is_damage_that_says_so(store: Store) -> None:
    packed = tfrecord_bytes([example({"image": b"a"})], "GZIP")
    assert "does not end in .gz" in until_damage(store, "x.tfrecord", packed)[1]
    assert until_damage(store, "x.tfrecord.gz", packed)[1] == ""
    assert "gzip" in until_damage(store, "x.tfrecord.gz", gzip.decompress(packed))[1]
    assert "header of a gzipped file" in until_damage(store, "x.tfrecord.gz", b"")[1]


def test_a_record_of_no_bytes_is_an_example_without_an_image(store: Store) -> None:
    samples, message = until_damage(store, "x.tfrecord", tfrecord_bytes([b"", example({"image": b"a"})]))
    assert [s.image for s in samples] == [None, b"a"] and message == ""


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_200_mutated_files_give_samples_or_damage_and_nothing_else(store: Store, compression: str) -> None:
    records = [example({"image": bytes([n]) * (40 * n), "y": n, "m": [1.5, n]}) for n in range(1, 9)]
    name = "x.tfrecord.gz" if compression else "x.tfrecord"
    whole, choose = tfrecord_bytes(records, compression), random.Random(23)
    good, _ = until_damage(store, name, whole, label="y", metadata=("m",))
    assert len(good) == 8
    damaged = 0
    for _ in range(200):
        samples, message = until_damage(store, name, mutated(whole, choose), label="y", metadata=("m",))
        damaged += bool(message)
        assert samples == good[: len(samples)]
    assert damaged > 150


@pytest.mark.parametrize("seed", range(4))
def test_mutated_examples_under_right_checksums_give_samples_or_damage(store: Store, seed: int) -> None:
    choose = random.Random(seed)
    whole = example({"image": b"x" * 30, "y": [1, 2], "m": [0.5, 1.5], "id": b"a"})
    for _ in range(100):
        data = framed(mutated(whole, choose))
        samples, message = until_damage(store, "x.tfrecord", data, label="y", key="id", metadata=("m",))
        assert len(samples) == (0 if message else 1)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """The bytes with one to three changes: flipped, cut out, cut off, doubled or put in."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(max(1, len(changed)))
        kind = choose.randrange(5)
        if kind == 0 and changed:
            changed[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del changed[at : at + choose.randint(1, 30)]
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            changed[at:at] = changed[at : at + choose.randint(1, 30)]
        else:
            changed[at:at] = choose.randbytes(choose.randint(1, 12))
    return bytes(changed)


# Prepared datasets


def prepare(
    store: Store,
    lengths: Mapping[str, Sequence[int]] = LENGTHS,
    info: Mapping[str, Any] | None = None,
    image_bytes: int = 90,
    compressed: bool = False,
) -> None:
    """A prepared folder: image n of a split is its number, `label` n modulo 3, `photo/kind` n modulo 2."""
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}" + (".gz" if compressed else "")
    splits = []
    for split, counts in lengths.items():
        number = 0
        for shard, count in enumerate(counts):
            records = [record_of(split, number + step, image_bytes) for step in range(count)]
            number += count
            path = f"tiny-{split}.tfrecord-{shard:05d}-of-{len(counts):05d}" + (".gz" if compressed else "")
            if count:
                store.write(path, tfrecord_bytes(records, "GZIP" if compressed else ""))
        splits.append(
            {
                "filepathTemplate": template,
                "name": split,
                "numBytes": "4711",
                "shardLengths": [str(count) for count in counts],
            }
        )
    written = {"fileFormat": "tfrecord", "name": "tiny", "splits": splits, "version": "1.2.0", **(info or {})}
    store.write("dataset_info.json", json.dumps(written).encode())
    store.write("features.json", json.dumps(FEATURES).encode())
    store.write("label.labels.txt", "big cat\ndog\nžába\n".encode())
    store.write("photo-kind.labels.txt", b"day\nnight\n")


def record_of(split: str, number: int, image_bytes: int = 90) -> bytes:
    return example(
        {
            "photo/front": f"{split} {number}".encode().ljust(image_bytes, b"."),
            "photo/kind": number % 2,
            "label": number % 3,
            "caption": f"no {number}".encode(),
        }
    )


def read_split(store: Store, split: str, **fields: Any) -> list[Sample]:
    reader = reader_of(store, split=split, **fields)
    return [s for shard in reader.list_shards(store) for s in reader.read(store, shard, Resume())]


def outcome_of(store: Store, split: str, **fields: Any) -> tuple[int, str]:
    """How many samples a split gives, or 0 and the message of what went wrong."""
    try:
        return len(read_split(store, split, **fields)), ""
    except (RecipeError, ShardDamaged, ObjectNotFound) as error:
        return 0, str(error)


def numbers_of(samples: Sequence[Sample]) -> list[str]:
    return [sample.image.decode().rstrip(".") if sample.image else "none" for sample in samples]


def test_a_split_is_its_files_in_order_with_class_names_as_labels(store: Store) -> None:
    prepare(store)
    reader = reader_of(store, split="train", label="label", metadata=("caption", "photo/kind"))
    shards = list(reader.list_shards(store))
    assert [s.path for s in shards] == [f"tiny-train.tfrecord-0000{n}-of-00004" for n in (0, 2, 3)]
    samples = [sample for shard in shards for sample in reader.read(store, shard, Resume())]
    assert numbers_of(samples) == [f"train {n}" for n in range(18)]
    assert [s.label for s in samples] == ["big cat", "dog", "žába"] * 6
    assert [s.index for s in samples] == [*range(7), *range(5), *range(6)]
    assert samples[8].metadata == ("no 8", "0")
    assert [s.label for s in read_split(store, "test", label="photo/kind")] == ["day", "night", "day"]
    assert [s.label for s in read_split(store, "test")] == [None] * 3


# The borders are those that TensorFlow Datasets 4.9.10 gives for a split of 18 records.
@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:80%]", range(14)),  # 14.4
        ("train[80%:]", range(14, 18)),
        ("train[:25%]", range(4)),  # 4.5, and a half goes to the even neighbour
        ("train[:75%]", range(14)),  # 13.5, likewise
        ("train[-10%:]", range(16, 18)),  # -1.8
        ("train[25%:75%]", range(4, 14)),
        ("train[9:13]", range(9, 13)),
        ("train[:1_0]", range(10)),
        ("train[-3:-1]", range(15, 17)),
        ("train[7:12]", range(7, 12)),  # exactly one file
        ("train[:-100%]", None),
        ("train[6:8]", range(6, 8)),
        ("train[:5] + train[5:9]", range(9)),
        ("train[:3]+train[15:]", [0, 1, 2, 15, 16, 17]),
    ],
)
def test_slices_select_the_records_that_tensorflow_datasets_selects(
    store: Store, split: str, numbers: Sequence[int] | None
) -> None:
    prepare(store)
    if numbers is None:
        with pytest.raises(RecipeError, match="holds none of 18 records"):
            read_split(store, split)
        return
    samples = read_split(store, split)
    assert numbers_of(samples) == [f"train {n}" for n in numbers]


def test_several_splits_come_in_the_order_of_the_listing(store: Store) -> None:
    prepare(store)
    expected = ["test 0", "test 1", "test 2", *(f"train {n}" for n in range(18))]
    assert numbers_of(read_split(store, "train+test")) == numbers_of(read_split(store, "all")) == expected


@pytest.mark.parametrize("compressed", [False, True])
def test_a_slice_counts_from_0_in_each_file_and_resumes_at_any_sample(store: Store, compressed: bool) -> None:
    prepare(store, compressed=compressed)
    reader = reader_of(store, split="train[2:17]")
    for shard in reader.list_shards(store):
        whole = list(reader.read(store, shard, Resume()))
        assert [s.index for s in whole] == list(range(len(whole)))
        for sample in whole:
            resumes = [Resume(sample.index), Resume(sample.index, sample.begin_offset)]
            for resume in resumes:
                assert list(reader.read(store, shard, resume)) == whole[sample.index :]
            if not compressed:
                data = store.read(shard.path, sample.begin_offset or 0, (sample.end_offset or 0))
                assert (sample.image or b"?") in data[: (sample.end_offset or 0) - (sample.begin_offset or 0)]
        assert list(reader.read(store, shard, Resume(len(whole), whole[-1].end_offset))) == []


def test_records_behind_a_slice_are_not_read_and_a_changed_file_is_noticed_there(store: Store) -> None:
    prepare(store, {"train": (40,)}, image_bytes=100_000)
    reader = open_reader(TFRecordSource(uri=store.uri, split="train[:5]"), 200_000)
    (shard,) = reader.list_shards(store)
    told: list[int] = []
    assert len(list(reader.read(store, shard, Resume(), told.append))) == 5
    assert 500_000 < sum(told) < 1_000_000 < shard.size
    reading = reader.read(store, shard, Resume())
    next(reading)
    store.write(shard.path, store.read(shard.path) + b"!")
    with pytest.raises(ObjectChanged):
        list(reading)


@pytest.mark.parametrize(("split", "count"), [("train", 18), ("train[:5]", 5), ("train[-3:]", 3)])
def test_a_file_with_other_counts_than_the_dataset_says_is_damage(
    store: Store, split: str, count: int
) -> None:
    prepare(store)
    paths = [f"tiny-train.tfrecord-0000{n}-of-00004" for n in (0, 2, 3)]
    whole = {path: store.read(path) for path in paths}
    for path, data in whole.items():
        for changed, words in (
            (data + framed(record_of("train", 99)), "more than the"),
            (b"", "end of the file after 0 records"),
        ):
            store.write(path, changed)
            samples, message = outcome_of(store, split)
            assert (words in message and path in message) or (samples == count and split != "train")
        store.write(path, data)


def test_a_file_that_is_not_there_stops_the_run_before_it_starts(store: Store) -> None:
    prepare(store)
    store.delete("tiny-train.tfrecord-00002-of-00004")
    with pytest.raises(ObjectNotFound, match="1 of 3 files.*\n.*tiny-train.tfrecord-00002-of-00004"):
        read_split(store, "train")
    assert len(read_split(store, "train[:7]")) == 7


def test_a_pattern_in_the_recipe_narrows_the_files_of_a_split(store: Store) -> None:
    prepare(store)
    assert numbers_of(read_split(store, "train", pattern="*-00003-of-*")) == [
        f"train {n}" for n in range(12, 18)
    ]


def test_names_follow_the_template_of_the_dataset(store: Store) -> None:
    prepare(store, {"train": (2,)})
    data = store.read("tiny-train.tfrecord-00000-of-00001")
    for template, path in (
        ("{SPLIT}/{DATASET}_{SHARD_INDEX}_{NUM_SHARDS}.{FILEFORMAT}", "train/tiny_00000_00001.tfrecord"),
        ("all.rec", "all.rec"),
    ):
        splits = [{"name": "train", "shardLengths": ["2"], "filepathTemplate": template}]
        prepare(store, {}, {"splits": splits})
        store.write(path, data)
        assert numbers_of(read_split(store, "train")) == ["train 0", "train 1"]
    prepare(store, {}, {"splits": [{"name": "train", "shardLengths": [2], "filepathTemplate": "{SHARD}"}]})
    with pytest.raises(RecipeError, match="{SHARD} in the template"):
        read_split(store, "train")


def test_older_datasets_name_neither_format_nor_template(store: Store) -> None:
    prepare(store, {"train": (2,)})
    info = {"name": "tiny", "splits": [{"name": "train", "shardLengths": ["2"]}]}
    store.write("dataset_info.json", json.dumps(info).encode())
    assert numbers_of(read_split(store, "train")) == ["train 0", "train 1"]


def test_classes_without_names_stay_numbers_and_unknown_ones_are_null(store: Store) -> None:
    prepare(store, {"train": (1,)})
    path = "tiny-train.tfrecord-00000-of-00001"
    for stored, label, has_problem in (
        (2, "žába", False),
        (-1, None, False),
        (3, None, True),
        (-2, None, True),
    ):
        store.write(path, tfrecord_bytes([example({"photo/front": b"x", "label": stored})]))
        (sample,) = read_split(store, "train", label="label")
        assert (sample.label, sample.problem is not None) == (label, has_problem)
    store.delete("label.labels.txt")
    assert read_split(store, "train", label="label")[0].label == "-2"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"split": "validation"}, "one of train, test"),
        ({"split": "train[:50"}, r"train\[:50"),
        ({"split": "train[10]"}, "slices of it"),
        ({"split": "train[:2shard]"}, "slices of it"),
        ({"split": "train[:101%]"}, "more than 100 percent"),
        ({"split": "train[:19]"}, "has 18 records"),
        ({"split": "train[-19:]"}, "has 18 records"),
        ({"split": "train[5:5]"}, "holds none"),
        ({"split": "train[2:50%]"}, "one in records"),
        ({"split": f"train[:{'9' * 5000}]"}, "slices of it"),
        ({"split": "train+train[3:4]"}, "share the records 3 to 18"),
        ({"split": "train[:2]+train[4:]"}, "a gap between them inside tiny-train.tfrecord-00000-of-00004"),
        ({"split": "train", "image": "nope"}, "no feature 'nope'"),
        ({"split": "train", "image": "pixels"}, "a tensor of uint8"),
        ({"split": "train", "label": "nope"}, "no feature 'nope'"),
        ({"split": "train", "key": "captions"}, "one of caption, label, photo/front"),
        ({"split": "train", "metadata": ("nope",)}, "no feature 'nope'"),
    ],
)
def test_a_split_or_feature_that_cannot_be_read_is_refused(
    store: Store, fields: dict[str, Any], words: str
) -> None:
    prepare(store)
    with pytest.raises(RecipeError, match=words):
        read_split(store, **fields)


def image_node(dtype: str = "uint8", encoding: str = "jpeg") -> dict[str, Any]:
    name = "tensorflow_datasets.core.features.image_feature.Image"
    return {"pythonClassName": name, "image": {"dtype": dtype, "encodingFormat": encoding, "shape": {}}}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"dataset_info.json": None}, "no dataset_info.json"),
        ({"features.json": None}, "no features.json"),
        ({"dataset_info.json": b"{"}, "cannot be understood"),
        ({"dataset_info.json": b'{"name": 7}'}, "name: "),
        ({"dataset_info.json": b'{"name": "a", "fileFormat": "array_record"}'}, "array_record"),
        ({"dataset_info.json": b'{"name": "a", "splits": [{"name": "train"}]}'}, "without shardLengths"),
        ({"features.json": b"[1]"}, "no feature with a pythonClassName"),
        ({"features.json": b"[" * 100_000}, "cannot be understood"),
        ({"features.json": b'{"type": "x", "content": {}}'}, "no feature with a pythonClassName"),
        ({"features.json": {"a": image_node(), "b": image_node()}}, "2 image features: a, b"),
        ({"features.json": {}}, "0 image features"),
        ({"features.json": {"a": image_node(dtype="float32")}}, "images of float32"),
        ({"features.json": {"a": image_node(encoding="raw")}}, "encoding 'raw'"),
        ({"label.labels.txt": b"one\ntwo\n"}, "2 names for 3 classes"),
        ({"label.labels.txt": b"\xff\n"}, "label.labels.txt cannot be understood"),
    ],
)
def test_a_folder_that_is_no_prepared_dataset_is_refused(
    store: Store, files: dict[str, Any], words: str
) -> None:
    prepare(store)
    for path, content in files.items():
        if content is None:
            store.delete(path)
        elif isinstance(content, dict):
            tree = {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": content}}
            store.write(path, json.dumps(tree).encode())
        else:
            store.write(path, content)
    with pytest.raises(RecipeError, match=words):
        read_split(store, "train", label=None if path == "features.json" else "label")


def test_200_mutated_descriptions_give_samples_or_a_message(store: Store) -> None:
    prepare(store, {"train": (2, 1)})
    choose = random.Random(5)
    for path in ("dataset_info.json", "features.json", "label.labels.txt"):
        whole = store.read(path)
        for _ in range(70):
            write_fast(store, path, mutated(whole, choose))
            samples, message = outcome_of(store, "train[:3]", label="label")
            assert 1 <= samples <= 3 or store.uri in message
        store.write(path, whole)


def test_a_pickled_reader_knows_its_slices_wherever_it_was_pickled(store: Store) -> None:
    prepare(store)
    fresh = reader_of(store, split="train[3:9]", label="label")
    there = pickle.loads(pickle.dumps(fresh))
    shards = list(fresh.list_shards(store))
    used = pickle.loads(pickle.dumps(fresh))
    for shard in shards:
        expected = list(fresh.read(store, shard, Resume()))
        assert list(there.read(store, shard, Resume())) == expected == list(used.read(store, shard, Resume()))


def test_a_file_that_is_not_of_the_split_is_damage(store: Store) -> None:
    prepare(store)
    reader = reader_of(store, split="test")
    with pytest.raises(ShardDamaged, match="no file of the split"):
        list(reader.read(store, store.info("tiny-train.tfrecord-00000-of-00004"), Resume()))
