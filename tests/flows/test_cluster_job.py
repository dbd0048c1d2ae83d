"""A Ray cluster of three nodes on one machine: `jobs/extract.py` submitted through the Jobs API."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.storage import open_store
from engine.tables import open_table
from tests.clusters import open_cluster
from tests.commands import Engine
from tests.flows.archives import extract_recipe, write_shards

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster
    from ray.job_submission import JobSubmissionClient

SUBMIT_TIMEOUT_S = 240


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A running cluster: a head without CPUs and two workers with two each."""
    # `python` of the submitted command is this one, as it is the image's own in a container.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    with open_cluster({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        yield cluster


def submit(client: JobSubmissionClient, entrypoint: str, repository: Path, deadline: float) -> str:
    """Submit a job as soon as an agent takes it: nodes are up some seconds before their agents are."""
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(repository)})
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def test_extract_runs_on_three_nodes_as_a_submitted_job_and_from_the_command_line(
    cluster: Cluster, engine_process: Engine, repository: Path, tmp_path: Path
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient  # slow: only when it runs

    keys = write_shards(open_store(str(tmp_path / "shards")), shards=4, images=70)
    # More readers than the nodes have memory for: a cluster may grow, and till then does with those that fit.
    compute = "compute: {actors: 2, decode_tasks: 100, memory_per_reader: 2000000000}"
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(tmp_path / "table"), compute)
    client = JobSubmissionClient(f"http://{cluster.head_node.webui_url}")
    deadline = time.monotonic() + SUBMIT_TIMEOUT_S
    job = submit(client, f"python jobs/extract.py {recipe} --json", repository, deadline)
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
    assert '"shards_done": 4' in logs
    assert "100 readers x 2.00 GB: waiting for it to grow" in logs
    table = open_table(open_store(str(tmp_path / "table")))
    assert sorted(table.read(["key"])["key"].to_pylist()) == keys
    assert table.incomplete_shards == 0

    lost, *_ = (tmp_path / "table" / "data").iterdir()
    lost.unlink()
    ended = engine_process("extract", recipe, "--json", "--set", f"compute.address={cluster.address}")
    assert ended.code == 0, ended.stderr
    assert ended.summary["parts_written"] == 1
    assert lost.exists()
