"""A whole extraction through a store that breaks one request in ten, and flips bits: the table is as of a calm run."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from engine.storage import StorageConfig, open_store
from engine.tables import open_table
from engine.verification import verify_table
from tests.commands import Engine
from tests.flows.archives import crop_jpeg, crop_label, extract_recipe, write_shards
from tests.proxy import open_proxy
from tests.stores import S3TestStore

SHARDS, IMAGES = 12, 100
FAULTS = {
    "slowdown": 0.02,
    "e500": 0.02,
    "reset": 0.02,
    "cut": 0.02,
    "lost": 0.01,
    "stall": 0.01,
    "delay": 0.05,
}
STALL_S = 3
# One byte of the body is another: of objects, which are a sixth of all answers; no digest goes with a listing.
CORRUPT, OBJECTS = 0.3, r"^GET [^?]*/(shards|table)/"


@pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")
def test_one_request_in_ten_fails_and_nothing_is_lost_or_doubled(
    repository: Path,
    s3_store: S3TestStore,
    s3_uri: str,
    s3_config: StorageConfig,
    engine_process: Engine,
    tmp_path: Path,
) -> None:
    keys = write_shards(open_store(f"{s3_uri}/shards", s3_config), SHARDS, IMAGES)
    with (
        open_proxy(repository, s3_store) as flipping,
        open_proxy(repository, replace(s3_store, endpoint_url=flipping.endpoint_url), STALL_S) as breaking,
    ):
        flipping.set_faults(match=OBJECTS, corrupt=CORRUPT)
        breaking.set_faults(**FAULTS)
        recipe = extract_recipe(
            tmp_path,
            f"{s3_uri}/shards",
            f"{s3_uri}/table",
            f'storage: {{endpoint_url: "{breaking.endpoint_url}", region: {s3_config.region}}}',
        )
        ended = engine_process("extract", recipe, "--json")
        faults = breaking.faults() | flipping.faults()
        print(f"{breaking.requests()} requests, of which were broken: {faults}")
    assert ended.code == 0, ended.stderr
    assert ended.summary["rows"] == SHARDS * IMAGES
    assert sum(faults.values()) >= 5
    assert faults["corrupt"] >= 1
    table = open_store(f"{s3_uri}/table", s3_config)
    rows = open_table(table).read(["key", "label", "sha256"])
    assert Counter(rows["key"].to_pylist()) == Counter(keys)
    for key, label, digest in zip(
        *(rows[name].to_pylist() for name in ("key", "label", "sha256")), strict=True
    ):
        assert label == crop_label(int(key))
        assert digest == hashlib.sha256(crop_jpeg(int(key))[0]).digest()
    checked = verify_table(table)
    assert not (checked.damage or checked.leftovers or checked.unfinished), checked
