"""Single images get the answers that decoding, embedding and classifying them by hand gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.decisions import PredictionForm
from engine.errors import BundleError, CanaryMismatch, RecipeError
from engine.heads.bundle import Bundle, TrainedHead, open_bundle, publish_bundle
from engine.heads.kinds import LinearHeadConfig, SideFeatureConfig, build_head
from engine.prediction.classifier import (
    IMAGES_AT_ONCE,
    ImageClassifier,
    ImagePrediction,
    ImageReject,
    predict_images,
)
from engine.prediction.inputs import EncodedImage
from engine.predictor import Predictor
from engine.storage import open_store
from tests.flows.archives import crop_jpeg
from tests.test_export import HEADS, NAMES, embedder_of, photos, pixels_of, publish, record_of_backbone


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return record_of_backbone()


@pytest.fixture(scope="module")
def bundle(record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(tmp_path_factory.mktemp("linear"), record, HEADS["linear"])


def predicted(bundle: Bundle, images: list[bytes], **form: Any) -> list[ImagePrediction]:
    answers = predict_images(bundle.store.uri, images, **form)
    assert all(isinstance(answer, ImagePrediction) for answer in answers), answers
    return answers  # type: ignore[return-value]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_answers_are_those_of_the_stages_called_by_hand(
    head: str, several: bool, record: dict[str, Any], tmp_path: Path
) -> None:
    bundle, images = publish(tmp_path, record, HEADS[head], several), photos()
    wanted_BK = Predictor(bundle, top_k=3).probabilities(embedder_of(record).embed(pixels_of(images)))
    answers = predicted(bundle, images, top_k=9)
    assert [answer.image for answer in answers] == [f"image {number}" for number in range(12)]
    for answer, row_K in zip(answers, wanted_BK, strict=True):
        found = dict(answer.top)
        np.testing.assert_allclose([found[name] for name in NAMES], row_K, atol=1e-6)
        assert answer.confidence == answer.top[0][1] == max(found.values())
        assert (answer.width_px, answer.height_px) == (40, 40)
        if several:
            reached = row_K >= np.float32([0.5, 0.3, 0.7])
            assert answer.labels == tuple(
                name for name, is_given in zip(NAMES, reached, strict=True) if is_given
            )
            assert (answer.label, answer.abstains) == (None, not reached.any())
        else:
            assert (answer.label, answer.labels, answer.abstains) == (NAMES[row_K.argmax()], None, False)


def test_what_cannot_be_decoded_is_named_in_its_place_and_the_others_go_on(bundle: Bundle) -> None:
    good = [crop_jpeg(number, side_px=40)[0] for number in range(IMAGES_AT_ONCE + 3)]
    wanted = predicted(bundle, good)
    broken = {0: b"", 5: b"no image at all", IMAGES_AT_ONCE + 4: good[0][: len(good[0]) // 2]}
    images = list(good)
    for place, encoded in broken.items():
        images.insert(place, encoded)
    answers = predict_images(bundle.store.uri, images)
    rejects = {place: answer for place, answer in enumerate(answers) if isinstance(answer, ImageReject)}
    assert {place: reject.reason for place, reject in rejects.items()} == {
        0: "empty_sample",
        5: "unsupported_format",
        IMAGES_AT_ONCE + 4: "truncated_image",
    }
    assert [reject.image for reject in rejects.values()] == [f"image {place}" for place in rejects]
    assert "no image at all" not in rejects[0].message and "decoded are JPEG" in rejects[5].message
    others = [answer for answer in answers if isinstance(answer, ImagePrediction)]
    assert [(one.label, one.sha256) for one in others] == [(one.label, one.sha256) for one in wanted]


def test_where_nothing_can_be_decoded_there_are_only_rejects(bundle: Bundle) -> None:
    assert [type(answer) for answer in predict_images(bundle.store.uri, [b"", b"GIF"])] == [ImageReject] * 2
    assert predict_images(bundle.store.uri, []) == []


def test_one_image_need_not_be_in_a_list(bundle: Bundle, tmp_path: Path) -> None:
    path, encoded = tmp_path / "photo.jpg", crop_jpeg(1)[0]
    path.write_bytes(encoded)
    answers = [predict_images(bundle.store.uri, one) for one in (encoded, path, str(path), [path], tmp_path)]
    assert [len(answer) for answer in answers] == [1] * 5
    assert {(one.image, one.confidence) for (one,) in answers if isinstance(one, ImagePrediction)} == {
        ("image 0", answers[0][0].confidence),  # type: ignore[union-attr]
        (str(path), answers[0][0].confidence),  # type: ignore[union-attr]
    }


def test_answers_take_the_form_of_a_score_recipe(bundle: Bundle) -> None:
    plain = predicted(bundle, photos())
    middle = sorted(answer.confidence for answer in plain)[6]
    formed = predicted(
        bundle,
        photos(),
        top_k=2,
        min_confidence=middle,
        label_map={"ant": "n1", "bee": 2, "cat": "n3"},
    )
    assert sum(answer.abstains for answer in formed) == 6
    ids = dict(zip(NAMES, ("n1", "2", "n3"), strict=True))
    for before, after in zip(plain, formed, strict=True):
        assert after.label == (ids[str(before.label)] if before.confidence >= middle else None)
        assert after.top == tuple((ids[name], confidence) for name, confidence in before.top[:2])
    with pytest.raises(RecipeError, match="has no class 'dog'"):
        predict_images(bundle.store.uri, [], min_confidence={"classes": {"dog": 0.5}})
    with pytest.raises(RecipeError, match="top_k: found 0"):
        predict_images(bundle.store.uri, [], top_k=0)


def test_a_head_gets_numbers_as_exact_as_those_it_was_fitted_on(
    record: dict[str, Any], tmp_path: Path
) -> None:
    halved = {**record, "contract": {**record["contract"], "output.dtype": "float16"}}
    bundle = publish(tmp_path, halved, HEADS["linear"])
    embeddings_BD = embedder_of(record).embed(pixels_of(photos()))
    wanted_BK = Predictor(bundle, top_k=3).probabilities(embeddings_BD.astype(np.float16))
    found_BK = [[dict(answer.top)[name] for name in NAMES] for answer in predicted(bundle, photos(), top_k=3)]
    np.testing.assert_allclose(found_BK, wanted_BK, atol=1e-6)
    exact_BK = Predictor(bundle, top_k=3).probabilities(embeddings_BD)
    assert np.abs(wanted_BK - exact_BK).max() > 1e-5, "else the test could not tell them apart"


def test_so_many_pictures_are_kept_with_the_sides_of_their_images(bundle: Bundle) -> None:
    images = []
    for size in ((60, 20), (10, 40), (30, 30)):
        buffer = io.BytesIO()
        Image.new("RGB", size, (200, 30, 10)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    wide, tall, none = (answer.picture_HW3 for answer in predicted(bundle, images, pictures=2))
    assert wide is not None and tall is not None and none is None
    assert (wide.shape, tall.shape) == ((107, 320, 3), (320, 80, 3))
    assert (wide == (200, 30, 10)).all() and (tall == (200, 30, 10)).all()


def test_a_bundle_that_images_alone_cannot_answer_for_is_refused(
    record: dict[str, Any], bundle: Bundle, tmp_path: Path
) -> None:
    other = {**record, "backbone": {**record["backbone"], "seed": 4}}
    with pytest.raises(CanaryMismatch, match="another backbone"):
        ImageClassifier(publish(tmp_path / "other", other, HEADS["linear"]))
    nameless = publish(tmp_path / "nameless", {**record, "backbone": {"kind": "abacus"}}, HEADS["linear"])
    with pytest.raises(BundleError, match="names no network that this engine knows"):
        ImageClassifier(nameless)
    with pytest.raises(RecipeError, match="has no class_ids"):
        ImageClassifier(bundle, PredictionForm(label_map="class_ids"))
    store = open_store(str(tmp_path / "side"))
    head = TrainedHead(
        LinearHeadConfig(),
        build_head(LinearHeadConfig(), record["width"] + 1, 3, 0),
        NAMES,
        "single_label",
        side_features=(SideFeatureConfig(column="focal_length", kind="numeric"),),
    )
    publish_bundle(store, head, table_record=record, metrics={}, recipe={})
    with pytest.raises(RecipeError, match=r"(?s)takes columns of a table.*focal_length"):
        ImageClassifier(open_bundle(store))


def test_the_runtime_is_the_one_that_the_embeddings_were_made_with(
    record: dict[str, Any], bundle: Bundle, tmp_path: Path
) -> None:
    runtime = {"kind": "openvino", "precision": "float32", "batch_size": 4}
    other = ImageClassifier(publish(tmp_path, {**record, "runtime": runtime}, HEADS["linear"]))
    assert type(other._label._embed._embedder._runtime).__name__ == "OpenVINORuntime"
    encoded = [EncodedImage.of_bytes(str(number), image) for number, image in enumerate(photos())]
    found, wanted = list(other.classify(encoded)), predicted(bundle, photos())
    for one, same in zip(found, wanted, strict=True):
        assert isinstance(one, ImagePrediction)
        assert dict(one.top) == pytest.approx(dict(same.top), abs=1e-4)
