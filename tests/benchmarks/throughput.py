"""How fast the engine is beside what one could write by hand, and beside what the machine can do at most.

    python -m tests.benchmarks.throughput [--network MobileNetV2] [--sizes 8000 24000] [--rounds 1] [--quick] [--gpu]
    python -m tests.benchmarks.throughput --render tests/benchmarks/results/2026-11-23.json

Contenders take turns, each a process of its own with a fresh output folder, first all with the smaller archive, then
all with the larger one; slow ones have a quarter of the images. A rate is marginal: further images / further seconds,
so that start-up does not count. Writes <date>.json and prints rates and `name value goal` lines. Exit code 1: a
contender failed, or the engine was faster than the limit, so that the limits were not measured well. A missed goal is
said, and is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.archive import LITE0, backbone_block, make_archive
from tests.benchmarks.limits import limit
from tests.benchmarks.memory import PeakMemory
from tests.benchmarks.report import faster_than_limit, rate_table, ratio_records, ratios, readme_table
from tests.benchmarks.rivals import rows_written

REPOSITORY = Path(__file__).resolve().parents[2]
RUNTIMES = {
    "tensorflow float32": {"kind": "tensorflow", "precision": "float32"},
    "openvino float32": {"kind": "openvino", "precision": "float32"},
    "openvino bfloat16": {"kind": "openvino", "precision": "bfloat16"},
}
GPU_RUNTIMES = {
    f"tensorflow {precision}": {"kind": "tensorflow", "precision": precision}
    for precision in ("float32", "tf32", "bfloat16", "float16")
}
HAND_WRITTEN = ("ray_documentation", "tfdata_predict", "tfdata_folded")
# They get a quarter of the images, or would take half of the time.
SLOW = ("ray_documentation", "tfdata_predict")
REFUSED = 2  # exit code of the engine, and of our own programs, for a runtime that is not there
TIMEOUT_S = 1800
SHOWN_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = (
    "ray",
    "tensorflow",
    "keras",
    "openvino",
    "pillow",
    "opencv-python-headless",
    "numba",
    "pyarrow",
    "numpy",
)


@dataclass(frozen=True)
class Network:
    """What is measured, and in how many images.

    The engine decodes ahead while its network loads, up to fourteen parts on two cores: the smaller archive has that
    many images, or the larger one is charged with the decoding of both. The larger one takes a minute longer: starts
    differ by seconds.
    """

    name: str
    side_px: int
    sizes: tuple[int, int]
    rounds: int
    on_gpu: bool = False
    """Where it is computed; images are decoded by the processor's cores all the same."""

    def sizes_of(self, contender: str) -> tuple[int, int]:
        """Images in its two archives."""
        small, large = self.sizes
        return (max(1, small // 4), max(2, large // 4)) if contender in SLOW else (small, large)


NETWORKS = (
    Network("MobileNetV2", 160, (8000, 24000), 1),
    Network("EfficientNetB0", 224, (2000, 6000), 1),
    Network("ResNet50", 224, (400, 1200), 1),  # of its time decoding is a fortieth
    Network(LITE0, 224, (3000, 9000), 1),  # with trained weights, by which reduced precision can be judged
)
QUICK_SIZES, QUICK_LIMIT_S, LIMIT_S = (64, 192), 0.2, 2.0


@dataclass(frozen=True)
class Run:
    """One run of one contender."""

    seconds: float
    peak_bytes: int
    peak_process_bytes: int


@dataclass
class Measured:
    """All runs of one contender, by size of the archive."""

    command: Callable[[Path, Path], list[str]]
    """(archive, output folder) -> arguments."""
    runs: dict[int, list[Run]] = field(default_factory=dict)
    refused: str | None = None
    """Why there is no such runtime here, in the engine's words."""
    failed: str | None = None
    """How it ended where it should not have; it takes no further turns."""


class ProgramFailed(Exception):
    """A program ended with another exit code than 0 or 2, or did not write a row for every image."""


class ProgramRefused(Exception):
    """A program ended with exit code 2; the message is the last line that it said."""


def main() -> None:
    options = _parser().parse_args()
    if options.render:
        print(readme_table(json.loads(options.render.read_text())))
        return
    results: dict[str, Any] = {"machine": machine_facts(), "quick": options.quick, "networks": {}}
    with tempfile.TemporaryDirectory(prefix="engine-throughput-") as temporary:
        folder = options.folder or Path(temporary)
        with _alone_in(folder):
            for network in _chosen(options):
                measured = measure(network, folder, options.only, options.quick)
                results["networks"][network.name] = measured
    results["ratios"] = ratio_records(results)
    path = _result_path(options.out)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(rate_table(results), *(ratio.line() for ratio in ratios(results)), f"written: {path}", sep="\n")
    wrong = [] if options.quick else faster_than_limit(results)
    if wrong:
        _say("\n  ".join(["the engine exceeds its limit, so the limits were not measured well:", *wrong]))
    if wrong or failures(results):
        _say("\n".join(failures(results)))
        raise SystemExit(1)


def measure(network: Network, folder: Path, only: list[str], quick: bool) -> dict[str, Any]:
    """Everything about one network.

    Args:
        network: name, side, sizes and rounds.
        folder: where archives and weights are, or will be, and outputs come and go.
        only: beginnings of names of contenders; empty: all.
        quick: see that it all runs; the figures mean nothing.

    Raises:
        ProgramFailed: no weights could be made. A contender that fails takes no further turns.
    """
    ask = [sys.executable, "-m", "tests.benchmarks.archive", "weights", network.name, str(network.side_px)]
    _say(f"{network.name}: archives and weights")
    weights = Path(_run([*ask, str(folder.resolve())], folder)[0].splitlines()[-1])
    contenders = {
        name: Measured(command)
        for name, command in _contenders(network, weights)
        if not only or name.startswith(tuple(only))
    }
    sizes = sorted({size for name in contenders for size in network.sizes_of(name)} | {network.sizes[0]})
    archives = {size: make_archive(folder.resolve(), size) for size in sizes}
    limits: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for number in range(network.rounds):
        for name, found in _limits(network, archives[network.sizes[0]], weights, quick, set(contenders)):
            if isinstance(found, str):
                failed[name] = found
            else:
                limits.setdefault(name, []).append(found)
        for size, archive in archives.items():
            for name, contender in contenders.items():
                takes_part = size in network.sizes_of(name)
                if takes_part and contender.refused is None and contender.failed is None:
                    _say(f"{network.name}: round {number + 1} of {network.rounds}, {size} images, {name}")
                    _measure_once(contender, archive, size, folder)
    return {
        "side_px": network.side_px,
        "sizes": network.sizes,
        "rounds": network.rounds,
        "on_gpu": network.on_gpu,
        "contenders": {name: _summary(contender) for name, contender in contenders.items()},
        "limits": {**_best_limits(limits, network.on_gpu), "failed": failed},
    }


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two benchmarks on one machine measure each other, and in one folder they write over each other's outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder}: another benchmark is at work here") from None
        yield


def machine_facts() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo)}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "flags": [flag for flag in SHOWN_FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_before": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "date": datetime.date.today().isoformat(),
    }


def _gpus() -> list[str]:
    """Their names, as the driver has them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def _contenders(network: Network, weights: Path) -> Iterator[tuple[str, Callable[[Path, Path], list[str]]]]:
    for kind in HAND_WRITTEN:
        yield kind, functools.partial(_rival, network, weights, kind, RUNTIMES["tensorflow float32"])
    for name, runtime in _runtimes(network).items():
        yield f"same_parts {name}", functools.partial(_rival, network, weights, "same_parts", runtime)
        yield f"engine {name}", functools.partial(_engine, network, weights, runtime)


def _runtimes(network: Network) -> dict[str, dict[str, str]]:
    """Those that this machine computes as they are called: without instructions for it bfloat16 would be float32."""
    if network.on_gpu:
        return GPU_RUNTIMES
    has_bfloat16 = bool({"avx512_bf16", "amx_bf16"} & set(machine_facts()["flags"]))
    return {
        name: found for name, found in RUNTIMES.items() if has_bfloat16 or found["precision"] != "bfloat16"
    }


def _rival(
    network: Network, weights: Path, kind: str, runtime: dict[str, str], archive: Path, out: Path
) -> list[str]:
    program = [sys.executable, "-m", "tests.benchmarks.rivals", kind, str(archive), str(out)]
    return [*program, *_network_arguments(network, weights, runtime)]


def _engine(network: Network, weights: Path, runtime: dict[str, str], archive: Path, out: Path) -> list[str]:
    """As a user runs it; the recipe, which is JSON and so YAML too, lies beside the table."""
    recipe = {
        # With classes reduced precision is judged by them: without, telling 500 images apart is left to random weights.
        "source": {"kind": "webdataset", "uri": str(archive), "label": "cls"},
        "backbone": backbone_block(network.name, network.side_px, weights),
        "runtime": runtime,
        "compute": {"gpus_per_actor": 1 if network.on_gpu else 0},
        "output": {"uri": str(out)},
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(recipe))
    return [str(Path(sys.executable).with_name("engine")), "extract", str(path), "--json"]


def _limits(
    network: Network, archive: Path, weights: Path, quick: bool, contenders: set[str]
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """("decode" or a runtime, what `limits.py` says, or how it failed); runtimes that are refused are left out."""
    program = [sys.executable, "-m", "tests.benchmarks.limits"]
    effort = ["--seconds", str(QUICK_LIMIT_S), "--batches", "8"] if quick else ["--seconds", str(LIMIT_S)]
    wanted = {
        name: runtime
        for name, runtime in _runtimes(network).items()
        if contenders & {f"same_parts {name}", f"engine {name}"}
    }
    for name, runtime in {"decode": RUNTIMES["tensorflow float32"], **wanted}.items():
        kind = "decode" if name == "decode" else "forward"
        _say(f"{network.name}: limit, {kind} {name}")
        try:
            command = [*program, kind, str(archive), *_network_arguments(network, weights, runtime), *effort]
            yield name, json.loads(_run(command, archive.parent)[0].splitlines()[-1])
        except ProgramRefused as refused:
            _say(f"  skipped: {refused}")
        except ProgramFailed as failed:
            _say(f"  FAILED: {failed}")
            yield name, str(failed)


def _network_arguments(network: Network, weights: Path, runtime: dict[str, str]) -> list[str]:
    which = ["--network", network.name, "--side", str(network.side_px), "--weights", str(weights)]
    gpu = ["--gpu"] if network.on_gpu else []
    return [*which, "--runtime", runtime["kind"], "--precision", runtime["precision"], *gpu]


def _measure_once(contender: Measured, archive: Path, size: int, folder: Path) -> None:
    out = folder.resolve() / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        _, run = _run(contender.command(archive, out), folder)
        if (rows := rows_written(out)) != size:
            raise ProgramFailed(f"{rows} rows were written, of {size} images")
        contender.runs.setdefault(size, []).append(run)
        _say(f"  {run.seconds:.1f} s, {run.peak_bytes / 1e9:.2f} GB")
    except ProgramRefused as refused:
        contender.refused = str(refused)
        _say(f"  skipped: {refused}")
    except ProgramFailed as failed:
        contender.failed = str(failed)
        _say(f"  FAILED: {failed}")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _run(command: list[str], folder: Path) -> tuple[str, Run]:
    """Run a program to its end: what it printed, and what it took."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-cache-") as cache,
        open(folder / "stdout", "w+") as stdout,
        open(folder / "stderr", "w+") as stderr,
    ):
        # As on a machine that has never seen the network: otherwise only the smaller archive's run would load it.
        environment["ENGINE_CACHE_DIR"] = cache
        started = time.monotonic()
        with (
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=stdout, stderr=stderr
            ) as process,
            PeakMemory(process.pid) as peak,
        ):
            try:
                code = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise ProgramFailed(f"{' '.join(command)} took more than {TIMEOUT_S} s") from None
            finally:
                process.terminate()
        seconds = time.monotonic() - started
        said = (folder / "stderr").read_text()
        if code == REFUSED:
            raise ProgramRefused(_reason(said))
        if code != 0:
            raise ProgramFailed(f"{' '.join(command)} ended with exit code {code}:\n{said[-3000:]}")
        return (folder / "stdout").read_text(), Run(round(seconds, 2), peak.sum_bytes, peak.largest_bytes)


def _reason(said: str) -> str:
    """Of the engine, its error and what it found; of another program, its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("error:", "found:"))]
    return " ".join(named or lines[-1:]) or "no reason given"


def _summary(contender: Measured) -> dict[str, Any]:
    """For the JSON file: seconds of every run, the marginal rate of their medians, the highest peaks."""
    runs = [run for some in contender.runs.values() for run in some]
    seconds = {size: [run.seconds for run in some] for size, some in contender.runs.items()}
    return {
        "refused": contender.refused,
        "failed": contender.failed,
        "seconds": seconds,
        "images_per_second": marginal_rate({size: statistics.median(some) for size, some in seconds.items()}),
        "peak_bytes": max((run.peak_bytes for run in runs), default=None),
        "peak_process_bytes": max((run.peak_process_bytes for run in runs), default=None),
    }


def marginal_rate(seconds: dict[int, float]) -> float | None:
    """Further images per further second; None: not both sizes ran, or more images took no more time."""
    if len(seconds) != 2:
        return None
    (small, small_s), (large, large_s) = sorted(seconds.items())
    return round((large - small) / (large_s - small_s), 2) if large_s > small_s else None


def _best_limits(limits: dict[str, list[dict[str, Any]]], on_gpu: bool) -> dict[str, Any]:
    """The best of all rounds, and the limit of each runtime."""
    best = {
        name: max(found, key=lambda once: float(once["images_per_second"])) for name, found in limits.items()
    }
    decode = best.pop("decode", None)
    limits = {
        name: round(limit(forward["images_per_second"], decode["images_per_second"], on_gpu), 2)
        for name, forward in best.items()
        if decode is not None
    }
    return {"decode": decode, "forward": best, "images_per_second": limits}


def failures(results: dict[str, Any]) -> list[str]:
    """What ended otherwise than it should, one line each."""
    return [
        f"FAILED: {network}, {name}: {failed.splitlines()[0]}"
        for network, found in results["networks"].items()
        for name, failed in [
            *found["limits"]["failed"].items(),
            *((name, measured["failed"]) for name, measured in found["contenders"].items()),
        ]
        if failed
    ]


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _chosen(options: argparse.Namespace) -> Iterator[Network]:
    for network in NETWORKS:
        if not options.network or network.name in options.network:
            sizes = tuple(options.sizes or (QUICK_SIZES if options.quick else network.sizes))
            rounds = options.rounds or (1 if options.quick else network.rounds)
            yield replace(network, sizes=sizes, rounds=rounds, on_gpu=options.gpu)


def _result_path(folder: Path) -> Path:
    """<date>.json, or <date>-2.json and so on: no result is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    date, number = datetime.date.today().isoformat(), 1
    while (path := folder / f"{date}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [network.name for network in NETWORKS]
    parser.add_argument("--network", nargs="+", choices=names, help="default: all")
    parser.add_argument(
        "--sizes", nargs=2, type=int, metavar=("SMALL", "LARGE"), help="images; default: per network"
    )
    parser.add_argument("--rounds", type=int, help="default: per network")
    parser.add_argument(
        "--only", nargs="+", default=[], help="beginnings of names of contenders: engine same_parts"
    )
    parser.add_argument("--gpu", action="store_true", help="run the networks on one GPU")
    parser.add_argument("--quick", action="store_true", help="see that it all runs; the figures mean nothing")
    parser.add_argument("--folder", type=Path, help="where archives and weights are kept; default: made anew")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file"
    )
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="print this result's table for engine/docs/performance.md"
    )
    return parser


if __name__ == "__main__":
    main()
