"""What an archive would cost before there is one: parts, objects, requests, bytes, hours and money, by formulas.

Pure: numbers in, numbers out; every figure is a formula over fields of `PaperPlan`, whose defaults were measured or are
stated by somebody, with the source beside them. Not for: what is pending of a real archive (`engine/plan.py`), or how a
run is laid out (`engine/sizing.py`). It knows `extract`; the other verbs read its table once, which costs less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from pydantic import Field, model_validator

from engine.config import Config
from engine.extraction import default_rows_per_part
from engine.schema import EmbeddingDtype
from engine.storage.base import BLOCK_BYTES

KEYS_PER_LISTING = 1000  # at most, of ListObjectsV2 (AWS S3 API reference)
GB = 1e9


class ArchiveOnPaper(Config):
    """The images."""

    bytes_per_image: int = Field(115_440, ge=1)
    """Encoded bytes of one image, its share of the shard included (the ImageNet training tar: 147,897,477,120 bytes for
    1,281,167 images)."""
    images_per_shard: int = Field(10_000, ge=1)
    """Images in one shard; 10,000 make shards of about 1 GB, as WebDataset's documentation recommends."""
    parts_with_rejects: float = Field(0, ge=0, le=1)
    """Share of the parts that have at least one reject, and so a second object (no default can be right: 0)."""


class TableOnPaper(Config):
    """The embedding table."""

    input_size: int = Field(224, ge=1)
    """Side of the network's input in pixels; decides how many rows a part has."""
    width: int = Field(1280, ge=1)
    """Numbers in one embedding: 1280 of MobileNetV2 and EfficientNetB0, 2048 of ResNet50."""
    dtype: EmbeddingDtype = "float32"
    """Number type of the embedding column."""
    rows_per_part: int | None = Field(None, ge=1, le=65_536)
    """Samples in one part; null: as an extract recipe without output.rows_per_part has it."""
    bytes_per_row_beside: int = Field(75, ge=0)
    """Bytes of a row beside its embedding, as they lie in Parquet: key, shard, sha-256 and the rest (75 with keys of 36
    characters and 56 with 9, in parts of 384 rows; 68 and 49 in parts of 1,024; measured 2026-11-23)."""


class Rates(Config):
    """What one core, one GPU and one driver do."""

    images_per_core: float = Field(85.6, gt=0)
    """Images/s that one core decodes and embeds where there is no GPU (MobileNetV2, 160 px, float32, 500 x 375 JPEGs:
    1,370 on 16 cores, tests/benchmarks/results/2026-11-23-16-cores.json)."""
    images_per_gpu: float = Field(15_264, gt=0)
    """Images/s that one GPU embeds while nothing holds it up (EfficientNet-Lite0, 224 px, float16, one H100;
    performance.md, 2026-11-23)."""
    decoded_per_core: float = Field(462.5, gt=0)
    """Images/s that one core beside a GPU reads and decodes (7,400 on 16 cores, the GPU waiting; performance.md,
    2026-11-23)."""
    efficiency: float = Field(0.92, gt=0, le=1)
    """Share of so many times one node that several nodes reach (64 sleeping actors of one machine,
    tests/benchmarks/results/2026-11-22-growth.json; several machines were never measured)."""
    driver_seconds_per_part: float = Field(0.00487, gt=0)
    """Seconds of one core that the driver takes for each part (0.14 of a core at 28.8 parts/s,
    tests/benchmarks/results/2026-11-22-growth.json)."""
    listing_request_seconds: float = Field(0.2, ge=0)
    """Seconds that the store takes for one page of a listing (AWS states 100 to 200 ms for small requests; not measured
    by us)."""
    listed_key_seconds: float = Field(14.5e-6, ge=0)
    """Seconds that the driver takes for one listed key (1,100,000 in 16 s; performance.md, 2026-11-22)."""


class ClusterOnPaper(Config):
    """Worker nodes, and the head, which does no work."""

    nodes: int = Field(ge=1)
    """Worker nodes that compute the network."""
    cores_per_node: int = Field(ge=1)
    """Logical cores of every worker node that its pod has."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of each of them; 0: the cores compute the network."""
    decode_nodes: int = Field(0, ge=0)
    """Further worker nodes, without GPUs, that only read and decode."""
    node_price_per_hour: float | None = Field(None, ge=0)
    """Price of one node that computes, for an hour, in the currency of all prices; null: machines are left out of the
    money (gpu-overlay: 4.92 US dollars, an eighth of a p5.48xlarge with 8 H100 in AWS' list of Capacity Blocks of 2024;
    cpu-overlay: as below)."""
    other_price_per_hour: float = Field(0, ge=0)
    """Price of the head, and of one node that decodes, for an hour (0.34 US dollars for 8 cores, 0.68 for 16:
    c5.2xlarge and c5.4xlarge on demand, in an example of AWS' EC2 Auto Scaling documentation)."""
    head_memory_gb: float = Field(8, gt=0)
    """Memory of the head that the driver may have, in 10^9 bytes."""

    @model_validator(mode="after")
    def _decodes_for_gpus(self) -> ClusterOnPaper:
        if self.decode_nodes and not self.gpus_per_node:
            raise ValueError("decode_nodes belong beside GPUs; without them each node does all (nodes)")
        return self


class StorePrices(Config):
    """What the object store charges and carries. Traffic within one region is free at AWS, and counted as such."""

    per_1000_writes: float = Field(0.005, ge=0)
    """Price of 1,000 PUT or LIST requests (AWS S3 Standard, us-east-1, US dollars; DELETE is free)."""
    per_1000_reads: float = Field(0.0004, ge=0)
    """Price of 1,000 GET requests (the same)."""
    per_gb_month: float = Field(0.023, ge=0)
    """Price of 10^9 bytes for a month (the same, first 50 TB; AWS counts in 2^30)."""
    writes_per_second: float = Field(3500, gt=0)
    """PUT, COPY, POST and DELETE requests/s that one prefix carries at least (AWS, "Best practices design patterns:
    optimizing Amazon S3 performance")."""
    reads_per_second: float = Field(5500, gt=0)
    """GET and HEAD requests/s that one prefix carries at least (the same)."""


class PaperPlan(Config):
    """All that an estimate is made of."""

    images: int = Field(ge=1)
    """Images in the archive."""
    archive: ArchiveOnPaper = ArchiveOnPaper()
    """What they lie in."""
    table: TableOnPaper = TableOnPaper()
    """What becomes of them."""
    cluster: ClusterOnPaper
    """What works on it."""
    rates: Rates = Rates()
    """How fast."""
    store: StorePrices = StorePrices()
    """Where both lie."""


# The most that the overlays of k8s/ may grow to, on machines with 8 and 16 cores, which keep one for themselves.
# Sources of the prices: `ClusterOnPaper`.
CLUSTERS = MappingProxyType(
    {
        "cpu-overlay": ClusterOnPaper(
            nodes=4, cores_per_node=7, node_price_per_hour=0.34, other_price_per_hour=0.34
        ),
        "gpu-overlay": ClusterOnPaper(
            nodes=4,
            cores_per_node=15,
            gpus_per_node=1,
            decode_nodes=8,
            node_price_per_hour=4.92,
            other_price_per_hour=0.68,
        ),
    }
)

# Of its own, libraries included; 160 bytes for each pending shard and 22 for each part that exists on top
# (performance.md, 306 MB for a million shards, 2026-11-22). Listings from S3 hold up to 100,000 keys more while they
# are sorted.
DRIVER_BASE_BYTES, BYTES_PER_PENDING_SHARD, BYTES_PER_PART = 186_000_000, 160, 22
# `require_writable` writes and deletes a probe, and `_table.json` is created.
WRITES_BESIDE_PARTS = 2
DATA_LISTINGS, REJECT_LISTINGS = 3, 2  # of one run: what is done, the sweep, the verdict
# A sweep looks at `data/` once more where there are rejects.
DATA_LISTINGS_WITH_REJECTS = 4


class Figure(NamedTuple):
    """One line of an estimate."""

    name: str
    value: float | None
    unit: str
    formula: str


class Limit(NamedTuple):
    """Where the design stops, and what moves it.

    `value` is in `unit`; `share` of it is used by this plan.
    """

    name: str
    value: float
    unit: str
    share: float
    formula: str
    way_out: str


@dataclass(frozen=True)
class Estimate:
    """The figures of one plan; each property is one formula."""

    plan: PaperPlan

    @property
    def rows_per_part(self) -> int:
        """Samples in a full part."""
        return self.plan.table.rows_per_part or default_rows_per_part(self.plan.table.input_size)

    @property
    def shards(self) -> int:
        """Objects of the archive; the last one may be smaller."""
        return math.ceil(self.plan.images / self.plan.archive.images_per_shard)

    @property
    def parts(self) -> int:
        """Objects in `data/`: no part spans two shards."""
        full, rest = divmod(self.plan.images, self.plan.archive.images_per_shard)
        return full * math.ceil(self.plan.archive.images_per_shard / self.rows_per_part) + math.ceil(
            rest / self.rows_per_part
        )

    @property
    def reject_files(self) -> int:
        """Objects in `rejects/`."""
        return math.ceil(self.parts * self.plan.archive.parts_with_rejects)

    @property
    def objects(self) -> int:
        """Of the table, `_table.json` included; without the records of runs, one object, PUT and LIST for each run."""
        return self.parts + self.reject_files + 1

    @property
    def bytes_in(self) -> int:
        """Of all shards, each read once."""
        return self.plan.images * self.plan.archive.bytes_per_image

    @property
    def bytes_out(self) -> int:
        """Of all parts; embeddings hardly compress."""
        number = 4 if self.plan.table.dtype == "float32" else 2
        return self.plan.images * (self.plan.table.width * number + self.plan.table.bytes_per_row_beside)

    @property
    def gets(self) -> int:
        """Ranged reads of shards, BLOCK_BYTES each."""
        archive = self.plan.archive
        full, rest = divmod(self.plan.images, archive.images_per_shard)
        blocks = math.ceil(archive.images_per_shard * archive.bytes_per_image / BLOCK_BYTES)
        return full * blocks + math.ceil(rest * archive.bytes_per_image / BLOCK_BYTES)

    @property
    def puts(self) -> int:
        """One for each object, and one probe."""
        return self.parts + self.reject_files + WRITES_BESIDE_PARTS

    @property
    def deletes(self) -> int:
        """One for each part without rejects, of a file that an earlier run may have left, and the probe's."""
        return self.parts - self.reject_files + 1

    @property
    def first_listing_requests(self) -> int:
        """LIST requests of the run that begins the table: of the archive once; of `data/`, empty at first."""
        return (
            self._pages(self.shards)
            + 1
            + (self._data_listings - 1) * self._pages(self.parts)
            + self._reject_pages
        )

    @property
    def later_listing_requests(self) -> int:
        """LIST requests of every further run, which finds nothing new."""
        return self._pages(self.shards) + self._data_listings * self._pages(self.parts) + self._reject_pages

    @property
    def planning_seconds(self) -> float:
        """Of a further run before its first task starts: one listing of the archive and one of `data/`."""
        return self._listing_seconds(self.shards) + self._listing_seconds(self.parts)

    @property
    def first_listing_seconds(self) -> float:
        """All listings of the run that begins the table."""
        after = (self._data_listings - 1) * self._listing_seconds(self.parts)
        rejects = REJECT_LISTINGS * self._listing_seconds(self.reject_files)
        return self._listing_seconds(self.shards) + self._listing_seconds(0) + after + rejects

    @property
    def driver_bytes(self) -> int:
        """Memory of the driver at most: all shards pending, and all parts there."""
        return DRIVER_BASE_BYTES + BYTES_PER_PENDING_SHARD * self.shards + BYTES_PER_PART * self.parts

    @property
    def core_images_per_second(self) -> float:
        """What the cores of all nodes do, could each have all of its time for it."""
        cluster, rates = self.plan.cluster, self.plan.rates
        each = rates.decoded_per_core if cluster.gpus_per_node else rates.images_per_core
        return (cluster.nodes + cluster.decode_nodes) * cluster.cores_per_node * each

    @property
    def gpu_images_per_second(self) -> float | None:
        """What the GPUs of all nodes embed, could each have all of its time for it; None: there are none."""
        cluster = self.plan.cluster
        return cluster.nodes * cluster.gpus_per_node * self.plan.rates.images_per_gpu or None

    @property
    def images_per_second(self) -> float:
        """Of all nodes: what runs out first, or as much as the driver can follow."""
        cluster = self.plan.cluster
        together = min(self.core_images_per_second, self.gpu_images_per_second or math.inf)
        if cluster.nodes + cluster.decode_nodes > 1:
            together *= self.plan.rates.efficiency
        return min(together, self.driver_limit)

    @property
    def driver_limit(self) -> float:
        """Images/s at which the driver's one core is full."""
        return self._images_per_part / self.plan.rates.driver_seconds_per_part

    @property
    def seconds(self) -> float:
        """Wall-clock of the first run, without the minutes in which nodes start."""
        return self.plan.images / self.images_per_second + self.first_listing_seconds

    @property
    def puts_per_second(self) -> float:
        """To the prefix `data/` while images stream."""
        return self.images_per_second / self._images_per_part

    @property
    def gets_per_second(self) -> float:
        """To the prefix of the archive while images stream."""
        return self.images_per_second * self.gets / self.plan.images

    @property
    def machine_money(self) -> float | None:
        """Of the first run; None: no price is given."""
        cluster = self.plan.cluster
        if cluster.node_price_per_hour is None:
            return None
        others = cluster.decode_nodes + 1
        per_hour = cluster.nodes * cluster.node_price_per_hour + others * cluster.other_price_per_hour
        return self.seconds / 3600 * per_hour

    @property
    def request_money(self) -> float:
        """Of the first run's requests; DELETE costs nothing."""
        store = self.plan.store
        writes = self.puts + self.first_listing_requests
        return writes / 1000 * store.per_1000_writes + self.gets / 1000 * store.per_1000_reads

    @property
    def table_money_per_month(self) -> float:
        """Of keeping the table."""
        return self.bytes_out / GB * self.plan.store.per_gb_month

    def figures(self) -> Iterator[Figure]:
        """What there is to say, in the order of a run; the formula names fields of the plan and earlier figures."""
        yield Figure("shards", self.shards, "objects", "images / archive.images_per_shard")
        yield Figure("bytes in", self.bytes_in, "bytes", "images x archive.bytes_per_image")
        yield Figure(
            "rows per part",
            self.rows_per_part,
            "rows",
            "table.rows_per_part, or 64 MB of pixels at table.input_size",
        )
        yield Figure(
            "parts",
            self.parts,
            "objects",
            "for each shard: archive.images_per_shard / rows per part, rounded up",
        )
        yield Figure(
            "objects of the table",
            self.objects,
            "objects",
            "parts x (1 + archive.parts_with_rejects) + 1; a record of each run comes on top",
        )
        yield Figure(
            "table", self.bytes_out, "bytes", "images x (table.width x 4 or 2 + table.bytes_per_row_beside)"
        )
        yield Figure(
            "GET requests", self.gets, "requests", "bytes of a shard / 8 MiB, rounded up, for each shard"
        )
        yield Figure("PUT requests", self.puts, "requests", "objects of the table + 1 probe")
        yield Figure("DELETE requests", self.deletes, "requests", "parts without rejects + 1 probe")
        yield Figure(
            "LIST requests of the first run",
            self.first_listing_requests,
            "requests",
            "shards / 1,000 once, parts / 1,000 twice (three times with rejects), rejects twice",
        )
        yield Figure(
            "LIST requests of a further run",
            self.later_listing_requests,
            "requests",
            "the same, and parts / 1,000 once more",
        )
        yield Figure(
            "planning of a further run",
            self.planning_seconds,
            "s",
            "(shards + parts) x (rates.listing_request_seconds / 1,000 + rates.listed_key_seconds)",
        )
        yield Figure("memory of the driver", self.driver_bytes, "bytes", "186 MB + 160 x shards + 22 x parts")
        with_gpus = self.plan.cluster.gpus_per_node > 0
        yield Figure(
            "cores of all nodes",
            self.core_images_per_second,
            "images/s",
            f"nodes x cores x rates.{'decoded_per_core' if with_gpus else 'images_per_core'}",
        )
        yield Figure(
            "GPUs of all nodes",
            self.gpu_images_per_second,
            "images/s",
            "cluster.nodes x cluster.gpus_per_node x rates.images_per_gpu",
        )
        yield Figure(
            "rate",
            self.images_per_second,
            "images/s",
            "the least of these x rates.efficiency, or the driver's limit",
        )
        yield Figure("PUT/s", self.puts_per_second, "requests/s", "rate / images in a part")
        yield Figure("GET/s", self.gets_per_second, "requests/s", "rate x GET requests / images")
        yield Figure(
            "read",
            self.images_per_second * self.plan.archive.bytes_per_image,
            "bytes/s",
            "rate x bytes in / images",
        )
        yield Figure("first run", self.seconds / 3600, "hours", "(images / rate + its listings) / 3,600")
        yield Figure(
            "machines",
            self.machine_money,
            "money",
            "hours x (nodes x cluster.node_price_per_hour + (1 + decode_nodes) x other_price_per_hour)",
        )
        yield Figure(
            "requests",
            self.request_money,
            "money",
            "(PUT + LIST) / 1,000 x store.per_1000_writes + GET / 1,000 x store.per_1000_reads",
        )
        yield Figure(
            "keeping the table",
            self.table_money_per_month,
            "money/month",
            "bytes x store.per_gb_month / 10^9",
        )

    def limits(self) -> list[Limit]:
        """Where the design stops scaling; what this plan is nearest to comes first."""
        rate, store = self.images_per_second, self.plan.store
        puts = store.writes_per_second * self._images_per_part
        gets = store.reads_per_second * self.plan.images / self.gets
        room = self.plan.cluster.head_memory_gb * GB - DRIVER_BASE_BYTES
        by_memory = self.plan.images * room / (self.driver_bytes - DRIVER_BASE_BYTES)
        by_listing = self.plan.images * 3600 / self.planning_seconds if self.planning_seconds else math.inf
        found = [
            Limit(
                "the driver's core",
                self.driver_limit,
                "images/s",
                rate / self.driver_limit,
                "images in a part / rates.driver_seconds_per_part",
                "larger parts (output.rows_per_part of a new table), or several runs over parts of the archive",
            ),
            Limit(
                "PUT/s of the prefix data/",
                puts,
                "images/s",
                rate / puts,
                "store.writes_per_second x images in a part",
                "larger parts; S3 splits a busy prefix by itself in time",
            ),
            Limit(
                "GET/s of the archive's prefix",
                gets,
                "images/s",
                rate / gets,
                "store.reads_per_second x images / GET requests",
                "larger shards, in several prefixes",
            ),
            Limit(
                "memory of the head",
                by_memory,
                "images",
                self.plan.images / by_memory,
                "images x (cluster.head_memory_gb - 0.186) / (driver's - 0.186)",
                "larger shards, or a larger head",
            ),
            Limit(
                "an hour of listings before each further run",
                by_listing,
                "images",
                self.plan.images / by_listing,
                "images x 3,600 / planning of a further run",
                "larger shards and parts, or a table for each year",
            ),
        ]
        return sorted(found, key=lambda limit: -limit.share)

    @property
    def _images_per_part(self) -> float:
        return self.plan.images / self.parts

    @property
    def _data_listings(self) -> int:
        return DATA_LISTINGS_WITH_REJECTS if self.reject_files else DATA_LISTINGS

    @property
    def _reject_pages(self) -> int:
        return REJECT_LISTINGS * self._pages(self.reject_files)

    @staticmethod
    def _pages(keys: int) -> int:
        """Requests of one listing; an empty one takes one, too."""
        return max(1, math.ceil(keys / KEYS_PER_LISTING))

    def _listing_seconds(self, keys: int) -> float:
        rates = self.plan.rates
        return self._pages(keys) * rates.listing_request_seconds + keys * rates.listed_key_seconds
