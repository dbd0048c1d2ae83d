"""Files made to harm: each becomes a row, a reject or a failed shard; nothing of them runs, and nothing is written
outside of the table."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.errors import WeightsError
from engine.extraction import Part, ShardWork, read_parts
from engine.images import ImageRejected, decode_image
from engine.parts import parse_part_name
from engine.recipes import Limits
from engine.schema import RejectReason
from engine.storage import open_store
from engine.tables import list_parts, read_embedding_facts
from engine.verification import verify_table
from tests.commands import Ended, Engine, rows_of
from tests.extract_jobs import job_without_network
from tests.flows.archives import crop_jpeg, extract_recipe, shard_bytes, write_recipe
from tests.shards.archives import member, tar_bytes
from tests.test_images import SAMPLES, chunk, encode, photo, png_header

SIDE_PX, MUTATIONS = 32, 1000
Member = tuple[tarfile.TarInfo, bytes]

ONLY_IN_CHAOS = pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")


# ---------------------------------------------------------------- a thousand mutated images


def with_flipped_bits(whole: bytes, dice: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(dice.choice((1, 3, 20))):
        at = dice.randrange(min(len(data), 300) if dice.random() < 0.5 else len(data))
        data[at] ^= 1 << dice.randrange(8)
    return bytes(data)


def cut(whole: bytes, dice: random.Random) -> bytes:
    return whole[: dice.randrange(len(whole))]


def with_another_header(whole: bytes, dice: random.Random) -> bytes:
    other = SAMPLES[dice.choice(sorted(SAMPLES))]
    length = dice.randrange(4, 300)
    return other[:length] + whole[length:]


def with_swapped_pieces(whole: bytes, dice: random.Random) -> bytes:
    a, b, c, d = sorted(dice.randrange(8, len(whole)) for _ in range(4))
    return whole[:a] + whole[c:d] + whole[b:c] + whole[a:b] + whole[d:]


def with_false_size(whole: bytes, dice: random.Random) -> bytes:
    """Width or height overwritten where it stands: most formats have a 16-bit or 32-bit number there."""
    side = dice.choice((0, 1, 2, 255, 256, 4097, 16383, 32767, 65535))
    if whole.startswith(b"\x89PNG"):
        sides = [side, dice.choice((1, 61, side, 2**31 - 1))]
        dice.shuffle(sides)
        header = struct.pack(">II", *sides) + whole[24:29]
        return whole[:8] + chunk(b"IHDR", header) + whole[33:]
    data = bytearray(whole)
    for number, form in ((61, "H"), (90, "H"), (60, "H"), (89, "H")):
        for order in "<>":
            at = data.find(struct.pack(order + form, number), 4, 400)
            if at > 0 and dice.random() < 0.6:
                data[at : at + 2] = struct.pack(order + form, side)
    return bytes(data)


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    with_flipped_bits,
    cut,
    with_another_header,
    with_swapped_pieces,
    with_false_size,
)


@pytest.fixture(scope="module")
def mutations() -> list[bytes]:
    """The same thousand files each time: every format in every way."""
    dice = random.Random("hostile images")
    names = sorted(SAMPLES)
    return [WAYS[n % len(WAYS)](SAMPLES[names[n % len(names)]], dice) for n in range(MUTATIONS)]


def outcome_of(encoded: bytes) -> tuple[str, str]:
    try:
        image = decode_image(encoded, SIDE_PX, "stretch", Limits().max_pixels)
    except ImageRejected as rejected:
        return rejected.reason, rejected.message
    assert image.pixels_SS3.shape == (SIDE_PX, SIDE_PX, 3)
    return "image", ""


def test_1000_mutated_images_are_images_or_rejects_and_so_they_are_in_a_shard(
    mutations: list[bytes], tmp_path: Path
) -> None:
    started = time.monotonic()
    outcomes = [outcome_of(encoded) for encoded in mutations]
    seconds = time.monotonic() - started
    counts = Counter(name for name, _ in outcomes)
    print(f"{MUTATIONS} mutated images in {seconds:.1f} s: {dict(counts.most_common())}")
    assert counts.total() == MUTATIONS and set(counts) <= {"image", *RejectReason}
    for name in ("image", "truncated_image", "corrupt_image", "unsupported_format", "too_many_pixels"):
        assert counts[name] >= 5, counts
    ways = Counter(WAYS[n % len(WAYS)].__name__ for n, (name, _) in enumerate(outcomes) if name != "image")
    assert min(ways[way.__name__] for way in WAYS) >= 50, ways  # each of 200 does harm

    store = open_store(str(tmp_path / "shards"))
    shard = store.write("a.tar", tar_bytes(member(f"{n:04d}.jpg", data) for n, data in enumerate(mutations)))
    job = job_without_network(tmp_path, SIDE_PX, rows_per_part=64, decode_threads=2)
    parts = [Part.from_row(row) for row in read_parts(job, [ShardWork(shard)])]
    rows, rejects = [], {}
    for part in parts:
        assert part.samples is not None and part.rejects is not None and part.header.damage is None
        rows += part.samples["key"].to_pylist()
        rejects |= {row["key"]: (row["error"], row["message"]) for row in part.rejects.to_pylist()}
    assert len(rows) + len(rejects) == MUTATIONS
    empty = (RejectReason.EMPTY_SAMPLE,)
    for n, (reason, message) in enumerate(outcomes):
        found = rejects.get(f"{n:04d}", ("image", ""))
        assert found == (reason, message) or found[:1] == empty == (reason,)


# ---------------------------------------------------------------- payloads that would leave a trace


@dataclass(frozen=True)
class Canary:
    """A file that appears if any payload runs or any member is unpacked."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)

    def as_pickle(self) -> bytes:
        return pickle.dumps(self, protocol=2)

    def as_postscript(self) -> bytes:
        return (
            f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch {self.path}) (w) file\n".encode()
        )

    def was_seen(self) -> bool:
        """In its own folder, or where a path with `..` or without a root would lead from where the engine works."""
        folders = {self.path.parent, *Path.cwd().parents[:2], Path.cwd(), *self.path.parents[:4]}
        return any(name.startswith(self.name) for folder in folders for name in os.listdir(folder))


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / f"pwned-{tmp_path.name}")


def contents(folder: Path, but: Path) -> dict[str, object]:
    """Every file below, with what tells that it was written to; links are not followed."""
    found: dict[str, object] = {}
    for place, _, names in os.walk(folder):
        if not Path(place).is_relative_to(but):
            for name in names:
                status = os.lstat(Path(place) / name)
                found[str(Path(place) / name)] = (status.st_size, status.st_mtime_ns, status.st_ino)
            found[place] = None
    return found


def assert_only_known_files(table: Path) -> None:
    for path in table.rglob("*"):
        name = str(path.relative_to(table))
        known = (
            name in ("_table.json", "data", "rejects", "runs")
            or (
                path.parent.name in ("data", "rejects")
                and path.parent.parent == table
                and parse_part_name(name) is not None
            )
            or re.fullmatch(r"runs/extract-\d{8}T\d{6}Z-[0-9a-f]{4}\.json", name) is not None
        )
        assert known and not path.is_symlink(), name


def assert_whole(table: Path, samples: int) -> None:
    """Every sample is a row or a reject, and `engine verify` finds nothing."""
    store = open_store(str(table))
    facts = [read_embedding_facts(store, name) for name, _ in list_parts(store)]
    checked = verify_table(store)
    assert not (checked.damage or checked.leftovers or checked.unfinished), checked
    assert sum(fact.samples for fact in facts) == checked.rows + checked.rejects == samples


# ---------------------------------------------------------------- one archive of everything


def png_of_text(kind: str, expanded_bytes: int) -> bytes:
    """A small PNG with a note that unpacks to so many bytes."""
    note = PngInfo()
    if kind == "zTXt":
        note.add_text("a", "x" * expanded_bytes, zip=True)
    elif kind == "iTXt":
        note.add_itxt("a", "x" * expanded_bytes, zip=True)
    profile = bytes(expanded_bytes) if kind == "iCCP" else None
    return encode(Image.new("RGB", (4, 4)), "PNG", pnginfo=note, icc_profile=profile)


def gif_that_is_a_script() -> bytes:
    """Its width spells /*, and behind its trailer the comment ends and a script follows."""
    gif = bytearray(encode(Image.new("P", (16, 16)), "GIF"))
    gif[6:8] = b"/*"
    return bytes(gif) + b"*/=1;alert(document.cookie)"


def zipped(canary: Canary) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"../{canary.name}.py", "print()")
    return file.getvalue()


def images_and_outcomes(canary: Canary) -> dict[str, tuple[bytes, str]]:
    """Bytes of an image member, and what must come of them: `row`, or the reason of a reject."""
    jpeg = crop_jpeg(1)[0]
    comment = b"<script>alert(1)</script>"
    with_comment = jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]
    return {
        "declared": (png_header(50_000, 50_000), "too_many_pixels"),
        "whole_but_declared": (png_header(50_000, 50_000) + encode(photo(8, 8), "PNG")[33:], "too_many_pixels"),
        "compressible": (encode(Image.new("1", (13_000, 13_000)), "PNG"), "row"),  # 21 MB of zeros in 25 kB
        "ztxt": (png_of_text("zTXt", 2**27), "corrupt_image"),
        "itxt": (png_of_text("iTXt", 2**27), "corrupt_image"),
        "iccp": (png_of_text("iCCP", 2**27), "corrupt_image"),
        "wide": (encode(Image.new("L", (100_000, 1), 9), "PNG"), "row"),
        "tall": (encode(Image.new("L", (1, 100_000), 9), "PNG"), "row"),
        "jpeg_and_zip": (jpeg + zipped(canary), "row"),
        "jpeg_and_html": (with_comment + b"<html>" + comment, "row"),
        "gif_and_script": (gif_that_is_a_script(), "row"),
        "pickle": (canary.as_pickle(), "unsupported_format"),
        "postscript": (canary.as_postscript(), "unsupported_format"),
        "dos_eps": (b"\xc5\xd0\xd3\xc6" + bytes(26) + canary.as_postscript(), "unsupported_format"),
        "svg": (f'<svg><image href="file://{canary.path}"/></svg>'.encode(), "unsupported_format"),
        "imagemagick": (f"image over 0,0 0,0 '|touch {canary.path}'".encode(), "unsupported_format"),
        "empty": (b"", "empty_sample"),
    }  # fmt: skip


def odd_members(canary: Canary) -> Iterable[tuple[list[Member], str]]:
    """Records of members that an unpacker would trip over, and what must come of each."""
    jpeg, outside = crop_jpeg(2)[0], canary.path
    yield [member(f"{outside}.jpg", jpeg)], "row"
    yield [member(f"../../../../{canary.name}.jpg", jpeg)], "row"
    yield [member(f"a/../../{canary.name}.jpg", jpeg)], "row"
    yield [member("way/out.x", type=tarfile.SYMTYPE, linkname=str(outside.parent))], "no_image"
    yield [member(f"way/out.x/{canary.name}.jpg", jpeg)], "row"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        yield [member(f"link{kind!r}.jpg", type=kind, linkname="/etc/passwd")], "no_image"
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        yield [member(f"device{kind!r}.jpg", type=kind, devmajor=1, devminor=5)], "no_image"
    payload = canary.as_pickle()
    yield (
        [
            member("p.jpg", jpeg),
            member("p.pyd", payload),
            member("p.pickle", payload),
            member("p.pth", payload),
        ],
        "row",
    )
    yield [member("q.pickle", payload), member("q.pyd", payload)], "no_image"
    yield [member("long_label.jpg", jpeg), member("long_label.cls", b"x" * 10_000_000)], "bad_label"
    yield [member("pickled_label.jpg", jpeg), member("pickled_label.cls", b"\xff" + payload)], "bad_label"
    yield [member("deep.jpg", jpeg), member("deep.json", b'{"note": ' + b"[" * 100_000)], "row"
    yield [member(b"\xff\xfe\x80.jpg", jpeg)], "row"
    yield [member("k" * 100_000 + ".jpg", jpeg)], "row"
    yield [member("line\nbreak.jpg", jpeg)], "row"
    yield [member("quotes '\";--.jpg", jpeg)], "row"
    yield [member("nul.jpg", jpeg, pax_headers={"path": "nul\0byte.jpg"})], "row"
    yield [member("\u202egpj exe.jpg", jpeg)], "row"


SHARD_NAMES = (
    "a..b.tar",
    "...tar",
    "with spaces and 'quotes'.tar",
    "snow☃man/日本語.tar",
    "line\nbreak.tar",
    "-rf *.tar",
    "$(touch pwned).tar",
    "_underscore.tar",
    ".hidden.tar",
    "_folder/.hidden/a.tar",
    "n" * 251 + ".tar",
)


def test_one_archive_of_everything_hostile_harms_nobody(
    engine: Engine, canary: Canary, tmp_path: Path
) -> None:
    records: list[tuple[list[Member], str]] = [
        ([member(f"{name}.jpg", data), member(f"{name}.cls", b"x")], wanted)
        for name, (data, wanted) in images_and_outcomes(canary).items()
    ]
    records += odd_members(canary)
    hostile = tar_bytes([m for members, _ in records for m in members], form=tarfile.PAX_FORMAT)
    source, table = open_store(str(tmp_path / "shards")), tmp_path / "table"
    source.write("hostile.tar", hostile)
    for n, name in enumerate(SHARD_NAMES):
        source.write(name, shard_bytes(n, 1))
    recipe = extract_recipe(tmp_path, source.uri, str(table))
    (tmp_path / "outside").mkdir()
    before = contents(tmp_path, but=table)

    metadata = "source.metadata=[json:note]"
    ended = engine("extract", recipe, "--json", "--set", metadata, "--set", "limits.max_reject_fraction=1")
    assert ended.code == 0, ended.stderr
    wanted = Counter(outcome for _, outcome in records)
    rows = wanted.pop("row") + len(SHARD_NAMES)
    assert ended.summary["rejects_by_reason"] == dict(wanted)
    assert (ended.summary["rows"], ended.summary["shards_done"]) == (rows, 1 + len(SHARD_NAMES))
    assert_whole(table, samples=len(records) + len(SHARD_NAMES))
    assert engine("extract", recipe, "--set", metadata).code == 3  # the budget's verdict, without a new run

    assert contents(tmp_path, but=table) == before
    assert not canary.was_seen()
    assert_only_known_files(table)
    found = rows_of(table, ["key", "shard"]).to_pylist()
    assert {row["shard"] for row in found} == {"hostile.tar", *SHARD_NAMES}
    keys = {row["key"] for row in found}
    assert {str(canary.path), f"../../../../{canary.name}", "k" * 100_000, "line\nbreak", "nul\0byte"} <= keys
    assert "\\xff\\xfe\\x80" in keys


def test_a_shard_whose_name_is_not_unicode_stops_the_run_before_it_starts(
    engine: Engine, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    source.write("a.tar", shard_bytes(0, 1))
    (tmp_path / "shards" / os.fsdecode(b"\xff.tar")).write_bytes(shard_bytes(1, 1))
    ended = engine("extract", extract_recipe(tmp_path, source.uri, str(tmp_path / "table")))
    assert ended.code == 1
    assert "cannot be written as UTF-8" in ended.stderr and "rename the file" in ended.stderr
    assert not (tmp_path / "table").exists()


def test_a_document_named_like_an_image_starts_no_interpreter(canary: Canary, tmp_path: Path) -> None:
    """With a Ghostscript in the path that would tell."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {canary.path}\n")
    ghostscript.chmod(0o755)
    (tmp_path / "a.jpg").write_bytes(canary.as_postscript() + b"%%EndComments\nshowpage\n%%EOF\n")
    environment = {**os.environ, "PATH": f"{ghostscript.parent}:{os.environ['PATH']}"}
    code = "from PIL import Image; Image.open('a.jpg').load()"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert canary.was_seen(), "the trap does not work"
    canary.path.unlink()
    code = (
        "import sys; from engine.images import decode_image, ImageRejected\n"
        "try: decode_image(open(sys.argv[1], 'rb').read(), 32, 'stretch', 10**6)\n"
        "except ImageRejected as rejected: print(rejected.reason)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jpg")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "unsupported_format\n"
    assert not canary.was_seen()


# ---------------------------------------------------------------- other kinds of shards


def run_kind(engine: Engine, folder: Path, kind: str) -> Ended:
    recipe = f"""
source:   {{kind: {kind}, uri: "{folder}/shards"}}
backbone: {{kind: keras_application, name: MobileNetV2, weights: random, seed: 3, input_size: 32, layer: block_2_add}}
output:   {{uri: "{folder}/table", rows_per_part: 64}}
"""
    return engine("extract", write_recipe(folder, "extract.yaml", recipe), "--json")


@ONLY_IN_CHAOS
def test_parquet_with_pickles_in_its_types_and_metadata_runs_no_code(
    engine: Engine, canary: Canary, tmp_path: Path
) -> None:
    """Of types that Ray registers in every worker; up to 2.54 it unpickled what such a file says."""
    payload = canary.as_pickle()
    (tmp_path / "shards").mkdir()
    images = pa.array([crop_jpeg(n)[0] for n in range(3)], pa.binary())
    types = ("arrow_tensor", "arrow_tensor_v2", "arrow_variable_shaped_tensor", "arrow_pickled_object")
    for n, name in enumerate((*(f"ray.data.{name}" for name in types), "arrow.py_extension_type")):
        said = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
        schema = pa.schema([pa.field("image", pa.binary(), metadata=said)])
        more = {"pandas": payload, "huggingface": payload, "ARROW:extension:name": name, "pickle": payload}
        rows = pa.table([images], schema=schema.with_metadata(more))
        pq.write_table(rows, tmp_path / "shards" / f"{n}.parquet")
    ended = run_kind(engine, tmp_path, "parquet")
    assert (ended.code, ended.summary["rows"], ended.summary["rejects"]) == (0, 15, 0), ended.stderr
    assert_whole(tmp_path / "table", samples=15)
    assert_only_known_files(tmp_path / "table")
    assert not canary.was_seen()


def record_header(length: int) -> bytes:
    """The beginning of a TFRecord record of that length, with the right checksum."""
    packed = struct.pack("<Q", length)
    crc = google_crc32c.value(packed)
    return packed + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@ONLY_IN_CHAOS
def test_tfrecords_of_absurd_lengths_are_failed_shards_and_nothing_is_allocated_for_them(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    for n, length in enumerate((2**64 - 1, 2**63, 2**40, 2**30, 2**20, 2**31 - 1)):
        (tmp_path / "shards" / f"{n}.tfrecord").write_bytes(record_header(length) + bytes(100))
    ended = run_kind(engine, tmp_path, "tfrecord")
    assert (ended.code, ended.summary["shards_failed"], ended.summary["rows"]) == (1, 6, 0)
    assert ended.stderr.count("is damaged at byte 0") >= 6 and "Traceback" not in ended.stderr
    assert "limits.max_failed_shards" in ended.stderr
    assert list((tmp_path / "table").rglob("*.parquet")) == []


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["weights.h5", "model.weights.h5", "model.keras", "model.pth"])
def test_weights_that_are_a_pickle_or_hold_one_are_refused_and_run_no_code(
    canary: Canary, tmp_path: Path, name: str
) -> None:
    """A whole pickle, and a zip with a pickle for each thing that Keras or torch would look for."""
    from engine.backbones.weights import load_weights
    from tests.backbones.small_networks import small_network

    file = tmp_path / name
    file.write_bytes(canary.as_pickle())
    with pytest.raises(WeightsError, match=f"{name} does not fit small"):
        load_weights(small_network(), file, name)
    inside = (
        "config.json",
        "metadata.json",
        "model.weights.h5",
        "data.pkl",
        "assets/x.npz",
        f"../{canary.name}",
    )
    with zipfile.ZipFile(file, "w") as archive:
        for inner in inside:
            archive.writestr(inner, canary.as_pickle())
    with pytest.raises(WeightsError, match=f"{name} does not fit small"):
        load_weights(small_network(), file, name)
    assert not canary.was_seen()


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of Keras 3.15 with NumPy 2.4
def test_a_lambda_layer_in_a_keras_file_is_never_built(canary: Canary, tmp_path: Path) -> None:
    """With a trap that works: Keras itself runs it where it is told that the file is safe."""
    import keras

    from engine.backbones.weights import load_weights
    from tests.backbones.small_networks import small_network

    source = f"lambda x: __import__('os').system('touch {canary.path}') and x or x"
    saved = small_network()
    output = keras.layers.Lambda(eval(source), output_shape=lambda shape: shape)(saved.output)
    keras.Model(saved.input, output).save(tmp_path / "evil.keras")
    trusting = keras.models.load_model(tmp_path / "evil.keras", safe_mode=False)
    trusting(np.zeros((1, *saved.input.shape[1:]), np.float32))
    assert canary.was_seen(), "the trap does not work"
    canary.path.unlink()
    load_weights(
        small_network(), tmp_path / "evil.keras", "evil.keras"
    )  # its tensors fit, and only they are read
    assert not canary.was_seen()
    with pytest.raises(WeightsError, match=r"evil\.keras does not fit small"):
        load_weights(small_network(width=11), tmp_path / "evil.keras", "evil.keras")
    assert not canary.was_seen()


def first_tensor(file: Any) -> str:
    """Where the first dataset of an open HDF5 file stands."""
    found: str = file.visititems(lambda name, item: name if hasattr(item, "shape") else None)
    return found


def test_a_weights_file_that_points_at_other_files_is_refused(tmp_path: Path) -> None:
    """HDF5 can link to another file, or keep a tensor's bytes in any file of the disk."""
    import h5py

    from engine.backbones.weights import load_weights
    from tests.backbones.small_networks import fill_with_primes, small_network

    saved = small_network()
    fill_with_primes(saved)
    whole, secret = tmp_path / "whole.weights.h5", tmp_path / "secret"
    saved.save_weights(whole)
    secret.write_bytes(bytes(range(200)) * 1000)
    for way in ("link", "bytes"):
        evil = tmp_path / f"{way}.weights.h5"
        evil.write_bytes(whole.read_bytes())
        with h5py.File(evil, "r+") as file:
            name = first_tensor(file)
            shape, dtype = file[name].shape, file[name].dtype
            del file[name]
            if way == "link":
                file[name] = h5py.ExternalLink(str(whole), name)
            else:
                file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        with pytest.raises(WeightsError, match="does not fit small"):
            load_weights(small_network(), evil, evil.name)


def test_a_tensor_declared_a_terabyte_large_is_refused(tmp_path: Path) -> None:
    import h5py

    from engine.backbones.weights import load_weights
    from tests.backbones.small_networks import small_network

    bomb = tmp_path / "bomb.weights.h5"
    small_network().save_weights(bomb)
    with h5py.File(bomb, "r+") as file:
        name = first_tensor(file)
        del file[name]
        file.create_dataset(name, (2**20, 2**20), "<f4", chunks=(1024, 1024), compression="gzip")
    assert bomb.stat().st_size < 200_000
    with pytest.raises(WeightsError, match="does not fit small"):
        load_weights(small_network(), bomb, "bomb")
