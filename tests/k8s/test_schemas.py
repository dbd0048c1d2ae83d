"""Everything that is rendered is what Kubernetes and KubeRay 1.7 take; a field they do not know fails.

KubeRay's definitions are read from `../shared/kuberay` beside the repository. Where that folder is absent the fields
of RayJobs are checked against `kuberay_fields.txt` instead, and the test's name says which of the two it was.
"""

from __future__ import annotations

import gc
import importlib.util
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from engine.estimate import Estimate
from jobs.plan import paper_plan
from tests.k8s.rendering import (
    COMPONENTS,
    OVERLAYS,
    ROOT,
    Document,
    bytes_of,
    containers,
    of_kind,
    overlay,
    pod_templates,
    rendered,
)

KUBERNETES = "1.37"
SHARED = ROOT.parent / "shared"
FIELDS = Path(__file__).with_name("kuberay_fields.txt")


def has_definitions() -> bool:
    return (SHARED / "kuberay").is_dir() and (SHARED / "tools" / "validate_crd.py").is_file()


@pytest.fixture(scope="module")
def definitions() -> Any:
    """The strict validator, and the custom resource definitions."""
    specification = importlib.util.spec_from_file_location(
        "validate_crd", SHARED / "tools" / "validate_crd.py"
    )
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to be closed by themselves
        crds = module.load_crds(str(SHARED / "kuberay"))
        gc.collect()
    return module, crds


def fields_of(node: Any, path: str = "") -> set[str]:
    """Paths of all fields; entries of lists and of maps with free keys share one path."""
    if isinstance(node, list):
        return {field for item in node for field in fields_of(item, path)}
    if not isinstance(node, dict):
        return {path}
    if path.endswith(FREE_KEYS):
        return {path}
    return {field for key, value in node.items() for field in fields_of(value, f"{path}.{key}")}


FREE_KEYS = (".labels", ".annotations", ".rayStartParams", ".matchLabels", ".requests", ".limits")


def is_of_kubernetes(document: Document) -> bool:
    """Whether its kind is one of Kubernetes' own; those of Ray and of Prometheus are custom resources."""
    group = document["apiVersion"].rpartition("/")[0]
    is_own = group in ("", "batch") or group.endswith(".k8s.io")
    assert is_own or group in ("ray.io", "monitoring.coreos.com"), group
    return is_own


@pytest.mark.parametrize("name", OVERLAYS)
def test_objects_of_kubernetes_are_valid(name: str) -> None:
    own = [document for document in overlay(name) if is_of_kubernetes(document)]
    assert {document["kind"] for document in own} >= {"Namespace", "NetworkPolicy", "Role", "ServiceAccount"}
    for document in own:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pod_templates_of_rayjobs_are_valid_pods(name: str) -> None:
    found = 0
    for job in of_kind(overlay(name), "RayJob").values():
        for _, template in pod_templates(job):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            found += 1
    assert found >= 15


@pytest.mark.skipif(
    not has_definitions(), reason=f"{SHARED}/kuberay is not here: fields are checked by a list"
)
@pytest.mark.parametrize("name", OVERLAYS)
def test_rayjobs_are_valid_by_kuberays_definitions(definitions: Any, name: str) -> None:
    validator, crds = definitions
    jobs = of_kind(overlay(name), "RayJob")
    assert set(jobs) == {"extract", "fit", "finetune", "score", "nightly"}
    for job in jobs.values():
        assert validator.validate(job, crds) == []


@pytest.mark.skipif(not has_definitions(), reason=f"{SHARED}/kuberay is not here")
def test_the_definitions_reject_a_field_that_nobody_knows(definitions: Any) -> None:
    validator, crds = definitions
    job = of_kind(overlay("cpu"), "RayJob")["extract"]
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["priorityClasName"] = "engine-head"
    (message,) = validator.validate(job, crds)
    assert "priorityClasName" in message


@pytest.mark.parametrize("name", OVERLAYS)
def test_rayjobs_have_only_fields_of_the_list(name: str) -> None:
    """The list is kept for machines without the definitions; with them it must be right, too."""
    known = set(FIELDS.read_text(encoding="utf-8").split())
    used = {field for job in of_kind(overlay(name), "RayJob").values() for field in fields_of(job)}
    assert used - known == set()


@pytest.mark.skipif(not has_definitions(), reason=f"{SHARED}/kuberay is not here: the list is not compared")
def test_every_field_of_the_list_is_one_of_kuberays_definitions(definitions: Any) -> None:
    _, crds = definitions
    definition = crds["ray.io/v1", "RayJob"]
    fields = [
        field for field in FIELDS.read_text(encoding="utf-8").split() if not field.startswith(".metadata.")
    ]
    assert len(fields) > 100
    assert [field for field in fields if not is_defined(definition, field)] == []
    assert not is_defined(definition, ".spec.entrypiont")
    assert not is_defined(definition, ".spec.submitterPodTemplate.spec.containers.imag")


def is_defined(node: Any, path: str) -> bool:
    """Whether a definition has a field, whose path goes through lists and ends where keys are free."""
    for name in path.removeprefix(".").split("."):
        node = node.get("items", node)
        if name not in node.get("properties", {}):
            return False
        node = node["properties"][name]
    return True


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_can_be_put_into_an_overlay(name: str, tmp_path: Path) -> None:
    """A kustomization elsewhere, as a user writes one, with this component in place of another."""
    root = from_folder(tmp_path)
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: image-features\n"
        f"resources: [{root}/k8s/base]\ncomponents: [{root}/k8s/components/{name}]\n"
    )
    documents = rendered(tmp_path)
    for document in documents:
        if is_of_kubernetes(document):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    by_kind: dict[str, dict[str, Document]] = {
        kind: of_kind(documents, kind) for kind in ("ServiceAccount", "ConfigMap", "NetworkPolicy")
    }
    if name == "identity-irsa":
        roles = {
            account: "eks.amazonaws.com/role-arn" in document["metadata"].get("annotations", {})
            for account, document in by_kind["ServiceAccount"].items()
        }
        assert roles == {
            "engine-head": True,
            "engine-worker": True,
            "engine-nightly": False,
            "engine-submitter": False,
        }
    else:
        environment = by_kind["ConfigMap"]["engine-environment"]["data"]
        assert all(re.fullmatch(r"AWS_[A-Z0-9_]+", variable) for variable in environment)
        assert ("private-store" in by_kind["NetworkPolicy"]) == (name == "identity-keys")


def from_folder(folder: Path) -> str:
    """The repository as a path relative to a folder: kustomize takes no other."""
    return "/".join([".."] * (len(folder.resolve().parts) - 1)) + str(ROOT)


def test_the_overlay_in_the_readme_renders(tmp_path: Path) -> None:
    readme = (ROOT / "k8s/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^ {7}# kustomization\.yaml\n((?: {7}.*\n)+)", readme, re.MULTILINE)
    text = textwrap.dedent(block).replace("../../image-feature-engine", from_folder(tmp_path))
    digest = "0123456789abcdef" * 4
    text = text.replace("sha256:...", f"sha256:{digest}").replace("YOUR-REGISTRY", "registry.test")
    text = text.replace("YOUR-API-SERVER", "10.17.19.23").replace("YOUR-PROMETHEUS", "monitoring")
    (tmp_path / "kustomization.yaml").write_text(text)
    documents = rendered(tmp_path)
    images = {container["image"] for document in documents for _, container in containers(document)}
    assert images == {f"registry.test/image-feature-engine@sha256:{digest}"}
    role = of_kind(documents, "ServiceAccount")["engine-worker"]["metadata"]["annotations"]
    assert role == {"eks.amazonaws.com/role-arn": "arn:aws:iam::YOUR-ACCOUNT:role/image-feature-engine"}
    (rule,) = of_kind(documents, "NetworkPolicy")["api-server"]["spec"]["egress"]
    assert rule["to"] == [{"ipBlock": {"cidr": "10.17.19.23/32"}}]
    # What watches the jobs comes with them, where they are and where Prometheus looks for it.
    watched = {kind: of_kind(documents, kind) for kind in ("PodMonitor", "PrometheusRule")}
    for objects in watched.values():
        (one,) = objects.values()
        assert one["metadata"]["namespace"] == "image-features"
        assert one["metadata"]["labels"]["release"] == "monitoring"
    assert {"image-feature-engine-metrics", "default-deny"} <= set(of_kind(documents, "NetworkPolicy"))
    assert "image-feature-engine-dashboard" in of_kind(documents, "ConfigMap")
    (selector,) = {
        tuple(one["spec"]["selector"]["matchLabels"].items()) for one in watched["PodMonitor"].values()
    }
    assert selector == (("ray.io/is-ray-node", "yes"),)  # without the label of the release, which no pod has


def test_what_the_readme_says_of_sizes_is_what_pods_ask_for() -> None:
    readme = (ROOT / "k8s/README.md").read_text(encoding="utf-8")

    def asked(name: str, verb: str, *parts: str) -> tuple[float, float, float]:
        found = [
            container["resources"]["requests"]
            for where, container in containers(of_kind(overlay(name), "RayJob")[verb])
            if where.split(":")[0].split()[-1] in parts
        ]
        cores = sum(
            float(one["cpu"].removesuffix("m")) / (1000 if one["cpu"].endswith("m") else 1) for one in found
        )
        memory, disk = (
            sum(bytes_of(one[kind]) for one in found) / 2**30 for kind in ("memory", "ephemeral-storage")
        )
        return cores, round(memory, 1), disk

    assert asked("cpu", "extract", "head", "submitter") == (3, 10, 22)
    assert "| 3 cores, 10 GiB of memory, 22 GiB of disk |" in readme
    sizes = {asked("cpu", verb, "cpu") for verb in ("extract", "fit", "finetune", "score", "nightly")}
    assert tuple(map(max, zip(*sizes, strict=True))) == (7, 23.2, 45)
    assert "| 7 cores, 24 GiB, 45 GiB of disk |" in readme
    sizes = {asked("gpu", verb, "gpu") for verb in ("extract", "fit", "finetune", "nightly")}
    assert tuple(map(max, zip(*sizes, strict=True))) == (15, 49.8, 45)
    assert "| 15 cores, 50 GiB, 45 GiB of disk, 1 GPU or none |" in readme
    assert asked("dev", "nightly", "cpu", "head", "submitter") == (5, 17.4, 31)
    assert "5 cores, 17.4 GiB of\nmemory and 31 GiB of disk" in readme


def test_what_the_readme_says_of_hours_and_cost_is_what_the_plan_says() -> None:
    readme = (ROOT / "k8s/README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\d,]+) M \| `([a-z-]+)`: .* \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M
    )
    assert [row[:2] for row in rows] == [
        ("1", "cpu-overlay"),
        ("1", "gpu-overlay"),
        ("100", "cpu-overlay"),
        ("100", "gpu-overlay"),
        ("1,000", "gpu-overlay"),
    ]
    for millions, cluster, *said in rows:
        estimate = Estimate(paper_plan(float(millions.replace(",", "")) * 1e6, cluster, []))
        money = estimate.machine_money or 0
        wanted = [f"{estimate.images_per_second:,.0f}", f"{estimate.seconds / 3600:.2f}", f"{money:.2f}"]
        assert said == wanted, (millions, cluster)
