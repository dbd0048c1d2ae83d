"""What a folder of objects seems to be as a source of images: a guess for a person, from names and one record.

A recipe says what its source is and nothing in the engine guesses it; this is for whoever writes the recipe. Not for:
whether the archive is whole.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.errors import EngineError
from engine.log_lines import plain_text
from engine.shards.base import TABLE_COLUMNS
from engine.shards.kinds import FilesSource, SourceConfig, WebDatasetSource
from engine.shards.member_text import MemberText
from engine.storage import ObjectInfo, Store

DATASET_INFO = "dataset_info.json"  # of a prepared folder of TensorFlow Datasets
MAX_METADATA = 8  # texts beside the label that are suggested
_LABELS = ("label", "class", "category", "species", "fine_label", "coarse_label", "labels")
_ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.zst"),
    "parquet": (".parquet",),
    "files": tuple(f".{one}" for one in (*FilesSource.model_fields["image"].default, "gif", "bmp", "tif", "tiff")),
}  # fmt: skip
_TEXT_CHARACTERS = 40  # of a text member that are shown
_SOURCE: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)


@dataclass(frozen=True, slots=True)
class SourceGuess:
    """What there seems to be.

    Attributes:
        shards: objects of the kind; of loose files the files.
        smallest, largest: bytes of one.
        record: what the first record holds, by name of the member, column or feature.
        config: the recipe's block, with nothing that its defaults say already.
    """

    config: SourceConfig
    shards: int
    smallest: int
    largest: int
    record: dict[str, str]

    def block(self) -> dict[str, Any]:
        """As a recipe has it."""
        stated = self.config.model_dump(mode="json", exclude_defaults=True)
        return {"kind": self.config.kind, **stated}


@dataclass
class _Kind:
    """What a listing has of one kind."""

    count: int = 0
    size: int = 0
    smallest: int = 0
    largest: int = 0
    first: ObjectInfo | None = None
    endings: Counter[str] = field(default_factory=Counter)
    in_folders: int = 0

    def add(self, info: ObjectInfo, ending: str) -> None:
        self.smallest = min(self.smallest, info.size) if self.count else info.size
        self.count, self.size, self.largest = (
            self.count + 1,
            self.size + info.size,
            max(self.largest, info.size),
        )
        self.endings[ending] += 1
        self.in_folders += "/" in info.path
        if self.first is None and info.size:
            self.first = info


class Tally:
    """A listing, counted by the kinds of sources as it goes by."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._is_prepared = False

    def add(self, info: ObjectInfo) -> None:
        """Count one object."""
        name = info.path.rpartition("/")[2].lower()
        self._is_prepared |= info.path == DATASET_INFO
        if ".tfrecord" in name:
            self._kinds.setdefault("tfrecord", _Kind()).add(info, ".tfrecord")
            return
        for kind, endings in _ENDINGS.items():
            if ending := max((one for one in endings if name.endswith(one)), key=len, default=""):
                self._kinds.setdefault(kind, _Kind()).add(info, ending)

    def guess(self, store: Store) -> SourceGuess | None:
        """By the kind that most bytes are of; None where there is none, or it holds no images.

        Raises:
            EngineError: its first object cannot be read.
        """
        if not self._kinds:
            return None
        name, kind = max(self._kinds.items(), key=lambda item: item[1].size)
        if kind.first is None:
            return None
        record, fields = _LOOKS[name](store, kind, self._is_prepared)
        try:
            config = _SOURCE.validate_python({"kind": name, "uri": store.uri, **fields})
        except ValidationError:
            return None
        return SourceGuess(config, kind.count, kind.smallest, kind.largest, record)


_Look = tuple[dict[str, str], dict[str, Any]]  # what a record holds, and fields of the source's block


def _of_webdataset(store: Store, kind: _Kind, _is_prepared: bool) -> _Look:
    from engine.shards.webdataset import first_record

    assert kind.first is not None
    members = first_record(store, kind.first)
    images = [name for name in members if name.rpartition(".")[2] in _image_words()]
    if not images:
        found = ", ".join(members) or "none"
        raise ValueError(f"no image among the members of the first record of {kind.first.path}: {found}")
    usual = WebDatasetSource.model_fields["image"].default
    fields = _pattern(kind, ".tar") | ({} if set(images) & set(usual) else {"image": images})
    record = {}
    for name, (size, data) in members.items():
        record[name] = f"{size:,} bytes"
        if name not in images and data is not None:
            record[name] = _shown(data)
    texts = {name: data for name, (_, data) in members.items() if name not in images and data is not None}
    return record, fields | _texts_of(texts)


def _texts_of(texts: dict[str, bytes]) -> dict[str, Any]:
    """Where label and metadata seem to stand among the text members of a record."""
    scalars: list[str] = []
    if "json" in texts:
        with contextlib.suppress(ValueError, RecursionError):
            document = MemberText(texts["json"]).document
            if isinstance(document, dict):
                scalars = [name for name, value in document.items() if _is_scalar(name, value)]
    own = next((f"json:{name}" for name in _LABELS if name in scalars), None)
    label = next((name for name in ("cls", "label", "txt") if name in texts), own)
    metadata = [f"json:{name}" for name in scalars if f"json:{name}" != label and name not in TABLE_COLUMNS]
    return {"label": label, "metadata": metadata[:MAX_METADATA]}


def _is_scalar(name: str, value: Any) -> bool:
    return bool(name) and "." not in name and isinstance(value, str | int | float)


def _of_parquet(store: Store, kind: _Kind, _is_prepared: bool) -> _Look:
    from engine.shards.parquet import columns_of

    assert kind.first is not None
    columns = columns_of(store, kind.first)
    binary = [name for name, words in columns.items() if "binary" in words and "fixed" not in words]
    if not binary:
        raise ValueError("no column of encoded images")
    image = next((name for name in ("image", "img", "jpg", "png") if name in binary), binary[0])
    return columns, {"image": image} | _named_label(columns)


def _of_tfrecord(store: Store, kind: _Kind, is_prepared: bool) -> _Look:
    from engine.shards.tfds import describe_prepared
    from engine.shards.tfrecord import first_example

    assert kind.first is not None
    features = first_example(store, kind.first).in_words()
    if is_prepared:
        splits, label = describe_prepared(store)
        first = next((name for name in ("train", *splits) if name in splits), None)
        told = {f"split {name}": f"{records:,} records" for name, records in splits.items()}
        return features | told, {"split": first, "label": label}
    names = [f"image/class/{word}" for word in ("text", "label")]
    label = next((name for name in names if name in features), None)
    image = next((name for name in ("image/encoded", "image") if name in features), None)
    other = next((name for name, words in features.items() if words.startswith("bytes of an image")), None)
    fields = {} if image else {"image": other}
    return features, fields | ({"label": label} if label else _named_label(features))


def _of_files(_store: Store, kind: _Kind, _is_prepared: bool) -> _Look:
    assert kind.first is not None
    usual = FilesSource.model_fields["image"].default
    words = sorted(ending.removeprefix(".") for ending in kind.endings)
    fields: dict[str, Any] = {} if set(words) <= set(usual) else {"image": words}
    if kind.in_folders == kind.count:
        fields["label"] = "folder"
    return {kind.first.path: f"{kind.first.size:,} bytes"}, fields


_LOOKS = {
    "webdataset": _of_webdataset,
    "parquet": _of_parquet,
    "tfrecord": _of_tfrecord,
    "files": _of_files,
}


def _named_label(names: dict[str, str]) -> dict[str, Any]:
    return {"label": next((name for name in _LABELS if name in names), None)}


def _pattern(kind: _Kind, default: str) -> dict[str, Any]:
    """Of the ending that most shards have."""
    ((ending, _),) = kind.endings.most_common(1)
    return {} if ending == default else {"pattern": f"*{ending}"}


def _image_words() -> frozenset[str]:
    return frozenset(ending.removeprefix(".") for ending in _ENDINGS["files"])


def _shown(data: bytes) -> str:
    """The beginning of a text member, with nothing that a terminal would obey."""
    text = plain_text(data.decode("utf-8", "backslashreplace").strip())
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}..."


def guess_or_reason(tally: Tally, store: Store) -> SourceGuess | str | None:
    """The guess; why there is none although names look like one; None where they do not."""
    try:
        return tally.guess(store)
    except (EngineError, ValueError) as error:
        return " ".join(str(error).split())
