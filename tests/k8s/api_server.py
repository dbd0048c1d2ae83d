"""An HTTPS server that keeps RayJobs as the API server of Kubernetes does, for those who only get and create some.

Not for: schemas, watches or anything else of it. It asks for a token, names what is there already with 409, and can be
told to fail.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAMESPACE = "image-features"
RAY_JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"


@dataclass
class ApiServer:
    """What it holds, and how it is to behave; may be changed while it runs.

    Attributes:
        port: on loopback.
        token: that requests must bear.
        jobs: RayJobs by name.
        asked: method and path of each request that was answered.
        failures: statuses with which the next requests are answered instead.
        lost_answers: creations that are done, and then answered with a broken connection.
    """

    port: int = 0
    token: str = "token-of-the-service-account"
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    lost_answers: int = 0

    def names(self) -> list[str]:
        """Of the RayJobs that were created over the wire."""
        return [path.removeprefix("POST ") for path in self.asked if path.startswith("POST ")]


def service_account(folder: Path, server: ApiServer, certificate: bytes) -> Path:
    """What Kubernetes mounts into a pod."""
    folder.mkdir(exist_ok=True)
    (folder / "token").write_text(server.token)
    (folder / "namespace").write_text(NAMESPACE)
    (folder / "ca.crt").write_bytes(certificate)
    return folder


@contextlib.contextmanager
def open_api_server(folder: Path) -> Iterator[tuple[ApiServer, bytes]]:
    """A running server, and its certificate."""
    server, certificate = ApiServer(), _write_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.socket = context.wrap_socket(http.socket, server_side=True)
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server, certificate
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def _handler(server: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._is_refused():
                return
            name = self.path.removeprefix(f"{RAY_JOBS}/")
            server.asked.append(f"GET {name}")
            job = server.jobs.get(name)
            self._answer(200, job) if job else self._answer(404, _status(404, f'rayjobs "{name}" not found'))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._is_refused():
                return
            assert self.path == f"{RAY_JOBS}?fieldValidation=Strict"
            name = body["metadata"]["name"]
            server.asked.append(f"POST {name}")
            if name in server.jobs:
                self._answer(409, _status(409, f'rayjobs "{name}" already exists'))
                return
            server.jobs[name] = body
            if server.lost_answers:
                server.lost_answers -= 1
                self.close_connection = True
                self.connection.close()
                return
            self._answer(201, body)

        def _is_refused(self) -> bool:
            if server.failures:
                code = server.failures.pop(0)
                self._answer(code, _status(code, f"told to say {code}"))
            elif self.headers["Authorization"] != f"Bearer {server.token}":
                self._answer(401, _status(401, "Unauthorized"))
            else:
                return False
            return True

        def _answer(self, code: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return Handler


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}


def _write_certificate(folder: Path) -> bytes:
    """A key and a certificate for 127.0.0.1 that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "api server of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    text = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "server.crt").write_bytes(text)
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    return text
