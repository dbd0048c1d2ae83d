"""`engine nightly` in an object store, killed while it extracts, while it scores and while it publishes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from engine.storage import StorageConfig, Store, open_store
from tests.commands import START_TIMEOUT_S, Engine, rows_of, start
from tests.flows.archives import crop_label, shard_bytes, write_recipe
from tests.processes import kill_process

pytestmark = [
    pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it"),
    pytest.mark.timeout(1500),  # six nights, of which three are processes of their own
]
ROWS = 96  # of each shard: two parts
SHARDS, NEW_SHARDS = 3, 6
SECTIONS = {
    "source": '{{kind: webdataset, uri: "{root}/archive", pattern: "*.tar", image: [jpg], label: cls}}',
    "backbone": "{{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32, "
    "layer: block_2_add}}",
    "output": '{{uri: "{root}/embeddings", rows_per_part: 64}}',
    "embeddings": '{{uri: "{root}/embeddings"}}',
    "bundles": '[{{uri: "{root}/bundle", output: {{uri: "{root}/labels", top_k: 2}}}}]',
    "alone": '[{{uri: "{root}/bundle", output: {{uri: "{root}/alone", top_k: 2}}}}]',
    "gate": "{{min_rows: 40}}",
    "lease": "{{lifetime_seconds: 3, wait_seconds: 60}}",
}


class Archive:
    """A bucket with everything in it, and recipes for it."""

    def __init__(self, root: str, config: StorageConfig, folder: Path) -> None:
        self.store, self._root, self._config, self._folder = open_store(root, config), root, config, folder

    def put(self, numbers: range) -> None:
        for number in numbers:
            self.store.write(f"archive/{number}.tar", shard_bytes(number * ROWS, ROWS))

    def recipe(self, verb: str, *sections: str, **own: str) -> Path:
        lines = {name: SECTIONS[name].format(root=self._root) for name in sections} | own
        lines["storage"] = f'{{endpoint_url: "{self._config.endpoint_url}", region: {self._config.region}}}'
        text = "".join(f"{name}: {line}\n" for name, line in lines.items())
        return write_recipe(self._folder, f"{verb}.yaml", text)

    def table(self, name: str) -> Store:
        return self.store.sub(name)

    def count(self, prefix: str) -> int:
        return sum(1 for _ in self.store.names(prefix))


@pytest.fixture
def archive(engine: Engine, s3_uri: str, s3_config: StorageConfig, tmp_path: Path) -> Archive:
    """Shards, their embeddings, a bundle fitted on them, and a night that labelled them; then twice as many more."""
    archive = Archive(s3_uri, s3_config, tmp_path)
    archive.put(range(SHARDS))
    assert engine("extract", archive.recipe("extract", "source", "backbone", "output")).code == 0
    fit = archive.recipe("fit", "embeddings", optimizer="{kind: lbfgs}", output=f'{{uri: "{s3_uri}/bundle"}}')
    fitted = engine("fit", fit)
    assert fitted.code == 0, fitted.stderr
    assert engine("nightly", nightly(archive)).code == 0
    assert archive.count("labels/data/") == 2 * SHARDS
    archive.put(range(SHARDS, SHARDS + NEW_SHARDS))
    return archive


def nightly(archive: Archive) -> Path:
    return archive.recipe("nightly", "source", "backbone", "output", "bundles", "gate", "lease")


def kill_when(archive: Archive, prefix: str, count: int, repository: Path) -> str:
    """Start a night, and SIGKILL it once so many objects are there; a lease that it took stays behind."""
    here = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # the shared one: a start less
    night = start("nightly", repository, nightly(archive), environment=here)
    deadline = time.monotonic() + START_TIMEOUT_S
    while archive.count(prefix) < count and night.poll() is None:
        assert time.monotonic() < deadline, f"nothing came to {prefix}"
        time.sleep(0.02)  # a listing is work for the store, too
    kill_process(night.pid)
    said, _ = night.communicate()
    assert night.returncode == -9, f"it ended by itself before {prefix} had {count}: {said}"
    return said


def test_a_night_killed_at_each_of_its_steps_goes_on(
    repository: Path, engine: Engine, archive: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    before = 2 * SHARDS
    steps = {"embeddings/data/": before + 1, "labels/held/data/": 1, "labels/data/": before + 1}
    for prefix, count in steps.items():
        kill_when(archive, prefix, count, repository)
        seen = {place: archive.count(place) for place in (*steps, "labels/nights/")}
        assert seen["labels/nights/"] == 3, "no night has come to its end since: a summary, a page, the index"
        with capsys.disabled():
            if os.environ.get("ENGINE_CHAOS_ROUNDS"):
                print(f"killed: {seen}")

    finished = engine("nightly", nightly(archive), "--json")
    assert finished.code == 0, finished.stderr
    assert finished.summary["is_finished"]
    again = engine("nightly", nightly(archive), "--json")
    assert (again.code, again.summary["published_parts"]) == (0, 0)

    assert archive.count("labels/held/data/") == 0
    parts = 2 * (SHARDS + NEW_SHARDS)
    assert (archive.count("embeddings/data/"), archive.count("labels/data/")) == (parts, parts)
    embedded = rows_of(archive.table("embeddings"), ["key", "shard", "index", "label"])
    rows = range((SHARDS + NEW_SHARDS) * ROWS)
    assert embedded["key"].to_pylist() == [f"{number:06d}" for number in rows]
    assert embedded["label"].to_pylist() == [crop_label(number) for number in rows]
    assert engine("score", archive.recipe("score", "embeddings", bundles=one_more(archive))).code == 0
    assert predicted(archive.table("labels")).equals(predicted(archive.table("alone")))
    for table in ("embeddings", "labels"):
        checked = engine("verify", archive.table(table).uri, *endpoint(archive))
        assert checked.code == 0, checked.stderr


def one_more(archive: Archive) -> str:
    """The same bundle scored in one go, into a table of its own."""
    return SECTIONS["alone"].format(root=archive.store.uri)


def predicted(table: Store) -> pa.Table:
    columns = ["key", "shard", "index", "label", "confidence", "top_labels", "top_confidences"]
    return rows_of(table, columns, "predictions")


def endpoint(archive: Archive) -> tuple[str, ...]:
    config = archive.store.config
    return ("--endpoint-url", str(config.endpoint_url), "--region", str(config.region))
