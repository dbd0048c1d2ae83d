"""Start a copy of a RayJob that is kept as a template, wait for its end, and tell its exit code.

What a CronJob's pod does. KubeRay retries failures of any kind; here the exit code decides: what a retry does not help
(2: a wrong recipe, 3: a gate or budget said no) is not tried again. Names follow from the run's, so that a pod that is
started again finds the RayJob of the one before it and waits on.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.errors import (
    EXIT_BAD_RECIPE,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_JUDGED,
    ClusterError,
    NotAllowed,
    RecipeError,
)
from engine.kubernetes.api import RayJobs, TryAgain
from engine.kubernetes.manifest import MAX_NAME_LENGTH

RUN_LABEL = "image-feature-engine/run"
TEMPLATE_LABEL = "image-feature-engine/template"
ENDED = ("Complete", "Failed", "ValidationFailed")
# ray/dashboard/modules/job/job_supervisor.py of Ray 2.60; KubeRay hands it on as status.message, and nothing else that
# has the code.
_EXIT_CODE = re.compile(r"Job entrypoint command failed with exit code (-?\d+)")
COMPLAIN_EVERY_S = 60.0
# An API server that has just started, or whose roles are being applied anew, refuses what it allowed before.
FORGIVEN_S = 600.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Launch:
    """What is to be started.

    Attributes:
        template: name of the suspended RayJob that is copied.
        run: name of this run, one for each tick of a schedule; the RayJobs are run-1, run-2 ...
        attempts: RayJobs at most, one after the other.
        owner_uid: of the Kubernetes Job named `run`, with which the RayJobs are to go; None: they stay.
        poll_s: seconds between two looks.
    """

    template: str
    run: str
    attempts: int = 3
    owner_uid: str | None = None
    poll_s: float = 10.0

    def __post_init__(self) -> None:
        if len(self.name_of(self.attempts)) > MAX_NAME_LENGTH:
            raise RecipeError(
                f"--run {self.run}: too long a name",
                wanted=f"RayJobs of at most {MAX_NAME_LENGTH} letters, such as {self.name_of(self.attempts)}",
            )

    def name_of(self, attempt: int) -> str:
        """Of the RayJob; never that of the Kubernetes Job `run`: KubeRay names its submitter's Job after the RayJob."""
        return f"{self.run}-{attempt}"


@dataclass(frozen=True)
class Ending:
    """How a RayJob ended.

    Attributes:
        code: exit code of the engine's.
        can_help: whether another try may end otherwise.
        words: what the cluster says of it.
    """

    code: int
    can_help: bool
    words: str


def launch(jobs: RayJobs, wanted: Launch, say: Callable[[str], None]) -> Ending:
    """Run it to its end, as often as `wanted` allows and as a further try may help.

    Raises:
        RecipeError: no such template.
        ClusterError: the API server says no, a name is taken, or somebody deleted the RayJob.
    """
    ending = Ending(EXIT_FAILED, False, "nothing was started")
    for attempt in range(1, wanted.attempts + 1):
        name = wanted.name_of(attempt)
        if _patiently(lambda name=name: jobs.get(name), say) is None:  # type: ignore[misc]
            _start(jobs, wanted, name, say)
        else:
            say(f"{name}: is there already; waiting for it")
        ending = _ended(jobs, wanted, name, say)
        say(f"{name}: exit code {ending.code}: {ending.words}")
        if not ending.can_help:
            break
    return ending


def _start(jobs: RayJobs, wanted: Launch, name: str, say: Callable[[str], None]) -> None:
    template = _patiently(lambda: jobs.get(wanted.template), say)
    if template is None:
        raise RecipeError(
            f"{wanted.template}: no RayJob of that name here",
            way_out="apply the overlay that has it, or `engine manifest ... --suspend | kubectl apply -f -`",
        )
    if not template["spec"].get("suspend"):
        raise RecipeError(
            f"RayJob {wanted.template}: runs by itself, and is no template",
            wanted="spec.suspend: true",
            way_out="`engine manifest ... --suspend`",
        )
    # False: a request before this one came through after all, or another pod of this run is at it.
    if _patiently(lambda: jobs.create(copy_of(template, wanted, name)), say):
        say(f"{name}: created from {wanted.template}")


def copy_of(template: Mapping[str, Any], wanted: Launch, name: str) -> dict[str, Any]:
    """A RayJob like the template, but one that runs; without KubeRay's retries."""
    metadata = template["metadata"]
    labels = {**metadata.get("labels", {}), RUN_LABEL: wanted.run, TEMPLATE_LABEL: wanted.template}
    copied: dict[str, Any] = {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {"name": name, "labels": labels},
        "spec": {**template["spec"], "suspend": False, "backoffLimit": 0},
    }
    if wanted.owner_uid is not None:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": wanted.run, "uid": wanted.owner_uid}
        copied["metadata"]["ownerReferences"] = [owner]
    return copied


def _ended(jobs: RayJobs, wanted: Launch, name: str, say: Callable[[str], None]) -> Ending:
    """Wait for its end, which is hours away: by now we were allowed to ask."""
    shown = ""
    while True:
        job = _patiently(lambda: jobs.get(name), say, forgiven_s=FORGIVEN_S)
        if job is None:
            raise ClusterError(
                f"RayJob {name} is gone", found="somebody deleted it", way_out="the next night goes on"
            )
        if job["metadata"].get("labels", {}).get(RUN_LABEL) != wanted.run:
            raise ClusterError(
                f"RayJob {name} is somebody else's",
                found=f"without the label {RUN_LABEL}: {wanted.run}",
                way_out="delete it, or start this one under another --run",
            )
        status = job.get("status") or {}
        if status.get("jobDeploymentStatus") in ENDED:
            return ending_of(status)
        now = f"{status.get('jobDeploymentStatus') or 'New'} {status.get('jobStatus') or ''}".strip()
        if now != shown:
            say(f"{name}: {now}")
            shown = now
        time.sleep(wanted.poll_s * random.uniform(0.8, 1.2))


def ending_of(status: Mapping[str, Any]) -> Ending:
    """What the status of a RayJob that has ended comes to."""
    deployment, job = status.get("jobDeploymentStatus"), status.get("jobStatus")
    reason, message = status.get("reason") or "", status.get("message") or ""
    words = " ".join(filter(None, (deployment, job, reason)))
    words += f"\n{message}" if message and job != "SUCCEEDED" else ""
    if deployment == "Complete" and job == "SUCCEEDED":
        return Ending(EXIT_DONE, False, words)
    if job == "STOPPED":  # by somebody
        return Ending(EXIT_FAILED, False, words)
    if deployment == "ValidationFailed":
        return Ending(EXIT_BAD_RECIPE, False, words)
    told = _EXIT_CODE.match(message)
    if told and int(told[1]) in (EXIT_BAD_RECIPE, EXIT_JUDGED):
        return Ending(int(told[1]), False, words)
    return Ending(EXIT_FAILED, reason != "DeadlineExceeded", words)


def _patiently(ask: Callable[[], Answer], say: Callable[[str], None], *, forgiven_s: float = 0.0) -> Answer:
    """Ask until there is an answer: giving up would let the next run start beside this one. The Kubernetes Job's own
    deadline ends it.

    Args:
        forgiven_s: for how long we may be told that we are not allowed to ask.
    """
    began, pause_s, complained = time.monotonic(), 1.0, -math.inf
    while True:
        try:
            return ask()
        except (TryAgain, NotAllowed) as error:
            if isinstance(error, NotAllowed) and time.monotonic() - began >= forgiven_s:
                raise
            if time.monotonic() - complained >= COMPLAIN_EVERY_S:
                what = (
                    f"refuses: {error.found}"
                    if isinstance(error, NotAllowed)
                    else f"does not answer: {error}"
                )
                say(f"trying on, for the Kubernetes API {what}")
                complained = time.monotonic()
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(30.0, 2 * pause_s)
