"""Files, folders and URIs become images in the order in which they were named."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import RecipeError
from engine.prediction import inputs
from engine.prediction.inputs import EncodedImage, find_images
from engine.schema import RejectReason
from engine.storage import StorageConfig, open_store

HERE = StorageConfig()


def images_at(*places: str | Path, storage: StorageConfig = HERE) -> dict[str, bytes | None]:
    return {image.name: image.encoded for image in (file.read() for file in find_images(places, storage))}


def fill(folder: str, storage: StorageConfig = HERE) -> None:
    store = open_store(folder, storage)
    for name in ("b.JPG", "a b.png", "deep/er/c.webp", "notes.txt", "d.tar"):
        store.write(name, name.encode())


def test_files_are_taken_as_they_are_and_folders_for_their_images(tmp_path: Path) -> None:
    fill(str(tmp_path))
    assert images_at(tmp_path / "notes.txt") == {f"{tmp_path}/notes.txt": b"notes.txt"}
    assert list(images_at(tmp_path / "deep/", tmp_path / "b.JPG", f"{tmp_path}/deep/er/")) == [
        f"{tmp_path}/deep/er/c.webp",
        f"{tmp_path}/b.JPG",
    ]
    assert list(images_at(tmp_path).values()) == [b"a b.png", b"b.JPG", b"deep/er/c.webp"]
    uri = f"file://{tmp_path}/a%20b.png"
    assert images_at(uri) == {uri: b"a b.png"}


def test_a_bucket_is_looked_at_like_a_disk(s3_uri: str, s3_config: StorageConfig) -> None:
    fill(s3_uri, s3_config)
    one = f"{s3_uri}/b.JPG"
    assert images_at(one, storage=s3_config) == {one: b"b.JPG"}
    wanted = {f"{s3_uri}/{name}": name.encode() for name in ("a b.png", "b.JPG", "deep/er/c.webp")}
    assert images_at(s3_uri, storage=s3_config) == images_at(f"{s3_uri}/", storage=s3_config) == wanted
    (absent,) = find_images([f"{s3_uri}/nothing.jpg"], s3_config)
    assert absent.info is None


def test_a_file_that_is_not_there_is_an_image_with_a_problem(tmp_path: Path) -> None:
    (file,) = find_images([tmp_path / "cat.jpg"], HERE)
    assert file.read() == EncodedImage(
        f"{tmp_path}/cat.jpg", None, (RejectReason.NO_IMAGE, "there is no such file"), 0
    )


def test_a_folder_without_images_and_more_than_a_screenful_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    for empty in (tmp_path, f"{tmp_path}/absent/"):
        with pytest.raises(RecipeError, match="no images here"):
            find_images([empty], HERE)
    fill(str(tmp_path))
    monkeypatch.setattr(inputs, "MAX_IMAGES", 3)
    assert len(find_images([tmp_path], HERE)) == 3
    with pytest.raises(RecipeError, match=r"(?s)more than 3.*engine score"):
        find_images([tmp_path, tmp_path / "b.JPG"], HERE)


def test_bytes_above_the_limit_are_not_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inputs, "LIMITS", inputs.LIMITS.model_copy(update={"max_sample_bytes": 5}))
    (tmp_path / "six.jpg").write_bytes(b"123456")
    (file,) = find_images([tmp_path / "six.jpg"], HERE)
    for image in (file.read(), EncodedImage.of_bytes("-", b"123456")):
        assert image.encoded is None and image.size_bytes == 6
        assert image.problem is not None and image.problem[0] == RejectReason.SAMPLE_TOO_LARGE
    assert EncodedImage.of_bytes("-", b"12345").encoded == b"12345"
