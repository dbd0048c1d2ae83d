"""What measured rates mean: ratios beside their goals, a table for the terminal, and one for the page of figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks.archive import LITE0

FLOAT32 = ("tensorflow float32", "openvino float32")
BFLOAT16 = "openvino bfloat16"
BEST_FLOAT32 = "best float32"
ON_GPU = ("tensorflow float32", "tensorflow tf32", "tensorflow bfloat16", "tensorflow float16")
OVER_HAND_WRITTEN = {  # runtime -> network -> goal: engine / tfdata_folded
    "tensorflow float32": {"MobileNetV2": 1.0, "EfficientNetB0": 1.0, "ResNet50": 1.0, LITE0: 1.0},
    BEST_FLOAT32: {"MobileNetV2": 1.3, LITE0: 1.3},
    BFLOAT16: {"MobileNetV2": 1.7, "EfficientNetB0": 1.5},
}
OVER_TENSORFLOW = ("EfficientNetB0", "ResNet50")  # never below the tensorflow runtime
OVER_LIMIT, OVER_SAME_PARTS, OVER_RAY_DOCUMENTATION = 0.9, 0.95, 5.0
MEMORY_GB = {"MobileNetV2": 3.0}


@dataclass(frozen=True)
class Ratio:
    """One figure beside its goal."""

    name: str
    value: float | None
    """None: a part of it was not measured here."""
    goal: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.exceeds_limit:
            return "impossible: the limit was not measured well"
        return "met" if (self.value <= self.goal if self.at_most else self.value >= self.goal) else "missed"

    @property
    def exceeds_limit(self) -> bool:
        """Faster than what is possible."""
        return self.name.endswith("/limit") and self.value is not None and self.value > 1.0

    def line(self) -> str:
        """`name value goal`, and what became of it."""
        value = "-" if self.value is None else f"{self.value:.3f}"
        return f"{self.name} {value} {'<=' if self.at_most else '>='}{self.goal} {self.verdict}"


def ratios(results: dict[str, Any]) -> list[Ratio]:
    """Every ratio that has a goal, for the networks of these results."""
    return [ratio for name, found in results["networks"].items() for ratio in _ratios_of(name, found)]


def faster_than_limit(results: dict[str, Any]) -> list[str]:
    """Ratios of engine to limit above 1: nothing is faster than what is possible, so a limit is wrong."""
    return [ratio.line() for ratio in ratios(results) if ratio.exceeds_limit]


def ratio_records(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(ratio) | {"verdict": ratio.verdict} for ratio in ratios(results)]


def rate_table(results: dict[str, Any]) -> str:
    """For the terminal: marginal images/s, share of the hand-written best and of the limit, peak memory."""
    lines = []
    for name, found in results["networks"].items():
        lines.append(f"{name}, {found['side_px']} px, {' and '.join(map(str, found['sizes']))} images")
        columns = ("images/s", "/folded", "/limit", "GB", "largest")
        lines.append(f"  {'':36}" + "".join(f"{column:>10}" for column in columns))
        for contender, measured in found["contenders"].items():
            if reason := measured["refused"] or measured["failed"]:
                word = "skipped" if measured["refused"] else "FAILED"
                lines.append(f"  {contender:36}  {word}: {reason.splitlines()[0]}"[:160])
                continue
            limit = found["limits"]["images_per_second"].get(_runtime(contender))
            rate = measured["images_per_second"]
            folded = _rate(found, "tfdata_folded")
            figures = (rate, _divided(rate, folded), _divided(rate, limit), *_gigabytes(measured))
            lines.append(f"  {contender:36}" + "".join(f"{_short(figure):>10}" for figure in figures))
        for limit_name, rate in _limit_rates(found):
            lines.append(f"  {limit_name:36}{_short(rate):>10}")
    return "\n".join(lines)


def readme_table(results: dict[str, Any]) -> str:
    """Markdown: one row for each contender and limit, one column for each network; then the goals."""
    machine, networks = results["machine"], results["networks"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    heads = [f"{name}, {found['side_px']} px" for name, found in networks.items()]
    on_gpu = any(found.get("on_gpu") for found in networks.values())
    gpu = f" and one {machine['gpus'][0]}" if on_gpu and machine["gpus"] else ""
    rows: dict[str, list[str]] = {}
    for column, found in enumerate(networks.values()):
        rates = [(name, _rate(found, name)) for name in found["contenders"]] + list(_limit_rates(found))
        for name, rate in rates:
            rows.setdefault(name, ["-"] * len(heads))[column] = _short(rate)
    memory = [
        f"{name} {gigabytes:.2f} GB"
        for found in list(networks.values())[:1]
        for name, measured in found["contenders"].items()
        if name.startswith("engine") and (gigabytes := _gigabytes(measured)[0]) is not None
    ]
    return "\n".join(
        [
            f"Marginal images per second, JPEGs of 500 x 375, on {machine['cores']} cores of {machine['cpu']} "
            f"({', '.join(machine['flags'])}){gpu}, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['date']} "
            f"({versions}):",
            "",
            *_markdown(["", *heads], [[name, *cells] for name, cells in rows.items()]),
            "",
            *(
                [f"Peak memory of all processes, {next(iter(networks))}: {', '.join(memory)}.", ""]
                if memory
                else []
            ),
            *_markdown(
                ["ratio", "value", "goal", ""],
                [
                    [
                        ratio.name,
                        _short(ratio.value),
                        f"{'<=' if ratio.at_most else '>='} {ratio.goal}",
                        ratio.verdict,
                    ]
                    for ratio in ratios(results)
                ],
            ),
        ]
    )


def _ratios_of(network: str, found: dict[str, Any]) -> Iterator[Ratio]:
    yield from (_ratios_on_gpu if found.get("on_gpu") else _ratios_on_cores)(network, found)


def _ratios_on_gpu(network: str, found: dict[str, Any]) -> Iterator[Ratio]:
    """Left alone TensorFlow computes float32 as tf32 there: that is what programs written by hand do."""
    for kind, goal in (("tfdata_folded", 1.0), ("ray_documentation", OVER_RAY_DOCUMENTATION)):
        value = _divided(_rate(found, "engine tensorflow tf32"), _rate(found, kind))
        yield Ratio(f"{network}/engine-tensorflow-tf32/{kind}", value, goal)
    yield from _over_limits(network, found, ON_GPU)


def _ratios_on_cores(network: str, found: dict[str, Any]) -> Iterator[Ratio]:
    engine = {name: _rate(found, f"engine {name}") for name in (*FLOAT32, BFLOAT16)}
    engine[BEST_FLOAT32] = max(engine[name] or 0.0 for name in FLOAT32) or None
    for runtime, goals in OVER_HAND_WRITTEN.items():
        if network in goals:
            value = _divided(engine[runtime], _rate(found, "tfdata_folded"))
            yield Ratio(f"{network}/{_joined('engine', runtime)}/tfdata_folded", value, goals[network])
    if network in OVER_TENSORFLOW:
        value = _divided(engine["openvino float32"], engine["tensorflow float32"])
        yield Ratio(f"{network}/engine-openvino-float32/engine-tensorflow-float32", value, 1.0)
    yield from _over_limits(network, found, (*FLOAT32, BFLOAT16))
    value = _divided(engine[BEST_FLOAT32], _rate(found, "ray_documentation"))
    yield Ratio(f"{network}/engine-best-float32/ray_documentation", value, OVER_RAY_DOCUMENTATION)
    for runtime in (*FLOAT32, BFLOAT16) if network in MEMORY_GB else ():
        gigabytes = _gigabytes(found["contenders"].get(f"engine {runtime}", {}))[0]
        yield Ratio(
            f"{network}/{_joined('engine', runtime)}/peak_GB", gigabytes, MEMORY_GB[network], at_most=True
        )


def _over_limits(network: str, found: dict[str, Any], runtimes: tuple[str, ...]) -> Iterator[Ratio]:
    for runtime in runtimes:
        name, rate = _joined("engine", runtime), _rate(found, f"engine {runtime}")
        limit = found["limits"]["images_per_second"].get(runtime)
        yield Ratio(f"{network}/{name}/limit", _divided(rate, limit), OVER_LIMIT)
        same = _divided(rate, _rate(found, f"same_parts {runtime}"))
        yield Ratio(f"{network}/{name}/same_parts", same, OVER_SAME_PARTS)


def _rate(found: dict[str, Any], contender: str) -> float | None:
    return found["contenders"].get(contender, {}).get("images_per_second")


def _limit_rates(found: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    limits = found["limits"]
    if limits["decode"]:
        yield "decode alone", limits["decode"]["images_per_second"]
    for runtime, measured in limits["forward"].items():
        yield f"forward alone, {runtime}", measured["images_per_second"]
    for runtime, rate in limits["images_per_second"].items():
        yield f"limit, {runtime}", rate


def _runtime(contender: str) -> str:
    return contender.partition(" ")[2]


def _joined(*words: str) -> str:
    return "-".join(words).replace(" ", "-")


def _gigabytes(measured: dict[str, Any]) -> tuple[float | None, float | None]:
    """(all processes together, the largest one)."""
    both = measured.get("peak_bytes"), measured.get("peak_process_bytes")
    return tuple(size / 1e9 if size else None for size in both)  # type: ignore[return-value]


def _divided(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _short(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
