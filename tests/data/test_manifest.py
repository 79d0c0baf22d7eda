import json

import pytest

from vatt_engine.data.manifest import Caption, ManifestError, read_manifest, sample_id, write_manifest


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
