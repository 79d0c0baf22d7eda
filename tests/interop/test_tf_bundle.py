"""Reading TensorFlow's bundles: what TensorFlow wrote, every checksum, and what is said of files that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vatt_engine.interop import crc32c as sums
from vatt_engine.interop import read_tf_checkpoint, tf_table
from vatt_engine.interop.tf_files import CheckpointFileError
from vatt_engine.interop.tf_slices import read_slice_key
from vatt_engine.interop.tf_table import read_table, write_table
from vatt_engine.interop.tf_wire import uncompress, write_field, write_varint
from vatt_engine.interop.tf_write import BundleWriter

GENUINE = Path(__file__).parent / "tf_checkpoints"
EXPECTED = json.loads((GENUINE / "format" / "expected.json").read_text())


def copied(tmp_path: Path, name: str = "format/mixed") -> Path:
    """A prefix of our own with a genuine checkpoint's files."""
    source = GENUINE / name
    for path in source.parent.glob(f"{source.name}.*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / source.name


def rewritten(prefix: Path, change) -> None:
    """The index with its entries changed, and good checksums."""
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes(write_table(change(read_table(index.read_bytes()))))


# ------------------------------------------------------------------------------------------------ checksums


@pytest.mark.parametrize("size", [0, 1, 9, 300, 5_000, 40_001, 70_000])
def test_three_ways_to_one_checksum(size):
    """NumPy's, the processor's and the portable native one, whole and in two parts."""
    from vatt_engine import _C

    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    wanted = sums.crc32c_numpy(data)
    assert _C.crc32c(data) == _C.crc32c(data, portable=True) == wanted
    cut = size // 3
    assert sums.crc32c_numpy(data[cut:], sums.crc32c_numpy(data[:cut])) == wanted
    assert _C.crc32c(data[cut:], _C.crc32c(data[:cut])) == wanted
    with pytest.raises(ValueError, match="data must be contiguous"):
        _C.crc32c(np.zeros((4, 4), np.uint8)[:, ::2])


def test_the_checksum_is_castagnolis():
    assert sums.crc32c_numpy(b"123456789") == 0xE3069283  # RFC 3720's check
    assert sums.masked(0) == 0xA282EAD8


# ------------------------------------------------------------------------------------------------ what TensorFlow wrote


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_tensor_of_a_bundle(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr(sums, "_native", lambda: None)
    found = read_tf_checkpoint(GENUINE / "format" / name)
    assert found.keys() == EXPECTED[name].keys()
    for key, wanted in EXPECTED[name].items():
        array = found[key]
        assert array.shape == found.shape(key) == tuple(wanted["shape"])
        if wanted["dtype"] == "string":
            values = wanted["values"] if isinstance(wanted["values"], list) else [wanted["values"]]
            assert [text.hex() for text in array.reshape(-1)] == values
        else:
            assert array.dtype.name == {"bfloat16": "float32"}.get(wanted["dtype"], wanted["dtype"])
            assert np.array_equal(array.reshape(-1).astype(np.float64), np.array(wanted["values"], np.float64))


def test_several_blocks_of_index():
    found = read_tf_checkpoint(GENUINE / "format" / "many")
    assert len(found) == 9_000
    assert [found[key].tolist() for key in list(found)[::1_000]] == [[float(i)] for i in range(0, 9_000, 1_000)]


@pytest.mark.parametrize("path", ["tx", "tx/ckpt-4", "tx/ckpt-4.index", "tx/ckpt-4.data-00000-of-00001"])
def test_what_names_a_checkpoint(path):
    found = read_tf_checkpoint(GENUINE / path)
    assert found.prefix == GENUINE / "tx" / "ckpt-4"
    assert found["optimizer/iter/.ATTRIBUTES/VARIABLE_VALUE"] == 4


def test_big_endian_is_swapped(tmp_path):
    """A bundle as a big-endian machine writes it; checksums are of the bytes in the file."""
    numbers = np.arange(6, dtype=">f4").reshape(2, 3)
    text, length = b"one", (3).to_bytes(4, "big")
    sealed = sums.masked(sums.crc32c(length)).to_bytes(4, "big")
    string = write_varint(3) + sealed + text
    entries = [(b"", write_field(1, 1) + write_field(2, 1))]
    data, offset = numbers.tobytes() + string, 0
    for key, kind, sizes, content, crc in (
        (b"n", 1, (2, 3), numbers.tobytes(), sums.crc32c(numbers.tobytes())),
        (b"s", 7, (), string, sums.crc32c(text, sums.crc32c(sealed, sums.crc32c(length)))),
    ):
        shape = b"".join(write_field(2, write_field(1, size)) for size in sizes)
        entry = write_field(1, kind) + write_field(2, shape) + write_field(4, offset) + write_field(5, len(content))
        entries.append((key, entry + write_field(6, sums.masked(crc), fixed32=True)))
        offset += len(content)
    (tmp_path / "b.index").write_bytes(write_table(entries))
    (tmp_path / "b.data-00000-of-00001").write_bytes(data)
    found = read_tf_checkpoint(tmp_path / "b")
    assert found["n"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["s"].item() == b"one"


def compress(data: bytes) -> bytes:
    """Snappy, simply: literals of 8 bytes, and copies of what repeats every four bytes."""
    out, place = bytearray(write_varint(len(data))), 0
    while place < len(data):
        run = 0
        while place >= 4 and run < 11 and place + run < len(data) and data[place + run] == data[place + run - 4]:
            run += 1
        if run >= 4:
            out += bytes([1 | (run - 4) << 2, 4])  # a copy from four bytes back, which may reach into itself
            place += run
        else:
            part = data[place : place + 8]
            out += bytes([(len(part) - 1) << 2]) + part
            place += len(part)
    return bytes(out)


def test_snappy_blocks(tmp_path, monkeypatch):
    """TensorFlow reads compressed blocks, though it writes none."""
    prefix = copied(tmp_path)

    def append(out: bytearray, block) -> bytes:
        content, offset = compress(block.content()), len(out)
        sealed = content + b"\1"
        out += sealed + sums.masked(sums.crc32c(sealed)).to_bytes(4, "little")
        return write_varint(offset) + write_varint(len(content))

    monkeypatch.setattr(tf_table, "_append", append)
    rewritten(prefix, lambda entries: entries)
    found, wanted = read_tf_checkpoint(prefix), read_tf_checkpoint(GENUINE / "format" / "mixed")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


def test_snappy():
    repeated = b"abcd" * 40 + b"end"
    assert len(compress(repeated)) < len(repeated) // 2
    assert uncompress(compress(repeated)) == repeated
    assert uncompress(bytes([130, 1, 61 << 2, 127, 0]) + b"x" * 128 + bytes([2 | 1 << 2, 128, 0])) == b"x" * 130
    with pytest.raises(ValueError, match="must stay below 22 times that"):
        uncompress(write_varint(1 << 31) + b"\0a")
    with pytest.raises(ValueError, match="must begin within what is there"):
        uncompress(bytes([5, 0]) + b"a" + bytes([1, 2]))
    with pytest.raises(ValueError, match="must give the 9 bytes"):
        uncompress(bytes([9, 0]) + b"a")


@pytest.mark.parametrize(
    ("code", "value"),
    [("80", 0), ("7f", -1), ("bf", 63), ("40", -64), ("c040", 64), ("3fbf", -65), ("dfff", 8191), ("e02000", 8192)],
)
def test_numbers_in_the_keys_of_parts(code, value):
    """TensorFlow's signed ordered code: its bytes sort as the numbers do."""
    key = b"\0" + b"name\0\1" + b"\1\1" + bytes.fromhex(code) + b"\x81"
    assert read_slice_key(key) == ("name", ((value, 1),))


def test_keys_of_parts_that_are_cut():
    key = b"\0" + b"a\0\xffb\0\1" + b"\1\2" + b"\xc0\x40\x81\x80\x7f"
    assert read_slice_key(key) == ("a\0b", ((64, 1), (0, -1)))
    for size in range(1, len(key)):
        with pytest.raises(ValueError, match="the key of a part must hold"):
            read_slice_key(key[:size])


# ------------------------------------------------------------------------------------------------ our own bundles


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16")
    given = {f"tensor/{kind}": (rng.standard_normal((3, 5)) * 9).astype(kind) for kind in kinds}
    given |= {
        "scalar": np.array(7),
        "empty": np.zeros((0, 4), "f4"),
        "big": rng.standard_normal((300, 400)).astype("f4"),
    }
    with BundleWriter(tmp_path / "b") as bundle:
        for name, array in given.items():
            bundle.add(name, array)
        bundle.add_text("text", b"a graph" * 50)
    found = read_tf_checkpoint(tmp_path)
    assert found.keys() == given.keys() | {"text"}
    assert found["text"].item() == b"a graph" * 50
    for name, array in given.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert {path.name for path in tmp_path.iterdir()} == {"b.index", "b.data-00000-of-00001"}


def test_a_bundle_that_breaks_off_leaves_nothing(tmp_path):
    def write() -> None:
        with BundleWriter(tmp_path / "b") as bundle:
            bundle.add("x", np.ones(3))
            bundle.add("y", np.array([None]))

    with pytest.raises(ValueError, match="must be of a type that TensorFlow has, got object"):
        write()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ files that are none


def header(**versions: int) -> bytes:
    version = write_field(1, 1) + b"".join(write_field({"least": 2, "bad": 3}[k], v) for k, v in versions.items())
    return write_field(1, 1) + write_field(3, version)


def damaged(tmp_path: Path, kind: str) -> Path:
    """A path that is no good checkpoint."""
    prefix = copied(tmp_path, "format/shards" if kind in ("shard", "several") else "format/mixed")
    index, data = prefix.with_name(f"{prefix.name}.index"), sorted(tmp_path.glob("*.data-*"))
    if kind == "nothing":
        return tmp_path / "other"
    if kind == "no data":
        data[0].unlink()
    elif kind == "shard":
        data[1].unlink()
    elif kind == "cut data":
        data[0].write_bytes(data[0].read_bytes()[:-1])
    elif kind == "page for data":
        data[0].write_text("<!doctype html>\n<title>Sign in</title>")
    elif kind == "flipped data":
        content = bytearray(data[0].read_bytes())
        content[-20] ^= 1
        data[0].write_bytes(content)
    elif kind == "no index":
        index.unlink()
        return tmp_path
    elif kind == "cut index":
        index.write_bytes(index.read_bytes()[:-7])
    elif kind == "flipped index":
        content = bytearray(index.read_bytes())
        content[20] ^= 1
        index.write_bytes(content)
    elif kind == "page":
        index.write_text("\n<!doctype html>\n<title>Sign in</title>")
    elif kind == "empty":
        index.write_bytes(b"")
    elif kind == "newer":
        rewritten(prefix, lambda entries: [(b"", header(least=2)), *entries[1:]])
    elif kind == "bad version":
        rewritten(prefix, lambda entries: [(b"", header(bad=1)), *entries[1:]])
    elif kind == "several":
        shutil.copyfile(index, tmp_path / "ckpt-9.index")
        return tmp_path
    elif kind == "saved model":
        index.unlink()
        (tmp_path / "saved_model.pb").write_bytes(b"\x08\1")
        return tmp_path
    elif kind == "meta":
        (tmp_path / "model.meta").write_bytes(b"\x0a\1")
        return tmp_path / "model.meta"
    elif kind == "zip":
        np.savez(tmp_path / "weights.npz", a=np.ones(1))
        return tmp_path / "weights.npz"
    elif kind == "variant":
        entry = write_field(1, 21) + write_field(2, b"") + write_field(5, 4)
        rewritten(prefix, lambda entries: [entries[0], (b"brain", entry), *entries[2:]])
    elif kind == "large":
        shape = write_field(2, write_field(1, 1 << 40)) * 2
        entry = write_field(1, 1) + write_field(2, shape) + write_field(5, 4)
        rewritten(prefix, lambda entries: [entries[0], (b"brain", entry), *entries[2:]])
    return prefix


@pytest.mark.parametrize(
    ("kind", "file", "text"),
    [
        ("nothing", "other.index", r"must exist, got no such file\. There are mixed\.index\.$"),
        ("no data", "mixed.data-00000-of-00001", r"must stand beside the index, got no such file"),
        ("shard", "shards.data-00001-of-00002", r"must stand beside the index, got no such file"),
        (
            "cut data",
            "mixed.data-00000-of-00001",
            r"must have the 314 bytes that the index tells of, got 313: it is cut",
        ),
        ("page for data", "mixed.data-00000-of-00001", r"'<!doctype html>', a web page \(of a login"),
        ("flipped data", "mixed.data-00000-of-00001", r"texts must have .* the data file is damaged"),
        ("no index", "", r"must hold a checkpoint's \.index, got mixed\.data-00000-of-00001 without one"),
        ("cut index", "mixed.index", r"must be a TensorFlow index, got one without the mark at its end: it is cut"),
        ("flipped index", "mixed.index", r"block at 0 must have its checksum, got another: the file is damaged"),
        ("page", "mixed.index", r"a TensorFlow index, got one that starts with '<!doctype html>', a web page"),
        ("empty", "mixed.index", r"must be a TensorFlow index, got an empty file"),
        ("newer", "mixed.index", r"format must be of version 1, got one that asks for 2"),
        ("bad version", "mixed.index", r"format must be of version 1, got one that asks for 2"),
        ("several", "", r"must hold one checkpoint, got ckpt-9\.index, shards\.index\. Name one of them"),
        ("saved model", "", r"got a SavedModel, whose variables have other names"),
        ("meta", "model.meta", r"TF1's description of a graph, which holds no weights"),
        ("zip", "weights.npz", r"prefix or \.index, got a zip archive"),
        ("variant", "mixed.index", r"brain must be of a type that NumPy has, got type variant"),
        ("large", "mixed.index", r"brain of shape .* must have 4835703278458516698824704 bytes, got 4"),
    ],
)
def test_a_bad_checkpoint_is_told_in_one_line(tmp_path, kind, file, text):
    path = damaged(tmp_path, kind)
    with pytest.raises(CheckpointFileError, match=text) as caught:
        dict(read_tf_checkpoint(path))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / file) if file else str(tmp_path))
    assert "\n" not in message


def test_parts_must_cover_their_tensor(tmp_path):
    prefix = copied(tmp_path, "format/slices")

    def without_a_part(entries):
        parts = [key for key, _ in entries if key[:1] == b"\0"]
        return [(key, value) for key, value in entries if key != parts[0]]

    rewritten(prefix, without_a_part)
    with pytest.raises(CheckpointFileError, match="w must have all its parts, got none for"):
        read_tf_checkpoint(prefix)
