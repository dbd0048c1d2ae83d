"""The demo's shards: what is in them, that train and test share nothing, and that writing twice changes nothing."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.demo_images import CROP_SIDE_PX, PHOTOS, DemoArchive, write_demo_shards

Sample = dict[str, bytes]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "shards"
    write_demo_shards(folder)
    return folder


def samples_of(shard: Path) -> dict[str, Sample]:
    """By key; the bytes of each member by its extension."""
    samples: dict[str, Sample] = defaultdict(dict)
    with tarfile.open(shard) as tar:
        for member in tar:
            key, extension = member.name.rsplit(".", 1)
            content = tar.extractfile(member)
            assert content is not None
            samples[key][extension] = content.read()
    return samples


def whole_samples(folder: Path, pattern: str) -> dict[str, Sample]:
    found = {k: s for shard in sorted(folder.glob(pattern)) for k, s in samples_of(shard).items()}
    return {key: sample for key, sample in found.items() if "/broken/" not in key}


def test_counts_say_what_is_in_the_shards(tmp_path: Path) -> None:
    archive = write_demo_shards(tmp_path)
    found = {shard.name: len(samples_of(shard)) for shard in sorted(tmp_path.iterdir())}
    assert archive == DemoArchive(photos=12, shards=6, samples=720, broken=2)
    assert found == {
        "test-00000.tar": 120,
        "test-00001.tar": 120,
        "train-00000.tar": 120,
        "train-00001.tar": 122,
        "train-00002.tar": 120,
        "train-00003.tar": 120,
    }


def test_every_shard_holds_every_class_ten_times(shards: Path) -> None:
    for shard in shards.iterdir():
        labels = Counter(s["cls"].decode() for k, s in samples_of(shard).items() if "/broken/" not in k)
        assert labels == dict.fromkeys(PHOTOS, 10), shard.name


@pytest.mark.parametrize(("split", "count"), [("train", 480), ("test", 240)])
def test_key_label_and_half_of_a_sample_agree(shards: Path, split: str, count: int) -> None:
    samples = whole_samples(shards, f"{split}-*.tar")
    assert len(samples) == count
    for key, sample in samples.items():
        assert set(sample) == {"jpg", "cls", "json"}
        assert key.split("/")[:2] == [split, sample["cls"].decode()]
        assert json.loads(sample["json"]) == {"split": split}


def test_every_crop_is_a_jpeg_of_64_by_64_pixels(shards: Path) -> None:
    for sample in whole_samples(shards, "*.tar").values():
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            image.load()
            assert (image.format, image.size) == ("JPEG", (64, 64))


def test_train_crops_come_from_left_halves_and_test_crops_from_right_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a picture that is black on the left and white on the right of its middle, no crop is mixed."""
    pixels_HW = np.zeros((101, 283), np.uint8)
    pixels_HW[:, 283 // 2 :] = 255
    picture = Image.fromarray(pixels_HW)
    monkeypatch.setattr("jobs.demo_images._open_photo", lambda file: picture)
    write_demo_shards(tmp_path)
    for split, grey in (("train", 0), ("test", 255)):
        for sample in whole_samples(tmp_path, f"{split}-*.tar").values():
            crop_HW = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
            assert crop_HW.shape == (CROP_SIDE_PX, CROP_SIDE_PX)
            assert np.all(crop_HW == grey)


def test_one_shard_has_a_cut_jpeg_and_a_sample_without_an_image(shards: Path) -> None:
    samples = samples_of(shards / "train-00001.tar")
    cut, whole = samples["train/broken/cut-short"]["jpg"], samples_of(shards / "train-00000.tar")
    assert whole["train/coffee/0000"]["jpg"].startswith(cut)
    with Image.open(io.BytesIO(cut)) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    assert set(samples["train/broken/no-image"]) == {"cls", "json"}


def test_two_folders_get_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    write_demo_shards(tmp_path)
    for shard in shards.iterdir():
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()


def test_writing_again_leaves_whole_shards_alone_and_mends_others(tmp_path: Path) -> None:
    write_demo_shards(tmp_path)
    before = {shard: (shard.stat().st_mtime_ns, shard.read_bytes()) for shard in tmp_path.iterdir()}
    damaged = tmp_path / "test-00001.tar"
    damaged.write_bytes(before[damaged][1][:700])
    write_demo_shards(tmp_path)
    for shard, (mtime_ns, content) in before.items():
        assert shard.read_bytes() == content
        assert (shard.stat().st_mtime_ns == mtime_ns) == (shard != damaged)
