"""A network that came from a .keras file is fine-tuned, cut or whole, and published as one again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backbones.kinds import KerasFileConfig, build_backbone
from engine.heads.bundle import open_bundle
from engine.resolve import Network, resolve
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.storage import StorageConfig, open_store
from tests.backbones.small_networks import uneven_network
from tests.finetuning import test_finetune
from tests.finetuning.test_finetune import SIDE, run, trace

# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def block(folder: Path, **fields: Any) -> dict[str, Any]:
    """The recipe's block for a network that is saved here."""
    path = folder / "network.keras"
    if not path.exists():
        uneven_network(SIDE).save(path)
    stated = {"kind": "keras_file", "weights": str(path), "input_size": SIDE, "scaling": "none"}
    return stated | fields


def test_it_learns_and_is_published_as_a_file_that_extracting_takes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"backbone": block(tmp_path), "training": {"epochs": 2}, "unfreeze": "all"}
    summary, _ = run(tmp_path, **changes)
    assert summary["trainable"] == 512  # of 576: BatchNorms stay as they are
    config = KerasFileConfig.model_validate(summary["backbone"])
    assert config.weights.endswith(".keras")
    found = resolve(Network(config, TensorFlowRuntimeConfig(), StorageConfig()), None)
    assert found.fingerprint == summary["fingerprint"]
    before = build_backbone(KerasFileConfig.model_validate(block(tmp_path)), StorageConfig()).network
    after = build_backbone(config, StorageConfig()).network
    changed = {
        weight.path: not np.array_equal(weight.value, other.value)
        for weight, other in zip(before.weights, after.weights, strict=True)
    }
    assert {path.rsplit("/", 1)[-1] for path, has in changed.items() if not has} == {
        "gamma", "beta", "moving_mean", "moving_variance",
    }  # fmt: skip
    again, _ = run(tmp_path, **changes)
    assert again["backbone"] == summary["backbone"], "the same bytes, digest and name"


def test_one_that_is_cut_is_published_as_it_is_cut(tmp_path: Path) -> None:
    summary, _ = run(
        tmp_path,
        backbone=block(tmp_path, layer="stem_bn", pooling="max"),
        unfreeze={"from_layer": "stem"},
        training={"epochs": 1, "precision": "mixed_bfloat16"},
    )
    assert (summary["backbone"]["layer"], open_bundle(open_store(summary["bundle"])).manifest.width) == (
        None,
        8,
    )
    config = KerasFileConfig.model_validate(summary["backbone"])
    network = build_backbone(config, StorageConfig()).network
    assert {layer.compute_dtype for layer in network.layers} == {"float32"}
    assert resolve(Network(config, TensorFlowRuntimeConfig(), StorageConfig()), None).graph.width == 8


def test_two_devices_give_the_trace_of_one(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"backbone": block(tmp_path), "unfreeze": "all"}
    (tmp_path / "one").mkdir()
    wanted = trace(tmp_path / "one", **changes)
    strategy = {"kind": "mirrored", "devices_per_worker": 2}
    command = [
        sys.executable,
        test_finetune.__file__,
        json.dumps(changes | {"strategy": strategy}),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(test_finetune.ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["replicas"] == 2
    np.testing.assert_allclose(found["losses"], wanted["losses"], atol=1e-4)
