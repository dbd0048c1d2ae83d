"""Fine-tuning as a whole, in one process: the same on any number of devices, resumed as if nothing had been.

Strategies of more than one device get a process of their own (this file, run as a program): logical devices must
exist before TensorFlow runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pydantic import TypeAdapter

from engine.backbones.fingerprint import tensor_digest
from engine.backbones.kinds import BackboneConfig, EfficientNetLite0Config, build_backbone
from engine.errors import EngineError, LabelError, OverBudget, RecipeError
from engine.extraction import read_parts
from engine.finetuning import loop, step
from engine.finetuning.finetune import finetune_backbone
from engine.finetuning.images import ImageRows, collect_images
from engine.finetuning.kinds import FinetuneSettings
from engine.finetuning.step import compile_embed
from engine.heads.bundle import open_bundle
from engine.report.page import render_report
from engine.resolve import Network, resolve
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.storage import StorageConfig, open_store
from engine.strategies.kinds import open_strategy
from engine.training.split import assign_splits
from engine.worklist import ShardWork
from tests.extract_jobs import job_without_network
from tests.flows.archives import write_shards

ROOT = Path(__file__).parents[2]
SIDE = 64
SETTINGS: dict[str, Any] = {
    "backbone": {"kind": "efficientnet_lite0", "input_size": SIDE},
    "unfreeze": {"top_layers": 12},
    "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
    "head": {"kind": "mlp", "hidden": [16], "dropout": 0.3},
    "head_phase": {"training": {"epochs": 2, "batch_size": 16, "patience": 5}},
    "augment": {"crop": 0.5, "rotation": 10, "contrast": 0.2, "mixup": 0.3},
    "optimizer": {"learning_rate": 0.001, "schedule": "cosine", "warmup_epochs": 1},
    "training": {
        "epochs": 4,
        "batch_size": 7,
        "patience": 9,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "checkpoint_seconds": 0,
    },
    "strategy": {"kind": "one_device"},
    "publish": "always",
}


def settings(**changes: Any) -> FinetuneSettings:
    """SETTINGS with some blocks changed; a dict changes fields of its block."""
    merged = {
        name: {**SETTINGS.get(name, {}), **value} if isinstance(value, dict) and name != "unfreeze" else value
        for name, value in changes.items()
    }
    return FinetuneSettings.model_validate(SETTINGS | merged)


@contextmanager
def images_in(folder: Path, shards: int = 4, images: int = 15) -> Iterator[ImageRows]:
    """Small crops of two photos, decoded."""
    job = job_without_network(folder, SIDE, rows_per_part=16)
    store = open_store(job.source.uri)
    if not list(store.list()):
        write_shards(store, shards, images)
    works = [ShardWork(shard) for shard in sorted(store.list(), key=lambda one: one.path)]
    with collect_images(read_parts(job, works), [work.shard.path for work in works], SIDE, folder) as rows:
        yield rows


def run(folder: Path, report: Callable[[dict[str, Any]], None] = lambda epoch: None, **changes: Any) -> Any:
    """Fine-tune and publish to `folder`/bundle; summary and comparison."""
    chosen = settings(**changes)
    strategy = open_strategy(chosen.strategy)
    with images_in(folder) as images:
        is_split = chosen.training.images == "split"  # among one
        rows = replace(images, holders_N=np.zeros(len(images), np.int64)) if is_split else images
        store = open_store(str(folder / "bundle"))
        return finetune_backbone(strategy, rows, chosen, StorageConfig(), None, store, report)


def trace(folder: Path, **changes: Any) -> dict[str, Any]:
    """What two runs must agree in: losses of all epochs, and the weights that were published."""
    run(folder, **changes)
    bundle = open_bundle(open_store(str(folder / "bundle")))
    training = bundle.document("metrics")["training"]
    record = bundle.document("embeddings_table")
    config: BackboneConfig = TypeAdapter(BackboneConfig).validate_python(record["backbone"])
    network = build_backbone(config, StorageConfig()).network
    weights = [*network.get_weights(), *bundle.network().get_weights()]
    return {
        "replicas": training["num_replicas"],
        "losses": [
            [epoch["train_loss"], epoch["validation_loss"]]
            for phase in ("head", "backbone")
            for epoch in training[phase]["history"]
        ],
        "sums": [float(np.abs(array).sum(dtype=np.float64)) for array in weights],
        "skipped": training["backbone"]["skipped_steps"],
    }


@cache
def reference() -> dict[str, Any]:
    """The trace of one device."""
    with tempfile.TemporaryDirectory() as folder:
        return trace(Path(folder))


def assert_same(found: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert len(found["losses"]) == 6
    for ours, theirs in zip(found["losses"], reference()["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)
    assert found["sums"] == pytest.approx(reference()["sums"], rel=10 * tolerance)


def test_losses_fall_and_are_those_of_a_golden_run() -> None:
    head, backbone = reference()["losses"][:2], reference()["losses"][2:]
    assert backbone[-1][1] < head[-1][1], (
        "the backbone must learn something for a comparison to mean anything"
    )
    assert [loss for loss, _ in backbone] == pytest.approx(GOLDEN, abs=2e-3)


GOLDEN = [0.5535, 0.573, 0.3491, 0.4399]  # mean losses of four epochs of six steps


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_give_the_trace_of_one(devices: int, tmp_path: Path) -> None:
    strategy = {"kind": "mirrored", "devices_per_worker": devices}
    command = [sys.executable, __file__, json.dumps({"strategy": strategy}), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["replicas"] == devices
    assert_same(found)


def test_portions_of_a_batch_give_the_trace_of_the_whole(tmp_path: Path) -> None:
    assert_same(trace(tmp_path, training={"images_at_once": 3}))


class _Stopped(Exception):
    pass


@contextmanager
def stopped_after(checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is run meanwhile ends when it has written so many checkpoints."""
    written = 0
    write = loop.Checkpoints.write

    def write_and_stop(self: Any, state: Any) -> None:
        nonlocal written
        write(self, state)
        written += 1
        if written == checkpoints:
            raise _Stopped

    with monkeypatch.context() as patched:
        patched.setattr(loop.Checkpoints, "write", write_and_stop)
        with pytest.raises(_Stopped):
            yield


@pytest.mark.parametrize("after", [1, 8])
def test_what_was_killed_between_two_steps_goes_on_as_if_nothing_had_been(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_after(after, monkeypatch):
        run(tmp_path)
    assert list((tmp_path / "bundle").glob("checkpoint.*"))
    assert_same(trace(tmp_path), 1e-6)
    assert not list((tmp_path / "bundle").glob("checkpoint.*"))


def test_an_epoch_that_goes_on_with_images_placed_otherwise_takes_each_of_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Begun where each worker has all images, killed, gone on where they are split, killed, and gone on once more."""
    taken: dict[int, list[np.ndarray]] = {}
    read_ahead = loop.Finetuning._read_ahead

    def noted(self: Any, batches: Any) -> Iterator[Any]:
        for batch, feed in zip(batches, read_ahead(self, batches), strict=True):
            is_image_RB = batch.weights_RB > 0
            taken.setdefault(self._epoch, []).append(batch.rows_RB[is_image_RB])
            yield feed

    monkeypatch.setattr(loop.Finetuning, "_read_ahead", noted)
    split = {"epochs": 3, "batch_size": 7, "checkpoint_seconds": 0, "images": "split"}
    plain = {"augment": {"crop": 0, "rotation": 0, "contrast": 0, "mixup": 0}}  # compiles faster
    with stopped_after(7, monkeypatch):
        run(tmp_path, training={**split, "images": "everywhere"}, **plain)
    assert len(taken[2]) == 2
    assert "placed otherwise" not in caplog.text
    with stopped_after(1, monkeypatch):
        run(tmp_path, training=split, **plain)
    assert len(taken[2]) == 3
    assert "images are placed otherwise than before" in caplog.text
    caplog.clear()
    summary, _ = run(tmp_path, training=split, **plain)
    assert "placed otherwise" not in caplog.text
    assert [len(taken[epoch]) for epoch in (1, 2, 3)] == [5, 5, 5]
    split_rows = open_bundle(open_store(summary["bundle"])).document("metrics")["split"]
    for epoch in (1, 2, 3):
        rows = np.concatenate(taken[epoch])
        assert len(np.unique(rows)) == len(rows) == split_rows["train"]["rows"]
        np.testing.assert_array_equal(np.sort(rows), np.sort(np.concatenate(taken[1])))
    assert summary["images"] == {"placement": "split", "rows_per_worker": [60]}
    assert (summary["epochs"], summary["skipped_steps"]) == (3, 0)


@pytest.mark.parametrize("after", [2, 9])
def test_the_scale_of_the_loss_goes_on_from_where_it_was(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps are skipped, because it begins too high: a scale that began anew would skip more."""
    monkeypatch.setattr(step, "LOSS_SCALE", 2.0**27)
    half = {"training": {"precision": "mixed_float16"}}
    expected = trace(tmp_path / "calm", **half)
    assert 2 < expected["skipped"] < 20
    with stopped_after(after, monkeypatch):
        run(tmp_path / "killed", **half)
    found = trace(tmp_path / "killed", **half)
    assert found["skipped"] == expected["skipped"]
    for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert found["sums"] == pytest.approx(expected["sums"], rel=1e-5)


@pytest.mark.parametrize(("scales", "epochs"), [((2.0**30, 2.0**31), 4), ((1.0, 2.0**30), 1)])
def test_a_training_none_of_whose_steps_could_be_taken_says_so(
    scales: tuple[float, float], epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four epochs where the scale cannot fall, and of one in which it does not fall far enough."""
    monkeypatch.setattr(step, "LOSS_SCALE", 2.0**33)
    monkeypatch.setattr(step, "LOSS_SCALES", scales)
    with pytest.raises(
        EngineError, match=r"5 of 5 steps changed no weights(.|\n)*to mixed_bfloat16 or float32"
    ):
        run(tmp_path, training={"precision": "mixed_float16", "epochs": epochs})
    assert not list((tmp_path / "bundle").glob("bundle*"))


def test_patience_that_was_used_up_before_the_end_is_not_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint of the epoch that was the last one."""
    still = {
        "optimizer": {"learning_rate": 1e-30},
        "training": {"epochs": 5, "patience": 1, "checkpoint_seconds": 0},
    }
    summary, _ = run(tmp_path / "calm", **still)
    assert (summary["epochs"], summary["best_epoch"]) == (1, 0)
    write = loop.Checkpoints.write

    def write_and_stop(self: Any, state: Any) -> None:
        write(self, state)
        if state.facts["history"]:
            raise _Stopped

    with monkeypatch.context() as patched:
        patched.setattr(loop.Checkpoints, "write", write_and_stop)
        with pytest.raises(_Stopped):
            run(tmp_path / "killed", **still)
    summary, _ = run(tmp_path / "killed", **still)
    assert (summary["epochs"], summary["best_epoch"]) == (1, 0)


def test_another_training_to_the_same_place_takes_up_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = loop.Checkpoints.write

    def write_and_stop(self: Any, state: Any) -> None:
        write(self, state)
        raise _Stopped

    with monkeypatch.context() as patched:
        patched.setattr(loop.Checkpoints, "write", write_and_stop)
        with pytest.raises(_Stopped):
            run(tmp_path, training={"epochs": 1})
    assert list((tmp_path / "bundle").glob("checkpoint.*"))
    told: list[dict[str, Any]] = []
    for change in ({"backbone": {"pooling": "max"}}, {"training": {"epochs": 1, "seed": 1}}):
        run(tmp_path, told.append, **{"training": {"epochs": 1}} | change)
    assert [one["epoch"] for one in told if one["phase"] == "backbone"] == [1, 1]
    assert "goes on from there" not in caplog.text


def test_statistics_of_batchnorm_stay_as_they_are_to_the_last_bit(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), unfreeze={"fraction": 1.0, "batch_norm": "scale_and_shift"}, training={"epochs": 1})
        bundle = open_bundle(open_store(f"{folder}/bundle"))
        record = bundle.document("embeddings_table")
        config = EfficientNetLite0Config.model_validate(record["backbone"])
        after = build_backbone(config, StorageConfig()).network
        assert Path(config.weights.removeprefix("file://")).is_file()
    before = build_backbone(EfficientNetLite0Config(input_size=SIDE), StorageConfig()).network
    norms = changed = 0
    for old, new in zip(before.layers, after.layers, strict=True):
        if isinstance(old, keras.layers.BatchNormalization):
            norms += 1
            for name in ("moving_mean", "moving_variance"):
                np.testing.assert_array_equal(getattr(old, name).numpy(), getattr(new, name).numpy())
        elif old.weights:
            changed += not np.array_equal(old.get_weights()[0], new.get_weights()[0])
    assert norms == 49
    assert changed == 49  # every convolution learnt


def test_the_new_weights_have_the_fingerprint_that_extracting_with_them_finds(tmp_path: Path) -> None:
    summary, comparison = run(tmp_path, training={"epochs": 1})
    bundle = open_bundle(open_store(summary["bundle"]))
    record = bundle.document("embeddings_table")
    assert summary["fingerprint"] == bundle.manifest.fingerprint == record["fingerprint"]
    config = EfficientNetLite0Config.model_validate(summary["backbone"])
    found = resolve(Network(config, TensorFlowRuntimeConfig(), StorageConfig()), None)
    assert found.fingerprint == summary["fingerprint"]
    np.testing.assert_allclose(found.canary, record["canary"], rtol=1e-3, atol=1e-4)
    old = build_backbone(EfficientNetLite0Config(input_size=SIDE), StorageConfig())
    assert record["tensor_digest"] != tensor_digest(old.network)
    assert summary["comparison"]["rows"] == comparison.rows > 0
    metrics = bundle.document("metrics")
    assert metrics["training"]["backbone"]["initial_epoch"] == 2
    assert [epoch["epoch"] for epoch in metrics["training"]["backbone"]["history"]] == [3]
    assert metrics["test"]["accuracy"] == pytest.approx(comparison.after)
    page = (tmp_path / "bundle" / "report.html").read_text(encoding="utf-8")
    assert summary["report"] == f"{tmp_path}/bundle/report.html"
    assert page == render_report(bundle.documents())
    assert 'id="learning-backbone-begins"' in page
    told = bundle.documents()
    pictures = {(one["shard"], one["index"]): one for one in told["pictures"]["pictures"]}
    assert pictures and told["pictures"]["missing"] == []
    assert {(row["shard"], row["index"]) for row in told["gallery"]["rows"]} <= set(pictures)
    assert len(told["embedding_map"]["x"]) == summary["comparison"]["rows"]
    assert f"<strong>{100 * comparison.after:.2f} %</strong> after" in page


def test_a_bundle_remembers_what_the_new_backbone_says_of_its_images(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, training={"epochs": 1})
    bundle = open_bundle(open_store(summary["bundle"]))
    found = bundle.reference()
    assert found is not None
    split = bundle.document("metrics")["split"]
    judged = split["validation"]["rows"] + split["test"]["rows"]
    assert (found.rows, found.cosine_counts.sum(), found.is_held_out) == (judged, judged, True)
    config = EfficientNetLite0Config.model_validate(summary["backbone"])
    backbone = build_backbone(config, StorageConfig())
    with images_in(tmp_path) as rows:
        embeddings_ND = compile_embed(backbone.network, backbone.scaling)(rows.pixels(np.arange(len(rows))))
        splits = assign_splits(rows.samples["key"].to_pylist(), None, settings().split)
        labels = np.array(rows.samples["label"].to_pylist())
    held_out_ND = embeddings_ND[splits != "train"]
    moved = np.abs(found.histogram(found.cosines(held_out_ND)) - found.cosine_counts).sum()
    assert moved <= 2, "of a last bit in one row at most"
    units_ND = embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    for name, centroid_D in zip(bundle.manifest.classes, found.centroids_CD, strict=True):
        mean_D = units_ND[(labels == name) & (splits == "train")].mean(axis=0)
        np.testing.assert_allclose(centroid_D, mean_D / np.linalg.norm(mean_D), atol=1e-5)
    given = bundle.network()(held_out_ND).numpy().argmax(axis=1)
    assert found.label_counts_K.tolist() == np.bincount(given, minlength=2).tolist()


def test_a_bundle_is_trained_further_and_another_backbones_is_refused(tmp_path: Path) -> None:
    first, _ = run(tmp_path, training={"epochs": 1})
    bundle = open_bundle(open_store(first["bundle"]))
    further = open_store(str(tmp_path / "further"))
    with images_in(tmp_path) as rows:
        again = settings(backbone=first["backbone"], training={"epochs": 1})
        strategy = open_strategy(again.strategy)
        found = finetune_backbone(strategy, rows, again, StorageConfig(), bundle, further, lambda epoch: None)
        assert found is not None
        summary, comparison = found
        assert summary["head_epochs"] == 0
        assert comparison.before == pytest.approx(first["comparison"]["after"])
        assert open_bundle(further).document("metrics")["training"]["head"] is None
        with pytest.raises(EngineError, match="fitted on another backbone"):
            finetune_backbone(strategy, rows, settings(), StorageConfig(), bundle, further, print)


def test_what_does_not_help_is_not_published(tmp_path: Path) -> None:
    summary, comparison = run(
        tmp_path, publish="if_better", optimizer={"learning_rate": 1e-30}, training={"epochs": 1}
    )
    assert (comparison.difference, summary["bundle"], summary["backbone"]) == (0.0, None, None)
    assert "+0.00 points" in comparison.in_words()
    assert not list((tmp_path / "bundle").glob("*"))


@pytest.mark.parametrize(
    ("precision", "rate", "told"),
    [
        ("float32", 1e30, r"the loss is nan(.|\n)*lower optimizer.learning_rate$"),
        (
            "mixed_float16",
            1e38,
            r"the loss is inf(.|\n)*learning_rate, or set training.precision to mixed_bfloat16",
        ),
        # Its activations end at 6, so the loss is finite; the first step is taken.
        ("mixed_float16", 1e30, r"14 of 15 steps changed no weights(.|\n)*lower optimizer.learning_rate"),
    ],
)
def test_a_rate_at_which_the_loss_explodes_ends_with_what_to_do(
    precision: str, rate: float, told: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=f"finetune: {told}"):
        run(
            tmp_path,
            optimizer={"learning_rate": rate, "warmup_epochs": 0},
            training={"clip_norm": None, "precision": precision},
        )


@pytest.mark.parametrize(("precision", "tolerance"), [("mixed_bfloat16", 0.05), ("mixed_float16", 0.01)])
def test_mixed_precision_learns_and_publishes_float32(
    precision: str, tolerance: float, tmp_path: Path
) -> None:
    found = trace(tmp_path, training={"precision": precision})
    for (train, _), (expected, _) in zip(found["losses"], reference()["losses"], strict=True):
        assert train == pytest.approx(expected, abs=tolerance)
    assert keras.config.dtype_policy().name == "float32"


def test_what_cannot_be_done_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a network that is cut cannot be fine-tuned"):
        run(tmp_path, backbone={"layer": "block5_add"})
    with pytest.raises(LabelError, match="no image to judge by"):
        run(tmp_path, split={"train": 1.0, "validation": 0.0, "test": 0.0})
    with images_in(tmp_path) as rows:
        damaged = ImageRows(rows.samples, {"no_image": 5}, rows._pixels_MSS3, rows._places_N)
        store, strategy = open_store(str(tmp_path)), open_strategy(settings().strategy)
        with pytest.raises(OverBudget, match="5 of 65 samples have no image"):
            finetune_backbone(strategy, damaged, settings(), StorageConfig(), None, store, print)


if __name__ == "__main__":
    target = Path(sys.argv[2])
    (target / "trace.json").write_text(json.dumps(trace(target, **json.loads(sys.argv[1]))))
