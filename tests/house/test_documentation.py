"""What the documents promise exists: commands, kinds, files, recipes; and the recipes load and are explained."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import load_recipe
from engine.schema import RejectReason
from jobs.cli import RECIPE_CLASSES, app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "engine" / "docs").glob("*.md"))
DOCUMENTS = (
    "README.md",
    "engine/README.md",
    "jobs/recipes/README.md",
    *(str(page.relative_to(ROOT)) for page in PAGES),
)


@pytest.fixture(scope="module")
def documents(repository: Path) -> str:
    return "\n".join((repository / name).read_text(encoding="utf-8") for name in DOCUMENTS)


def verbs() -> set[str]:
    return {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }


def test_documents_name_every_command_and_no_other(documents: str) -> None:
    named = set(re.findall(r"`?engine ([a-z]+)\b", documents)) - {"command"}
    assert verbs() <= named
    assert set(re.findall(r"`engine ([a-z]+)[ `]", documents)) <= verbs()


def test_documents_name_every_kind(documents: str) -> None:
    kinds = (
        "webdataset",
        "keras_application",
        "efficientnet_lite0",
        "tensorflow",
        "linear",
        "one_device",
        "mirrored",
    )
    for kind in kinds:
        assert f"`{kind}`" in documents, kind


def test_the_documents_explain_every_reject_reason(documents: str) -> None:
    for reason in RejectReason:
        assert f"`{reason}`" in documents, reason


def test_every_link_and_file_in_the_documents_exists(repository: Path) -> None:
    for name in DOCUMENTS:
        text = (repository / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((repository / name).parent / target).exists(), f"{name}: {target}"
        for path in re.findall(r"`((?:engine|jobs|tests)/[\w/.]+\.(?:py|yaml|md))`", text):
            assert (repository / path).exists(), f"{name}: {path}"


def test_make_targets_in_the_documents_exist(repository: Path, documents: str) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^\s*make ([a-z]+)", documents, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_recipe_loads_and_says_its_command(repository: Path) -> None:
    recipes = sorted((repository / "jobs" / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        text = path.read_text(encoding="utf-8")
        verb = re.search(r"^# Command: +engine ([a-z]+) (\S+)", text, re.MULTILINE)
        assert verb, path
        assert verb[2] == str(path.relative_to(repository))
        assert re.search(r"^# Measured: .*\d{4}-\d{2}-\d{2}", text, re.MULTILINE), (
            f"{path}: figures with their date"
        )
        load_recipe(getattr(importlib.import_module(f"jobs.{verb[1]}"), RECIPE_CLASSES[verb[1]]), path)


def test_the_tutorial_has_every_one_of_its_recipes_in_its_table(repository: Path) -> None:
    folder = repository / "jobs" / "recipes"
    named = re.findall(
        r"^\| \d+ \| `engine (\w+) jobs/recipes/(\S+)` \|", (folder / "README.md").read_text(), re.M
    )
    assert sorted(name for _, name in named) == sorted(path.name for path in folder.glob("tutorial_*.yaml"))
    for verb, name in named:
        assert f"# Command:   engine {verb} " in (folder / name).read_text(encoding="utf-8")


def test_recipes_in_the_documents_load(documents: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n# (\w+)\.yaml\n(.*?)```", documents, re.DOTALL)
    assert sorted(verb for verb, _ in blocks) == ["extract", "finetune", "fit", "nightly", "score"]
    for verb, block in blocks:
        path = tmp_path / f"{verb}.yaml"
        path.write_text(block, encoding="utf-8")
        load_recipe(getattr(importlib.import_module(f"jobs.{verb}"), RECIPE_CLASSES[verb]), path)


@pytest.mark.parametrize("verb", sorted(RECIPE_CLASSES))
def test_every_field_of_every_recipe_is_explained(verb: str) -> None:
    schema = getattr(importlib.import_module(f"jobs.{verb}"), RECIPE_CLASSES[verb]).model_json_schema()
    for model in [schema, *schema["$defs"].values()]:
        for name, field in model.get("properties", {}).items():
            assert field.get("description") or "$ref" in field or name == "kind", f"{model['title']}.{name}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extract", "absent.yaml"], "no such file"),
        (["schema", "extrakt"], "extract, fit, finetune, score, nightly"),
        (["extract", "jobs/recipes/demo_extract.yaml", "--set", "compute.actor=2"], "did you mean 'actors'?"),
        (["extract", "jobs/recipes/demo_extract.yaml", "--set", "source.kind=zip"], "webdataset"),
        (["extract", "jobs/recipes/demo_extract.yaml", "--set", "backbone.input_size=-3"], "backbone"),
        (["fit", "jobs/recipes/demo_fit.yaml", "--set", "split.train=0.9"], "must be 1"),
        (["score", "jobs/recipes/demo_score.yaml", "--set", "bundles=[]"], "bundles"),
        (["extract"], "recipe"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_arguments_exit_2_with_one_message(repository: Path, arguments: list[str], said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert said.lower() in ended.stderr.lower()
    assert "Traceback" not in ended.stderr


def test_every_decision_has_a_number_a_date_a_measured_answer_and_a_place(repository: Path) -> None:
    text = (repository / "engine/docs/decisions.md").read_text(encoding="utf-8")
    records = re.findall(
        r"^\*\*D(\d+)\. (.+?)\*\* \((\d{4}-\d{2}-\d{2})\) (.+?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert [int(number) for number, *_ in records] == list(range(1, len(records) + 1))
    assert len(records) == text.count("\n**D") >= 25
    for number, question, _, answer in records:
        assert question.endswith("?"), f"D{number}"
        places = re.findall(r"`((?:engine|jobs|tests)/[\w/.]+|pyproject\.toml)`\s*\Z", answer)
        assert places and (repository / places[0]).exists(), (
            f"D{number}: where it stands in the code comes last"
        )
