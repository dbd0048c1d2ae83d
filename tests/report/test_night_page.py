"""The page about a night says what became of it and what to do, is harmless, the same each time, and for everyone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from engine.report.night import render_night
from engine.report.template import FOLDER
from engine.thumbnails import no_pictures
from tests.report.night_documents import (
    EDGES,
    NIGHT,
    RUN_ID,
    documents,
    earlier_nights,
    failed,
    held,
    published,
    with_images,
)
from tests.report.pages import Element, read_page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><svg onload='alert(1)'>{{ 7*7 }} $\\frac{",
)


def page_of(
    night: dict[str, Any], *earlier: dict[str, Any], pictures: dict[str, Any] | None = None
) -> Element:
    return read_page(render_night(documents(night, *earlier, pictures=pictures)))


def ids_of(page: Element) -> set[str | None]:
    return {element.attributes.get("id") for element in page.everything()}


def sentences(page: Element) -> list[str]:
    """Of the verdict."""
    return [one.text for one in page.by_id("verdict").all("p")]


def commands(page: Element) -> list[str]:
    return [one.text for one in page.by_id("next").all("code")]


def test_a_published_night_says_so_first_with_every_criterion_beside_its_threshold() -> None:
    page = page_of(published())
    assert next(page.all("title")).text == "Published: night of 2026-02-03 04:05 UTC"
    assert next(page.by_id("verdict").all("h2")).text == "Published"
    assert sentences(page) == [
        "Every criterion that was judged holds; readers have its 1,213 rows in 8 parts."
    ]
    assert [row[1:4] for row in page.by_id("criteria").rows()] == [
        ["passed", "1,213", "exactly 1,213"],
        ["passed", "1.14 %", "at most 2.00 %"],
        ["passed", "0.071", "at most 0.250"],
        ["passed", "1.30 %", "at most 10.00 %"],
        ["passed", "0.043", "at most 0.250"],
        ["passed", "3.13 %", "at most 50.00 %"],
        ["not judged", "-", "-"],
    ]
    assert commands(page) == ["engine inspect s3://labels/animals"]


def test_a_night_that_is_held_back_names_what_is_broken_and_the_commands_that_go_on() -> None:
    night = held(storage={"endpoint_url": "http://store:9000", "region": "eu-1", "anonymous": False})
    page = page_of(night)
    assert next(page.by_id("verdict").all("h2")).text == "Held back"
    assert sentences(page) == [
        "1 criterion does not hold: Drift of the embeddings (PSI) is 1.234, wanted at most 0.250. "
        "Readers see what they saw before; 8 parts wait in held/."
    ]
    assert [row[1] for row in page.by_id("criteria").rows()].count("broken") == 1
    assert page.by_id("criteria").rows()[2][1:4] == ["broken", "1.234", "at most 0.250"]
    assert commands(page) == [
        "engine review s3://labels/animals --held --endpoint-url http://store:9000 --region eu-1",
        "engine nightly nightly.yaml --set budget.max_seconds=900 --publish",
    ]
    assert "The gate says: look at tonight's images." in page.by_id("next").text
    assert "delete s3://labels/animals/held/" in page.by_id("next").text


def test_a_night_of_several_labels_for_a_row_is_not_told_to_use_a_command_that_refuses_them() -> None:
    page = page_of(held(task="multi_label"))
    assert commands(page) == ["engine nightly nightly.yaml --set budget.max_seconds=900 --publish"]
    assert "Parquet files in s3://labels/animals/held/data/" in page.by_id("next").text
    assert "a row may have several" in page.by_id("labels").text


def test_a_night_that_failed_says_where_and_what_readers_see_and_has_no_section_it_knows_nothing_of() -> None:
    page = page_of(failed())
    assert next(page.by_id("verdict").all("h2")).text == "Failed"
    assert sentences(page) == [
        "It ended during score: s3://features/lite0: no answer (found: time-outs).",
        "Readers see what they saw before. 4 parts wait in held/, for the next night to judge.",
    ]
    assert commands(page) == ["engine nightly nightly.yaml --set budget.max_seconds=900"]
    assert "The error's own way out: look after the store." in page.by_id("next").text
    assert not {"gate", "labels", "drift", "left-out", "rows"} & ids_of(page)
    assert page.by_id("shards").rows()[2] == ["Done tonight", "5"]
    interrupted = failed(error={"kind": "KeyboardInterrupt", "thing": "interrupted"}, ended_in="extract")
    page = page_of(interrupted)
    assert next(page.by_id("verdict").all("h2")).text == "Interrupted"
    assert sentences(page)[0] == "It ended during extract: interrupted."
    page = page_of(failed(published_parts=3))
    assert sentences(page)[1].startswith("3 parts had been published before.")
    page = page_of(failed(ended_in="publish", is_publishing=True))
    assert (
        sentences(page)[1] == "Readers may have some of its parts already; the next run publishes the rest."
    )


def test_a_night_stopped_by_its_deadline_says_what_is_left_whatever_its_verdict() -> None:
    night = published(is_finished=False)
    night["extract"]["shards_left"], night["score"]["parts_left"] = 19, 23
    page = page_of(night)
    assert next(page.by_id("verdict").all("h2")).text == "Published"
    assert sentences(page)[1] == "Its time was up: 19 shards and 23 parts are left for the next night."
    assert commands(page) == ["engine nightly nightly.yaml --set budget.max_seconds=900"]
    assert "The budget allowed 900 seconds." in page.by_id("time").text


def test_nothing_new_parts_of_earlier_nights_and_publishing_by_hand_are_told_apart() -> None:
    nothing = published(gate=None, published_parts=0, published_rows=0, rows=0, answer_counts={})
    page = page_of(nothing)
    assert next(page.by_id("verdict").all("h2")).text == "Nothing new"
    waiting = {**nothing, "held_parts": 8, "refused_parts": 8}
    page = page_of(waiting)
    assert next(page.by_id("verdict").all("h2")).text == "Nothing new, earlier nights are held back"
    assert sentences(page)[1] == "8 parts of earlier nights are still held back."
    assert commands(page)[0] == "engine review s3://labels/animals --held"
    page = page_of(published(held_parts=5, refused_parts=5))
    assert next(page.by_id("verdict").all("h2")).text == "Published"
    assert sentences(page)[1] == "5 parts of earlier nights are still held back."
    page = page_of(published(by_hand=True, gate=None))
    assert sentences(page) == ["A person published what was held back: 1,213 rows in 8 parts."]


def test_what_else_a_night_met_is_said_but_what_the_gate_said_not_twice() -> None:
    verdicts = [
        {"kind": "HeldBack", "thing": "s3://labels/other: the night was held back"},
        {"kind": "ShardsFailed", "thing": "2 shards could not be read to their end\n    a.tar: ..."},
    ]
    night = published(verdicts=verdicts)
    night["extract"] |= {
        "shards_failed": 2,
        "failed_shards": {"b.tar": "ends in a sample", "a.tar": "no tar"},
    }
    page = page_of(night)
    assert sentences(page)[1:] == ["2 shards could not be read to their end."]
    assert page.by_id("failed-shards").rows() == [["a.tar", "no tar"], ["b.tar", "ends in a sample"]]
    assert "Repair or remove the shards" in page.by_id("next").text


def test_counts_time_and_labels_have_the_figures_of_the_night() -> None:
    page = page_of(published())
    (headline,) = (one for one in page.all("dl") if one.attributes.get("class") == "headline")
    assert {
        next(pair.all("dt")).text: next(pair.all("dd")).text
        for pair in headline.children
        if pair.name == "div"
    } == {
        "Shards done": "5",
        "Images judged": "1,227",
        "Rejects": "14",
        "Rows with a label": "1,175",
        "Rows without": "38",
        "Parts published": "8",
        "Parts held back": "0",
    }
    assert page.by_id("phases").rows() == [
        ["extract", "300.0", "75.00 %"],
        ["score", "60.0", "15.00 %"],
        ["judge", "10.0", "2.50 %"],
        ["publish", "5.0", "1.25 %"],
        ["everything else", "25.0", "6.25 %"],
    ]
    assert "Most of the night went into extract." in page.by_id("time").text
    assert "Extraction was held up by decode, at 4.1 images/s" in page.by_id("time").text
    assert page.by_id("stages").rows() == [["decode", "260.5", "91.00 %"], ["embed", "71.0", "25.00 %"]]
    assert page.by_id("label-mix").rows() == [
        ["ant", "613", "50.54 %", "50.00 %", "51.00 %"],
        ["bee", "500", "41.22 %", "37.50 %", "29.00 %"],
        ["cat", "100", "8.24 %", "12.50 %", "20.00 %"],
    ]
    bars = [cell.attributes.get("style") for cell in page.by_id("label-mix").all("td")]
    assert bars[:4] == [None, "--share:0.505", "--share:0.500", "--share:0.510"]
    assert page.by_id("reasons").rows() == [["truncated_image", "9", "64.29 %"], ["no_image", "5", "35.71 %"]]
    assert page.by_id("rejects").rows()[0][:3] == ["img7", "a.tar", "truncated_image"]
    assert "The first 1 of 14." in page.by_id("rejects-caption").text
    assert page.by_id("doubtful").rows() == [["img9", "b.tar", "bee", "no label", "0.4113", "0.0131"]]
    assert (
        "Of 17 keys of replaced shards that had a prediction before, 16 (94.12 %)"
        in page.by_id("agreement").text
    )


def pictured_keys(page: Element, table: str) -> dict[str, tuple[str | None, ...]]:
    """Of rows with a picture: key -> width, height and alternative text."""
    names = ("width", "height", "alt")
    return {
        row.children[0].text.strip(): tuple(image.attributes[name] for name in names)
        for row in page.by_id(table).all("tr")
        for image in row.all("img")
    }


def test_pictures_stand_beside_the_keys_of_their_rows_and_words_say_which_are_missing() -> None:
    night, pictures = with_images(published())
    page = page_of(night, pictures=pictures)
    assert pictured_keys(page, "doubtful") == {"img9": ("96", "72", ""), "img10": ("43", "96", "")}
    (large,) = pictured_keys(page, "rejects")
    assert large.startswith("photos/2026/panorama-")
    assert [row[0] for row in page.by_id("doubtful").rows()] == ["img9", "img10", "img12"]
    said = "1 of 4 pictures were not available: the archive has another image there now, or none (1)."
    assert said in page.by_id("rows").text and said not in page.by_id("left-out").text
    several = {**night, "doubtful": {"rows": [], "rows_read": 0}}
    page = page_of(several, pictures=pictures)
    assert said in page.by_id("left-out").text, "where no rows are doubted"
    assert not list(page_of(night).all("img")), "a night without pictures"


def test_a_night_without_pictures_says_why() -> None:
    page = page_of(published(), pictures=no_pictures("report.pictures is false"))
    assert "Pictures were not available: report.pictures is false." in page.by_id("rows").text
    assert not list(page.all("img"))
    old = published()
    del old["doubtful"]["rows"][0]["index"], old["rejects_found"]["named"][0]["index"]
    page = page_of(old, pictures=with_images(published())[1])
    assert not list(page.all("img")), "rows of older summaries do not say which sample they are"


def test_drift_is_drawn_against_the_bundle_and_the_last_night_and_said_in_words() -> None:
    page = page_of(published())
    assert [one.text for one in page.by_id("drift").all("p")][:3] == [
        "Drift from the bundle's held-out rows: 0.071.",
        "1.30% of 1,213 rows lie farther.",
        "Drift from the night that was published last (2026-02-02 03:04 UTC): 0.012, no more than chance explains "
        "(0.058).",
    ]
    rows = page.by_id("cosines").rows()
    assert rows[0] == [f"{EDGES[0]:.4f}", "1.00 %", "1.00 %", "1.07 %"]
    assert rows[4] == [f"{EDGES[49]:.4f}", "50.00 %", "50.00 %", "49.55 %"]  # 13 + 49 x 12 of 1,213
    lines = [
        [
            (float(x), float(y))
            for x, y in re.findall(
                r"[ML] ([\d.-]+) ([\d.-]+)",
                next(page.by_id(f"cosines-set-{at}").all("path")).attributes["d"] or "",
            )
        ]
        for at in range(3)
    ]
    assert [line[0][0] for line in lines] == [lines[0][0][0]] * 3
    assert lines[0][0][1] == pytest.approx(lines[1][0][1], abs=0.01), "the last night is as the bundle"
    assert lines[2][-1][1] > lines[0][-1][1], (
        "of tonight's rows more lie above the last edge: its line ends lower"
    )
    assert "tonight 49.5 %" in page.by_id("cosines-desc").text


def test_without_a_reference_or_a_last_night_there_is_nothing_drawn_and_nothing_made_up() -> None:
    page = page_of(published(reference=None, cosine_counts=None, last_night=None))
    assert "cosines" not in ids_of(page)
    assert page.by_id("label-mix").rows()[0] == ["ant", "613", "50.54 %"]
    alone = published()
    alone["last_night"] |= {"cosine_counts": None, "drift": None}
    page = page_of(alone)
    assert page.by_id("cosines").rows()[0] == [f"{EDGES[0]:.4f}", "1.00 %", "1.07 %"]
    assert "kept no cosines" in page.by_id("drift").text


def test_earlier_nights_are_listed_and_only_those_with_a_page_are_linked() -> None:
    page = page_of(published(), *earlier_nights(30))
    rows = page.by_id("nights").rows()
    assert len(rows) == 30
    assert rows[0] == ["2026-01-28 04:05 UTC", "Published", "8", "0", "1,213", "14", "38", "400"]
    assert rows[2][1:4] == ["Held back", "0", "8"]
    links = [one.attributes["href"] for one in page.by_id("nights").all("a")]
    assert len(links) == 29
    assert links[0] == "nightly-20260128T040506Z-0000.html"
    old = {"run_id": "x", "has_page": False, "published_parts": 3, "published_rows": 7}  # of an older engine
    strange = {"run_id": '"><b>', "has_page": True, "gate": "x", "seconds": "soon", "rows": None}
    rows = page_of(published(), old, strange).by_id("nights").rows()
    assert rows[0] == ["x", "Nothing new", "3", "-", "-", "-", "-", "-"]
    assert rows[1][0] == '"><b>'
    assert not list(page_of(published(), old, strange).by_id("nights").all("a"))


def test_a_summary_of_an_older_engine_has_a_page() -> None:
    told = (
        "run_id",
        "table",
        "bundle",
        "extract",
        "score",
        "rows",
        "answer_counts",
        "abstained",
        "gate",
        "seconds",
    )
    page = page_of({name: NIGHT[name] for name in told})
    assert next(page.by_id("verdict").all("h2")).text == "Published"
    assert page.by_id("label-mix").rows()[0] == ["ant", "613", "50.54 %"]
    assert "time" not in ids_of(page)
    page = page_of({"run_id": RUN_ID})
    assert next(page.by_id("verdict").all("h2")).text == "Nothing new"


def test_lineage_has_bundle_network_recipe_and_engine() -> None:
    page = page_of(published())
    (facts,) = (one for one in page.all("dl") if one.attributes.get("class") == "facts")
    assert {
        next(pair.all("dt")).text: next(pair.all("dd")).text for pair in facts.children if pair.name == "div"
    } == {
        "Run": RUN_ID,
        "Began": "2026-02-03T04:05:06+00:00",
        "Command": "engine nightly nightly.yaml --set budget.max_seconds=900",
        "Engine": "0.1.0",
        "Predictions": "s3://labels/animals",
        "Bundle": "00112233445566aa in s3://models/animals",
        "Embeddings": "s3://features/lite0",
        "Fingerprint": "0123456789abcdef" * 4,
        "Recipe of the night, sha-256": "5" * 64,
        "What decides a prediction, sha-256": "6" * 64,
    }
    assert '"max_label_psi": 0.25' in page.by_id("lineage").text


def hostile_night() -> dict[str, Any]:
    night = held(answer_counts=dict.fromkeys(HOSTILE, 401), table=f"s3://x/{HOSTILE[1]}")
    night["extract"] |= {
        "failed_shards": {HOSTILE[0]: HOSTILE[2]},
        "shards_failed": 1,
        "bottleneck": HOSTILE[0],
    }
    night["rejects_found"]["named"][0] |= {"key": HOSTILE[2], "message": HOSTILE[0]}
    night["doubtful"]["rows"][0] |= {"key": HOSTILE[1], "candidate": HOSTILE[0]}
    night["held_back"]["way_out"] = HOSTILE[2]
    night["gate"]["rules"][2]["sentence"] = HOSTILE[1]
    night["recipe"] = {HOSTILE[2]: HOSTILE[0]}
    night["command"] = HOSTILE[0]
    return night


def test_labels_keys_and_paths_of_strangers_are_text_and_nothing_else() -> None:
    plain, hostile = page_of(held()), page_of(hostile_night(), pictures=no_pictures(HOSTILE[0]))
    assert f"Pictures were not available: {HOSTILE[0]}." in hostile.by_id("rows").text
    for name in ("script", "img", "iframe", "link", "object", "style", "svg", "a"):
        assert len(list(hostile.all(name))) == len(list(plain.all(name))), name
    for element in hostile.everything():
        assert not [name for name in element.attributes if name.startswith("on")], element.attributes
    assert {row[0] for row in hostile.by_id("label-mix").rows()} == {*HOSTILE, "ant", "bee", "cat"}
    assert hostile.by_id("rejects").rows()[0][0] == HOSTILE[2]
    assert hostile.by_id("doubtful").rows()[0][0] == HOSTILE[1]
    # What is to be typed is one word to a shell, whatever the table is called.
    assert commands(hostile)[0] == "engine review 's3://x/\"><img src=x onerror=alert(1)>' --held"


def test_the_page_asks_for_nothing_and_allows_no_script_but_its_own() -> None:
    page = render_night(documents(held(), *earlier_nights(3)))
    assert not re.findall(r"https?:", page)
    assert not re.findall(r"@import|url\((?!#)", page)
    read = read_page(page)
    for element in read.everything():
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            target = element.attributes.get(name)
            assert target is None or re.fullmatch(r"#[\w-]+|nightly-\d{8}T\d{6}Z-[0-9a-f]{4}\.html", target)
    (code,) = read.all("script")
    (policy,) = (one.attributes["content"] for one in read.all("meta") if "http-equiv" in one.attributes)
    digest = base64.b64encode(hashlib.sha256(code.text.encode()).digest()).decode()
    assert policy is not None and policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize("night", [published(), held(), failed()], ids=["published", "held", "failed"])
def test_links_lead_somewhere_tables_have_captions_and_all_can_be_reached_by_keyboard(
    night: dict[str, Any],
) -> None:
    page = page_of(night, *earlier_nights(2))
    ids = Counter(one.attributes["id"] for one in page.everything() if "id" in one.attributes)
    assert [id_ for id_, count in ids.items() if count > 1] == []
    for element in page.everything():
        for name in ("aria-labelledby", "aria-describedby", "for"):
            for target in (element.attributes.get(name) or "").split():
                assert target in ids, (element.name, name, target)
        href = element.attributes.get("href") or ""
        assert not href.startswith("#") or href[1:] in ids, href
    (html,) = page.all("html")
    assert html.attributes == {"lang": "en"}
    assert len(list(page.all("main"))) == len(list(page.all("h1"))) == 1
    levels = [int(one.name[1]) for one in page.everything() if re.fullmatch("h[1-6]", one.name)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    for table in page.all("table"):
        assert next(table.all("caption")).text.strip()
        assert all(head.attributes.get("scope") in ("row", "col") for head in table.all("th"))
        assert all(row.children[0].name == "th" for row in table.all("tr"))
    for plot in page.all("svg"):
        assert plot.attributes["role"] == "img"
        assert next(plot.all("title")).text and next(plot.all("desc")).text
    for one in page.everything():
        if one.attributes.get("class") == "scroll" or one.name == "pre":
            assert one.attributes["tabindex"] == "0", "what scrolls can be scrolled by keyboard"


def test_every_colour_is_set_for_light_dark_and_print() -> None:
    page = render_night(documents(held()))
    style = page[: page.index("</style>")]
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    own = (FOLDER / "night.css").read_text(encoding="utf-8")
    for name in set(re.findall(r"var\((--[\w-]+)", own + "".join(plots))) - {"--share"}:
        assert style.count(f"{name}:") == 3, name
    for plot in plots:
        assert not re.findall(r"#[0-9a-fA-F]{6}\b|rgb\(", plot), "a colour that does not know dark from light"


def test_the_same_documents_give_the_same_bytes() -> None:
    told = documents(held(), *earlier_nights(5))
    assert render_night(told) == render_night(documents(held(), *earlier_nights(5)))


def test_nothing_grows_without_bound() -> None:
    many = held(
        answer_counts={f"class{number:05d}": 1_003 - number % 7 for number in range(21_000)}, rows=21_000_000
    )
    many["last_night"]["answer_counts"] = dict(many["answer_counts"])
    many["extract"] |= {
        "shards_failed": 5_000,
        "failed_shards": {f"{number:03d}.tar": "x" * 5_000 for number in range(100)},
    }
    many["rejects_found"]["named"][0] |= {"message": "x" * 100_000, "key": "k" * 4_096}
    many["held_back"]["way_out"] = "x" * 100_000
    many["recipe"] = {"note": "x" * 1_000_000}
    page = render_night(documents(many, *earlier_nights(30)))
    assert len(page.encode()) < 200_000
    read = read_page(page)
    assert len(read.by_id("label-mix").rows()) == 41
    assert read.by_id("label-mix").rows()[-1][0] == "(20,963 other labels)"  # and the three of the bundle
    assert "The first 20 of 5,000." in read.by_id("failed-shards-caption").text
    assert read.by_id("rejects").rows()[0][0] == "k" * 79 + "…"
