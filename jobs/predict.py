"""The predict verb: what a bundle says of some images, for a person or as JSON; writes nothing but a picture, if asked.

Not for: how it is computed (`engine.prediction`), or archives (`engine score`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from engine.errors import ObjectNotFound, OverBudget, RecipeError
from engine.log_lines import plain_text
from engine.storage import StorageConfig, Store, open_store
from jobs.outcome import Outcome, say

if TYPE_CHECKING:
    from engine.decisions import PredictionForm
    from engine.heads.bundle import Bundle
    from engine.prediction.classifier import Answer, ImagePrediction
    from engine.prediction.inputs import EncodedImage

STDIN = "-"
BAR_COLUMNS = 24
LABEL_COLUMNS = 40  # a longer one moves its bar


@dataclass(frozen=True)
class Picture:
    """Where the drawing goes, if there is to be one."""

    folder: Store
    name: str

    @staticmethod
    def at(uri: str, storage: StorageConfig) -> Picture:
        """A name that nothing has yet: a slip of the pen is not to cost anybody a photo.

        Raises:
            RecipeError: something is there, or it is not a name for a picture.
        """
        from engine.prediction.picture import require_picture_name

        require_picture_name(uri)
        folder, _, name = open_store(uri, storage).uri.rpartition("/")
        picture = Picture(open_store(folder or "/", storage), name)
        try:
            picture.folder.info(name)
        except ObjectNotFound:
            return picture
        raise RecipeError(
            f"--save {uri}: something is there already", way_out="remove it, or give another name"
        )

    def draw(self, predictions: Sequence[ImagePrediction]) -> str:
        """Draw and write it; its URI."""
        from engine.prediction.picture import MAX_PICTURES, draw_predictions

        self.folder.write(self.name, draw_predictions(predictions, self.name.rpartition(".")[2].lower()))
        if len(predictions) > MAX_PICTURES:
            say(f"the picture shows the first {MAX_PICTURES} of {len(predictions):,} images", logging.WARNING)
        uri = f"{self.folder.uri.rstrip('/')}/{self.name}"
        say(f"drawn: {uri}", picture=uri)
        return uri


def predict(
    bundle_uri: str,
    places: Sequence[str],
    form: Mapping[str, Any],
    storage: StorageConfig,
    save: str | None,
    console: Console,
) -> Outcome:
    """Label the images at some places and print what is found, image by image.

    Args:
        places: files, folders, URIs; `-` is one image on stdin.
        form: the fields of `engine.decisions.PredictionForm`.
        save: URI of a picture to draw; None: none is drawn.
        console: where answers are printed.

    Raises:
        EngineError: as `engine.prediction.classifier.ImageClassifier` and `engine.prediction.inputs.find_images`.
    """
    from engine.config import check_recipe
    from engine.decisions import PredictionForm
    from engine.heads.bundle import open_bundle
    from engine.prediction.classifier import ImagePrediction
    from engine.prediction.picture import MAX_PICTURES

    started = time.monotonic()
    checked = check_recipe(PredictionForm, form, "predict")
    picture = None if save is None else Picture.at(save, storage)
    images = _images(places, storage)
    bundle = open_bundle(open_store(bundle_uri, storage))
    answers: list[Answer] = []
    for answer in _answers(bundle, checked, images, 0 if picture is None else MAX_PICTURES):
        print_answer(answer, console)
        answers.append(answer)
    predictions = [answer for answer in answers if isinstance(answer, ImagePrediction)]
    drawn = picture.draw(predictions) if picture is not None and predictions else None
    rejects = Counter(answer.reason for answer in answers if not isinstance(answer, ImagePrediction))
    summary = {
        "verb": "predict",
        "bundle": bundle.store.uri,
        "bundle_id": bundle.id,
        "images": len(answers),
        "abstained": sum(one.abstains for one in predictions),
        "rejects": rejects.total(),
        "rejects_by_reason": dict(rejects),
        "picture": drawn,
        "seconds": round(time.monotonic() - started, 3),
        "predictions": [facts_of(answer) for answer in answers],
    }
    return Outcome(summary, _verdict(rejects, len(answers)))


def facts_of(answer: Answer) -> dict[str, Any]:
    """An answer as JSON has it; a reject has an `error` and no `label`."""
    from engine.prediction.classifier import ImageReject

    if isinstance(answer, ImageReject):
        return {"image": answer.image, "error": answer.reason, "message": answer.message}
    several = {} if answer.labels is None else {"labels": list(answer.labels)}
    return {
        "image": answer.image,
        **(several or {"label": answer.label}),
        "confidence": answer.confidence,
        "abstained": answer.abstains,
        "top": [{"label": label, "confidence": confidence} for label, confidence in answer.top],
        "width_px": answer.width_px,
        "height_px": answer.height_px,
        "sha256": answer.sha256,
    }


def print_answer(answer: Answer, console: Console) -> None:
    """One image: its name and label, then a line with a bar for each candidate."""
    from engine.prediction.classifier import ImageReject

    name = plain_text(answer.image)
    if isinstance(answer, ImageReject):
        console.print(
            Text.assemble((name, "bold"), ": ", (f"{answer.reason}: ", "red"), plain_text(answer.message))
        )
        return
    console.print(Text.assemble((name, "bold"), ": ", *_verdict_in_words(answer)))
    given = set(answer.labels or ()) | ({answer.label} if answer.label is not None else set())
    width = min(LABEL_COLUMNS, max(len(plain_text(label)) for label, _ in answer.top))
    for label, confidence in answer.top:
        style = "green" if label in given else "dim"
        bar = _bar(confidence, console)
        console.print(Text.assemble(f"  {plain_text(label):<{width}}  {confidence:.3f}  ", (bar, style)))


def _verdict_in_words(answer: ImagePrediction) -> list[str | tuple[str, str]]:
    if answer.abstains:
        best, confidence = answer.top[0]
        return [
            ("no label", "yellow"),
            f": the best, {plain_text(best)}, has {confidence:.3f}, and more was asked for",
        ]
    if answer.labels is not None:
        return [(", ".join(map(plain_text, answer.labels)), "bold green")]
    return [(plain_text(str(answer.label)), "bold green"), f" ({answer.confidence:.3f})"]


def _bar(share: float, console: Console) -> str:
    mark = "#" if console.options.ascii_only else "█"
    return mark * max(0, min(BAR_COLUMNS, round(share * BAR_COLUMNS)))


def _images(places: Sequence[str], storage: StorageConfig) -> Iterator[EncodedImage]:
    """Found now, so that a wrong place is said before the network is loaded; read one after another."""
    from engine.prediction.inputs import ImageFile, find_images

    if not places:
        raise RecipeError("predict: no images", wanted="files, folders or URIs, or - for one image on stdin")
    if places.count(STDIN) > 1:
        raise RecipeError("predict: - is given twice", wanted="one image on stdin")
    found: list[ImageFile | None] = []
    begin = 0
    for place, here in enumerate(places):
        if here == STDIN:
            found += [*find_images(places[begin:place], storage), None]
            begin = place + 1
    found += find_images(places[begin:], storage)
    return (_from_stdin() if file is None else file.read() for file in found)


def _from_stdin() -> EncodedImage:
    from engine.prediction.inputs import LIMITS, EncodedImage

    if sys.stdin.isatty():
        raise RecipeError(
            "predict -: stdin is a terminal", wanted="an image: engine predict BUNDLE - < cat.jpg"
        )
    return EncodedImage.of_bytes(STDIN, sys.stdin.buffer.read(LIMITS.max_sample_bytes + 1))


def _answers(
    bundle: Bundle, form: PredictionForm, images: Iterator[EncodedImage], pictures: int
) -> Iterator[Answer]:
    from engine.prediction.classifier import ImageClassifier
    from engine.quiet_start import quiet_start
    from engine.resolve import stated_network
    from engine.this_machine import machines_here

    _, runtime = stated_network(bundle.document("embeddings_table"))
    if runtime.kind == "tensorflow" or "matrix" not in bundle.manifest.files:
        with quiet_start():
            import engine.runtimes.tensorflow  # noqa: F401
    # As many threads as an actor of `extract` has here: then what that has left in the node's cache is found.
    classifier = ImageClassifier(bundle, form, int(machines_here().cpus))
    yield from classifier.classify(images, pictures)


def _verdict(rejects: Counter[str], images: int) -> OverBudget | None:
    if not rejects:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.most_common())
    return OverBudget(
        f"predict: {rejects.total():,} of {images:,} images cannot be labelled",
        found=reasons,
        way_out="each is named above, with its reason",
    )
