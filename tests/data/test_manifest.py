import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vatt_engine.data.manifest import Caption, ManifestError, Sample, read_manifest, sample_id, write_manifest

DRAWN = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    return tmp_path


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_jsonl(folder):
    rows = [
        {"path": "a.mp4", "captions": [{"text": "a dog, barking", "start": 0, "end": 2.5}], "label": 3},
        {"path": "/abs/b.webm", "label": "cat"},
        {"path": "sub/\u00e9.mp4", "captions": []},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
    samples = read_manifest(write(folder, "m.jsonl", text, "utf-8-sig"))
    assert [(s.index, s.line, s.label) for s in samples] == [(0, 1, 3), (1, 2, "cat"), (2, 3, None)]
    assert samples[0].captions == (Caption("a dog, barking", 0.0, 2.5),)
    assert samples[0].path == folder / "a.mp4"
    assert str(samples[1].path) == "/abs/b.webm"
    assert [s.id for s in samples] == [sample_id(row["path"]) for row in rows]
    assert all(0 <= s.id < 2**63 for s in samples)


def test_the_id_is_the_same_everywhere():
    assert sample_id("clips/a.mp4") == 5_790_181_373_462_968_240
    assert sample_id("clips/a.mp4") != sample_id("clips/b.mp4")


def test_csv_rows_of_one_path_are_one_sample(folder):
    text = (
        "path,caption,start,end,label\r\n"
        'a.mp4,"a dog, barking",0,1.5,7\r\n'
        'a.mp4,"two\nlines",1.5,3,7\r\n'
        "b.mp4,,,,\r\n"
        "c.mp4,hi,0,1,cat\r\n"
    )
    samples = read_manifest(write(folder, "m.csv", text, "utf-8-sig"))
    assert [s.line for s in samples] == [2, 5, 6]
    assert samples[0].captions == (Caption("a dog, barking", 0, 1.5), Caption("two\nlines", 1.5, 3))
    assert [s.label for s in samples] == [7, None, "cat"]
    assert samples[1].captions == ()


def test_csv_with_json_captions(folder):
    text = 'label,path,captions\n,a.mp4,"[{""text"": ""x"", ""start"": 0, ""end"": 1}]"\n-2,b.mp4,\n'
    samples = read_manifest(write(folder, "m.csv", text))
    assert samples[0].captions == (Caption("x", 0, 1),)
    assert [s.label for s in samples] == [None, -2]


def test_written_manifest_reads_back(folder, tmp_path_factory):
    rows = '{"path": "a.mp4", "captions": [{"text": "\u00fc", "start": 0.1, "end": 2}]}\n'
    rows += '{"path": "/x/y.mp4", "label": "k"}\n'
    samples = read_manifest(write(folder, "m.jsonl", rows))
    write_manifest(folder / "copy.jsonl", samples)
    assert json.loads((folder / "copy.jsonl").read_text().splitlines()[0])["path"] == "a.mp4"
    assert read_manifest(folder / "copy.jsonl") == samples
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "m.jsonl"
    write_manifest(elsewhere, samples)
    assert [s.path for s in read_manifest(elsewhere)] == [s.path for s in samples]
    with pytest.raises(ManifestError, match=r"must end in \.jsonl to be written"):
        write_manifest(folder / "copy.csv", samples)


def test_parts_of_a_file(folder):
    rows = [
        {"path": "a.mp4", "start": 3, "end": 5.5, "captions": [{"text": "x", "start": 3, "end": 5}]},
        {"path": "a.mp4", "start": 5.5},
        {"path": "a.mp4", "end": 5.5},
        {"path": "a.mp4"},
        {"path": "b.mp4", "start": None, "end": None, "label": None},
    ]
    samples = read_manifest(write(folder, "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [(s.start, s.end) for s in samples] == [(3.0, 5.5), (5.5, None), (0.0, 5.5), (0.0, None), (0.0, None)]
    names = ["a.mp4#3.0-5.5", "a.mp4#5.5-", "a.mp4#0.0-5.5", "a.mp4", "b.mp4"]
    assert [s.id for s in samples] == [sample_id(name) for name in names]
    assert samples[0].captions == (Caption("x", 3.0, 5.0),)  # in seconds of the file, not of the part


def test_several_classes(folder):
    rows = '{"path": "a.mp4", "label": [526, 0, 137]}\n{"path": "b.mp4", "label": []}\n'
    assert [s.label for s in read_manifest(write(folder, "m.jsonl", rows))] == [(526, 0, 137), ()]


SECONDS = st.floats(0, 1e9) | st.integers(0, 10**9)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
LABELS = st.none() | st.integers(-(2**63), 2**63 - 1) | TEXT
LABELS |= st.lists(st.integers(0, 2**63 - 1), max_size=4, unique=True).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20).filter(
    lambda name: name.strip() and name.strip(".")
)


@st.composite
def written(draw, folder):
    """Samples that a manifest can hold, each file whole or in parts."""
    samples, seen = [], set()
    for _ in range(draw(st.integers(1, 4))):
        times = [sorted(draw(st.tuples(SECONDS, SECONDS))) for _ in range(draw(st.integers(0, 3)))]
        captions = tuple(Caption(draw(TEXT), float(start), float(end)) for start, end in times)
        start, end = sorted(map(float, draw(st.tuples(SECONDS, SECONDS))))
        start, end = draw(st.sampled_from([(0.0, None), (start, None), (start, end)]))
        name = draw(NAMES)
        key = (name, start, end)
        assume(end is None or start < end)
        assume(key not in seen)
        seen.add(key)
        samples.append(Sample(len(samples), 0, Path(folder, name), captions, draw(LABELS), 0, start, end))
    return samples


@settings(max_examples=100, **DRAWN)
@given(data=st.data())
def test_what_is_written_is_read(folder, data):
    samples = data.draw(written(folder))
    samples.append(Sample(len(samples), 0, folder / "a.mp4", label="exists"))
    assume((folder / "a.mp4") not in [s.path for s in samples[:-1]])
    write_manifest(folder / "w.jsonl", samples)
    read = read_manifest(folder / "w.jsonl")
    assert [(s.path, s.captions, s.label, s.start, s.end) for s in read] == [
        (s.path, s.captions, s.label, s.start, s.end) for s in samples
    ]
    assert len({s.id for s in read}) == len(read)
    assert not list(folder.glob("*.tmp"))


def test_a_manifest_that_cannot_be_written_whole_is_not_there(folder):
    def samples():
        yield Sample(0, 0, folder / "a.mp4")
        raise ManifestError("no more")

    with pytest.raises(ManifestError, match="no more"):
        write_manifest(folder / "w.jsonl", samples())
    assert sorted(path.name for path in folder.iterdir()) == ["a.mp4"]


GOOD = '{"path": "a.mp4"}\n'
CAPTION = '{{"path": "a.mp4", "captions": [{{"text": "x", "start": {}, "end": {}}}]}}\n'
BAD_JSONL = {
    "truncated": ('{"path": "a.mp4"', r":1: the row must be valid JSON, got an error"),
    "second line": (GOOD + "nonsense\n", r":2: the row must be valid JSON"),
    "list": ("[1]\n", r":1: the row must be a JSON object, got \[1\]"),
    "deep": ("[" * 100_000 + "\n", r":1: the row must be valid JSON"),
    "twice the key": ('{"path": "a.mp4", "path": "b.mp4"}\n', r":1: the row must be valid JSON, .*'path' twice"),
    "misspelt": ('{"path": "a.mp4", "caption": []}\n', r":1: caption must be one of .*Did you mean 'captions'\?"),
    "no path": ('{"label": 3}\n', r":1: path must be given, got only label"),
    "empty path": ('{"path": " "}\n', r":1: path must be the name of a file, got ' '"),
    "number path": ('{"path": 3}\n', r":1: path must be the name of a file, got 3"),
    "NUL path": ('{"path": "a\\u0000"}\n', r":1: path must be the name of a file"),
    "surrogate path": ('{"path": "\\ud800"}\n', r":1: path must be the name of a file"),
    "duplicate": (GOOD + '{"path": "b"}\n' + GOOD, r":3: path must be named once, got '.*a\.mp4' on line 1 too"),
    "NaN": (CAPTION.format("NaN", 1), r":1: captions\[0\]\.start must be a finite number of seconds >= 0, got nan"),
    "infinity": (CAPTION.format(0, "Infinity"), r":1: captions\[0\]\.end must be a finite number .*got inf"),
    "huge": (CAPTION.format(0, "1" * 400), r":1: captions\[0\]\.end must be a finite number"),
    "negative": (CAPTION.format(-0.5, 1), r":1: captions\[0\]\.start must be a finite number .*>= 0, got -0\.5"),
    "swapped": (CAPTION.format(2, 1), r":1: captions\[0\]\.end must be at least start \(2\), got 1. Are they swapped"),
    "text time": (CAPTION.format('"0"', 1), r":1: captions\[0\]\.start must be a finite number .*got '0'"),
    "true": (CAPTION.format("true", 1), r":1: captions\[0\]\.start must be a finite number .*got True"),
    "no end": ('{"path": "a.mp4", "captions": [{"text": "x", "start": 0}]}\n', r":1: captions\[0\]\.end must be given"),
    "typo": ('{"path": "a.mp4", "captions": [{"txt": "x", "start": 0, "end": 1}]}\n', r"\[0\]\.txt .*mean 'text'\?"),
    "text": ('{"path": "a.mp4", "captions": [{"text": 5, "start": 0, "end": 1}]}\n', r"\.text must be text, got 5"),
    "not a list": ('{"path": "a.mp4", "captions": "hi"}\n', r":1: captions must be a list of objects, got 'hi'"),
    "not objects": ('{"path": "a.mp4", "captions": ["hi"]}\n', r":1: captions\[0\] must be an object, got 'hi'"),
    "label": (
        '{"path": "a.mp4", "label": 1.5}\n',
        r":1: label must be a 64-bit integer, a string or a list .*got 1\.5",
    ),
    "no class": ('{"path": "a.mp4", "label": [0, -1]}\n', r":1: label must be .* list of different class numbers"),
    "same class": ('{"path": "a.mp4", "label": [3, 3]}\n', r":1: label must be .* list of different class .*\[3, 3\]"),
    "true class": ('{"path": "a.mp4", "label": [true]}\n', r":1: label must be .* list of different class numbers"),
    "nested class": ('{"path": "a.mp4", "label": [[]]}\n', r":1: label must be .* list of different class numbers"),
    "negative start": ('{"path": "a.mp4", "start": -1}\n', r":1: start must be a finite number .*got -1"),
    "NaN end": ('{"path": "a.mp4", "end": NaN}\n', r":1: end must be a finite number .*got nan"),
    "part backwards": ('{"path": "a.mp4", "start": 3, "end": 3}\n', r":1: end must be later than start \(3\), got 3\."),
    "part twice": (
        GOOD + 2 * '{"path": "a.mp4", "start": 3}\n',
        r":3: path must be named once, got '.*a\.mp4' from 3 s on line 2 too",
    ),
    "large label": ('{"path": "a.mp4", "label": 9223372036854775808}\n', r":1: label must be a 64-bit integer"),
    "bytes": (GOOD.encode() + b'{"path": "\xff"}\n', r":2: the text must be UTF-8"),
    "empty": ("", r"must have at least one row, got none"),
    "blank": ("\n \n", r"must have at least one row, got none"),
    "none exists": ('{"path": "no.mp4"}\n{"path": "nor.mp4"}\n', r":1: path must name files that exist, got none of 2"),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl(folder, case):
    text, message = BAD_JSONL[case]
    path = write(folder, "m.jsonl", text)
    with pytest.raises(ManifestError, match=message) as error:
        read_manifest(path)
    assert str(error.value).startswith(str(path))


HEADER = "path,caption,start,end,label\n"
BAD_CSV = {
    "misspelt": ("path,captoin,start,end\na.mp4,x,0,1\n", r":1: column captoin must be one of .*mean 'caption'\?"),
    "no path": ("caption,start,end\nx,0,1\n", r":1: column path must be given, got only caption, start, end"),
    "no times": ("path,caption\na.mp4,x\n", r":1: column start must be given"),
    "both": ("path,caption,captions\na.mp4,x,[]\n", r":1: column caption must be one of path, captions, label"),
    "column twice": ("path,path\na,b\n", r":1: the header must have each column once, got 'path' twice"),
    "cells": (HEADER + "a.mp4,x,0,1,2,3\n", r":2: the row must have 5 cells \(path, caption, .*\), got 6. Quote"),
    "word": (HEADER + "a.mp4,x,zero,1,\n", r":2: start must be a number of seconds, got 'zero'"),
    "no end": (HEADER + "a.mp4,x,0,,\n", r":2: end must be a number of seconds, got ''"),
    "nan": (HEADER + "a.mp4,x,0,1,\na.mp4,y,nan,1,\n", r":3: start must be a finite number of seconds >= 0, got nan"),
    "inf": (HEADER + "a.mp4,x,0,inf,\n", r":2: end must be a finite number"),
    "swapped": (HEADER + "a.mp4,x,3,1,\n", r":2: end must be at least start \(3\), got 1\."),
    "labels": (HEADER + "a.mp4,x,0,1,2\na.mp4,y,0,1,3\n", r":3: label must be the same in all rows of one path"),
    "apart": (HEADER + "a.mp4,x,0,1,\nb,y,0,1,\na.mp4,z,0,1,\n", r":4: path must be named once, .*on line 2 too"),
    "open quote": (HEADER + 'a.mp4,"x,0,1,\n', r":2: the row must be valid CSV"),
    "json": ('path,captions\na.mp4,"[{"\n', r":2: captions must be valid JSON"),
    "only a header": (HEADER, r"must have at least one row"),
    "empty path": (HEADER + ",x,0,1,\n", r":2: path must be the name of a file, got ''"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv(folder, case):
    text, message = BAD_CSV[case]
    path = write(folder, "m.csv", text)
    with pytest.raises(ManifestError, match=message) as error:
        read_manifest(path)
    assert str(error.value).startswith(str(path))


def test_bad_files(folder):
    with pytest.raises(ManifestError, match=r"must end in \.jsonl or \.csv, got 'm\.txt'"):
        read_manifest(folder / "m.txt")
    with pytest.raises(ManifestError, match="must be a file, got no such file"):
        read_manifest(folder / "missing.jsonl")
    (folder / "folder.csv").mkdir()
    with pytest.raises(ManifestError, match="must be a file, got a folder"):
        read_manifest(folder / "folder.csv")


def test_many_rows_are_read(folder):
    row = '{{"path": "{}", "captions": [{{"text": "a caption", "start": 0.5, "end": 3.25}}], "label": 1}}\n'
    path = write(folder, "m.jsonl", "".join(row.format("a.mp4" if i == 0 else f"c/{i}.mp4") for i in range(20_000)))
    samples = read_manifest(path)
    assert len(samples) == 20_000
    assert samples[-1].captions[0].end == 3.25


JUNK = st.sampled_from([True, [], {}, [None], {"a": 1}, "\ud800", "\0", 1.5, float("nan"), 10**400, -1])
BAD_FIELDS = {  # a field, and a value it cannot have
    "path": JUNK | st.sampled_from(["", " ", "\t", None, 7]),
    "label": st.sampled_from(
        [True, {}, 1.5, float("inf"), 2**63, -(2**63) - 1, "\udfff", [1.0], ["a"], [-1], [2, 2], [[1]]]
    ),
    "start": JUNK.filter(lambda value: value is not None) | st.sampled_from(["1", 1e10]),
    "end": JUNK | st.sampled_from(["1", 1e10, 0]),
    "captions": JUNK.filter(lambda value: value != []) | st.sampled_from(["x", 0, False]),
    "captions.text": JUNK.filter(lambda value: value != "\0") | st.none(),
    "captions.start": JUNK | st.sampled_from([None, "0", 9]),
    "captions.end": JUNK | st.sampled_from([None, "0", 1e300]),
}


@st.composite
def malformed_jsonl(draw):
    """(bytes, the line of the fault): some good rows and a bad one among them."""
    good = [{"path": f"{name}.mp4"} for name in draw(st.lists(st.sampled_from("abcdef"), max_size=4, unique=True))]
    rows = [json.dumps(row).encode() for row in good]
    kind = draw(st.sampled_from(["field", "key", "cut", "bytes", "deep", "again", "no object"]))
    if kind == "field":
        field = draw(st.sampled_from(sorted(BAD_FIELDS)))
        value = draw(BAD_FIELDS[field])
        row = {"path": "bad.mp4", "label": 1, "captions": [{"text": "x", "start": 2, "end": 3}]}
        (row["captions"][0] if "." in field else row)[field.rpartition(".")[2]] = value
        bad = json.dumps(row).encode()
    elif kind == "key":
        bad = json.dumps({"path": "bad.mp4", draw(TEXT.filter(lambda key: key not in KEYS)): 1}).encode()
    elif kind == "again":
        bad = rows[draw(st.integers(0, len(rows) - 1))] if rows else b'{"path": "x", "path": "x"}'
    elif kind == "cut":
        whole = json.dumps({"path": "bad.mp4", "captions": [{"text": "x", "start": 2, "end": 3}]}).encode()
        bad = whole[: draw(st.integers(1, len(whole) - 1))]
    elif kind == "deep":
        bad = draw(st.sampled_from([b"[", b'{"path":'])) * 50_000
    elif kind == "no object":
        bad = draw(
            st.sampled_from([b"1", b"[]", b"null", b'"a.mp4"', b"path,label", b"NaN", b"9" * 5000, b"\xc2\xa0{}"])
        )
    else:
        bad = b'{"path": "' + draw(st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xfe\xff"])) + b'.mp4"}'
    place = len(rows) if kind == "again" else draw(st.integers(0, len(rows)))
    rows.insert(place, bad)
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + end.join(rows) + end, place + 1


KEYS = ("path", "captions", "label", "start", "end")


@settings(max_examples=300, **DRAWN)
@given(case=malformed_jsonl())
def test_a_malformed_jsonl_row_is_refused_with_its_line(folder, case):
    content, line = case
    path = write(folder, "m.jsonl", content)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert str(error.value).startswith(f"{path}:{line}: "), error.value
    assert " must " in str(error.value)


BAD_CELLS = st.sampled_from(
    [
        "a.mp4,x,nan,1,",
        "a.mp4,x,1,-inf,",
        "a.mp4,x,-1,1,",
        "a.mp4,x,3,2,",
        "a.mp4,x,1e10,1e11,",
        "a.mp4,x,,1,",
        "a.mp4,x,1;5,2,",
        "a.mp4;x;0;1;",
        "a.mp4\tx\t0\t1\t",
        "a.mp4,x,0,1",
        "a.mp4,x, y,0,1,",
        " ,x,0,1,",
        "a\0.mp4,x,0,1,",
        'a.mp4,"x"y,0,1,',
        "a.mp4,x,0x1,1,",
        "a.mp4," + "x" * 200_000 + ",0,1,",
        b"a.mp4,\xff,0,1,",
    ]
)


@settings(max_examples=100, **DRAWN)
@given(before=st.integers(0, 3), after=st.integers(0, 2), bad=BAD_CELLS, end=st.sampled_from([b"\n", b"\r\n"]))
def test_a_malformed_csv_row_is_refused_with_its_line(folder, before, after, bad, end):
    good = [f'{i}.mp4,"two{"" if i else chr(10)} lines",0,1.5,{i}'.encode() for i in range(before + after)]
    rows = [HEADER.strip().encode(), *good[:before], bad if isinstance(bad, bytes) else bad.encode(), *good[before:]]
    path = write(folder, "m.csv", end.join(rows) + end)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert str(error.value).startswith(f"{path}:{2 + before + (before > 0)}: "), error.value


@settings(max_examples=200, **DRAWN)
@given(data=st.data(), name=st.sampled_from(["m.jsonl", "m.csv"]))
def test_mutated_manifests_are_read_or_refused(folder, data, name):
    jsonl = 3 * b'{"path": "a.mp4", "captions": [{"text": "a dog", "start": 0.5, "end": 2}], "label": [1, 2]}\n'
    text = bytearray(jsonl if name == "m.jsonl" else HEADER.encode() + b'a.mp4,"a dog",0.5,2,1\na.mp4,b,2,3,1\nb,,,,\n')
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        text[start : start + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b","])
        )
    path = write(folder, name, bytes(text))
    refusal = ""
    try:
        read_manifest(path)
    except ManifestError as error:
        refusal = str(error)
    assert refusal == "" or (refusal.startswith(str(path)) and " must " in refusal)
