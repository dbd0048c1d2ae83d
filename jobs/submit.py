"""Sends a recipe to a Ray cluster as a job, follows its log and ends as it ends.

    engine submit RECIPE --verb extract --address http://head:8265

What is sent: the recipe with its overrides, the launcher `jobs/submitted.py`, and what is asked for by name; nothing of
the environment, so that no key leaves this machine: the cluster has its own. Not for: how a cluster is talked to
(`engine/ray_jobs.py`), or what the verb does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jobs
from engine import __file__ as engine_file
from engine.config import Config, check_recipe, read_document, to_yaml
from engine.errors import EXIT_DONE, EXIT_FAILED, ClusterError, Interrupted, RecipeError
from jobs.outcome import say

if TYPE_CHECKING:
    from engine.ray_jobs import JobState, RayJobs

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # of a local Ray, and of `kubectl port-forward`; Ray's own default
LAUNCHER = "submitted.py"
RECIPE_NAME = "recipe.yaml"
CODE = ("engine", "jobs")


@dataclass(frozen=True)
class Submission:
    """What is to be sent, checked.

    Attributes:
        verb: of the job.
        document: its recipe, with all overrides.
        arguments: further ones of the verb.
        with_code: send this installation's engine along.
        include: files and folders to send along.
        notes: what the sender should know.
    """

    verb: str
    document: Mapping[str, Any]
    arguments: tuple[str, ...]
    with_code: bool
    include: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """What the cluster's shell runs in the folder that was sent."""
        return shlex.join(["python", LAUNCHER, self.verb, RECIPE_NAME, "--json", *self.arguments])

    def write(self, folder: Path) -> str:
        """Put all that is sent into an empty folder; returns a digest of it and the command, 12 hex digits."""
        (folder / RECIPE_NAME).write_text(to_yaml(dict(self.document)), encoding="utf-8")
        here = Path(jobs.__file__).parent
        shutil.copyfile(here / LAUNCHER, folder / LAUNCHER)
        code = (Path(engine_file).parent, here) if self.with_code else ()
        for source in (*code, *self.include):
            target = folder / source.name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)
        return _digest(folder, self.command)


def prepare(
    verb: str,
    model: type[Config],
    path: Path,
    overrides: Sequence[str],
    arguments: Sequence[str],
    with_code: bool = False,
    include: Sequence[Path] = (),
) -> Submission:
    """Check a recipe here, where its author is, and that it means the same on another machine.

    Raises:
        RecipeError: the recipe is wrong, names a place that only this machine has, or something to send is not there.
    """
    taken = {RECIPE_NAME, LAUNCHER, *CODE}
    for one in include:
        if not one.exists() or one.resolve().name in taken:
            raise RecipeError(
                f"--include {one}: cannot be sent",
                found="no such file or folder" if not one.exists() else "another thing of this name is sent",
                wanted=f"a file or folder that is not called {', '.join(sorted(taken))}",
            )
        taken.add(one.resolve().name)
    document = read_document(path, overrides)
    recipe = check_recipe(model, document, origin=str(path))
    notes = []
    for field, place in _places_here(document, recipe.model_dump(mode="json")):
        if os.path.isabs(place) or place.lower().startswith("file:"):
            notes.append(f"{field}: {place} is looked for on the cluster's nodes, not here")
        elif os.path.normpath(place) not in {one.name for one in include}:
            raise RecipeError(
                f"{path}: {field} is a place on this machine, and the job runs on others",
                found=place,
                wanted="s3://bucket/prefix, or the full path of a folder that all nodes share",
                way_out="put it into object storage; a file that is small can be sent along: --include PATH, and its "
                "bare name in the recipe",
            )
    return Submission(
        verb, document, tuple(arguments), with_code, tuple(one.resolve() for one in include), tuple(notes)
    )


def connect(address: str | None) -> RayJobs:
    """The job server at an address; without one, at that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, as Ray has it.

    Raises:
        RecipeError: the address is not one of a job server.
        ClusterError: there is none.
    """
    address, said_by = next(
        (found, name)
        for name, found in (
            ("--address", address),
            ("RAY_API_SERVER_ADDRESS", os.environ.get("RAY_API_SERVER_ADDRESS")),
            ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS")),
            ("default", DEFAULT_ADDRESS),
        )
        if found
    )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.password:
        raise RecipeError(
            f"{said_by}: not the address of a Ray job server",
            found="an address with a password in it" if parts.password else repr(address),
            wanted="http://host:8265 or https://host, of the head's dashboard",
            way_out="give --address; a token belongs into RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
        )
    # Ray reads a token only in this mode, and the mode only once.
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from engine.ray_jobs import RayJobs

    return RayJobs(address.rstrip("/"))


def start(cluster: RayJobs, submission: Submission) -> str:
    """Send it, unless the very same is at work there already; returns the name of the job."""
    for note in submission.notes:
        say(f"note: {note}")
    with tempfile.TemporaryDirectory(prefix="engine-submit-") as temporary:
        folder = Path(temporary)
        name = f"engine-{submission.verb}-{submission.write(folder)}"
        earlier = cluster.states(f"{name}-")
        running = next((job for job in earlier if not job.is_over), None)
        if running is not None:
            say(f"the same is {running.status.lower()} there already: following job {running.submission_id}")
            return running.submission_id
        name = f"{name}-{1 + max((_attempt(job) for job in earlier), default=0)}"
        is_new = cluster.submit(name, submission.command, folder, {"verb": submission.verb})
        say(f"{'submitted' if is_new else 'somebody was faster with the same: following'} job {name}")
        return name


def follow(cluster: RayJobs, name: str, stop_on_interrupt: bool = False) -> Ended:
    """Print the job's log to stderr until it is over.

    Args:
        stop_on_interrupt: end the job at Ctrl-C and SIGTERM, too, instead of letting it go on.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM here, or the job was stopped there.
        ClusterError: the cluster lost it.
    """
    lines = JobLog()
    try:
        state = cluster.follow(name, lines.add, lambda note: say(f"note: {note}"))
    except KeyboardInterrupt:
        if stop_on_interrupt:
            cluster.stop(name)
            raise _stopped(name) from None
        raise Interrupted(
            f"job {name} goes on; it is only no longer followed",
            way_out=f"the same command follows it again; ray job stop {name} --address {cluster.address} ends it",
        ) from None
    lines.end()
    return Ended(name, state, lines.summary)


@dataclass(frozen=True)
class Ended:
    """How a job ended: its state, and the summary that it printed, if it came to that."""

    name: str
    state: JobState
    summary: dict[str, Any] | None

    def exit_code(self) -> int:
        """The job's own: 0 done, 1 failed, 2 wrong recipe, 3 done but judged, and what a shell would say of others.

        Raises:
            Interrupted: it was stopped.
            ClusterError: the cluster has ended it, or never began it.
        """
        if self.state.status == "SUCCEEDED":
            return EXIT_DONE
        if self.state.status == "STOPPED":
            raise _stopped(self.name)
        if self.state.exit_code is None:
            raise ClusterError(
                f"job {self.name} did not end by itself",
                found=" ".join(self.state.message.split())[-2000:],
                way_out="nothing committed is lost: the same command goes on where it was; `ray job logs` says more",
            )
        return self.state.exit_code or EXIT_FAILED

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"submission_id": self.name, "status": self.state.status, "summary": self.summary}


class JobLog:
    """A log that comes in pieces, printed to stderr by whole lines; the summary that --json prints is kept instead."""

    def __init__(self) -> None:
        self._rest = ""
        self.summary: dict[str, Any] | None = None

    def add(self, text: str) -> None:
        """The next piece, of any length."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print(line)

    def end(self) -> None:
        """Print a last line that nothing ended."""
        if self._rest:
            self._print(self._rest)

    def _print(self, line: str) -> None:
        if line.startswith('{"verb": '):  # lines of a log in JSON begin otherwise
            with contextlib.suppress(ValueError):
                self.summary = json.loads(line)
                return
        say(line)


def _stopped(name: str) -> Interrupted:
    return Interrupted(
        f"job {name} was stopped",
        way_out="nothing is lost; the same command makes only what is missing",
    )


def _attempt(job: JobState) -> int:
    number = job.submission_id.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _places_here(written: Any, checked: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Fields whose text became a path on this machine when the recipe was checked, with what is written there."""
    if isinstance(written, Mapping) and isinstance(checked, Mapping):
        for name in written:
            yield from _places_here(written[name], checked.get(name), f"{field}.{name}".lstrip("."))
    elif isinstance(written, list) and isinstance(checked, list):
        for number, (one, other) in enumerate(zip(written, checked, strict=False)):
            yield from _places_here(one, other, f"{field}.{number}")
    elif isinstance(written, str) and isinstance(checked, str) and checked.startswith(("/", "file:")):
        yield field, written


def _digest(folder: Path, command: str) -> str:
    """12 hex digits over the names and bytes of all files, and the command."""
    digest = hashlib.sha256(command.encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for part in (str(path.relative_to(folder)).encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:12]
