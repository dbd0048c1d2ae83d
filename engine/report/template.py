"""A page from its template, with its style and script inside. Not for: what the page says."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent


def render_page(template_name: str, styles: Sequence[str], **values: Any) -> str:
    """The text of a page; all that it is given is escaped, unless it is Markup.

    Args:
        template_name: of a file in this folder.
        styles: names of its style sheets there, of which the last wins.
        values: that the template names; it must have all of them.
    """
    script = _text("page.js")
    template = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(template_name)
    return template.render(
        style=Markup("".join(_text(sheet) for sheet in styles)),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
