"""Prepared folders of TensorFlow Datasets: which files and records a split names, and what their features are.

Read from dataset_info.json, features.json and <feature>.labels.txt, without TensorFlow Datasets itself. Not for reading
records. The rules for names, slices and rounding are those of TensorFlow Datasets, except that here each record comes
once: slices that overlap are refused, and so are two with a gap between them inside one file, because the records of
one shard have to follow each other. Slices in shards (`train[:2shard]`) and of `all` are not taken.
Source: github.com/tensorflow/datasets, tensorflow_datasets/core: splits.py, naming.py, utils/shard_utils.py, features/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from pydantic import BaseModel, Field, ValidationError

from engine.errors import ObjectNotFound, RecipeError
from engine.shards.kinds import TFRecordSource
from engine.storage import Store

_PLUS = re.compile(r"\s*\+\s*")
_BORDER = r"-?\d(?:_?\d){0,17}%?"
_SLICE = re.compile(rf"([\w-]+)(?:\[({_BORDER})?:({_BORDER})?\])?", re.ASCII)
_SLICES = "a split or slices of it: train, train[:80%], train[1000:2000], train[-10%:], train[:50]+test"
_MIN_DIGITS = 5  # of a shard's number in file names


@final
@dataclass(frozen=True, slots=True)
class FileSlice:
    """Which records of one file are wanted."""

    num_records: int | None
    """That the file has; None: unknown."""
    begin: int
    """Number of the first one wanted, from 0."""
    end: int | None
    """Number behind the last one wanted; None: to the end of the file."""


@final
@dataclass(frozen=True, slots=True)
class PreparedSplit:
    """What a recipe's `split` selects of a prepared dataset."""

    image: str
    """Feature that holds the encoded image."""
    class_names: tuple[str, ...] | None
    """Of the label feature's integers, from 0; None: it is no ClassLabel, or its classes have no names."""
    files: Mapping[str, FileSlice]
    """Path below the folder -> its records; only files with records that are wanted."""


class _SplitInfo(BaseModel):
    """One of `splits` in dataset_info.json; numbers are written as strings there."""

    name: str
    shard_lengths: tuple[int, ...] = Field((), alias="shardLengths")
    filepath_template: str = Field("", alias="filepathTemplate")


class _DatasetInfo(BaseModel):
    """What we need of dataset_info.json; older ones do not name the file format."""

    name: str
    file_format: str = Field("tfrecord", alias="fileFormat")
    splits: tuple[_SplitInfo, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class _Leaf:
    """One feature of features.json that has no features below it."""

    class_name: str
    content: Mapping[str, Any]
    labels_file: str
    is_single: bool
    """False inside a sequence: a record may then hold any number of them."""


def open_split(store: Store, config: TFRecordSource, split: str) -> PreparedSplit:
    """Read what a split of a prepared dataset is made of.

    Args:
        store: of the folder that holds dataset_info.json.
        config: whose `image` (null: the only image), `label`, `key` and `metadata` must name features of the dataset.
        split: such as `train`, `train[:80%]`, `train[1000:]+test`.

    Raises:
        RecipeError: it is no such folder, has no such split or feature, or its images are not encoded images.
    """
    info = _dataset_info(store)
    leaves = _leaves_of(store)
    for name in (config.label, config.key, *config.metadata):
        if name is not None:
            _check_feature(store, leaves, name)
    return PreparedSplit(
        image=_image_feature(store, leaves, config.image),
        class_names=_class_names(store, leaves.get(config.label or "")),
        files=_files_of(store, info, split),
    )


def describe_prepared(store: Store) -> tuple[dict[str, int], str | None]:
    """Records of each split of a prepared dataset, and the feature with its labels where there is exactly one.

    Raises:
        RecipeError: it is no such folder, or cannot be understood.
    """
    labels = [name for name, leaf in _leaves_of(store).items() if leaf.class_name == "ClassLabel"]
    splits = {split.name: sum(split.shard_lengths) for split in _dataset_info(store).splits}
    return splits, labels[0] if len(labels) == 1 else None


def _dataset_info(store: Store) -> _DatasetInfo:
    try:
        info = _DatasetInfo.model_validate_json(_read(store, "dataset_info.json"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _unreadable(store, "dataset_info.json", f"{where}: {first['msg']}".removeprefix(": ")) from None
    if info.file_format != "tfrecord":
        raise RecipeError(
            f"the dataset in {store.uri} is not stored as TFRecord files",
            found=f"file format {info.file_format!r}",
            wanted="'tfrecord'",
            way_out="prepare it again with file_format='tfrecord' (tfds.builder(..., file_format=...))",
        )
    return info


def _read(store: Store, path: str) -> bytes:
    try:
        return store.read(path)
    except ObjectNotFound:
        raise RecipeError(
            f"{store.uri} is no prepared folder of TensorFlow Datasets, but the recipe has source.split",
            found=f"no {path}",
            wanted="the folder of one version, such as .../mnist/3.0.1, with dataset_info.json and features.json",
            way_out="correct source.uri, or leave source.split out and name the files by source.pattern",
        ) from None


def _unreadable(store: Store, path: str, found: str) -> RecipeError:
    return RecipeError(
        f"{store.uri}/{path} cannot be understood",
        found=found,
        wanted="what TensorFlow Datasets writes there",
        way_out="prepare the dataset again, or leave source.split out and name the files by source.pattern",
    )


def _files_of(store: Store, info: _DatasetInfo, split: str) -> dict[str, FileSlice]:
    files: dict[str, FileSlice] = {}
    for name, ranges in _ranges_of(store, info, split).items():
        split_info = next(each for each in info.splits if each.name == name)
        first = 0
        for number, length in enumerate(split_info.shard_lengths):
            found = [(max(begin - first, 0), min(end - first, length)) for begin, end in ranges]
            touched = [(begin, end) for begin, end in found if begin < end]
            path = _file_path(store, info, split_info, number)
            if len(touched) > 1 or (touched and path in files):
                raise _bad_split(store, split, f"slices with a gap between them inside {path}")
            if touched:
                files[path] = FileSlice(length, *touched[0])
            first += length
    return files


def _ranges_of(store: Store, info: _DatasetInfo, split: str) -> dict[str, list[tuple[int, int]]]:
    """Split name -> its wanted record numbers as (begin, end), in order; neighbours are joined."""
    splits = {each.name: each for each in info.splits}
    slices = list(splits) if split == "all" and "all" not in splits else _PLUS.split(split.strip())
    ranges: dict[str, list[tuple[int, int]]] = {}
    for text in slices:
        match = _SLICE.fullmatch(text)
        if match is None:
            raise _bad_split(store, split, text)
        if match[1] not in splits:
            raise _bad_split(store, split, f"no split {match[1]!r}", f"one of {', '.join(splits) or 'none'}")
        begin, end = _borders(store, split, match, splits[match[1]])
        ranges.setdefault(match[1], []).append((begin, end))
    return {name: _joined(store, split, found) for name, found in ranges.items()}


def _borders(store: Store, split: str, match: re.Match[str], info: _SplitInfo) -> tuple[int, int]:
    """The record numbers (begin, end) of one slice.

    Source: tensorflow_datasets/core/splits.py, _rel_to_abs_instr, with its default rounding, "closest".
    """
    count = sum(info.shard_lengths)
    if not count or min(info.shard_lengths) < 0:
        raise _bad_split(store, split, f"split {info.name!r} without shardLengths in dataset_info.json")
    given = [text for text in match.groups()[1:] if text is not None]
    if len({text.endswith("%") for text in given}) > 1:
        raise _bad_split(store, split, f"{match[0]}: one border in percent, one in records")
    if any(text.endswith("%") and abs(int(text[:-1])) > 100 for text in given):
        raise _bad_split(store, split, f"{match[0]}: more than 100 percent")
    begin = 0 if match[2] is None else _border(match[2], count)
    end = count if match[3] is None else _border(match[3], count)
    if max(abs(begin), abs(end)) > count:
        raise _bad_split(store, split, f"{match[0]}, where {info.name!r} has {count:,} records")
    begin, end = begin + count * (begin < 0), end + count * (end < 0)
    if begin >= end:
        raise _bad_split(store, split, f"{match[0]}, which holds none of {count:,} records")
    return begin, end


def _border(text: str, count: int) -> int:
    if not text.endswith("%"):
        return int(text)
    return round(int(text[:-1]) * count / 100.0)


def _joined(store: Store, split: str, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin < joined[-1][1]:
            raise _bad_split(store, split, f"slices that share the records {begin:,} to {joined[-1][1]:,}")
        if joined and begin == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _bad_split(store: Store, split: str, found: str, wanted: str = _SLICES) -> RecipeError:
    return RecipeError(
        f"source.split {split!r} cannot be read from {store.uri}",
        found=found,
        wanted=wanted,
        way_out="correct source.split",
    )


def _file_path(store: Store, info: _DatasetInfo, split: _SplitInfo, number: int) -> str:
    """Path of one file of a split.

    Source: tensorflow_datasets/core/naming.py, ShardedFileTemplate.relative_filepath.
    """
    count = len(split.shard_lengths)
    digits = max(_MIN_DIGITS, len(str(count)))
    values = {
        "DATASET": info.name,
        "SPLIT": split.name,
        "FILEFORMAT": info.file_format,
        "SHARD_INDEX": f"{number:0{digits}d}",
        "NUM_SHARDS": f"{count:0{digits}d}",
        "SHARD_X_OF_Y": f"{number:0{digits}d}-of-{count:0{digits}d}",
    }
    template = split.filepath_template or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    if unknown := [name for name in re.findall(r"\{(\w*)\}", template) if name not in values]:
        raise _unreadable(store, "dataset_info.json", f"{{{unknown[0]}}} in the template {template!r}")
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def _leaves_of(store: Store) -> dict[str, _Leaf]:
    """Name in the Example (nested ones are a/b) -> feature."""
    try:
        tree = json.loads(_read(store, "features.json"))
        leaves = dict(_walk(tree, "", "", True))
    except (ValueError, RecursionError) as error:
        raise _unreadable(store, "features.json", str(error)[:200]) from None
    return leaves


def _walk(node: Any, name: str, file_name: str, is_single: bool) -> Iterator[tuple[str, _Leaf]]:
    """The features below a node of features.json.

    Raises:
        ValueError: the node is no feature, or is older than features.json in its present form.
    """
    if not isinstance(node, dict) or not isinstance(node.get("pythonClassName"), str):
        raise ValueError(f"{name or 'the top'} is no feature with a pythonClassName")
    content: Any = next((value for value in node.values() if isinstance(value, dict)), {})
    class_name = node["pythonClassName"].rpartition(".")[2]
    if isinstance(node.get("featuresDict"), dict):
        children = content.get("features")
        for child, below in (children if isinstance(children, dict) else {}).items():
            # Source: tensorflow_datasets/core/features/feature.py, convert_feature_name_to_filename.
            file = "-".join(filter(None, (file_name, child.replace("/", "."))))
            yield from _walk(below, f"{name}/{child}" if name else child, file, is_single)
    elif isinstance(node.get("sequence"), dict):
        yield from _walk(content.get("feature"), name, file_name, False)
    else:
        yield name, _Leaf(class_name, content, f"{file_name}.labels.txt", is_single)


def _check_feature(store: Store, leaves: Mapping[str, _Leaf], name: str) -> None:
    # Some features (translations, ragged tensors) are stored as several, named a/b.
    if not any(name == leaf or name.startswith(f"{leaf}/") for leaf in leaves):
        raise _bad_feature(store, f"no feature {name!r}", f"one of {', '.join(sorted(leaves)[:50])}")


def _image_feature(store: Store, leaves: Mapping[str, _Leaf], name: str | None) -> str:
    images = sorted(key for key, leaf in leaves.items() if leaf.class_name == "Image" and leaf.is_single)
    if name is None:
        if len(images) != 1:
            found = f"{len(images)} image features" + (f": {', '.join(images)}" if images else "")
            raise _bad_feature(store, found, "source.image, where there is not exactly one image feature")
        name = images[0]
    _check_feature(store, leaves, name)
    leaf = leaves.get(name)
    encoding, dtype = (leaf.content.get(key) for key in ("encodingFormat", "dtype")) if leaf else (None, None)
    wanted = f"an encoded image, such as {', '.join(images)}" if images else "an encoded image"
    if leaf and leaf.class_name == "Image" and dtype == "float32":
        raise _bad_feature(store, f"{name!r}: images of float32, whose bytes are packed into PNG", wanted)
    if encoding not in (None, "", "png", "jpeg"):
        raise _bad_feature(store, f"{name!r}: encoding {encoding!r}", f"{wanted} as png or jpeg")
    if leaf and leaf.class_name == "Tensor" and dtype not in (None, "string", "object"):
        raise _bad_feature(store, f"{name!r}: a tensor of {dtype}, not an encoded image", wanted)
    return name


def _bad_feature(store: Store, found: str, wanted: str) -> RecipeError:
    return RecipeError(
        f"the features of the dataset in {store.uri} are not what the recipe asks for",
        found=found,
        wanted=wanted,
        way_out="correct source.image, label, key or metadata; features.json lists what there is",
    )


def _class_names(store: Store, leaf: _Leaf | None) -> tuple[str, ...] | None:
    """Names of a ClassLabel's integers; None where it has none.

    Source: tensorflow_datasets/core/features/class_label_feature.py, _load_names_from_file.
    """
    if leaf is None or leaf.class_name != "ClassLabel":
        return None
    try:
        lines = store.read(leaf.labels_file).decode().split("\n")
    except ObjectNotFound:
        return None
    except UnicodeDecodeError as error:
        raise _unreadable(store, leaf.labels_file, str(error)) from None
    names = tuple(line.strip() for line in lines if line.strip())
    declared = leaf.content.get("numClasses")
    if declared is not None and str(declared) != str(len(names)):
        raise _unreadable(store, leaf.labels_file, f"{len(names):,} names for {declared} classes")
    return names
