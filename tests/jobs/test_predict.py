"""`engine predict`: what a person reads, what a program reads, and how it ends."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.cli import main
from jobs.predict import print_answer
from tests.commands import Ended, Engine
from tests.flows.archives import crop_jpeg
from tests.prediction.test_picture import CAT
from tests.test_export import HEADS, publish, record_of_backbone

Predict = Callable[..., Ended]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "bundle"
    publish(folder, record_of_backbone(), HEADS["linear"])
    return folder


@pytest.fixture
def predict(bundle: Path, capsys: pytest.CaptureFixture[str]) -> Predict:
    def run(*arguments: object) -> Ended:
        code = main(["predict", str(bundle), *map(str, arguments)])
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return run


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photo.jpg").write_bytes(crop_jpeg(3, side_px=40)[0])
    return tmp_path / "photo.jpg"


def printed(answer: Any, encoding: str = "utf-8") -> list[str]:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding)
    print_answer(answer, Console(file=file, highlight=False, soft_wrap=True))
    file.flush()
    return buffer.getvalue().decode(encoding).splitlines()


def test_an_answer_is_read_in_plain_text() -> None:
    assert printed(CAT) == [
        "photos/cat.jpg: tabby (0.625)",
        "  tabby  0.625  " + 15 * "█",
        "  lynx   0.250  " + 6 * "█",
    ]
    assert printed(CAT, "ascii")[1] == "  tabby  0.625  " + 15 * "#"
    abstains = "photos/cat.jpg: no label: the best, tabby, has 0.625, and more was asked for"
    assert printed(replace(CAT, label=None))[0] == abstains
    assert printed(replace(CAT, label=None, labels=("lynx", "tabby")))[0] == "photos/cat.jpg: lynx, tabby"
    told = printed(replace(CAT, image="\x1b]0;owned\x07.jpg", label="[red]\r"))
    assert told[0] == "\\x1b]0;owned\\x07.jpg: [red]\\r (0.625)"


def test_a_photo_is_labelled_for_people_and_for_programs(predict: Predict, photo: Path) -> None:
    for_people = predict(photo)
    assert (for_people.code, for_people.stderr) == (0, "")
    headline, *bars = for_people.stdout.splitlines()
    summary = predict("--image", photo, "--json").summary
    assert {name: summary[name] for name in ("verb", "images", "abstained", "rejects", "picture")} == {
        "verb": "predict", "images": 1, "abstained": 0, "rejects": 0, "picture": None,
    }  # fmt: skip
    (one,) = summary["predictions"]
    assert headline == f"{photo}: {one['label']} ({one['confidence']:.3f})"
    assert [bar.split()[0] for bar in bars] == [top["label"] for top in one["top"]]
    assert sum(top["confidence"] for top in one["top"]) == pytest.approx(1)


def test_stdin_is_one_image_among_others(
    predict: Predict, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes())))
    named, piped = predict(photo, "-", "--json").summary["predictions"]
    assert (named.pop("image"), piped.pop("image")) == (str(photo), "-")
    assert named == piped
    assert "given twice" in predict("-", "-").stderr


def test_what_cannot_be_labelled_ends_with_3_and_the_rest_is_labelled(predict: Predict, photo: Path) -> None:
    (photo.parent / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    ended = predict(photo.parent, photo.parent / "absent.jpg")
    assert ended.code == 3
    broken, labelled, *_, absent = ended.stdout.splitlines()
    assert broken.startswith(f"{photo.parent}/broken.jpg: truncated_image: ")
    assert labelled.startswith(f"{photo}: ")
    assert absent == f"{photo.parent}/absent.jpg: no_image: there is no such file"
    assert "2 of 3 images cannot be labelled" in ended.stderr


def test_a_picture_is_drawn_where_nothing_is_yet(predict: Predict, photo: Path) -> None:
    target = photo.parent / "drawn" / "answers.png"
    assert predict(photo, "--save", target, "--json").summary["picture"] == str(target)
    assert target.read_bytes().startswith(b"\x89PNG")
    before = photo.read_bytes()
    for wrong in (target, photo.parent / "photo.gif"):
        assert predict(photo, "--save", wrong).code == 2
    os.rename(photo, photo.with_suffix(".png"))
    ended = predict("--save", photo.with_suffix(".png"))
    assert (ended.code, "something is there already" in ended.stderr) == (2, True)
    assert photo.with_suffix(".png").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no images"),
        (["--min-confidence", "high", "x.jpg"], "min_confidence"),
        (["--min-confidence", "{classes: {dog: 0.5}}", "x.jpg"], "has no class 'dog'"),
        (["--label-map", "{ant: 1}", "x.jpg"], "2 of 3 classes"),
        (["--label-map", "{ant", "x.jpg"], "--label-map {ant: not YAML"),
        (["https://example.org/x.jpg"], "the scheme 'https'"),
        (["/nowhere/"], "no images here"),
    ],
)
def test_wrong_arguments_end_with_2(predict: Predict, arguments: list[str], said: str) -> None:
    ended = predict(*arguments)
    assert (ended.code, said in ended.stderr) == (2, True), ended.stderr


def test_the_options_are_those_of_a_score_recipe(predict: Predict, photo: Path) -> None:
    asked = ("--label-map", "{ant: n1}", "--unmapped", "keep", "--min-confidence", "1", "--top-k", "2")
    (one,) = predict(photo, *asked, "--json").summary["predictions"]
    assert (one["label"], one["abstained"]) == (None, True)
    assert len(one["top"]) == 2 and {top["label"] for top in one["top"]} <= {"n1", "bee", "cat"}


def test_a_process_of_its_own_says_nothing_but_the_answer(
    engine_process: Engine, bundle: Path, photo: Path
) -> None:
    ended = engine_process("predict", bundle, photo, "--json")
    (one,) = json.loads(ended.stdout)["predictions"]
    assert ended.stderr.splitlines()[0] == f"{photo}: {one['label']} ({one['confidence']:.3f})"
    assert len(ended.stderr.splitlines()) == 1 + len(one["top"]), "and not a line of TensorFlow's"


def test_a_json_log_has_no_lines_for_people(engine_process: Engine, bundle: Path, photo: Path) -> None:
    json_log = {"ENGINE_LOG": "json"}
    ended = engine_process("predict", bundle, photo, photo.parent / "no.jpg", "--json", environment=json_log)
    assert ended.code == 3
    assert [json.loads(line)["error"] for line in ended.stderr.splitlines()] == ["OverBudget"]
    assert [one.get("error") for one in ended.summary["predictions"]] == [None, "no_image"]
