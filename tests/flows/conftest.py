"""Flows run the `engine` command: as a process of its own, or in this process on one shared local Ray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stores import S3TestStore


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed: the one line on stdout."""
        (line,) = self.stdout.splitlines()
        answer: dict[str, Any] = json.loads(line)
        return answer


Engine = Callable[..., Ended]


@pytest.fixture
def engine_process(repository: Path) -> Engine:
    """Run `engine ...` as a user would, in a new process, or a file such as jobs/fit.py as a Ray job's entrypoint."""

    def run(*arguments: object, environment: dict[str, str] | None = None, script: str = "") -> Ended:
        ended = subprocess.run(
            [sys.executable, *([script] if script else ["-m", "jobs.cli"]), *map(str, arguments)],
            cwd=repository,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def shared_ray(s3_store: S3TestStore) -> Iterator[None]:
    """One local Ray for many flows; its workers know the keys of the test store, later tests do not."""
    from engine.on_ray import ray_session

    with contextlib.ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_store.environment().items():
                patch.setenv(name, value)
            opened.enter_context(ray_session(None, local_cpus=4))
        yield


@pytest.fixture
def engine(shared_ray: None, s3_environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Engine:
    """Run `engine ...` in this process, on the shared Ray."""
    from jobs.cli import main

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return run
