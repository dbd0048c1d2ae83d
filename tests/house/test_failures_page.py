"""engine/docs/failures.md: each error has its entry and exit code, and every message is one that the code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine import errors
from engine.accounting import RunTotals, failed_shards_verdict
from engine.backbones.fetch import fetch_weights
from engine.config import load_recipe
from engine.doctor import SCHEDULING, STAGES
from engine.gate import GateConfig, Night, Population, judge
from engine.heads.bundle import open_bundle
from engine.lease import held_lease, this_run
from engine.parts import TableProgress, part_name
from engine.plan import check_prune, pending_shards
from engine.recipes import Compute, Limits
from engine.shards.base import Resume
from engine.shards.kinds import WebDatasetSource, open_reader
from engine.sizing import Machines, check_room, footprint, size_up
from engine.storage import StorageConfig, open_store
from engine.tables import RECORD_NAME, check_contract, read_record, require_record
from engine.training.labels import encode_classes
from engine.verification.findings import Damage, Leftover, Unfinished
from jobs.extract import ExtractRecipe
from tests.shards.archives import member, tar_bytes

ALL_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.EngineError)
}
ENTRY = re.compile(r"^### (\w+)\n\nExit code (\d+)\. (.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
MESSAGE = re.compile(r"^```text\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "engine/docs/failures.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def messages(page: str) -> dict[str, list[str]]:
    """Error -> the messages that the page shows of it."""
    return {name: MESSAGE.findall(text) for name, _, text in ENTRY.findall(page)}


def test_every_error_has_its_entry_and_its_exit_code_and_no_entry_is_of_another(page: str) -> None:
    entries = {name: int(code) for name, code, _ in ENTRY.findall(page)}
    assert entries == {name: kind.exit_code for name, kind in ALL_ERRORS.items()}
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == list(ALL_ERRORS), "in the order of errors.py"


def test_every_entry_has_a_message_and_says_what_to_do(page: str) -> None:
    for name, _, text in ENTRY.findall(page):
        assert MESSAGE.findall(text), name
        assert "**What to do.**" in text, name


def test_every_message_on_the_page_can_be_said(repository: Path, messages: dict[str, list[str]]) -> None:
    """All its parts are what one place in the code that makes this very error can fill in."""
    said = {name: list(_said(repository, name)) for name in ALL_ERRORS}
    for name, shown in messages.items():
        for message in shown:
            assert any(place.says(_parted(message)) for place in said[name]), (
                f"no place says {name}: {message}"
            )


def test_the_page_explains_everything_that_verify_and_the_doctor_can_say(page: str) -> None:
    for finding in (*Damage, *Leftover, *Unfinished):
        assert re.search(rf"^\| .*`{finding}`", page, re.MULTILINE), finding
    for bottleneck in (*STAGES, SCHEDULING):
        assert f"| `{bottleneck}` |" in page, bottleneck
    named = set(
        re.findall(r"`([a-z_]+)`", page.partition("## What `engine verify` says")[2].partition("\n## ")[0])
    )
    known = {str(finding) for finding in (*Damage, *Leftover, *Unfinished)}
    assert {name for name in named if "_" in name} - {"open_table"} <= known


# ---------------------------------------------------------------- messages that the code can say


PARTS = {"found": "  found:   ", "wanted": "  wanted:  ", "way_out": "  way out: "}


def _parted(message: str) -> dict[str, str]:
    """The parts of a message as it is printed."""
    heads = "|".join(map(re.escape, PARTS.values()))
    thing, *rest = re.split(rf"\n({heads})", message)
    names = {head: name for name, head in PARTS.items()}
    return {"thing": thing} | {names[head]: text for head, text in zip(rest[::2], rest[1::2], strict=True)}


@dataclass(frozen=True)
class Place:
    """Where an error is made: a pattern for each part that it has."""

    patterns: Mapping[str, str]

    def says(self, parts: Mapping[str, str]) -> bool:
        return self.patterns.keys() == parts.keys() and all(
            re.fullmatch(pattern, parts[name], re.DOTALL) for name, pattern in self.patterns.items()
        )


def _said(repository: Path, error: str) -> Iterator[Place]:
    for folder in ("engine", "jobs"):
        for path in sorted((repository / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if error not in source:
                continue
            tree = ast.parse(source)
            scopes = [
                node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            for scope in scopes:
                named = _assigned(tree.body) | _assigned(ast.walk(scope))
                for call in (node for node in ast.walk(scope) if isinstance(node, ast.Call)):
                    if error in _names(call.func) and call.args:
                        parts = {str(word.arg): word.value for word in call.keywords if word.arg in PARTS}
                        parts = {"thing": call.args[0], **parts}
                        yield Place({part: _pattern(value, named) for part, value in parts.items()})


def _names(function: ast.expr) -> set[str]:
    """What a call calls: a name, or one of two."""
    if isinstance(function, ast.IfExp):
        return _names(function.body) | _names(function.orelse)
    return {function.id} if isinstance(function, ast.Name) else set()


def _assigned(nodes: Iterator[ast.AST] | list[ast.stmt]) -> dict[str, list[ast.expr]]:
    """What is given to each name; of one that more is added to, nothing is known."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.target)
    return found


def _pattern(node: ast.expr, named: Mapping[str, list[ast.expr]]) -> str:
    """A regular expression for the texts that an expression can be; anything where nothing is known."""
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part, named) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left, named) + _pattern(node.right, named)
    if isinstance(node, ast.IfExp):
        return f"(?:{_pattern(node.body, named)}|{_pattern(node.orelse, named)})"
    if isinstance(node, ast.Name) and node.id in named:
        others = {name: values for name, values in named.items() if name != node.id}
        return "(?:" + "|".join(_pattern(value, others) for value in named[node.id]) + ")"
    return ".*"


# ---------------------------------------------------------------- messages that are provoked here


def wrong_recipe(_: Path) -> None:
    changes = ["compute.actor=2", "backbone.input_size=-3"]
    load_recipe(ExtractRecipe, "jobs/recipes/demo_extract.yaml", changes)


def path_that_leaves_the_store(root: Path) -> None:
    open_store(f"{root}/archive").write("../key", b"1")


def no_table(root: Path) -> None:
    require_record(open_store(f"{root}/features"), "embeddings")


def no_lease(root: Path) -> None:
    store = open_store(f"{root}/features")
    store.write("_nightly.0000000001.lease", b"hello")
    with held_lease(store, "_nightly", this_run("x"), 600):
        pass


def cut_tar(root: Path) -> None:
    store = open_store(f"{root}/archive")
    whole = tar_bytes([member("0.jpg", b"1" * 1000), member("1.jpg", b"2" * 9000)])
    shard = store.write("00017.tar", whole[:5000])
    reader = open_reader(WebDatasetSource(uri=store.uri), 10_000)
    list(reader.read(store, shard, Resume()))


def other_weights(root: Path) -> None:
    store = open_store(f"{root}/models")
    store.write("ours.weights.h5", b"new")
    fetch_weights(f"{store.uri}/ours.weights.h5", "0" * 64, StorageConfig())


def other_contract(_: Path) -> None:
    made = {"contract": {"backbone.input_size": 160, "backbone.kind": "keras_application"}}
    check_contract(made, {"backbone.input_size": 224, "backbone.kind": "keras_application"}, "/features")


def no_record(root: Path) -> None:
    store = open_store(f"{root}/features")
    store.write(RECORD_NAME, b"{}")
    read_record(store, "embeddings")


def many_gone(_: Path) -> None:
    parts = [part_name(f"{number}.tar", "v1", 0, True) for number in range(19)]
    check_prune(pending_shards([], TableProgress(parts)), None)


def failed_shard(_: Path) -> None:
    totals = RunTotals(damage={"2026/00017.tar": "is damaged at byte 2,048 of the tar archive"})
    totals.shards.failed = 1
    raise_(failed_shards_verdict(totals, Limits()))


def one_class(_: Path) -> None:
    encode_classes(["cat"] * 40, np.ones(40, np.bool_))


def no_bundle(root: Path) -> None:
    open_bundle(open_store(f"{root}/animals"))


def no_gpus(_: Path) -> None:
    machine = Machines.of_one_node(16, 0, 64e9, 20e9)
    compute = Compute.model_validate({"actors": 2, "gpus_per_actor": 1})
    check_room(
        size_up(compute, machine, footprint(compute, Limits(), 384, 224, None)), machine, can_grow=False
    )


def dark_night(_: Path) -> None:
    night = Night(1000, Population(1000, {"cat": 400, "dog": 600}), abstained=610)
    raise_(judge(night, GateConfig()).error("/labels"))


def raise_(error: errors.EngineError | None) -> None:
    assert error is not None
    raise error


PROVOKED: dict[str, Callable[[Path], None]] = {
    "RecipeError": wrong_recipe,
    "StorageError": path_that_leaves_the_store,
    "ObjectNotFound": no_table,
    "AlreadyExists": no_lease,
    "ShardDamaged": cut_tar,
    "WeightsError": other_weights,
    "ContractMismatch": other_contract,
    "TableDamaged": no_record,
    "PruneRefused": many_gone,
    "ShardsFailed": failed_shard,
    "LabelError": one_class,
    "BundleError": no_bundle,
    "ClusterError": no_gpus,
    "HeldBack": dark_night,
}


@pytest.mark.parametrize("name", PROVOKED)
def test_what_is_provoked_reads_as_on_the_page(
    name: str,
    messages: dict[str, list[str]],
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("ENGINE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ALL_ERRORS[name]) as caught:
        PROVOKED[name](tmp_path)
    assert str(caught.value).replace(str(tmp_path), "") in messages[name]
