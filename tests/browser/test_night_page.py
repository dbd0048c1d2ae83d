"""The page about a night in a real browser: it is quiet, fits a phone, sorts by keyboard and leads to other nights."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.report.night import render_night
from tests.browser.conftest import Open, grave_faults
from tests.report.night_documents import documents, earlier_nights, failed, held, published, with_images

WIDTHS_PX = (1100, 400)
NIGHTS = {"published": published(), "held": held(), "failed": failed()}
PICTURED = with_images(held())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages as they lie in `nights/`: four of tonight, one of them with pictures, and the one of the night before."""
    folder, before = tmp_path_factory.mktemp("nights"), earlier_nights(3)
    for name, night in NIGHTS.items():
        page = render_night(documents(night, *before))
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    night, pictures = PICTURED
    page = render_night(documents(night, *before, pictures=pictures))
    (folder / "pictured.html").write_text(page, encoding="utf-8")
    last = before[0]
    (folder / f"{last['run_id']}.html").write_text(render_night(documents(last)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [*NIGHTS, "pictured"])
def test_a_night_asks_for_nothing_complains_of_nothing_and_fits_a_phone(
    open_page: Open, folder: Path, name: str
) -> None:
    path = folder / f"{name}.html"
    for width in WIDTHS_PX:
        for scheme in ("light", "dark"):
            opened = open_page(path, width, color_scheme=scheme)
            opened.page.wait_for_timeout(100)
            assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
            assert opened.complaints == []
            found = opened.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert found[0] <= found[1], f"wider than {width} px"
            verdict = opened.page.locator("#verdict").bounding_box()
            assert verdict is not None and verdict["y"] + verdict["height"] < 700, "seen without scrolling"


@pytest.mark.parametrize("width", WIDTHS_PX)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_use_a_page_with_pictures_and_sees_them(
    open_page: Open, folder: Path, shots: Path, width: int, scheme: str
) -> None:
    """By the rules of axe-core."""
    page = open_page(folder / "pictured.html", width, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.screenshot(path=shots / f"night-{scheme}-{width}.png", full_page=True)
    sizes = "images => images.map((one) => [one.naturalWidth, one.naturalHeight])"
    assert page.locator("#doubtful img").evaluate_all(sizes) == [[96, 72], [43, 96]]
    assert page.locator("#rejects img").evaluate_all(sizes) == [[96, 20]]
    shown = "images => images.map((one) => one.clientWidth / one.clientHeight)"
    assert page.locator("#doubtful img").evaluate_all(shown) == pytest.approx([96 / 72, 43 / 96], rel=0.03)
    assert grave_faults(page) == []


def test_rows_are_sorted_with_their_pictures(open_page: Open, folder: Path) -> None:
    page = open_page(folder / "pictured.html").page
    keys = page.locator("#doubtful tbody th")
    head = page.locator("#doubtful thead th").first
    for order in (["img9", "img10", "img12"], ["img12", "img10", "img9"]):
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert keys.all_inner_texts() == order
        pictured = keys.evaluate_all("rows => rows.map((one) => one.querySelectorAll('img').length)")
        assert pictured == [1 if key != "img12" else 0 for key in order]


def test_labels_are_sorted_by_keyboard_and_bars_are_as_long_as_their_numbers(
    open_page: Open, folder: Path
) -> None:
    page = open_page(folder / "held.html").page
    rows = page.locator("#label-mix tbody th")
    assert rows.all_inner_texts() == ["ant", "bee", "cat"]
    head = page.locator("#label-mix thead th").nth(1)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert (head.get_attribute("aria-sort"), rows.all_inner_texts()) == ("ascending", ["cat", "bee", "ant"])
    bar = page.locator("#label-mix td.bar").first.evaluate("one => getComputedStyle(one).backgroundImage")
    assert "8.2%" in bar  # of cat, tonight


def test_a_link_in_the_list_opens_the_page_of_that_night(open_page: Open, folder: Path) -> None:
    page = open_page(folder / "published.html").page
    page.locator("#nights a").first.click()
    assert page.locator("h1").inner_text() == "Night of 2026-01-28 04:05 UTC"


def test_printed_the_table_behind_the_drawing_is_shown(open_page: Open, folder: Path) -> None:
    page = open_page(folder / "published.html").page
    assert not page.locator("#cosines").is_visible()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#cosines").is_visible()
    assert not page.locator("nav").is_visible()
    page = open_page(folder / "pictured.html", color_scheme="dark").page
    page.emulate_media(media="print")
    assert page.locator("#doubtful img").first.is_visible()
