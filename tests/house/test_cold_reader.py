"""A reader who does what the documents say meets no command, option, target, module or link that is not there."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs.cli import app
from tests.house.documents import Document, documents_of, words_of

ENGINE: Any = typer.main.get_command(app)
UsageError: Any = typer.BadParameter.__base__  # of the click that typer is made with
ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = documents_of(ROOT)


@pytest.fixture(params=DOCUMENTS, ids=lambda document: document.name)
def document(request: pytest.FixtureRequest) -> Document:
    return request.param


def commands_of(document: Document) -> Iterator[list[str]]:
    """Words behind `engine` of each line that a reader may type."""
    for line in document.shell_lines():
        if line.startswith("engine "):
            yield words_of(line)[1:]


def parsed(words: list[str]) -> None:
    """Take a command line apart as the command does, without running it; behind `--` stands another verb's."""
    verb, *rest = words
    own, behind = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    ENGINE.commands[verb].make_context(f"engine {verb}", list(own))
    if behind:
        sent = own[own.index("--verb") + 1]
        ENGINE.commands[sent].make_context(f"engine {sent}", ["recipe.yaml", *behind])


def options_of(verb: str) -> set[str]:
    return {
        name for param in ENGINE.commands[verb].params for name in (*param.opts, *param.secondary_opts)
    } | {"--help"}


def test_every_command_line_can_be_taken_apart_as_it_is_written(document: Document) -> None:
    for words in commands_of(document):
        assert words[0] in ENGINE.commands, f"{document.name}: engine {' '.join(words)}"
        try:
            parsed(words)
        except UsageError as error:
            pytest.fail(f"{document.name}: engine {' '.join(words)}: {error.format_message()}")


def test_every_command_that_prose_names_has_the_options_it_names(document: Document) -> None:
    for span in document.spans():
        if re.match(r"engine [a-z]", span):
            words = span.split()
            assert words[1] in ENGINE.commands, f"{document.name}: `{span}`"
            named = {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}
            assert named <= options_of(words[1]), f"{document.name}: `{span}`"


def test_an_option_that_stands_alone_in_prose_is_one_of_some_command(document: Document) -> None:
    """Of ours, or of a program that the documents speak of by name."""
    ours = set().union(*map(options_of, ENGINE.commands))
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/benchmarks").glob("*.py"))
    others = set(re.findall(r'"(--[a-z-]+)"', scripts)) | {"--expendable-pods-priority-cutoff"}
    for span in document.spans():
        if re.fullmatch(r"--[a-z][a-z-]*(?:[ =].*)?", span):
            assert re.split("[ =]", span)[0] in ours | others, f"{document.name}: `{span}`"


def test_every_make_target_and_every_module_is_there(document: Document) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for text in (*document.shell_lines(), *document.spans()):
        if (make := re.match(r"make ([a-z-]+)\b(?!=)", text)) is not None:
            assert make[1] in targets, f"{document.name}: {text}"
        if (module := re.search(r"python -m ([\w.]+)", text)) is not None:
            assert importlib.util.find_spec(module[1]), f"{document.name}: {text}"


def test_every_link_and_anchor_leads_somewhere(document: Document) -> None:
    anchors = {other.path: other.anchors() for other in DOCUMENTS}
    for target in document.links():
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.path.parent / file).resolve() if file else document.path
        assert path.exists(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors[path], (
            f"{document.name}: {target}; there are {sorted(anchors[path])}"
        )


def test_every_page_can_be_reached_from_the_readme() -> None:
    by_path = {document.path: document for document in DOCUMENTS}
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        reached.add(path)
        for target in by_path[path].links():
            there = (path.parent / target.partition("#")[0]).resolve()
            there = there / "README.md" if there.is_dir() else there
            if there in by_path and there not in reached:
                waiting.append(there)
    pages = {
        document.path
        for document in DOCUMENTS
        if document.name.startswith(("engine/docs/", "k8s/", "engine/R"))
    }
    assert pages - reached == set()


def test_pages_are_found_and_taken_apart(tmp_path: Path) -> None:
    """Of the reader itself: what it would say of a page whose promises are known."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n\nSee [a](#one-two-three), [b](b.md#c-1), `engine fit x --plan`,\nand `engine\nscore`.\n\n"
        "    engine extract x.yaml --set a.b=1    # a comment\n\n    engine submit \\\n      x.yaml | tee log\n\n"
        "```yaml\nengine no\n```\n\n```sh\nengine plan --images 1e9\n```\n\n## One `two`: three\n\n- item\n\n"
        '<a id="own"></a>\n'
    )
    document = Document(page, "page.md", page.read_text())
    assert list(commands_of(document)) == [
        ["plan", "--images", "1e9"],
        ["extract", "x.yaml", "--set", "a.b=1"],
        ["submit", "x.yaml"],
    ]
    assert list(document.spans())[1:3] == ["engine fit x --plan", "engine score"]
    assert list(document.links()) == ["#one-two-three", "b.md#c-1"]
    assert document.anchors() == {"one-two-three", "one-two-three-1", "own"}
    for wrong in (
        ["extract"],
        ["fit", "a", "--no-such"],
        ["plan", "--images", "N"],
        ["submit", "a", "--verb", "fit", "--", "-x"],
    ):
        with pytest.raises(UsageError):
            parsed(wrong)
