"""WebDataset's own rules: keys, extensions, labels, long names, links, damage; not what all kinds share."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from engine.config import check_recipe
from engine.errors import RecipeError, ShardDamaged
from engine.schema import RejectReason
from engine.shards.base import Resume, Sample, path_matches
from engine.shards.kinds import WebDatasetSource, open_reader
from engine.storage import ObjectInfo, Store, open_store
from tests.shards.archives import END_BYTES, member, put, tar_bytes

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "source"))


def read(store: Store, shard: ObjectInfo, resume: Resume = Resume(), **fields: Any) -> list[Sample]:
    limit = fields.pop("max_sample_bytes", 10_000)
    return list(open_reader(WebDatasetSource(uri=store.uri, **fields), limit).read(store, shard, resume))


def read_members(store: Store, members: Members, **fields: Any) -> list[Sample]:
    return read(store, put(store, tar_bytes(members, tarfile.GNU_FORMAT)), **fields)


def images(samples: list[Sample]) -> list[tuple[str, bytes | None]]:
    return [(s.key, s.image) for s in samples]


# ---------------------------------------------------------------- keys and records


def test_the_key_ends_at_the_first_dot_of_the_file_name_and_keeps_its_folders(store: Store) -> None:
    names = ["a.jpg", "d.x/b.jpg", "./c.png", "../../etc/d.jpg", "/root/e.jpg", "f g.tar/ h.webp", "i\nj.jpg"]
    samples = read_members(store, [member(name, b"1") for name in names])
    assert [s.key for s in samples] == ["a", "d.x/b", "./c", "../../etc/d", "/root/e", "f g.tar/ h", "i\nj"]
    assert {s.image for s in samples} == {b"1"}


def test_everything_behind_the_first_dot_is_the_extension_compared_in_lower_case(store: Store) -> None:
    members = [
        member("a.JPG", b"1"),
        member("a.Seg.PNG", b"2"),
        member("b.seg.png", b"3"),
        member("b.png", b"4"),
    ]
    assert images(read_members(store, members, image=("seg.png", "jpg"))) == [("a", b"2"), ("b", b"3")]
    assert images(read_members(store, members)) == [("a", b"1"), ("b", b"4")]


def test_names_without_a_key_are_passed_over_and_do_not_end_a_record(store: Store) -> None:
    members = [
        member("__meta__/a.jpg", b"0"),
        member("a.jpg", b"1"),
        member(".hidden.jpg", b"2"),
        member("README", b"3"),
        member("__index__", b"4"),
        member("folder", type=tarfile.DIRTYPE),
        member("folder.jpg/", type=tarfile.DIRTYPE),
        member("x/__info__/b.jpg", b"5"),
        member("a.cls", b"6"),
        member("__c.jpg", b"7"),
    ]
    samples = read_members(store, members, label="cls")
    assert [(s.key, s.image, s.label) for s in samples] == [("a", b"1", "6"), ("__c", b"7", None)]


def test_a_repeated_extension_begins_a_new_record_and_interleaved_keys_fall_apart(store: Store) -> None:
    names = ["a.jpg", "a.cls", "a.jpg", "b.jpg", "a.cls", "b.cls", "b.CLS"]
    samples = read_members(store, [member(n, str(i).encode()) for i, n in enumerate(names)], label="cls")
    assert [(s.key, s.index, s.image, s.label) for s in samples] == [
        ("a", 0, b"0", "1"),
        ("a", 1, b"2", None),
        ("b", 2, b"3", None),
        ("a", 3, None, "4"),
        ("b", 4, None, "5"),
        ("b", 5, None, "6"),
    ]
    assert [s.problem[0] for s in samples if s.problem] == [RejectReason.NO_IMAGE] * 3


def test_the_first_extension_of_the_recipe_that_a_record_has_is_its_image(store: Store) -> None:
    members = [member("a.png", b"p"), member("a.jpg", b"j"), member("b.jpg", b"J"), member("b.png", b"P")]
    assert images(read_members(store, members, image=("png", "jpg"))) == [("a", b"p"), ("b", b"P")]
    assert images(read_members(store, members, image=("jpg", "png"))) == [("a", b"j"), ("b", b"J")]


def test_a_bad_first_choice_is_not_replaced_by_a_good_second_one(store: Store) -> None:
    (sample,) = read_members(store, [member("a.png", b"good"), member("a.jpg", b"")], image=("jpg", "png"))
    assert sample.image is None and sample.problem is not None
    assert sample.problem[0] is RejectReason.EMPTY_SAMPLE


def test_names_that_are_not_utf8_are_escaped(store: Store) -> None:
    samples = read_members(store, [member(b"caf\xe9.jpg", b"1"), member("café.jpg", b"2")])
    assert [s.key for s in samples] == ["caf\\xe9", "café"]
    assert all(s.key.encode() for s in samples)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
    ],
)
def test_links_devices_and_pipes_are_counted_but_never_followed(
    store: Store, kind: bytes, words: str
) -> None:
    members = [
        member("a.jpg", b"1"),
        member("b.jpg", type=kind, linkname="a.jpg"),
        member("c.cls", type=kind, linkname="/etc/passwd"),
        member("c.jpg", b"3"),
    ]
    a, b, c = read_members(store, members, label="cls")
    assert images([a, b, c]) == [("a", b"1"), ("b", None), ("c", b"3")]
    assert b.problem == (RejectReason.NO_IMAGE, f"the image member is {words}, which is not followed")
    assert c.problem == (RejectReason.BAD_LABEL, f"label member .cls: it is {words}, which is not followed")


def test_a_member_that_is_too_large_is_passed_over_without_holding_it(store: Store) -> None:
    big = bytes(48 * 2**20)
    members = [
        member("a.jpg", big),
        member("b.bin", big),
        member("b.jpg", b"1"),
        member("c.cls", big),
        member("c.jpg", b"2"),
    ]
    shard = put(store, tar_bytes(members))
    del big, members
    tracemalloc.start()
    samples = read(store, shard, label="cls", max_sample_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(s.key, s.image, s.size_bytes) for s in samples] == [
        ("a", None, 50_331_648),
        ("b", b"1", 1),
        ("c", b"2", 1),
    ]
    assert [s.problem[0] for s in samples if s.problem] == [
        RejectReason.SAMPLE_TOO_LARGE,
        RejectReason.BAD_LABEL,
    ]
    assert peak < 8 * 2**20


def test_memory_does_not_grow_with_the_number_of_members(store: Store) -> None:
    def peak_bytes(records: int) -> int:
        shard = put(store, tar_bytes([member(f"{n}.jpg", b"1") for n in range(records)]))
        reading = open_reader(WebDatasetSource(uri=store.uri), 100).read(store, shard, Resume())
        next(reading)
        tracemalloc.start()
        assert sum(1 for _ in reading) == records - 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = peak_bytes(200), peak_bytes(1500)
    assert many < few + 100_000


# ---------------------------------------------------------------- labels and metadata


LABELS = [
    ("cls", b" 7\r\n", "7"),
    ("txt", "žlutý kůň".encode(), "žlutý kůň"),
    ("cls", b"\xef\xbb\xbfcat", "cat"),
    ("cls", b" \n", None),
    ("cls", b"x" * 4096 + b"\n", "x" * 4096),
    ("json:label", b'{"label": " cat "}', " cat "),
    ("json:label", b'{"label": 7}', "7"),
    ("json:label", b'{"label": true}', "true"),
    ("json:label", b'{"label": 1.50}', "1.5"),
    ("json:label", b'{"label": null}', None),
    ("json:label", b'{"label": ""}', None),
    ("json:label", b'{"other": 1}', None),
    ("json:label", b"[1, 2]", None),
    ("json:a.b", b'{"a": {"b": "deep"}}', "deep"),
    ("json:a.b", b'{"a": "flat"}', None),
    ("json:a.b", b'{"a.b": "dotted"}', None),
]


@pytest.mark.parametrize(("notation", "data", "label"), LABELS)
def test_labels_come_from_a_text_member_or_a_json_field(
    store: Store, notation: str, data: bytes, label: str | None
) -> None:
    extension = notation.partition(":")[0]
    (sample,) = read_members(store, [member("a.jpg", b"1"), member(f"a.{extension}", data)], label=notation)
    assert (sample.label, sample.problem) == (label, None)


BAD_LABELS = [
    ("cls", b"caf\xe9", "not UTF-8: unexpected end of data at byte 3"),
    ("cls", b"x" * 4097, "4,097 characters; at most 4,096 are a label"),
    ("cls", b"x" * (2**20 + 1), "it has 1,048,577 bytes; at most 1,048,576 are read"),
    ("json:label", b'{"label": [1]}', "label is a JSON list, not one value"),
    ("json:a.b", b'{"a": {"b": {}}}', "a.b is a JSON object, not one value"),
    ("json:label", b'{"label": "x"', "not JSON: Expecting ',' delimiter: line 1 column 14 (char 13)"),
    ("json:label", b'{"label": NaN}', "not JSON: NaN is not a JSON number"),
    ("json:label", b'{"label": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff in position 11"),
    ("json:label", b'{"label": "\\ud800"}', "label holds half of a surrogate pair"),
    ("json:label", b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ("json:label", b'{"label": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ("json:label", b'{"label": "' + b"x" * 4097 + b'"}', "4,097 characters"),
    ("json:label", b"", "not JSON: Expecting value"),
]


@pytest.mark.parametrize(("notation", "data", "words"), BAD_LABELS)
def test_what_is_no_label_makes_a_reject_that_keeps_its_image(
    store: Store, notation: str, data: bytes, words: str
) -> None:
    extension = notation.partition(":")[0]
    (sample,) = read_members(store, [member(f"a.{extension}", data), member("a.jpg", b"1")], label=notation)
    assert sample.image == b"1" and sample.label is None and sample.problem is not None
    assert sample.problem[0] is RejectReason.BAD_LABEL
    assert sample.problem[1].startswith(f"label member .{extension}: {words}")
    assert len(sample.problem[1]) < 300


def test_a_bad_image_is_the_reason_before_a_bad_label(store: Store) -> None:
    (sample,) = read_members(store, [member("a.jpg", b""), member("a.cls", b"\xff")], label="cls")
    assert sample.problem is not None and sample.problem[0] is RejectReason.EMPTY_SAMPLE


def test_metadata_keeps_what_is_there_and_is_null_only_where_nothing_is(store: Store) -> None:
    fields = ("txt", "json:camera.model", "json:iso", "json:gps", "json:none", "json:half")
    document = (
        '{"camera": {"model": "M8 "}, "iso": 320, "gps": {"lat": [1, 2.5]}, "none": null, "half": "\\udfff"}'
    )
    members = [
        member("a.jpg", b"1"),
        member("a.json", document.encode()),
        member("a.txt", b" caf\xe9\n"),
        member("b.jpg", b"2"),
        member("b.json", b'{"camera": \xe9\n'),
        member("b.txt", b""),
        member("c.jpg", b"3"),
        member("c.txt", b"y" * (2**20 + 1)),
    ]
    a, b, c = read_members(store, members, metadata=fields)
    assert a.metadata == ("caf\\xe9", "M8 ", "320", '{"lat": [1, 2.5]}', None, "\\udfff")
    assert b.metadata == ("", *['{"camera": \\xe9'] * 5)
    assert c.metadata == (None,) * 6
    assert {s.problem for s in (a, b, c)} == {None}
    assert WebDatasetSource(uri="/x", metadata=fields).metadata_columns() == (
        "txt",
        "model",
        "iso",
        "gps",
        "none",
        "half",
    )


# ---------------------------------------------------------------- recipes and patterns


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": []}, "image: found [];"),
        ({"image": ["JPG"]}, "write it in lower case without the first dot, like jpg"),
        ({"image": [".jpg"]}, "write it in lower case without the first dot, like jpg"),
        ({"image": ["jpg", "png", "jpg"]}, "the extension 'jpg' is there twice"),
        ({"label": "json:"}, "label: found 'json:'; 'json:' names no field"),
        ({"label": "json:a..b"}, "'json:a..b' names no field"),
        ({"label": ""}, "label: found '';"),
        ({"label": "jpg"}, "'jpg' is wanted as text, but `image` lists that extension too"),
        ({"metadata": ["json:a.key"]}, "the table has a column 'key' of its own"),
        ({"metadata": ["json:Label"]}, "the table has a column 'label' of its own"),
        ({"metadata": ["json:a.model", "json:b.Model"]}, "the column 'model' is there twice"),
        ({"uri": ""}, "uri: found ''"),
        ({"pattern": ""}, "pattern: found ''"),
        ({"imgae": ["jpg"]}, "did you mean 'image'"),
        ({"kind": "tar"}, "kind: found 'tar'; input should be 'webdataset'"),
    ],
)
def test_a_source_that_cannot_work_is_refused_with_the_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check_recipe(WebDatasetSource, {"kind": "webdataset", "uri": "/x", **fields})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "named", "not_named"),
    [
        ("*.tar", ["a.tar", "x/y/a.tar", ".tar"], ["a.tar.gz", "a.TAR", "a.tar/b"]),
        ("x/*.tar", ["x/a.tar"], ["a.tar", "x/y/a.tar", "z/x/a.tar"]),
        ("**/a?.tar", ["a1.tar", "x/a1.tar", "x/y/a2.tar"], ["a.tar", "x/b1.tar"]),
        ("x/**/[ab].tar", ["x/a.tar", "x/y/z/b.tar"], ["a.tar", "x/c.tar", "xx/a.tar"]),
    ],
)
def test_patterns_without_a_slash_are_for_file_names_others_for_whole_paths(
    pattern: str, named: list[str], not_named: list[str]
) -> None:
    assert [path for path in named + not_named if path_matches(path, pattern)] == named


# ---------------------------------------------------------------- offsets behind every sort of header


LONG = "d" * 90 + "/" + "e" * 140


def _records(form: int) -> bytes:
    members = []
    for n in range(5):
        stem = f"{LONG}{n}" if n % 2 else f"short{n}"
        members += [member(f"{stem}.jpg", bytes([n]) * (300 * n + 1)), member(f"{stem}.cls", str(n).encode())]
    return tar_bytes(
        members, form, pax_headers={"comment": "made by a test"} if form == tarfile.PAX_FORMAT else None
    )


@pytest.mark.parametrize(
    ("form", "long_header_bytes"), [(tarfile.GNU_FORMAT, 1024), (tarfile.PAX_FORMAT, 1024)]
)
def test_resume_works_at_records_that_begin_with_an_extended_header(
    store: Store, form: int, long_header_bytes: int
) -> None:
    shard = put(store, _records(form))
    whole = read(store, shard, label="cls")
    assert [(s.key, s.label, s.size_bytes) for s in whole] == [
        ("short0", "0", 1),
        (f"{LONG}1", "1", 301),
        ("short2", "2", 601),
        (f"{LONG}3", "3", 901),
        ("short4", "4", 1201),
    ]
    with tarfile.open(fileobj=io.BytesIO(store.read(shard.path))) as archive:
        begins = [info.offset for info in archive if info.name.endswith(".jpg")]
    assert [s.begin_offset for s in whole] == begins
    assert begins[2] - begins[1] == 2 * long_header_bytes + (512 + 512) + (512 + 512)
    assert whole[4].end_offset == shard.size - END_BYTES
    for sample in whole:
        resumed = read(store, shard, Resume(sample.index, sample.begin_offset), label="cls")
        assert resumed == whole[sample.index :]


def test_a_size_in_a_pax_record_replaces_the_one_in_the_header(store: Store) -> None:
    data = bytearray(
        tar_bytes([member("a.jpg", b"1" * 700, pax_headers={"size": "700"})], tarfile.PAX_FORMAT)
    )
    begin = bytes(data).index(b"a.jpg\0")
    header = tarfile.TarInfo("a.jpg")
    header.size = 0
    data[begin : begin + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    (sample,) = read(store, put(store, bytes(data)))
    assert sample.image == b"1" * 700


def test_a_global_header_may_comment_but_not_rename(store: Store) -> None:
    records = [member("a.jpg", b"1")]
    good = tar_bytes(records, tarfile.PAX_FORMAT, {"comment": "x" * 600})
    assert images(read(store, put(store, good))) == [("a", b"1")]
    for keyword in ("path", "size", "GNU.sparse.name"):
        bad = put(store, tar_bytes(records, tarfile.PAX_FORMAT, {keyword: "7"}))
        with pytest.raises(ShardDamaged, match=f"a global header that sets '{keyword}' for all members"):
            read(store, bad)


def test_sparse_files_have_no_bytes_and_the_member_behind_them_is_found(store: Store) -> None:
    old = bytearray(
        tar_bytes([member("a.jpg", b"1" * 600, type=tarfile.GNUTYPE_SPARSE)], tarfile.GNU_FORMAT)[:-END_BYTES]
    )
    old[482] = 1  # another block of the map follows the header
    old[148:156] = b"%06o\0 " % sum(old[:148] + b" " * 8 + old[156:512])
    new = tar_bytes([member("x", b"2" * 600, pax_headers={"GNU.sparse.name": "b.jpg"})], tarfile.PAX_FORMAT)
    data = (
        bytes(old[:512])
        + bytes(512)
        + bytes(old[512:])
        + new[:-END_BYTES]
        + tar_bytes([member("c.jpg", b"3")])
    )
    a, b, c = read(store, put(store, data))
    assert images([a, b, c]) == [("a", None), ("b", None), ("c", b"3")]
    assert (
        a.problem
        == b.problem
        == (RejectReason.NO_IMAGE, "the image member is a sparse file, which is not followed")
    )


# ---------------------------------------------------------------- damage


def _three() -> bytes:
    return tar_bytes(
        [member(f"{n}.jpg", bytes([n]) * 900) for n in range(3)]
    )  # a record is 512 + 1,024 bytes


def read_until_damage(store: Store, data: bytes, path: str = "a.tar") -> tuple[list[str], ShardDamaged]:
    reading = open_reader(WebDatasetSource(uri=store.uri), 10_000).read(
        store, put(store, data, path), Resume()
    )
    keys: list[str] = []
    with pytest.raises(ShardDamaged) as damage:
        keys.extend(sample.key for sample in reading)
    return keys, damage.value


def test_a_broken_header_is_damage_where_python_sees_the_end_of_the_archive(store: Store) -> None:
    data = bytearray(_three())
    data[2 * 1536] ^= 1  # the name in the third header: its checksum no longer fits
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
        assert archive.getnames() == ["0.jpg", "1.jpg"]  # no error: why the walk is ours
    keys, damage = read_until_damage(store, bytes(data))
    assert keys == ["0"]  # the second is not known to be whole
    assert damage.found == "no tar header: bad checksum"
    assert damage.thing == f"{store.uri}/a.tar is damaged at byte 3,072 of the tar archive"


@pytest.mark.parametrize(
    ("data", "keys", "found"),
    [
        (_three()[:-1024], ["0", "1"], "the end, after 0 bytes"),
        (_three()[:-1024] + b"x" * 100, ["0", "1"], "the end, after 100 bytes"),
        (_three()[:-512], ["0", "1"], "a lone zero block and the end"),
        (_three()[:-100], ["0", "1"], "a lone zero block and the end"),
        (_three()[:-1524], ["0", "1"], "the end, 376 bytes early"),
        (_three()[:-512] + _three(), ["0", "1"], "data behind a zero block (archives joined into one?)"),
        (_three() + bytes(5000) + b"x", ["0", "1"], "data behind a zero block (archives joined into one?)"),
        (_three() + _three(), ["0", "1"], "data behind a zero block (archives joined into one?)"),
        (b"not a tar archive at all" * 50, [], "no tar header: invalid header"),
        (gzip.compress(_three()), [], "the end, after"),
    ],
)
def test_every_way_to_end_wrongly_is_damage(store: Store, data: bytes, keys: list[str], found: str) -> None:
    read_keys, damage = read_until_damage(store, data)
    assert read_keys == keys
    assert (damage.found or "").startswith(found)


@pytest.mark.parametrize("padding_bytes", [0, 1, 512, 9216, 3_000_001])
def test_zeros_behind_the_end_marker_are_padding(store: Store, padding_bytes: int) -> None:
    samples = read(store, put(store, _three() + bytes(padding_bytes)))
    assert [(s.key, s.end_offset) for s in samples] == [("0", 1536), ("1", 3072), ("2", 4608)]


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda packed: packed[:-8] + bytes(8), ["0", "1"]),  # a checksum that does not fit
        (lambda packed: packed[:-4] + bytes(4), ["0", "1"]),  # a length that does not fit
        (lambda packed: packed + b"trailing", ["0", "1"]),
        (lambda packed: b"\x1f\x8c" + packed[2:], []),
        (lambda packed: packed[:10] + b"\xff" * 20 + packed[30:], []),
    ],
)
def test_every_break_of_gzip_is_damage(store: Store, change: Any, keys: list[str]) -> None:
    read_keys, damage = read_until_damage(store, change(gzip.compress(_three(), mtime=0)), "a.tgz")
    assert read_keys == keys
    assert (damage.found or "").startswith("broken compressed data: ")


def test_gzip_in_several_pieces_is_one_archive(store: Store) -> None:
    pieces = gzip.compress(_three()[:2000]) + gzip.compress(_three()[2000:]) + bytes(512)
    samples = read(store, put(store, pieces, "A.TAR.GZ"))
    assert [(s.key, s.begin_offset, s.end_offset) for s in samples] == [(k, None, None) for k in "012"]


def test_headers_made_to_exhaust_the_reader_are_damage(store: Store) -> None:
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**33
    _, damage = read_until_damage(store, long_name.tobuf(tarfile.GNU_FORMAT))
    assert damage.found == "an extended header of 8,589,934,592 bytes"

    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 512
    record = b"512 comment=" + b"x" * 499 + b"\n"
    chain = (pax.tobuf(tarfile.USTAR_FORMAT) + record) * 3000  # tarfile would call itself 3,000 times
    assert read(store, put(store, chain + tar_bytes([member("a.jpg", b"1")])))[0].begin_offset == 0
    _, damage = read_until_damage(store, chain + bytes(1024))
    assert damage.found == "an extended header without its member"

    negative = bytearray(tar_bytes([member("a.jpg", b"")])[:512])
    negative[124:136] = b"\xff" * 11 + b"\x00"  # base 256: -256 bytes
    negative[148:156] = b"%06o\0 " % sum(negative[:148] + b" " * 8 + negative[156:])
    _, damage = read_until_damage(store, bytes(negative) + bytes(1024))
    assert damage.found == "a member of -256 bytes"


@pytest.mark.parametrize(
    "body", [b"no length\n", b"0 a=b\n", b"99 a=b\n", b"5 a=b\n", b"6 abc\n", b"-6 a=b\n", b"7 a=b\nx"]
)
def test_malformed_pax_records_are_damage(store: Store, body: bytes) -> None:
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, len(body)
    data = pax.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0") + tar_bytes([member("a.jpg", b"1")])
    _, damage = read_until_damage(store, data)
    assert damage.found == "a malformed pax record"


def test_300_mutated_archives_give_samples_or_damage_and_nothing_else(store: Store) -> None:
    dice = random.Random(20260929)
    originals = [_records(tarfile.GNU_FORMAT), _records(tarfile.PAX_FORMAT), _three()]
    outcomes = {"whole": 0, "damaged": 0}
    for n in range(300):
        data = bytearray(originals[n % 3])
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(len(data))
            if dice.random() < 0.7:
                data[at] = dice.randrange(256)
            else:
                data[at : at + dice.randrange(700)] = dice.randbytes(dice.randrange(700))
        try:
            read(store, put(store, bytes(data)), label="json:a", metadata=("cls",), max_sample_bytes=1000)
            outcomes["whole"] += 1
        except ShardDamaged:
            outcomes["damaged"] += 1
    assert min(outcomes.values()) > 30, outcomes
