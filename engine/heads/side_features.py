"""Columns of a table beside its embeddings, as numbers that a head takes: a `keras.utils.FeatureSpace` in the bundle.

Shape letters: N rows, D embedding width, E numbers that a row's columns become.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.errors import BundleError, LabelError
from engine.heads.kinds import SideFeatureConfig

if TYPE_CHECKING:
    import keras

ROWS_AT_ONCE = 65_536
MOST_DEVIATIONS = 10.0
LEAST_RELATIVE_DEVIATION = 1e-6  # what moves less, beside its mean, is noise of float32
_MISSING = "\\-"  # no other text becomes this: backslashes are doubled

Columns = Mapping[str, NDArray[Any]]  # float32 of numeric columns, texts of the others; (N,) each


class SideEncoder:
    """Columns to numbers, as they were in the rows that it was fitted on.

    Args:
        configs: which columns, and how.
        space: adapted.
    """

    def __init__(self, configs: Sequence[SideFeatureConfig], space: keras.utils.FeatureSpace) -> None:
        self._configs, self._space = tuple(configs), space

    @staticmethod
    def fitted(configs: Sequence[SideFeatureConfig], table: pa.Table, rows: NDArray[np.int64]) -> SideEncoder:
        """Categories, means and deviations as some rows of a table have them.

        Raises:
            LabelError: a numeric column holds something else than numbers.
        """
        import keras
        import tensorflow as tf

        columns = _columns(configs, table.take(pa.array(rows)))
        space = keras.utils.FeatureSpace({one.column: _feature(one) for one in configs}, output_mode="concat")
        # Rows without a number say nothing of the mean: they are the mean.
        known = {
            name: np.where(np.isnan(values), _mean(values), values) if values.dtype == np.float32 else values
            for name, values in columns.items()
        }
        space.adapt(tf.data.Dataset.from_tensor_slices(known).batch(ROWS_AT_ONCE))
        return SideEncoder(configs, space)

    def encode(self, table: pa.Table) -> NDArray[np.float32]:
        """(N, E) float32; a number that is missing is the mean, and a category that was not seen is one of its own.

        Raises:
            LabelError: a column is missing, or a numeric one holds something else than numbers.
        """
        import tensorflow as tf

        columns = {
            name: self._bounded(name, values) for name, values in _columns(self._configs, table).items()
        }
        with tf.device("CPU:0"):  # as the head behind it, also beside a GPU
            encoded = [
                self._space(
                    {
                        name: tf.constant(all_N[start : start + ROWS_AT_ONCE])
                        for name, all_N in columns.items()
                    }
                )
                for start in range(0, table.num_rows, ROWS_AT_ONCE)
            ]
        if not encoded:
            return np.empty((0, self.width), np.float32)
        encoded_NE: NDArray[np.float32] = np.nan_to_num(np.concatenate([np.asarray(one) for one in encoded]))
        return encoded_NE

    def _bounded(self, name: str, values_N: NDArray[Any]) -> NDArray[Any]:
        """Numbers, within ten deviations of their mean: where nearly all training rows had the same one, another would
        be larger than all that a head has seen. A column in which all had the same one says nothing."""
        if values_N.dtype != np.float32:
            return values_N
        layer = self._space.preprocessors[name]
        mean = np.float32(np.asarray(layer.mean).item())
        deviation = float(np.sqrt(np.asarray(layer.variance).item()))
        if deviation <= LEAST_RELATIVE_DEVIATION * abs(float(mean)):
            return np.full_like(values_N, mean)
        bound = np.float32(MOST_DEVIATIONS * deviation)
        bounded_N: NDArray[np.float32] = np.clip(values_N, mean - bound, mean + bound)
        return bounded_N

    @property
    def width(self) -> int:
        """E."""
        return int(self._space.get_encoded_features().shape[-1])

    def sha256(self) -> str:
        """Of what decides the numbers: categories in their order, means and deviations; the file also holds names that
        Keras counts up."""
        digest = hashlib.sha256()
        for one in self._configs:
            layer = self._space.preprocessors[one.column]
            if one.kind == "numeric":
                digest.update(
                    np.array([np.asarray(layer.mean), np.asarray(layer.variance)], np.float32).tobytes()
                )
            elif one.kind == "categorical":
                digest.update("\n".join(map(str, layer.get_vocabulary())).encode())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """A .keras file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "feature_space.keras"
            self._space.save(path)
            return path.read_bytes()

    @staticmethod
    def from_bytes(configs: Sequence[SideFeatureConfig], content: bytes) -> SideEncoder:
        """What `to_bytes` gave; nothing in it is run as code.

        Raises:
            BundleError: Keras cannot read it.
        """
        import keras

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "feature_space.keras"
            path.write_bytes(content)
            try:
                return SideEncoder(configs, keras.saving.load_model(path, safe_mode=True))
            except (ValueError, TypeError) as error:
                raise BundleError(
                    f"side features: cannot be loaded by Keras {keras.__version__}",
                    found=" ".join(str(error).split())[:500],
                    way_out="use the Keras that the bundle names, or fit again",
                ) from None


def side_columns(configs: Sequence[SideFeatureConfig]) -> list[str]:
    """The columns of a table that they need."""
    return [one.column for one in configs]


def _feature(config: SideFeatureConfig) -> Any:
    from keras.utils import FeatureSpace

    if config.kind == "numeric":
        return FeatureSpace.float_normalized()
    if config.kind == "hashed":
        return FeatureSpace.string_hashed(num_bins=config.bins)
    return FeatureSpace.string_categorical(num_oov_indices=1)


def _columns(configs: Sequence[SideFeatureConfig], table: pa.Table) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for one in configs:
        if one.column not in table.column_names:
            raise LabelError(
                f"side_features: the embedding table has no column {one.column!r}",
                found=", ".join(table.column_names),
                way_out="name a column of it; source.metadata of an extract recipe adds some",
            )
        column = table[one.column]
        found[one.column] = _numbers(one.column, column) if one.kind == "numeric" else _texts(column)
    return found


def _numbers(name: str, column: pa.ChunkedArray) -> NDArray[np.float32]:
    """NaN: missing."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        stripped = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(stripped, ""), pa.scalar(None, column.type), stripped)
    try:
        numbers_N = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise LabelError(
            f"side_features: column {name!r} is numeric, but holds something else",
            found=" ".join(str(error).split())[:200],
            way_out="give it the kind categorical or hashed, or leave such values empty",
        ) from None
    numbers_N = np.where(np.isfinite(numbers_N), numbers_N, np.nan)
    return numbers_N.astype(np.float32)


def _mean(numbers_N: NDArray[np.float32]) -> float:
    known = numbers_N[~np.isnan(numbers_N)]
    return float(known.mean(dtype=np.float64)) if len(known) else 0.0


def _texts(column: pa.ChunkedArray) -> NDArray[np.str_]:
    """A vocabulary is saved line by line: line ends are spelled out, and what is missing has a word."""
    texts = column.cast(pa.string()).to_pylist()
    return np.array(
        [
            text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if text else _MISSING
            for text in texts
        ],
        dtype=np.str_,
    )
