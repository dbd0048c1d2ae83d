"""Features of tf.train.Example messages as images and texts; not for finding the messages in a file.

TensorFlow is not imported for it: three messages are declared here with the field numbers of TensorFlow's own.
Source: github.com/tensorflow/tensorflow, tensorflow/core/example/example.proto and feature.proto.

What a feature gives:

    what is there                      as a label             as metadata            as a key
    no such feature, or no value       null                   null                   the position
    text (bytes in UTF-8)              without outer spaces   without outer spaces   as it is
    empty text                         null                   ""                     the position
    integer or float                   its JSON spelling      its JSON spelling      its JSON spelling
    NaN or infinity                    BadText                NaN, Infinity          NaN, Infinity
    several values                     BadText                JSON list              the position
    not UTF-8                          BadText                undecodable bytes escaped: \\xff
    more than 4,096 characters         BadText                kept                   kept
    more than 1 MiB, or 65,536 values  BadText                null                   the position
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from engine.schema import RejectReason
from engine.shards.image_bytes import Problem, size_problem
from engine.shards.member_text import MAX_TEXT_BYTES, BadText, MemberText, TextField, label_of, metadata_of

DEFAULT_IMAGES = (
    "image/encoded",
    "image",
)  # first choice first; the names that TensorFlow's own converters write
NO_CLASS = -1  # what TensorFlow Datasets stores where a ClassLabel is unknown
MAX_SHOWN_BYTES = 40  # of a text that is told to a person
MAX_TEXT_VALUES = 2**16  # of one metadata list: boxes and keypoints of a picture are a hundred times fewer

ValueKind = Literal["bytes", "float", "int64"]
_KINDS: dict[str | None, ValueKind] = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}
_WHOLE_TEXT = TextField("feature", ())


class NotAnExample(ValueError):
    """Bytes that do not parse as a tf.train.Example; the message says why."""


@final
@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of one Example; never without a value."""

    kind: ValueKind
    values: Sequence[Any]
    """bytes, or Python numbers (floats carry float32 precision); one or more."""


@final
@dataclass(frozen=True, slots=True)
class ExampleImage:
    """The encoded image of one Example, or why there is none."""

    data: bytes | None
    size_bytes: int
    """Of the encoded image, given or not; 0 without one."""
    problem: Problem | None


@final
class Example:
    """A parsed tf.train.Example.

    Args:
        data: of the message.

    Raises:
        NotAnExample: they are something else.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._features = _EXAMPLE_CLASS.FromString(data).features.feature
        except DecodeError as error:
            raise NotAnExample(str(error)) from None

    def __contains__(self, name: str) -> bool:
        return name in self._features

    def in_words(self) -> dict[str, str]:
        """What each feature holds, by name, in a few words."""
        return {name: _in_words(self.feature(name)) for name in sorted(self._features)}

    def feature(self, name: str) -> Feature | None:
        """None where the Example has no such feature, or no value in it."""
        if name not in self._features:  # asking for a missing one would create it
            return None
        message = self._features[name]
        field = message.WhichOneof("kind")
        kind = _KINDS.get(field)
        values = getattr(message, field).value if kind else ()
        return Feature(kind, values) if kind and len(values) else None


def image_of(example: Example, name: str | None, max_sample_bytes: int) -> ExampleImage:
    """The encoded image of an Example.

    Args:
        example: the record.
        name: of the feature; None: the first of DEFAULT_IMAGES that the record has.
        max_sample_bytes: a larger image is not handed out.
    """
    if name is None:
        name = next((default for default in DEFAULT_IMAGES if default in example), None)
    feature = example.feature(name) if name is not None else None
    if feature is None:
        wanted = repr(name) if name is not None else " or ".join(map(repr, DEFAULT_IMAGES))
        return _no_image(f"no value in a feature {wanted}")
    if feature.kind != "bytes":
        return _no_image(f"feature {name!r} holds {feature.kind} numbers, not the bytes of an encoded image")
    if len(feature.values) > 1:
        return _no_image(f"feature {name!r} holds {len(feature.values):,} values, not one encoded image")
    data: bytes = feature.values[0]
    problem = size_problem(f"feature {name!r}", len(data), max_sample_bytes)
    return ExampleImage(data if problem is None else None, len(data), problem)


def label_of_feature(feature: Feature | None, class_names: Sequence[str] | None = None) -> str | None:
    """The label; see the table above.

    Args:
        feature: that holds it.
        class_names: names of the integers from 0 on, where they are known; NO_CLASS is then a null label.

    Raises:
        BadText: there is something, but it is no label.
    """
    if feature is None:
        return None
    if len(feature.values) > 1:
        raise BadText(f"{len(feature.values):,} values, not one")
    value = feature.values[0]
    if class_names is not None and feature.kind == "int64":
        return _class_name(value, class_names)
    if feature.kind == "float" and not math.isfinite(value):
        raise BadText(f"{_spelled(feature, value)} is not a JSON number")
    return label_of(_WHOLE_TEXT, _member_text(feature))


def metadata_of_feature(feature: Feature | None) -> str | None:
    """The metadata text; see the table above."""
    if feature is None:
        return None
    if len(feature.values) == 1:
        return metadata_of(_WHOLE_TEXT, _member_text(feature))
    if len(feature.values) > MAX_TEXT_VALUES:
        return None
    if feature.kind == "bytes" and sum(map(len, feature.values)) > MAX_TEXT_BYTES:
        return None
    spelled = (_spelled(feature, value) for value in feature.values)
    texts = (json.dumps(text, ensure_ascii=False) for text in spelled) if feature.kind == "bytes" else spelled
    return f"[{', '.join(texts)}]"


def key_of_feature(feature: Feature | None) -> str | None:
    """The sample's key; None where the feature gives none."""
    if feature is None or len(feature.values) > 1:
        return None
    value = feature.values[0]
    if feature.kind == "bytes" and len(value) > MAX_TEXT_BYTES:
        return None
    return _spelled(feature, value) or None


def _in_words(feature: Feature | None) -> str:
    if feature is None:
        return "nothing"
    if len(feature.values) > 1:
        return f"{len(feature.values):,} {feature.kind} values"
    (value,) = feature.values
    if feature.kind != "bytes":
        return f"{feature.kind} {_spelled(feature, value)}"
    if len(value) <= MAX_SHOWN_BYTES and value.isascii():
        return json.dumps(_spelled(feature, value))
    return f"{len(value):,} bytes"


def _no_image(sentence: str) -> ExampleImage:
    return ExampleImage(None, 0, (RejectReason.NO_IMAGE, sentence))


def _class_name(number: int, class_names: Sequence[str]) -> str | None:
    if number == NO_CLASS:
        return None
    if not 0 <= number < len(class_names):
        raise BadText(f"class {number}, but the dataset names {len(class_names):,} classes, from 0")
    return class_names[number]


def _member_text(feature: Feature) -> MemberText:
    """The one value of a feature, as the rules for members of archives take it."""
    value = feature.values[0]
    if feature.kind != "bytes":
        return MemberText(_spelled(feature, value).encode())
    if len(value) > MAX_TEXT_BYTES:
        return MemberText(b"", f"it has {len(value):,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    return MemberText(value)


def _spelled(feature: Feature, value: Any) -> str:
    """Text as it is; a number as JSON spells it, a float with the digits that tell it from other float32."""
    if feature.kind == "bytes":
        text: str = value.decode("utf-8", "backslashreplace")
        return text
    if feature.kind == "float" and math.isfinite(value):
        return str(np.float32(value))
    return json.dumps(value)


def _declared_example() -> Any:
    """The message class of Example, in a pool of its own: TensorFlow's, in the same process, has the same names."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    kinds = (("Bytes", field.TYPE_BYTES), ("Float", field.TYPE_FLOAT), ("Int64", field.TYPE_INT64))
    for number, (name, value_type) in enumerate(kinds, start=1):
        values = file.message_type.add(name=f"{name}List")
        values.field.add(name="value", number=1, label=field.LABEL_REPEATED, type=value_type)
        held = feature.field.add(name=f"{name.lower()}_list", number=number, oneof_index=0)
        held.label, held.type, held.type_name = (
            field.LABEL_OPTIONAL,
            field.TYPE_MESSAGE,
            f".tensorflow.{name}List",
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    places = (
        (entry, "value", 2, field.LABEL_OPTIONAL, "Feature"),
        (features, "feature", 1, field.LABEL_REPEATED, "Features.FeatureEntry"),
        (file.message_type.add(name="Example"), "features", 1, field.LABEL_OPTIONAL, "Features"),
    )
    for message, name, number, label, type_name in places:
        added = message.field.add(name=name, number=number, label=label, type=field.TYPE_MESSAGE)
        added.type_name = f".tensorflow.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_EXAMPLE_CLASS = _declared_example()
