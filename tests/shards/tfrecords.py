"""TFRecord files for tests, written by TensorFlow itself."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Value = bytes | int | float | Sequence[bytes] | Sequence[int] | Sequence[float]


def example(features: Mapping[str, Value]) -> bytes:
    """A serialised tf.train.Example; the kind of a list follows from its first value, an empty one is of bytes."""
    import tensorflow as tf

    def feature(value: Value) -> Any:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if not values or isinstance(values[0], bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    named = {name: feature(value) for name, value in features.items()}
    data: bytes = tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()
    return data


def tfrecord_bytes(records: Sequence[bytes], compression: str = "") -> bytes:
    """A file of these records; compression "GZIP" or none."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tfrecord"
        with tf.io.TFRecordWriter(str(path), compression) as writer:
            for record in records:
                writer.write(record)
        return path.read_bytes()
