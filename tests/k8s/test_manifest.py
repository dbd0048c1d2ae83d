"""`engine manifest`: what it prints is what k8s/ has, what Ray's autoscaler reads, and what the archive needs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine.config import load_recipe
from engine.errors import RecipeError
from engine.estimate import CLUSTERS
from engine.kubernetes.manifest import RECIPE_FOLDER, JobWish
from engine.kubernetes.pods import Wish
from engine.storage import open_store
from jobs.cli import main
from jobs.extract import ExtractRecipe
from jobs.watched import ENDED_AFTER
from k8s import render
from tests.embedding_tables import FINGERPRINT, publish_linear
from tests.flows.archives import extract_recipe, write_recipe, write_shards
from tests.k8s.rendering import OVERLAYS, ROOT, containers, of_kind, overlay, pod_templates

IMAGE = "registry.example.org/image-feature-engine:0.1.0"


def manifests(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, Any]]:
    """What the command prints, by kind."""
    capsys.readouterr()
    code = main(["manifest", *map(str, arguments), "--image", IMAGE])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return {document["kind"]: document for document in yaml.safe_load_all(printed.out)}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["manifest", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_files_of_k8s_are_what_the_command_prints() -> None:
    """One source for both: `make manifests` after a change of the template or of sizes."""
    for place, text in render.files().items():
        assert (ROOT / place).read_text(encoding="utf-8") == text, f"{place}: run `make manifests`"


@pytest.mark.parametrize("name", ["gpu", "dev"])
def test_an_overlay_renders_to_the_rayjob_that_the_command_prints(name: str) -> None:
    for verb, sizes in {"gpu": render.GPU, "dev": render.DEV}[name].items():
        wanted, found = render.printed(verb, sizes), of_kind(overlay(name), "RayJob")[verb]
        assert without_place(found) == without_place(wanted)


def without_place(node: Any) -> Any:
    """Without what an overlay sets: namespace, image, and the hash in the ConfigMap's name."""
    if isinstance(node, dict):
        return {
            key: without_place(value)
            for key, value in node.items()
            if key not in ("namespace", "image", "configMap")
        }
    return [without_place(value) for value in node] if isinstance(node, list) else node


def test_a_recipe_of_ones_own_comes_with_its_config_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d", "# a comment that is kept")
    made = manifests(capsys, "extract", recipe, "--offline", "--name", "mine")
    name = made["ConfigMap"]["metadata"]["name"]
    assert re.fullmatch("mine-recipe-[0-9a-f]{10}", name)
    assert made["ConfigMap"]["immutable"] is True
    assert made["ConfigMap"]["data"] == {"extract.yaml": recipe.read_text(encoding="utf-8")}
    spec = made["RayJob"]["spec"]
    assert spec["suspend"] is False
    assert spec["entrypoint"].startswith(f"engine extract {RECIPE_FOLDER}/extract.yaml --json --set ")
    volumes = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert [v["configMap"]["name"] for v in volumes if "configMap" in v] == [name]


def test_a_changed_recipe_is_another_config_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kubectl create` keeps what is there under a name, and the job would run the recipe of before."""
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d")
    command = ["extract", recipe, "--offline", "--name", "mine"]
    first, again = manifests(capsys, *command), manifests(capsys, *command)
    changed = manifests(capsys, *command, "--set", "limits.max_reject_fraction=0.17")
    assert first == again
    assert first["ConfigMap"]["metadata"]["name"] != changed["ConfigMap"]["metadata"]["name"]
    for made in (first, changed):
        pods = list(pod_templates(made["RayJob"]))[1:]
        named = {
            v["configMap"]["name"] for _, pod in pods for v in pod["spec"]["volumes"] if "configMap" in v
        }
        assert named == {made["ConfigMap"]["metadata"]["name"]}


@pytest.mark.parametrize(("verb", "retries"), [("extract", 1), ("fit", 1), ("finetune", 0)])
def test_a_fine_tuning_that_came_to_nothing_is_not_trained_again(
    capsys: pytest.CaptureFixture[str], verb: str, retries: int
) -> None:
    command = [verb, ROOT / f"jobs/recipes/{verb}_bucket.yaml", "--offline"]
    assert manifests(capsys, *command)["RayJob"]["spec"]["backoffLimit"] == retries
    assert manifests(capsys, *command, "--retries", 2)["RayJob"]["spec"]["backoffLimit"] == 2


def test_the_driver_is_told_how_long_it_surely_has(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extract", ROOT / "jobs/recipes/extract_bucket.yaml", "--offline"]
    for hours, seconds in ((12, "41400"), (0.25, "0")):  # half an hour may pass before it starts
        job = manifests(capsys, *command, "--deadline-hours", hours)["RayJob"]
        found = {
            where.split()[-1]: variable["value"]
            for where, container in containers(job)
            for variable in container.get("env", [])
            if variable["name"] == ENDED_AFTER
        }
        assert found == {"ray-head": seconds}


def test_the_default_pods_are_those_of_a_wish(capsys: pytest.CaptureFixture[str]) -> None:
    made = manifests(capsys, "score", ROOT / "jobs/recipes/score_bucket.yaml", "--offline")
    (group,) = made["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    wish = Wish()
    assert (group["maxReplicas"], group["rayStartParams"]["num-cpus"]) == (wish.workers, str(wish.cpus))


def test_estimates_on_paper_have_the_machines_of_the_overlays() -> None:
    for name in ("cpu", "gpu"):
        paper = CLUSTERS[f"{name}-overlay"]
        cluster = of_kind(overlay(name), "RayJob")["extract"]["spec"]["rayClusterSpec"]
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        cores = {int(group["rayStartParams"]["num-cpus"]) for group in groups.values()}
        assert cores == {paper.cores_per_node}
        assert paper.nodes == groups[name]["maxReplicas"]
        assert paper.decode_nodes == (groups["cpu"]["maxReplicas"] if name == "gpu" else 0)
        assert paper.gpus_per_node == int(groups[name]["rayStartParams"].get("num-gpus", 0))


def test_overrides_are_in_the_recipe_that_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d")
    made = manifests(
        capsys, "extract", recipe, "--offline", "--set", 'source.pattern="*.tgz"', "--set", "compute.actors=2"
    )
    (text,) = made["ConfigMap"]["data"].values()
    (tmp_path / "printed.yaml").write_text(text)
    options = shlex.split(made["RayJob"]["spec"]["entrypoint"])[5::2]
    loaded = load_recipe(ExtractRecipe, tmp_path / "printed.yaml", options)
    assert (loaded.source.pattern, loaded.compute.actors.max, loaded.compute.decode_tasks) == ("*.tgz", 2, 24)


def test_pods_are_as_many_as_the_archive_has_work_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(open_store(str(tmp_path / "shards")), shards=5, images=3)
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(tmp_path / "table"))
    for cpus, pods in ((2, 5), (3, 3), (8, 1)):
        made = manifests(capsys, "extract", recipe, "--workers", 9, "--cpus", cpus)
        (group,) = made["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert (group["minReplicas"], group["maxReplicas"]) == (pods, pods)
        assert made["RayJob"]["spec"]["entrypoint"].endswith("compute.decode_tasks=5")
    assert not (tmp_path / "table").exists()


BACKBONE = {"kind": "keras_application", "name": "MobileNetV2", "weights": "random", "input_size": 32}


def recipe_of_images(folder: Path, **blocks: Any) -> Path:
    """Scores five shards of images with a bundle of a network that takes 32 pixels."""
    write_shards(open_store(str(folder / "shards")), shards=5, images=3)
    made_with = {
        "fingerprint": FINGERPRINT,
        "width": 7,
        "backbone": BACKBONE,
        "runtime": {"kind": "tensorflow"},
        "contract": {"runtime.precision": "float32", "fingerprint": FINGERPRINT},
    }
    publish_linear(folder / "bundle", np.ones((7, 5)), np.ones(5), tuple("abcde"), made_with)
    document = {
        "source": {"kind": "webdataset", "uri": str(folder / "shards"), "image": ["jpg"], "label": "cls"},
        "bundles": [{"uri": str(folder / "bundle"), "output": {"uri": str(folder / "labels")}}],
        **blocks,
    }
    return write_recipe(folder, "score.yaml", json.dumps(document))


def test_scoring_straight_from_images_has_the_pods_of_an_extraction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of_images(tmp_path)
    for cpus, pods in ((2, 5), (3, 3), (8, 1)):
        made = manifests(capsys, "score", recipe, "--workers", 9, "--cpus", cpus)
        (group,) = made["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        assert (group["minReplicas"], group["maxReplicas"]) == (pods, pods), (
            "actors are laid out on the nodes of the start"
        )
        assert made["RayJob"]["spec"]["entrypoint"].endswith("compute.decode_tasks=5")
    made = manifests(capsys, "score", recipe, "--workers", 1, "--cpus", 2, "--gpus", 2)
    groups = made["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(group["groupName"], group["maxReplicas"]) for group in groups] == [("cpu", 1), ("gpu", 2)]
    settings = shlex.split(made["RayJob"]["spec"]["entrypoint"])[5::2]
    assert "compute.gpus_per_actor=1" in settings and "compute.actors.max=2" in settings
    assert not (tmp_path / "labels").exists()


def test_pods_that_score_images_unseen_want_to_know_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "score", recipe_of_images(tmp_path), "--offline", "--image", IMAGE)
    assert "give the network as `backbone` in the recipe" in said
    made = manifests(capsys, "score", recipe_of_images(tmp_path, backbone=BACKBONE), "--offline", "--gpus", 3)
    groups = made["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["maxReplicas"] for group in groups] == [4, 3]


def test_paths_of_this_machine_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", str(tmp_path / "table"))
    assert main(["manifest", "extract", str(recipe), "--image", IMAGE, "--offline"]) == 0
    said = capsys.readouterr().err
    assert f"note: {tmp_path}/table is a path; every pod would look for it on a disk of its own" in said
    assert "s3://a/b" not in said


def test_an_archive_that_cannot_be_reached_is_said_and_how_to_do_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extract_recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "table"))
    assert main(["manifest", "extract", str(recipe), "--image", IMAGE]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--offline: as many pods as the options say" in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "engine"], "which version"),
        (["--image", "engine:latest"], "which version"),
        (["--image", "registry:5000/engine"], "which version"),
        (["--image", IMAGE, "--name", "Mine"], "no name for a RayJob"),
        (["--image", IMAGE, "--name", "n" * 48], "at most 47"),
        (["--image", IMAGE, "--gpus", "3", "--gpus-per-pod", "2"], "a multiple"),
        (["--image", IMAGE, "--recipe-map", "there", "--set", "compute.actors=2"], "leave one of them out"),
        (["--image", IMAGE, "--set", "compute.actor=2"], "did you mean 'actors'?"),
        (["--image", IMAGE, "--set", "compute.address=auto"], "a cluster of its own"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d")
    assert said in refused(capsys, "extract", recipe, "--offline", *arguments)


def test_a_recipe_whose_name_a_shell_would_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d").rename(tmp_path / "my $(recipe).yaml")
    arguments = ["extract", recipe, "--offline", "--image", IMAGE, "--name", "mine"]
    assert "no name for a file of a ConfigMap" in refused(capsys, *arguments)


def test_an_option_that_a_shell_would_read_is_refused() -> None:
    wish = JobWish("fit", "mine", IMAGE, "recipes", "fit.yaml", options=("--set", "head.kind=$(id)"))
    with pytest.raises(RecipeError, match="cannot stand in a RayJob's command"):
        _ = wish.entrypoint


@pytest.mark.parametrize("character", list("+@=,:%"))
def test_a_recipe_whose_name_no_config_map_takes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], character: str
) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d").rename(tmp_path / f"my{character}recipe.yaml")
    arguments = ["extract", recipe, "--offline", "--image", IMAGE, "--name", "mine"]
    assert f"my{character}recipe.yaml: no name for a file of a ConfigMap" in refused(capsys, *arguments)


def test_images_may_be_named_by_digest_and_by_a_registry_with_a_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = extract_recipe(tmp_path, "s3://a/b", "s3://c/d")
    for image in (f"localhost:5000/engine@sha256:{'ab' * 32}", "localhost:5000/engine:1.0"):
        assert main(["manifest", "extract", str(recipe), "--offline", "--image", image]) == 0
        assert f"image: {image}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", OVERLAYS)
def test_rays_autoscaler_reads_of_a_rayjob_what_its_pods_have(name: str) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    for job in of_kind(overlay(name), "RayJob").values():
        cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": job["spec"]["rayClusterSpec"]}
        config = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
        types = config["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0
        for group in cluster["spec"]["workerGroupSpecs"]:
            told = group["rayStartParams"]
            wanted = {"CPU": int(told["num-cpus"]), "memory": int(told["memory"])}
            wanted |= {"GPU": int(told["num-gpus"])} if "num-gpus" in told else {}
            found = types[group["groupName"]]
            assert found["resources"] == wanted
            assert (found["min_workers"], found["max_workers"]) == (
                group["minReplicas"],
                group["maxReplicas"],
            )


def test_ray_takes_every_start_parameter_of_the_manifests() -> None:
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for name in OVERLAYS:
        for job in of_kind(overlay(name), "RayJob").values():
            cluster = job["spec"]["rayClusterSpec"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                assert group["rayStartParams"].keys() <= known
