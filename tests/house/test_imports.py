"""Imports only go down, foreign libraries come in through their doors, and the command answers at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A module may import engine modules of lower floors, and of its own room. One floor is one tuple.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "schema",
        "config",
        "import_without",
        "doctor",
        "parquet_footer",
        "run_metrics",
        "log_lines",
        "quiet_start",
    ),
    ("area_means", "parts", "storage", "beside", "plain_pages", "copies", "representatives", "recipe_page"),
    (
        "recipes",
        "worklist",
        "lease",
        "run_record",
        "tables",
        "row_files",
        "shards",
        "images",
        "backbones",
        "runtimes",
        "heads",
        "strategies",
        "report",
    ),
    ("embedder", "training", "predictor", "decisions", "thumbnails"),
    ("runtime_choice", "resolution_cache", "extraction", "scoring", "night", "lineage", "pictures"),
    ("resolve", "labelling", "finetuning", "night_report"),
    (
        "accounting",
        "cluster_head",
        "compaction",
        "duplicates",
        "estimate",
        "export",
        "gate",
        "imagenet",
        "inspection",
        "plan",
        "prediction",
        "query_images",
        "review",
        "similar",
        "sizing",
        "sql",
        "table_export",
        "verification",
    ),
    ("on_ray", "ray_jobs", "this_machine", "kubernetes"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Configs of one room that another room of the same floor may name: values only, no code of the room.
VALUES = {"engine.schema", "engine.errors", "engine.config"}


def imports_of(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room_of(module: str) -> str | None:
    steps = module.split(".")
    return steps[1] if steps[0] == "engine" and len(steps) > 1 else None


def test_every_room_has_a_floor(repository: Path) -> None:
    rooms = {path.stem for path in (repository / "engine").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "docs"} == set(FLOOR_OF)


def test_imports_only_go_down(repository: Path) -> None:
    upwards = []
    for path in sorted((repository / "engine").rglob("*.py")):
        room = path.relative_to(repository / "engine").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for module in imports_of(path):
            if module.split(".")[0] == "jobs":
                upwards.append(f"{path.relative_to(repository)} imports {module}")
            other = room_of(module)
            if other is None or other == room or module in VALUES:
                continue
            if FLOOR_OF[other] >= FLOOR_OF[room]:
                upwards.append(f"{path.relative_to(repository)} ({room}) imports {module}")
    assert upwards == []


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("ray", ("engine/on_ray.py", "engine/ray_jobs.py")),
        ("s3fs", ("engine/storage/",)),
        ("botocore", ("engine/storage/",)),
        ("fsspec", ("engine/storage/",)),
        ("duckdb", ("engine/sql.py",)),
        ("tarfile", ("engine/shards/", "engine/backbones/fetch.py", "jobs/demo_images.py")),
        ("yaml", ("engine/config.py",)),
        ("PIL", ("engine/images.py", "engine/thumbnails.py", "jobs/demo_images.py")),
        ("openvino", ("engine/runtimes/",)),
        ("cv2", ("engine/images.py",)),
        ("numba", ("engine/area_means.py",)),
        ("matplotlib", ("engine/report/plots.py", "engine/prediction/picture.py")),
        ("jinja2", ("engine/report/template.py",)),
    ],
)
def test_foreign_libraries_come_in_through_their_door(
    repository: Path, library: str, doors: tuple[str, ...]
) -> None:
    users = {
        str(path.relative_to(repository))
        for folder in ("engine", "jobs")
        for path in (repository / folder).rglob("*.py")
        if any(module.split(".")[0] == library for module in imports_of(path))
    }
    assert users, f"nothing imports {library}: drop it here and in pyproject.toml"
    assert {user for user in users if not user.startswith(doors)} == set()


def test_tensorflow_is_imported_only_where_numbers_are_computed(repository: Path) -> None:
    rooms = ("backbones", "runtimes", "heads", "strategies", "training", "finetuning", "export.py")
    for path in (repository / "engine").rglob("*.py"):
        inside = path.relative_to(repository / "engine").parts[0] in rooms
        if not inside:
            assert not {"tensorflow", "keras"} & {module.split(".")[0] for module in imports_of(path)}, path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["extract", "no-such-recipe.yaml"],
        ["schema", "extract"],
        ["schema", "nightly", "--markdown"],
        ["fit", "--help"],
        ["predict", "--help"],
        ["submit", "no-such-recipe.yaml", "--verb", "extract"],
        ["sql", "--help"],
    ],
)
def test_the_command_answers_without_heavy_libraries(repository: Path, arguments: list[str]) -> None:
    script = (
        "import sys\nfrom jobs.cli import main\n"
        f"main({arguments!r})\n"
        "heavy = {'ray', 'tensorflow', 'keras', 'pyarrow', 'numpy', 's3fs', 'duckdb', 'PIL', 'cv2', 'numba'}\n"
        "heavy |= {'matplotlib', 'jinja2'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
