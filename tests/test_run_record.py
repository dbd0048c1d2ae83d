"""What is kept of each run: the latest is found, and only so many are kept."""

from __future__ import annotations

from pathlib import Path

from engine.run_record import RUNS_KEPT, keep_run, last_run
from engine.storage import open_store


def run_id(number: int, verb: str = "extract") -> str:
    return f"{verb}-20260101T{number:06d}Z-0a1b"


def test_the_latest_run_is_found_whatever_its_verb(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert last_run(store) is None
    for number, verb in [(1, "extract"), (3, "extract"), (2, "nightly")]:
        keep_run(store, run_id(number, verb), {"run_id": run_id(number, verb), "exit_code": number})
    assert last_run(store) == {"run_id": run_id(3), "exit_code": 3}
    store.write(f"runs/{run_id(4)}.json", b"not JSON")
    assert last_run(store) == {"run_id": run_id(3), "exit_code": 3}


def test_the_oldest_are_removed_and_nothing_else(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("runs/readme.txt", b"ours")
    store.write("data/part.parquet", b"")
    for number in range(RUNS_KEPT + 3):
        keep_run(store, run_id(number), {"run_id": run_id(number)})
    kept = sorted(store.names("runs/"))
    assert kept == [f"runs/{run_id(number)}.json" for number in range(3, RUNS_KEPT + 3)] + ["runs/readme.txt"]
    assert list(store.names("data/")) == ["data/part.parquet"]
