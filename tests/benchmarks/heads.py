"""Accuracy and time of the engine's linear head beside scikit-learn's logistic regression, and what a grid costs.

    python -m tests.benchmarks.heads            # 50,000 rows of width 1280 in 100 classes
    python -m tests.benchmarks.heads --quick    # see that it runs; the figures mean nothing

Rows are seeded mixtures of real features (EfficientNet-Lite0 on windows of the demo's photos): a class is a mixture of
three of them, a row lies between its class and any other feature. Contenders are processes of their own, one after the
other. Seconds beside scikit-learn's are those of fitting and choosing, without imports; what a grid saves is counted in
seconds of whole processes, since separate fits are separate processes.

    scikit-learn    StandardScaler, LogisticRegression (lbfgs), the best of five C on the validation rows
    engine          `fit_head` with lbfgs, a grid of the same five strengths, the best on the validation rows
    engine, one     `fit_head` with one head and adam
    engine, twelve  `fit_head` with a grid of twelve heads; `12 x one` is what they would take one after the other

Shape letters: M real features, N rows, D embedding width.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tests.benchmarks.report import Ratio
from tests.benchmarks.throughput import REPOSITORY, _result_path, machine_facts

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # scikit-learn's C
FLIPPED = 0.05
ADAM = {"training": {"epochs": 30, "batch_size": 512, "patience": 3, "standardise": True}}
TWELVE = {"learning_rate": [0.0003, 0.001, 0.003], "weight_decay": [0.0, 0.03, 0.1, 0.3]}
SIDE_PX, WINDOWS = 96, 8


def real_features(folder: Path) -> NDArray[np.float32]:
    """(M, D) features of windows of the demo's crops."""
    from engine.backbones.kinds import EfficientNetLite0Config
    from engine.embedder import Embedder
    from engine.recipes import Limits
    from engine.resolve import Archive, Network, images_of, resolve
    from engine.runtime_choice import probe_samples
    from engine.runtimes.kinds import TensorFlowRuntimeConfig
    from engine.shards.kinds import WebDatasetSource
    from engine.storage import StorageConfig, open_store
    from jobs.demo_images import write_demo_shards

    write_demo_shards(folder)
    store = open_store(str(folder))
    shards = tuple(info for info in store.list() if info.path.endswith(".tar"))
    source = WebDatasetSource(uri=str(folder), image=("jpg",))
    backbone = EfficientNetLite0Config(weights="package", input_size=SIDE_PX)
    network = Network(backbone, TensorFlowRuntimeConfig(), StorageConfig())
    images = images_of(Archive(source, Limits(), shards), network, 720)
    windows, _ = probe_samples(images, WINDOWS * len(images.pixels_NSS3))
    resolved = resolve(network, None)
    return Embedder(resolved.graph, resolved.runtime).embed(np.concatenate([images.pixels_NSS3, windows]))


def mixed(
    features_MD: NDArray[np.float32], rows: int, classes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embeddings (N, D) and the class of each."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(3), classes)[:, :, None]
    centres = (shares * features_MD[random.integers(0, len(features_MD), (classes, 3))]).sum(axis=1)
    classes_N = random.integers(0, classes, rows)
    nearness_N1 = random.uniform(0.1, 0.5, (rows, 1))
    others_ND = features_MD[random.integers(0, len(features_MD), rows)]
    embeddings_ND = nearness_N1 * centres[classes_N] + (1 - nearness_N1) * others_ND
    return embeddings_ND.astype(np.float32), classes_N


def split_of(rows: int) -> NDArray[np.str_]:
    """Four fifths train, a tenth validates, a tenth tests."""
    return np.random.default_rng(1).choice(["train", "validation", "test"], rows, p=[0.8, 0.1, 0.1])


def scikit_learn(
    embeddings_ND: NDArray[np.float32],
    classes_N: NDArray[np.int64],
    split_N: NDArray[np.str_] | None = None,
) -> dict[str, Any]:
    """Accuracy and seconds, with the best of five strengths on the validation rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    split_N = split_of(len(classes_N)) if split_N is None else split_N
    part = {name: (embeddings_ND[split_N == name], classes_N[split_N == name]) for name in set(split_N)}
    started = time.perf_counter()
    tried = {}
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(
            *part["train"]
        )
        tried[strength] = (model.score(*part["validation"]), model)
    best = max(tried, key=lambda strength: tried[strength][0])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "accuracy": tried[best][1].score(*part["test"]), "C": best}


def lbfgs(rows: int) -> dict[str, Any]:
    """Settings with the strengths that scikit-learn has for so many training rows."""
    return {
        "optimizer": {"kind": "lbfgs"},
        "training": {"epochs": 1000, "patience": 25, "standardise": True},
        "grid": {"l2": [1 / (strength * rows) for strength in STRENGTHS]},
    }


def engine(
    embeddings_ND: NDArray[np.float32],
    classes_N: NDArray[np.int64],
    settings: dict[str, Any],
    split_N: NDArray[np.str_] | None = None,
) -> dict[str, Any]:
    """Accuracy, seconds and what became of the labels, from a bundle that `fit_head` publishes."""
    from engine.heads.bundle import open_bundle
    from engine.storage import StorageConfig, open_store
    from engine.training.fit import fit_head
    from engine.training.kinds import FitSettings

    count, width = embeddings_ND.shape
    flat = pa.array(embeddings_ND.reshape(-1))
    table = pa.table(
        {
            "key": [f"{row:06d}" for row in range(count)],
            "shard": ["made"] * count,
            "index": np.arange(count),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
            "label": [f"class {number:03d}" for number in classes_N],
            "split": (split_of(count) if split_N is None else split_N).tolist(),
        }
    )
    document = {"split": {"column": "split"}, "suspects": {"folds": 0}, "strategy": {"kind": "one_device"}}
    record = {"fingerprint": "f" * 64, "width": width}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        started = time.perf_counter()
        fitted = FitSettings.model_validate(document | settings)
        summary = fit_head(table, record, fitted, StorageConfig(), store, lambda report: None)
        seconds = time.perf_counter() - started
        assert summary is not None  # it is the only worker
        bundle = open_bundle(store)
        metrics = bundle.document("metrics")
        suspects = bundle.document("suspects")["suspects"] if "suspects" in bundle.manifest.files else []
    coverage = metrics["test"]["coverage"]
    return {
        "seconds": seconds,
        "accuracy": metrics["test"]["accuracy"],
        "calibration": metrics["calibration"],
        "calibration_error": metrics["test"]["calibration_error"],
        "coverage_rises_by": max(
            (after["accuracy"] - before["accuracy"] for before, after in pairwise(coverage)), default=0.0
        ),
        "published": summary["published"],
        "epochs": summary["epochs"],
        "suspects": [int(suspect["key"]) for suspect in suspects],
    }


def flipped_labels(classes_N: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], set[int]]:
    """Labels of which one in twenty was changed at random, and which rows these are."""
    random = np.random.default_rng([2, seed])
    num_classes = int(classes_N.max()) + 1
    changed = random.permutation(len(classes_N))[: round(FLIPPED * len(classes_N))]
    wrong_N = classes_N.copy()
    wrong_N[changed] = (classes_N[changed] + random.integers(1, num_classes, len(changed))) % num_classes
    return wrong_N, set(changed.tolist())


CONTENDERS: dict[str, Callable[[NDArray[np.float32], NDArray[np.int64]], dict[str, Any]]] = {
    "scikit-learn": scikit_learn,
    "engine": lambda embeddings, classes: engine(
        embeddings, classes, lbfgs(int((split_of(len(classes)) == "train").sum()))
    ),
    "engine, one": lambda embeddings, classes: engine(embeddings, classes, ADAM),
    "engine, twelve": lambda embeddings, classes: engine(embeddings, classes, ADAM | {"grid": TWELVE}),
}


def ratios(found: dict[str, dict[str, Any]]) -> list[Ratio]:
    """Beside their goals."""
    theirs, ours = found["scikit-learn"], found["engine"]
    return [
        Ratio("heads/points above scikit-learn", 100 * (ours["accuracy"] - theirs["accuracy"]), -0.1),
        Ratio("heads/seconds / scikit-learn", ours["seconds"] / theirs["seconds"], 0.5, at_most=True),
        Ratio(
            "heads/twelve / 12 x one",
            found["engine, twelve"]["process_seconds"] / (12 * found["engine, one"]["process_seconds"]),
            0.5,
            at_most=True,
        ),
        Ratio("heads/calibration error", ours["calibration_error"], 0.03, at_most=True),
        Ratio("heads/coverage: accuracy rises by at most", ours["coverage_rises_by"], 0.01, at_most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "benchmarks" / "results")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        with np.load(options.rows) as rows:
            print(json.dumps(CONTENDERS[options.contender](rows["embeddings_ND"], rows["classes_N"])))
        return
    count, classes = (2_000, 10) if options.quick else (50_000, 100)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="engine-heads-") as folder:
        embeddings_ND, classes_N = mixed(real_features(Path(folder) / "shards"), count, classes)
        rows = Path(folder) / "rows.npz"
        np.savez(rows, embeddings_ND=embeddings_ND, classes_N=classes_N)
        for name in CONTENDERS:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.heads",
                "--contender",
                name,
                "--rows",
                str(rows),
            ]
            started = time.perf_counter()
            done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
            of_process = {"process_seconds": time.perf_counter() - started}
            found[name] = json.loads(done.stdout.splitlines()[-1]) | of_process
            print(f"{name:16} {found[name]}", flush=True)
    judged = ratios(found)
    document = {
        "machine": machine_facts(),
        "quick": options.quick,
        "rows": count,
        "classes": classes,
        "heads": found,
        "ratios": [
            {"name": one.name, "value": one.value, "goal": one.goal, "verdict": one.verdict} for one in judged
        ],
    }
    path = _result_path(options.out)
    path = path.with_name(path.stem + "-heads.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(*(one.line() for one in judged), f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
