"""From the template `rayjob.yaml` to the RayJob of one recipe, and the ConfigMap that holds the recipe.

Not for: how many pods and how large (`engine.kubernetes.pods`).
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.resources
import re
from dataclasses import dataclass
from typing import Any

from engine.config import parse_yaml, stable_hash
from engine.errors import RecipeError
from engine.kubernetes.pods import GIB, MIB, SHM_SPARE_BYTES, PodGroup, PodPlan

Manifest = dict[str, Any]

RECIPE_FOLDER = "/etc/engine/recipes"
MAX_NAME_LENGTH = 47  # KubeRay's MaxRayJobNameLength: names of the cluster's services are made of it
MAX_RECIPE_BYTES = 1 << 20  # of a ConfigMap
# What the shell of KubeRay's submitter leaves as it is.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")  # of a ConfigMap
_TAGGED = re.compile(r"(?P<name>[^@]+?)(:(?P<tag>[\w][\w.-]{0,127}))?(@sha256:(?P<digest>[0-9a-f]{64}))?")


@dataclass(frozen=True)
class JobWish:
    """What is said of one job, beside its pods.

    Attributes:
        verb: of the engine.
        name: of the RayJob.
        image: with a tag or a digest.
        recipe_map: name of the ConfigMap that holds the recipe.
        recipe_file: its file there.
        options: further arguments of the verb.
        deadline_s: after which the job is ended, however far it is.
        retries: further tries after a failure, each on a cluster of its own.
        suspend: make a template that does not run by itself.
    """

    verb: str
    name: str
    image: str
    recipe_map: str
    recipe_file: str
    options: tuple[str, ...] = ()
    deadline_s: int = 12 * 3600
    retries: int = 1
    suspend: bool = False

    def __post_init__(self) -> None:
        _require_name(self.name)
        _require_version(self.image)
        _require_key(self.recipe_file)

    @property
    def entrypoint(self) -> str:
        """The command that the head runs."""
        words = ["engine", self.verb, f"{RECIPE_FOLDER}/{self.recipe_file}", "--json", *self.options]
        for word in words:
            if not _PLAIN.fullmatch(word):
                raise RecipeError(
                    f"{word!r} cannot stand in a RayJob's command",
                    wanted="letters, digits and _./:@%+=,-: a shell reads the rest in its own way",
                    way_out="write it into the recipe",
                )
        return " ".join(words)


def _require_name(name: str) -> None:
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise RecipeError(
            f"--name {name}: no name for a RayJob",
            wanted=f"at most {MAX_NAME_LENGTH} of a-z, 0-9 and -, a letter first",
        )


def _require_key(file: str) -> None:
    """The name of a file that can be a key of a ConfigMap."""
    if not _KEY.fullmatch(file):
        raise RecipeError(
            f"{file}: no name for a file of a ConfigMap",
            wanted="letters, digits, -, _ and .",
            way_out="give the recipe's file another name",
        )


def _require_version(image: str) -> None:
    """An image that means the same tomorrow."""
    found = _TAGGED.fullmatch(image)
    if not found or not (found["digest"] or found["tag"]) or found["tag"] == "latest":
        raise RecipeError(
            f"--image {image}: does not say which version",
            wanted="a tag other than latest, or a digest",
            way_out="for example registry.example.org/image-feature-engine:0.1.0",
        )


def name_of_recipe_map(job: str, file: str, text: str) -> str:
    """Of the ConfigMap for a job's recipe: another recipe has another name, so that no job ever runs an older one."""
    return f"{job}-recipe-{stable_hash([file, text])[:10]}"


def recipe_config_map(name: str, file: str, text: str) -> Manifest:
    """The recipe as an object of the cluster, which nobody can change there.

    Raises:
        RecipeError: it is larger than Kubernetes takes.
    """
    if len(text.encode()) > MAX_RECIPE_BYTES:
        raise RecipeError(f"the recipe is larger than a ConfigMap may be ({MAX_RECIPE_BYTES:,} bytes)")
    labels = {
        "app.kubernetes.io/part-of": "image-feature-engine",
        "app.kubernetes.io/component": "recipe",
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "immutable": True,
        "data": {file: text},
    }


def ray_job(wish: JobWish, plan: PodPlan) -> Manifest:
    """The RayJob: the template with this job's names, command, pods and sizes."""
    job = _template()
    spec, settings = job["spec"], [f"{path}={number}" for path, number in plan.settings.items()]
    options = tuple(word for setting in settings for word in ("--set", setting))
    job["metadata"] |= {"name": wish.name}
    job["metadata"]["labels"]["app.kubernetes.io/name"] = f"engine-{wish.verb}"
    spec["entrypoint"] = " ".join([wish.entrypoint, *options])
    spec["suspend"], spec["backoffLimit"] = wish.suspend, wish.retries
    spec["activeDeadlineSeconds"] = wish.deadline_s
    # The deadline counts from the RayJob's creation, of which the driver does not know: it is told what is left where
    # nodes take as long to come as they may.
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    left_s = max(0, wish.deadline_s - spec["preRunningDeadlineSeconds"])
    head["env"].append({"name": "ENGINE_ENDED_AFTER_SECONDS", "value": str(left_s)})
    cluster = spec["rayClusterSpec"]
    cluster["rayVersion"] = importlib.metadata.version("ray")
    pattern = cluster["workerGroupSpecs"][0]
    cluster["workerGroupSpecs"] = [_worker_group(pattern, group) for group in plan.groups]
    for template in pod_templates(job):
        for container in template["spec"]["containers"]:
            container["image"] = wish.image
        for volume in template["spec"]["volumes"]:
            if "configMap" in volume:
                volume["configMap"]["name"] = wish.recipe_map
    return job


def pod_templates(job: Manifest) -> list[Manifest]:
    """All pod templates of a RayJob: submitter, head, workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def _worker_group(pattern: Manifest, group: PodGroup) -> Manifest:
    made = copy.deepcopy(pattern)
    made |= {"groupName": group.name, "replicas": group.at_least}
    made |= {"minReplicas": group.at_least, "maxReplicas": group.at_most}
    made["rayStartParams"] = {
        "num-cpus": str(group.cpus),
        # By default KubeRay says the whole limit, in which the object store is, too.
        "memory": str(group.memory),
        "object-store-memory": str(group.object_store),
        "object-spilling-directory": "/spill",
    }
    pod = made["template"]["spec"]
    amounts = {
        "cpu": str(group.cpus),
        "memory": _mebibytes(group.limit),
        "ephemeral-storage": f"{_disk_of(group) // GIB}Gi",
    }
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
        made["rayStartParams"]["num-gpus"] = str(group.gpus)
        pod["tolerations"].append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    pod["containers"][0]["resources"] = {"requests": amounts, "limits": dict(amounts)}
    sizes = {
        "dshm": _mebibytes(group.object_store + SHM_SPARE_BYTES),
        "tmp": f"{group.scratch // GIB}Gi",
        "spill": f"{group.scratch // GIB}Gi",
    }
    for volume in pod["volumes"]:
        if volume["name"] in sizes:
            volume["emptyDir"]["sizeLimit"] = sizes[volume["name"]]
    return made


CACHE_BYTES = 4 * GIB  # the volume `cache` of the template


def _disk_of(group: PodGroup) -> int:
    """Of a node's disk: temporary files, spilled objects and fetched networks together."""
    return 2 * group.scratch + CACHE_BYTES + GIB  # and logs


def _mebibytes(size: int) -> str:
    return f"{size // MIB}Mi"


def _template() -> Manifest:
    template: Manifest = _without_shared_parts(_parsed_template())
    return template


@functools.cache
def _parsed_template() -> Any:
    text = importlib.resources.files("engine.kubernetes").joinpath("rayjob.yaml").read_text(encoding="utf-8")
    return parse_yaml(text)


def _without_shared_parts(node: Any) -> Any:
    """YAML's anchors make one object of equal parts; changing one must not change the others."""
    if isinstance(node, dict):
        return {key: _without_shared_parts(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_shared_parts(value) for value in node]
    return node
