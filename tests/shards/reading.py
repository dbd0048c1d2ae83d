"""A shard, read in one process by its reader."""

from __future__ import annotations

from engine.errors import ShardDamaged
from engine.shards.base import Resume, Sample, ShardReader
from engine.storage import ObjectInfo, Store


def read_until_damage(
    reader: ShardReader, store: Store, shard: ObjectInfo
) -> tuple[list[Sample], ShardDamaged | None]:
    """What a shard gives before it is found to be damaged; any other exception fails the test."""
    samples = []
    try:
        for sample in reader.read(store, shard, Resume()):
            samples.append(sample)
    except ShardDamaged as damage:
        return samples, damage
    return samples, None
