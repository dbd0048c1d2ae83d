"""Real photos and real weights: an image finds itself and its copies, and copies are grouped and nothing else is."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.storage import StorageConfig, open_store
from jobs.cli import main
from tests.commands import Engine
from tests.flows.archives import write_recipe
from tests.planted_copies import PlantedImage, planted_images
from tests.shards.archives import member, tar_bytes
from tests.stores import S3TestStore

SIDE_PX, INPUT_PX = 128, 64
DISTINCT, COPIED = 100, 20
COPIES = 3  # of each


@pytest.fixture(scope="module")
def images() -> list[PlantedImage]:
    return planted_images(DISTINCT, COPIED, SIDE_PX, quality=75, scale=0.75)


@pytest.fixture(scope="module")
def table(shared_ray: None, tmp_path_factory: pytest.TempPathFactory, images: list[PlantedImage]) -> Path:
    """The embeddings of the images, in two shards, by EfficientNet-Lite0 with its ImageNet weights."""
    folder = tmp_path_factory.mktemp("planted")
    archive = open_store(str(folder / "archive"))
    for shard in range(2):
        members = [member(f"{one.key}.jpg", one.encoded) for one in images[shard::2]]
        archive.write(f"{shard:05d}.tar", tar_bytes(members))
    recipe = write_recipe(
        folder,
        "extract.yaml",
        f"""
source:   {{kind: webdataset, uri: "{folder}/archive", pattern: "*.tar", image: [jpg]}}
backbone: {{kind: efficientnet_lite0, input_size: {INPUT_PX}}}
output:   {{uri: "{folder}/embeddings", rows_per_part: 64}}
""",
    )
    assert main(["extract", str(recipe)]) == 0
    return folder / "embeddings"


def recall_and_precision(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Of rows that stand in a group behind its representative: how many of the copies, and how many rightly."""
    own, right, said = "", 0, 0
    for row in rows:
        base = row["key"].partition("-")[0]
        if row["kind"] == "representative":
            own = base
        else:
            said, right = said + 1, right + (base == own)
    return right / (COPIES * COPIED), right / said


def test_an_image_finds_its_copies_and_all_copies_are_found(
    engine: Engine, table: Path, images: list[PlantedImage], tmp_path: Path
) -> None:
    photo = next(one for one in images if one.key == "0003-image")
    (tmp_path / "photo.jpg").write_bytes(photo.encoded)
    ended = engine("similar", table, "--image", tmp_path / "photo.jpg", "-k", "6", "--json")
    assert ended.code == 0, ended.stderr
    found = ended.summary["similar"]
    assert [row["rank"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert {row["key"] for row in found[:4]} == {
        f"0003-{kind}" for kind in ("image", "exact", "encoded", "resized")
    }
    assert all(row["cosine"] > 0.99999 for row in found[:2]) and found[4]["cosine"] < 0.95

    by_key = engine("similar", table, "--key", "0003-image", "-k", "5", "--json")
    assert by_key.code == 0, by_key.stderr
    assert [row["key"] for row in by_key.summary["similar"]] == [
        row["key"] for row in found if row["key"] != "0003-image"
    ]
    shown = engine("similar", table, "--key", "0003-image", "-k", "1")
    assert "0003-exact" in shown.stdout and "1.0000" in shown.stdout

    output = tmp_path / "groups.parquet"
    ended = engine("duplicates", table, "--output", output, "--json")
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    rows = pq.read_table(output).to_pylist()
    assert (summary["rows_read"], summary["images"]) == (DISTINCT + COPIES * COPIED, DISTINCT + 2 * COPIED)
    assert summary["exact"] > 0 and summary["duplicates"] == rows
    recall, precision = recall_and_precision(rows)
    assert recall >= 0.95 and precision >= 0.95, (recall, precision)
    largest = {row["key"].partition("-")[2] for row in rows if row["kind"] == "representative"}
    assert "resized" not in largest  # fewer pixels than the others

    again = engine("duplicates", table, "--output", output)
    assert again.code == 1 and "there is a file" in again.stderr
    shown = engine("duplicates", table)
    assert "representative" in shown.stdout and "label_conflicts" in shown.stderr
    assert "more rows of groups are not shown; --output FILE.parquet has all" in shown.stderr


def test_table_image_and_groups_may_all_lie_in_object_storage(
    engine: Engine,
    table: Path,
    images: list[PlantedImage],
    s3_store: S3TestStore,
    s3_uri: str,
    s3_config: StorageConfig,
) -> None:
    store = open_store(s3_uri, s3_config)
    for file in (path for path in table.rglob("*") if path.is_file()):
        store.write(f"embeddings/{file.relative_to(table)}", file.read_bytes())
    photo = next(one for one in images if one.key == "0005-resized")
    store.write("photo.jpg", photo.encoded)
    options = ("--endpoint-url", s3_store.endpoint_url, "--region", s3_store.region, "--json")
    asked = ("--image", f"{s3_uri}/photo.jpg", "-k", "1")
    ended = engine("similar", f"{s3_uri}/embeddings", *asked, *options)
    assert ended.code == 0, ended.stderr
    assert [row["key"] for row in ended.summary["similar"]] == ["0005-resized"]
    output = f"{s3_uri}/groups.parquet"
    ended = engine("duplicates", f"{s3_uri}/embeddings", "--output", output, *options)
    assert ended.code == 0, ended.stderr
    written = pq.read_table(io.BytesIO(store.read("groups.parquet"))).to_pylist()
    assert written == ended.summary["duplicates"] and len(written) > 3 * COPIED


def test_what_cannot_be_asked_about_ends_with_a_word_on_it(
    engine: Engine, table: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not a photo")
    (tmp_path / "empty.jpg").touch()
    for arguments, code, said in (
        (["--image", tmp_path / "text.jpg"], 2, "unsupported_format"),
        (["--image", tmp_path / "empty.jpg"], 2, "the file has no bytes"),
        (["--image", tmp_path / "absent.jpg"], 1, "absent.jpg"),
        (["--key", "nobody"], 2, "no row has key 'nobody'"),
        ([], 2, "either --image, or the row"),
        (["--key", "0003-image", "--image", "photo.jpg"], 2, "either --image, or the row"),
    ):
        ended = engine("similar", table, *arguments)
        assert ended.code == code and said in ended.stderr, (arguments, ended.stderr)
        assert "Traceback" not in ended.stderr
    ended = engine("duplicates", table, "--threshold", "1.5")
    assert ended.code == 2 and "above 0, at most 1" in ended.stderr


def test_an_image_is_not_compared_with_embeddings_of_other_weights(
    engine: Engine, table: Path, images: list[PlantedImage], tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(images[0].encoded)
    table = Path(shutil.copytree(table, tmp_path / "embeddings"))
    record = json.loads((table / "_table.json").read_text())
    record["contract"]["fingerprint.tensor_digest"] = "0" * 64
    (table / "_table.json").write_text(json.dumps(record))
    ended = engine("similar", table, "--image", tmp_path / "photo.jpg")
    assert ended.code == 1 and "another backbone than the table was resolved with" in ended.stderr
    record = json.loads((table / "_table.json").read_text())
    record["contract"]["fingerprint.tensor_digest"] = record["tensor_digest"]
    record["canary"][1] = record["canary"][2]
    (table / "_table.json").write_text(json.dumps(record))
    ended = engine("similar", table, "--image", tmp_path / "photo.jpg")
    assert ended.code == 1 and "computes other embeddings than the table was resolved with" in ended.stderr
