"""A real Chromium, and pages of it; where there is none the tests are skipped, or fail where it was asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW_TO = (
    "no Chromium for the tests of pages: install one (Debian, Ubuntu: apt-get install chromium), or name it in "
    "ENGINE_BROWSER, then run `make browser`"
)


@dataclass
class Opened:
    """A page that is open, and what it did that it should not."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


Open = Callable[..., Opened]


def _unable(why: str) -> None:
    """Skip, or fail under `make browser`: who asks for a browser wants to hear that there is none."""
    if os.environ.get("ENGINE_BROWSER_NEEDED"):
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium as the machine has it, without a window."""
    found = os.environ.get("ENGINE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        _unable(HOW_TO)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _unable(
            "playwright is not installed: run `make browser`, or pip install 'image-feature-engine[browser]'"
        )
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=as_root)
        print(f"Chromium {started.version}")
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a file in a context of its own; keyword arguments as Playwright's `new_context` has them."""
    contexts = []

    def opened(path: Path, width: int = 1100, **settings: object) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)  # type: ignore[arg-type]
        contexts.append(context)
        one = Opened(context.new_page())
        one.page.on("request", lambda request: one.requests.append(request.url))
        one.page.on("console", lambda message: one.complaints.append(message.text))
        one.page.on("pageerror", lambda error: one.complaints.append(str(error)))
        one.page.goto(path.as_uri())
        return one

    yield opened
    for context in contexts:
        context.close()


def grave_faults(page: Page) -> list[tuple[str, list[str]]]:
    """Serious and critical violations: the rule, and the elements."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response
    assert len(found["passes"]) > 10, "the rules were looked at"
    return [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.fixture(scope="session")
def shots(repository: Path) -> Path:
    """Where pictures of the pages are kept for a person to look at."""
    folder = Path(os.environ.get("ENGINE_BROWSER_SHOTS") or repository / "build" / "browser")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
