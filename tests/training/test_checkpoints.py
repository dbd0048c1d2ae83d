"""A training that was interrupted ends as one that was not, and takes up nothing that is not its own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import StorageError
from engine.heads.kinds import CustomHeadConfig, LinearHeadConfig, MlpHeadConfig
from engine.storage import Store, open_store
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training.checkpoints import Checkpoints, State
from engine.training.grid import Candidate
from engine.training.kinds import AdamConfig, LbfgsConfig, SgdConfig, TrainingConfig
from engine.training.loop import Trained, train_heads
from tests.training.test_loop import made_rows

MLP = MlpHeadConfig(kind="mlp", hidden=(8,), dropout=0.3)
STILL = MlpHeadConfig(kind="mlp", hidden=(8,), dropout=0)
GRIDS = {
    "adam": [
        Candidate(LinearHeadConfig(), AdamConfig(learning_rate=0.2)),  # is over first: others are recompiled
        Candidate(MLP, AdamConfig(learning_rate=0.01, schedule="cosine", warmup_epochs=2)),
        Candidate(LinearHeadConfig(), AdamConfig(learning_rate=0.003)),
    ],
    "sgd": [Candidate(LinearHeadConfig(), SgdConfig(kind="sgd", learning_rate=0.02))],
    "lbfgs": [
        Candidate(LinearHeadConfig(), LbfgsConfig(kind="lbfgs", l2=l2, tolerance=1e-3)) for l2 in (1.0, 0.001)
    ]
    + [Candidate(STILL, LbfgsConfig(kind="lbfgs"))],
}


class Interruption(Exception):
    """As if the process had been killed."""


def train(tried: list[Candidate], checkpoints: Checkpoints | None, until: int = 1_000) -> list[Trained]:
    def report(epoch: dict[str, Any]) -> None:
        if epoch["epoch"] > until:
            raise Interruption

    config = TrainingConfig(epochs=20, batch_size=16, patience=2)
    rows = made_rows()
    return train_heads(tried, open_strategy(OneDevice()), rows, config, report, None, checkpoints)


def checkpoints_in(folder: Path, training: str = "0123456789abcdef0", seconds: float = 0) -> Checkpoints:
    return Checkpoints(open_store(str(folder)), training, seconds, writes=True)


@pytest.mark.parametrize("optimizer", GRIDS)
def test_an_interrupted_training_ends_as_one_that_was_not(
    optimizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried = GRIDS[optimizer]
    undisturbed = train(tried, None)
    for epoch in (1, 3, 7):
        with pytest.raises(Interruption):
            train(tried, checkpoints_in(tmp_path), until=epoch)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.0123456789abcdef.npz"]
    resumed = train(tried, checkpoints_in(tmp_path))
    assert "interrupted after epoch 7 goes on" in caplog.text
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        assert ours.result == theirs.result
        for one, other in zip(ours.network.get_weights(), theirs.network.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len({len(one.result.history) for one in undisturbed}) > 1 or len(tried) == 1


def test_a_training_that_had_ended_only_takes_its_weights(tmp_path: Path) -> None:
    tried = GRIDS["sgd"]
    (whole,) = train(tried, checkpoints_in(tmp_path))
    (again,) = train(tried, checkpoints_in(tmp_path), until=0)  # not one epoch is run
    assert again.result == whole.result
    np.testing.assert_array_equal(again.network.get_weights()[0], whole.network.get_weights()[0])


def test_another_training_begins_at_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(GRIDS["sgd"], checkpoints_in(tmp_path))
    train(GRIDS["sgd"], checkpoints_in(tmp_path, training="f" * 64))
    assert "goes on" not in caplog.text
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints_in(tmp_path).clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not a zip"])
def test_a_damaged_checkpoint_costs_the_time_until_it_and_a_warning(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoint.0123456789abcdef.npz").write_bytes(content)
    assert checkpoints_in(tmp_path).read() is None
    assert "cannot be read: training starts anew" in caplog.text


def test_a_store_that_fails_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(type(open_store(str(tmp_path)))):  # type: ignore[misc]
        def write(self, path: str, data: bytes) -> Any:
            raise StorageError(f"{path}: no space left")

    store: Store = Full(str(tmp_path), open_store(str(tmp_path)).config)
    (trained,) = train(GRIDS["sgd"], Checkpoints(store, "0" * 16, 0, writes=True))
    assert trained.result == train(GRIDS["sgd"], None)[0].result
    assert "training goes on without" in caplog.text


def test_checkpoints_are_not_written_more_often_than_wished(tmp_path: Path) -> None:
    seldom = checkpoints_in(tmp_path, seconds=3600)
    assert not seldom.is_due
    train(GRIDS["sgd"], seldom)
    assert not list(tmp_path.iterdir())
    unread = Checkpoints(open_store(str(tmp_path)), "0" * 16, 0, writes=False)
    assert not unread.is_due  # another worker writes them
    often = checkpoints_in(tmp_path)
    assert often.is_due
    often.write(State({"epoch": 3}, {"a": np.arange(4.0)}))
    read = often.read()
    assert read is not None and read.facts == {"epoch": 3}
    np.testing.assert_array_equal(read.tensors["a"], np.arange(4.0))


def test_a_custom_head_whose_source_has_changed_is_another_training(tmp_path: Path) -> None:
    from engine.training.fit import _training_digest
    from engine.training.kinds import FitSettings

    rows = made_rows()
    config = CustomHeadConfig(kind="custom", build="changing_head.build")
    tried = [Candidate(config, AdamConfig())]
    digests = []
    for text in ("", "# another\n"):
        (tmp_path / "changing_head.py").write_text(f"{text}def build(width, classes): ...\n")
        sys.path.insert(0, str(tmp_path))
        try:
            importlib.invalidate_caches()
            digests.append(_training_digest(rows, 13, tried, FitSettings(), {"fingerprint": "f"}))
        finally:
            sys.path.remove(str(tmp_path))
            sys.modules.pop("changing_head", None)
    assert digests[0] != digests[1]


def test_a_checkpoint_of_another_training_is_left_alone_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    ours, theirs = (Checkpoints(store, letter * 64, seconds=0, writes=True) for letter in "ab")
    assert ours.read() is None and not caplog.text
    theirs.write(State({"epoch": 3}, {}))
    assert ours.read() is None
    assert f"checkpoint.{'b' * 16}.npz in {store.uri} is of other rows or settings" in caplog.text
    found = theirs.read()
    assert found is not None and found.facts == {"epoch": 3}
