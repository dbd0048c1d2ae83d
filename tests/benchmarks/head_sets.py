"""Accuracy of the engine's linear head beside scikit-learn's on real image sets that come with packages, and suspects.

    python -m tests.benchmarks.head_sets

Features are EfficientNet-Lite0's (ImageNet weights) at 96 px. Both contenders have the same rows for training,
validation and test, five times over with other seeds; each takes the best of five strengths on the validation rows.
Wrong labels: one in twenty of all rows is given another class at random, and the suspects are looked for.

    demo     720 crops of 12 photos; left halves train and validate, right halves test
    digits   1,797 handwritten digits of 8 x 8 pixels (scikit-learn)
    faces    200 pictures of 25 x 25 pixels, half of them faces (scikit-image)

Shape letters: N rows, S side in pixels, D embedding width.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.heads import FLIPPED, engine, flipped_labels, lbfgs, scikit_learn
from tests.benchmarks.report import Ratio
from tests.benchmarks.throughput import REPOSITORY, _result_path, machine_facts

SIDE_PX = 96
SEEDS = range(5)


def demo() -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """Pixels (N, S, S, 3), classes, and halves."""
    from engine.images import ImageRejected, decode_image
    from jobs.demo_images import write_demo_shards

    pixels, classes, halves = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        write_demo_shards(Path(folder))
        for shard in sorted(Path(folder).glob("*.tar")):
            with tarfile.open(shard) as archive:
                contents = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
                for name, file in contents.items():
                    label = contents.get(name.removesuffix(".jpg") + ".cls")
                    if not name.endswith(".jpg") or label is None or file is None:
                        continue
                    try:
                        decoded = decode_image(file.read(), SIDE_PX, "stretch", 10**7)
                    except ImageRejected:  # two samples of the demo are broken on purpose
                        continue
                    pixels.append(decoded.pixels_SS3)
                    classes.append(label.read().decode())
                    halves.append(shard.name.split("-")[0])
    return np.stack(pixels), classes, halves


def digits() -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """As `demo`, without halves."""
    from sklearn.datasets import load_digits

    images_N88, classes_N = load_digits(return_X_y=True)
    grey = (images_N88.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    return enlarged(grey), [str(number) for number in classes_N], []


def faces() -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """As `digits`; the first hundred are faces (scikit-image, lfw_subset)."""
    content = files("skimage").joinpath("data", "lfw_subset.npy").read_bytes()
    grey = (255 * np.load(io.BytesIO(content))).clip(0, 255).astype(np.uint8)
    return enlarged(grey), ["face"] * 100 + ["other"] * 100, []


def enlarged(grey_NSS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, SIDE_PX, SIDE_PX, 3)."""
    large = [cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR) for image in grey_NSS]
    return np.repeat(np.stack(large)[..., None], 3, axis=3)


def features(pixels_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, D)."""
    from engine.backbones.kinds import EfficientNetLite0Config
    from engine.embedder import Embedder
    from engine.resolve import Network, resolve
    from engine.runtimes.kinds import TensorFlowRuntimeConfig
    from engine.storage import StorageConfig

    backbone = EfficientNetLite0Config(weights="package", input_size=SIDE_PX)
    found = resolve(Network(backbone, TensorFlowRuntimeConfig(), StorageConfig()), None)
    return Embedder(found.graph, found.runtime).embed(pixels_NSS3)


def split_of(count: int, halves: list[str], seed: int) -> NDArray[np.str_]:
    """Three fifths train, a fifth each validate and test; of the demo the right halves test."""
    random = np.random.default_rng(seed)
    if halves:
        drawn_N = random.choice(["train", "validation"], count, p=[0.8, 0.2])
        return np.where(np.array(halves) == "test", "test", drawn_N)
    return random.choice(["train", "validation", "test"], count, p=[0.6, 0.2, 0.2])


def measured(name: str) -> dict[str, Any]:
    """Accuracies of both, for each seed, and what became of wrong labels."""
    pixels_NSS3, classes, halves = {"demo": demo, "digits": digits, "faces": faces}[name]()
    embeddings_ND = features(pixels_NSS3)
    names, classes_N = np.unique(classes, return_inverse=True)
    ours, theirs, hits, found, changed = [], [], 0, 0, 0
    for seed in SEEDS:
        split_N = split_of(len(classes_N), halves, seed)
        settings = lbfgs(int((split_N == "train").sum()))
        ours.append(engine(embeddings_ND, classes_N, settings, split_N)["accuracy"])
        theirs.append(scikit_learn(embeddings_ND, classes_N, split_N)["accuracy"])
        wrong_N, flipped = flipped_labels(classes_N, seed)
        looked = settings | {"suspects": {"folds": 5}}
        suspects = set(engine(embeddings_ND, wrong_N, looked, split_N)["suspects"])
        hits, found, changed = hits + len(suspects & flipped), found + len(suspects), changed + len(flipped)
    return {
        "rows": len(classes_N),
        "classes": len(names),
        "engine": ours,
        "scikit-learn": theirs,
        "flipped": FLIPPED,
        "suspects_precision": hits / max(1, found),
        "suspects_recall": hits / changed,
    }


def main() -> None:
    found, judged = {}, []
    for name in ("demo", "digits", "faces"):
        found[name] = one = measured(name)
        print(f"{name:8} {one}", flush=True)
        difference = 100 * (np.mean(one["engine"]) - np.mean(one["scikit-learn"]))
        judged += [
            Ratio(f"{name}/points above scikit-learn", float(difference), 0.0),
            Ratio(f"{name}/suspects, precision", one["suspects_precision"], 0.8),
            Ratio(f"{name}/suspects, recall", one["suspects_recall"], 0.6),
        ]
    ratios = [
        {"name": one.name, "value": one.value, "goal": one.goal, "verdict": one.verdict} for one in judged
    ]
    path = _result_path(REPOSITORY / "tests" / "benchmarks" / "results")
    path = path.with_name(path.stem + "-head-sets.json")
    path.write_text(
        json.dumps({"machine": machine_facts(), "sets": found, "ratios": ratios}, indent=1) + "\n"
    )
    print(*(one.line() for one in judged), f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
