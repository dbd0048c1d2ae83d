"""Fine-tuning: what it is worth on two real image sets, and how fast it is beside a Keras `fit` written by hand.

    python -m tests.benchmarks.finetuning [--only sets | throughput] [--quick]
    python -m tests.benchmarks.finetuning shards digits FOLDER     (that set as a tar shard, split as with seed 0)

Sets: EfficientNet-Lite0 (ImageNet weights) at 96 px, all layers but BatchNorm unfrozen, three seeds of split and order;
test accuracy of the head on frozen features, and after fine-tuning.

    digits    1,797 handwritten digits of 8 x 8 pixels (scikit-learn)
    animals   2,000 of 10,000 outlines of ten animals, 28 x 28 pixels (pip install --no-deps animal-mnist==0.4, MIT)

Throughput: MobileNetV2 at 160 px, its last thirty layers unfrozen, images of the archive of `throughput.py`. The
program written by hand is one process: tf.data that decodes and keeps the images in memory, and `model.fit`. Rates are
marginal: nine epochs against one, further images / further seconds, so that start-up and decoding do not count; both
validate after each epoch on the same share of the images.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.benchmarks.archive import build_network, make_archive, preprocess_input, read_shard
from tests.benchmarks.head_sets import digits, enlarged, split_of
from tests.benchmarks.report import Ratio
from tests.benchmarks.throughput import REPOSITORY, _result_path, machine_facts

SEEDS = range(3)
BEATS_BY = 3.0  # points
ANIMALS_EACH, ANIMALS_COUNT = 200, 10_000  # of a class, and in all
NETWORK, SIDE_PX, LAYERS, BATCH = "MobileNetV2", 160, 30, 32
EPOCHS = (1, 9)  # with three the rounds of one run differed by a factor of two
IMAGES, QUICK_IMAGES = 2000, 128
ROUNDS = 2


# ---------------------------------------------------------------- sets


def animals() -> tuple[np.ndarray, list[str], list[str]] | None:
    """As `head_sets.digits`; None where the package is not installed."""
    if importlib.util.find_spec("animal_mnist") is None:
        return None
    folder = files("animal_mnist") / "data" / "Animal_MNIST"
    grey_NSS = _pickled_bytes(folder / "animal_data_version_3.gz", ANIMALS_COUNT * 784)
    grey_NSS = grey_NSS.reshape(ANIMALS_COUNT, 28, 28)
    labels_N = _pickled_bytes(folder / "animal_label_version_3.gz", ANIMALS_COUNT * 8).view(np.int64)
    kept = np.concatenate([np.flatnonzero(labels_N == label)[:ANIMALS_EACH] for label in np.unique(labels_N)])
    return enlarged(grey_NSS[kept]), [str(label) for label in labels_N[kept]], []


def _pickled_bytes(file: Any, size: int) -> np.ndarray:
    """The numbers of a pickled array, found by the length that stands before them: unpickling could run code."""
    content = gzip.decompress(file.read_bytes())
    begin = content.index(b"B" + struct.pack("<I", size)) + 5
    return np.frombuffer(content, np.uint8, size, begin).copy()


SETS: dict[str, Callable[[], tuple[np.ndarray, list[str], list[str]] | None]] = {
    "digits": digits,
    "animals": animals,
}


def set_result(name: str, quick: bool, folder: Path) -> dict[str, Any] | None:
    """Accuracies before and after for each seed; None where there is no such set here."""
    if (found_set := SETS[name]()) is None:
        print(f"{name}: skipped, its package is not installed")
        return None
    pixels_NSS3, classes, halves = found_set
    before, after, intervals = [], [], []
    for seed in SEEDS if not quick else range(1):
        split_N = split_of(len(classes), halves, seed)
        if quick:
            split_N[200:] = ""
        shards = folder / f"{name}-{seed}"
        _write_set(shards, pixels_NSS3, classes, split_N)
        summary = _engine(_set_recipe(shards, folder / f"{name}-{seed}-bundle", seed, 1 if quick else 12))
        found = summary["comparison"]
        before.append(found["before"])
        after.append(found["after"])
        intervals.append([found["low"], found["high"]])
        print(f"{name} seed {seed}: {found}", flush=True)
    return {"rows": len(classes), "before": before, "after": after, "intervals": intervals}


def _write_set(shards: Path, pixels_NSS3: np.ndarray, classes: list[str], split_N: np.ndarray) -> None:
    """As PNG in one tar, with class and split beside each."""
    import tarfile

    shards.mkdir(parents=True)
    with tarfile.open(shards / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, (pixels, label, split) in enumerate(zip(pixels_NSS3, classes, split_N, strict=True)):
            if not split:
                continue
            _, png = cv2.imencode(".png", pixels[..., ::-1])
            for ending, content in (
                ("png", png.tobytes()),
                ("cls", label.encode()),
                ("json", json.dumps({"split": str(split)}).encode()),
            ):
                entry = tarfile.TarInfo(f"{row:05d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _set_recipe(shards: Path, out: Path, seed: int, epochs: int) -> dict[str, Any]:
    return {
        "source": {
            "kind": "webdataset",
            "uri": str(shards),
            "image": ["png"],
            "label": "cls",
            "metadata": ["json:split"],
        },
        "backbone": {"kind": "efficientnet_lite0", "input_size": 96},
        "unfreeze": "all",
        "split": {"column": "split"},
        "head_phase": {
            "optimizer": {"kind": "adam", "learning_rate": 0.003},
            "training": {"epochs": 100, "batch_size": 64, "patience": 5, "seed": seed},
        },
        "augment": {"flip": False, "crop": 0.2, "rotation": 8, "translation": 0.05},
        "optimizer": {"kind": "adam", "learning_rate": 3e-4, "warmup_epochs": 1, "schedule": "cosine"},
        "training": {
            "epochs": epochs,
            "batch_size": 32,
            "patience": epochs,
            "label_smoothing": 0.1,
            "seed": seed,
        },
        "strategy": {"kind": "one_device"},
        "publish": "always",
        "output": {"uri": str(out)},
    }


# ---------------------------------------------------------------- throughput


def throughput(quick: bool, folder: Path) -> dict[str, Any]:
    """Marginal rates of both, alternating."""
    images = QUICK_IMAGES if quick else IMAGES
    archive = make_archive(folder, images)
    ask = [sys.executable, "-m", "tests.benchmarks.archive", "weights", NETWORK, str(SIDE_PX), str(folder)]
    weights = subprocess.run(ask, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    path = Path(weights.splitlines()[-1])
    seconds: dict[str, dict[int, list[float]]] = {"engine": {}, "keras_fit": {}}
    for _ in range(1 if quick else ROUNDS):
        for epochs in EPOCHS:
            for name, found in seconds.items():
                started = time.monotonic()
                out = folder / f"out-{time.monotonic_ns()}"
                if name == "engine":
                    _engine(_throughput_recipe(archive, path, out, epochs))
                else:
                    _by_hand(archive, path, epochs)
                found.setdefault(epochs, []).append(time.monotonic() - started)
                print(f"{name}, {epochs} epochs: {found[epochs][-1]:.1f} s", flush=True)
    train = int(0.8 * images)
    rates = {
        name: train * (EPOCHS[1] - EPOCHS[0]) / (min(found[EPOCHS[1]]) - min(found[EPOCHS[0]]))
        for name, found in seconds.items()
    }
    return {"images": images, "seconds": seconds, "images_per_second": rates}


def _throughput_recipe(archive: Path, weights: Path, out: Path, epochs: int) -> dict[str, Any]:
    return {
        "source": {"kind": "webdataset", "uri": str(archive), "label": "cls"},
        "backbone": {
            "kind": "keras_application",
            "name": NETWORK,
            "weights": str(weights),
            "input_size": SIDE_PX,
        },
        "unfreeze": {"top_layers": LAYERS},
        "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
        "head_phase": {"training": {"epochs": 1}},
        "training": {"epochs": epochs, "batch_size": BATCH, "patience": 100, "clip_norm": None},
        "strategy": {"kind": "one_device"},
        "publish": "always",
        "output": {"uri": str(out)},
    }


def _engine(recipe: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(json.dumps(recipe))
        file.flush()
        command = [sys.executable, "-m", "jobs.cli", "finetune", file.name, "--json"]
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"engine finetune ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return summary


def _by_hand(archive: Path, weights: Path, epochs: int) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.finetuning",
        "by-hand",
        str(archive),
        str(weights),
        str(epochs),
    ]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(
            f"the program written by hand ended with {ended.returncode}:\n{ended.stderr[-3000:]}"
        )


def by_hand(archive: Path, weights: Path, epochs: int) -> None:
    """`model.fit` on images that tf.data has decoded once and keeps; BatchNorm frozen, all oneDNN."""
    import keras
    import tensorflow as tf

    samples = [jpeg for path in sorted(archive.glob("*.tar")) for _, jpeg in read_shard(path)]
    classes = np.random.default_rng(0).integers(0, 12, len(samples))
    train = int(0.8 * len(samples))

    def decode(encoded: Any, label: Any) -> Any:
        image = tf.io.decode_jpeg(encoded, channels=3)
        return tf.cast(tf.image.resize(image, (SIDE_PX, SIDE_PX)), tf.uint8), label

    def dataset(jpegs: list[bytes], labels: np.ndarray) -> Any:
        found = tf.data.Dataset.from_tensor_slices((jpegs, labels))
        return found.map(decode, num_parallel_calls=2).cache()

    scale = preprocess_input(NETWORK)

    def scaled(image: Any, label: Any) -> Any:
        return scale(tf.cast(image, tf.float32)), label

    flip = keras.layers.RandomFlip("horizontal")
    training = dataset(samples[:train], classes[:train]).shuffle(train).batch(BATCH)
    training = training.map(lambda image, label: (flip(image, training=True), label)).map(scaled).prefetch(4)
    validation = dataset(samples[train:], classes[train:]).batch(BATCH).map(scaled).prefetch(4)
    backbone = build_network(NETWORK, SIDE_PX)
    backbone.load_weights(weights)
    for layer in backbone.layers:
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = layer in backbone.layers[-LAYERS - 1 :] and not is_norm
    inputs = keras.Input((SIDE_PX, SIDE_PX, 3))
    logits = keras.layers.Dense(12)(backbone(inputs, training=False))
    model = keras.Model(inputs, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # XLA, which Keras would take by itself, is many times slower on a CPU.
    model.compile(keras.optimizers.Adam(1e-5), loss, metrics=["accuracy"], jit_compile=False)
    model.fit(training, validation_data=validation, epochs=epochs, verbose=0)


# ---------------------------------------------------------------- both


def main() -> None:
    if sys.argv[1:2] == ["by-hand"]:
        by_hand(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    if sys.argv[1:2] == ["shards"]:
        if (found_set := SETS[sys.argv[2]]()) is None:
            raise SystemExit(f"{sys.argv[2]}: its package is not installed")
        pixels_NSS3, classes, halves = found_set
        _write_set(Path(sys.argv[3]), pixels_NSS3, classes, split_of(len(classes), halves, 0))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("sets", "throughput"), help="default: both")
    parser.add_argument("--quick", action="store_true", help="see that it all runs; the figures mean nothing")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine_facts(), "quick": options.quick}
    judged: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="engine-finetuning-") as folder:
        if options.only != "throughput":
            sets = {name: set_result(name, options.quick, Path(folder)) for name in SETS}
            found["sets"] = {name: one for name, one in sets.items() if one is not None}
            for name, one in found["sets"].items():
                gain = 100 * float(np.mean(one["after"]) - np.mean(one["before"]))
                judged.append(Ratio(f"{name}/points above its frozen head", gain, BEATS_BY))
        if options.only != "sets":
            found["throughput"] = throughput(options.quick, Path(folder))
            rates = found["throughput"]["images_per_second"]
            judged.append(Ratio("engine finetune/keras fit", rates["engine"] / rates["keras_fit"], 1.0))
    found["ratios"] = [
        {"name": one.name, "value": one.value, "goal": one.goal, "verdict": one.verdict} for one in judged
    ]
    path = _result_path(REPOSITORY / "tests" / "benchmarks" / "results")
    path = path.with_name(path.stem + "-finetuning.json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(*(one.line() for one in judged), f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
