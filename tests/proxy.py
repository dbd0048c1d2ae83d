"""A proxy in front of the test store that breaks a share of the requests, and counts what it broke."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.stores import S3TestStore


class FaultyProxy:
    """A proxy in front of the store that cuts, resets, refuses and loses on purpose."""

    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url

    def set_faults(self, match: str = ".", max_per_key: int = 3, **probabilities: float) -> None:
        wish = {"p": probabilities, "seed": 7, "match": match, "max_per_key": max_per_key}
        request = urllib.request.Request(
            f"{self.endpoint_url}/-/faults", json.dumps(wish).encode(), method="PUT"
        )
        urllib.request.urlopen(request, timeout=10).close()

    def faults(self) -> dict[str, int]:
        """How often each fault was injected."""
        return dict(self._report()["faults"])

    def requests(self) -> int:
        """Requests that came, broken ones too."""
        return int(self._report()["requests"])

    def _report(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.endpoint_url}/-/faults", timeout=10) as answer:
            report: dict[str, Any] = json.load(answer)
            return report


@contextmanager
def open_proxy(repository: Path, s3_store: S3TestStore) -> Iterator[FaultyProxy]:
    """Start the proxy that lies beside this repository; skips the test where there is none."""
    script = repository.parent / "shared/tools/faulty_proxy.py"
    if not script.exists():
        pytest.skip(f"no fault proxy: {script} is not here")
    upstream = urlsplit(s3_store.endpoint_url)
    if upstream.scheme != "http":
        pytest.skip("the fault proxy speaks http only")
    command = [sys.executable, str(script), "--upstream", f"{upstream.hostname}:{upstream.port or 80}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield FaultyProxy(process.stdout.readline().split()[3])
    finally:
        process.kill()
        process.communicate()
