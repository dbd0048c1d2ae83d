"""`engine launch`, as a CronJob's pod runs it, against an API server over HTTPS."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ClusterError, NotAllowed, RecipeError
from engine.kubernetes import launch as module
from engine.kubernetes.api import ApiAddress, RayJobs
from engine.kubernetes.launch import RUN_LABEL, Ending, Launch, copy_of, ending_of, launch
from jobs.cli import main
from tests.k8s.api_server import NAMESPACE, ApiServer, open_api_server, service_account
from tests.k8s.rendering import of_kind, overlay

RUN = "nightly-29412345"
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def failed(code: int, reason: str = "AppFailed") -> dict[str, str]:
    """The status of a RayJob whose driver ended with an exit code, as Ray 2.60 and KubeRay 1.7 put it."""
    message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n"
    return {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "reason": reason,
        "message": f"{message}the log says exit code 3",
    }


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """An API server with the template `nightly`, and this process in a pod beside it."""
    with open_api_server(tmp_path) as (running, certificate):
        running.jobs["nightly"] = of_kind(overlay("nightly"), "RayJob")["nightly"]
        service_account(tmp_path / "account", running, certificate)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(running.port))
        yield running


@pytest.fixture
def jobs(server: ApiServer, tmp_path: Path) -> RayJobs:
    return RayJobs(ApiAddress.of_this_pod(os.environ, tmp_path / "account"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between requests that failed."""
    monkeypatch.setattr(module.time, "sleep", lambda _: None)


def when_created(server: ApiServer, *statuses: dict[str, str]) -> threading.Thread:
    """An operator: gives the RayJobs of the run these statuses, one after the other."""

    def work() -> None:
        for attempt, status in enumerate(statuses, 1):
            name = f"{RUN}-{attempt}"
            wait_for(lambda name=name: name in server.jobs)
            server.jobs[name]["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
            seen = server.asked.count(f"GET {name}")
            wait_for(lambda name=name, seen=seen: server.asked.count(f"GET {name}") > seen + 1)
            server.jobs[name]["status"] = status

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def run(jobs: RayJobs, **changes: Any) -> tuple[Ending, list[str]]:
    said: list[str] = []
    return launch(jobs, Launch("nightly", RUN, poll_s=0.01, **changes), said.append), said


def test_a_copy_of_the_template_runs_and_belongs_to_the_kubernetes_job(
    server: ApiServer, jobs: RayJobs
) -> None:
    when_created(server, DONE)
    ending, said = run(jobs, owner_uid="c0ffee")
    assert (ending.code, server.names()) == (0, [f"{RUN}-1"])
    made, template = server.jobs[f"{RUN}-1"], server.jobs["nightly"]
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": RUN, "uid": "c0ffee"}
    ]
    assert made["spec"] == {**template["spec"], "suspend": False, "backoffLimit": 0}
    assert template["spec"]["suspend"] is True
    assert said[0] == f"{RUN}-1: created from nightly"
    assert f"{RUN}-1: Running RUNNING" in said


@pytest.mark.parametrize("code", [2, 3])
def test_what_a_retry_does_not_help_is_told_and_not_tried_again(
    server: ApiServer, jobs: RayJobs, code: int
) -> None:
    when_created(server, failed(code))
    ending, _ = run(jobs)
    assert (ending.code, server.names()) == (code, [f"{RUN}-1"])


def test_other_failures_are_tried_again_on_a_cluster_of_their_own(server: ApiServer, jobs: RayJobs) -> None:
    lost_head = {"jobDeploymentStatus": "Failed", "jobStatus": "", "reason": "SubmissionFailed"}
    when_created(server, failed(1), lost_head, DONE)
    ending, _ = run(jobs)
    assert (ending.code, server.names()) == (0, [f"{RUN}-1", f"{RUN}-2", f"{RUN}-3"])


def test_attempts_come_to_an_end(server: ApiServer, jobs: RayJobs) -> None:
    when_created(server, failed(-9), failed(1))
    ending, _ = run(jobs, attempts=2)
    assert (ending.code, server.names()) == (1, [f"{RUN}-1", f"{RUN}-2"])


def test_a_second_pod_of_the_same_tick_waits_for_the_rayjob_of_the_first(
    server: ApiServer, jobs: RayJobs
) -> None:
    when_created(server, failed(3))
    assert run(jobs)[0].code == 3
    again, said = run(jobs)
    assert again.code == 3
    assert server.names() == [f"{RUN}-1"]
    assert said[0] == f"{RUN}-1: is there already; waiting for it"


def test_two_pods_at_once_make_one_rayjob(server: ApiServer, jobs: RayJobs) -> None:
    when_created(server, DONE)
    codes: list[int] = []
    pods = [threading.Thread(target=lambda: codes.append(run(jobs)[0].code)) for _ in range(4)]
    for pod in pods:
        pod.start()
    for pod in pods:
        pod.join(20)
    assert codes == [0, 0, 0, 0]
    assert [name for name in server.jobs if name.startswith(RUN)] == [f"{RUN}-1"]


def test_a_creation_whose_answer_is_lost_makes_one_rayjob(
    server: ApiServer, jobs: RayJobs, at_once: None
) -> None:
    server.lost_answers = 1
    when_created(server, DONE)
    assert run(jobs)[0].code == 0
    assert server.names() == [f"{RUN}-1", f"{RUN}-1"]  # the second was told that it is there


def test_an_api_server_that_fails_is_asked_again(server: ApiServer, jobs: RayJobs, at_once: None) -> None:
    server.failures = [500, 503, 429, 500, 500]
    when_created(server, DONE)
    ending, said = run(jobs)
    assert ending.code == 0
    assert said[0] == "trying on, for the Kubernetes API does not answer: 500: told to say 500"


def test_a_token_that_was_replaced_is_read_again(server: ApiServer, jobs: RayJobs, tmp_path: Path) -> None:
    assert jobs.get("nightly") is not None
    server.token = "the next one"
    (tmp_path / "account" / "token").write_text(server.token)
    assert jobs.get("nightly") is not None


@pytest.mark.parametrize("code", [401, 403])
def test_what_may_not_be_asked_is_said_at_once(server: ApiServer, jobs: RayJobs, code: int) -> None:
    server.failures = [code]
    with pytest.raises(NotAllowed, match="refuses GET") as refused:
        run(jobs)
    assert refused.value.found == f"{code}: told to say {code}"
    assert server.names() == []


def test_a_wait_outlives_an_api_server_that_forgets_for_a_while_who_asks(
    server: ApiServer, jobs: RayJobs, at_once: None
) -> None:
    said: list[str] = []

    def say(words: str) -> None:
        said.append(words)
        if words == f"{RUN}-1: created from nightly":
            server.failures = [401, 403, 503, 401]

    when_created(server, DONE)
    assert launch(jobs, Launch("nightly", RUN, poll_s=0.01), say).code == 0
    assert server.failures == []
    assert "trying on, for the Kubernetes API refuses: 401: told to say 401" in said


def test_a_wait_ends_where_it_stays_forbidden(
    server: ApiServer, jobs: RayJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = [0.0]
    now = time.monotonic
    monkeypatch.setattr(module.time, "monotonic", lambda: now() + slept[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: slept.append(slept.pop() + seconds))

    def forbid(words: str) -> None:
        if words == f"{RUN}-1: created from nightly":
            server.failures = [403] * 1000

    with pytest.raises(NotAllowed):
        launch(jobs, Launch("nightly", RUN), forbid)
    assert 600 <= slept[0] < 660  # the longest pause is 45 s


def test_a_server_with_another_certificate_is_not_told_the_token(
    server: ApiServer, jobs: RayJobs, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    with open_api_server(tmp_path / "other") as (_, certificate):
        pass
    service_account(tmp_path / "account", server, certificate)
    with pytest.raises(ClusterError, match="not the API server"):
        RayJobs(ApiAddress.of_this_pod(os.environ, tmp_path / "account")).get("nightly")
    assert server.asked == []


def test_what_is_no_template_is_not_copied(server: ApiServer, jobs: RayJobs) -> None:
    server.jobs["nightly"]["spec"]["suspend"] = False
    with pytest.raises(RecipeError, match="is no template"):
        run(jobs)
    with pytest.raises(RecipeError, match="no RayJob of that name"):
        launch(jobs, Launch("absent", RUN), print)
    assert server.names() == []


def test_a_name_that_is_taken_is_not_waited_for(server: ApiServer, jobs: RayJobs) -> None:
    server.jobs[f"{RUN}-1"] = {"metadata": {"name": f"{RUN}-1", "labels": {RUN_LABEL: "another"}}}
    with pytest.raises(ClusterError, match="somebody else's"):
        run(jobs)


def test_a_rayjob_that_somebody_deletes_ends_the_wait(server: ApiServer, jobs: RayJobs) -> None:
    def delete() -> None:
        while f"{RUN}-1" not in server.jobs:
            time.sleep(0.01)
        del server.jobs[f"{RUN}-1"]

    threading.Thread(target=delete, daemon=True).start()
    with pytest.raises(ClusterError, match="is gone"):
        run(jobs)


@pytest.mark.parametrize(
    ("status", "code", "can_help"),
    [
        (DONE, 0, False),
        (failed(1), 1, True),
        (failed(2), 2, False),
        (failed(3), 3, False),
        (failed(130), 1, True),
        (failed(13), 1, True),
        (failed(1, "DeadlineExceeded"), 1, False),
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}, 1, True),
        ({"jobDeploymentStatus": "Failed", "message": "exit code 3 was seen somewhere"}, 1, True),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1, False),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}, 2, False),
    ],
)
def test_how_a_rayjob_ended(status: dict[str, str], code: int, can_help: bool) -> None:
    ending = ending_of(status)
    assert (ending.code, ending.can_help) == (code, can_help)


def test_ray_still_tells_exit_codes_in_these_words() -> None:
    from ray.dashboard.modules.job import job_supervisor

    source = re.sub(r'"\s+f?"', "", inspect.getsource(job_supervisor))
    assert "Job entrypoint command failed with exit code {return_code}" in source


def test_names_are_short_enough_for_kuberay() -> None:
    assert copy_of({"apiVersion": "a", "kind": "b", "metadata": {}, "spec": {}}, Launch("t", RUN), "n")
    with pytest.raises(RecipeError, match="47"):
        Launch("nightly", "n" * 46)


def command(tmp_path: Path) -> list[str]:
    return ["launch", "nightly", "--service-account", str(tmp_path / "account"), "--poll-seconds", "0.01"]


def test_the_command_ends_with_the_exit_code_of_the_night(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENGINE_RUN", RUN)
    when_created(server, failed(3))
    assert main(command(tmp_path)) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{RUN}-1: exit code 3: Failed FAILED AppFailed" in printed.err
    assert server.token not in printed.err


def test_a_pod_that_is_told_to_end_leaves_the_night_running(
    server: ApiServer, tmp_path: Path, repository: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *command(tmp_path), "--run", RUN],
        cwd=repository,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: f"GET {RUN}-1" in server.asked and f"{RUN}-1" in server.jobs)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert f"{RUN}-1" in server.jobs


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_outside_of_a_pod_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main([*command(tmp_path), "--run", RUN]) == 1
    assert "no Kubernetes API here" in capsys.readouterr().err
    assert NAMESPACE == "image-features"
