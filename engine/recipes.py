"""Recipe blocks that several jobs share: where a table goes, what may run, what is tolerated.

Only values; the blocks of one room (source, backbone, runtime, head ...) stand with that room.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator

from engine.config import Config
from engine.storage import Uri


class EmbeddingForm(Config):
    """In which form embeddings are made."""

    dtype: Literal["float32", "float16"] = "float32"
    """Number type of the embedding column; float16 halves the table and keeps about 3 digits."""
    rows_per_part: int | None = Field(None, ge=1, le=65_536)
    """Samples in one part; null: about 64 MB of pixels, a multiple of 64, at most 1,024."""


class EmbeddingOutput(EmbeddingForm):
    """Where embeddings are written, and in which form."""

    uri: Uri
    """Folder of the embedding table."""


class PassingEmbeddings(EmbeddingForm):
    """In which form embeddings are made on the way to predictions, and whether they are kept."""

    uri: Uri | None = None
    """Folder of an embedding table that keeps them, as `extract` would; null: they are not kept."""


class ActorRange(Config):
    """A pool of actors that grows and shrinks with the work and the cluster."""

    min: int = Field(1, ge=1, le=4096)
    """Actors at least: without room for them the run is refused, or waits for a cluster to grow."""
    max: int = Field(ge=1, le=4096)
    """Actors at most."""

    @model_validator(mode="after")
    def _in_order(self) -> ActorRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


def _as_range(actors: Any) -> Any:
    if isinstance(actors, int) and not isinstance(actors, bool):
        return {"min": actors, "max": actors}
    if isinstance(actors, (dict, ActorRange)):
        return cast(Any, actors)
    raise ValueError("a number of actors, or {min: 1, max: 8}")


Actors = Annotated[ActorRange, BeforeValidator(_as_range, json_schema_input_type=int | ActorRange)]


class Compute(Config):
    """What runs where. `null` means: taken from the machine or cluster, and shown by `--plan`."""

    actors: Actors = ActorRange(min=1, max=1)
    """Processes that hold the backbone; `{min: 1, max: 8}`: as many as fit, more when the cluster grows."""
    gpus_per_actor: float = Field(0, ge=0, le=16)
    """GPUs (or a fraction of one) that each actor reserves."""
    cpus_per_actor: float | None = Field(None, gt=0, le=1024)
    """CPU cores that each actor reserves and computes with; null: the actors of a node share its cores."""
    decode_tasks: int | None = Field(None, ge=1, le=4096)
    """Shard readers that run at once; null: one per CPU core that no actor has reserved, as far as memory goes, at
    least 1."""
    decode_threads: int | None = Field(None, ge=1, le=256)
    """Threads that decode images in each reader; null: 2."""
    memory_per_actor: int | None = Field(None, ge=1)
    """Bytes that each actor reserves; null: a quarter more than loading and warming up took."""
    memory_per_reader: int | None = Field(None, ge=1)
    """Bytes that each reader reserves; null: enough for two parts of pixels and for one image of
    `limits.max_pixels` at 8 bytes a pixel (WebP, and PNG with alpha that is to be turned, can take 20)."""
    node_price_per_hour: float | None = Field(None, ge=0)
    """What one machine costs, in any currency: the summary then says what a million images cost; null: it does not."""
    address: str | None = None
    """Ray cluster to run on: `auto`, `host:6379` or `ray://host:10001`; null: the one that RAY_ADDRESS names (in a
    submitted job Ray sets it), else a local Ray that ends with the job."""

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("more than one GPU must be a whole number")
        return gpus


class ReportConfig(Config):
    """What the page shows that is made for people: the one about a bundle, or about a night."""

    pictures: bool = True
    """Whether small pictures (96 px) of the rows that the page names become part of it, where everybody who may read it
    sees them: for a bundle 120 at most (mistakes, doubted labels and others), for a night 40 (rejects and doubtful
    rows). They are read from the archive for at most 30 seconds, of a night 10; where that fails the page says why.
    false: for archives whose images must not be copied."""


class Limits(Config):
    """What a run tolerates, and what makes a sample a reject."""

    max_reject_fraction: float = Field(0.01, ge=0, le=1)
    """Rejects / samples of the whole table above which the job ends with exit code 3."""
    max_rejects: int | None = Field(None, ge=0)
    """Rejects of the whole table above which the job ends with exit code 3; null: no such limit."""
    max_failed_shards: int = Field(0, ge=0)
    """Shards that may be unreadable before the job ends with exit code 1."""
    max_pixels: int = Field(178_956_970, ge=1)
    """Width x height above which an image is a reject (Pillow's limit against decompression bombs, doubled)."""
    max_sample_bytes: int = Field(268_435_456, ge=1)
    """Encoded bytes above which an image is a reject."""
    keep_reject_bytes: bool = False
    """Keep the encoded bytes of rejects in the rejects files."""

    def contract(self) -> dict[str, object]:
        """The limits that change what a part contains."""
        return {
            "max_pixels": self.max_pixels,
            "max_sample_bytes": self.max_sample_bytes,
            "keep_reject_bytes": self.keep_reject_bytes,
        }
