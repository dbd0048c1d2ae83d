"""What a developer runs before a commit is what `make lint` runs, whichever way it is started."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from engine.config import parse_yaml


def lint_commands(repository: Path) -> list[str]:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    return [line.strip() for line in recipe.splitlines()]


def test_hooks_of_pre_commit_are_the_commands_of_make_lint_and_download_nothing(repository: Path) -> None:
    (repo,) = parse_yaml((repository / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == lint_commands(repository)
    assert {(hook["language"], hook["pass_filenames"]) for hook in repo["hooks"]} == {("system", False)}
    assert len({hook["id"] for hook in repo["hooks"]}) == len(repo["hooks"])


def test_what_is_read_strictly_is_there_in_order_and_is_not_less_than_what_all_lean_on(
    repository: Path,
) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "basedpyright"
    ]
    assert settings["typeCheckingMode"] == "strict"
    assert settings["include"] == sorted(set(settings["include"]))
    assert [path for path in settings["include"] if not (repository / path).is_file()] == []
    leaned_on = (
        "errors",
        "config",
        "parts",
        "plan",
        "accounting",
        "gate",
        "lease",
        "sizing",
        "worklist",
        "doctor",
    )
    assert {f"engine/{name}.py" for name in leaned_on} <= {*settings["include"]}


@pytest.fixture
def clone(repository: Path, tmp_path: Path) -> Path:
    """A git repository with our Makefile, whose `make lint` is replaced by one that says no."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    recipe = "\n\t".join(lint_commands(repository))
    assert recipe in makefile
    (tmp_path / "Makefile").write_text(
        makefile.replace(recipe, "exit 17").replace("lint: .venv/.installed", "lint:")
    )
    return tmp_path


def make_hooks(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "hooks"], cwd=clone, capture_output=True, text=True, check=False)


def test_make_hooks_lets_git_lint_before_each_commit(clone: Path) -> None:
    assert make_hooks(clone).returncode == make_hooks(clone).returncode == 0
    (clone / "a.py").write_text("x = 1\n")
    who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", "add", "a.py"], cwd=clone, check=True)
    committed = subprocess.run(
        ["git", "commit", "-m", "x"],
        cwd=clone,
        env=os.environ | who,
        capture_output=True,
        text=True,
        check=False,
    )
    assert committed.returncode != 0
    assert "exit 17" in committed.stdout + committed.stderr


def test_make_hooks_leaves_somebody_elses_hook_alone(clone: Path) -> None:
    hook = clone / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\ntrue\n")
    ended = make_hooks(clone)
    assert ended.returncode != 0
    assert "not ours" in ended.stdout
    assert hook.read_text() == "#!/bin/sh\ntrue\n"
