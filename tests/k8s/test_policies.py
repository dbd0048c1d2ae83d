"""What a security review asks of the manifests: every pod `restricted`, nothing without limits, no keys."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement

from engine.config import load_recipe
from engine.kubernetes.manifest import RECIPE_FOLDER
from jobs.cli import RECIPE_CLASSES, app
from tests.k8s.rendering import (
    OVERLAYS,
    ROOT,
    Document,
    bytes_of,
    containers,
    of_kind,
    overlay,
    pod_templates,
)

# https://kubernetes.io/docs/concepts/security/pod-security-standards/ (restricted, v1.33): kinds of volumes
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations_of_restricted(template: Document) -> list[str]:
    """By which `restricted` would refuse a pod."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    for volume in spec.get("volumes", []):
        found += [f"volume {volume['name']}"] if not set(volume) - {"name"} <= VOLUMES else []
    found += ["sysctls"] if pod.get("sysctls") else []
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        found += violations_of_container(container, pod)
    return found


def violations_of_container(container: Document, pod: Document) -> list[str]:
    own, name = container.get("securityContext", {}), container["name"]
    capabilities = own.get("capabilities", {})
    checks = {
        "privileged": own.get("privileged"),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
        "runAsNonRoot": not own.get("runAsNonRoot", pod.get("runAsNonRoot")),
        "runAsUser": own.get("runAsUser", pod.get("runAsUser")) == 0,
        "capabilities": capabilities.get("drop") != ["ALL"] or capabilities.get("add"),
        "seccompProfile": own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
        not in ("RuntimeDefault", "Localhost"),
        "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is not True,  # ours, beyond the standard
    }
    return [f"{name}: {check}" for check, is_violated in checks.items() if is_violated]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_is_restricted(name: str) -> None:
    checked = 0
    for document in overlay(name):
        for where, template in pod_templates(document):
            assert violations_of_restricted(template) == [], where
            checked += 1
        if document["kind"] == "RayJob":  # KubeRay adds its container to the head's pod
            cluster = document["spec"]["rayClusterSpec"]
            pod = cluster["headGroupSpec"]["template"]["spec"]["securityContext"]
            autoscaler = {"name": "autoscaler", **cluster["autoscalerOptions"]}
            assert violations_of_container(autoscaler, pod) == []
    assert checked == (16 if name == "nightly" else 19 if name == "gpu" else 15)
    assert of_kind(overlay(name), "Namespace")["image-features"]["metadata"]["labels"] == {
        f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(hostNetwork=True),
        lambda spec: spec["securityContext"].pop("seccompProfile"),
        lambda spec: spec["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
        lambda spec: spec["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ],
)
def test_the_checker_sees_what_is_not_restricted(change: Any) -> None:
    template = of_kind(overlay("cpu"), "RayJob")["extract"]["spec"]["submitterPodTemplate"]
    change(template["spec"])
    assert len(violations_of_restricted(template)) == 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_container_has_limits_and_no_memory_beyond_its_request(name: str) -> None:
    for document in overlay(name):
        for where, container in containers(document):
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits.keys() >= {"cpu", "memory", "ephemeral-storage"}, where
            assert requests["memory"] == limits["memory"], where
            assert requests["ephemeral-storage"] == limits["ephemeral-storage"], where
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), where


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_have_a_version_and_ray_has_that_of_the_lock_file(name: str) -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    (ray,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    documents = overlay(name)
    images = {container["image"] for document in documents for _, container in containers(document)}
    (image,) = images
    assert image.endswith(f":{version}-{'gpu' if name == 'gpu' else 'cpu'}")
    for job in of_kind(documents, "RayJob").values():
        assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_command_is_one_of_the_engines_with_a_recipe_that_is_mounted(name: str) -> None:
    verbs = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    documents = overlay(name)
    maps = of_kind(documents, "ConfigMap")
    for job in of_kind(documents, "RayJob").values():
        engine, verb, recipe, as_json, *options = shlex.split(job["spec"]["entrypoint"])
        assert (engine, verb, as_json) == ("engine", job["metadata"]["name"], "--json")
        assert job["spec"]["entrypoint"] == " ".join([engine, verb, recipe, as_json, *options])
        folder, _, file = recipe.rpartition("/")
        assert folder == RECIPE_FOLDER
        for where, template in list(pod_templates(job))[1:]:
            (container,) = template["spec"]["containers"]
            (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == RECIPE_FOLDER]
            (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == mount["name"]]
            assert file in maps[volume["configMap"]["name"]]["data"], where
        overrides = options[1::2]
        assert options[::2] == ["--set"] * len(overrides)
        module = __import__(f"jobs.{verb}", fromlist=["x"])
        load_recipe(getattr(module, RECIPE_CLASSES[verb]), ROOT / "jobs" / "recipes" / file, overrides)
    for cron in of_kind(documents, "CronJob").values():
        (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        engine, verb, template_name = container["command"]
        assert engine == "engine" and verb in verbs
        assert template_name in of_kind(documents, "RayJob")


def test_nothing_runs_by_being_applied() -> None:
    for name in OVERLAYS:
        for job in of_kind(overlay(name), "RayJob").values():
            assert job["spec"]["suspend"] is True


@pytest.mark.parametrize("name", OVERLAYS)
def test_there_are_no_secrets_in_what_is_applied(name: str) -> None:
    documents = overlay(name)
    assert of_kind(documents, "Secret") == {}
    text = json.dumps(documents)
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|aws_secret|password|secret_?access_?key", text, re.I)
    for document in documents:
        for where, container in containers(document):
            for variable in container.get("env", []):
                named = re.search(r"key|token|secret|password|credential", variable["name"], re.I)
                assert not named or "valueFrom" in variable, f"{where}: {variable['name']}"
            for source in container.get("envFrom", []):
                if "secretRef" in source:
                    assert source["secretRef"] == {"name": "engine-s3", "optional": True}
                    assert where.split()[-2] in ("head:", "cpu:", "gpu:"), where


@pytest.mark.parametrize("name", OVERLAYS)
def test_only_those_who_ask_the_api_server_hold_a_token_for_it(name: str) -> None:
    documents = overlay(name)
    accounts = of_kind(documents, "ServiceAccount")
    for account in accounts.values():
        assert account["automountServiceAccountToken"] is False
    for document in documents:
        for where, template in pod_templates(document):
            spec = template["spec"]
            assert spec["serviceAccountName"] in accounts, where
            wants = spec["serviceAccountName"] in ("engine-head", "engine-nightly")
            assert spec["automountServiceAccountToken"] is wants, where
    rules = {role: document["rules"] for role, document in of_kind(documents, "Role").items()}
    assert rules["engine-nightly"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    assert not any("*" in rule[part] for role in rules.values() for rule in role for part in rule)
    assert not any("secrets" in rule["resources"] for role in rules.values() for rule in role)
    assert of_kind(documents, "ClusterRole") == {}


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_denied_that_is_not_named(name: str) -> None:
    policies = of_kind(overlay(name), "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies.values():
        for rule in policy["spec"].get("ingress", []):
            assert rule.get("from"), policy["metadata"]["name"]  # an empty list is everybody
            assert not any("ipBlock" in peer for peer in rule["from"])  # the world
    dashboard = [
        rule
        for policy in policies.values()
        for rule in policy["spec"].get("ingress", [])
        if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])
    ]
    (rule,) = dashboard
    assert [sorted(peer) for peer in rule["from"]] == [["podSelector"], ["namespaceSelector", "podSelector"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_asks_for_a_token_and_is_not_exposed(name: str) -> None:
    for job in of_kind(overlay(name), "RayJob").values():
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert cluster["headGroupSpec"]["enableIngress"] is False
    assert of_kind(overlay(name), "Ingress") == {} and of_kind(overlay(name), "Service") == {}


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_have_room_for_what_ray_is_told_of(name: str) -> None:
    for job in of_kind(overlay(name), "RayJob").values():
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            told, spec = group["rayStartParams"], group["template"]["spec"]
            (container,) = spec["containers"]
            limits = container["resources"]["limits"]
            store, memory = int(told["object-store-memory"]), int(told["memory"])
            volumes = {volume["name"]: volume.get("emptyDir") for volume in spec["volumes"]}
            assert told["object-spilling-directory"] == "/spill" and volumes["spill"]
            shm = volumes["dshm"]
            assert shm["medium"] == "Memory" and bytes_of(shm["sizeLimit"]) > store
            assert bytes_of(shm["sizeLimit"]) + memory < bytes_of(limits["memory"])
            disk = [
                bytes_of(volume["sizeLimit"]) for name, volume in volumes.items() if volume and name != "dshm"
            ]
            assert sum(disk) <= bytes_of(limits["ephemeral-storage"])
            if group is not cluster["headGroupSpec"]:
                assert told["num-cpus"] == limits["cpu"]
                assert told.get("num-gpus") == limits.get("nvidia.com/gpu")
                least = 0 if "num-gpus" in told else 1  # the driver needs some cores to begin with
                assert least <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


def test_everything_that_is_written_is_a_volume() -> None:
    """With a read-only root: what the processes write by default, and what the environment makes of it."""
    job = of_kind(overlay("gpu"), "RayJob")["extract"]
    for where, template in list(pod_templates(job))[1:]:
        (container,) = template["spec"]["containers"]
        paths = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert paths == {"/dev/shm", "/tmp", "/cache", "/spill"}, where
        environment = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        for name in ("HOME", "ENGINE_CACHE_DIR", "KERAS_HOME", "MPLCONFIGDIR"):
            assert environment[name].startswith(("/tmp", "/cache")), name


def test_a_night_outlives_its_rayjobs_and_two_never_run_together() -> None:
    documents = overlay("nightly")
    cron, job = (
        of_kind(documents, "CronJob")["nightly"]["spec"],
        of_kind(documents, "RayJob")["nightly"]["spec"],
    )
    assert cron["concurrencyPolicy"] == "Forbid"
    once = cron["jobTemplate"]["spec"]
    attempts = 3  # default of `engine launch --attempts`
    assert attempts * job["activeDeadlineSeconds"] <= once["activeDeadlineSeconds"] < 86_400
    disrupted, final = once["podFailurePolicy"][
        "rules"
    ]  # the first that fits counts: eviction sends SIGTERM, too
    assert disrupted["action"] == "Ignore"
    assert final == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "launch", "operator": "In", "values": [1, 2, 3]},
    }
    recipe = (ROOT / "jobs/recipes/nightly_bucket.yaml").read_text(encoding="utf-8")
    (budget,) = re.findall(r"max_seconds: (\d+)", recipe)
    assert int(budget) + 1800 <= job["activeDeadlineSeconds"]  # it stops by itself, before it is ended


def test_the_bucket_policy_allows_what_the_engine_asks_for_and_no_more() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "engine/storage").glob("*.py"))
    calls = set(re.findall(r"client\.([a-z][a-z0-9_]+)\(", code))
    needs = {  # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations.html: permissions of each call
        "list_objects_v2": {"s3:ListBucket"},
        "get_object": {"s3:GetObject"},
        "head_object": {"s3:GetObject"},
        "put_object": {"s3:PutObject"},
        "delete_object": {"s3:DeleteObject"},
        "copy_object": {"s3:GetObject", "s3:PutObject"},
        "create_multipart_upload": {"s3:PutObject"},
        "upload_part_copy": {"s3:GetObject", "s3:PutObject"},
        "complete_multipart_upload": {"s3:PutObject"},
        "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    }
    assert calls == set(needs)
    policy = json.loads((ROOT / "k8s/policies/bucket_policy.json").read_text(encoding="utf-8"))
    allowed: dict[str, set[str]] = {}
    for statement in policy["Statement"]:
        if statement["Effect"] == "Allow":
            actions, resources = statement["Action"], statement["Resource"]
            for resource in [resources] if isinstance(resources, str) else resources:
                for action in [actions] if isinstance(actions, str) else actions:
                    allowed.setdefault(resource, set()).add(action)
    wanted = set().union(*needs.values())
    assert allowed == {
        "arn:aws:s3:::image-archive": {"s3:ListBucket"},
        "arn:aws:s3:::image-archive/*": {"s3:GetObject"},
        "arn:aws:s3:::image-features": {"s3:ListBucket"},
        "arn:aws:s3:::image-features/*": wanted - {"s3:ListBucket"},
    }
    buckets = {re.split(r"[:/]", resource)[5] for resource in allowed}
    for recipe in (ROOT / "jobs/recipes").glob("*_bucket.yaml"):
        assert set(re.findall(r"s3://([a-z-]+)/", recipe.read_text(encoding="utf-8"))) <= buckets
    trust = (ROOT / "k8s/policies/trust_policy.json").read_text(encoding="utf-8")
    assert set(re.findall(r"image-features:(engine-\w+)", trust)) == {"engine-head", "engine-worker"}


def test_the_gpu_lock_has_the_pins_of_the_lock_file_and_those_of_cuda() -> None:
    base, gpu = pins_of("requirements.lock"), pins_of("k8s/gpu.lock")
    assert {name: pin for name, pin in gpu.items() if name in base and not pin <= base[name]} == {}
    beyond = gpu.keys() - base.keys()
    assert beyond and all(name.startswith("nvidia-") for name in beyond), beyond
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["demo"]]:
        wanted = Requirement(line)
        (version,) = gpu[wanted.name.lower()]
        assert wanted.specifier.contains(version), line


def pins_of(lock: str) -> dict[str, set[str]]:
    """Versions of each package: the lock file has several of some, for different versions of Python."""
    pins: dict[str, set[str]] = {}
    for name, version in re.findall(
        r"^([a-z0-9._-]+)==([^ ;\\]+)", (ROOT / lock).read_text("utf-8"), re.MULTILINE
    ):
        pins.setdefault(name, set()).add(version)
    return pins
