"""Rows per second of `engine.similar`, beside merely reading the embeddings; its recall and its memory.

    python -m tests.benchmarks.similar            # 50,000 and 250,000 rows of 1280 float32; 1.6 GB of disk
    python -m tests.benchmarks.similar --quick    # see that it runs; the figures mean nothing

One query, the 20 nearest rows, parts of 1,024 rows on a local disk. They have just been written, so that both
contenders read from the page cache: what is measured is processors, not the disk. Each measurement is a process of its
own and takes the time of the search alone, without imports; contenders take turns, and a ratio is that of neighbours.
Core-seconds (user and system) tell about the same where others use the machine too and wall-clock tells little.

    similar      the 20 rows of the table with the largest cosine to a vector, on all cores
    read         pyarrow's dataset reads the column `embedding` and drops it, on all cores, with its defaults

The answer is compared with NumPy's over all rows at once, in float64. Memory is the most that the process held.
NumPy's matrix product must run the kernels of the processor: unset OPENBLAS_CORETYPE if the environment sets it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.report import Ratio
from tests.benchmarks.scoring import ROWS_PER_PART, WIDTH, make_table
from tests.benchmarks.throughput import REPOSITORY, _result_path, machine_facts

TOP_K = 20
SIZES, QUICK_SIZES = (50_000, 250_000), (2_000, 6_000)
ROUNDS = 7
REPEATED_IN_PROCESS = 3  # searches; the fastest counts, so that the first touch of libraries does not


def query() -> np.ndarray:
    """(1, D): a vector that is no row of the table."""
    return np.random.default_rng(9).normal(size=(1, WIDTH)).astype(np.float32)


def similar(table: Path) -> list[str]:
    """The keys that were found, nearest first."""
    from engine.similar import similar as nearest
    from engine.storage import open_store
    from engine.tables import open_table

    found: list[str] = nearest(open_table(open_store(str(table))), query(), TOP_K)["key"].to_pylist()
    return found


def read(table: Path) -> list[str]:
    """No more than the embeddings, no further than memory."""
    import pyarrow.dataset as ds

    for batch in ds.dataset(table / "data").to_batches(columns=["embedding"]):
        del batch
    return []


CONTENDERS: dict[str, Callable[[Path], list[str]]] = {"similar": similar, "read": read}


def by_numpy(table: Path) -> list[str]:
    """The keys of the same rows, in float64 and all at once."""
    import pyarrow.dataset as ds

    rows = ds.dataset(table / "data").to_table(columns=["key", "embedding"])
    cosines = []
    for batch in rows.to_batches():
        rows_ND = batch["embedding"].flatten().to_numpy().reshape(-1, WIDTH).astype(np.float64)
        cosines.append(rows_ND @ query()[0].astype(np.float64) / np.linalg.norm(rows_ND, axis=1))
    order = np.argsort(-np.concatenate(cosines), kind="stable")[:TOP_K]
    return rows["key"].take(order).to_pylist()


def measure_here(name: str, table: Path) -> dict[str, Any]:
    """One contender, in this process."""
    seconds, core_seconds = [], []
    for _ in range(REPEATED_IN_PROCESS):
        started, used = time.perf_counter(), time.process_time()
        keys = CONTENDERS[name](table)
        seconds.append(time.perf_counter() - started)
        core_seconds.append(time.process_time() - used)
    taken = {"seconds": min(seconds), "core_seconds": min(core_seconds), "peak_bytes": _peak_bytes()}
    return {"keys": keys, **taken}


def _peak_bytes() -> int:
    """Of this process since its exec; what getrusage says begins with that of the parent."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def measured_in_a_process(name: str, table: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.similar", f"--contender={name}", f"--table={table}"]
    ended = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measured(folder: Path, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Of each round and size the seconds and bytes of both, and whether the rows were the right ones."""
    tables = {rows: make_table(folder / str(rows), rows) for rows in sizes}
    wanted = {rows: by_numpy(table) for rows, table in tables.items()}
    taken: dict[str, Any] = {name: {str(rows): [] for rows in sizes} for name in CONTENDERS}
    recalls = []
    for number in range(rounds):
        for rows, table in tables.items():
            for name in CONTENDERS:
                found = measured_in_a_process(name, table)
                if name == "similar":
                    recalls.append(len(set(found.pop("keys")) & set(wanted[rows])) / TOP_K)
                found.pop("keys", None)
                taken[name][str(rows)].append(found)
                took, used = found["seconds"], found["core_seconds"]
                said = f"round {number}: {name:8} {rows:>8,} rows {took:7.2f} s {used:7.2f} core-s"
                said += f" {found['peak_bytes'] / 1e6:6.0f} MB"
                print(said, file=sys.stderr, flush=True)
    return {"taken": taken, "recall": min(recalls)}


def ratios(found: dict[str, Any], sizes: tuple[int, int]) -> list[Ratio]:
    """Beside their goals."""
    small, large = map(str, sizes)
    pairs = list(zip(found["taken"]["similar"][large], found["taken"]["read"][large], strict=True))
    rate, core_rate = (
        statistics.median(other[name] / own[name] for own, other in pairs)
        for name in ("seconds", "core_seconds")
    )
    peaks = {
        size: statistics.median(one["peak_bytes"] for one in found["taken"]["similar"][size])
        for size in (small, large)
    }
    return [
        Ratio("similar/read", rate, 0.5),
        Ratio("similar/read, of a core's second", core_rate, 0.5),
        Ratio("similar/recall", found["recall"], 1.0),
        Ratio(
            f"similar/peak memory, {sizes[1]:,} rows over {sizes[0]:,}",
            peaks[large] / peaks[small],
            1.2,
            at_most=True,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "benchmarks" / "results")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure_here(options.contender, options.table)))
        return
    machine, sizes = machine_facts(), QUICK_SIZES if options.quick else SIZES
    with tempfile.TemporaryDirectory(prefix="engine-similar-") as folder:
        found = measured(Path(folder), sizes, 1 if options.quick else options.rounds)
    judged = ratios(found, sizes)
    print(*(one.line() for one in judged), sep="\n")
    if options.quick:
        return
    document = {
        "machine": machine,
        "width": WIDTH,
        "top_k": TOP_K,
        "rows_per_part": ROWS_PER_PART,
        "similar": found,
        "ratios": [
            {"name": one.name, "value": one.value, "goal": one.goal, "verdict": one.verdict} for one in judged
        ],
    }
    path = _result_path(options.out)
    path = path.with_name(path.stem + "-similar.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
