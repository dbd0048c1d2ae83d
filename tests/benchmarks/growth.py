"""How the rate of an extraction grows with actors, shards, images per shard and rows per part; and planning with parts.

    python -m tests.benchmarks.growth [--only actors shards] [--quick] [--out DIR] [--folder DIR]

Everything is real but the network: tars of tiny JPEGs on a local disk, Ray, readers, actors, writers, parts. An actor
sleeps as long as a GPU would compute, so that many of them fit on a few cores and what is measured is how they are fed.

A rate is steady: all actors begin together, and images are counted from when 30 % of them are embedded (what readers
had ready while actors started is used up then) and every actor has answered once, until 90 % are (no actor has run dry
then). A part that is under way at either end counts with its share, because the parts of actors that sleep equally
long come in waves. Every part must be written, or the run has failed.

Writes <date>-growth.json and <date>-growth.html, log-log plots with their fitted slopes. Exit code 1: a run failed. A
missed goal is said, and is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.backbones.kinds import KerasApplicationConfig
from engine.doctor import STAGES
from engine.errors import EngineError
from engine.extraction import ExtractJob, Receipt, Setup
from engine.on_ray import ray_session, run_extract
from engine.plan import pending_shards, read_tasks
from engine.recipes import Compute, Limits
from engine.runtimes.base import FrozenGraph
from engine.runtimes.kinds import OpenVINORuntimeConfig
from engine.shards.kinds import WebDatasetSource, open_reader
from engine.sizing import MB, Footprint, Sizing, decode_threads
from engine.storage import StorageConfig, open_store
from engine.tables import table_progress
from tests.benchmarks.archive import make_jpegs
from tests.benchmarks.planning import PARTS_PER_SHARD, make_parts, make_shards
from tests.benchmarks.plots import Plot, Series, fit, page, short
from tests.benchmarks.report import Ratio
from tests.benchmarks.throughput import machine_facts

SIDE_PX, DISTINCT_IMAGES, WIDTH = 32, 64, 64  # of an image, of the archives, of an embedding
BATCH_IMAGES = 64
RUNTIME = OpenVINORuntimeConfig(kind="openvino")  # never run; actors import no TensorFlow for it
ACTOR_BYTES, READER_BYTES = 100 * MB, 300 * MB  # reserved, so that 64 actors fit into 20 GB
ALL_OPEN_TIMEOUT_S = 900.0  # 64 processes take minutes to start on two cores
STEADY_FROM, STEADY_TO = 0.3, 0.9  # shares of all images
FAST_BATCH_S = 0.064  # 1,000 images/s for each actor
SPARE = 0.8  # of what readers deliver, needed by all actors together where decoding is to keep up
EFFICIENCY_GOAL, EFFICIENCY_ACTORS = 0.9, 16
TIMES_PLANNED = 3  # the median counts


@dataclass(frozen=True)
class Effort:
    """What is tried, and with how many images.

    Attributes:
        seconds_of_actors: that a run of actors is to take, within the two limits below.
        parts_per_actor: at least, so that the end of a run, when actors run dry, is a small part of it.
        parts_of_actors: at most, of a run of actors that hardly sleep.
    """

    actors: tuple[int, ...] = (1, 4, 16, 64)
    seconds_of_actors: float = 20.0
    parts_per_actor: int = 20
    parts_of_actors: int = 640
    shards: tuple[int, ...] = (10, 100, 1000)
    images_of_shards: int = 40_000
    images: tuple[int, ...] = (1, 10, 100, 1000, 10_000)
    images_in_all: int = 40_000
    shards_at_most: int = 2000
    rows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    images_of_rows: int = 61_440
    parts: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)


QUICK = Effort(
    actors=(1, 4),
    seconds_of_actors=2.0,
    parts_per_actor=4,
    parts_of_actors=48,
    shards=(10, 100),
    images_of_shards=2000,
    images=(1, 100),
    images_in_all=2000,
    shards_at_most=100,
    rows=(64, 512),
    images_of_rows=8192,
    parts=(1000, 10_000),
)


class RunFailed(Exception):
    """A run did not do what it was to do, so that its rate means nothing."""


# ---------------------------------------------------------------- a network that sleeps


class SleepingEmbedder:
    """Takes as long as a GPU would, and no core, for one part at a time; notes when it worked.

    Args:
        per_batch_s: of every batch that is begun.
        notes: file with a line for each part: begin and end (monotonic seconds, the same for all processes), images.
    """

    def __init__(self, per_batch_s: float, notes: Path) -> None:
        self._per_batch_s, self._notes = per_batch_s, notes
        self._gpu = threading.Lock()  # an actor may be called from several threads
        notes.touch()

    def embed(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        """float32, shape (B, D): some pixels of each image, none of them zero."""
        count = len(pixels_BSS3)
        with self._gpu, open(self._notes, "a") as file:
            begin = time.monotonic()
            time.sleep(self._per_batch_s * -(-count // BATCH_IMAGES))
            embeddings_BD = pixels_BSS3.reshape(count, -1)[:, :WIDTH].astype(np.float32) + 1.0
            file.write(f"{begin} {time.monotonic()} {count}\n")
        return embeddings_BD


@dataclass(frozen=True)
class SleepingSetup(Setup):
    """A setup, and the answer that holds it: actors open a `SleepingEmbedder`, all at the same time.

    Attributes:
        per_batch_s: of a batch of BATCH_IMAGES.
        actors: that must be there before any of them begins.
        notes: folder of the embedders' notes.
    """

    per_batch_s: float
    actors: int
    notes: str

    def get(self) -> SleepingSetup:
        return self

    def open_embedder(self, num_threads: int | None, use_gpu: bool) -> SleepingEmbedder:
        embedder = SleepingEmbedder(self.per_batch_s, Path(self.notes) / f"{os.getpid()}.txt")
        deadline = time.monotonic() + ALL_OPEN_TIMEOUT_S
        while (found := len(os.listdir(self.notes))) < self.actors:
            if time.monotonic() > deadline:
                raise EngineError("not all actors have started", found=str(found), wanted=str(self.actors))
            time.sleep(0.05)
        return embedder


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Layout:
    """What one run varies besides its archive; as many readers as there are cores."""

    actors: int = 1
    rows_per_part: int = 256
    per_batch_s: float = 0.0

    def sizing(self) -> Sizing:
        part = self.rows_per_part * SIDE_PX**2 * 3
        return Sizing(
            actors=self.actors,
            min_actors=self.actors,
            start_actors=self.actors,
            actor_cpus=1.0,
            actor_gpus=0.0,
            embed_threads=1,
            decode_tasks=len(os.sched_getaffinity(0)),
            decode_threads=decode_threads(Compute()),
            reader_bytes=READER_BYTES,
            footprint=Footprint(part, READER_BYTES, READER_BYTES, ACTOR_BYTES),
        )


@dataclass
class Trace:
    """One run as it went; seconds are monotonic, processor seconds are sums since some beginning.

    Attributes:
        embedded: begin, end and images of each part in its actor.
        first_answers: of each actor.
        clock: at the beginning and at each receipt: seconds, processor seconds of this process, those of the machine.
        busy_s: seconds of each stage, over all its workers.
    """

    embedded: list[tuple[float, float, int]] = field(default_factory=list)
    first_answers: list[float] = field(default_factory=list)
    clock: list[tuple[float, float, float]] = field(default_factory=list)
    busy_s: Counter[str] = field(default_factory=Counter)
    images: int = 0
    parts: int = 0

    def tick(self) -> None:
        self.clock.append((time.monotonic(), time.process_time(), _machine_busy_s()))

    def add(self, receipt: Receipt) -> None:
        self.tick()
        self.busy_s.update({stage: getattr(receipt.header, f"{stage}_s") for stage in STAGES})
        self.images += receipt.rows
        self.parts += 1

    def read_notes(self, folder: Path) -> None:
        for path in folder.iterdir():
            lines = [line.split() for line in path.read_text().splitlines()]
            self.first_answers += [float(line[1]) for line in lines[:1]]
            self.embedded += [(float(begin), float(end), int(count)) for begin, end, count in lines]


@dataclass(frozen=True)
class Measured:
    """The steady stretch of one run.

    Attributes:
        seconds: that the stretch took.
        actors_fed: that were given anything at all.
        driver_cores, machine_cores: processors that the driver kept busy, and everything on this machine.
        busy_ms_per_part: stage -> of the whole run; reading, embedding and writing by the clock, decoding of a core.
    """

    images_per_second: float
    images: int
    parts: int
    seconds: float
    actors_fed: int
    driver_cores: float
    machine_cores: float
    busy_ms_per_part: dict[str, float]


def run(archive: Path, layout: Layout, images: int) -> Measured:
    """Extract an archive into a table that is gone afterwards.

    Args:
        images: in the archive.

    Raises:
        RunFailed: not every image became a row, or the stretch was too short to tell a rate.
        EngineError: as the engine raised it.
    """
    trace, sizing = Trace(), layout.sizing()
    with tempfile.TemporaryDirectory(prefix="growth-", dir=archive.parent) as folder:
        table, notes = Path(folder) / "table", Path(folder) / "notes"
        notes.mkdir()
        job = _job(archive, table, layout, sizing)
        setup = SleepingSetup(
            FrozenGraph(b"", SIDE_PX, WIDTH),
            RUNTIME,
            "sleep",
            (),
            layout.per_batch_s,
            layout.actors,
            str(notes),
        )
        source = open_store(job.source.uri)
        shards = open_reader(job.source, job.limits.max_sample_bytes).list_shards(source)
        groups = read_tasks(
            pending_shards(shards, table_progress(open_store(str(table)))).works, sizing.decode_tasks
        )
        with (
            ray_session(None, sizing.cpus_reserved),
            contextlib.closing(run_extract(job, setup, groups, sizing)) as receipts,
        ):
            trace.tick()
            for receipt in receipts:
                trace.add(receipt)
        trace.read_notes(notes)
    if trace.images != images:
        raise RunFailed(f"{trace.images:,} rows were written, of {images:,} images")
    return steady(trace)


def steady(trace: Trace) -> Measured:
    """What a trace says of the stretch in which all actors were fed (see the module's docstring).

    Raises:
        RunFailed: there is no such stretch.
    """
    ends = sorted((end, count) for _, end, count in trace.embedded)
    done = list(itertools.accumulate(count for _, count in ends))
    at = [ends[np.searchsorted(done, share * trace.images)][0] for share in (STEADY_FROM, STEADY_TO)]
    begin, end = max(at[0], *trace.first_answers), at[1]
    if end <= begin:
        raise RunFailed(f"{trace.parts} parts are too few: some actor began when most was done")
    times, driver_s, machine_s = (np.asarray(column) for column in zip(*trace.clock, strict=True))
    driver, machine = (np.diff(np.interp((begin, end), times, cpu_s))[0] for cpu_s in (driver_s, machine_s))
    images = sum(count * _share_inside(first, last, begin, end) for first, last, count in trace.embedded)
    return Measured(
        images_per_second=round(images / (end - begin), 1),
        images=trace.images,
        parts=trace.parts,
        seconds=round(end - begin, 2),
        actors_fed=len(trace.first_answers),
        driver_cores=round(float(driver) / (end - begin), 2),
        machine_cores=round(float(machine) / (end - begin), 2),
        busy_ms_per_part={stage: round(1000 * trace.busy_s[stage] / trace.parts, 2) for stage in STAGES},
    )


def _share_inside(first: float, last: float, begin: float, end: float) -> float:
    """How much of the interval from `first` to `last`, which is longer than nothing, is between `begin` and `end`."""
    return max(0.0, min(last, end) - max(first, begin)) / (last - first)


def _machine_busy_s() -> float:
    """Of all processors, since the machine started: all columns of /proc/stat but idle and iowait (proc(5))."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")


def _job(archive: Path, table: Path, layout: Layout, sizing: Sizing) -> ExtractJob:
    return ExtractJob(
        source=WebDatasetSource(uri=str(archive), image=("jpg",)),
        storage=StorageConfig(),
        backbone=KerasApplicationConfig(name="MobileNetV2", weights="random", input_size=SIDE_PX),
        runtime=RUNTIME,
        limits=Limits(),
        table_uri=str(table),
        dtype="float32",
        rows_per_part=layout.rows_per_part,
        decode_threads=sizing.decode_threads,
        embed_threads=sizing.embed_threads,
        use_gpu=True,  # seconds of an actor are those of the clock, as beside a GPU
    )


# ---------------------------------------------------------------- archives


def make_tiny(folder: Path, shards: int, images: int) -> Path:
    """`shards` tars of `images` JPEGs each, made if they are not there: one file under many names."""
    archive = folder / f"tiny-{shards}x{images}"
    if archive.exists():
        return archive
    unfinished = archive.with_name(f"unfinished-{archive.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    first = unfinished / "00000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, jpeg in zip(range(images), itertools.cycle(_tiny_jpegs())):
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = len(jpeg)
            tar.addfile(entry, io.BytesIO(jpeg))
    for shard in range(1, shards):
        os.link(first, unfinished / f"{shard:05d}.tar")
    unfinished.rename(archive)
    return archive


@functools.cache
def _tiny_jpegs() -> list[bytes]:
    encoded = []
    for jpeg in make_jpegs(DISTINCT_IMAGES):
        file = io.BytesIO()
        Image.open(io.BytesIO(jpeg)).resize((SIDE_PX, SIDE_PX)).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


# ---------------------------------------------------------------- what grows


@dataclass
class Growth:
    """One figure against another.

    Attributes:
        meaning: what a slope of 1 or 0 would say.
        series: name -> points, each a dict with `x`, `y` and what belongs to it.
        failed: why points are missing.
    """

    title: str
    x_label: str
    y_label: str
    meaning: str
    series: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, series: str, x: int, y: Callable[[], dict[str, Any]]) -> None:
        """Measure one point; one that fails is noted, and the others go on."""
        say(f"{self.title}: {series}, {x:,}")
        try:
            point = {"x": x, **y()}
        except (RunFailed, EngineError) as error:
            self.failed.append(f"{series}, {x:,}: {' '.join(str(error).split())[:500]}")
            say(f"  FAILED: {error}")
            return
        say(f"  {short(point['y'])} {self.y_label}")
        self.series.setdefault(series, []).append(point)

    def slopes(self) -> dict[str, float | None]:
        lines = {
            name: fit([(point["x"], point["y"]) for point in points]) for name, points in self.series.items()
        }
        return {name: round(line.slope, 3) if line else None for name, line in lines.items()}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "slopes": self.slopes()}


def grow_actors(folder: Path, effort: Effort) -> Growth:
    """Rates with ever more actors: as fast as the goal says; and so slow that readers keep up with all of them."""
    growth = Growth(
        "Actors",
        "actors",
        "images/s",
        "1: every actor adds as much as the first one; 0: more actors add nothing, because something else is full.",
    )
    readers = Layout(1, BATCH_IMAGES)
    growth.add("no sleep: what readers deliver", 1, lambda: _rate(folder, effort, readers))
    if not growth.series:
        return growth
    capacity = next(iter(growth.series.values()))[0]["y"]
    slow_s = round(max(effort.actors) * BATCH_IMAGES / (SPARE * capacity), 3)
    for per_batch_s in (FAST_BATCH_S, slow_s):
        name = f"{per_batch_s * 1000:.0f} ms per batch"
        for actors in effort.actors:
            layout = Layout(actors, BATCH_IMAGES, per_batch_s)
            growth.add(name, actors, functools.partial(_rate, folder, effort, layout))
        _add_efficiencies(growth.series.get(name, []), BATCH_IMAGES / per_batch_s, capacity)
    return growth


def _rate(folder: Path, effort: Effort, layout: Layout) -> dict[str, Any]:
    """Of parts of one batch each, four to a shard."""
    parts = effort.parts_of_actors
    if layout.per_batch_s:
        parts = min(parts, round(layout.actors * effort.seconds_of_actors / layout.per_batch_s))
    shards = -(-max(parts, layout.actors * effort.parts_per_actor) // 4)
    return _measured(make_tiny(folder, shards, 4 * layout.rows_per_part), layout)


def _measured(archive: Path, layout: Layout) -> dict[str, Any]:
    shards, _, images = archive.name.removeprefix("tiny-").partition("x")
    found = asdict(run(archive, layout, int(shards) * int(images)))
    return {"y": found.pop("images_per_second"), **found}


def _add_efficiencies(points: list[dict[str, Any]], ideal: float, capacity: float) -> None:
    """Beside each rate: what part it is of so many times one actor's, and of so many times what sleeping allows.

    Args:
        ideal: images/s of an actor that does nothing but sleep.
        capacity: images/s that readers deliver.
    """
    one = next((point["y"] for point in points if point["x"] == 1), None)
    for point in points:
        actors = point["x"]
        point["of_one_actor"] = round(point["y"] / (actors * one), 3) if one else None
        point["of_ideal"] = round(point["y"] / (actors * ideal), 3)
        point["readers_keep_up"] = actors * ideal <= capacity


def grow_shards(folder: Path, effort: Effort) -> Growth:
    """Rates with the same images in ever more shards."""
    images = effort.images_of_shards
    growth = Growth(
        "Shards",
        f"shards, of {images:,} images together",
        "images/s",
        "0: it makes no difference in how many shards the images are; -1: only the number of shards counts.",
    )
    cases = ((shards, make_tiny(folder, shards, images // shards), Layout()) for shards in effort.shards)
    return _grown(growth, cases)


def grow_images(folder: Path, effort: Effort) -> Growth:
    """Rates with ever larger shards, about the same images in all; of the smallest, no more than can be waited for."""
    growth = Growth(
        "Images per shard",
        f"images per shard, of {effort.images_in_all:,} in all, or {effort.shards_at_most:,} shards",
        "images/s",
        "0: an image takes its time, whatever shard it is in; 1: a shard takes its time, whatever is in it.",
    )
    shards_of = {
        images: min(effort.shards_at_most, max(1, effort.images_in_all // images)) for images in effort.images
    }
    cases = ((images, make_tiny(folder, shards, images), Layout()) for images, shards in shards_of.items())
    return _grown(growth, cases)


def grow_rows(folder: Path, effort: Effort) -> Growth:
    """Rates with ever larger parts."""
    growth = Growth(
        "Rows per part",
        f"rows per part, of {effort.images_of_rows:,} images",
        "images/s",
        "0: an image takes its time, whatever part it is in; 1: a part takes its time, whatever is in it.",
    )
    images_per_shard = 2 * max(effort.rows)
    archive = make_tiny(folder, effort.images_of_rows // images_per_shard, images_per_shard)
    return _grown(growth, ((rows, archive, Layout(rows_per_part=rows)) for rows in effort.rows))


def _grown(growth: Growth, cases: Iterable[tuple[int, Path, Layout]]) -> Growth:
    """With the rate of each case: its size, its archive, how it is laid out."""
    with _shared_session():
        for size, archive, layout in cases:
            growth.add("no sleep", size, functools.partial(_measured, archive, layout))
    return growth


def grow_parts(folder: Path, effort: Effort) -> Growth:
    """How long planning takes where ever more parts are there and nothing is to be done."""
    growth = Growth(
        "Planning",
        "parts in the table",
        "s",
        "1: twice the parts take twice as long; 2 would be four times as long.",
    )
    for parts in effort.parts:
        growth.add("all done", parts, functools.partial(_planning_time, folder / f"parts-{parts}", parts))
    return growth


def _planning_time(folder: Path, parts: int) -> dict[str, Any]:
    """Seconds for both listings and their difference, as the driver of a run takes them."""
    make_shards(folder / "shards", parts // PARTS_PER_SHARD)
    make_parts(folder / "shards", folder / "table")
    source, table = open_store(str(folder / "shards")), open_store(str(folder / "table"))
    reader = open_reader(WebDatasetSource(uri=source.uri), max_sample_bytes=1)
    seconds = []
    for _ in range(TIMES_PLANNED):
        started = time.perf_counter()
        pending = pending_shards(reader.list_shards(source), table_progress(table))
        seconds.append(time.perf_counter() - started)
        if pending.works or pending.shards_done != parts // PARTS_PER_SHARD:
            raise RunFailed(f"{len(pending.works):,} shards are pending in a table that is whole")
    return {"y": round(statistics.median(seconds), 5), "shards": parts // PARTS_PER_SHARD}


def _shared_session() -> contextlib.AbstractContextManager[None]:
    """One Ray for all runs of one actor: `run` joins it."""
    return ray_session(None, Layout().sizing().cpus_reserved)


# ---------------------------------------------------------------- what is said of it

GROWTHS: dict[str, Callable[[Path, Effort], Growth]] = {
    "actors": grow_actors,
    "shards": grow_shards,
    "images": grow_images,
    "rows": grow_rows,
    "parts": grow_parts,
}


def table_of(growth: Growth) -> list[list[str]]:
    """A head and a row for each point; the columns are those that any of its points has."""
    points = [(name, point) for name, some in growth.series.items() for point in some]
    keys = list(dict.fromkeys(key for _, point in points for key in point if key not in ("x", "y")))
    head = ["", growth.x_label.partition(",")[0], growth.y_label, *(key.replace("_", " ") for key in keys)]
    return [head, *([name, *(_cell(point.get(key)) for key in ("x", "y", *keys))] for name, point in points)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(number)}" for name, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value)


def words(growth: Growth) -> list[str]:
    """Each series' slope, and what slopes mean."""
    slopes = [f"{name}: slope {slope:.2f}." for name, slope in growth.slopes().items() if slope is not None]
    return [*slopes, f"Slope {growth.meaning}", *(f"FAILED: {reason}" for reason in growth.failed)]


def goals(growths: dict[str, Growth]) -> Iterator[Ratio]:
    """16 actors beside 16 times one; not judged where readers cannot deliver so much."""
    series = growths["actors"].series if "actors" in growths else {}
    for name, points in series.items():
        for point in points:
            if point["x"] == EFFICIENCY_ACTORS and "of_one_actor" in point:
                value = point["of_one_actor"] if point["readers_keep_up"] else None
                label = name.replace(",", "").replace(" ", "-")
                yield Ratio(f"actors/{label}/16-over-16-times-one", value, EFFICIENCY_GOAL)


def as_text(growth: Growth) -> str:
    """For the terminal."""
    rows = table_of(growth)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([growth.title, *lines, *words(growth), ""])


def as_page(growths: Iterable[Growth], machine: dict[str, Any], quick: bool) -> str:
    plots = [
        Plot(
            growth.title,
            growth.x_label,
            growth.y_label,
            [Series(name, [(p["x"], p["y"]) for p in points]) for name, points in growth.series.items()],
            words(growth),
            table_of(growth),
        )
        for growth in growths
        if growth.series
    ]
    facts = (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['date']}; "
        f"load before: {machine['load_before']:.2f}. JPEGs of {SIDE_PX} x {SIDE_PX}; actors sleep instead of computing."
    )
    return page("How extraction grows", facts + (" Quick: the figures mean nothing." if quick else ""), plots)


def main() -> None:
    options = _parser().parse_args()
    os.environ.pop("RAY_ADDRESS", None)  # a local Ray, whatever cluster this shell knows
    machine, effort = machine_facts(), QUICK if options.quick else Effort()
    with tempfile.TemporaryDirectory(prefix="engine-growth-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        growths = {name: grow(folder, effort) for name, grow in GROWTHS.items() if name in options.only}
    path = free_path(options.out)
    results = {"machine": machine, "quick": options.quick, "effort": asdict(effort)}
    found = {name: growth.to_json() for name, growth in growths.items()}
    path.write_text(json.dumps({**results, "growths": found}, indent=1) + "\n")
    path.with_suffix(".html").write_text(as_page(growths.values(), machine, options.quick))
    print(*(as_text(growth) for growth in growths.values()), sep="\n")
    print(*(ratio.line() for ratio in goals(growths)), f"written: {path} and .html", sep="\n")
    if any(growth.failed for growth in growths.values()):
        raise SystemExit(1)


def free_path(folder: Path) -> Path:
    """<date>-growth.json, or <date>-growth-2.json and so on: no result is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-growth"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}.json").exists())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names: Sequence[str] = tuple(GROWTHS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        help="what grows; parts: of the table, for planning",
    )
    parser.add_argument(
        "--quick", action="store_true", help="see that it all runs, in some minutes; the figures mean nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the JSON file and the page",
    )
    parser.add_argument("--folder", type=Path, help="where archives are kept; default: made anew")
    return parser


if __name__ == "__main__":
    main()
