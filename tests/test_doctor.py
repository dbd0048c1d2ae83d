"""The bottleneck is named from busy seconds, and what it would bring to change something is arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from engine.doctor import Diagnosis, Observed, cost_per_million, diagnose

WORKERS = {"read": 2, "decode": 4, "embed": 1, "write": 2}
FLOAT32 = {"kind": "tensorflow", "precision": "float32"}


def diagnosed(on_gpu: bool = False, trials: Any = (), cores: float = 4, **busy: float) -> Diagnosis:
    """Of 10 s in which 1,000 images came."""
    return diagnose(Observed(1000, 10.0, busy, WORKERS, cores, on_gpu, FLOAT32, trials))


@pytest.mark.parametrize(
    ("bottleneck", "busy"),
    [
        ("embed", {"read": 1, "decode": 12, "embed": 25, "write": 1}),
        ("decode", {"read": 1, "decode": 21, "embed": 12, "write": 1}),
        ("read", {"read": 18, "decode": 6, "embed": 5, "write": 1}),
        ("write", {"read": 5, "decode": 6, "embed": 5, "write": 19}),
        ("scheduling", {"read": 5, "decode": 6, "embed": 5, "write": 1}),
    ],
)
def test_on_a_cpu_the_cores_are_what_runs_out(bottleneck: str, busy: dict[str, float]) -> None:
    assert diagnosed(**busy).bottleneck == bottleneck


@pytest.mark.parametrize(
    ("bottleneck", "busy"),
    [
        ("embed", {"read": 1, "decode": 20, "embed": 9, "write": 1}),
        ("decode", {"read": 1, "decode": 39, "embed": 5, "write": 1}),
        ("scheduling", {"read": 1, "decode": 20, "embed": 5, "write": 1}),
    ],
)
def test_with_a_gpu_each_stage_has_workers_of_its_own(bottleneck: str, busy: dict[str, float]) -> None:
    assert diagnosed(on_gpu=True, **busy).bottleneck == bottleneck


def test_utilisation_is_of_what_the_stage_has_and_never_above_one() -> None:
    assert diagnosed(decode=10, embed=20, read=5, write=50).utilisation == {
        "read": 0.25,
        "decode": 0.25,
        "embed": 0.5,
        "write": 1.0,
    }


def test_a_gpu_that_waits_for_decoders_is_told_how_many_cores_it_needs() -> None:
    (advice,) = diagnosed(on_gpu=True, decode=39, embed=2.5).advice
    assert "the GPUs are busy for 25% of the time; 16 cores would keep them busy" in advice
    assert "up to 400 images/s" in advice


def test_a_runtime_that_was_measured_faster_comes_with_the_gain_it_would_bring() -> None:
    def trial(kind: str, precision: str, rate: float, refused: str | None = None) -> dict[str, Any]:
        return {"kind": kind, "precision": precision, "images_per_second": rate, "refused": refused}

    trials = [
        trial("tensorflow", "float32", 100.0),
        trial("openvino", "float32", 150.0),
        trial("openvino", "bfloat16", 300.0),
        trial("tensorflow", "bfloat16", 900.0, refused="cosine 0.98"),
    ]
    first, second, *_ = diagnosed(trials=trials, decode=10, embed=30).advice
    assert "openvino, precision: bfloat16" in first and "about 200 images/s" in first  # 40 s become 10 + 10
    assert "openvino, precision: float32" in second and "about 133 images/s" in second
    untried, core = diagnosed(decode=10, embed=30).advice
    assert "runtime.kind: openvino" in untried and "92 to 121 images/s" in untried
    assert core == "each further core adds about 25 images/s"


def test_a_million_images_cost_their_hours() -> None:
    assert cost_per_million(rate=1e6 / 3600, nodes=3, price_per_node_hour=0.5) == pytest.approx(1.5)
