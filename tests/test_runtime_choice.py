"""What `runtime: auto` and a reduced precision come to, with real networks and photos, and with planted faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from engine import runtime_choice
from engine.backbones.kinds import EfficientNetLite0Config, build_backbone
from engine.errors import RecipeError
from engine.runtime_choice import Images, choose_runtime, probe_accuracy, probe_samples
from engine.runtimes.base import FrozenGraph
from engine.runtimes.kinds import (
    OpenVINORuntimeConfig,
    ResolvedRuntime,
    TensorFlowRuntimeConfig,
    freeze_network,
)
from engine.storage import StorageConfig

SIDE = 64
FLOAT32 = TensorFlowRuntimeConfig()
FLOAT16 = TensorFlowRuntimeConfig(precision="float16")
BFLOAT16 = TensorFlowRuntimeConfig(precision="bfloat16")
OPENVINO = OpenVINORuntimeConfig(kind="openvino")


@dataclass
class Loaded:
    graph: FrozenGraph
    network: Any
    scaling: Any

    def keras(self, pixels_NSS3: np.ndarray) -> np.ndarray:
        if not len(pixels_NSS3):  # oneDNN of some processors has no convolution of nothing
            return np.empty((0, self.graph.width), np.float32)
        scaled = np.asarray(self.scaling.apply(pixels_NSS3.astype(np.float32)), np.float32)
        return np.asarray(self.network(scaled, training=False))


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    built = build_backbone(EfficientNetLite0Config(weights="package", input_size=SIDE), StorageConfig())
    return Loaded(freeze_network(built.network, built.scaling, SIDE), built.network, built.scaling)


def photos(count: int) -> Images:
    from skimage import data

    sources = [data.chelsea(), data.coffee(), data.astronaut()]
    rng = np.random.default_rng(1)
    pixels = []
    for number in range(count):
        photo = sources[number % 3]
        top, left = (int(rng.integers(0, edge - SIDE + 1)) for edge in photo.shape[:2])
        pixels.append(photo[top : top + SIDE, left : left + SIDE])
    return Images(np.stack(pixels), (None,) * count)


def choose(
    loaded: Loaded, candidates: list[ResolvedRuntime], images: Images, keras: Any = None
) -> tuple[ResolvedRuntime, dict[str, runtime_choice.Trial]]:
    chosen, trials = choose_runtime(
        candidates, loaded.graph, keras or loaded.keras, lambda count: images, None, False
    )
    return chosen, {f"{trial.kind} {trial.precision}": trial for trial in trials}


def test_tensorflow_in_float32_alone_is_taken_without_reading_an_image(loaded: Loaded) -> None:
    def never(_count: int) -> Images:
        raise AssertionError

    assert choose_runtime([FLOAT32], loaded.graph, loaded.keras, never, None, False) == (FLOAT32, [])


def test_the_faster_one_that_keeps_the_contract_is_taken_and_all_are_told_of(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_choice, "TIMED_SECONDS", 0.3)
    chosen, trials = choose(loaded, [FLOAT32, OPENVINO, FLOAT16], photos(64))
    assert trials.keys() == {"tensorflow float32", "openvino float32", "tensorflow float16"}
    kept = {name: trial.images_per_second for name, trial in trials.items() if trial.refused is None}
    assert {"tensorflow float32", "openvino float32"} <= kept.keys(), trials
    assert f"{chosen.kind} {chosen.precision}" == max(kept, key=lambda name: kept[name] or 0)
    assert all((trial.cosine or 0) >= 0.9999 for name, trial in trials.items() if name.endswith("float32"))
    reduced = trials["tensorflow float16"]
    assert reduced.cosine is not None and 0.99 < reduced.cosine < 1
    assert reduced.probe_accuracy_float32 is not None and reduced.probe_accuracy_float32 > 0.2
    assert (
        reduced.probe_samples == 1024
    )  # as many as are wanted: a small network judges them within its seconds


def test_a_runtime_that_gives_other_numbers_than_keras_is_refused(loaded: Loaded) -> None:
    def other(pixels_NSS3: np.ndarray) -> np.ndarray:
        return loaded.keras(pixels_NSS3) + 0.2 * np.arange(loaded.graph.width) / loaded.graph.width

    with pytest.raises(RecipeError, match="openvino float32: cosine 0.9.* to Keras") as caught:
        choose(loaded, [OPENVINO], photos(16), keras=other)
    assert "runtime.precision: float32, or auto" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"MIN_REDUCED_COSINE": 0.9999999}, "tensorflow bfloat16: cosine 0.9"),
        ({"MIN_REDUCED_COSINE": 0.5, "MAX_PROBE_LOSS": -1.0}, "tensorflow bfloat16: linear probe 0."),
    ],
)
def test_a_reduced_precision_must_keep_both_directions_and_classes(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, change: dict[str, float], found: str
) -> None:
    for name, value in {"TIMED_SECONDS": 0.1, "PROBE_SAMPLES": 128, **change}.items():
        monkeypatch.setattr(runtime_choice, name, value)
    with pytest.raises(RecipeError, match=found):
        choose(loaded, [BFLOAT16], photos(16))
    chosen, trials = choose(loaded, [FLOAT32, BFLOAT16], photos(16))
    assert chosen == FLOAT32 and found.partition(": ")[2] in (trials["tensorflow bfloat16"].refused or "")


def test_too_few_images_judge_nothing(loaded: Loaded) -> None:
    with pytest.raises(RecipeError, match="only 5 images were found to judge it by, 8 are needed"):
        choose(loaded, [FLOAT16], photos(5))
    none = Images(np.empty((0, SIDE, SIDE, 3), np.uint8), ())
    with pytest.raises(RecipeError, match="no image in the archive"):
        choose(loaded, [OPENVINO], none)


def test_a_probe_tells_classes_apart_and_notices_lost_information() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(400) % 8
    embeddings = rng.normal(0, 1, (8, 32))[classes] + 0.3 * rng.normal(0, 1, (400, 32))
    assert probe_accuracy(embeddings, classes) > 0.98
    assert probe_accuracy(np.round(embeddings / 4), classes) < 0.95
    assert probe_accuracy(rng.normal(0, 1, (400, 32)), classes) < 0.3


def test_classes_are_the_labels_where_there_are_enough_of_them_else_the_images() -> None:
    images = photos(24)
    labelled = Images(images.pixels_NSS3, ("a",) * 10 + ("b",) * 9 + ("c",) + (None,) * 4)
    pixels, classes = probe_samples(labelled, 1000)
    assert classes.tolist() == [0] * 10 + [1] * 9  # `c` is too rare, the others have none
    np.testing.assert_array_equal(pixels, images.pixels_NSS3[:19])
    windows, classes = probe_samples(images, 240)
    assert (windows.shape, windows.dtype, len(set(classes.tolist()))) == ((240, SIDE, SIDE, 3), np.uint8, 15)
    assert len({window.tobytes() for window in windows}) > 200
