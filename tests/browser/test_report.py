"""The report in a real browser: it is quiet, its controls say what metrics.json says, and everyone can use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.report.page import render_report
from tests.browser.conftest import Open, grave_faults
from tests.report.documents import documents, finetuned, pictured

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS_PX = (1100, 400)
HOSTILE = (
    "<script>document.title='taken'</script>",
    "'\"><img src=x onerror=alert(1)>",
    "</script>{{ 7*7 }} $\\frac{",
)


def full() -> dict[str, Any]:
    """Every section that a report can have."""
    some = pictured()
    head = {"kind": "linear"}
    tried = [
        {"head": head, "optimizer": {"kind": "adam", "learning_rate": rate}, "published": rate == 0.1}
        | {"epochs": 5, "best_epoch": 4, "validation_loss": rate + 0.2, "stopped": ""}
        for rate in (0.1, 0.2)
    ]
    told = finetuned(grid=tried)
    told["metrics"]["test"]["confusion_matrix"] = [[15, 2, 0], [0, 12, 0], [1, 0, 21]]
    return told | {name: some[name] for name in ("gallery", "embedding_map", "rejects", "pictures")}


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(full()), encoding="utf-8")
    return path


def test_the_page_asks_for_nothing_and_complains_of_nothing(
    open_page: Open, report: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / "hostile.html"
    hostile.write_text(render_report(pictured(HOSTILE)), encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(render_report(documents(test=None, validation=None)), encoding="utf-8")
    for path in (report, hostile, bare):
        opened = open_page(path)
        opened.page.wait_for_timeout(200)
        away = [url for url in opened.requests if not url.startswith("data:")]
        assert away == [path.as_uri()]
        assert opened.complaints == []
        assert opened.page.title() == "Report of animals"
        broken = opened.page.evaluate("[...document.images].filter((one) => !one.naturalWidth).length")
        assert broken == 0


def test_a_request_of_a_page_would_be_noticed(open_page: Open, report: Path, tmp_path: Path) -> None:
    """The policy of the page forbids it, and the test above sees the complaint."""
    page = tmp_path / "asking.html"
    asking = '<img src="https://example.org/x.png" alt=""></main>'
    page.write_text(report.read_text(encoding="utf-8").replace("</main>", asking), encoding="utf-8")
    opened = open_page(page)
    opened.page.wait_for_timeout(200)
    assert any("Content Security Policy" in told for told in opened.complaints)


def test_the_slider_shows_the_figures_of_metrics_json_at_each_threshold(
    open_page: Open, report: Path
) -> None:
    page = open_page(report).page
    curve = full()["metrics"]["test"]["by_min_confidence"]
    slider = page.locator("#min-confidence")
    slider.focus()
    assert slider.get_attribute("value") == "50", "it begins at the threshold suggested for 95 %"
    for keys, place in (
        ([], 50),
        (["Home"], 0),
        (["ArrowRight"] * 3, 3),
        (["End"], 200),
        (["ArrowLeft"], 199),
    ):
        for key in keys:
            page.keyboard.press(key)
        point = curve[place]
        right = "-" if point["accuracy"] is None else f"{100 * point['accuracy']:.2f} %"
        assert page.locator("#at-threshold").inner_text() == (
            f"At {point['min_confidence']:.3f}: {100 * point['coverage']:.2f} % of the rows are labelled, "
            f"{right} of these right."
        )
        assert slider.get_attribute("aria-valuetext") == f"{point['min_confidence']:.3f}"
        shares = page.evaluate(
            "[...document.querySelectorAll('.gauge')].map((one) => Number(one.style.getPropertyValue('--share')))"
        )
        assert shares == pytest.approx([point["coverage"], point["accuracy"] or 0], abs=1e-4)


def test_a_cell_opens_its_images_by_mouse_and_by_keyboard(open_page: Open, report: Path, shots: Path) -> None:
    page = open_page(report).page
    dialog, button = (
        page.locator("#opened"),
        page.get_by_role("button", name="2 rows of ant, answered bee").first,
    )
    assert button.inner_text() == "2" and not dialog.is_visible()
    button.click()
    assert dialog.is_visible()
    assert page.locator("#opened-heading").inner_text() == "2 rows of ant, answered bee: 2 shown"
    assert dialog.locator(".key").all_inner_texts() == ["img7", "img8"]
    assert dialog.locator("img").count() == 1, "the other picture could not be had"
    assert dialog.locator("img").evaluate("(one) => one.naturalWidth") == 96
    page.screenshot(path=shots / "cell.png")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert button.evaluate("(one) => one === document.activeElement")
    page.get_by_role("button", name="21 rows of cat, answered so").focus()
    page.keyboard.press("Enter")
    assert dialog.locator(".key").all_inner_texts() == ["img4"]
    page.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def column(page: Page, table: str, place: int) -> list[str]:
    return page.locator(f"#{table} tbody tr > :nth-child({place})").all_inner_texts()


def test_tables_are_sorted_by_keyboard(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    head = page.locator("#classes thead th", has_text="ROC AUC")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "classes", 1) == ["ant", "cat", "bee"], "0.9130, 0.9130, nothing"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "classes", 1)[-1] == "bee", "what has no figure stays last"
    align = "cell => getComputedStyle(cell).textAlign"
    assert head.evaluate(align) == page.locator("#classes tbody td").last.evaluate(align) == "right"
    page.keyboard.press("Tab")
    support = page.locator("#classes thead th", has_text="Rows").locator("button")
    support.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert column(page, "classes", 5) == ["13", "12", "11"]
    assert head.get_attribute("aria-sort") is None
    page.locator("#confusions thead button", has_text="Rows").click()
    assert column(page, "confusions", 3) == ["1", "2"], "a count that opens its rows is sorted as a number"


def test_rows_and_columns_of_the_matrix_move_together(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    page.locator("#matrix-order").select_option("recall")  # 15/17, 12/12, 21/22
    assert column(page, "matrix", 1) == ["ant", "cat", "bee"]
    assert page.locator("#matrix thead th").all_inner_texts()[1:] == ["ant", "cat", "bee"]
    rows = [column(page, "matrix", place) for place in (2, 3, 4)]
    assert rows == [["15", "1", "0"], ["0", "21", "0"], ["2", "0", "12"]]
    page.locator("#matrix-order").select_option("rows")
    assert column(page, "matrix", 1) == ["cat", "ant", "bee"]
    page.locator("#matrix-order").select_option("named")
    assert column(page, "matrix", 3) == ["2", "12", "0"]


def test_one_class_of_the_map_is_shown_alone(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    page.locator("#map-class").select_option(label="bee (1)")
    dim = "[...document.querySelectorAll('#map path')].map((one) => one.classList.contains('dim'))"
    assert page.evaluate(dim) == [True, False, True]
    page.locator("#map-class").select_option("")
    assert page.evaluate(dim) == [False, False, False]


def test_a_grave_fault_would_be_found(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    page.evaluate("document.querySelector('#gallery img').removeAttribute('alt')")
    page.evaluate("document.querySelector('#min-confidence').id = 'nameless'")
    assert {rule for rule, _ in grave_faults(page)} >= {"image-alt", "label"}


@pytest.mark.parametrize("width", WIDTHS_PX)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_use_the_page(
    open_page: Open, report: Path, shots: Path, width: int, scheme: str
) -> None:
    """By the rules of axe-core; with everything unfolded, then with the rows of a cell open."""
    page = open_page(report, width, color_scheme=scheme).page
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 23, 27)"}[scheme]
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.screenshot(path=shots / f"report-{scheme}-{width}.png", full_page=True)
    page.evaluate("scrollTo(0, 0)")
    for cell in (None, "#matrix [data-opens='0-1'] button"):
        if cell is not None:
            page.locator(cell).click()
        assert grave_faults(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no scrolling sideways"


def test_without_scripts_the_page_says_the_same(open_page: Open, report: Path) -> None:
    page = open_page(report, java_script_enabled=False).page
    assert not page.locator("#slider").is_visible()
    assert page.locator("#thresholds").is_visible()
    assert page.locator("#thresholds tbody tr").count() == 9
    assert page.locator("#gallery-wrong .card").count() == 3
    assert page.locator(".scripted:visible").count() == 0


def test_on_paper_everything_is_unfolded_and_controls_are_gone(
    open_page: Open, report: Path, shots: Path
) -> None:
    page = open_page(report, color_scheme="dark").page
    assert page.locator("#gallery-right").get_attribute("open") is None
    paper = page.pdf(path=shots / "report.pdf", print_background=True)
    assert paper.startswith(b"%PDF-") and len(paper) > 20_000
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for control in ("nav", "#slider", "#matrix-order", "#map-class"):
        assert not page.locator(control).is_visible(), control
    assert page.locator("#gallery-right img").is_visible()
