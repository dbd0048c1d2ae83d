"""Whether a night's predictions may be published, from counts alone. Not for: counting, storing or publishing them.

A night is held back if one rule of `GateConfig` does not hold. Rules that need many rows are not judged on few: a
dozen images differ from thousands by chance.

Distributions are compared by the population stability index, the sum of (a - e) ln(a / e) over groups with a share of
e before and a now, which is Jeffreys' divergence of the two. It is read as in credit scoring, where it comes from: less
than 0.1 is little change, more than 0.25 asks for action (Siddiqi, Credit Risk Scorecards, 2006). Of n rows and m
rows of one population it is about (1/n + 1/m) times a chi-squared variable with as many degrees of freedom as there are
groups less one (Yurdakul and Naranjo, Journal of Risk Model Validation 14, 2020), so a limit is raised to what chance
alone would exceed in one of a thousand nights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from pydantic import Field

from engine.config import Config
from engine.errors import HeldBack

if TYPE_CHECKING:
    from engine.heads.reference import Reference

COSINE_GROUPS = 10  # of about equally many reference rows each, as scores are grouped in credit scoring
OUTLIER_SHARE = 0.01  # of the reference rows that are farthest from all classes
LEAST_EXPECTED = 5  # rows of a group, so that chi-squared holds (Cochran, 1954); rarer classes share one
ADDED_TO_EACH = 0.5  # rows, for a logarithm of empty groups: Jeffreys' prior for shares (Dirichlet with 1/2)
FALSE_ALARMS = 0.001  # nights that chance alone may hold back
ROW_ACCOUNTING = "row_accounting"
REST = "(all other classes)"
NO_CLASS = "(no class)"
NO_REFERENCE = "the bundle remembers no embeddings; fit again with this version"


class GateConfig(Config):
    """What a night must keep to be published. `null`: not judged.

    The limits were chosen by embeddings of EfficientNet-Lite0 of crops of photos, about 1,000 rows against 480: the
    same photos as JPEGs of quality 90 to 50 came to a drift of 0.02 to 0.21, 1 to 5 % outliers and a label shift of
    0.03 at most; with noise, blurred by 3 pixels or in grey to 0.6 to 3.1, and 2 to 16 % outliers; black frames to 6.3
    and 100 %. Photos of which half were grey before came to only 0.16 in grey, and inverted ones to 0.1 or 1.1, by
    what they showed: the cosine to a class does not tell all.
    """

    max_reject_fraction: float | None = Field(0.01, ge=0, le=1)
    """Rejects / samples of the night; the default is that of `limits` of an extraction."""
    max_drift_psi: float | None = Field(0.25, gt=0)
    """Population stability index between the cosines of the bundle's held-out rows to the nearest class and tonight's;
    0.25 is read as a large change."""
    max_outlier_fraction: float | None = Field(0.1, ge=0, le=1)
    """Share of tonight's rows that are farther from all classes than 99 % of the bundle's held-out rows; 0.01 is what
    would be expected. It sees a few rows that are quite wrong, where drift sees many that are a little different."""
    max_label_psi: float | None = Field(0.25, gt=0)
    """Population stability index between the labels of the night that was published last, or else those that the head
    gave the bundle's held-out rows, and tonight's. A shift that takes many nights is not seen by it."""
    max_abstention_fraction: float | None = Field(0.5, ge=0, le=1)
    """Share of tonight's rows without a label; what is usual depends on `min_confidence`, and more than half is taken
    for a mistake."""
    min_agreement: float | None = Field(None, ge=0, le=1)
    """Share of the keys of replaced shards, of those that had a prediction before, which keep their label. Where a key
    stays with its image the same bundle gives 1, and less says that images were changed under their keys; archives that
    number their images anew leave it null."""
    min_rows: int = Field(200, ge=1)
    """Rows (of the night, of what it is compared with, or unchanged keys) below which none but the row accounting is
    judged: of 200 against 200 equally distributed rows one night in a hundred has a drift of 0.22."""


@dataclass(frozen=True, slots=True)
class Population:
    """What is counted of some rows.

    Attributes:
        rows: all of them.
        labels: class -> rows that are given it, whatever the confidence: of one label the first of `top_labels`, so
            that `min_confidence` does not look like a shift. By the bundle's names, before a label map.
        unlabelled: rows of several labels to which none was given.
        cosines: rows in each bin of the bundle's reference; empty: not counted.
        is_held_out: of what a bundle remembers, whether no head was fitted on these rows.
    """

    rows: int
    labels: Mapping[str, int]
    unlabelled: int = 0
    cosines: Sequence[int] = ()
    is_held_out: bool = True

    @staticmethod
    def remembered(reference: Reference, classes: Sequence[str]) -> Population:
        """What a bundle with these classes remembers."""
        return Population(
            reference.rows,
            reference.label_mix(classes),
            reference.unlabelled,
            reference.cosine_counts.tolist(),
            reference.is_held_out,
        )


@dataclass(frozen=True, slots=True)
class Night:
    """What one night came to.

    Attributes:
        expected_rows: of the embedding parts that were to be scored.
        found: the prediction rows that wait to be published.
        rejects: samples of the night that became no embedding.
        abstained: rows without a label, since the best confidence was too low.
        compared: keys of replaced shards that had a prediction before.
        agreeing: those of them whose label, or lack of one, is the same.
        reference: what the bundle remembers; None: it was published without.
        last: what was published last; None: nothing.
    """

    expected_rows: int
    found: Population
    rejects: int = 0
    abstained: int = 0
    compared: int = 0
    agreeing: int = 0
    reference: Population | None = None
    last: Population | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What one rule says.

    Attributes:
        name: `row_accounting`, or the field of the recipe.
        value: what was found; None: not known.
        limit: what it was held against, chance included; None: nothing.
        holds: None: not judged.
        sentence: thing, found and wanted, for a person.
    """

    name: str
    value: float | None
    limit: float | None
    holds: bool | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """All rules, in the order of the recipe."""

    rules: tuple[Rule, ...]

    @property
    def passes(self) -> bool:
        """No rule is broken; one that was not judged is not."""
        return not self.broken

    @property
    def broken(self) -> tuple[Rule, ...]:
        """Rules that do not hold."""
        return tuple(rule for rule in self.rules if rule.holds is False)

    def to_json(self) -> dict[str, Any]:
        """For the summary of the night."""
        return {"passes": self.passes, "rules": [asdict(rule) for rule in self.rules]}

    def in_words(self) -> str:
        """For a person, a line for each rule."""
        marks = {True: "holds", False: "BROKEN", None: "not judged"}
        lines = [f"  {marks[rule.holds]:<10}  {rule.name}: {rule.sentence}" for rule in self.rules]
        return "\n".join(["the night may be published" if self.passes else "the night is held back", *lines])

    def error(self, table_uri: str) -> HeldBack | None:
        """What ends a night that is held back; None if it passes."""
        if self.passes:
            return None
        names = [rule.name for rule in self.broken]
        adjustable = [f"gate.{name}" for name in names if name != ROW_ACCOUNTING]
        ways_out = [_WAYS_OUT[name] for name in names]
        if adjustable:
            ways_out.append(
                f"if that is as it should be, publish the night as it is (--publish) or change {', '.join(adjustable)}"
            )
        return HeldBack(
            f"{table_uri}: the night was held back, what was published stays",
            found="; ".join(rule.sentence for rule in self.broken),
            wanted=", ".join(_wanted(rule) for rule in self.broken),
            way_out="; ".join(ways_out),
        )


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the cosines of one set of rows are from those of another.

    Attributes:
        psi: the population stability index, over about equally large groups of the rows before.
        by_chance: what two samples of one population exceed once in a thousand.
    """

    psi: float
    by_chance: float


def drift(before: Sequence[int], now: Sequence[int]) -> Drift | None:
    """Of rows in the same bins of a reference; None where one side has none.

    Raises:
        ValueError: they are counted in different bins.
    """
    if not sum(before) or not sum(now):
        return None
    groups = _grouped(before, now)
    return Drift(population_stability_index(*groups), index_by_chance(len(groups[0]), sum(before), sum(now)))


_WAYS_OUT = {
    ROW_ACCOUNTING: "delete the folder held/ of the predictions and run again, which scores those parts anew",
    "max_reject_fraction": "the rejects/ folder of the embeddings says what is wrong with each sample",
    "max_drift_psi": "look at tonight's images (format, colours, size, camera): a head answers only for images like "
    "those it was fitted on, so label some of them and fit again",
    "max_outlier_fraction": "look at tonight's images that are farthest from all classes",
    "max_label_psi": "look at images of the classes that became more or fewer",
    "max_abstention_fraction": "look at images without a label; a lower min_confidence answers more of them",
    "min_agreement": "look whether replaced shards have other images under the same keys",
}


def judge(night: Night, config: GateConfig) -> Verdict:
    """Hold a night against the recipe.

    Raises:
        ValueError: tonight's cosines are counted in other bins than the reference's.
    """
    return Verdict(
        (
            _row_accounting(night),
            _rejects(night, config),
            _drift(night, config),
            _outliers(night, config),
            _label_shift(night, config),
            _abstention(night, config),
            _agreement(night, config),
        )
    )


def population_stability_index(expected: Sequence[int], actual: Sequence[int]) -> float:
    """The sum of (a - e) ln(a / e) over groups, whose shares are (count + 1/2) / (rows + groups / 2).

    Args:
        expected: rows of each group before.
        actual: rows of each group now.
    """
    shares = [_shares(counts) for counts in (expected, actual)]
    return math.fsum((now - before) * math.log(now / before) for before, now in zip(*shares, strict=True))


def index_by_chance(
    groups: int, expected_rows: int, actual_rows: int, exceeded: float = FALSE_ALARMS
) -> float:
    """The index that two samples of one population exceed with that probability.

    The quantile of chi-squared is that of Wilson and Hilferty (1931), for 9 degrees of freedom 27.9 at 0.999.
    """
    freedom = groups - 1
    if not freedom:
        return 0.0
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + NormalDist().inv_cdf(1 - exceeded) * math.sqrt(spread)) ** 3
    return quantile * (1 / expected_rows + 1 / actual_rows)


def _row_accounting(night: Night) -> Rule:
    found, wanted = night.found.rows, night.expected_rows
    counted = sum(night.found.cosines)
    sentence = f"{found:,} rows are predicted, the embedding parts have {wanted:,}"
    holds = found == wanted
    if night.found.cosines and counted != found:
        holds, sentence = False, f"{sentence}; cosines were counted of {counted:,}"
    return Rule(ROW_ACCOUNTING, found, wanted, holds, sentence)


def _rejects(night: Night, config: GateConfig) -> Rule:
    samples = night.expected_rows + night.rejects
    what = f"of {samples:,} samples are rejects"
    return _at_most("max_reject_fraction", night.rejects, samples, what, config)


def _abstention(night: Night, config: GateConfig) -> Rule:
    what = f"of {night.found.rows:,} rows have no label"
    return _at_most("max_abstention_fraction", night.abstained, night.found.rows, what, config)


def _drift(night: Night, config: GateConfig) -> Rule:
    name = "max_drift_psi"
    reference = night.reference
    if reference is None:
        return _not_judged(name, NO_REFERENCE)
    if missing := _not_comparable(night.found, reference, config):
        return _not_judged(name, missing)
    counts = _grouped(reference.cosines, night.found.cosines)
    rows = sum(reference.cosines), night.found.rows
    what = "drift from the bundle's held-out rows, by the cosine to the nearest class"
    return _index_rule(name, what, counts, rows, config)


def _outliers(night: Night, config: GateConfig) -> Rule:
    name = "max_outlier_fraction"
    reference = night.reference
    if reference is None:
        return _not_judged(name, NO_REFERENCE)
    if missing := _not_comparable(night.found, reference, config):
        return _not_judged(name, missing)
    before = list(accumulate(reference.cosines))
    tail = next(bins for bins, rows in enumerate(before, 1) if rows >= OUTLIER_SHARE * before[-1])
    usual, limit = before[tail - 1] / before[-1], config.max_outlier_fraction
    if limit is not None and usual > limit / 2:
        return _not_judged(
            name, f"{usual:.0%} of the bundle's held-out rows are equally far from all classes"
        )
    outliers = sum(night.found.cosines[:tail])
    what = f"of {night.found.rows:,} rows lie farther from all classes than {1 - usual:.1%} of the held-out rows did"
    return _at_most(name, outliers, night.found.rows, what, config)


def _label_shift(night: Night, config: GateConfig) -> Rule:
    name = "max_label_psi"
    before, whose = night.last, "of the last night"
    if before is None or before.rows < config.min_rows:
        before, whose = night.reference, "of the bundle's held-out rows"
    if before is None:
        return _not_judged(name, "nothing was published before, and the bundle remembers no labels")
    if missing := _too_few(night.found.rows, before.rows, config):
        return _not_judged(name, missing)
    names, expected, actual = _label_groups(before, night.found)
    if names == [REST]:
        return _not_judged(
            name, f"{len(before.labels):,} classes, none with {LEAST_EXPECTED} rows to compare"
        )
    rule = _index_rule(
        name, f"shift from the labels {whose}", (expected, actual), (before.rows, night.found.rows), config
    )
    if rule.holds is not False:
        return rule
    changes = sorted(
        zip(names, _shares(expected), _shares(actual), strict=True), key=lambda one: -abs(one[2] - one[1])
    )
    said = ", ".join(f"{one} {then:.1%} to {now:.1%}" for one, then, now in changes[:3])
    return Rule(name, rule.value, rule.limit, rule.holds, f"{rule.sentence} ({said})")


def _agreement(night: Night, config: GateConfig) -> Rule:
    name, limit = "min_agreement", config.min_agreement
    if night.compared < config.min_rows:
        return _not_judged(
            name, f"{night.compared:,} keys of replaced shards, fewer than min_rows {config.min_rows:,}"
        )
    value = night.agreeing / night.compared
    sentence = f"{value:.2%} of {night.compared:,} keys of replaced shards keep their label"
    return _judged(name, value, limit, None if limit is None else value >= limit, sentence)


def _at_most(name: str, count: int, total: int, what: str, config: GateConfig) -> Rule:
    """A rule about a share of rows."""
    limit: float | None = getattr(config, name)
    if total < config.min_rows:
        return _not_judged(name, f"{count:,} {what}, fewer than min_rows {config.min_rows:,}")
    value = count / total
    return _judged(name, value, limit, None if limit is None else value <= limit, f"{value:.2%} {what}")


def _index_rule(
    name: str,
    what: str,
    counts: tuple[Sequence[int], Sequence[int]],
    rows: tuple[int, int],
    config: GateConfig,
) -> Rule:
    """A rule about a population stability index of counts before and now."""
    value = population_stability_index(*counts)
    limit: float | None = getattr(config, name)
    sentence = f"{what}: {value:.3f}"
    if limit is None:
        return _judged(name, value, None, None, sentence)
    chance = index_by_chance(len(counts[0]), *rows)
    if chance > limit:
        limit = chance
        sentence += (
            f" (limit raised to {chance:.3f}, which {rows[1]:,} rows against {rows[0]:,} may reach by chance)"
        )
    return _judged(name, value, limit, value <= limit, sentence)


def _judged(name: str, value: float, limit: float | None, holds: bool | None, sentence: str) -> Rule:
    return Rule(name, value, limit, holds, sentence if limit is not None else f"{sentence}; no limit is set")


def _not_judged(name: str, why: str) -> Rule:
    return Rule(name, None, None, None, why)


def _not_comparable(found: Population, reference: Population, config: GateConfig) -> str | None:
    """Why tonight's cosines say nothing; None if they do."""
    if not reference.is_held_out:
        return "the bundle was fitted without validation and test rows, and its own rows lie too near"
    if not found.cosines:
        return "tonight's cosines were not counted"
    if len(reference.cosines) != len(found.cosines):
        raise ValueError(
            f"cosines in {len(found.cosines)} bins, wanted {len(reference.cosines)} as the reference"
        )
    return _too_few(sum(found.cosines), sum(reference.cosines), config)


def _too_few(now: int, before: int, config: GateConfig) -> str | None:
    for rows, of in ((now, "tonight"), (before, "to compare with")):
        if rows < config.min_rows:
            return f"{rows:,} rows {of}, fewer than min_rows {config.min_rows:,}"
    return None


def _grouped(reference: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Both in groups of neighbouring bins that hold about a tenth of the reference rows each."""
    rows, before = sum(reference), 0
    expected, actual = Counter[int](), Counter[int]()
    for then, now in zip(reference, counts, strict=True):
        group = COSINE_GROUPS * (2 * before + then) // (2 * rows)  # by the middle of the bin
        group = min(group, COSINE_GROUPS - 1)  # empty bins after the last row
        expected[group] += then
        actual[group] += now
        before += then
    groups = [group for group in sorted(expected) if expected[group] or actual[group]]
    return [expected[group] for group in groups], [actual[group] for group in groups]


def _label_groups(before: Population, now: Population) -> tuple[list[str], list[int], list[int]]:
    """Names, rows before and rows now; classes too rare to compare are one group."""
    then, found = ({**one.labels, NO_CLASS: one.unlabelled} for one in (before, now))
    scale = min(1.0, now.rows / before.rows)
    kept = [name for name, rows in then.items() if rows * scale >= LEAST_EXPECTED]
    names, expected, actual = kept, [then[name] for name in kept], [found.get(name, 0) for name in kept]
    rest = sum(then.values()) - sum(expected), sum(found.values()) - sum(actual)
    if any(rest):
        names, expected, actual = [*names, REST], [*expected, rest[0]], [*actual, rest[1]]
    return names, expected, actual


def _shares(counts: Sequence[int]) -> list[float]:
    rows = sum(counts) + ADDED_TO_EACH * len(counts)
    return [(count + ADDED_TO_EACH) / rows for count in counts]


def _wanted(rule: Rule) -> str:
    """In the words of the recipe."""
    if rule.name == ROW_ACCOUNTING:
        return "one prediction for each embedding"
    side = "at least" if rule.name.startswith("min_") else "at most"
    return f"{side} {rule.limit:.4g} (gate.{rule.name})"
