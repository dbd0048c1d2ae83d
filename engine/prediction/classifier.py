"""Images straight to labels with a published bundle: decoded, embedded and classified by the pipeline's own stages.

Everything runs in this process, without Ray, for a person who waits for the answer: the frozen network comes from the
node's cache where a run here has put it there. Not for: archives (`engine score`), or how answers are shown.
Shape letters: H, W sides of a small copy of an image.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import check_recipe
from engine.decisions import PredictionForm, decisions_of
from engine.errors import RecipeError
from engine.extraction import ExtractJob, Part, PartHeader, Setup, decode_part, encoded_part
from engine.heads.bundle import Bundle, open_bundle
from engine.images import decode_image
from engine.labelling import LabelJob, PartLabeller
from engine.prediction.inputs import LIMITS, EncodedImage, find_images
from engine.resolve import Network, resolve, stated_network
from engine.scoring import BundleJob
from engine.shards.base import Sample
from engine.shards.kinds import FilesSource
from engine.storage import StorageConfig, open_store

IMAGES_AT_ONCE = 32
PICTURE_SIDE_PX = 320  # the longer side of the small copy
_HERE, _PLAIN = StorageConfig(), PredictionForm()


@dataclass(frozen=True, slots=True)
class ImagePrediction:
    """What a bundle says of one image: what a row of a prediction table would.

    Attributes:
        image: its name, as it was given.
        label: None: it abstains, or gives any number of labels.
        labels: of a bundle that gives any number of them; None: of one that gives one.
        confidence: of the best candidate.
        top: candidates with their confidences, the best first.
        width_px, height_px: of the upright image.
        sha256: of the encoded bytes, hex.
        picture_HW3: a small copy, uint8, RGB; None where it was not asked for.
    """

    image: str
    label: str | None
    labels: tuple[str, ...] | None
    confidence: float
    top: tuple[tuple[str, float], ...]
    width_px: int
    height_px: int
    sha256: str
    picture_HW3: np.ndarray | None = None

    @property
    def abstains(self) -> bool:
        """No label is given."""
        return not self.labels if self.labels is not None else self.label is None


@dataclass(frozen=True, slots=True)
class ImageReject:
    """An image that cannot be labelled, and why, as the rejects of a table have it.

    Attributes:
        image: its name, as it was given.
        reason: one of `engine.schema.RejectReason`.
        message: a sentence about it.
    """

    image: str
    reason: str
    message: str


Answer = ImagePrediction | ImageReject


@dataclass(frozen=True)
class _Settled:
    """An answer that is there."""

    setup: Setup

    def get(self) -> Setup:
        return self.setup


class ImageClassifier:
    """A bundle with its network, loaded and checked; for as many images as you like.

    Args:
        bundle: opened; its store's config says how weights and label maps are reached.
        form: what it answers.
        num_threads: CPU threads; None: TensorFlow's choice, as in a process that computes something else, too.

    Raises:
        RecipeError: the head takes columns of a table, the form does not fit its classes, or the runtime is not
            installed here.
        BundleError: it is damaged, or does not say which network it belongs to.
        WeightsError, StorageError: the network's weights cannot be read.
        CanaryMismatch: the network is not the one that the bundle was fitted on, or computes other numbers here.
    """

    def __init__(self, bundle: Bundle, form: PredictionForm = _PLAIN, num_threads: int | None = None) -> None:
        _require_images_alone(bundle)
        storage, manifest = bundle.store.config, bundle.manifest
        decisions = decisions_of(form, manifest.classes, storage, bundle.store.uri, manifest.class_ids)
        made_with = bundle.document("embeddings_table")
        backbone, runtime = stated_network(made_with)
        found = resolve(Network(backbone, runtime, storage, num_threads), None, made_with)
        self._job = ExtractJob(
            source=FilesSource(
                uri="/"
            ),  # for its lack of metadata: nothing is read from it or written anywhere
            storage=storage,
            backbone=backbone,
            runtime=runtime,
            limits=LIMITS,
            table_uri="/",
            dtype=made_with["contract"].get(
                "output.dtype", "float32"
            ),  # the numbers that the head was fitted on
            rows_per_part=IMAGES_AT_ONCE,
            decode_threads=len(os.sched_getaffinity(0)),
            embed_threads=num_threads,
        )
        setup = Setup(found.graph, found.runtime, found.fingerprint, found.canary)
        labels = LabelJob((BundleJob(bundle.store.uri, bundle.id, "/", decisions),), keeps_embeddings=False)
        self._label = PartLabeller(self._job, labels, _Settled(setup))
        self.bundle = bundle

    def classify(self, images: Iterable[EncodedImage], pictures: int = 0) -> Iterator[Answer]:
        """An answer for each image, in order; a few dozen are held at a time.

        Args:
            pictures: so many predictions get a small copy of their image.
        """
        given = 0
        for portion in _portions(images):
            for image, answer in zip(portion, self._answers(portion), strict=True):
                if isinstance(answer, ImagePrediction) and given < pictures:
                    given += 1
                    yield _with_picture(answer, image)
                else:
                    yield answer

    def _answers(self, portion: Sequence[EncodedImage]) -> list[Answer]:
        samples = [_sample(index, image) for index, image in enumerate(portion)]
        header = PartHeader("images", "", 0, last=True)
        row = decode_part(self._job, encoded_part(header, samples).to_row())
        part = Part.from_row(self._label(row))
        assert part.samples is not None and part.rejects is not None
        (predictions,) = part.predictions
        assert predictions is not None
        names = [image.name for image in portion]
        answers: dict[int, Answer] = {
            reject["index"]: ImageReject(names[reject["index"]], reject["error"], reject["message"])
            for reject in part.rejects.to_pylist()
        }
        for sample, answer in zip(part.samples.to_pylist(), predictions.to_pylist(), strict=True):
            answers[sample["index"]] = _prediction(names[sample["index"]], sample, answer)
        return [answers[index] for index in range(len(portion))]


def predict_images(
    bundle_uri: str,
    images: Iterable[str | Path | bytes] | str | Path | bytes,
    *,
    storage: StorageConfig = _HERE,
    pictures: int = 0,
    **form: Any,
) -> list[Answer]:
    """Label some images with a bundle; for a notebook, where one call loads everything that it needs.

    For several calls keep an `ImageClassifier`.

    Args:
        bundle_uri: folder of the bundle.
        images: paths or URIs of files and folders; or encoded images, which are called `image 0` and so on, by their
            place. One alone need not be in a list.
        storage: how object storage is reached.
        pictures: so many predictions get a small copy of their image, for `engine.prediction.picture`.
        form: as in the `output` of a score recipe: top_k, min_confidence, label_map, unmapped.

    Returns:
        Of each image what the bundle says of it, or why it says nothing; in their order.

    Raises:
        EngineError: as `ImageClassifier`, `find_images` and `ImageFile.read`.
    """
    checked = check_recipe(PredictionForm, form, "predict_images")
    classifier = ImageClassifier(open_bundle(open_store(bundle_uri, storage)), checked)
    several = [images] if isinstance(images, str | Path | bytes) else images
    return list(classifier.classify(_read(several, storage), pictures))


def _read(images: Iterable[str | Path | bytes], storage: StorageConfig) -> Iterator[EncodedImage]:
    for number, image in enumerate(images):
        if isinstance(image, bytes):
            yield EncodedImage.of_bytes(f"image {number}", image)
        else:
            yield from (file.read() for file in find_images([image], storage))


def _require_images_alone(bundle: Bundle) -> None:
    if bundle.manifest.side_features:
        raise RecipeError(
            f"bundle {bundle.store.uri}: its head takes columns of a table, which an image does not have",
            found=", ".join(one.column for one in bundle.manifest.side_features),
            way_out="score an embedding table with it, or fit without side_features",
        )


def _portions(images: Iterable[EncodedImage]) -> Iterator[tuple[EncodedImage, ...]]:
    rest = iter(images)
    while portion := tuple(itertools.islice(rest, IMAGES_AT_ONCE)):
        yield portion


def _sample(index: int, image: EncodedImage) -> Sample:
    return Sample(
        key=f"{index:09d}",  # not its name, which need not be Unicode
        index=index,
        image=image.encoded,
        label=None,
        metadata=(),
        begin_offset=None,
        end_offset=None,
        problem=image.problem,
        size_bytes=image.size_bytes,
    )


def _prediction(name: str, sample: dict[str, Any], answer: dict[str, Any]) -> ImagePrediction:
    labels = answer.get("labels")
    return ImagePrediction(
        image=name,
        label=answer.get("label"),
        labels=None if labels is None else tuple(labels),
        confidence=answer["confidence"],
        top=tuple(zip(answer["top_labels"], answer["top_confidences"], strict=True)),
        width_px=sample["image_width"],
        height_px=sample["image_height"],
        sha256=sample["sha256"].hex(),
    )


def _with_picture(answer: ImagePrediction, image: EncodedImage) -> ImagePrediction:
    """Decoded once more, larger than the network takes it and with its own aspect."""
    assert image.encoded is not None
    decoded = decode_image(image.encoded, PICTURE_SIDE_PX, "letterbox", LIMITS.max_pixels)
    longer = max(decoded.width_px, decoded.height_px)
    height, width = (
        max(1, (2 * side * PICTURE_SIDE_PX + longer) // (2 * longer))
        for side in (decoded.height_px, decoded.width_px)
    )
    upper, left = (PICTURE_SIDE_PX - height) // 2, (PICTURE_SIDE_PX - width) // 2
    picture_HW3 = decoded.pixels_SS3[upper : upper + height, left : left + width]
    return replace(answer, picture_HW3=picture_HW3)
