"""Rows per second of `engine score` from embeddings, beside merely reading them and beside `model.predict`.

    python -m tests.benchmarks.scoring            # 50,000 and 1,050,000 rows of 1280 float32; 5.9 GB of disk
    python -m tests.benchmarks.scoring --quick    # see that it runs; the figures mean nothing

A linear head with 100 classes, the five best kept, parts of 1,024 rows on a local disk. They have just been written, so
that all contenders read from the page cache: what is measured is processors, not the disk. Contenders are processes of
their own and take turns; rates are marginal, further rows / further seconds of whole processes between two sizes,
medians over the rounds, so that start-up does not count. Core-seconds (user and system, of all processes of a
contender) tell about the same where others use the machine too and wall-clock tells little. A million further rows,
because start-up varies by 3 s, more than 200,000 rows take. NumPy's matrix product must run the kernels of the
processor: with OPENBLAS_CORETYPE=Haswell in the environment it took 13 instead of 5 ms a part on one with AVX-512.

    engine       `engine score RECIPE --json`, on all cores
    read         pyarrow's dataset reads the column `embedding` and drops it, on all cores, with its defaults
    ray_predict  Ray Data: `read_parquet`, an actor with `model.predict` and NumPy's argsort, `write_parquet`

Shape letters: N rows, D embedding width, K classes, k top entries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks.report import Ratio
from tests.benchmarks.throughput import REPOSITORY, _result_path, machine_facts
from tests.embedding_tables import publish_linear, write_table
from tests.processes import processes_below

WIDTH, CLASSES, TOP_K, ROWS_PER_PART = 1280, 100, 5, 1024
ROWS_PER_SHARD = 50 * ROWS_PER_PART
SIZES = {"engine": (50_000, 1_050_000), "read": (50_000, 1_050_000), "ray_predict": (10_000, 50_000)}
QUICK_SIZES = (2_000, 6_000)
ROUNDS = 3
PERIOD_S = 0.05


def make_table(folder: Path, rows: int) -> Path:
    """An embedding table of so many rows; all shards hold the same numbers."""
    random = np.random.default_rng(0)
    full_ND = random.normal(size=(min(rows, ROWS_PER_SHARD), WIDTH)).astype(np.float32)
    starts = range(0, rows, ROWS_PER_SHARD)
    shards = {f"{start:08d}.tar": full_ND[: min(rows - start, ROWS_PER_SHARD)] for start in starts}
    write_table(folder, shards, ROWS_PER_PART)
    return folder


def make_bundle(folder: Path) -> Path:
    """A linear head whose answers are neither sure nor alike."""
    random = np.random.default_rng(1)
    kernel_DK = random.normal(size=(WIDTH, CLASSES), scale=0.1)
    names = tuple(f"class {number:03d}" for number in range(CLASSES))
    publish_linear(folder, kernel_DK, random.normal(size=CLASSES), names)
    return folder


def engine(table: Path, bundle: Path, out: Path) -> int:
    """The command as users run it."""
    output = {"uri": str(out), "top_k": TOP_K}
    recipe = {"embeddings": {"uri": str(table)}, "bundles": [{"uri": str(bundle), "output": output}]}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "jobs.cli", "score", str(path), "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    rows: int = json.loads(done.stdout.splitlines()[-1])["rows"]
    return rows


def read(table: Path, bundle: Path, out: Path) -> int:
    """No more than the embeddings, no further than memory."""
    import pyarrow.dataset as ds

    del bundle, out
    return sum(batch.num_rows for batch in ds.dataset(table / "data").to_batches(columns=["embedding"]))


def ray_predict(table: Path, bundle: Path, out: Path) -> int:
    """As the page "Offline batch inference" of Ray's documentation puts it together."""
    import pyarrow.dataset as ds
    import ray

    from engine.heads.bundle import open_bundle
    from engine.storage import open_store

    class Label:
        def __init__(self) -> None:
            opened = open_bundle(open_store(str(bundle)))
            self.model, self.names = opened.network(), np.array(opened.manifest.classes)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            logits_NK = self.model.predict(np.stack(batch["embedding"]), verbose=0)
            raised_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
            confidences_NK = raised_NK / raised_NK.sum(axis=1, keepdims=True)
            best_Nk = np.argsort(-confidences_NK, axis=1)[:, :TOP_K]
            return {
                "key": batch["key"],
                "label": self.names[best_Nk[:, 0]],
                "top_labels": self.names[best_Nk],
                "top_confidences": np.take_along_axis(confidences_NK, best_Nk, axis=1),
            }

    dataset = ray.data.read_parquet(str(table / "data"), columns=["key", "embedding"])
    labelled = dataset.map_batches(Label, batch_size=1024, compute=ray.data.ActorPoolStrategy(size=1))
    labelled.write_parquet(str(out))
    return ds.dataset(out).count_rows()


CONTENDERS: dict[str, Callable[[Path, Path, Path], int]] = {
    "engine": engine,
    "read": read,
    "ray_predict": ray_predict,
}


def seconds_of(name: str, table: Path, bundle: Path, rows: int) -> tuple[float, float]:
    """Wall-clock of a whole process, from outside, and core-seconds of it and all below it; its rows are counted."""
    with tempfile.TemporaryDirectory(prefix="engine-scoring-out-", dir=table.parent) as folder:
        arguments = [f"--contender={name}", f"--table={table}", f"--bundle={bundle}", f"--out={folder}/out"]
        command = [sys.executable, "-m", "tests.benchmarks.scoring", *arguments]
        ticks: dict[int, int] = {}
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                everyone = [process.pid, *processes_below(process.pid)]
                ticks |= {pid: used for pid in everyone if (used := _ticks(pid)) is not None}
                time.sleep(PERIOD_S)
            seconds = time.perf_counter() - started
            assert process.stdout is not None
            printed = process.stdout.read().splitlines()
    if process.returncode or int(printed[-1]) != rows:
        raise RuntimeError(
            f"{name}: exit code {process.returncode}, {printed[-1:]} of {rows:,} rows came out"
        )
    return seconds, sum(ticks.values()) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int | None:
    """Clock ticks that a process has used until now, in its own code and in the kernel; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])


def measured(folder: Path, sizes: dict[str, tuple[int, int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each contender its sizes, its seconds and core-seconds, and its marginal rows per second of either."""
    bundle = make_bundle(folder / "bundle")
    tables = {
        rows: make_table(folder / f"{rows}", rows) for rows in sorted({n for s in sizes.values() for n in s})
    }
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sizes}
    core_seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sizes}
    for number in range(rounds):
        for which in (0, 1):
            for name, both in sizes.items():
                took, used = seconds_of(name, tables[both[which]], bundle, both[which])
                seconds[name][which].append(took)
                core_seconds[name][which].append(used)
                said = f"round {number}: {name:12} {both[which]:>8,} rows {took:7.2f} s {used:7.2f} core-s"
                print(said, file=sys.stderr, flush=True)
    return {
        name: {
            "rows": list(sizes[name]),
            "seconds": seconds[name],
            "core_seconds": core_seconds[name],
            "rows_per_second": _marginal(sizes[name], seconds[name]),
            "rows_per_core_second": _marginal(sizes[name], core_seconds[name]),
        }
        for name in sizes
    }


def _marginal(sizes: tuple[int, int], took: tuple[list[float], list[float]]) -> float | None:
    """None where start-up varied by more than the further rows took."""
    further = statistics.median(took[1]) - statistics.median(took[0])
    return (sizes[1] - sizes[0]) / further if further > 0 else None


def ratios(found: dict[str, dict[str, Any]]) -> list[Ratio]:
    """Beside their goals."""
    return [
        Ratio(f"scoring/engine/{other}{of}", _divided(found["engine"][rate], found[other][rate]), goal)
        for other, goal in (("read", 0.5), ("ray_predict", 20.0))
        for rate, of in (("rows_per_second", ""), ("rows_per_core_second", ", of a core's second"))
        if other in found and "engine" in found
    ]


def _divided(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "benchmarks" / "results")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(CONTENDERS[options.contender](options.table, options.bundle, options.out))
        return
    sizes = {name: QUICK_SIZES if options.quick else SIZES[name] for name in options.only}
    machine = machine_facts()
    with tempfile.TemporaryDirectory(prefix="engine-scoring-") as folder:
        found = measured(Path(folder), sizes, 1 if options.quick else options.rounds)
    for name, one in found.items():
        rates = [one["rows_per_second"], one["rows_per_core_second"]]
        print(
            f"{name:12}", *("-" if rate is None else f"{rate:,.0f}" for rate in rates), "rows/s, rows/core-s"
        )
    judged = ratios(found)
    document = {
        "machine": machine,
        "quick": options.quick,
        "width": WIDTH,
        "classes": CLASSES,
        "top_k": TOP_K,
        "rows_per_part": ROWS_PER_PART,
        "scoring": found,
        "ratios": [
            {"name": one.name, "value": one.value, "goal": one.goal, "verdict": one.verdict} for one in judged
        ],
    }
    if set(found) != set(CONTENDERS):
        print(*(one.line() for one in judged), sep="\n")
        return
    path = _result_path(options.out)
    path = path.with_name(path.stem + "-scoring.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(*(one.line() for one in judged), f"written: {path}", sep="\n")


if __name__ == "__main__":
    main()
