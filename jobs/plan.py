"""The plan verb: what extracting an archive would take, from its size alone; shows every assumption with its source.

Not for: the formulas (`engine/estimate.py`), or what is pending of a real archive (`engine extract --plan`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from engine.config import check_recipe, read_document, with_overrides
from engine.errors import RecipeError
from engine.estimate import CLUSTERS, Estimate, PaperPlan


def paper_plan(images: float, cluster: str, overrides: Sequence[str]) -> PaperPlan:
    """Put a plan together.

    Args:
        images: in the archive; a whole number.
        cluster: a name of CLUSTERS, or the path of a YAML file with the fields of `cluster`.
        overrides: texts such as `rates.images_per_gpu=3000`.

    Raises:
        RecipeError: no such cluster, or a field is wrong.
    """
    if not math.isfinite(images) or images != int(images) or images < 1:
        raise RecipeError(
            "--images: not a number of images", found=f"{images:g}", wanted="a whole one, 1 or more"
        )
    if cluster in CLUSTERS:
        block = CLUSTERS[cluster].model_dump()
    elif Path(cluster).exists():
        block = read_document(cluster)
    else:
        raise RecipeError(
            f"--cluster {cluster}: no such cluster, and no such file",
            wanted=f"{', '.join(CLUSTERS)}, or a YAML file with nodes, cores_per_node ...",
        )
    return check_recipe(
        PaperPlan, with_overrides({"images": int(images), "cluster": block}, overrides), "plan"
    )


def facts_of(plan: PaperPlan) -> dict[str, Any]:
    """All there is to say: figures with their formulas, where it stops, and the assumptions with their sources."""
    estimate = Estimate(plan)
    return {
        "verb": "plan",
        "figures": [figure._asdict() for figure in estimate.figures()],
        "limits": [limit._asdict() for limit in estimate.limits()],
        "assumptions": list(_assumptions(plan)),
    }


def print_facts(facts: dict[str, Any]) -> None:
    """The same for people, to stdout."""
    print("estimated")
    for figure in facts["figures"]:
        value = "-" if figure["value"] is None else _in_short(figure["value"], figure["unit"])
        print(f"  {figure['name']:<32} {value:>24}   = {figure['formula']}")
    print("where it stops")
    for limit in facts["limits"]:
        value = _in_short(limit["value"], limit["unit"])
        print(f"  {limit['name']:<45} {value:>22}, used: {limit['share']:.1%}   way out: {limit['way_out']}")
    print("assumed (--set NAME=VALUE)")
    for one in facts["assumptions"]:
        print(f"  {one['name']:<32} {one['value']!s:>10}   {one['source']}")


def _assumptions(model: BaseModel, prefix: str = "") -> Iterator[dict[str, Any]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _assumptions(value, f"{prefix}{name}.")
        else:
            yield {
                "name": f"{prefix}{name}",
                "value": value,
                "source": " ".join((field.description or "").split()),
            }


_LARGE_BYTES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1, "B"))


def _in_short(value: float, unit: str) -> str:
    """12,345,678 objects, 1.23 TB, 0.50 requests/s."""
    if unit.startswith("bytes"):
        size, name = next((step for step in _LARGE_BYTES if value >= step[0]), (1, "B"))
        return f"{value / size:,.4g} {name}{unit.removeprefix('bytes')}"
    if isinstance(value, int):
        return f"{value:,} {unit}"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:,.2f} {unit}"
