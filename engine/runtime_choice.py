"""Which runtime a table is made with: what keeps the accuracy contract is timed, and the fastest taken.

The contract, on images of the archive: float32 within cosine 0.9999 of Keras; a reduced precision within 0.999 of it,
and a linear probe on its embeddings within 0.3 points of the probe on float32's.

The probe is ridge regression to one column per class, two-fold cross-validated, in closed form. Its classes are the
archive's labels where there are enough of them; else each image is a class of its own, whose samples are windows of
it: telling apart what hardly differs is where lost precision shows first.

Shape letters: N images, W windows, S side in pixels, D embedding width, K classes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.embedder import MIN_CANARY_COSINE, MIN_REDUCED_COSINE, Embedder, cosine_per_row
from engine.errors import EngineError, RecipeError

if TYPE_CHECKING:
    from engine.runtimes.base import FrozenGraph
    from engine.runtimes.kinds import ResolvedRuntime

MAX_PROBE_LOSS = 0.003
KERAS_IMAGES = 8  # Keras runs on so many: it is slow
MIN_IMAGES = 8  # of the archive, to judge a reduced precision by
PROBE_SAMPLES = 1024
PROBE_SECONDS = 10.0  # of the float32 runtime: a slow network is judged by fewer samples
MIN_SAMPLES_PER_CLASS = 8
TIMED_SECONDS = 1.5
_RIDGE = 1e-2  # of the mean variance of a feature


@dataclass(frozen=True)
class Images:
    """Decoded images of the archive.

    Attributes:
        pixels_NSS3: uint8, RGB.
        labels: of each; None where it has none.
    """

    pixels_NSS3: np.ndarray
    labels: tuple[str | None, ...]


@dataclass(frozen=True)
class Trial:
    """What was measured of one candidate; kept in `_table.json`.

    Attributes:
        images_per_second: of the network alone, in the process that tried it; None if there was no other to try.
        cosine: the lowest to Keras (float32) or to the float32 runtime (a reduced precision).
        probe_accuracy, probe_accuracy_float32: of the linear probe; None where it was not called for.
        probe_samples: how many it was fitted on and judged by.
        refused: why it was not taken; None where it keeps the contract.
    """

    kind: str
    precision: str
    images_per_second: float | None = None
    cosine: float | None = None
    probe_accuracy: float | None = None
    probe_accuracy_float32: float | None = None
    probe_samples: int | None = None
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_runtime(
    candidates: Sequence[ResolvedRuntime],
    graph: FrozenGraph,
    keras_embed: Callable[[np.ndarray], np.ndarray],
    images: Callable[[int], Images],
    num_threads: int | None,
    use_gpu: bool,
) -> tuple[ResolvedRuntime, list[Trial]]:
    """The fastest candidate that keeps the contract. A single TensorFlow float32 is taken without a trial: the graph is
    TensorFlow's own.

    Args:
        candidates: as `engine.runtimes.kinds.candidates` gives them.
        keras_embed: uint8 (N, S, S, 3) -> float32 (N, D), by the Keras network itself.
        images: reads so many of them from the archive; not called where nothing is to be tried.

    Raises:
        RecipeError: none keeps the contract.
    """
    if len(candidates) == 1 and (candidates[0].kind, candidates[0].precision) == ("tensorflow", "float32"):
        return candidates[0], []
    is_reduced = any(candidate.precision != "float32" for candidate in candidates)
    sample = images(PROBE_SAMPLES if is_reduced else KERAS_IMAGES)
    judge = _Judge(graph, keras_embed, sample, num_threads, use_gpu, is_timed=len(candidates) > 1)
    trials = [judge.trial(candidate) for candidate in candidates]
    kept = [
        (trial.images_per_second or 0.0, -place)
        for place, trial in enumerate(trials)
        if trial.refused is None
    ]
    if not kept:
        raise RecipeError(
            "runtime: no precision and kind that the recipe allows keeps the accuracy contract on this archive",
            found="; ".join(f"{trial.kind} {trial.precision}: {trial.refused}" for trial in trials),
            wanted=f"cosine at least {MIN_CANARY_COSINE} (float32), {MIN_REDUCED_COSINE} (else), and a linear probe "
            f"at most {100 * MAX_PROBE_LOSS:.1f} points below float32's",
            way_out="runtime.precision: float32, or auto, which takes a reduced one only where that is harmless",
        )
    return candidates[-max(kept)[1]], trials


class _Judge:
    def __init__(
        self,
        graph: FrozenGraph,
        keras_embed: Callable[[np.ndarray], np.ndarray],
        images: Images,
        num_threads: int | None,
        use_gpu: bool,
        is_timed: bool,
    ) -> None:
        self._graph, self._images, self._is_timed = graph, images, is_timed
        self._num_threads, self._use_gpu = num_threads, use_gpu
        self._keras_ND = keras_embed(images.pixels_NSS3[:KERAS_IMAGES])
        self._reference: _Reference | None = None

    def trial(self, candidate: ResolvedRuntime) -> Trial:
        trial = Trial(candidate.kind, candidate.precision)
        try:
            embedder = Embedder(self._graph, candidate, self._num_threads, self._use_gpu)
            if candidate.precision == "float32":
                return self._float32(trial, embedder)
            return self._reduced(trial, embedder)
        except (EngineError, RuntimeError, ValueError, NotImplementedError) as error:
            if isinstance(error, RecipeError):
                raise
            return replace(trial, refused=f"does not run here: {' '.join(str(error).split())[:200]}")

    def _float32(self, trial: Trial, embedder: Embedder) -> Trial:
        if len(self._keras_ND) == 0:
            return replace(trial, refused="there is no image in the archive to try it on")
        found_ND = embedder.embed(self._images.pixels_NSS3[:KERAS_IMAGES])
        cosine = float(cosine_per_row(found_ND, self._keras_ND).min())
        trial = replace(trial, cosine=cosine, images_per_second=self._rate(embedder))
        if not cosine >= MIN_CANARY_COSINE:
            return replace(trial, refused=f"cosine {cosine:.6f} to Keras")
        return trial

    def _reduced(self, trial: Trial, embedder: Embedder) -> Trial:
        if len(self._images.pixels_NSS3) < MIN_IMAGES:
            count = len(self._images.pixels_NSS3)
            return replace(
                trial, refused=f"only {count} images were found to judge it by, {MIN_IMAGES} are needed"
            )
        if self._reference is None:
            self._reference = _reference(self._graph, self._images, self._num_threads, self._use_gpu)
        reference = self._reference
        found_WD = embedder.embed(reference.pixels_WSS3)
        cosine = float(cosine_per_row(found_WD, reference.embeddings_WD).min())
        trial = replace(
            trial,
            cosine=cosine,
            images_per_second=self._rate(embedder),
            probe_accuracy=probe_accuracy(found_WD, reference.classes_W),
            probe_accuracy_float32=reference.accuracy,
            probe_samples=len(reference.classes_W),
        )
        if not cosine >= MIN_REDUCED_COSINE:
            return replace(trial, refused=f"cosine {cosine:.5f} to float32")
        if trial.probe_accuracy is None or trial.probe_accuracy < reference.accuracy - MAX_PROBE_LOSS:
            return replace(
                trial,
                refused=f"linear probe {trial.probe_accuracy:.4f}, with float32 {reference.accuracy:.4f}, "
                f"of {trial.probe_samples:,} samples",
            )
        return trial

    def _rate(self, embedder: Embedder) -> float | None:
        """Images per second of the network, fed with many at once as a part does; None where nothing hangs on it."""
        if not self._is_timed:
            return None
        pixels = self._images.pixels_NSS3
        batch = pixels[np.arange(256) % len(pixels)]
        embedder.embed(batch[:64])
        done, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < TIMED_SECONDS:
            step = batch if done else batch[:64]  # a slow network is not held up by 256 images
            embedder.embed(step)
            done += len(step)
        return round(done / seconds, 1)


@dataclass(frozen=True)
class _Reference:
    """What a reduced precision is held against."""

    pixels_WSS3: np.ndarray
    classes_W: np.ndarray
    embeddings_WD: np.ndarray
    accuracy: float


def _reference(graph: FrozenGraph, images: Images, num_threads: int | None, use_gpu: bool) -> _Reference:
    from engine.runtimes.kinds import TensorFlowRuntimeConfig

    float32 = Embedder(graph, TensorFlowRuntimeConfig(), num_threads, use_gpu)
    float32.embed(images.pixels_NSS3[:MIN_IMAGES])  # what a first run prepares is not the network's time
    started = time.perf_counter()
    float32.embed(images.pixels_NSS3[:MIN_IMAGES])
    affordable = PROBE_SECONDS * MIN_IMAGES / (time.perf_counter() - started)
    count = int(min(PROBE_SAMPLES, max(64, affordable)))
    pixels_WSS3, classes_W = probe_samples(images, count)
    embeddings_WD = float32.embed(pixels_WSS3)
    return _Reference(pixels_WSS3, classes_W, embeddings_WD, probe_accuracy(embeddings_WD, classes_W))


def probe_samples(images: Images, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (W, S, S, 3) and a class number for each: labelled images, or windows of images.

    Args:
        count: W, about.
    """
    labelled = Counter(label for label in images.labels if label is not None)
    classes = sorted(label for label, number in labelled.items() if number >= MIN_SAMPLES_PER_CLASS)
    if len(classes) >= 2:
        rows = [row for row, label in enumerate(images.labels) if label in classes][:count]
        return images.pixels_NSS3[rows], np.array([classes.index(images.labels[row] or "") for row in rows])
    sources = images.pixels_NSS3[: max(MIN_IMAGES, count // (2 * MIN_SAMPLES_PER_CLASS))]
    each = max(2, count // len(sources))
    rng = np.random.default_rng(0)
    windows = [_window(source, rng) for source in sources for _ in range(each)]
    return np.stack(windows), np.repeat(np.arange(len(sources)), each)


def _window(image_SS3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Between 40 and 100 % of the sides, anywhere, perhaps mirrored, back at its size by nearest neighbour."""
    side = len(image_SS3)
    inner = int(rng.integers(max(1, 2 * side // 5), side + 1))
    top, left = rng.integers(0, side - inner + 1, 2)
    places = np.arange(side) * inner // side
    window: np.ndarray = image_SS3[top + places][:, left + places]
    return window[:, ::-1] if rng.random() < 0.5 else window


def probe_accuracy(embeddings_WD: np.ndarray, classes_W: np.ndarray) -> float:
    """Share of samples that a linear classifier, fitted on the other half of them, puts into their class."""
    features = np.asarray(embeddings_WD, np.float64)
    features = features - features.mean(axis=0)
    features /= np.sqrt((features**2).mean()) or 1.0
    targets_WK = np.eye(int(classes_W.max()) + 1)[classes_W]
    gram_WW = features @ features.T  # the dual form: W is smaller than D for most networks, and bounded
    half = np.random.default_rng(0).permutation(len(features)) % 2 == 0  # labels may come in turns
    right = 0
    for fitted in (half, ~half):
        inside = gram_WW[np.ix_(fitted, fitted)]
        strength = _RIDGE * np.trace(inside) / len(inside)
        weights = np.linalg.solve(inside + strength * np.eye(len(inside)), targets_WK[fitted])
        answers = (gram_WW[np.ix_(~fitted, fitted)] @ weights).argmax(axis=1)
        right += int((answers == classes_W[~fitted]).sum())
    return right / len(features)
