"""The kinds that engine/docs/extending.md adds keep what every kind of their rooms keeps."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine.runtimes.kinds import freeze_network
from engine.storage import StorageConfig, open_store
from tests.contracts import test_backbone_contract as backbones
from tests.contracts import test_head_contract as heads
from tests.contracts import test_runtime_contract as runtimes
from tests.contracts import test_shard_contract as shards
from tests.contracts import test_strategy_contract as strategies

BLOCK = re.compile(r"^```python\n# ([\w/.]+\.py)(?:, in (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Opener = Callable[..., Any]
# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Page:
    """The examples of the page, put where their first lines say, for as long as a test takes.

    Args:
        text: of the page.
        patch: what puts everything back.
    """

    def __init__(self, text: str, patch: pytest.MonkeyPatch) -> None:
        self._blocks, self._patch = BLOCK.findall(text), patch

    def add(self, room: str) -> ModuleType:
        """All that the page puts into a room; its menu, which then has the new kind."""
        menu = importlib.import_module(f"engine.{room}.kinds")
        for path, function, code in self._blocks:
            if not path.startswith(f"engine/{room}/"):
                continue
            if function:
                self._patch.setattr(menu, function, self._with_branch(menu, function, code))
            elif path.endswith("/kinds.py"):
                self.put_into(menu, code)
            else:
                self._new_module(path, code)
        return menu

    def put_into(self, module: ModuleType, code: str) -> None:
        """Run a block where it would stand in a module that is there."""
        names = {**vars(module)}
        exec(compile(code, str(module.__file__), "exec"), names)
        for name, value in names.items():
            if vars(module).get(name) is not value and not name.startswith("__"):
                self._patch.setattr(module, name, value, raising=False)

    def of(self, path: str) -> str:
        """The block of a path outside of the engine."""
        (code,) = [code for there, _, code in self._blocks if there == path]
        return code

    def _new_module(self, path: str, code: str) -> None:
        name = path.removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        exec(compile(code, path, "exec"), vars(module))
        self._patch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        self._patch.setattr(sys.modules[parent], own, module, raising=False)

    def _with_branch(self, menu: ModuleType, function: str, code: str) -> Opener:
        """The function of the menu with the page's branch at its beginning."""
        original = getattr(menu, function)
        arguments = ", ".join(inspect.signature(original).parameters)
        source = f"def branch({arguments}):\n{textwrap.indent(textwrap.dedent(code), '    ')}"
        made: dict[str, Any] = {}
        exec(source, {**vars(menu)}, made)

        def opened(*given: Any, **named: Any) -> Any:
            bound = inspect.signature(original).bind(*given, **named)
            bound.apply_defaults()
            answer = made["branch"](*bound.arguments.values())
            return original(*given, **named) if answer is None else answer

        return opened


@pytest.fixture
def page(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page((repository / "engine/docs/extending.md").read_text(encoding="utf-8"), monkeypatch)


def promises(suite: ModuleType, *fixtures: str) -> list[Any]:
    """The tests of a contract that are of one kind, for they take one of these fixtures; each with its parameters."""
    found = []
    for name, test in vars(suite).items():
        if name.startswith("test_") and {*fixtures} & {*inspect.signature(test).parameters}:
            cases: list[dict[str, Any]] = [{}]
            for mark in getattr(test, "pytestmark", []):
                names, values = mark.args
                split = [name.strip() for name in names.split(",")]
                cases = [
                    {**case, **dict(zip(split, value if len(split) > 1 else [value], strict=True))}
                    for case in cases
                    for value in values
                ]
            found += [
                pytest.param(test, case, id="-".join([name, *map(str, case.values())])) for case in cases
            ]
    return found


def kept(promise: Callable[..., None], given: dict[str, Any]) -> None:
    """Run a test of a contract with these fixtures."""
    promise(**{name: given[name] for name in inspect.signature(promise).parameters})


@pytest.mark.parametrize(("promise", "case"), promises(shards, "reader", "kind"))
def test_the_shard_kind_keeps_the_contract(
    page: Page,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    promise: Callable[..., None],
    case: dict[str, Any],
) -> None:
    menu = page.add("shards")
    monkeypatch.setattr(shards, "KINDS", {**shards.KINDS})
    monkeypatch.setattr(shards, "open_reader", menu.open_reader)
    for name in ("json", "base64"):
        monkeypatch.setattr(shards, name, importlib.import_module(name), raising=False)
    monkeypatch.setattr(shards, "JsonLinesSource", menu.JsonLinesSource, raising=False)
    page.put_into(shards, page.of("tests/contracts/test_shard_contract.py"))
    kind, store = shards.KINDS["jsonl"], open_store(str(tmp_path / "source"))
    given = {"kind": kind, "store": store, "tmp_path": tmp_path}
    given["reader"] = menu.open_reader(kind.source(store.uri), shards.MAX_SAMPLE_BYTES)
    if "shard" in inspect.signature(promise).parameters:
        given["shard"] = store.write("x.jsonl", kind.encode(shards.RECORDS))
    kept(promise, {**given, **case})


def two_convs(page: Page, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's backbone, in its suite."""
    menu = page.add("backbones")
    monkeypatch.setattr(backbones, "KINDS", {**backbones.KINDS})
    monkeypatch.setattr(backbones, "build_backbone", menu.build_backbone)
    monkeypatch.setattr(backbones, "TwoConvsConfig", menu.TwoConvsConfig, raising=False)
    page.put_into(backbones, page.of("tests/contracts/test_backbone_contract.py"))
    return backbones.built("two_convs")


@pytest.mark.parametrize(("promise", "case"), promises(backbones, "backbone"))
def test_the_backbone_keeps_the_contract(
    page: Page,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    promise: Callable[..., None],
    case: dict[str, Any],
) -> None:
    backbone = two_convs(page, monkeypatch)
    side = backbones.SIDE
    pixels = np.arange(3 * side * side * 3).reshape(3, side, side, 3) ** 2 % 253
    scaled = np.asarray(backbone.scaling.apply(pixels.astype(np.float32)), np.float32)
    kept(
        promise,
        {"kind": "two_convs", "backbone": backbone, "scaled_pixels": scaled, "tmp_path": tmp_path, **case},
    )


@pytest.mark.parametrize(("promise", "case"), promises(runtimes, "opened"))
def test_the_runtime_keeps_the_contract(
    page: Page, monkeypatch: pytest.MonkeyPatch, promise: Callable[..., None], case: dict[str, Any]
) -> None:
    """Over the page's own backbone."""
    from skimage import data

    menu = page.add("runtimes")
    page.add("backbones")
    config = importlib.import_module("engine.backbones.kinds").TwoConvsConfig(
        input_size=runtimes.SIDE, seed=11
    )
    backbone = importlib.import_module("engine.backbones.two_convs").build(config, StorageConfig())
    graph = freeze_network(backbone.network, backbone.scaling, runtimes.SIDE)
    runtime = menu.open_runtime(menu.PlainRuntimeConfig(kind="plain", batch_size=4), graph, None)
    assert type(runtime).__name__ == "PlainRuntime"
    corners = [(0, 0), (40, 130), (100, 200), (180, 60), (20, 20), (90, 10), (150, 250)]
    photos = np.stack([data.chelsea()[y : y + runtimes.SIDE, x : x + runtimes.SIDE] for y, x in corners])
    kept(promise, {"opened": runtimes.Opened(backbone, runtime, "float32"), "photos": photos, **case})


@pytest.mark.parametrize(("promise", "case"), promises(heads, "head", "config"))
def test_the_head_keeps_the_contract(
    page: Page, monkeypatch: pytest.MonkeyPatch, promise: Callable[..., None], case: dict[str, Any]
) -> None:
    menu = page.add("heads")
    monkeypatch.setattr("engine.training.loop.open_head", menu.open_head)
    config = menu.CosineHeadConfig(kind="cosine")
    kept(promise, {"config": config, "head": menu.open_head(config), **case})


def test_a_function_of_ones_own_is_a_head(
    page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_heads.py").write_text(page.of("my_heads.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    menu = importlib.import_module("engine.heads.kinds")
    network = menu.build_head(menu.CustomHeadConfig(kind="custom", build="my_heads.wide"), 7, 3, seed=0)
    assert network(heads.rows()).shape == (13, 3)
    monkeypatch.delitem(sys.modules, "my_heads")


def test_the_strategy_keeps_the_contract(page: Page, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    menu = page.add("strategies")
    monkeypatch.setattr(strategies, "StrategyConfig", menu.OneCpu)
    monkeypatch.setattr(strategies, "open_strategy", menu.open_strategy)
    found = strategies.trace('{"kind": "one_cpu"}', tmp_path)
    monkeypatch.undo()
    strategies.assert_same_trace(found, 1)
