"""Proxies in front of the test store: one breaks a share of the requests, one all of them from some moment on."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
def open_proxy(repository: Path, s3_store: S3TestStore, stall_s: float = 30) -> Iterator[FaultyProxy]:
    """Start the proxy that lies beside this repository; skips the test where there is none.

    Args:
        stall_s: how long a `stall` leaves a request without an answer before it cuts the connection.
    """
    script = repository.parent / "shared/tools/faulty_proxy.py"
    if not script.exists():
        pytest.skip(f"no fault proxy: {script} is not here")
    upstream = urlsplit(s3_store.endpoint_url)
    if upstream.scheme != "http":
        pytest.skip("the fault proxy speaks http only")
    command = [sys.executable, str(script), "--upstream", f"{upstream.hostname}:{upstream.port or 80}"]
    command += ["--stall-s", str(stall_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield FaultyProxy(process.stdout.readline().split()[3])
    finally:
        process.kill()
        process.communicate()


class BreakingProxy:
    """Hands so many requests on to the store, and then answers each with the same error until it is mended."""

    def __init__(self, s3_store: S3TestStore, after: int, status: int, code: str) -> None:
        self._upstream = urlsplit(s3_store.endpoint_url).netloc
        self._left, self._status, self._code, self._lock = after, status, code, threading.Lock()
        self.requests = self.refused = 0
        self.seen: list[tuple[str, str]] = []  # method and path of each, its query included
        self.endpoint_url = ""

    def mend(self) -> None:
        """From now on everything is handed on."""
        with self._lock:
            self._left = sys.maxsize

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Read one request to its end, and send the store's answer or the error."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self._lock:
            self.requests += 1
            self.seen.append((request.command, request.path))
            self._left -= 1
            is_refused = self._left < 0
            self.refused += is_refused
        if is_refused:
            self._send(request, self._status, [], self._refusal())
            return
        upstream = http.client.HTTPConnection(self._upstream, timeout=60)
        upstream.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():  # Host among them: it is signed
            upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        self._send(request, answer.status, answer.getheaders(), answer.read())
        upstream.close()

    def _refusal(self) -> bytes:
        return f"<Error><Code>{self._code}</Code><Message>so it is</Message></Error>".encode()

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        request.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and request.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        request.send_header("Content-Length", length)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@contextmanager
def open_breaking_proxy(s3_store: S3TestStore, after: int, status: int, code: str) -> Iterator[BreakingProxy]:
    """Start it in threads of this process; skips the test where the store speaks https."""
    if urlsplit(s3_store.endpoint_url).scheme != "http":
        pytest.skip("the breaking proxy speaks http only")
    proxy = BreakingProxy(s3_store, after, status, code)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            proxy.answer(self)

        do_PUT = do_HEAD = do_DELETE = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
