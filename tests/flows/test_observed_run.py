"""What an operator sees of runs in a cluster: the metrics page of its node, JSON logs, and records beside the table."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.run_metrics import METRICS
from engine.storage import open_store
from tests.commands import Ended, Engine
from tests.flows.archives import extract_recipe, shard_bytes
from tests.shards.archives import member, tar_bytes

IMAGES = 70  # of each shard: a part of 64 and one of 6
PARTS = 5
OUR_LABELS = {"verb", *(label for metric in METRICS for label in metric.labels)}
ADDED_UP = ("_total", "_count")
LOGS_ON_A_WORKER = """
import logging, sys
from engine.log_lines import JsonLog, LogContext, use_json_log
from engine.on_ray import ray_session, run_on_worker

def warn(count):
    logging.getLogger("engine.training.labels").warning("%d labels of unknown keys", count)

use_json_log(JsonLog(LogContext("fit", "fit-20260101T000000Z-beef"), print))
with ray_session(sys.argv[1], local_cpus=1):
    run_on_worker(warn, 3, num_cpus=1, num_gpus=0)
"""
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Cluster:
    """A running head with CPUs."""

    address: str
    metrics_url: str
    logs: Path

    def scraped(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The engine's samples on the metrics page, without the labels that Ray adds.

        Each run has series of its own: counters are added up, of a gauge the latest counts.
        """
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            page = answer.read().decode()
        found: dict[tuple[str, frozenset[tuple[str, str]]], list[tuple[str, float]]] = defaultdict(list)
        for name, labels, value in SAMPLE.findall(page):
            if name.startswith("ray_engine_"):
                pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                ours = frozenset((label, text) for label, text in pairs.items() if label in OUR_LABELS)
                found[name, ours].append((pairs["WorkerId"], float(value)))
        return {
            series: sum(value for _, value in seen) if series[0].endswith(ADDED_UP) else max(seen)[1]
            for series, seen in found.items()
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from ray.cluster_utils import Cluster as Nodes

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = Nodes(
        initialize_head=True,
        head_node_args={
            "num_cpus": 3,
            "include_dashboard": False,
            "dashboard_port": 0,  # the default may be another Ray's on this machine
            "dashboard_agent_listen_port": 0,
            "metrics_export_port": port,
        },
    )
    try:
        nodes.wait_for_nodes()
        logs = Path(nodes.head_node.get_logs_dir_path())
        yield Cluster(nodes.address, f"http://127.0.0.1:{port}/metrics", logs)
    finally:
        nodes.shutdown()


def parsed(text: str) -> list[dict[str, Any]]:
    """Lines of a log, every one of which is a JSON object."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(line, dict) for line in found)
    return found


def labels(**pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairs.items())


def test_a_run_is_seen_on_the_metrics_page_in_its_log_and_beside_its_table(
    cluster: Cluster, engine_process: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    for number in range(2):
        source.write(f"{number}.tar", shard_bytes(number * IMAGES, IMAGES))
    source.write("2.tar", tar_bytes([member("x.jpg", b"not an image"), member("y.cls", b"china")]))
    more = "limits: {max_reject_fraction: 0.5}\ncompute: {actors: 1}"
    recipe = extract_recipe(tmp_path, source.uri, str(tmp_path / "table"), more)
    environment = {"RAY_ADDRESS": cluster.address, "ENGINE_LOG": "json"}

    def run(*settings: str) -> Ended:
        return engine_process("extract", recipe, "--json", *settings, environment=environment)

    ended = run()
    page = cluster.scraped()
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert (summary["rows"], summary["parts_written"], summary["shards_done"]) == (2 * IMAGES, PARTS, 3)

    # The metrics page, right after the driver has gone.
    verb = labels(verb="extract")
    made = labels(verb="extract", table="embeddings")
    assert page["ray_engine_images_total", verb] == 2 * IMAGES + 2
    assert page["ray_engine_rows_total", made] == 2 * IMAGES
    assert page["ray_engine_parts_written_total", made] == PARTS
    assert page["ray_engine_read_bytes_total", made] == summary["bytes_read"]
    assert page["ray_engine_rejects_total", labels(verb="extract", reason="no_image")] == 1
    assert page["ray_engine_rejects_total", labels(verb="extract", reason="unsupported_format")] == 1
    assert page["ray_engine_shards_done_total", verb] == 3
    assert page["ray_engine_runs_total", labels(verb="extract", outcome="done", error="none")] == 1
    for stage in ("read", "decode", "embed", "write"):
        of_stage = labels(verb="extract", stage=stage)
        assert page["ray_engine_stage_seconds_total", of_stage] > 0
        assert 0 < page["ray_engine_part_seconds_count", of_stage] <= PARTS
    assert page["ray_engine_run_in_progress", verb] == 0
    assert page["ray_engine_shards_pending", verb] == 0
    assert page["ray_engine_run_reject_ratio", verb] == pytest.approx(2 / (2 * IMAGES + 2))
    for moment in ("last_success", "last_finished", "progress", "run_start"):
        assert 0 <= time.time() - page[f"ray_engine_{moment}_timestamp_seconds", verb] < 240

    # Its log.
    lines = parsed(ended.stderr)
    assert {(line["verb"], line["run_id"]) for line in lines} == {("extract", summary["run_id"])}
    assert lines[-1]["message"] == "summary" and lines[-1]["summary"] == summary
    assert [line for line in lines if line.get("progress") == "shards"]
    assert any(line["message"].startswith("extract: 3 of 3 shards pending") for line in lines)

    # What is kept, and a second run that is judged: its error in the log, its end in numbers, nothing counted again.
    record = json.loads((tmp_path / "table" / "runs" / f"{summary['run_id']}.json").read_text())
    assert (record["exit_code"], record["error"], record["summary"]) == (0, None, summary)
    judged = run("--set", "limits.max_reject_fraction=0.001")
    assert judged.code == 3, judged.stderr
    told = parsed(judged.stderr)[-1]
    assert (told["level"], told["error"], told["exit_code"]) == ("ERROR", "OverBudget", 3)
    assert set(told["found"].split(", ")) == {"no_image 1", "unsupported_format 1"}
    assert "0.10%" in told["wanted"]
    record = json.loads((tmp_path / "table" / "runs" / f"{judged.summary['run_id']}.json").read_text())
    assert (record["exit_code"], record["outcome"]) == (3, "judged")
    assert record["error"]["kind"] == "OverBudget" and record["error"]["way_out"]
    page = cluster.scraped()
    assert page["ray_engine_images_total", verb] == 2 * IMAGES + 2
    assert page["ray_engine_runs_total", labels(verb="extract", outcome="judged", error="OverBudget")] == 1


def test_what_our_code_logs_on_workers_is_json_of_the_same_run(cluster: Cluster, repository: Path) -> None:
    command = [sys.executable, "-c", LOGS_ON_A_WORKER, cluster.address]
    subprocess.run(command, cwd=repository, check=True, timeout=120)
    written = [line for path in cluster.logs.glob("worker-*.err") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in written if "fit-20260101T000000Z-beef" in line]
    assert [(line["verb"], line["level"], line["logger"], line["message"]) for line in found] == [
        ("fit", "WARNING", "engine.training.labels", "3 labels of unknown keys")
    ]
