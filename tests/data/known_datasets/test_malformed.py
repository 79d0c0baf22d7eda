"""Malformed annotation files: the exact place in the message, and never another exception than ManifestError."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.known_datasets.genuine import FILES, MEDIA, lay_out
from vatt_engine.data.datasets import DATASETS, import_dataset
from vatt_engine.data.manifest import ManifestError
from vatt_engine.data.rows import json_members, opened

CASES = {  # (dataset, split, file): what is replaced, by what, the message behind the file's name
    ("audioset", "eval", "eval_segments.csv"): [
        (", ", "\t", r":4: the row must have 4 cells \(YTID, .*got 1"),
        ("15.500", "nan", r":4: end_seconds must be a finite number .*got nan"),
        ("15.500", "6", r":4: end_seconds must be later than start_seconds \(7\), got 6\."),
        ("-5EVALclip0", "", r":4: YTID must be given, got nothing"),
        ('09x0r"', "09x0r", r":4: the row must be valid CSV"),
    ],
    ("audioset", "balanced_train", "balanced_train_segments.csv"): [
        ('"/m/09x0r,/t/dd00003"', "/m/09x0r,/t/d", r":4: positive_labels must be one of the 3 classes, got '/t/d'"),
        ('"/m/05zppz"', '"/m/05zppy"', r":5: positive_labels must .*mean '/m/05zppz"),
    ],
    ("audioset", "eval", "class_labels_indices.csv"): [
        ("\n2,", "\n-2,", r":4: the class number must be a whole number"),
        ("\n2,", "\n3,", r":4: the class numbers must leave none out, got 3 but no 2"),
        ("\n2,", "\n1,", r":4: the class must be given once"),
        ("mid", "id", r":1: column mid must be given, got only index"),
    ],
    ("kinetics400", "train", "train.csv"): [
        ("time_start", "start", r":1: column time_start must be given"),
        (",", "|", r":1: column youtube_id must be given"),
        (",104,", ",1m44,", r":4: time_start must be a number of seconds"),
        (",104,", ",-104,", r":4: time_start must be a finite .* got -104"),
        ("train,1", "train,1,2", r":4: the row must have 6 cells"),
        ("massaging", b'massa\xffging', r":3: the text must be UTF-8"),
    ],
    ("moments", "train", "trainingSet.csv"): [
        ("_205.mp4,clapping", "_205.mp4,claping", r":2: label .*'clapping'"),
    ],
    ("moments", "train", "moments_categories.txt"): [
        (",2", "", r":3: the class number must be a whole number"),
    ],
    ("ucf101", "test1", "testlist01.txt"): [
        ("YoYo/", "Yoyo/", r":3: the class must be one of .*mean 'YoYo'"),
    ],
    ("ucf101", "train1", "trainlist01.txt"): [
        ("g03_c01.avi 1", "g03_c01.avi 2", r":2: the class number must be 1"),
    ],
    ("ucf101", "test1", "classInd.txt"): [
        ("2 Hand", "Hand", r":2: the class number must be a whole number"),
    ],
    ("hmdb51", "test1", "brush_hair_test_split1.txt"): [
        ("_2.avi 1", "_2.avi 3", r":3: the row must be a file and 0"),
    ],
    ("hmdb51", "test1", "fencing_test_split1.txt"): [
        ("_2.avi 1", "_2.avi", r":2: the row must be a file and 0"),
    ],
    ("esc50", "test1", "esc50.csv"): [
        (".wav,2,0", ".wav,6,0", r":6: fold must be 1 to 5, got 6"),
        (",2,0,dog", ",2,1,dog", r":6: target must be 0 for dog, got 1"),
        ("filename,", "file,", r":1: column filename must be given"),
    ],
    ("youcook2", "val", "youcookii_annotations_trainval.json"): [
        ('"subset": "validation"', '"subset" "validation"', r":5: the file must be valid JSON"),
        ('{"database"', "[" * 100000, r":1: the file must be valid JSON, .*too deeply"),
        ('"database"', '"data"', r":the file: database must be given, got only data"),
        ("[25, 37]", "[25]", r":9GX8f5EwwE4\.annotations\[0\]: segment must be a start and"),
        ("[25, 37]", "[NaN, 37]", r":9GX8f5EwwE4\.annotations\[0\]: start must be a finite .*got nan"),
        ("[25, 37]", f"[25, {'9' * 400}]", r":9GX8f5EwwE4\.annotations\[0\]: end must be a finite"),
        ("[25, 37]", f"[25, {'9' * 5000}]", r":1: the file must be valid JSON, got an error: Exceeds"),
        ("[25, 37]", "[37, 25]", r":9GX8f5EwwE4\.annotations\[0\]: end must be at least start"),
        ("[25, 37]", "[25, 25]", r":9GX8f5EwwE4\.annotations\[0\]: segment must end later than 25"),
        ("cut the", "\\ud800", r":9GX8f5EwwE4\.annotations\[0\]: sentence must be text"),
        ('"sentence": "cut', '"text": "cut', r":9GX8f.*\[0\]: sentence must be given, got only"),
        ('"id": 0, "sentence": "cut', '"segment": 0, "sentence": "cut', r".*'segment' twice"),
    ],
    ("msrvtt", "test1k", "MSRVTT_JSFUSION_test.csv"): [
        ("video7020", "video7021", r":2: video_id must be one of MSRVTT_"),
        ("sentence", "text", r":1: column sentence must be"),
    ],
    ("msrvtt", "test1k", "MSRVTT_data.json"): [
        ('"a red car"', "7", r":sentences\[3\]: caption must be text, got 7"),
        ('"video0", "sen_id": 3', '"v", "sen_id": 3', r":sentences\[3\]: video_id"),
        ('"end time": 10', '"end": 10', r":videos\[1\]: end time must be given"),
        ('"video6513"', '"video0"', r":videos\[1\]: video_id must be given once"),
        ('"sentences": [', '"sentences": 3, "x": [', r":the file: sentences must be a list"),
    ],
    ("howto100m", "train", "caption.json"): [
        ("[4.25, 6.0]", "[4.25]", r":1: gkjnR3-ZVts\.end must be a list, as long"),
        ('{"text": [], "start": [], "end": []}', "[]", r":4: CTPAZ2euJ2Q must be an object"),
        ("[2.0, 3.0, 5.0]", "[2.0 3.0, 5.0]", r":3: nVbIUDjzWY4 must be valid JSON"),
        ("}}\n", "", r":4: CTPAZ2euJ2Q must be valid JSON"),
        ("}}\n", "}", r":4: the JSON object must have , or } here, got its end"),
        ("notListed00", "gkjnR3-ZVts", r":2: the key must be given once"),
        ('"notListed00"', "7", r":2: the key must be a string, got 7"),
        ("}}\n", "}}\n{}", r":5: the file must end after one JSON object"),
    ],
    ("howto100m", "train", "HowTo100M_v1.csv"): [
        ("video_id", "id", r":1: column video_id must be given"),
    ],
}  # fmt: skip


def run(name, split, annotations, media, out):
    return list(import_dataset(name, annotations=[annotations], media=media, out=out, splits=[split]))


@pytest.mark.parametrize(
    ("where", "old", "new", "message"),
    [
        pytest.param(where, *case, id=f"{where[0]}-{i}")
        for where, cases in CASES.items()
        for i, case in enumerate(cases)
    ],
)
def test_the_place_is_exact(tmp_path, where, old, new, message):
    name, split, file = where
    old, new = (part if isinstance(part, bytes) else part.encode() for part in (old, new))
    text = FILES[name][file].encode()
    assert old in text
    annotations, media = lay_out(tmp_path, name, FILES[name] | {file: text.replace(old, new)})
    with pytest.raises(ManifestError) as error:
        run(name, split, annotations, media, tmp_path / "out")
    place, _, rest = str(error.value).partition(file)
    assert place == f"{annotations}/"
    assert re.match(message, rest), rest
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert not (tmp_path / "out" / f"{split}.jsonl").exists()


def test_what_is_not_given_is_named(tmp_path):
    annotations, media = lay_out(tmp_path, "audioset")
    (annotations / "class_labels_indices.csv").unlink()
    with pytest.raises(
        ManifestError, match=r"^audioset: annotations must hold one file class_labels_indices\.csv, got bal"
    ):
        run("audioset", "eval", annotations, media, tmp_path / "out")
    with pytest.raises(ManifestError, match=r"^audioset: split must be one of balanced_train, .*got 'val'"):
        run("audioset", "val", annotations, media, tmp_path / "out")
    with pytest.raises(ManifestError, match="media must be a folder, got nothing"):
        run("audioset", "eval", annotations, media / "none", tmp_path / "out")
    annotations, media = lay_out(tmp_path / "howto", "howto100m")
    (annotations / "raw_caption.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"caption\.json or raw_caption\.json, got .* Name the one to read\."):
        run("howto100m", "train", annotations, media, tmp_path / "out")
    annotations, _ = lay_out(tmp_path / "k", "kinetics400", {"val.csv": FILES["kinetics400"]["val.csv"]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="kinetics400: annotations must hold rows of train, got none"):
        run("kinetics400", "train", annotations, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(
        ManifestError, match=r"empty: media must hold files of kinetics400 val, got none of 2 .*_P_1FroaCdc"
    ):
        run("kinetics400", "val", annotations, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(
        ManifestError, match=r"hmdb51: annotations must hold files <class>_test_split1\.txt, or .*, got nothing"
    ):
        list(import_dataset("hmdb51", media=media, out=tmp_path / "out", splits=["train1"]))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 2**18])
def test_a_json_object_is_read_in_pieces(tmp_path, chunk):
    path = tmp_path / "x.json"
    path.write_text('\ufeff {\n"a": 12345, "b" :\n [1, {"c": "\\u00e9\u00fc"}],\n\n"": -1.5e3 }\n \n', encoding="utf-8")
    with opened(path, "x") as file:
        members = list(json_members(path, file, chunk))
    assert members == [(2, "a", 12345), (2, "b", [1, {"c": "\u00e9\u00fc"}]), (5, "", -1500.0)]
    path.write_text("{}")
    with opened(path, "x") as file:
        assert list(json_members(path, file, chunk)) == []


PLACED = re.compile(
    r"(annotations/[^:]+:.+: .+ must .+|media: media must hold .+|^\w+: annotations must hold .+)", re.DOTALL
)
JUNK = [b"", b"\xff", b"\xef\xbb\xbf", b"\x00", b'"', b"\n", b"\r", b",", b";", b"\t", b"-1", b"nan", b"NaN", b"1e999",
        b"9" * 30, b"[" * 5000, b"{}", b"null", b"\\ud800", b"true", b" ", b"#", b"/", "\u2028".encode()]  # fmt: skip


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    return {name: lay_out(tmp_path_factory.mktemp(name), name) for name in FILES}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_files_are_read_or_refused_with_their_place(laid_out, tmp_path, name, data):
    annotations, media = laid_out[name]
    file = data.draw(st.sampled_from(sorted(FILES[name])))
    genuine = FILES[name][file].encode()
    content = bytearray(genuine)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = min(start + data.draw(st.sampled_from([0, 0, 1, 1, 2, 5, 1000])), len(content))
        content[start:stop] = data.draw(st.sampled_from(JUNK))
    (annotations / file).write_bytes(content)
    refusal = None
    try:
        for split in DATASETS[name].splits[:2]:
            run(name, split, annotations, media, tmp_path / str(len(list(tmp_path.iterdir()))))
    except ManifestError as error:
        refusal = str(error)
    finally:
        (annotations / file).write_bytes(genuine)
    assert refusal is None or PLACED.search(refusal), refusal


def test_every_dataset_has_a_genuine_example():
    assert {name for name in DATASETS if name not in ("kinetics600", "kinetics700", "imagenet")} == set(FILES)
    assert set(DATASETS) <= {*MEDIA, "kinetics600", "kinetics700"}
