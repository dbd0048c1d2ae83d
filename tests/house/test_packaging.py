"""What a clone is set up with: the lock file covers pyproject.toml, `make` says what it can do, Ray uploads no more
than a job needs."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKED_EXTRAS = ("demo", "test")


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def lock(repository: Path) -> str:
    return (repository / "requirements.lock").read_text(encoding="utf-8")


def pins_of(lock: str) -> list[Requirement]:
    lines = [line.removesuffix("\\") for line in lock.splitlines() if re.match(r"[a-z]", line)]
    return [Requirement(line) for line in lines]


def test_every_dependency_has_a_pin_that_it_allows_on_each_python(project: dict[str, Any], lock: str) -> None:
    direct = [*project["dependencies"]]
    direct += [line for extra in LOCKED_EXTRAS for line in project["optional-dependencies"][extra]]
    pins = pins_of(lock)
    for wanted in map(Requirement, direct):
        for python in ("3.11.0", "3.12.0", "3.13.0"):
            environment = {"python_full_version": python, "python_version": python[:4]}
            found = [
                next(iter(pin.specifier)).version
                for pin in pins
                if canonicalize_name(pin.name) == canonicalize_name(wanted.name)
                and (pin.marker is None or pin.marker.evaluate(environment))
            ]
            assert len(found) == 1, f"{wanted.name} on Python {python}: {found}; run `make lock`"
            assert wanted.specifier.contains(found[0]), f"{wanted} but {found[0]} is locked; run `make lock`"


def test_lock_pins_exact_versions_by_hash_and_names_no_host(lock: str) -> None:
    pins = pins_of(lock)
    assert len(pins) > 100
    for pin in pins:
        assert [clause.operator for clause in pin.specifier] == ["=="], pin
    blocks = re.split(r"\n(?=[a-z])", lock)[1:]
    assert len(blocks) == len(pins)
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in lock
    assert not re.search(r"^\s*--(index|extra-index|find-links|trusted-host)", lock, re.MULTILINE)
    assert "make lock" in lock.splitlines()[1]


def test_make_alone_lists_every_target(repository: Path) -> None:
    shown = subprocess.run(["make"], cwd=repository, check=True, capture_output=True, text=True).stdout
    listed = re.findall(r"^  make ([a-z-]+)  ", shown, re.MULTILINE)
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    assert listed == phony


def test_without_a_fit_python_make_says_what_is_wanted_and_makes_nothing(
    repository: Path, tmp_path: Path
) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((repository / name).read_bytes())
    outcome = subprocess.run(
        ["make", "test", "PYTHON=/nowhere/python3.12"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 2
    assert "No Python 3.11, 3.12 or 3.13" in outcome.stdout
    assert "/nowhere/python3.12" in outcome.stdout
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_lint_then_tests_and_stops_at_the_first_failure(repository: Path, tmp_path: Path) -> None:
    """With a `make` that writes down what it is asked for, and refuses to lint the second time."""
    script = tmp_path / ".ci" / "run"
    script.parent.mkdir()
    script.write_bytes((repository / ".ci" / "run").read_bytes())
    fake_make = tmp_path / "make"
    fake_make.write_text('#!/bin/sh\necho "$PWD $@" >> asked\n[ "$1" != "$REFUSED" ]\n')
    fake_make.chmod(0o755)
    for refused, expected in (("", ["lint", "test"]), ("lint", ["lint"]), ("test", ["lint", "test"])):
        (tmp_path / "asked").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REFUSED": refused}
        outcome = subprocess.run(["bash", str(script)], env=environment, check=False)
        assert (outcome.returncode != 0) == bool(refused)
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked == [f"{tmp_path} {target}" for target in expected]


def test_ray_uploads_the_code_and_leaves_the_rest(repository: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    kept = ["engine/config.py", "jobs/extract.py", "jobs/recipes/demo_extract.yaml", "pyproject.toml"]
    left = [
        ".venv/bin/python",
        ".git/config",
        "demo-output/shards/a.tar",
        "engine/__pycache__/config.cpython-311.pyc",
        ".mypy_cache/a.json",
        "image_feature_engine.egg-info/PKG-INFO",
        "tests/test_config.py",
        "k8s/Dockerfile",
        "requirements.lock",
    ]
    tree, package = tmp_path / "tree", tmp_path / "package.zip"
    for name in (*kept, *left):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (tree / name).write_bytes((repository / name).read_bytes())
    create_package(str(tree), package, include_gitignore=False)
    with zipfile.ZipFile(package) as archive:
        uploaded = {name for name in archive.namelist() if not name.endswith("/")}
    assert uploaded == {*kept, ".gitignore", ".rayignore"}


def test_files_beside_the_code_are_installed_with_it(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    beside = {
        (top, str(path.relative_to(repository / top)))
        for top in ("engine", "jobs")
        for path in (repository / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    installed = {
        (top, str(path.relative_to(repository / top)))
        for top, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (repository / top).glob(pattern)
    }
    assert ("engine", "report/page.html") in beside
    assert beside - installed == set()
