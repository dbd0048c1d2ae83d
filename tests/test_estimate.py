"""Every figure of an estimate, against values computed by hand from numbers in which mistakes cannot cancel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import RecipeError
from engine.estimate import CLUSTERS, KEYS_PER_LISTING, Estimate, PaperPlan, Rates
from engine.storage import open_store
from engine.storage.s3 import KEYS_PER_PAGE
from jobs.cli import main
from jobs.plan import paper_plan
from tests.embedding_tables import write_part


def plan_of(**changes: Any) -> PaperPlan:
    """10,007 images: nine shards of 1,009 and one of 926, in parts of at most 103 rows."""
    document: dict[str, Any] = {
        "images": 10_007,
        "archive": {"bytes_per_image": 100_003, "images_per_shard": 1009, "parts_with_rejects": 0.07},
        "table": {"width": 7, "dtype": "float16", "rows_per_part": 103, "bytes_per_row_beside": 5},
        "cluster": {
            "nodes": 3,
            "cores_per_node": 5,
            "gpus_per_node": 2,
            "node_price_per_hour": 17,
            "other_price_per_hour": 19,
            "head_memory_gb": 1.186,
        },
        "rates": {
            "images_per_core": 13,
            "images_per_gpu": 11,
            "decoded_per_core": 7,
            "efficiency": 0.5,
            "driver_seconds_per_part": 0.1,
            "listing_request_seconds": 2,
            "listed_key_seconds": 0.5,
        },
        "store": {
            "per_1000_writes": 23,
            "per_1000_reads": 29,
            "per_gb_month": 31,
            "writes_per_second": 37,
            "reads_per_second": 41,
        },
    }
    for path, value in changes.items():
        block, _, field = path.partition("__")
        if field:
            document[block] = {**document[block], field: value}
        else:
            document[block] = value
    return PaperPlan.model_validate(document)


def test_parts_and_objects_are_counted_shard_by_shard() -> None:
    estimate = Estimate(plan_of())
    assert estimate.shards == 10
    assert estimate.parts == 99  # 9 x 10 (1,009 / 103 = 9.8), and 9 (926 / 103 = 8.99)
    assert estimate.reject_files == 7  # 99 x 0.07 = 6.93
    assert estimate.objects == 107  # and _table.json
    assert estimate.puts == 108  # and the probe
    assert estimate.deletes == 93  # 92 parts without rejects, and the probe


def test_an_archive_of_whole_shards_has_no_part_for_a_rest() -> None:
    estimate = Estimate(plan_of(images=2 * 1009, archive__parts_with_rejects=0))
    assert (estimate.shards, estimate.parts, estimate.reject_files, estimate.objects) == (2, 20, 0, 21)


def test_bytes_are_those_of_images_and_of_rows() -> None:
    estimate = Estimate(plan_of())
    assert estimate.bytes_in == 1_000_730_021  # 10,007 x 100,003
    assert estimate.bytes_out == 190_133  # 10,007 x (7 x 2 + 5)
    assert Estimate(plan_of(table__dtype="float32")).bytes_out == 330_231  # 10,007 x (7 x 4 + 5)


def test_a_shard_is_read_in_ranges_of_8_mib() -> None:
    # 100,903,027 bytes are 12.03 ranges of 8,388,608, and the rest of 92,602,778 bytes 11.04.
    assert Estimate(plan_of()).gets == 9 * 13 + 12


def test_rows_of_a_part_follow_from_the_input_size_where_the_plan_leaves_them_open() -> None:
    # 64,000,000 / (224 x 224 x 3) = 425 rows, as a multiple of 64; the same number that extract takes.
    assert Estimate(plan_of(table__rows_per_part=None, table__input_size=224)).rows_per_part == 384


def test_listings_are_counted_by_pages_of_a_thousand() -> None:
    many = plan_of(
        images=2_503_000,
        archive__images_per_shard=1000,
        table__rows_per_part=100,
        archive__parts_with_rejects=0,
    )
    estimate = Estimate(many)
    assert (estimate.shards, estimate.parts) == (2503, 25_030)
    assert estimate.first_listing_requests == 3 + 1 + 2 * 26 + 2  # rejects/ is empty: one page, twice
    assert estimate.later_listing_requests == 3 + 3 * 26 + 2
    with_rejects = Estimate(
        many.model_copy(
            update={
                "archive": plan_of().archive.model_copy(
                    update={"images_per_shard": 1000, "parts_with_rejects": 0.1}
                )
            }
        )
    )
    assert with_rejects.first_listing_requests == 3 + 1 + 3 * 26 + 2 * 3  # 2,503 rejects files
    assert KEYS_PER_LISTING == KEYS_PER_PAGE


def test_seconds_of_listings_are_those_of_pages_and_keys() -> None:
    estimate = Estimate(plan_of())
    assert estimate.planning_seconds == 7 + 51.5  # (2 + 10 x 0.5) + (2 + 99 x 0.5)
    assert estimate.first_listing_seconds == 7 + 2 + 3 * 51.5 + 2 * 5.5


def test_the_driver_holds_a_little_for_each_shard_and_part() -> None:
    assert Estimate(plan_of()).driver_bytes == 186_000_000 + 10 * 160 + 99 * 22


@pytest.mark.parametrize(
    ("changes", "cores", "gpus", "rate"),
    [
        ({}, 105, 66, 33),  # 3 x 5 cores x 7, 3 x 2 GPUs x 11; the GPUs run out: 66 x 0.5
        ({"rates__decoded_per_core": 3}, 45, 66, 22.5),  # the cores run out: 45 x 0.5
        ({"rates__decoded_per_core": 3, "cluster__decode_nodes": 1}, 60, 66, 30),  # 4 x 5 cores x 3
        ({"cluster__gpus_per_node": 0}, 195, None, 97.5),  # 3 x 5 cores x 13
        ({"cluster__nodes": 1}, 35, 22, 22),  # one node is all of one node
    ],
)
def test_the_rate_is_that_of_what_runs_out_first(
    changes: dict[str, Any], cores: float, gpus: float | None, rate: float
) -> None:
    estimate = Estimate(plan_of(**changes))
    assert estimate.core_images_per_second == cores
    assert estimate.gpu_images_per_second == gpus
    assert estimate.images_per_second == rate


def test_nodes_that_only_decode_belong_beside_gpus() -> None:
    with pytest.raises(ValueError, match="decode_nodes belong beside GPUs"):
        plan_of(cluster__gpus_per_node=0, cluster__decode_nodes=1)


def test_the_driver_bounds_the_rate_however_many_nodes_there_are() -> None:
    estimate = Estimate(plan_of(cluster__nodes=1000))
    assert estimate.driver_limit == pytest.approx(1010.80808)  # 10,007 images / 99 parts / 0.1 s
    assert estimate.images_per_second == estimate.driver_limit


def test_hours_and_money() -> None:
    estimate = Estimate(plan_of())
    assert estimate.seconds == pytest.approx(303.242424 + 174.5)  # 10,007 / 33, and the listings
    assert estimate.machine_money == pytest.approx(9.2894360)  # 477.742424 / 3,600 x (3 x 17 + 19)
    assert estimate.first_listing_requests == 7
    assert estimate.request_money == pytest.approx(6.386)  # (108 + 7) / 1,000 x 23 + 129 / 1,000 x 29
    assert estimate.table_money_per_month == pytest.approx(0.005894123)  # 0.000190133 x 31
    with_decoders = Estimate(plan_of(cluster__decode_nodes=2))
    assert with_decoders.machine_money == pytest.approx(14.3322727)  # the same hours x (3 x 17 + 3 x 19)
    assert Estimate(plan_of(cluster__node_price_per_hour=None)).machine_money is None


def test_requests_per_second_follow_the_rate() -> None:
    estimate = Estimate(plan_of())
    assert estimate.puts_per_second == pytest.approx(0.32647147)  # 33 images/s / 101.0808 images in a part
    assert estimate.gets_per_second == pytest.approx(0.42540222)  # 33 x 129 / 10,007


def test_the_nearest_limit_comes_first_and_says_how_much_of_it_is_used() -> None:
    limits = {limit.name: limit for limit in Estimate(plan_of()).limits()}
    assert limits["the driver's core"].value == pytest.approx(1010.80808)
    assert limits["PUT/s of the prefix data/"].value == pytest.approx(3739.98990)  # 37 x 101.0808
    assert limits["GET/s of the archive's prefix"].value == pytest.approx(3180.51938)  # 41 x 10,007 / 129
    # 1,186 MB less 186, at 3,778 bytes for 10,007 images.
    assert limits["memory of the head"].value == pytest.approx(2_648_755_955.5)
    assert limits["an hour of listings before each further run"].value == pytest.approx(615_815.385)
    shares = [limit.share for limit in Estimate(plan_of()).limits()]
    assert shares == sorted(shares, reverse=True)
    assert limits["the driver's core"].share == pytest.approx(0.0326471470)  # 33 / 1,010.8


def test_defaults_are_what_the_benchmarks_measured(repository: Path) -> None:
    results = repository / "tests" / "benchmarks" / "results"
    cores = json.loads((results / "2026-11-23-16-cores.json").read_text())
    engine = cores["networks"]["MobileNetV2"]["contenders"]["engine tensorflow float32"]
    assert Rates().images_per_core == pytest.approx(
        engine["images_per_second"] / cores["machine"]["cores"], rel=0.001
    )
    growth = json.loads((results / "2026-11-22-growth.json").read_text())
    many = growth["growths"]["actors"]["series"]["3429 ms per batch"][-1]
    assert many["x"] == 64
    assert Rates().efficiency == many["of_ideal"]
    per_part = many["driver_cores"] * many["seconds"] / many["parts"]
    assert Rates().driver_seconds_per_part == pytest.approx(per_part, rel=0.001)
    page = (repository / "engine/docs/performance.md").read_text(encoding="utf-8")
    assert "15,264 images/s in float16; decoding kept the whole at 7,400" in page
    assert Rates().images_per_gpu == 15_264
    assert Rates().decoded_per_core * 16 == 7_400


def test_a_real_part_is_as_large_as_its_share_of_the_table(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    embeddings_ND = np.random.default_rng(17).standard_normal((384, 1280)).astype(np.float32)
    write_part(store, "2026/11/23/shards/00017.tar", 0, True, 0, embeddings_ND)  # keys of 36 characters
    (part,) = store.list("data/")
    said = Estimate(PaperPlan.model_validate({"images": 384, "cluster": {"nodes": 1, "cores_per_node": 1}}))
    assert said.parts == 1
    assert part.size == pytest.approx(said.bytes_out, rel=0.005)


def test_a_billion_images_on_the_gpu_overlay_are_told_with_formulas_sources_and_limits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--images", "1e9", "--cluster", "gpu-overlay", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    figures = {figure["name"]: figure["value"] for figure in facts["figures"]}
    assert figures["shards"] == 100_000
    assert figures["parts"] == 2_700_000  # 27 for each shard: 10,000 / 384 = 26.04
    assert figures["rate"] == pytest.approx(56_171.52)  # 4 x 15,264 x 0.92; 180 cores would decode 83,250
    assert all(figure["formula"] for figure in facts["figures"])
    assert facts["limits"][0]["name"] == "the driver's core"
    assert {one["name"] for one in facts["assumptions"]} >= {
        "images",
        "rates.images_per_gpu",
        "store.reads_per_second",
    }
    assert all(one["source"] for one in facts["assumptions"])
    assert main(["plan", "--images", "1e9"]) == 0
    told = capsys.readouterr().out
    assert "2,700,000 objects" in told
    assert "115.4 TB" in told


def test_own_rates_and_clusters_take_the_place_of_the_measured_ones(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("{nodes: 7, cores_per_node: 3}")
    plan = paper_plan(1000, str(file), ["rates.images_per_core=11", "cluster.nodes=2"])
    assert (plan.cluster.nodes, plan.cluster.cores_per_node, plan.cluster.node_price_per_hour) == (2, 3, None)
    assert Estimate(plan).core_images_per_second == 66
    assert paper_plan(1e9, "cpu-overlay", []).cluster == CLUSTERS["cpu-overlay"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "0"], "--images: not a number of images"),
        (["--images", "1.5"], "--images: not a number of images"),
        (["--images", "10", "--cluster", "tpu"], "cpu-overlay, gpu-overlay, or a YAML file"),
        (["--images", "10", "--set", "rates.images_per_cor=1"], "did you mean 'images_per_core'?"),
    ],
)
def test_a_wrong_plan_exits_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_plan_for_no_such_cluster_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="gpu-overlay"):
        paper_plan(10, "none", [])
