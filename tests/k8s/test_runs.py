"""The command of every RayJob under k8s/, as it is written, in pods on this machine; one node is lost on the way."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from engine.storage import Store, open_store
from engine.tables import open_table
from tests.flows.archives import crop_jpeg
from tests.k8s.sandbox import Pods, open_pods, start_command
from tests.shards.archives import member, tar_bytes
from tests.stores import S3TestStore

ORDER = ("extract", "fit", "score", "finetune", "nightly")
BUCKETS = ("image-archive", "image-features")
SHARDS, IMAGES_PER_SHARD = 6, 40
AGENT_TIMEOUT_S = 90
# Each job is a whole one, with pods as large as a cluster's: 100 to 390 s on two cores that others kept busy.
pytestmark = pytest.mark.timeout(600)
when_long = pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")
# gpu has nodes of every kind; the RayJobs of nightly are those of cpu, and its CronJob is tried in test_launch.py.
OVERLAYS = ["gpu", pytest.param("cpu", marks=when_long), pytest.param("dev", marks=when_long)]
TOKEN = "a-token-of-this-test-0123456789abcdef"


@dataclass
class Running:
    """The RayJobs of an overlay, the cluster of the one that was started last, and what they work on."""

    pods: Pods
    jobs: dict[str, dict[str, Any]]
    archive: Store
    features: Store
    port: int = 52366  # next of those that a node has for its agent and for metrics of its workers

    def start(self, verb: str) -> None:
        """Start the job's own cluster: its head, and of each group one pod, of readers two if the group has them."""
        self.pods.end()
        cluster = self.jobs[verb]["spec"]["rayClusterSpec"]
        head = cluster["headGroupSpec"]
        self.pods.start(f"{verb}-head", _container(head), start_command(head["rayStartParams"], "--head"))
        for group in cluster["workerGroupSpecs"]:
            wanted = 2 if (verb, group["groupName"]) == ("extract", "cpu") else 1
            for number in range(min(wanted, group["maxReplicas"])):
                self.join(verb, group, f"{verb}-{group['groupName']}-{number}")

    def join(self, verb: str, group: dict[str, Any], name: str) -> None:
        """Start one more pod of a group."""
        local = {"dashboard_agent_listen_port": self.port, "metrics_export_port": self.port + 1}
        self.port += 2
        command = start_command(group["rayStartParams"], address="127.0.0.1:6379", **local)
        self.pods.start(name, _container(group), command)

    def submit(self, verb: str) -> tuple[int, str]:
        """Run the job's entrypoint as KubeRay's submitter does; exit code and log."""
        spec = self.jobs[verb]["spec"]
        (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
        command = [
            "ray",
            "job",
            "submit",
            "--address",
            "http://127.0.0.1:8265",
            "--submission-id",
            verb,
            "--",
        ]
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            ended = self.pods.run(submitter, [*command, *spec["entrypoint"].split()])
            log = ended.stdout + ended.stderr
            # A head answers before its agent does: KubeRay's submitter is then tried again (submitterConfig).
            if "No available agent" not in log or time.monotonic() > deadline:
                return ended.returncode, log


@pytest.fixture(scope="module", params=OVERLAYS)
def running(
    request: pytest.FixtureRequest,
    repository: Path,
    s3_store: S3TestStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """Room for the overlay's pods; a node that has a GPU has it by its number, for which there is no device."""
    assert (repository / "k8s").is_dir(), "no k8s/ here: there are no manifests whose commands could be run"
    from tests.k8s.rendering import of_kind, overlay

    documents = overlay(request.param)
    jobs = of_kind(documents, "RayJob")
    assert set(jobs) == set(ORDER), f"RayJobs of k8s/overlays/{request.param}"
    environment = {
        **s3_store.environment(),  # what the Secret and the ConfigMap of a store with keys hold
        "AWS_ENDPOINT_URL_S3": s3_store.endpoint_url,
        "RAY_AUTH_MODE": "token",  # what the operator adds where authOptions say so
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_raylet_start_wait_time_s": "120",  # this machine is slower than a node
    }
    client, port = s3_store.client(), urlsplit(s3_store.endpoint_url).port or 80
    with (
        pytest.MonkeyPatch.context() as patch,
        open_pods(tmp_path_factory.mktemp("pods"), repository, environment, port) as pods,
    ):
        for name, value in environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        for bucket in BUCKETS:  # of the overlay before it, too
            empty_bucket(client, bucket)
        for config_map in of_kind(documents, "ConfigMap").values():
            for name, text in config_map["data"].items():
                (pods.recipes / name).write_text(text)
        yield Running(pods, jobs, open_store("s3://image-archive"), open_store("s3://image-features"))


def empty_bucket(client: Any, name: str) -> None:
    """Make a bucket, or what is in it go."""
    if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=name)
    while found := client.list_objects_v2(Bucket=name).get("Contents", []):
        client.delete_objects(Bucket=name, Delete={"Objects": [{"Key": one["Key"]} for one in found]})


def _container(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return container


def write_archive(store: Store, first_shard: int, shards: int) -> None:
    """Shards with a label and a split for each image, as the recipes ask for."""
    for shard in range(first_shard, first_shard + shards):
        members = []
        for number in range(shard * IMAGES_PER_SHARD, (shard + 1) * IMAGES_PER_SHARD):
            encoded, label = crop_jpeg(number)
            split = ("train", "train", "train", "validation", "test")[number % 5]
            for ending, data in (
                ("jpg", encoded),
                ("cls", label.encode()),
                ("json", json.dumps({"split": split}).encode()),
            ):
                members.append(member(f"{number:06d}.{ending}", data))
        store.write(f"shards/{shard:05d}.tar", tar_bytes(members))


def test_extract_is_whole_although_a_node_is_lost_on_the_way(running: Running) -> None:
    """Another takes its place, as KubeRay sees to, where it was the only one."""
    write_archive(running.archive, 0, SHARDS)
    running.start("extract")
    answer: list[tuple[int, str]] = []
    run = threading.Thread(target=lambda: answer.append(running.submit("extract")))
    run.start()
    table = running.features.sub("lite0_224")
    while run.is_alive() and not any(table.names("data/")):
        time.sleep(0.05)
    written = sum(1 for _ in table.names("data/"))
    *others, last = (name for name in running.pods.nodes if name.startswith("extract-cpu"))
    running.pods.lose(last)
    if not others:
        (group,) = running.jobs["extract"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        running.join("extract", group, "extract-cpu-again")
    run.join()
    code, log = answer[0]
    assert code == 0, log
    assert written < SHARDS, "the node was lost too late to matter"
    keys = open_table(table).read(["key"])["key"].to_pylist()
    assert sorted(keys) == [f"{number:06d}" for number in range(SHARDS * IMAGES_PER_SHARD)]


@when_long
@pytest.mark.parametrize("verb", ["fit", "score"])
def test_the_jobs_after_it_run_as_they_are_written(running: Running, verb: str) -> None:
    running.start(verb)
    code, log = running.submit(verb)
    assert code == 0, log
    made = {"fit": "models/archive", "score": "labels/archive"}
    assert any(running.features.sub(made[verb]).names()), log


@when_long
def test_finetune_runs_to_its_verdict(running: Running) -> None:
    """Crops of two photos are told apart without it, so that it may end with exit code 3."""
    running.start("finetune")
    code, log = running.submit("finetune")
    assert '"verb": "finetune"' in log, log
    assert code == 0 or "failed with exit code 3" in log, log


@when_long
def test_a_night_labels_what_has_come_since(running: Running) -> None:
    write_archive(running.archive, SHARDS, 1)
    running.start("nightly")
    code, log = running.submit("nightly")
    assert code == 0, log
    labels = open_table(running.features.sub("labels/archive"), "predictions")
    assert len(labels.read(["key"])) == (SHARDS + 1) * IMAGES_PER_SHARD


def test_nobody_printed_a_key(running: Running, s3_store: S3TestStore) -> None:
    """Whatever the pods wrote to their /tmp: logs of all processes, and what was printed."""
    written = [*running.pods.folder.glob("*.log"), *(running.pods.folder / "tmp").rglob("*")]
    files = [path for path in written if path.is_file() and not path.is_symlink()]
    assert {"extract-head.log", "gcs_server.out", "job-driver-extract.log"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for secret in (s3_store.secret_key, TOKEN):
            assert secret.encode() not in content, path
