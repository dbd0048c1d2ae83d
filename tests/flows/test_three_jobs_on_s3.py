"""The three jobs through the command line against a real S3 store, read back the way analysts would."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.dataset as ds
import pytest

from engine.storage import StorageConfig, open_store
from tests.commands import Engine
from tests.flows.archives import write_recipe, write_shards
from tests.stores import S3TestStore

SHARDS, IMAGES = 3, 80


@dataclass(frozen=True)
class Recipes:
    """Recipe files, and where on S3 they point."""

    extract: Path
    fit: Path
    score: Path
    root: str


@pytest.fixture
def recipes(tmp_path: Path, s3_uri: str, s3_store: S3TestStore) -> Recipes:
    storage = f'storage: {{endpoint_url: "{s3_store.endpoint_url}", region: {s3_store.region}}}'
    extract = f"""
source:   {{kind: webdataset, uri: "{s3_uri}/shards", image: [jpg], label: cls}}
{storage}
backbone: {{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32}}
output:   {{uri: "{s3_uri}/embeddings", rows_per_part: 64}}
"""
    fit = f"""
embeddings: {{uri: "{s3_uri}/embeddings"}}
{storage}
training: {{epochs: 3, batch_size: 64}}
output: {{uri: "{s3_uri}/bundle"}}
"""
    score = f"""
embeddings: {{uri: "{s3_uri}/embeddings"}}
{storage}
bundles: [{{uri: "{s3_uri}/bundle", output: {{uri: "{s3_uri}/predictions", top_k: 2}}}}]
"""
    return Recipes(
        write_recipe(tmp_path, "extract.yaml", extract),
        write_recipe(tmp_path, "fit.yaml", fit),
        write_recipe(tmp_path, "score.yaml", score),
        s3_uri,
    )


def download(root: str, folder: str, config: StorageConfig, into: Path) -> Path:
    """Copy a table's data files to disk, for readers that are not told of our store."""
    store = open_store(f"{root}/{folder}", config)
    for info in store.list("data/"):
        path = into / folder / Path(info.path).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(info.path))
    return into / folder


def test_extract_fit_score_and_read_back(
    engine_process: Engine, recipes: Recipes, s3_config: StorageConfig, tmp_path: Path
) -> None:
    keys = write_shards(open_store(f"{recipes.root}/shards", s3_config), SHARDS, IMAGES)
    extracted = engine_process("extract", recipes.extract, "--json")
    assert extracted.code == 0, extracted.stderr
    assert (extracted.summary["rows"], extracted.summary["shards_done"]) == (SHARDS * IMAGES, SHARDS)
    fitted = engine_process(recipes.fit, "--json", script="jobs/fit.py")
    assert fitted.code == 0, fitted.stderr
    assert (fitted.summary["rows"], fitted.summary["classes"]) == (SHARDS * IMAGES, 2)
    assert set(fitted.summary["metrics"]["test"]) == {
        "accuracy",
        "top_3_accuracy",
        "loss",
        "calibration_error",
    }
    page = open_store(f"{recipes.root}/bundle", s3_config).read("report.html").decode()
    assert (
        fitted.summary["report"] == f"{recipes.root}/bundle/report.html"
        and fitted.summary["report"][:-12] in page
    )
    assert page.count('src="data:image/webp;base64,') > 10, "read from the shards again, on S3"
    assert "pictures were not available" not in page
    scored = engine_process("score", recipes.score, "--json")
    assert scored.code == 0, scored.stderr
    assert scored.summary["rows"] == sum(scored.summary["label_counts"].values()) == SHARDS * IMAGES
    again = engine_process(recipes.score, "--json", script="jobs/score.py")
    assert (again.code, again.summary["rows"]) == (0, 0)

    embeddings = download(recipes.root, "embeddings", s3_config, tmp_path)
    predictions = download(recipes.root, "predictions", s3_config, tmp_path)
    assert sorted(ds.dataset(embeddings).to_table(columns=["key"])["key"].to_pylist()) == keys
    joined = duckdb.sql(
        f"SELECT e.key, e.label AS truth, p.label, p.confidence, len(e.embedding) AS width, len(p.top_labels) AS k "
        f"FROM '{embeddings}/*.parquet' e JOIN '{predictions}/*.parquet' p USING (shard, index) ORDER BY e.key"
    ).fetchall()
    assert [row[0] for row in joined] == keys
    assert {row[4:] for row in joined} == {(1280, 2)}
    assert all(row[2] in ("china", "flower") and 0.5 <= row[3] <= 1 for row in joined)
    frame = pd.read_parquet(predictions)
    assert sorted(frame["key"]) == keys
    assert frame["bundle"].unique().tolist() == [scored.summary["bundle"]]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where a Ray of this test's own leaves its logs; a short path, as its sockets need one."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_keys_are_in_nothing_that_a_run_writes(
    engine_process: Engine,
    recipes: Recipes,
    s3_store: S3TestStore,
    s3_config: StorageConfig,
    ray_folder: Path,
) -> None:
    """Neither in what is printed, nor in Ray's logs, nor in what is stored; whether the run succeeds or not."""
    write_shards(open_store(f"{recipes.root}/shards", s3_config), 1, 70)
    here = {"RAY_TMPDIR": str(ray_folder), "AWS_SESSION_TOKEN": ""}
    ended = engine_process("extract", recipes.extract, "--json", environment=here)
    assert ended.code == 0, ended.stderr
    canary = "canary/of+a/secret+key"
    refused = engine_process(
        "extract", recipes.extract, environment={**here, "AWS_SECRET_ACCESS_KEY": canary}
    )
    assert refused.code == 1
    printed = ended.stdout + ended.stderr + refused.stdout + refused.stderr
    logs = [path for path in ray_folder.rglob("*") if path.is_file()]
    assert any(path.name == "gcs_server.out" for path in logs)  # it is the Ray that ran
    texts = {str(path): path.read_bytes() for path in logs} | {"what is printed": printed.encode()}
    table = open_store(f"{recipes.root}/embeddings", s3_config)
    texts |= {info.path: table.read(info.path) for info in table.list()}
    assert "_table.json" in texts
    for name, text in texts.items():
        assert s3_store.secret_key.encode() not in text, name
        assert canary.encode() not in text, name


def test_wrong_keys_are_one_clear_message(engine_process: Engine, recipes: Recipes) -> None:
    ended = engine_process("extract", recipes.extract, environment={"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert ended.code == 1
    assert recipes.root in ended.stderr and "way out" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_bucket_is_one_clear_message(engine_process: Engine, recipes: Recipes) -> None:
    ended = engine_process("extract", recipes.extract, "--set", "source.uri=s3://no-such-bucket-17/shards")
    assert ended.code == 1
    assert "no-such-bucket-17" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_read_only_key_is_one_clear_message_and_nothing_is_written(
    engine_process: Engine, recipes: Recipes, s3_store: S3TestStore, s3_config: StorageConfig
) -> None:
    read_only = s3_store.read_only_environment()
    if read_only is None:
        pytest.skip("the store named by ENGINE_TEST_S3_ENDPOINT came without read-only keys")
    write_shards(open_store(f"{recipes.root}/shards", s3_config), 1, 2)
    ended = engine_process("extract", recipes.extract, environment=read_only)
    assert ended.code == 1
    assert f"{recipes.root}/embeddings" in ended.stderr and "Traceback" not in ended.stderr
    assert list(open_store(f"{recipes.root}/embeddings", s3_config).list()) == []
