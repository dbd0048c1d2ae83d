"""Labels and metadata out of the text and JSON members of a record; not for finding or reading those members.

A field is written as an extension ("cls", "txt": the member's whole text) or as "json:name" or "json:name.sub"
(one field of the json member). Text is UTF-8; a byte order mark at its start is dropped.

    what is there                      as a label             as metadata
    no such member, or field, or null  null                   null
    text                               without outer spaces   without outer spaces
    empty text                         null                   ""
    JSON string                        as it is ("" is null)  as it is
    other JSON scalar                  its JSON spelling      its JSON spelling
    JSON object or list                BadText                its JSON text
    not JSON                           BadText                the member's text
    not UTF-8                          BadText                undecodable bytes escaped: \\xff
    more than 4,096 characters         BadText                kept
    unreadable (too long, a link)      BadText                null
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, cast, final

MAX_TEXT_BYTES = (
    2**20
)  # of one label or metadata member; captions and camera JSON are a thousand times smaller
MAX_LABEL_CHARACTERS = 4096
_JSON_PREFIX = "json:"


class BadText(ValueError):
    """A member that is no usable label; the message says why."""


@final
@dataclass(frozen=True, slots=True)
class TextField:
    """Where a text stands: in a member, or in a field of its JSON."""

    extension: str
    """Of the member, lower case."""
    steps: tuple[str, ...]
    """Names to follow into the JSON document; empty: the whole text."""

    @property
    def column(self) -> str:
        """The name of its column: the last step."""
        return (self.steps or self.extension.split("."))[-1]


@final
class MemberText:
    """The bytes of one text member, or why they were not read; JSON is parsed once, however many fields it gives."""

    def __init__(self, data: bytes, unreadable: str | None = None) -> None:
        self.data, self.unreadable = data, unreadable

    @cached_property
    def document(self) -> Any:
        """The parsed JSON.

        Raises:
            ValueError: not UTF-8, not JSON (NaN and Infinity are not), or a number with too many digits.
            RecursionError: nested too deep to be data.
        """
        return json.loads(self.data.decode("utf-8-sig"), parse_constant=_refuse_constant)


def parse_field(notation: str) -> TextField:
    """Read the notation of a recipe.

    Raises:
        ValueError: it names no member or field.
    """
    if not notation.startswith(_JSON_PREFIX):
        return TextField(checked_extension(notation), ())
    steps = tuple(notation.removeprefix(_JSON_PREFIX).split("."))
    if not all(steps):
        raise ValueError(f"{notation!r} names no field; write json:field or json:field.sub")
    return TextField("json", steps)


def checked_extension(extension: str) -> str:
    """`extension` if a member can have it, in the one spelling we compare with.

    Raises:
        ValueError: it cannot.
    """
    if (
        not extension
        or extension != extension.lower()
        or extension.startswith(".")
        or set(extension) & set("/: \n")
    ):
        raise ValueError(
            f"{extension!r} is no extension; write it in lower case without the first dot, like jpg"
        )
    return extension


def label_of(field: TextField, member: MemberText | None) -> str | None:
    """The label; see the table above.

    Args:
        field: where the label stands.
        member: the record's member with that extension; None if it has none.

    Raises:
        BadText: there is something, but it is no label.
    """
    if member is None:
        return None
    if member.unreadable is not None:
        raise BadText(member.unreadable)
    label = _json_label(field, member) if field.steps else _plain_label(member)
    if label is not None and len(label) > MAX_LABEL_CHARACTERS:
        raise BadText(f"{len(label):,} characters; at most {MAX_LABEL_CHARACTERS:,} are a label")
    return label or None


def metadata_of(field: TextField, member: MemberText | None) -> str | None:
    """The metadata text, whatever its state; see the table above."""
    if member is None or member.unreadable is not None:
        return None
    if field.steps:
        try:
            value = _field_value(member.document, field.steps)
        except (ValueError, RecursionError):  # what MemberText.document raises: keep the text as it stands
            pass
        else:
            return None if value is None else _escaped(_spelled(value))
    return member.data.decode("utf-8-sig", "backslashreplace").strip()


def _plain_label(member: MemberText) -> str:
    try:
        return member.data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadText(f"not UTF-8: {error.reason} at byte {error.start}") from None


def _json_label(field: TextField, member: MemberText) -> str | None:
    name = ".".join(field.steps)
    try:
        value = _field_value(member.document, field.steps)
    except (ValueError, RecursionError) as error:
        raise BadText(f"not JSON: {error}"[:200]) from None
    if isinstance(value, (dict, list)):
        raise BadText(f"{name} is a JSON {'object' if isinstance(value, dict) else 'list'}, not one value")
    if value is None:
        return None
    label = _spelled(value)
    if label != _escaped(label):
        raise BadText(f"{name} holds half of a surrogate pair, which is no Unicode text")
    return label


def _field_value(document: Any, steps: tuple[str, ...]) -> Any:
    """The value at the end of the steps; None where a step leads nowhere."""
    for step in steps:
        if not isinstance(document, dict):
            return None
        document = cast("dict[str, Any]", document).get(step)
    return document


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Text that UTF-8 (and Arrow) can hold: a lone surrogate becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
