"""A head of one's own: its code is imported, its weights stored, and another version of it is refused."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BundleError, RecipeError
from engine.heads.bundle import TrainedHead, open_bundle, publish_bundle
from engine.heads.confidence import softmax
from engine.heads.kinds import CustomHeadConfig, build_head, open_head
from engine.predictor import Predictor
from engine.storage import open_store

SOURCE = '''
import keras

class Wide(keras.Model):
    """Subclassed, with a Lambda layer: nothing that Keras would load in safe mode."""
    def __init__(self, classes):
        super().__init__()
        self.square = keras.layers.Lambda(lambda x: x * x)
        self.hidden = keras.layers.Dense(6, "relu")
        self.drop = keras.layers.Dropout(0.5)
        self.out = keras.layers.Dense(classes)

    def call(self, x, training=False):
        return self.out(self.drop(self.hidden(self.square(x)), training=training))

def wide(width, classes):
    return Wide(classes)

def fails(width, classes):
    raise ZeroDivisionError("no such width")

def narrow(width, classes):
    return keras.Sequential([keras.Input((width,)), keras.layers.Dense(classes - 1)])

def text(width, classes):
    return "a head"

number = 7
'''

ODD = """
sizes = [5, 4]

def odd(width, classes):
    hidden = keras.layers.Dense(sizes.pop())
    return keras.Sequential([keras.Input((width,)), hidden, keras.layers.Dense(classes)])
"""

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_module(source: str) -> None:
        (tmp_path / "my_heads.py").write_text(source)
        sys.modules.pop("my_heads", None)
        importlib.invalidate_caches()

    write_module(SOURCE)
    yield write_module
    sys.modules.pop("my_heads", None)


def config(function: str = "wide", sha256: str | None = None) -> CustomHeadConfig:
    return CustomHeadConfig(kind="custom", build=f"my_heads.{function}", source_sha256=sha256)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_published_head_is_built_anew_with_its_weights(
    tmp_path: Path, write: Write, is_scaled: bool
) -> None:
    rng = np.random.default_rng(0)
    head, network = open_head(config()), build_head(config(), 7, 3, seed=0)
    rows = (4 + rng.normal(size=(20, 7))).astype(np.float32)
    wanted = network(rows).numpy()
    if is_scaled:
        subtract_D, multiply_D = rng.normal(size=7), rng.uniform(0.5, 2, 7)
        wanted = network(((rows - subtract_D) * multiply_D).astype(np.float32)).numpy()
        network = head.absorb_scaling(network, subtract_D, multiply_D)
    store = open_store(str(tmp_path / "bundle"))
    record = {"fingerprint": "f", "width": 7}
    trained = TrainedHead(config(), network, tuple("abc"), "single_label")
    publish_bundle(store, trained, table_record=record, metrics={}, recipe={})
    bundle = open_bundle(store)
    assert "head" not in bundle.manifest.files, "code may be in it"
    stated = bundle.manifest.head
    assert isinstance(stated, CustomHeadConfig) and stated.source_sha256 is not None
    np.testing.assert_allclose(Predictor(bundle, 3).probabilities(rows), softmax(wanted), atol=1e-5)

    write(SOURCE + "\n# another version\n")
    with pytest.raises(RecipeError, match="its source is not the one that is meant"):
        open_bundle(store).network()
    (tmp_path / "my_heads.py").unlink()
    sys.modules.pop("my_heads")
    with pytest.raises(RecipeError, match=r"(?s)cannot be imported here.*PYTHONPATH"):
        open_bundle(store).network()


def test_the_seed_decides_how_it_starts(write: Write) -> None:
    del write
    first, same, other = (build_head(config(), 7, 3, seed).get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(first, same, strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", "(?s)the function failed for width 7 and 3 classes.*no such width"),
        ("narrow", r"(?s)not a head.*\(2, 2\) for two rows.*\(None, 3\)"),
        ("text", "(?s)not a head.*str"),
        ("number", "(?s)not a function.*int"),
        ("nothing", "(?s)cannot be imported here.*nothing"),
    ],
)
def test_what_is_no_head_is_refused(write: Write, function: str, message: str) -> None:
    del write
    with pytest.raises(RecipeError, match=message):
        build_head(config(function), 7, 3, seed=0)


def test_a_function_that_builds_another_network_each_time_is_told_of(tmp_path: Path, write: Write) -> None:
    write(SOURCE + ODD)
    store = open_store(str(tmp_path / "bundle"))
    trained = TrainedHead(config("odd"), build_head(config("odd"), 7, 3, 0), tuple("abc"), "single_label")
    record = {"fingerprint": "f", "width": 7}
    publish_bundle(store, trained, table_record=record, metrics={}, recipe={})
    with pytest.raises(BundleError, match="builds another network than was fitted"):
        open_bundle(store).network()
