"""The judgement of a night: against numbers worked out by hand, against chance, and on embeddings of real photos."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression

from engine.backbones.kinds import EfficientNetLite0Config, build_backbone
from engine.config import check_recipe
from engine.errors import HeldBack, RecipeError
from engine.finetuning.step import compile_embed
from engine.gate import (
    GateConfig,
    Night,
    Population,
    Rule,
    Verdict,
    drift,
    index_by_chance,
    judge,
    population_stability_index,
)
from engine.heads.confidence import Calibration
from engine.heads.reference import Reference, given_classes
from engine.storage import StorageConfig

REFERENCE = Population(1000, {"ant": 500, "bee": 300, "cat": 200}, cosines=[10] * 100)
FOUND = Population(2000, {"ant": 1000, "bee": 600, "cat": 400}, cosines=[20] * 100)
ALL_RULES = GateConfig(min_agreement=0.95)
USUAL = Night(2000, FOUND, rejects=7, abstained=41, compared=300, agreeing=297, reference=REFERENCE)


def rule(name: str, night: Night, **limits: Any) -> Rule:
    """One rule of the verdict."""
    return next(
        rule
        for rule in judge(night, GateConfig(**{"min_agreement": 0.95, **limits})).rules
        if rule.name == name
    )


def with_found(**changes: Any) -> Night:
    """The usual night, but for what is counted of its rows."""
    return replace(USUAL, found=replace(FOUND, **changes))


def test_a_usual_night_passes_by_seven_rules() -> None:
    verdict = judge(USUAL, ALL_RULES)
    assert verdict.passes and verdict.error("s3://a/predictions") is None
    assert [(one.name, one.holds) for one in verdict.rules] == [
        ("row_accounting", True),
        ("max_reject_fraction", True),
        ("max_drift_psi", True),
        ("max_outlier_fraction", True),
        ("max_label_psi", True),
        ("max_abstention_fraction", True),
        ("min_agreement", True),
    ]
    values = {one.name: one.value for one in verdict.rules}
    assert values == {
        "row_accounting": 2000,
        "max_reject_fraction": 7 / 2007,
        "max_drift_psi": 0,
        "max_outlier_fraction": 0.01,
        "max_label_psi": pytest.approx(0, abs=1e-6),  # half a row weighs more among fewer rows
        "max_abstention_fraction": 41 / 2000,
        "min_agreement": 0.99,
    }
    assert json.loads(json.dumps(verdict.to_json()))["passes"] is True
    assert verdict.in_words().startswith(
        "the night may be published\n  holds       row_accounting: 2,000 rows"
    )


def test_two_nights_drift_apart_by_their_cosines_and_chance_is_said_beside_it() -> None:
    same = drift([10] * 100, [20] * 100)
    assert same is not None and same.psi == pytest.approx(0, abs=1e-5)
    assert same.by_chance == pytest.approx(
        27.9 * (1 / 1000 + 1 / 2000), rel=0.01
    )  # 10 groups: 9 degrees of freedom
    shifted = drift([10] * 100, [40] * 50 + [0] * 50)
    # Five groups with 400 of 2,000 rows where 100 of 1,000 were, and five with none.
    halves = [(400.5 / 2005, 100.5 / 1005), (0.5 / 2005, 100.5 / 1005)]
    by_hand = sum(5 * (now - then) * math.log(now / then) for now, then in halves)
    assert shifted is not None and shifted.psi == pytest.approx(by_hand)
    assert drift([0] * 100, [20] * 100) is drift([10] * 100, [0] * 100) is None
    with pytest.raises(ValueError, match="zip"):
        drift([10] * 100, [20] * 99)


def test_the_index_is_that_of_the_formula_with_half_a_row_in_each_group() -> None:
    # (4.5, 6.5) of 11 and (1.5, 2.5) of 4: shares 0.409, 0.591 and 0.375, 0.625.
    by_hand = (1.5 / 4 - 4.5 / 11) * math.log((1.5 / 4) / (4.5 / 11)) + (2.5 / 4 - 6.5 / 11) * math.log(
        (2.5 / 4) / (6.5 / 11)
    )
    assert population_stability_index([4, 6], [1, 2]) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(0.0048785, abs=5e-7)
    # Shares of 0.2, 0.8 and then 0.4, 0.6 of so many rows: 0.2 ln 2 - 0.2 ln (3/4).
    assert population_stability_index([20_000_000, 80_000_000], [40_000_000, 60_000_000]) == pytest.approx(
        0.2 * math.log(8 / 3), rel=1e-6
    )
    assert population_stability_index([100, 0], [100, 0]) == 0
    # An empty group has a share of 0.5 / 101: 0.98 ln 201, and not infinity.
    assert population_stability_index([100, 0], [0, 100]) == pytest.approx(2 * 100 / 101 * math.log(201))
    with pytest.raises(ValueError, match="zip"):
        population_stability_index([1, 2], [1, 2, 3])


@pytest.mark.parametrize(("expected", "actual"), [(200, 200), (480, 200), (5000, 200)])
def test_what_chance_alone_gives_is_what_samples_of_one_population_have(expected: int, actual: int) -> None:
    random = np.random.default_rng(1)
    shares = [0.1] * 10
    drawn = zip(
        random.multinomial(expected, shares, 3000), random.multinomial(actual, shares, 3000), strict=True
    )
    found = [population_stability_index(before.tolist(), now.tolist()) for before, now in drawn]
    assert index_by_chance(10, expected, actual, 0.01) == pytest.approx(np.quantile(found, 0.99), rel=0.1)
    assert np.quantile(found, 0.99) < ALL_RULES.max_drift_psi, "so min_rows is enough"
    assert np.mean(np.array(found) > index_by_chance(10, expected, actual)) < 0.003
    assert index_by_chance(1, expected, actual) == 0


def test_every_embedding_must_have_one_prediction() -> None:
    for missing in (replace(USUAL, expected_rows=2001), replace(USUAL, expected_rows=1999)):
        broken = rule("row_accounting", missing)
        assert (broken.holds, broken.value, broken.limit) == (False, 2000, missing.expected_rows)
    uncounted = rule("row_accounting", with_found(cosines=[20] * 99 + [19]))
    assert uncounted.holds is False and "cosines were counted of 1,999" in uncounted.sentence
    few = Night(12, Population(11, {"ant": 11}))
    assert rule("row_accounting", few).holds is False, "however few rows there are"


def test_drift_is_the_index_of_tenths_of_the_held_out_rows() -> None:
    cosines = [0] * 50 + [40] * 50
    found = rule("max_drift_psi", with_found(cosines=cosines))
    wanted = population_stability_index([100] * 10, [0] * 5 + [400] * 5)
    assert (found.value, found.limit, found.holds) == (pytest.approx(wanted), 0.25, False)
    assert rule("max_drift_psi", with_found(cosines=cosines), max_drift_psi=wanted + 0.01).holds is True
    unlimited = rule("max_drift_psi", with_found(cosines=cosines), max_drift_psi=None)
    assert (unlimited.value, unlimited.holds) == (pytest.approx(wanted), None)
    # A shift within a tenth is none: 10 bins of 10 rows each are one group.
    within = with_found(cosines=([40] * 5 + [0] * 5) * 10)
    assert rule("max_drift_psi", within).value == 0


def test_bins_that_many_equal_cosines_left_empty_make_no_group_of_their_own() -> None:
    lump = [0] * 30 + [400] + [0] * 29 + [15] * 40
    night = replace(with_found(cosines=[2 * one for one in lump]), reference=replace(REFERENCE, cosines=lump))
    assert rule("max_drift_psi", night).value == pytest.approx(0, abs=1e-6)
    moved = [0] * 30 + [1200] + [0] * 29 + [20] * 40
    assert rule("max_drift_psi", replace(night, found=replace(FOUND, cosines=moved))).value == pytest.approx(
        0.4 * math.log(1.5), abs=0.002
    )


def test_a_few_rows_that_are_quite_wrong_are_outliers_and_no_drift() -> None:
    night = with_found(cosines=[20 + 198] + [18] * 99)
    assert rule("max_drift_psi", night).holds is True
    found = rule("max_outlier_fraction", night)
    assert (found.value, found.holds) == (218 / 2000, False)
    assert (
        "10.90% of 2,000 rows lie farther from all classes than 99.0% of the held-out rows did"
        in found.sentence
    )


def test_labels_are_held_against_the_last_night_and_else_against_the_bundle() -> None:
    shifted = {"ant": 100, "bee": 600, "cat": 1300}
    against_bundle = rule("max_label_psi", with_found(labels=shifted))
    wanted = population_stability_index([500, 300, 200], [100, 600, 1300])
    assert (against_bundle.value, against_bundle.holds) == (pytest.approx(wanted), False)
    assert "(cat 20.0% to 65.0%, ant 50.0% to 5.0%, bee 30.0% to 30.0%)" in against_bundle.sentence
    last = Population(3000, {"ant": 150, "bee": 900, "cat": 1950})
    against_last = rule("max_label_psi", replace(with_found(labels=shifted), last=last))
    assert (against_last.value, against_last.holds) == (pytest.approx(0, abs=1e-5), True)
    assert "of the last night" in against_last.sentence
    small = replace(with_found(labels=shifted), last=replace(last, rows=12, labels={"ant": 12}))
    assert rule("max_label_psi", small).value == pytest.approx(wanted)


def test_rare_classes_are_compared_together_and_new_ones_among_them() -> None:
    before = Population(1000, {"ant": 990, "bee": 4, "cat": 4, "dog": 2})
    night = Night(500, Population(500, {"ant": 490, "elk": 10}), reference=before)
    wanted = population_stability_index([990, 10], [490, 10])
    assert rule("max_label_psi", night).value == pytest.approx(wanted)
    many = {f"{number:03d}": 1 for number in range(300)}
    spread = Night(300, Population(300, many), reference=Population(300, many))
    assert rule("max_label_psi", spread).holds is None
    none_given = Night(500, Population(500, {"ant": 100}, unlabelled=400), reference=before)
    assert "(all other classes) 1.0% to 79.9%" in rule("max_label_psi", none_given).sentence


def test_a_limit_is_raised_to_what_chance_gives_so_many_classes() -> None:
    random = np.random.default_rng(3)
    shares = np.full(100, 0.01)
    before, now = (random.multinomial(1000, shares).tolist() for _ in range(2))
    names = [f"{number:03d}" for number in range(100)]
    counted = [Population(1000, dict(zip(names, counts, strict=True))) for counts in (before, now)]
    found = rule("max_label_psi", Night(1000, counted[1], reference=counted[0]), max_label_psi=0.1)
    assert 0.1 < (found.value or 0) < (found.limit or 0) < 0.4
    assert found.holds is True and "(limit raised to 0." in found.sentence
    halved = dict.fromkeys(names[:50], 20)
    assert rule("max_label_psi", Night(1000, Population(1000, halved), reference=counted[0])).holds is False


@pytest.mark.parametrize(
    ("name", "night", "value"),
    [
        ("max_reject_fraction", replace(USUAL, rejects=21), 21 / 2021),
        ("max_abstention_fraction", replace(USUAL, abstained=1001), 1001 / 2000),
        ("min_agreement", replace(USUAL, agreeing=284), 284 / 300),
    ],
)
def test_shares_are_held_against_their_limits(name: str, night: Night, value: float) -> None:
    broken = rule(name, night)
    assert (broken.value, broken.holds) == (value, False)
    assert rule(name, night, **{name: value}).holds is True, "a limit itself is allowed"
    assert rule(name, night, **{name: None}).holds is None


def test_on_few_rows_only_the_accounting_is_judged() -> None:
    cosines = [199] + [0] * 99
    strange = Night(
        199,
        Population(199, {"elk": 199}, cosines=cosines),
        abstained=199,
        compared=199,
        reference=REFERENCE,
    )
    verdict = judge(strange, ALL_RULES)
    assert verdict.passes
    assert [one.name for one in verdict.rules if one.holds is not None] == ["row_accounting"]
    assert "199 rows tonight, fewer than min_rows 200" in verdict.in_words()
    broken = judge(strange, GateConfig(min_rows=199, min_agreement=0.95)).broken
    assert [one.name for one in broken] == [
        "max_drift_psi",
        "max_outlier_fraction",
        "max_label_psi",
        "max_abstention_fraction",
        "min_agreement",
    ]
    small = replace(REFERENCE, rows=99, cosines=[1] * 99 + [0])
    assert "99 rows to compare with" in rule("max_drift_psi", replace(USUAL, reference=small)).sentence


def test_nothing_new_and_a_bundle_without_a_memory_pass() -> None:
    assert judge(Night(0, Population(0, {})), ALL_RULES).passes
    verdict = judge(replace(USUAL, reference=None), ALL_RULES)
    assert verdict.passes
    unjudged = [one.name for one in verdict.rules if one.holds is None]
    assert unjudged == ["max_drift_psi", "max_outlier_fraction", "max_label_psi"]
    assert "fit again with this version" in verdict.in_words()


def test_what_a_bundle_remembers_too_badly_is_not_judged() -> None:
    own_rows = replace(USUAL, reference=replace(REFERENCE, is_held_out=False))
    for name in ("max_drift_psi", "max_outlier_fraction"):
        assert "were not counted" in rule(name, with_found(cosines=())).sentence
        assert "without validation and test rows" in rule(name, own_rows).sentence
        assert rule(name, own_rows).holds is None
    assert rule("max_label_psi", own_rows).holds is True
    alike = replace(USUAL, reference=replace(REFERENCE, cosines=[0] * 9 + [90] + [10] * 90 + [10]))
    alike = replace(alike, found=replace(FOUND, cosines=[0] * 9 + [180] + [20] * 91))
    assert "9% of the bundle's held-out rows are equally far" in rule("max_outlier_fraction", alike).sentence
    assert rule("max_outlier_fraction", alike, max_outlier_fraction=0.2).value == 0.09


def test_what_is_held_back_says_what_was_found_what_was_wanted_and_what_to_do() -> None:
    night = replace(USUAL, expected_rows=2048, rejects=100)
    error = judge(night, ALL_RULES).error("s3://a/predictions")
    assert isinstance(error, HeldBack) and error.exit_code == 3
    assert str(error).splitlines() == [
        "s3://a/predictions: the night was held back, what was published stays",
        "  found:   2,000 rows are predicted, the embedding parts have 2,048; 4.66% of 2,148 samples are rejects",
        "  wanted:  one prediction for each embedding, at most 0.01 (gate.max_reject_fraction)",
        "  way out: delete the folder held/ of the predictions and run again, which scores those parts anew; "
        "the rejects/ folder of the embeddings says what is wrong with each sample; if that is as it should be, "
        "publish the night as it is (--publish) or change gate.max_reject_fraction",
    ]
    assert "  BROKEN      max_reject_fraction: 4.66% of 2,148" in judge(night, ALL_RULES).in_words()


def test_cosines_in_other_bins_and_limits_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="cosines in 40 bins, wanted 100"):
        judge(with_found(cosines=[50] * 40), ALL_RULES)
    with pytest.raises(RecipeError, match="max_drift_psi"):
        check_recipe(GateConfig, {"max_drift_psi": -1})
    assert all(field.description for field in GateConfig.model_fields.values())


SIDE_PX = 96
TRAINED, HELD_OUT, TONIGHT = 400, 400, 500
PHOTOS = (  # in colour, in the folder skimage/data
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    random = np.random.default_rng(image.getpixel((0, 0)))
    pixels = np.asarray(image) + random.normal(0, 60, (SIDE_PX, SIDE_PX, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def crops() -> tuple[list[Image.Image], list[int]]:
    """Crops of ten photos as JPEGs of quality 90, and the photo that each is of."""
    folder = files("skimage") / "data"
    photos = [Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB") for name in PHOTOS]
    photos += [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(0)
    labels = random.integers(len(photos), size=TRAINED + HELD_OUT + TONIGHT).tolist()
    images = []
    for label in labels:
        left, top = (int(random.integers(side - SIDE_PX + 1)) for side in photos[label].size)
        images.append(as_jpeg(photos[label].crop((left, top, left + SIDE_PX, top + SIDE_PX)), 90))
    return images, labels


@cache
def network() -> Callable[[np.ndarray], np.ndarray]:
    backbone = build_backbone(EfficientNetLite0Config(weights="package", input_size=SIDE_PX), StorageConfig())
    return compile_embed(backbone.network, backbone.scaling)


def embedded(images: list[Image.Image]) -> np.ndarray:
    return network()(np.stack([np.asarray(image) for image in images]))


@cache
def fitted() -> tuple[Reference, LogisticRegression]:
    """What is remembered of the first crops, and a head on them."""
    images, labels = crops()
    embeddings_ND = embedded(images[: TRAINED + HELD_OUT])
    targets_N = np.array(labels[: TRAINED + HELD_OUT])
    head = LogisticRegression(max_iter=300).fit(embeddings_ND[:TRAINED], targets_N[:TRAINED])
    rows = np.arange(TRAINED + HELD_OUT)
    given_MK = given_classes(head.decision_function(embeddings_ND[TRAINED:]), Calibration(), ())
    return Reference.of(embeddings_ND, targets_N, rows[:TRAINED], rows[TRAINED:], given_MK), head


def verdict_of(changed: Callable[[Image.Image], Image.Image]) -> Verdict:
    """The last crops, all of them changed, are what came tonight."""
    reference, head = fitted()
    names = [str(number) for number in head.classes_]
    embeddings_ND = embedded([changed(image) for image in crops()[0][TRAINED + HELD_OUT :]])
    given_NK = given_classes(head.decision_function(embeddings_ND), Calibration(), ())
    found = Population(
        TONIGHT,
        dict(zip(names, given_NK.sum(axis=0).tolist(), strict=True)),
        cosines=reference.histogram(reference.cosines(embeddings_ND)).tolist(),
    )
    before = Population.remembered(reference, names)
    verdict = judge(Night(TONIGHT, found, reference=before), ALL_RULES)
    print({one.name: round(one.value, 3) for one in verdict.rules if one.value is not None})
    return verdict


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: image,
        partial(as_jpeg, quality=75),
        partial(as_jpeg, quality=50),
        ImageOps.mirror,
    ],
    ids=["as they are", "quality 75", "quality 50", "mirrored"],
)
def test_other_crops_of_the_photos_pass_as_other_jpegs_too(
    changed: Callable[[Image.Image], Image.Image],
) -> None:
    verdict = verdict_of(changed)
    assert verdict.passes, verdict.in_words()
    assert sum(one.holds is True for one in verdict.rules) == 6


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: ImageOps.grayscale(image).convert("RGB"),
        lambda image: image.filter(ImageFilter.GaussianBlur(3)),
        noisy,
        lambda image: Image.new("RGB", image.size),
    ],
    ids=["grey", "blurred", "noisy", "black"],
)
def test_photos_that_the_head_was_not_made_for_are_held_back_as_drift(
    changed: Callable[[Image.Image], Image.Image],
) -> None:
    verdict = verdict_of(changed)
    assert "max_drift_psi" in [one.name for one in verdict.broken], verdict.in_words()
