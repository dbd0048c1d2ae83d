"""Write the RayJobs of k8s/base and the patches of overlays: what `engine manifest` prints for jobs/recipes.

    make manifests

A platform engineer changes `engine/kubernetes/rayjob.yaml` (how pods look) or the sizes below, and runs it; what is
different on one cluster only belongs into an overlay of its own.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from engine.config import parse_yaml, to_yaml
from jobs.cli import main as engine

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "image-feature-engine:0.1.0"
HOURS = {"extract": "12", "fit": "4", "finetune": "12", "score": "4", "nightly": "7.5"}

# What each place says of sizes; all else is the template's.
# Of machines with 8 and 16 cores: see `Wish`.
CPU = {verb: ["--workers", "4", "--cpus", "7"] for verb in HOURS}
# One H100 was busy for 0.6 of the time with 16 cores to decode on (README, 2026-11-23): so 30 more beside its own.
GPU = {
    "extract": ["--gpus", "4", "--workers", "8", "--cpus", "15"],
    "fit": ["--gpus", "1", "--cpus", "15"],
    "finetune": ["--gpus", "1", "--workers", "4", "--cpus", "15"],
    "nightly": ["--gpus", "4", "--workers", "8", "--cpus", "15"],
}
DEV = {verb: ["--workers", "1", "--cpus", "2", "--scratch-gib", "2"] for verb in HOURS}


def arguments(verb: str, sizes: list[str]) -> list[str]:
    """The command whose output a file is made of."""
    command = ["manifest", verb, f"jobs/recipes/{verb}_bucket.yaml", "--image", IMAGE, "--name", verb]
    command += ["--recipe-map", "engine-recipes", "--suspend", "--offline", "--deadline-hours", HOURS[verb]]
    return command + sizes


def printed(verb: str, sizes: list[str]) -> dict[str, Any]:
    """The RayJob that the command prints."""
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
        code = engine(arguments(verb, sizes))
    if code:
        raise SystemExit(code)
    job: dict[str, Any] = parse_yaml(out.getvalue())
    return job


def patch(verb: str, sizes: list[str]) -> dict[str, Any]:
    """What of a RayJob hangs on its sizes, to be merged with the base's."""
    job = printed(verb, sizes)
    cluster = {"workerGroupSpecs": job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    spec = {"entrypoint": job["spec"]["entrypoint"], "rayClusterSpec": cluster}
    head = {name: job[name] for name in ("apiVersion", "kind")}
    return {**head, "metadata": {"name": verb}, "spec": spec}


def files() -> dict[Path, str]:
    """Each file's place below the repository, and its text."""
    made = {Path(f"k8s/base/{verb}.yaml"): _text(verb, sizes, printed) for verb, sizes in CPU.items()}
    made |= {Path(f"k8s/overlays/gpu/{verb}.yaml"): _text(verb, sizes, patch) for verb, sizes in GPU.items()}
    made |= {Path(f"k8s/overlays/dev/{verb}.yaml"): _text(verb, sizes, patch) for verb, sizes in DEV.items()}
    return made


def _text(verb: str, sizes: list[str], make: Any) -> str:
    what = "all of it" if make is printed else "its command and its pods"
    return (
        f"# {what[0].upper()}{what[1:]}: printed by `make manifests` from\n"
        f"# engine {' '.join(arguments(verb, sizes))}\n{to_yaml(make(verb, sizes))}"
    )


if __name__ == "__main__":
    for place, text in files().items():
        (ROOT / place).write_text(text, encoding="utf-8")
