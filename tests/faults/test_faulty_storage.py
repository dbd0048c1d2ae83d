"""A whole extraction through a store that breaks one request in ten: the table is that of a calm run."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from engine.storage import StorageConfig, open_store
from engine.tables import open_table
from engine.verification import verify_table
from tests.commands import Engine
from tests.flows.archives import crop_label, extract_recipe, write_shards
from tests.proxy import FaultyProxy

SHARDS, IMAGES = 12, 100
FAULTS = {"slowdown": 0.03, "e500": 0.02, "reset": 0.02, "cut": 0.02, "lost": 0.01, "delay": 0.05}


@pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")
def test_one_request_in_ten_fails_and_nothing_is_lost_or_doubled(
    proxy: FaultyProxy, s3_uri: str, s3_config: StorageConfig, engine_process: Engine, tmp_path: Path
) -> None:
    keys = write_shards(open_store(f"{s3_uri}/shards", s3_config), SHARDS, IMAGES)
    proxy.set_faults(**FAULTS)
    recipe = extract_recipe(
        tmp_path,
        f"{s3_uri}/shards",
        f"{s3_uri}/table",
        f'storage: {{endpoint_url: "{proxy.endpoint_url}", region: {s3_config.region}}}',
    )
    ended = engine_process("extract", recipe, "--json")
    assert ended.code == 0, ended.stderr
    assert ended.summary["rows"] == SHARDS * IMAGES
    table = open_store(f"{s3_uri}/table", s3_config)
    rows = open_table(table).read(["key", "label"])
    assert Counter(rows["key"].to_pylist()) == Counter(keys)
    assert rows["label"].to_pylist() == [crop_label(int(key)) for key in rows["key"].to_pylist()]
    checked = verify_table(table)
    assert not (checked.damage or checked.leftovers or checked.unfinished), checked
    faults = proxy.faults()
    assert sum(faults.values()) >= 5
    print(f"{proxy.requests()} requests, of which were broken: {faults}")
