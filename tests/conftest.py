"""What every test gets: a clean environment; where it asks, a real S3 store and the `engine` command."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.commands import Ended, Engine
from tests.proxy import FaultyProxy, open_proxy
from tests.stores import S3TestStore, open_test_store

if TYPE_CHECKING:
    from engine.storage import StorageConfig

_CACHES = tempfile.mkdtemp(prefix="engine-test-caches-")
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)


def _set_environment() -> None:
    """For this process and all that it starts, before anything heavy is imported."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # the developer's own keys must not reach a test
    os.environ |= {
        "AWS_CONFIG_FILE": os.path.join(_CACHES, "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": os.path.join(_CACHES, "no-aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_AUTH_MODE": "disabled",  # Ray 2.60 asks for a token as soon as ~/.ray/auth_token exists
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray's sockets on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": os.environ.get("ENGINE_TEST_GPUS", ""),  # most tests are about processors
        "KERAS_HOME": os.path.join(_CACHES, "keras"),
        "XDG_CACHE_HOME": os.path.join(_CACHES, "xdg"),
        "MPLCONFIGDIR": os.path.join(_CACHES, "matplotlib"),
    }


_set_environment()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Flows and faults first: they take two thirds of the time, so that two processes end at about the same moment."""
    items.sort(key=lambda item: not {"flows", "faults"} & set(item.path.parts))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds engine/, jobs/ and tests/."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def s3_store() -> Iterator[S3TestStore]:
    """A running S3 store with a fresh bucket; no keys in the environment yet (see `s3_environment`)."""
    with open_test_store() as store:
        yield store


@pytest.fixture
def s3_environment(s3_store: S3TestStore, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Sets the keys of `s3_store` for this test and for what it starts; returns the variables it set."""
    environment = s3_store.environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.fixture
def s3_uri(s3_store: S3TestStore, s3_environment: dict[str, str]) -> str:
    """An empty place in the bucket for this test alone, with the keys to write there set."""
    return f"s3://{s3_store.bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def s3_config(s3_store: S3TestStore) -> StorageConfig:
    """The `storage` section of a recipe that reaches `s3_store`."""
    from engine.storage import StorageConfig

    return StorageConfig(endpoint_url=s3_store.endpoint_url, region=s3_store.region)


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


@pytest.fixture
def proxy(repository: Path, s3_store: S3TestStore) -> Iterator[FaultyProxy]:
    """A proxy in front of `s3_store` that injects faults."""
    with open_proxy(repository, s3_store) as opened:
        yield opened
