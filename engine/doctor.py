"""What a run was held up by, and what to change: from the seconds that its stages were busy; measures nothing itself.

Where network and decoders share the cores, the cores are what runs out, and the stage that takes most of them is the
bottleneck. Where the network is on a GPU, each stage has workers of its own, and the busiest is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STAGES = ("read", "decode", "embed", "write")
BUSY = 0.75  # of what a stage has: above that it holds the others up
SCHEDULING = "scheduling"
# How much faster OpenVINO ran float32 networks than TensorFlow, forward pass alone on two AVX2 cores (2026-11-22):
# EfficientNetB0 0.9, ResNet50 1.15, MobileNetV2 1.26.
OPENVINO_SPEEDUPS = (0.9, 1.3)


@dataclass(frozen=True)
class Observed:
    """A stretch of a run in which parts came steadily.

    Attributes:
        images, seconds: that came in it, and how long it was.
        stage_s: seconds that the stages were busy for these images. Of a processor: decode, and embed without a GPU; of
            the clock: all others.
        workers: that each stage had; those of embed are actors, those of decode are threads.
        cores: of the machines.
        on_gpu: whether the network was on GPUs.
        runtime: kind and precision, as the table's record has them.
        trials: of other runtimes, as the table's record has them.
    """

    images: int
    seconds: float
    stage_s: Mapping[str, float]
    workers: Mapping[str, float]
    cores: float
    on_gpu: bool
    runtime: Mapping[str, Any]
    trials: Sequence[Mapping[str, Any]] = ()

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


@dataclass(frozen=True)
class Diagnosis:
    """What there is to say.

    Attributes:
        bottleneck: read, decode, embed, write or scheduling.
        utilisation: stage -> busy share of what it has, 0 to 1: of all cores, or of its workers.
        advice: sentences, the most useful first.
    """

    bottleneck: str
    utilisation: dict[str, float]
    advice: tuple[str, ...]


def diagnose(observed: Observed) -> Diagnosis:
    """Name the bottleneck of a steady stretch, and what to change about it."""
    utilisation = {stage: _busy_share(observed, stage) for stage in STAGES}
    bottleneck = _bottleneck(observed, utilisation)
    advice = tuple(_advice(observed, bottleneck, utilisation))
    return Diagnosis(bottleneck, {stage: round(share, 3) for stage, share in utilisation.items()}, advice)


def cost_per_million(rate: float, nodes: int, price_per_node_hour: float) -> float:
    """What a million images cost at `rate` images/s, in the currency of the price."""
    return float(f"{1e6 / rate / 3600 * nodes * price_per_node_hour:.4g}")


def _busy_share(observed: Observed, stage: str) -> float:
    shares_cores = stage == "decode" or (stage == "embed" and not observed.on_gpu)
    has = observed.cores if shares_cores and not observed.on_gpu else observed.workers[stage]
    if stage == "decode" and observed.on_gpu:
        has = min(observed.workers[stage], observed.cores)
    return min(1.0, observed.stage_s.get(stage, 0.0) / (has * observed.seconds))


def _bottleneck(observed: Observed, utilisation: Mapping[str, float]) -> str:
    if not observed.on_gpu and utilisation["decode"] + utilisation["embed"] >= BUSY:
        return "decode" if utilisation["decode"] > utilisation["embed"] else "embed"
    busiest = max(STAGES, key=lambda stage: utilisation[stage])
    return busiest if utilisation[busiest] >= BUSY else SCHEDULING


def _advice(observed: Observed, bottleneck: str, utilisation: Mapping[str, float]) -> Iterator[str]:
    rate = observed.rate
    per_core = f"each further core adds about {rate / observed.cores:,.0f} images/s"
    others = sorted((share for stage, share in utilisation.items() if stage != bottleneck), reverse=True)
    ceiling = rate / max(others[0], 0.05)  # where the next stage would be fully busy
    if bottleneck == "embed":
        yield from _faster_network(observed)
        yield (
            f"more GPUs, or compute.actors: each further one adds about {rate / observed.workers['embed']:,.0f} "
            f"images/s, up to {ceiling:,.0f}, where decoding would be the limit"
            if observed.on_gpu
            else per_core
        )
    elif bottleneck == "decode" and observed.on_gpu:
        yield (
            f"more cores for decoding: the GPUs are busy for {utilisation['embed']:.0%} of the time; "
            f"{observed.cores / max(utilisation['embed'], 0.05):,.0f} cores would keep them busy, at "
            f"up to {ceiling:,.0f} images/s"
        )
    elif bottleneck == "decode":
        yield f"{per_core}; images stored at a smaller size decode faster"
    elif bottleneck == "read":
        yield (
            f"more readers (compute.decode_tasks, now {observed.workers['read']:g}) or storage that is nearer: "
            f"up to {ceiling:,.0f} images/s, where the next stage would be the limit"
        )
    elif bottleneck == "write":
        yield (
            "fewer, larger parts (output.rows_per_part of a new table), or storage that is nearer: "
            f"up to {ceiling:,.0f} images/s"
        )
    else:
        yield (
            "no stage was busy: larger parts (output.rows_per_part of a new table) or more shards in the source; "
            f"up to {rate / max(*utilisation.values(), 0.05):,.0f} images/s"
        )


def _faster_network(observed: Observed) -> Iterator[str]:
    """Other runtimes and precisions, with what they would bring."""
    here = (observed.runtime["kind"], observed.runtime["precision"])
    rates = {
        (trial["kind"], trial["precision"]): trial["images_per_second"]
        for trial in observed.trials
        if trial["refused"] is None and trial["images_per_second"]
    }
    better = {
        which: rates[which] / rates[here] for which in rates if here in rates and rates[which] > rates[here]
    }
    for (kind, precision), ratio in sorted(better.items(), key=lambda item: -item[1]):
        gain = f"about {_with(observed, ratio):,.0f} images/s"
        yield f"runtime.kind: {kind}, precision: {precision} (a new table): {gain}"
    if not rates and observed.on_gpu and here[1] == "float32":
        yield "runtime.precision: auto (a new table) tries tf32, bfloat16 and float16 and keeps what is harmless"
    elif not rates and here[0] == "tensorflow":
        low, high = (_with(observed, ratio) for ratio in OPENVINO_SPEEDUPS)
        yield (
            f"runtime.kind: openvino, which the package extra of that name brings: {low:,.0f} to {high:,.0f} images/s "
            "if it does with this network as with others; kind: auto measures it (a new table)"
        )


def _with(observed: Observed, ratio: float) -> float:
    """Images per second if the network were that much faster."""
    if observed.on_gpu:
        return observed.rate * ratio
    embed, decode = observed.stage_s["embed"], observed.stage_s["decode"]
    return observed.rate * (embed + decode) / (embed / ratio + decode)
