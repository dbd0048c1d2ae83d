"""The page about a bundle tells its figures, is harmless, is the same each time, and can be used by everyone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from engine.report.page import render_report
from tests.report.documents import (
    FINGERPRINT,
    TRAINING,
    documents,
    epochs,
    finetuned,
    manifest,
    picture,
    pictured,
)
from tests.report.pages import Element, read_page

SHOWN = ("gallery", "embedding_map", "rejects", "pictures")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><svg onload='alert(1)'>{{ 7*7 }} $\\frac{",
)


def page_of(told: dict[str, Any]) -> Element:
    return read_page(render_report(told))


def definitions(page: Element, class_: str) -> dict[str, str]:
    (list_,) = (one for one in page.all("dl") if one.attributes.get("class") == class_)
    return {
        next(pair.all("dt")).text: next(pair.all("dd")).text for pair in list_.children if pair.name == "div"
    }


def test_the_headline_has_the_figures_of_the_test_rows_and_says_what_the_bundle_is() -> None:
    page = page_of(documents())
    assert definitions(page, "headline") == {
        "Rows": "48",
        "Accuracy": "93.75 %",
        "Top-3 accuracy": "97.91 %",
        "Loss (cross-entropy, nats)": "0.2513",
        "ROC AUC, mean of the classes": "0.9811",
        "Calibration error": "3.77 %",
    }
    assert page.by_id("figures-heading").text == "Figures on test"
    assert definitions(page, "facts") == {
        "Task": "single label",
        "Classes": "3: ant, bee, cat",
        "Head": 'mlp, hidden [16], dropout 0.5, activation "relu"',
        "Backbone": "MobileNetV2 at 160 px",
        "Embedding width": "1,280",
        "Fingerprint": FINGERPRINT[:12],
        "Published": "2026-11-23T01:02:03+00:00",
        "Versions": "python 3.11.7, keras 3.15.1",
    }
    splits = page.by_id("splits").rows()
    assert splits[0] == ["Rows", "301", "53", "48"]
    assert splits[1] == ["Accuracy", "-", "90.57 %", "93.75 %"]
    assert "00112233445566aa" in page.text and "file:///models/animals" in page.text


def test_without_test_rows_the_page_tells_of_validation_and_without_both_it_says_so() -> None:
    page = page_of(documents(test=None))
    assert page.by_id("figures-heading").text == "Figures on validation"
    assert definitions(page, "headline")["Accuracy"] == "90.57 %"
    page = page_of(documents(test=None, validation=None))
    assert "nothing can be said of how good it is" in page.text
    assert not [one for one in page.all("dl") if one.attributes.get("class") == "headline"]


def test_tables_have_the_figures_of_each_class_and_what_is_taken_for_what() -> None:
    page = page_of(documents())
    assert page.by_id("classes").rows() == [
        ["ant", "0.6100", "0.7100", "0.8100", "11", "0.9130"],
        ["bee", "0.6101", "0.7101", "0.8101", "12", "-"],
        ["cat", "0.6102", "0.7102", "0.8102", "13", "0.9130"],
    ]
    assert page.by_id("matrix").rows() == [
        ["ant", "15", "2", "0"],
        ["bee", "0", "15", "0"],
        ["cat", "1", "0", "15"],
    ]
    shares = [cell.attributes.get("style") for cell in page.by_id("matrix").all("td")]
    assert shares[:6] == ["--share:0.882", "--share:0.118", None, None, "--share:1.000", None]
    assert shares[6:] == ["--share:0.062", None, "--share:0.938"]
    assert page.by_id("confusions").rows() == [["ant", "bee", "2", "11.76 %"], ["cat", "ant", "1", "6.25 %"]]


def test_rows_to_look_at_and_what_was_left_out_are_listed() -> None:
    page = page_of(finetuned())
    assert page.by_id("mistakes").rows() == [["img7", "a.tar", "test", "ant", "bee", "0.9871"]]
    assert page.by_id("suspects").rows() == [["img9", "b.tar", "bee", "cat", "0.4321"]]
    assert page.by_id("left-out").rows() == [
        ["Rows without a label", "23"],
        ["Rows of classes without a training row", "2"],
    ]
    assert page.by_id("rejects").rows() == [["no_image", "17"], ["truncated_image", "3"]]


def test_of_a_grid_all_heads_are_told_the_best_first() -> None:
    def tried(rate: float, loss: float | None) -> dict[str, Any]:
        return {
            "head": {"kind": "linear"},
            "optimizer": {"kind": "adam", "learning_rate": rate},
            "published": loss == 0.31,
            "epochs": 5,
            "best_epoch": 4,
            "validation_loss": loss,
            "stopped": "",
        }

    page = page_of(documents(grid=[tried(9.5, None), tried(0.5, 0.47), tried(0.25, 0.31)]))
    assert page.by_id("grid").rows() == [
        ["linear", "adam, learning_rate 0.25", "0.3100", "4", "5", "published"],
        ["linear", "adam, learning_rate 0.5", "0.4700", "4", "5", ""],
        ["linear", "adam, learning_rate 9.5", "-", "4", "5", ""],
    ]
    assert not [one for one in page_of(documents()).everything() if one.attributes.get("id") == "grid"]


def test_the_slider_begins_at_the_suggested_threshold_and_has_the_figures_of_each() -> None:
    page = page_of(documents())
    slider = page.by_id("min-confidence").attributes
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "200", "50")  # 0.25 of 1
    assert (
        page.by_id("at-threshold").text
        == "At 0.250: 76.30 % of the rows are labelled, 95.00 % of these right."
    )
    steps = json.loads(page.by_id("steps").text)
    assert len(steps) == 201
    assert steps[0] == ["0.000", "100.00 %", "93.75 %"]
    assert steps[120] == ["0.600", "43.13 %", "96.75 %"]
    assert steps[200] == ["1.000", "5.21 %", "-"]
    # Without a script the slider stays hidden, and a table says the same.
    assert "hidden" in page.by_id("slider").attributes
    assert ["0.600", "43.13 %", "96.75 %"] in page.by_id("thresholds").rows()
    assert page.by_id("suggestions").rows() == [
        ["95.00 %", "0.2500", "83.00 %", "96.10 %", "81.25 %"],
        ["99.00 %", "not reached", "0.00 %", "-", "-"],
    ]


def test_calibration_is_told_before_and_after_with_its_bins() -> None:
    page = page_of(documents())
    assert "Calibration error 3.77 % (8.77 % before calibration)." in page.text
    assert page.by_id("reliability").rows() == [
        ["0.400 to 0.467", "7", "44.00 %", "57.10 %"],
        ["0.933 to 1.000", "41", "97.00 %", "99.50 %"],
    ]


def vertices(element: Element) -> list[tuple[float, float]]:
    """Of the first path in an element of a plot, in its pixels."""
    path = next(element.all("path")).attributes["d"] or ""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


def test_a_line_stands_between_the_last_epoch_of_the_head_and_the_first_of_the_backbone() -> None:
    page = page_of(finetuned())
    head = vertices(page.by_id("learning-head-validation_loss"))
    backbone = vertices(page.by_id("learning-backbone-validation_loss"))
    assert (len(head), len(backbone)) == (5, 3)
    for place in ("", "-below"):
        (x, _), (same, _) = vertices(page.by_id(f"learning-backbone-begins{place}"))
        assert x == same == pytest.approx((head[-1][0] + backbone[0][0]) / 2, abs=1e-3)
    step = head[1][0] - head[0][0]
    assert backbone[0][0] - head[-1][0] == pytest.approx(step, abs=1e-3), "one axis for both"
    for phase, losses, kept in (("head", head, 4), ("backbone", backbone, 2)):
        mark = next(page.by_id(f"learning-{phase}-validation_loss-kept").all("use")).attributes
        assert (float(mark["x"] or ""), float(mark["y"] or "")) == pytest.approx(losses[kept - 1], abs=1e-3)
    assert page.by_id("learning-desc").text.startswith(
        "The head learns in epochs 1 to 5; the weights of epoch 4 are kept. "
        "The backbone learns in epochs 6 to 8; the weights of epoch 7 are kept."
    )
    rows = page.by_id("epochs").rows()
    assert [row[:2] for row in rows[3:7]] == [
        ["4", "head, kept"],
        ["5", "head"],
        ["6", "backbone"],
        ["7", "backbone, kept"],
    ]
    assert rows[1] == ["2", "head", "0.5000", "0.5500", "80.00 %"]


def test_a_fit_has_one_phase_and_no_line() -> None:
    ids = {element.attributes.get("id") for element in page_of(documents()).everything()}
    assert "learning-head-train_loss" in ids and "learning-backbone-begins" not in ids
    assert "comparison" not in ids and "before-and-after" not in ids


def test_a_backbone_that_never_became_better_has_no_star() -> None:
    phases = {
        "head": TRAINING,
        "backbone": {"initial_epoch": 5, "history": epochs(6, 2), "best_epoch": 5, "stopped": "in vain"},
    }
    page = page_of(documents(training=phases))
    ids = {element.attributes.get("id") for element in page.everything()}
    assert "learning-head-validation_loss-kept" in ids
    assert "learning-backbone-validation_loss-kept" not in ids
    assert "epochs 6 to 7, none of which was better than what it began with" in page.text


def test_a_head_that_remembers_its_rows_has_no_curve_and_says_so() -> None:
    once = {"epoch": 1, "train_loss": None, "validation_loss": 0.4, "validation_accuracy": 0.9}
    knn = {"epochs": 1, "best_epoch": 1, "stopped": "nothing is trained: the training rows vote"}
    page = page_of(documents(training={**knn, "history": [once]}))
    assert "This head is made of the training rows, so there is no curve." in page.text
    assert "the training rows vote" in page.text
    assert not [one for one in page.everything() if one.attributes.get("id") == "learning-title"]


def test_without_validation_rows_there_is_a_curve_of_train_loss_alone() -> None:
    history = [{**epoch, "validation_loss": None, "validation_accuracy": None} for epoch in epochs(1, 4)]
    page = page_of(documents(training={**TRAINING, "history": history}))
    assert len(vertices(page.by_id("learning-head-train_loss"))) == 4
    assert "no validation rows" in page.text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0208, 0.1146, "The whole interval is above 0: it helped."),
        (-0.0208, 0.1146, "The interval holds 0"),
        (-0.1146, -0.0208, "The whole interval is below 0: it did harm."),
    ],
)
def test_before_and_after_are_compared_with_the_interval(low: float, high: float, verdict: str) -> None:
    told = finetuned()
    told["metrics"]["comparison"] |= {"low": low, "high": high}  # the difference stays, wherever these are
    page = page_of(told)
    words = " ".join(page.by_id("before-and-after").text.split())
    assert "Of 48 test images, accuracy: 87.50 % before fine-tuning, 93.75 % after." in words
    assert (
        f"a difference of +6.25 points, with a 95 % interval (paired bootstrap) of {100 * low:+.2f}" in words
    )
    assert f"to {100 * high:+.2f} points. {verdict}" in words
    (line,) = (
        vertices(one) for one in page.everything() if one.attributes.get("id") == "comparison-interval"
    )
    assert line[0][0] < line[1][0]


def test_rows_with_several_classes_have_their_own_figures() -> None:
    figures = {
        "rows": 31,
        "mean_average_precision": 0.7123,
        "micro_f1": 0.6543,
        "exact_match": 0.5161,
        "per_class": [
            {"label": name, "average_precision": None, "precision": 0.1, "recall": 0.2, "f1": 0.3}
            | {"support": 4, "threshold": 0.37, "roc_auc": None}
            for name in ("ant", "bee")
        ],
    }
    mistake = {"key": "k", "shard": "s", "split": "test", "label": "bee", "given": False, "confidence": 0.9}
    told = documents(test=figures, most_confident_mistakes=[mistake], calibration={"kind": "none"})
    told["manifest"] = manifest(("ant", "bee"), task="multi_label", thresholds=[0.37, 0.41])
    page = page_of(told)
    assert definitions(page, "headline") == {
        "Rows": "31",
        "Mean average precision": "0.7123",
        "F1 of all questions together": "0.6543",
        "Rows with all classes right": "51.61 %",
    }
    assert page.by_id("classes").rows()[0] == ["ant", "0.1000", "0.2000", "0.3000", "4", "-", "-", "0.3700"]
    assert page.by_id("mistakes").rows() == [["k", "s", "test", "bee", "no", "0.9000"]]
    ids = {element.attributes.get("id") for element in page.everything()}
    assert not {"matrix", "confusions", "slider"} & ids


def test_a_bundle_of_an_older_engine_and_one_that_says_nothing_have_a_page() -> None:
    old = documents()
    del old["metrics"]["test"]["by_min_confidence"]
    assert "slider" not in {one.attributes.get("id") for one in page_of(old).everything()}
    page = page_of({**documents(), "metrics": {}, "recipe": {}, "suspects": {"suspects": []}})
    assert "No label looks wrong." in page.text


def test_labels_keys_and_paths_of_strangers_are_text_and_nothing_else() -> None:
    told = finetuned(labels={"unlabelled": 1, "classes_without_training_rows": {HOSTILE[0]: 2}})
    plain = page_of(told)
    told |= documents(HOSTILE, training=told["metrics"]["training"]) | {"uri": f"file:///x/{HOSTILE[1]}"}
    told["recipe"] = {HOSTILE[2]: HOSTILE[0]}
    told["metrics"]["most_confident_mistakes"][0]["key"] = HOSTILE[2]
    told["suspects"]["suspects"][0]["shard"] = HOSTILE[1]
    hostile = page_of(told)
    for name in ("script", "img", "iframe", "link", "object", "style"):
        assert len(list(hostile.all(name))) == len(list(plain.all(name))), name
    assert len(list(hostile.all("script"))) == 2
    for element in hostile.everything():
        assert not [name for name in element.attributes if name.startswith("on")], element.attributes
    assert [row[0] for row in hostile.by_id("classes").rows()] == list(HOSTILE)
    assert hostile.by_id("mistakes").rows()[0][0] == HOSTILE[2]
    assert hostile.by_id("suspects").rows()[0][1] == HOSTILE[1]
    assert json.dumps(HOSTILE[2]) in hostile.by_id("lineage").text


def test_the_page_asks_for_nothing_and_allows_no_script_but_its_own() -> None:
    page = render_report({**finetuned(), **{name: pictured()[name] for name in SHOWN}})
    assert not re.findall(r"https?:", page)
    assert not re.findall(r"@import|url\((?!#)", page)
    read = read_page(page)
    for element in read.everything():
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            target = element.attributes.get(name)
            is_own = target is None or target.startswith(("#", "data:image/webp;base64,"))
            assert is_own, (element.name, target)
    data, code = read.all("script")
    assert data.attributes == {"type": "application/json", "id": "steps"} and code.attributes == {}
    (policy,) = (one.attributes["content"] for one in read.all("meta") if "http-equiv" in one.attributes)
    digest = base64.b64encode(hashlib.sha256(code.text.encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy


def test_links_and_labels_lead_to_something_that_is_there_once() -> None:
    page = page_of({**finetuned(), **{name: pictured()[name] for name in SHOWN}})
    ids = Counter(one.attributes["id"] for one in page.everything() if "id" in one.attributes)
    assert [id_ for id_, count in ids.items() if count > 1] == []
    for element in page.everything():
        for name in ("aria-labelledby", "aria-describedby", "for"):
            for target in (element.attributes.get(name) or "").split():
                assert target in ids, (element.name, name, target)
        for target in (element.attributes.get("href"), element.attributes.get("clip-path")):
            found = re.search(r"#([^)]+)", target or "")
            assert found is None or found[1] in ids, target


def test_who_cannot_see_or_has_no_mouse_can_use_the_page() -> None:
    page = page_of({**finetuned(grid=[]), **{name: pictured()[name] for name in SHOWN}})
    (html,) = page.all("html")
    assert html.attributes == {"lang": "en"}
    assert next(page.all("title")).text == "Report of animals"
    assert len(list(page.all("main"))) == len(list(page.all("h1"))) == 1
    levels = [int(one.name[1]) for one in page.everything() if re.fullmatch("h[1-6]", one.name)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    for table in page.all("table"):
        assert next(table.all("caption")).text.strip()
        assert all(head.attributes.get("scope") in ("row", "col") for head in table.all("th"))
        assert all(row.children[0].name == "th" for row in table.all("tr"))
    named = {one.attributes["for"] for one in page.all("label")}
    controls = [one for kind in ("input", "select") for one in page.all(kind)]
    assert len(controls) == 3 and all(one.attributes["id"] in named for one in controls)
    assert all("alt" in one.attributes for one in page.all("img"))
    plots = list(page.all("svg"))
    assert len(plots) == 5
    for plot in plots:
        assert plot.attributes["role"] == "img"
        title, description = next(plot.all("title")), next(plot.all("desc"))
        assert title.text and description.text
        assert (
            plot.attributes["aria-labelledby"] == f"{title.attributes['id']} {description.attributes['id']}"
        )
    for one in page.everything():
        if one.attributes.get("class") == "scroll" or one.name == "pre":
            assert one.attributes["tabindex"] == "0", "what scrolls can be scrolled by keyboard"


def test_plots_take_their_colours_from_the_page_and_keep_their_text() -> None:
    page = render_report(finetuned())
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    style = page[: page.index("</style>")]
    for plot in plots:
        assert not re.findall(r"#[0-9a-fA-F]{6}\b|rgb\(", plot), "a colour that does not know dark from light"
        for name in set(re.findall(r"var\((--[\w-]+)\)", plot)):
            assert style.count(f"{name}:") == 3, f"{name} must be set for light, dark and print"
        assert "<text" in plot and "font-family" not in plot
        assert len(plot) < 60_000
    assert "validation</text>" in plots[1]


def test_the_same_documents_give_the_same_bytes_whatever_the_settings_of_matplotlib() -> None:
    page = render_report(finetuned())
    theirs = {"font.size": 31, "svg.fonttype": "path", "svg.hashsalt": "other", "xtick.major.size": 17.0}
    with mpl.rc_context(theirs):
        assert render_report(finetuned()) == page
        assert {name: mpl.rcParams[name] for name in theirs} == theirs
    script = (
        "import hashlib; from engine.report.page import render_report; from tests.report.documents import finetuned\n"
        "print(hashlib.sha256(render_report(finetuned()).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == hashlib.sha256(page.encode()).hexdigest()


def cards(page: Element, group: str) -> list[Element]:
    return [
        one
        for one in page.by_id(f"gallery-{group}").all("li")
        if "card" in (one.attributes.get("class") or "")
    ]


def text_of(element: Element) -> str:
    return " ".join(element.text.split())


def source_of(element: Element) -> str:
    return str(next(element.all("img")).attributes["src"])


def test_a_card_has_the_picture_the_label_the_answer_and_the_bars_of_its_row() -> None:
    told = pictured()
    page = page_of(told)
    first, second, third = cards(page, "wrong")
    assert text_of(first) == "Labelled ant Answered bee bee 98.71 % ant 1.29 % img7"
    bars = list(first.all("li"))
    assert [one.attributes["style"] for one in bars] == ["--share:0.9871", "--share:0.0129"]
    assert [one.attributes.get("class") for one in bars] == [None, "own"]
    assert next(first.all("img")).attributes["alt"] == "Image img7"
    by_index = {one["index"]: one["webp"] for one in told["pictures"]["pictures"]}
    assert source_of(first) == f"data:image/webp;base64,{by_index[7]}"
    assert source_of(third) == f"data:image/webp;base64,{by_index[2]}"
    assert not list(second.all("img")), "its picture could not be had"
    assert [len(cards(page, group)) for group in ("wrong", "unsure", "right")] == [3, 1, 1]
    assert [one.attributes["data-cell"] for one in (first, second, third)] == ["0-1", "0-1", "2-0"]


def test_a_cell_of_the_matrix_opens_its_rows_where_there_are_some() -> None:
    page = page_of(pictured())
    opening = {
        cell.attributes["data-opens"]: cell.attributes["data-words"]
        for cell in page.by_id("matrix").all("td")
        if "data-opens" in cell.attributes
    }
    assert opening == {
        "0-1": "2 rows of ant, answered bee",
        "1-1": "15 rows of bee, answered so",
        "2-0": "1 row of cat, answered ant",
        "2-2": "15 rows of cat, answered so",
    }
    assert [row[2] for row in page.by_id("confusions").rows()] == ["2", "1"]
    opens = [one.attributes.get("data-opens") for one in page.by_id("confusions").all("td")]
    assert [one for one in opens if one] == ["0-1", "2-0"]


def test_mistakes_doubted_labels_and_rejects_have_their_pictures() -> None:
    told = pictured()
    page = page_of(told)
    by_index = {one["index"]: f"data:image/webp;base64,{one['webp']}" for one in told["pictures"]["pictures"]}
    assert source_of(page.by_id("mistakes")) == by_index[7]
    assert source_of(page.by_id("suspects")) == by_index[9]
    assert page.by_id("mistakes").rows() == [["img7", "a.tar", "test", "ant", "bee", "0.9871"]]
    assert page.by_id("rejects").rows() == [["truncated_image", "3"], ["bad_label", "2"]]
    assert "Of 200 files of rejects; there are more." in page.by_id("rejects-caption").text
    odd, cut = (one for one in page.by_id("missing").all("li"))
    assert text_of(odd) == "Reason bad_label Shard a.tar Message label member .cls: no UTF-8 odd"
    assert source_of(odd) == by_index[11] and not list(cut.all("img"))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"wanted": 7, "pictures": [], "missing": [{"why": "report.pictures is false", "samples": 1}]},
         "Pictures were not available: report.pictures is false."),
        ({"wanted": 3, "pictures": [picture("a.tar", 7)], "missing": [{"why": "gone", "samples": 2}]},
         "2 of 3 pictures were not available: gone (2)."),
    ],
)  # fmt: skip
def test_why_pictures_are_missing_is_told(document: dict[str, Any], words: str) -> None:
    assert words in text_of(page_of({**pictured(), "pictures": document}).by_id("gallery"))


def test_a_page_without_a_gallery_has_no_place_for_one() -> None:
    ids = {one.attributes.get("id") for one in page_of(documents()).everything()}
    assert not {"gallery", "map", "opened"} & ids


def test_the_map_has_a_dot_for_each_point_and_one_scale_for_both_axes() -> None:
    page = page_of(pictured())
    (plot,) = (one for one in page.by_id("map").all("svg"))
    paths = {one.attributes["data-class"]: one.attributes["d"] or "" for one in plot.all("path")}
    dots = {name: re.findall(r"M(\d+) (\d+)h0", path) for name, path in paths.items()}
    assert {name: len(some) for name, some in dots.items()} == {"0": 2, "1": 1, "2": 2}
    (x0, y0), (x1, y1) = (tuple(map(int, dot)) for dot in dots["0"])
    assert x1 - x0 == y0 - y1 == 306, "two units each, and up is less"
    assert [one.text for one in plot.all("text")] == ["ant", "bee", "cat"]
    assert "5 of 402 labelled rows." in page.by_id("map").text
    assert "The two axes hold 43.34 % of what tells these rows apart." in page.by_id("map").text
    options = [one.text for one in page.by_id("map-class").all("option")]
    assert options == ["all classes", "ant (2)", "bee (1)", "cat (2)"]


def test_names_on_the_map_stand_inside_and_not_on_each_other() -> None:
    names = ("n" * 30, "o" * 30, "p" * 30)
    told = pictured(names)
    told["embedding_map"] |= {"x": [0.0, 0.0, 0.0, 0.0, 9.0], "y": [0.0, 0.0, 0.0, 0.0, 0.1]}
    places = [
        (int(one.attributes["x"] or 0), int(one.attributes["y"] or 0))
        for one in page_of(told).by_id("map").all("text")
    ]
    assert all(139 <= x <= 640 - 139 for x, _ in places)
    assert len({y for _, y in places}) == 3
    assert all(later - earlier >= 17 for earlier, later in pairwise(sorted(y for _, y in places)))


def test_what_strangers_wrote_is_text_in_cards_maps_and_cells_too() -> None:
    plain, told = page_of(pictured()), pictured(HOSTILE)
    told["gallery"]["rows"][0]["key"] = told["rejects"]["examples"][0]["message"] = HOSTILE[2]
    told["pictures"]["missing"][0]["why"] = HOSTILE[1]
    hostile = page_of(told)
    for name in ("script", "img", "iframe", "link", "object", "style", "svg", "dialog"):
        assert len(list(hostile.all(name))) == len(list(plain.all(name))), name
    assert [one.text for one in hostile.by_id("map").all("text")] == [
        name[:39] + "…" if len(name) > 40 else name for name in HOSTILE
    ]
    for element in hostile.everything():
        assert not [name for name in element.attributes if name.startswith("on")], element.attributes


def test_nothing_grows_without_bound() -> None:
    many = documents(tuple(f"class{number:04d}" for number in range(1_000)))
    many["metrics"]["training"] = {**TRAINING, "history": epochs(1, 2_000), "best_epoch": 1_999}
    many["suspects"]["suspects"] *= 10_000
    many["recipe"] = {"note": "x" * 1_000_000}
    classes_P = [number % 1_000 for number in range(2_000)]
    many["embedding_map"] = {"of_rows": 10**9, "explained": [0.1, 0.1], "class": classes_P}
    many["embedding_map"] |= {"x": list(range(2_000)), "y": list(range(2_000))}
    page = render_report(many)
    assert len(page.encode()) < 750_000
    assert all(len(plot) < 60_000 for plot in re.findall(r"<svg class=\"plot.*?</svg>", page, re.DOTALL))
    assert all(len(plot) < 130_000 for plot in re.findall(r"<svg class=\"map.*?</svg>", page, re.DOTALL))
    read = read_page(page)
    assert len(read.by_id("classes").rows()) == 1_000
    assert "matrix" not in {one.attributes.get("id") for one in read.everything()}
    assert len(read.by_id("suspects").rows()) == 50
    assert "The first 50 of 10,000." in read.by_id("suspects-caption").text
    rows = read.by_id("epochs").rows()
    assert len(rows) <= 202
    assert ["1999", "head, kept"] in [[row[0].replace(",", ""), row[1]] for row in rows]
    assert rows[-1][0] == "2,000"


def test_of_very_many_classes_those_are_shown_that_do_worst() -> None:
    many = documents(tuple(f"class{number:05d}" for number in range(1_003)))
    rows = page_of(many).by_id("classes").rows()
    assert len(rows) == 1_000
    assert [rows[0][0], rows[-1][0]] == ["class00000", "class00999"]  # F1 rises with the number


def test_very_long_labels_are_cut() -> None:
    page = page_of(documents(("a" * 4096, "b", "c")))
    assert page.by_id("classes").rows()[0][0] == "a" * 79 + "…"
    assert len(render_report(documents(("a" * 4096, "b", "c")))) < 130_000
