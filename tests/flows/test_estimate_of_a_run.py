"""What `engine plan` says of an archive on paper, beside the requests and objects of a real extraction of it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from engine.estimate import Estimate, PaperPlan
from engine.storage import StorageConfig, open_store
from engine.tables import open_table
from tests.commands import Engine
from tests.flows.archives import extract_recipe, write_shards
from tests.proxy import BreakingProxy, open_breaking_proxy
from tests.stores import S3TestStore

SHARDS, IMAGES_PER_SHARD, ROWS_PER_PART = 3, 131, 64  # parts of 64, 64 and 3


def plan_on_paper(bytes_per_image: int, width: int) -> PaperPlan:
    return PaperPlan.model_validate(
        {
            "images": SHARDS * IMAGES_PER_SHARD,
            "archive": {"bytes_per_image": bytes_per_image, "images_per_shard": IMAGES_PER_SHARD},
            "table": {"width": width, "rows_per_part": ROWS_PER_PART},
            "cluster": {"nodes": 1, "cores_per_node": 2},
        }
    )


def requests_of(proxy: BreakingProxy, source: str, table: str) -> Counter[str]:
    """What was asked for since the last time: GET of shards, PUT and DELETE of the table, listings by their prefix."""
    found: Counter[str] = Counter()
    for method, target in proxy.seen:
        parts = urlsplit(target)
        query = parse_qs(parts.query)
        if f"{table}runs/" in (parts.path + query.get("prefix", [""])[0]):
            continue  # the record of a run is beside what is estimated
        if "list-type" in query:
            found[f"LIST {query.get('prefix', [''])[0].removeprefix(table).removeprefix(source)}"] += 1
        elif method == "GET" and source in parts.path:
            found["GET"] += 1
        elif method in ("PUT", "DELETE") and table in parts.path:
            found[method] += 1
    proxy.seen.clear()
    return found


def test_a_small_extraction_makes_the_objects_and_requests_that_the_estimate_says(
    engine: Engine, s3_store: S3TestStore, s3_uri: str, tmp_path: Path
) -> None:
    direct = StorageConfig(endpoint_url=s3_store.endpoint_url, region=s3_store.region)
    write_shards(open_store(f"{s3_uri}/shards", direct), shards=SHARDS, images=IMAGES_PER_SHARD)
    shard_bytes = next(iter(open_store(f"{s3_uri}/shards", direct).list())).size
    prefix = s3_uri.rpartition("/")[2]
    with open_breaking_proxy(s3_store, after=sys.maxsize, status=503, code="SlowDown") as proxy:
        storage = f"storage: {{endpoint_url: {proxy.endpoint_url}, region: {s3_store.region}}}"
        recipe = extract_recipe(tmp_path, f"{s3_uri}/shards", f"{s3_uri}/table", storage)
        first = engine("extract", recipe, "--json")
        assert first.code == 0, first.stderr
        begun = requests_of(proxy, f"{prefix}/shards/", f"{prefix}/table/")
        assert engine("extract", recipe, "--json").code == 0
        again = requests_of(proxy, f"{prefix}/shards/", f"{prefix}/table/")

    table = open_store(f"{s3_uri}/table", direct)
    width = open_table(table).record["width"]
    estimate = Estimate(plan_on_paper(shard_bytes // IMAGES_PER_SHARD, width))
    objects = [info for info in table.list() if not info.path.startswith("runs/")]
    assert estimate.shards == SHARDS
    assert estimate.parts == first.summary["parts_written"] == 9
    assert estimate.objects == len(objects)
    assert begun["GET"] == estimate.gets
    assert begun["PUT"] == estimate.puts
    assert begun["DELETE"] == estimate.deletes
    assert (
        sum(count for name, count in begun.items() if name.startswith("LIST"))
        == estimate.first_listing_requests
    )
    assert (
        sum(count for name, count in again.items() if name.startswith("LIST"))
        == estimate.later_listing_requests
    )
    assert (again["LIST data/"], again["LIST rejects/"]) == (3, 2)
