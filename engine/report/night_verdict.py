"""What became of a night: its verdict, each rule of the gate, what else it met, and what to do next.

From the night's JSON summary alone, also one of an older engine, which says less. Not for: counts and tables.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.report.tables import NOTHING, percent, shortened

TEXT_SHOWN = 600  # characters of an error
_RUN_ID = re.compile(r"[a-z]+-(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)\d\dZ-[0-9a-f]+")
_TITLES = {
    "published": "Published",
    "held": "Held back",
    "by_hand": "Published by hand",
    "nothing": "Nothing new",
    "waiting": "Nothing new, earlier nights are held back",
    "failed": "Failed",
    "interrupted": "Interrupted",
}
_CRITERIA = {
    "row_accounting": "Rows with a prediction",
    "max_reject_fraction": "Share of rejects",
    "max_drift_psi": "Drift of the embeddings (PSI)",
    "max_outlier_fraction": "Share of outliers",
    "max_label_psi": "Shift of the labels (PSI)",
    "max_abstention_fraction": "Share without a label",
    "min_agreement": "Agreement of replaced shards",
}
_SHARES = ("max_reject_fraction", "max_outlier_fraction", "max_abstention_fraction", "min_agreement")
_OUTCOMES = {True: "passed", False: "broken", None: "not judged"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a night.

    Attributes:
        state: one of `published`, `held`, `by_hand`, `nothing`, `waiting`, `failed`, `interrupted`.
        title: the same for a person.
        sentences: why, and what readers see now.
    """

    state: str
    title: str
    sentences: Sequence[str]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One rule of the gate, in words."""

    title: str
    field: str
    found: str
    threshold: str
    outcome: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Step:
    """What a person may do, and the command that does it ("": none does)."""

    words: str
    command: str = ""


def moment_of(run_id: str) -> str:
    """When a night began, by its name; the name where that does not say."""
    found = _RUN_ID.fullmatch(run_id)
    return "{}-{}-{} {}:{} UTC".format(*found.groups()) if found else shortened(run_id)


def is_run_id(run_id: str) -> bool:
    """Whether it may stand in a link."""
    return _RUN_ID.fullmatch(run_id) is not None


def state_of(night: Mapping[str, Any]) -> str:
    """As of `Verdict.state`."""
    error = night.get("error")
    if isinstance(error, Mapping):
        return "interrupted" if error.get("kind") in ("Interrupted", "KeyboardInterrupt") else "failed"
    if night.get("by_hand"):
        return "by_hand"
    gate = night.get("gate")
    if isinstance(gate, Mapping):
        return "published" if gate.get("passes") else "held"
    return "waiting" if night.get("refused_parts") else "nothing"


def title_of(night: Mapping[str, Any]) -> str:
    """The verdict in a word or two."""
    return _TITLES[state_of(night)]


def verdict_of(night: Mapping[str, Any]) -> Verdict:
    """What became of it, and why."""
    state = state_of(night)
    published, held = _count(night, "published_parts"), _count(night, "held_parts")
    rows = _count(night, "published_rows")
    said = {
        "published": f"Every criterion that was judged holds; readers have its {rows:,} rows in {published:,} parts.",
        "held": f"{_broken(night)} Readers see what they saw before; {held:,} parts wait in held/.",
        "by_hand": f"A person published what was held back: {rows:,} rows in {published:,} parts.",
        "nothing": "There was nothing to judge; readers see what they saw before.",
        "waiting": "There was nothing new to judge; readers see what they saw before.",
    }
    sentences = [said[state]] if state in said else _failure(night, published, held)
    return Verdict(state, _TITLES[state], [*sentences, *_remarks(night)])


def criteria(night: Mapping[str, Any]) -> list[Criterion]:
    """Every rule of the gate, in the order of the recipe; none where nothing was judged."""
    rules = (night.get("gate") or {}).get("rules") or []
    return [
        Criterion(
            _CRITERIA.get(rule["name"], rule["name"]),
            rule["name"],
            _value(rule["name"], rule["value"]),
            _threshold(rule["name"], rule["limit"]),
            _OUTCOMES[rule["holds"]],
            rule["sentence"],
        )
        for rule in rules
    ]


def next_steps(night: Mapping[str, Any]) -> list[Step]:
    """What a person may do now, the first thing first; commands as they can be typed."""
    state, command = state_of(night), night.get("command") or "engine nightly RECIPE"
    table, error = night.get("table", ""), night.get("error") or {}
    steps: list[Step] = []
    if state in ("failed", "interrupted"):
        way_out = error.get("way_out")
        steps += [Step(shortened(f"The error's own way out: {way_out}.", TEXT_SHOWN))] if way_out else []
        steps.append(Step("Nothing is lost: the same command goes on where this night ended.", command))
    if state == "held" or night.get("refused_parts"):
        way_out = (night.get("held_back") or {}).get("way_out")
        steps += [Step(shortened(f"The gate says: {way_out}.", TEXT_SHOWN))] if way_out else []
        steps.append(_look_at_held(night, table))
        steps.append(Step("If they are as they should be, publish all that is held:", f"{command} --publish"))
        steps.append(
            Step(
                f"If they are not, put the cause right and delete {table}/held/: the next night scores them again."
            )
        )
    elif night.get("is_finished") is False and state not in ("failed", "interrupted"):
        steps.append(
            Step(
                "The next night goes on where this one stopped; so does, at once, the same command.", command
            )
        )
    if (night.get("extract") or {}).get("shards_failed"):
        steps.append(
            Step(
                "Repair or remove the shards that cannot be read: every night tries them again "
                "(limits.max_failed_shards allows some)."
            )
        )
    if not steps:
        inspect = f"engine inspect {shlex.quote(table)}{_storage_options(night)}"
        steps.append(Step("Nothing has to be done. What the table is made of:", inspect))
    return steps


def _look_at_held(night: Mapping[str, Any], table: str) -> Step:
    if night.get("task") == "multi_label":  # `engine review` refuses them
        return Step(f"Look at the held rows: they are Parquet files in {table}/held/data/.")
    command = f"engine review {shlex.quote(table)} --held{_storage_options(night)}"
    return Step("Look at the held rows most worth it; the command says where it writes them.", command)


def _broken(night: Mapping[str, Any]) -> str:
    broken = [
        f"{one.title} is {one.found}, wanted {one.threshold}"
        for one in criteria(night)
        if one.outcome == "broken"
    ]
    many = "criterion does" if len(broken) == 1 else "criteria do"
    return f"{len(broken)} {many} not hold: {'; '.join(broken)}."


def _failure(night: Mapping[str, Any], published: int, held: int) -> list[str]:
    error, phase = night["error"], night.get("ended_in")
    when = f" during {phase}" if phase else ""
    found = f" (found: {error['found']})" if error.get("found") else ""
    said = shortened(f"It ended{when}: {error.get('thing') or error.get('kind')}{found}.", TEXT_SHOWN)
    if night.get("is_publishing"):
        return [said, "Readers may have some of its parts already; the next run publishes the rest."]
    readers = (
        f"{published:,} parts had been published before."
        if published
        else "Readers see what they saw before."
    )
    waiting = f" {held:,} parts wait in held/, for the next night to judge." if held else ""
    return [said, readers + waiting]


def _remarks(night: Mapping[str, Any]) -> list[str]:
    """What else there is to know, whatever the verdict is."""
    extract, score = night.get("extract") or {}, night.get("score") or {}
    remarks = []
    if night.get("is_finished") is False and not night.get("error"):
        shards, parts = extract.get("shards_left") or 0, score.get("parts_left") or 0
        remarks.append(f"Its time was up: {shards:,} shards and {parts:,} parts are left for the next night.")
    if earlier := _earlier_held(night):
        remarks.append(f"{earlier:,} parts of earlier nights are still held back.")
    for other in night.get("verdicts") or []:
        if other.get("kind") != "HeldBack":  # that is said by the criteria
            remarks.append(shortened(f"{str(other.get('thing')).splitlines()[0]}.", TEXT_SHOWN))
    return remarks


def _earlier_held(night: Mapping[str, Any]) -> int:
    return _count(night, "refused_parts") - _count(night, "refused_tonight")


def _count(night: Mapping[str, Any], name: str) -> int:
    value = night.get(name)
    return value if isinstance(value, int) else 0


def _value(name: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    if name in _SHARES:
        return percent(value)
    return f"{value:,.0f}" if name == "row_accounting" else f"{value:.3f}"


def _threshold(name: str, limit: float | None) -> str:
    if limit is None:
        return NOTHING
    if name == "row_accounting":
        return f"exactly {limit:,.0f}"
    return f"{'at least' if name.startswith('min_') else 'at most'} {_value(name, limit)}"


def _storage_options(night: Mapping[str, Any]) -> str:
    """How a command reaches the store that the recipe's `storage` names."""
    storage = night.get("storage") or {}
    words = [
        word
        for name, option in (("endpoint_url", "--endpoint-url"), ("region", "--region"))
        if storage.get(name)
        for word in (option, str(storage[name]))
    ]
    words += ["--anonymous"] if storage.get("anonymous") else []
    return "".join(f" {shlex.quote(word)}" for word in words)
