"""What a security review asks of the manifests: every pod `restricted`, nothing without limits, no keys."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement

from engine.config import load_recipe
from engine.kubernetes.manifest import RECIPE_FOLDER
from engine.lease import WATCH_LIFETIMES
from jobs.cli import RECIPE_CLASSES, app
from jobs.nightly import NightlyRecipe
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
            wants = spec["serviceAccountName"] == "engine-nightly"
            assert spec["automountServiceAccountToken"] is wants, where
            if where.endswith(" head"):
                continue
            assert api_tokens(spec) == set(), where
    rules = {role: document["rules"] for role, document in of_kind(documents, "Role").items()}
    assert rules["engine-nightly"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    assert not any("*" in rule[part] for role in rules.values() for rule in role for part in rule)
    assert not any("secrets" in rule["resources"] for role in rules.values() for rule in role)
    changing = {
        (resource, verb)
        for rule in rules["engine-submitter"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if verb not in {"get", "list", "watch"}
    }
    assert changing == {("rayjobs", "create"), ("rayjobs", "delete"), ("configmaps", "create")}
    assert of_kind(documents, "ClusterRole") == {}


def api_tokens(spec: Document) -> set[str]:
    """Volumes of a pod with a token that the API server takes: one for no audience, which is then its own."""
    return {
        volume["name"]
        for volume in spec["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        if "serviceAccountToken" in source and "audience" not in source["serviceAccountToken"]
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_of_the_heads_containers_only_the_autoscaler_can_ask_the_api_server(name: str) -> None:
    from ray.autoscaler._private.kuberay import node_provider

    for job in of_kind(overlay(name), "RayJob").values():
        cluster = job["spec"]["rayClusterSpec"]
        spec = cluster["headGroupSpec"]["template"]["spec"]
        (token,) = api_tokens(spec)
        (driver,) = spec["containers"]
        assert token not in {mount["name"] for mount in driver["volumeMounts"]}
        mounts = {mount["name"]: mount for mount in cluster["autoscalerOptions"]["volumeMounts"]}
        assert mounts.keys() <= {volume["name"] for volume in spec["volumes"]}
        assert mounts[token]["readOnly"] is True
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == token]
        of_token, of_authority = volume["projected"]["sources"]
        paths = {of_token["serviceAccountToken"]["path"], of_authority["configMap"]["items"][0]["path"]}
        assert {f"{mounts[token]['mountPath']}/{path}" for path in paths} == {
            node_provider.IN_CLUSTER_TOKEN_PATH,
            node_provider.IN_CLUSTER_CA_CERT_PATH,
        }


WORLD_4 = "0.0.0.0/0 without 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 169.254.0.0/16"
WORLD_6 = "::/0 without fc00::/7 fe80::/10"
DNS, HTTPS, API = "UDP 53, TCP 53", "TCP 443", "TCP 443, TCP 6443"
INGRESS = {
    ("head worker", "head worker", "every port"),
    ("submitter", "head", "TCP 8265"),
    ("kuberay-system: kuberay-operator", "head", "TCP 8265"),
}
EGRESS = {
    ("all", "kube-system: kube-dns", DNS),
    ("all", "169.254.20.10/32", DNS),
    ("all", "169.254.169.254/32", DNS),
    ("head worker", "head worker", "every port"),
    ("submitter", "head", "TCP 8265"),
    ("head worker", WORLD_4, HTTPS),
    ("head worker", WORLD_6, HTTPS),
}
PATCHED_BY_THE_USER = {("head nightly", "192.0.2.1/32", API)}
OF_ONE_MACHINE = {
    ("head worker", "minio", "TCP 9000"),
    *(("head nightly", block, API) for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")),
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_is_denied_that_is_not_named(name: str) -> None:
    policies = list(of_kind(overlay(name), "NetworkPolicy").values())
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in [one["spec"] for one in policies]
    assert flows(policies, "ingress", "from") == INGRESS
    assert flows(policies, "egress", "to") == EGRESS | (
        OF_ONE_MACHINE if name == "dev" else PATCHED_BY_THE_USER
    )


def flows(policies: list[Document], direction: str, peers: str) -> set[tuple[str, str, str]]:
    """Who may talk to whom, at which ports, in words; a rule without peers or ports is one for all of them."""
    found = set()
    for policy in policies:
        for rule in policy["spec"].get(direction, []):
            assert set(rule) <= {peers, "ports"}
            ports = ", ".join(f"{port['protocol']} {port['port']}" for port in rule.get("ports", []))
            for peer in rule.get(peers) or [{}]:
                ends = (pods(policy["spec"]["podSelector"]), end(peer))
                source, target = ends if direction == "egress" else reversed(ends)
                found.add((source, target, ports or "every port"))
    return found


def end(peer: Document) -> str:
    """One end of a flow."""
    if "ipBlock" in peer:
        left_out = peer["ipBlock"].get("except")
        return peer["ipBlock"]["cidr"] + (f" without {' '.join(left_out)}" if left_out else "")
    if "namespaceSelector" not in peer:
        return pods(peer["podSelector"]) if peer else "everywhere"
    (namespace,) = peer["namespaceSelector"]["matchLabels"].values()
    return f"{namespace}: {pods(peer['podSelector'])}" if "podSelector" in peer else str(namespace)


def pods(selector: Document) -> str:
    """Whom a selector of pods selects, ours by their component."""
    if not selector:
        return "all"
    labels = dict(selector["matchLabels"])
    if labels.pop("app.kubernetes.io/part-of", None) is None:
        (name,) = labels.values()
        return str(name)
    (one,) = labels.values() if labels else (None,)
    if one is not None:
        return str(one)
    (expression,) = selector["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("app.kubernetes.io/component", "In")
    return " ".join(expression["values"])


@pytest.mark.parametrize(
    ("change", "more"),
    [
        (lambda spec: spec.update(egress=[{}]), ("submitter", "everywhere", "every port")),
        (lambda spec: spec["egress"][0].pop("ports"), ("submitter", "head", "every port")),
        (lambda spec: spec["egress"][0].pop("to"), ("submitter", "everywhere", "TCP 8265")),
    ],
)
def test_the_table_of_flows_shows_a_policy_that_lets_out_more(
    change: Any, more: tuple[str, str, str]
) -> None:
    policies = of_kind(overlay("cpu"), "NetworkPolicy")
    change(policies["submitter"]["spec"])
    assert more in flows(list(policies.values()), "egress", "to")


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


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_whose_loss_is_dear_are_left_alone_and_not_on_spot_nodes(name: str) -> None:
    """The submitter lives as long as the job: when its pods are used up, the job has failed."""
    for job in of_kind(overlay(name), "RayJob").values():
        templates = dict(pod_templates(job))
        for part in ("submitter", "head"):
            template = templates[f"RayJob {job['metadata']['name']} {part}"]
            assert template["metadata"]["annotations"] == {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            }
            affinity = template["spec"]["affinity"]["nodeAffinity"]
            (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
            refused = {(one["key"], one["operator"], *one["values"]) for one in term["matchExpressions"]}
            assert ("karpenter.sh/capacity-type", "NotIn", "spot") in refused
            assert len(refused) == 4
        assert job["spec"]["submitterConfig"]["backoffLimit"] == 6


@pytest.mark.parametrize("name", OVERLAYS)
def test_workers_are_spread_among_those_of_their_own_job(name: str) -> None:
    for job in of_kind(overlay(name), "RayJob").values():
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
            assert spread["matchLabelKeys"] == ["ray.io/cluster"]


def test_no_priority_is_so_low_that_no_node_is_added_for_it() -> None:
    priorities = {
        name: document["value"] for name, document in of_kind(overlay("cpu"), "PriorityClass").items()
    }
    # The default of Cluster Autoscaler's --expendable-pods-priority-cutoff.
    assert -10 <= priorities["engine-worker"] < priorities["engine-head"] < 0


# Cores and GiB that GKE leaves of machines with 4 GiB a core
# (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes).
LEFT_OF_MACHINES = {"cpu": (7.91, 28.3), "gpu": (15.89, 58.4)}
DAEMONS = (0.5, 1.0)  # of the cluster's own pods on every node


@pytest.mark.parametrize("name", LEFT_OF_MACHINES)
def test_workers_find_room_on_machines_of_the_size_that_the_readme_names(name: str) -> None:
    left_cpus, left_gib = LEFT_OF_MACHINES[name]
    for job in of_kind(overlay(name), "RayJob").values():
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            small = name == "gpu" and int(limits["cpu"]) == 7  # of a verb without GPUs
            cpus, gib = LEFT_OF_MACHINES["cpu"] if small else (left_cpus, left_gib)
            assert int(limits["cpu"]) == int(cpus)
            assert int(limits["cpu"]) + DAEMONS[0] <= cpus + 0.1
            assert bytes_of(limits["memory"]) / (1 << 30) + DAEMONS[1] <= gib


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
    recipe = load_recipe(NightlyRecipe, ROOT / "jobs/recipes/nightly_bucket.yaml")
    # The deadline counts from the RayJob's creation, the budget from the driver's start; and a part that is begun, the
    # judging and the publishing come after it.
    start, finish = job["preRunningDeadlineSeconds"], 1800
    assert (recipe.budget.max_seconds or math.inf) + start + finish <= job["activeDeadlineSeconds"]
    # A driver that is lost with its head leaves a lease behind, and the next one starts within minutes.
    assert recipe.lease.wait_seconds > WATCH_LIFETIMES * recipe.lease.lifetime_seconds


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
