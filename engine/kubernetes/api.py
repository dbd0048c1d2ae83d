"""The Kubernetes API as a pod of the cluster reaches it: to read RayJobs, and to create some. Nothing is ever deleted.

With the standard library alone, so that it works in the image as it is. The service account decides what is allowed.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ClusterError, NotAllowed

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 30.0
RAY_JOBS = "apis/ray.io/v1/namespaces/{namespace}/rayjobs"


@dataclass(frozen=True)
class ApiAddress:
    """Where the API server is, and who we are.

    Attributes:
        url: such as https://10.0.0.1:443.
        namespace: of the objects.
        token: file that holds the service account's token; it is replaced before it expires.
        authority: file with the certificates that the server's is checked against.
    """

    url: str
    namespace: str
    token: Path
    authority: Path

    @staticmethod
    def of_this_pod(environment: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> ApiAddress:
        """As Kubernetes tells every pod.

        Raises:
            ClusterError: this is no pod, or one without a service account's token.
        """
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
        if not host or not port or not (folder / "token").exists():
            raise ClusterError(
                "no Kubernetes API here",
                found=f"KUBERNETES_SERVICE_HOST {host or 'unset'}, token {folder / 'token'}"
                + ("" if (folder / "token").exists() else " absent"),
                way_out="run this in a pod whose service account's token is mounted (automountServiceAccountToken)",
            )
        host = f"[{host}]" if ":" in host else host
        namespace = (folder / "namespace").read_text(encoding="utf-8").strip()
        return ApiAddress(f"https://{host}:{port}", namespace, folder / "token", folder / "ca.crt")


class TryAgain(Exception):
    """The API server did not answer, or has too much to do: nothing is known of what was asked."""


class RayJobs:
    """RayJobs of one namespace.

    Args:
        address: of the API server.
    """

    def __init__(self, address: ApiAddress) -> None:
        self._address = address
        self._trust = ssl.create_default_context(cafile=str(address.authority))

    def get(self, name: str) -> dict[str, Any] | None:
        """One of them; None: there is none of that name.

        Raises:
            TryAgain: the server did not answer.
            NotAllowed: it does not know us, or does not allow it.
            ClusterError: it says no for another reason.
        """
        return self._answered("GET", name, None, unless=404)

    def create(self, job: dict[str, Any]) -> bool:
        """Create one; False: there is one of that name already.

        Raises:
            TryAgain: the server did not answer; it may yet have been created.
            NotAllowed: it does not know us, or does not allow it.
            ClusterError: it says no for another reason.
        """
        return self._answered("POST", "", job, unless=409) is not None

    def _answered(
        self, method: str, name: str, body: dict[str, Any] | None, *, unless: int
    ) -> dict[str, Any] | None:
        """The object that comes back; None where the answer's status is `unless`."""
        path = RAY_JOBS.format(namespace=self._address.namespace) + (f"/{name}" if name else "")
        token = self._address.token.read_text(encoding="utf-8").strip()  # again each time: it is rotated
        request = urllib.request.Request(
            f"{self._address.url}/{path}" + ("?fieldValidation=Strict" if body else ""),
            data=json.dumps(body).encode() if body else None,
            method=method,
            headers={
                "Authorization": f"Bearer {token}",
                "Content-Type": "application/json",
                "Accept": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self._trust) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            with error:
                if error.code == unless:
                    return None
                said = _said(error)
            if error.code == 429 or error.code >= 500:
                raise TryAgain(f"{error.code}: {said}") from None
            raise (NotAllowed if error.code in {401, 403} else ClusterError)(
                f"the Kubernetes API refuses {method} {path}",
                found=f"{error.code}: {said}",
                way_out="check the Role of this pod's service account, and that KubeRay's definitions are installed",
            ) from None
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
                raise ClusterError(
                    f"{self._address.url}: not the API server that {self._address.authority} vouches for",
                    found=str(error),
                ) from None
            raise TryAgain(str(error)) from None


def _said(error: urllib.error.HTTPError) -> str:
    """The message of a Kubernetes Status object, or the first of whatever came instead."""
    text = error.read(65_536).decode(errors="replace")
    try:
        return str(json.loads(text)["message"])[:2000]
    except (ValueError, KeyError, TypeError):
        return text[:500]
