"""The Jobs API of a Ray cluster: send a job, follow its log, learn how it ended, stop it.

Not for: what is sent (`jobs/submit.py`), or anything within the job (`engine/on_ray.py`). Nothing of this process'
environment is sent. A connection that breaks loses nothing: the job goes on, and so does its log once it can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import aiohttp
from ray import __version__ as ray_here
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from engine.errors import ClusterError

T = TypeVar("T")

# Of the cluster; pyproject.toml says why.
OLDEST_RAY = (2, 60)
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 10.0, 60.0
# After so long without a line the log is asked for anew: what lies between may have dropped the connection without a
# word (AWS' load balancers do after 60 s), and jobs of ours are quiet for hours.
SILENCE_S = 20.0
RETRY_S = 3.0
PATIENCE_S = 600.0  # without any answer; a head that is restarted answers within minutes
AGENT_PATIENCE_S = 60.0  # a head answers some seconds before its agent takes jobs
STOP_PATIENCE_S = 30.0  # Ray gives a job 3 s to end by itself (RAY_JOB_STOP_WAIT_TIME_S)


@dataclass(frozen=True)
class JobState:
    """What the cluster says of a job.

    Attributes:
        submission_id: its name.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's words on that.
        exit_code: of its command, as a shell would say it (137: killed by signal 9); None: it has not ended by itself.
    """

    submission_id: str
    status: str
    message: str
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return JobStatus(self.status).is_terminal()


for _module in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_module).setLevel(logging.WARNING)  # "Uploading package", "WebSocket closed": not news


class RayJobs:
    """The job server of one cluster.

    Args:
        address: http:// or https:// of the head's dashboard. Keys for it (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or
            RAY_AUTH_TOKEN_PATH) are read by Ray.

    Raises:
        ClusterError: nobody answers there, it is not a Ray that the engine can use, or it does not take our token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets it win over the address that it is given
        self._client: _Client = self._connected(lambda: _Client(address))
        self.ray_version: str = self._connected(self._client.ray_version)
        numbers = _VERSION.match(self.ray_version)
        if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_RAY:
            raise ClusterError(
                f"the cluster at {address} runs a Ray that the engine cannot use",
                found=f"Ray {self.ray_version} there, {ray_here} here",
                wanted=f"Ray {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or newer",
                way_out="give the cluster the engine's image, which has the Ray of requirements.lock",
            )

    def submit(self, submission_id: str, command: str, folder: Path, metadata: Mapping[str, str]) -> bool:
        """Send a folder and a command that is run in it, on the head.

        Returns:
            False: there is a job of this name, and nothing was sent.

        Raises:
            ClusterError: the cluster does not take it.
        """
        deadline = time.monotonic() + AGENT_PATIENCE_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(folder)},
                    metadata=dict(metadata),
                )
                return True
            except RuntimeError as error:
                if f"{submission_id} already exists" in str(error):
                    return False
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise self._refused(error) from None
            except (OSError, ValueError, AuthenticationError) as error:
                if self._was_taken(submission_id):  # and only the answer was lost
                    return True
                raise self._refused(error) from None
            time.sleep(RETRY_S)

    def states(self, prefix: str) -> list[JobState]:
        """Of all jobs whose names begin so, those that are over included."""
        jobs = self._connected(self._client.list_jobs)
        return [_state_of(job) for job in jobs if (job.submission_id or "").startswith(prefix)]

    def state(self, submission_id: str) -> JobState:
        """Of one job.

        Raises:
            ClusterError: the cluster does not know it.
        """
        return self._connected(lambda: self._state(submission_id))

    def follow(
        self, submission_id: str, on_text: Callable[[str], None], on_note: Callable[[str], None]
    ) -> JobState:
        """Hand on the job's log as it grows, until the job is over; may take days.

        Args:
            on_text: is given each piece of the log once, whatever happens to the connection.
            on_note: is given what there is to say of the connection, and of a job that waits.

        Raises:
            ClusterError: the cluster does not know the job (any more), or has not answered for PATIENCE_S.
        """
        log, waits_for = _Log(on_text), ""
        while True:
            has_ended = asyncio.run(self._listen(submission_id, log))
            state = self._patiently(submission_id, lambda: self._state(submission_id), on_note)
            if state.is_over:
                whole = self._patiently(
                    submission_id, lambda: self._client.get_job_logs(submission_id), on_note
                )
                log.restart()
                log.add(whole)
                return state
            if state.status == JobStatus.PENDING and state.message != waits_for:
                waits_for = state.message
                on_note(f"job {submission_id} is pending: {waits_for}")
            if has_ended:
                time.sleep(RETRY_S)

    def stop(self, submission_id: str) -> JobState:
        """End a job: its command gets SIGTERM, and SIGKILL some seconds later; returns what it came to.

        Raises:
            ClusterError: the cluster does not answer, or the job is not over after STOP_PATIENCE_S.
        """
        self._connected(lambda: self._client.stop_job(submission_id))
        deadline = time.monotonic() + STOP_PATIENCE_S
        while not (state := self.state(submission_id)).is_over:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {submission_id} was told to stop, and has not",
                    found=f"it is {state.status} after {STOP_PATIENCE_S:.0f} s",
                    way_out=f"ray job stop {submission_id} --address {self.address}",
                )
            time.sleep(0.5)
        return state

    async def _listen(self, submission_id: str, log: _Log) -> bool:
        """Hand on the log until nothing has come for SILENCE_S; True: it has ended or the connection broke."""
        log.restart()
        try:
            await hand_on(self._client.tail_job_logs(submission_id), log.add)
        except TimeoutError:
            return False
        except (StopAsyncIteration, OSError, RuntimeError, aiohttp.ClientError):
            return True

    def _state(self, submission_id: str) -> JobState:
        return _state_of(self._client.get_job_info(submission_id))

    def _was_taken(self, submission_id: str) -> bool:
        try:
            return bool(self._asked(lambda: self._state(submission_id)))
        except (_NoAnswer, ClusterError):
            return False

    def _patiently(self, submission_id: str, request: Callable[[], T], on_note: Callable[[str], None]) -> T:
        """A request that is tried again for PATIENCE_S, while a job is followed."""
        lost_at: float | None = None
        while True:
            try:
                answer = self._asked(request)
            except _NoAnswer as error:
                if lost_at is None:
                    lost_at = time.monotonic()
                    on_note(f"lost the connection to {self.address}; the job goes on, trying again: {error}")
                if time.monotonic() - lost_at > PATIENCE_S:
                    raise ClusterError(
                        f"the cluster at {self.address} has not answered for {PATIENCE_S:.0f} s",
                        found=str(error),
                        way_out=f"job {submission_id} may well go on; the same command follows it as soon as the "
                        "cluster answers",
                    ) from None
                time.sleep(RETRY_S)
            else:
                if lost_at is not None:
                    on_note("connected again")
                return answer

    def _connected(self, request: Callable[[], T]) -> T:
        """A request that is not tried again."""
        try:
            return self._asked(request)
        except _NoAnswer as error:
            raise ClusterError(
                f"no Ray job server answers at {self.address}",
                found=str(error),
                way_out="check --address (or RAY_API_SERVER_ADDRESS, RAY_ADDRESS): it is the http address of the "
                "head's dashboard, port 8265; from outside a Kubernetes cluster: kubectl port-forward "
                "service/<name of the RayCluster>-head-svc 8265",
            ) from None

    def _asked(self, request: Callable[[], T]) -> T:
        """A request, with its errors told apart: those that may pass (_NoAnswer) and those that will not."""
        try:
            return request()
        except AuthenticationError as error:
            raise self._refused(error) from None
        except OSError as error:  # requests' own are such, too
            raise _NoAnswer(_one_line(error)) from None
        except RuntimeError as error:
            code = _HTTP_STATUS.search(str(error))
            if code and code[1].startswith("5"):  # the head's own, or those of an ingress before it
                raise _NoAnswer(_one_line(error)) from None
            raise self._refused(error) from None
        except (KeyError, ValueError, AttributeError) as error:  # an answer, but not one of Ray's
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> ClusterError:
        if isinstance(error, AuthenticationError):
            return ClusterError(
                f"the cluster at {self.address} does not take our token",
                found=_one_line(error),
                way_out="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN to the cluster's "
                "token; KubeRay keeps it in a secret that is named after the RayCluster",
            )
        return ClusterError(
            f"the job server at {self.address} refuses",
            found=_one_line(error),
            way_out="see that a Ray head answers there (`ray job list --address ...`), and that it knows the job: a "
            "cluster that was made anew has forgotten it. What the job has committed stays, and a new one goes on from "
            "there",
        )


_VERSION = re.compile(r"(\d+)\.(\d+)")
_HTTP_STATUS = re.compile(r"failed with status code (\d+)")


class _NoAnswer(Exception):
    """Nobody answered, or somebody who cannot say more now."""


class _Client(JobSubmissionClient):
    """Ray's own client waits for ever: none of its requests has a time limit (Ray 2.60, dashboard_sdk.py)."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S), **options)

    def ray_version(self) -> str:
        """Of the cluster."""
        return str(self._do_request("GET", "/api/version").json()["ray_version"])


async def hand_on(pieces: Any, on_text: Callable[[str], None]) -> NoReturn:
    """Pass on what an asynchronous generator yields.

    Raises:
        TimeoutError: nothing has come for SILENCE_S.
        StopAsyncIteration: it has ended.
        CancelledError: this was cancelled, even if the generator makes nothing or another error of it.
    """
    try:
        async with contextlib.aclosing(pieces):
            while True:
                # Not `wait_for`: with a piece that comes just then that of Python 3.11 swallows Ctrl-C (cpython#86296).
                async with asyncio.timeout(SILENCE_S):
                    text = await anext(pieces)
                on_text(text)
                _end_if_told_to()
    finally:
        _end_if_told_to()


def _end_if_told_to() -> None:
    """End this task if it was cancelled, as Ctrl-C does, and what it awaited made nothing or another error of it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class _Log:
    """Hands on a text that is read from its start again and again, and grows meanwhile: each piece of it once."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._seen = self._at = 0  # characters handed on, and read this time

    def restart(self) -> None:
        self._at = 0

    def add(self, text: str) -> None:
        begin, self._at = self._at, self._at + len(text)
        if self._at > self._seen:
            self._on_text(text[max(0, self._seen - begin) :])
            self._seen = self._at


def _state_of(job: JobDetails) -> JobState:
    code = job.driver_exit_code
    return JobState(
        submission_id=job.submission_id or "",
        status=str(job.status),
        message=job.message or "",
        exit_code=code if code is None or code >= 0 else 128 - code,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[-1000:] or type(error).__name__
