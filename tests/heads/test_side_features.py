"""Columns beside embeddings: what they become, that a bundle gives them back, and a head that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from engine.errors import BundleError, LabelError, RecipeError
from engine.export import export_bundle
from engine.heads.bundle import open_bundle
from engine.heads.kinds import SideFeatureConfig
from engine.heads.side_features import SideEncoder
from engine.predictor import Predictor
from engine.storage import StorageConfig, open_store
from engine.training.fit import fit_head
from engine.training.kinds import FitSettings

CONFIGS = (
    SideFeatureConfig(column="camera", kind="categorical"),
    SideFeatureConfig(column="lens", kind="numeric"),
    SideFeatureConfig(column="user", kind="hashed", bins=8),
)
WIDTH = 5
RECORD = {"fingerprint": "f" * 64, "width": WIDTH}


def columns(**given: Any) -> pa.Table:
    return pa.table(given)


SOME = columns(
    camera=["a", "b", None, "", "b", "x\ny\\z"],
    lens=["10", "20", "", None, " 30 ", "nan"],
    user=["u1", "u2", "u3", None, "u1", "u2"],
)


def test_categories_numbers_and_hashes_become_what_they_should_also_after_saving() -> None:
    fitted = SideEncoder.fitted(CONFIGS, SOME, np.arange(6))
    encoder = SideEncoder.from_bytes(CONFIGS, fitted.to_bytes())
    found = fitted.encode(SOME)
    np.testing.assert_array_equal(encoder.encode(SOME), found)
    assert found.dtype == np.float32 and found.shape == (6, encoder.width) == (6, 5 + 1 + 8)
    camera, lens, user = found[:, :5], found[:, 5], found[:, 6:]
    assert camera.sum(axis=1).tolist() == [1.0] * 6
    same = (camera[:, None] == camera[None]).all(axis=2)
    assert same[1, 4] and same[2, 3] and same.sum() == 6 + 2 + 2  # None and "" are one
    assert lens[[2, 3, 5]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)  # missing: the mean
    assert lens[1] == pytest.approx(0, abs=1e-6) and lens[0] == pytest.approx(-lens[4]) and lens[0] < -1
    assert (user[0] == user[4]).all() and user.sum(axis=1).tolist() == [1.0] * 6
    fresh = columns(camera=["unseen", "a"], lens=["25", "10"], user=["u1", "u9"])
    again = encoder.encode(fresh)
    assert again[0, 0] == 1 and not found[:, 0].any()  # the place of all others
    np.testing.assert_array_equal(again[1, :5], camera[0])
    np.testing.assert_array_equal(again[0, 6:], user[0])
    assert encoder.encode(fresh.slice(0, 0)).shape == (0, encoder.width)


def test_columns_that_are_missing_or_hold_no_numbers_are_named() -> None:
    encoder = SideEncoder.fitted(CONFIGS, SOME, np.arange(6))
    with pytest.raises(LabelError, match=r"(?s)no column 'lens'.*camera, user"):
        encoder.encode(SOME.drop_columns(["lens"]))
    with pytest.raises(LabelError, match=r"(?s)'lens' is numeric.*wide"):
        encoder.encode(columns(camera=["a"], lens=["wide"], user=["u"]))
    with pytest.raises(BundleError, match="side features"):
        SideEncoder.from_bytes(CONFIGS, b"not a zip")
    with pytest.raises(ValidationError, match="named twice"):
        FitSettings.model_validate({"side_features": [CONFIGS[0].model_dump()] * 2})
    numbers = columns(camera=["a"], lens=pa.array([4.5]), user=["u"])
    assert np.isfinite(encoder.encode(numbers)).all()


def made_table(count: int = 600, seed: int = 0) -> pa.Table:
    """Two classes that embeddings say nothing of, and the camera nearly everything."""
    rng = np.random.default_rng(seed)
    cameras = rng.choice(["left", "right"], count)
    wrong_N = rng.random(count) < 0.05
    noise = rng.normal(size=(count, WIDTH)).astype(np.float32)
    return pa.table(
        {
            "key": [f"{row:04d}" for row in range(count)],
            "shard": ["a.tar"] * count,
            "index": range(count),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(noise.ravel()), WIDTH),
            "label": np.where((cameras == "left") ^ wrong_N, "l", "r").tolist(),
            "camera": cameras.tolist(),
            "lens": [str(number) for number in rng.normal(size=count)],
        }
    )


@pytest.mark.parametrize("head", [{"kind": "linear"}, {"kind": "mlp", "hidden": [4], "dropout": 0}])
def test_a_head_that_takes_them_knows_more_and_its_bundle_brings_them_along(
    head: dict[str, Any], tmp_path: Path
) -> None:
    side = [CONFIGS[0].model_dump(), CONFIGS[1].model_dump()]
    accuracies = {}
    for name, given in (("with", side), ("without", [])):
        settings = FitSettings.model_validate(
            {
                "head": head,
                "side_features": given,
                "optimizer": {"kind": "lbfgs"},
                "training": {"standardise": True},
                "strategy": {"kind": "one_device"},
            }
        )
        store = open_store(str(tmp_path / name))
        fit_head(made_table(), RECORD, settings, StorageConfig(), store, lambda report: None)
        accuracies[name] = open_bundle(store).document("metrics")["test"]["accuracy"]
    assert accuracies["with"] > 0.9
    assert accuracies["without"] < 0.75
    bundle = open_bundle(open_store(str(tmp_path / "with")))
    predictor = Predictor(bundle, top_k=2)
    assert predictor.columns == ["key", "shard", "index", "embedding", "camera", "lens"]
    fresh = made_table(seed=1)
    answers = predictor.predict_table(fresh)
    right = np.array(answers["label"].to_pylist()) == np.array(fresh["label"].to_pylist())
    assert right.mean() > 0.9
    with pytest.raises(LabelError, match="no column 'camera'"):
        predictor.predict_table(fresh.drop_columns(["camera"]))
    with pytest.raises(RecipeError, match=r"(?s)takes columns of a table.*camera, lens"):
        export_bundle(bundle, open_store(str(tmp_path / "model")), StorageConfig())
    assert bundle.id != open_bundle(open_store(str(tmp_path / "without"))).id


def test_a_column_may_come_from_the_label_file_when_fitting(tmp_path: Path) -> None:
    table = made_table()
    lines = ["key,label,camera"]
    rows = zip(*(table[name].to_pylist() for name in ("key", "label", "camera")), strict=True)
    lines += [",".join(row) for row in rows]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    settings = FitSettings.model_validate(
        {
            "labels": {"uri": str(tmp_path / "labels.csv")},
            "side_features": [CONFIGS[0].model_dump()],
            "optimizer": {"kind": "lbfgs"},
            "strategy": {"kind": "one_device"},
        }
    )
    store = open_store(str(tmp_path / "bundle"))
    without = table.drop_columns(["camera", "label"])
    fit_head(without, RECORD, settings, StorageConfig(), store, lambda report: None)
    bundle = open_bundle(store)
    assert bundle.document("metrics")["test"]["accuracy"] > 0.9
    assert Predictor(bundle, 1).predict_table(table).num_rows == 600
    with pytest.raises(LabelError, match="no column 'camera'"):
        Predictor(bundle, 1).predict_table(without)


def test_numbers_that_training_rows_say_nothing_of_cannot_decide_anything() -> None:
    configs = [SideFeatureConfig(column=name, kind="numeric") for name in ("same", "none", "nearly")]
    seen = columns(same=["5"] * 99 + ["5"], none=[""] * 100, nearly=["7"] * 99 + ["7.1"])
    encoder = SideEncoder.fitted(configs, seen, np.arange(100))
    fresh = encoder.encode(columns(same=["6"], none=["50"], nearly=["1000"]))[0]
    by_column = dict(zip(sorted(("same", "none", "nearly")), fresh.tolist(), strict=True))
    assert (by_column["same"], by_column["none"]) == (0.0, 0.0)
    assert by_column["nearly"] == pytest.approx(10, rel=1e-3)


def test_a_label_file_may_have_fractions_beside_its_labels(tmp_path: Path) -> None:
    table = made_table().drop_columns(["label", "camera", "lens"])
    rng = np.random.default_rng(3)
    age = rng.normal(size=600)
    given = pa.table({"key": table["key"], "label": np.where(age > 0, "old", "new").tolist(), "age": age})
    pa.parquet.write_table(given, tmp_path / "labels.parquet")
    document = {
        "labels": {"uri": str(tmp_path / "labels.parquet")},
        "side_features": [{"column": "age", "kind": "numeric"}],
        "optimizer": {"kind": "lbfgs"},
        "strategy": {"kind": "one_device"},
    }
    store = open_store(str(tmp_path / "bundle"))
    settings = FitSettings.model_validate(document)
    fit_head(table, RECORD, settings, StorageConfig(), store, lambda report: None)
    assert open_bundle(store).document("metrics")["test"]["accuracy"] > 0.9
    absent = FitSettings.model_validate(
        {**document, "side_features": [{"column": "size", "kind": "numeric"}]}
    )
    with pytest.raises(LabelError, match=r"(?s)no column 'size'.*side_features"):
        fit_head(table, RECORD, absent, StorageConfig(), store, lambda report: None)
