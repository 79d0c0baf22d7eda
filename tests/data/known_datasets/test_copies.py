"""Annotation files as they circulate: parts of a set, other headers, spreadsheets, lists of other tools."""

import gzip
import json

import pytest

from tests.data.known_datasets.genuine import (
    AUDIOSET_EVAL,
    FILES,
    HMDB_CLIPS,
    KINETICS,
    MSRVTT_JSON,
    MSRVTT_TEST,
    UCF_CLASSES,
    UCF_CLIPS,
    YOUCOOK,
    lay_out,
)
from vatt_engine.cli import main
from vatt_engine.data.datasets import import_dataset
from vatt_engine.data.manifest import Caption, ManifestError, read_manifest


@pytest.fixture
def run(tmp_path):
    """Imports annotations of these texts: (what was imported by split, samples by split, what is missing by split)."""

    def run(name, files, *, media=(), splits=(), folder="x", **options):
        files = {file: text for file, text in files.items() if "/" not in file} | {"readme.md": "# what it is"}
        annotations, root = lay_out(tmp_path / folder, name, files)
        for file in media:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        out = tmp_path / folder / "out"
        results = list(import_dataset(name, annotations=[annotations], media=root, out=out, splits=splits, **options))
        samples = {r.split: read_manifest(r.manifest) for r in results if not r.absent}
        missing = {
            r.split: [json.loads(line) for line in r.missing.read_text().splitlines()] for r in results if not r.absent
        }
        return {r.split: r for r in results}, samples, missing

    return run


# ------------------------------------------------ parts of a set


@pytest.mark.parametrize(
    ("name", "files", "there", "absent"),
    [
        ("kinetics400", {"val.csv": KINETICS["val.csv"]}, {"val"}, "annotations must hold rows of train, got none."),
        (
            "audioset",
            {k: v for k, v in FILES["audioset"].items() if not k.startswith("un")},
            {"balanced_train", "eval"},
            "annotations must hold one file unbalanced_train_segments.csv, got balanced_train",
        ),
        (
            "ucf101",
            {k: v for k, v in FILES["ucf101"].items() if k in ("classInd.txt", "testlist02.txt")},
            {"test2"},
            "annotations must hold one file trainlist01.txt, got classInd.txt",
        ),
        (
            "moments",
            {k: v for k, v in FILES["moments"].items() if k != "trainingSet.csv"},
            {"val"},
            "annotations must hold trainingSet.csv, or one `path label` list of the split train, got moments_cat",
        ),
        (
            "msrvtt",
            {"MSRVTT_data.json": MSRVTT_JSON},
            {"train", "val", "test"},
            "annotations must hold one file MSRVTT",
        ),
    ],
)
def test_what_is_there_is_imported_and_what_is_not_is_named(run, name, files, there, absent):
    results, samples, _ = run(name, files)
    assert set(samples) == there
    lacking = [result for result in results.values() if result.absent]
    assert {result.split for result in lacking} | there == set(results)
    assert absent in lacking[0].absent
    assert not any(result.manifest.exists() for result in lacking)
    with pytest.raises(ManifestError, match=lacking[0].split.rstrip("19k")):
        run(name, files, splits=(lacking[0].split, *there), folder="strict")


def test_a_split_whose_media_are_not_there_is_named(run):
    media = ["val/abseiling/lqciwm6gDrk_659_669.mp4"]
    files = {"train.csv": "label,youtube_id,time_start,time_end,split\nabseiling,nothing0000,1,2,train\n"}
    results, samples, _ = run("kinetics400", files | {"val.csv": KINETICS["val.csv"]}, media=media)
    assert set(samples) == {"val"}
    assert "media must hold files of kinetics400 train, got none of 1" in results["train"].absent


def test_a_fault_in_one_file_does_not_keep_the_other_splits_and_all_faults_are_told(tmp_path):
    files = FILES["audioset"] | {
        "eval_segments.csv": "a, 1, 2\n",
        "unbalanced_train_segments.csv": "b, 1, x, /m/09x0r\n",
    }
    annotations, media = lay_out(tmp_path, "audioset", files)
    with pytest.raises(ManifestError) as error:
        list(import_dataset("audioset", annotations=[annotations], media=media, out=tmp_path / "out"))
    assert "unbalanced_train_segments.csv:1: end_seconds must be a number" in str(error.value)
    assert "eval_segments.csv:1: the row must have 4 cells" in str(error.value)
    assert len(read_manifest(tmp_path / "out" / "balanced_train.jsonl")) == 3


def test_everything_that_a_command_lacks_is_told_at_once(tmp_path, capsys):
    argv = ["data", "import", "ucf101", "--annotations", f"{tmp_path}/a", f"{tmp_path}/b", "--split", "tset1"]
    argv += ["--media", f"{tmp_path}/m", "--out", f"{tmp_path}/out", "--classes", f"{tmp_path}/c"]
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" must ")[0].rpartition(" ")[2] for line in lines] == [
        "split",
        "classes",
        "annotations",
        "annotations",
        "media",
    ]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------ headers, columns, spreadsheets

BARE = "YTID,start_seconds,end_seconds,positive_labels\n"
ROW = '-5EVALclip0,7.000,15.500,"/m/09x0r,/t/dd00003"\n'


@pytest.mark.parametrize(
    "text",
    [
        BARE + ROW,
        "# made in 2017\n# num=1\n" + BARE.replace(",", ", ") + ROW.replace(",", ", ", 3),
        ROW,  # no header at all
        "YTID,start_seconds,end_seconds,positive_labels,extra\n" + ROW.rstrip() + ",speech\n",
        "video,positive_labels,end_seconds,start_seconds,YTID\n" + 'x,"/m/09x0r,/t/dd00003",15.5,7,-5EVALclip0\n',
        ",YTID,start_seconds,end_seconds,positive_labels\n0," + ROW,  # with the index of a data frame
        "# YTID, start_seconds, end_seconds, positive_labels,,,\n-5EVALclip0,7,15.5,/m/09x0r,/t/dd00003,,\n",
        '# YTID, start_seconds, end_seconds, positive_labels,,\n-5EVALclip0,7,15.5," ""/m/09x0r","/t/dd00003""",\n',
        "# YTID, start_seconds, end_seconds, positive_labels,,\n-5EVALclip0,7,15.5,  /m/09x0r,/t/dd00003 ,,\n",
    ],
)
def test_headers_and_quotes_of_audioset(run, text):
    _, samples, missing = run("audioset", FILES["audioset"] | {"eval_segments.csv": text}, splits=["eval"])
    assert [sample.label for sample in samples["eval"]] == [(0, 2)]
    assert missing["eval"] == []


def test_an_id_that_a_spreadsheet_took_for_a_formula_is_left_out_and_named(run):
    text = AUDIOSET_EVAL + "#NAME?,30,40,/m/09x0r\n# a remark, 1, of three, cells\n"
    _, samples, missing = run("audioset", FILES["audioset"] | {"eval_segments.csv": text}, splits=["eval"])
    assert len(samples["eval"]) == 1
    (row,) = missing["eval"]
    assert row["at"].endswith("eval_segments.csv:5")
    assert (row["name"], row["reason"]) == ("#NAME? from 30 s", "no id: a spreadsheet wrote an error in its place")


@pytest.mark.parametrize(
    "text",
    [
        '0,/m/09x0r,Speech\n1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00003,Clatter\n',
        "index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/05zppz,Male speech, man speaking\n2,/t/dd00003,Clatter\n",
        'mid,index,display_name\n/m/09x0r,0,Speech\n/t/dd00003,2,Clatter\n/m/05zppz,1,"Male speech, man speaking"\n',
    ],
)
def test_class_lists_of_audioset(run, tmp_path, text):
    run("audioset", FILES["audioset"] | {"class_labels_indices.csv": text}, splits=["eval"])
    classes = (tmp_path / "x" / "out" / "classes.txt").read_text().splitlines()
    assert [name.replace(", ", ",") for name in classes] == ["Speech", "Male speech,man speaking", "Clatter"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_that_are_not_needed(run, delimiter):
    rows = [
        ["", "note", "youtube_id", "time_end", "time_start", "label", "note", "", ""],
        ["0", "a", "lqciwm6gDrk", "669", "659", "abseiling", "b", "", ""],
    ]
    text = "\n".join(delimiter.join(row) for row in rows)
    _, samples, _ = run("kinetics400", {"kinetics_val.csv": text})  # no column `split`: the name of the file says it
    assert {split: len(rows) for split, rows in samples.items()} == {"val": 1}


def test_a_column_that_is_needed_must_not_be_there_twice(run):
    text = "label,youtube_id,youtube_id,time_start,time_end,split\nx,a,b,1,2,val\n"
    with pytest.raises(ManifestError, match=r"val\.csv:1: the header must have each column once, got 'youtube_id'"):
        run("kinetics400", {"val.csv": text})


def test_packed_files_copies_and_folders_below(tmp_path):
    annotations, media = lay_out(tmp_path, "ucf101", {"readme.md": ""})
    folders = [annotations / "ucf/ucfTrainTestlist", annotations / "again/deeper"]
    (annotations / "__MACOSX").mkdir()
    for folder in folders:
        folder.mkdir(parents=True)
        for name, text in FILES["ucf101"].items():  # the same bytes twice are one file
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
            (annotations / "__MACOSX" / f"._{name}").write_bytes(b"\0\5\x16\7")
    results = list(import_dataset("ucf101", annotations=[annotations], media=media, out=tmp_path / "out"))
    assert [(r.absent, r.num_samples + r.left_out.total()) for r in results] == [("", 6), ("", 3)] * 3
    (folders[1] / "classInd.txt.gz").write_bytes(gzip.compress(b"1 Other\n"))
    with pytest.raises(ManifestError, match=r"one file classInd\.txt, got .*again/deeper/.* Name the one to read"):
        list(import_dataset("ucf101", annotations=[annotations], media=media, out=tmp_path / "out"))
    (folders[0] / "trainlist01.txt.gz").write_bytes(b"\x1f\x8bnot whole")
    with pytest.raises(ManifestError, match=r"trainlist01\.txt\.gz: annotations must be a whole gzip file, got"):
        list(import_dataset("ucf101", annotations=[folders[0]], media=media, out=tmp_path / "out", splits=["train1"]))


def test_a_pointer_of_git_lfs_is_no_annotation_file(run):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:7da8\nsize 64791348\n"
    with pytest.raises(ManifestError, match=r"HowTo100M_v1\.csv: annotations must be the file itself, got a Git LFS"):
        run("howto100m", FILES["howto100m"] | {"HowTo100M_v1.csv": text})


# ------------------------------------------------ lists of other tools


def folds(form, names):
    """mmaction2's lists of UCF101's first fold: group 1 tests."""
    number = {name: i for i, name in enumerate(names)}
    lines = {"train": [], "val": []}
    for clip in UCF_CLIPS:
        kind = "val" if "_g01_" in clip else "train"
        lines[kind].append(form.format(clip.removesuffix(".avi"), number[clip.partition("/")[0]]))
    return {f"ucf101_{kind}_split_1_videos.txt": "\n".join(rows) for kind, rows in lines.items()}


NAMES = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]


@pytest.mark.parametrize("form", ["{}.avi {}", "{} {}", "{} 240 {}", "{} 0 240 {}"])
def test_lists_of_mmaction2(run, tmp_path, form):
    results, samples, _ = run("ucf101", folds(form, NAMES))
    assert set(samples) == {"train1", "test1"}
    assert {sample.path.name: sample.label for rows in samples.values() for sample in rows} == {
        clip.rpartition("/")[2]: i // 3 for i, clip in enumerate(UCF_CLIPS[:-1])
    }
    assert (tmp_path / "x" / "out" / "classes.txt").read_text().splitlines() == NAMES
    assert results["train1"].num_classes == 3


def test_two_lists_of_a_split_must_be_told_apart(run):
    lists = folds("{}.avi {}", NAMES) | {"ucf101_train_split_1_rawframes.txt": "YoYo/v_YoYo_g02_c01 240 2\n"}
    with pytest.raises(ManifestError, match=r"got .*_rawframes\.txt, .*_1_.*\.txt\. Name the one to read\."):
        run("ucf101", lists, splits=["train1"])


def test_a_list_of_several_classes_per_file_is_refused(run):
    text = "val/abseiling/lqciwm6gDrk_659_669.mp4 0 3\n"
    with pytest.raises(ManifestError, match=r"k_val\.txt:1: the row must be a path and one class number, got 'val/abs"):
        run("kinetics400", {"k_val.txt": text})


def test_the_only_list_is_not_taken_for_three_splits(run):
    line = "val/abseiling/lqciwm6gDrk_659_669.mp4 3\n"
    _, samples, _ = run("kinetics400", {"kinetics400_val_list_videos.txt": line})
    assert set(samples) == {"val"}
    with pytest.raises(ManifestError, match=r"split train, got .*videos\.list\. Say its split with --split\."):
        run("kinetics400", {"videos.list": line, "note.txt": "no list"}, folder="nameless")
    _, samples, _ = run("kinetics400", {"videos.list": line}, splits=["test"], folder="asked")
    assert samples["test"][0].label == 3
    with pytest.raises(ManifestError, match=r"list of the split train, got kinetics400_val_list_videos\.txt"):
        run("kinetics400", {"kinetics400_val_list_videos.txt": line}, splits=["train"], folder="other")


def test_names_follow_from_folders_only_where_each_class_has_its_own(run):
    rows = "vol_1/_P_1FroaCdc_000000_000010.mp4 0\nvol_1/lqciwm6gDrk_659_669.mp4 1\n"
    results, samples, _ = run("kinetics400", {"k400_val.txt": rows})
    assert (results["val"].num_classes, [sample.label for sample in samples["val"]]) == (None, [0, 1])


def test_lists_of_hmdb51_and_moments(run):
    clips = [(f"{name}/{clip}", i) for i, name in enumerate(sorted(HMDB_CLIPS)) for clip in HMDB_CLIPS[name]]
    text = "".join(f"{path} {number}\n" for path, number in clips)
    _, samples, _ = run("hmdb51", {"hmdb51_val_split_2_videos.txt": text, "label_map.txt": "brush_hair\n"})
    assert set(samples) == {"test2"}
    assert [sample.label for sample in samples["test2"]] == [number for _, number in clips]
    rows = "clapping/yt-5of6ffo6-Bw_205.mp4 0\nblocking/getty-karate-video-id635808620_4.mp4 1\n"
    _, samples, _ = run("moments", {"mit_train_list_videos.txt": rows}, folder="y")
    assert [sample.label for sample in samples["train"]] == [0, 1]


@pytest.mark.parametrize(
    "rows",
    [
        ["{0} 1", "{1} 2"],  # test lists with numbers
        ["{0} 0", "{1} 1"],  # numbers from 0
        ["v_ApplyEyeMakeup_g01_c01.avi 1", "v_HandStandPushups_g01_c01.avi 2"],  # no folders
        ["{0}", "{1}"],
    ],
)
def test_copies_of_the_lists_of_ucf101(run, rows):
    text = "\n".join(row.format(UCF_CLIPS[0], UCF_CLIPS[3]) for row in rows)
    _, samples, _ = run("ucf101", {"classInd.txt": UCF_CLASSES, "testlist01.txt": text})
    assert [sample.label for sample in samples["test1"]] == [0, 1]


def test_columns_and_header_of_moments(run):
    text = "filename,label,positive,negative\nclapping/yt-5of6ffo6-Bw_205.mp4,clapping\n"
    _, samples, _ = run("moments", FILES["moments"] | {"validationSet.csv": text}, splits=["val"])
    assert [sample.label for sample in samples["val"]] == [0]


# ------------------------------------------------ captions


def test_two_sentences_over_the_same_seconds_are_two_captions_of_one_sample(run):
    twice = '{"segment": [90, 102], "id": 2, "sentence": "toast it"}, {"segment": [114, 127.5]'
    text = YOUCOOK.replace('{"segment": [114, 127.5]', twice)
    _, samples, missing = run("youcook2", {"youcookii_annotations_trainval.json": text})
    both = ("spread margarine on two slices of white bread", "toast it")
    assert [(s.start, s.captions) for s in samples["train"]] == [
        (90.0, tuple(Caption(text, 90.0, 102.0) for text in both)),
        (114.0, (Caption("place a slice of cheese on the bread", 114.0, 127.5),)),
    ]
    assert missing["train"] == []


def test_the_table_of_youcook2_that_mil_nce_uses(run):
    text = "end,start,task,text,video_id\n37,25,212,cut the onion,9GX8f5EwwE4\n37,25,212,dice it,9GX8f5EwwE4\n"
    _, samples, _ = run("youcook2", {"validation_youcook.csv": text})
    (sample,) = samples["val"]
    assert [caption.text for caption in sample.captions] == ["cut the onion", "dice it"]


def halves():
    """MSR-VTT as it was distributed in 2016."""
    data = json.loads(MSRVTT_JSON)
    parts = {"train_val_videodatainfo.json": ("train", "validate"), "test_videodatainfo.json": ("test",)}
    for name, splits in parts.items():
        videos = [video for video in data["videos"] if video["split"] in splits]
        own = {video["video_id"] for video in videos}
        sentences = [sentence for sentence in data["sentences"] if sentence["video_id"] in own]
        yield name, json.dumps({"info": {}, "videos": videos, "sentences": sentences})


def test_the_official_files_of_msrvtt(run):
    tables = {name: text for name, text in FILES["msrvtt"].items() if name.endswith(".csv")}
    _, whole, _ = run("msrvtt", FILES["msrvtt"])
    _, both, _ = run("msrvtt", dict(halves()) | tables, folder="both")
    captions = {split: [sample.captions for sample in samples] for split, samples in whole.items()}
    assert {split: [sample.captions for sample in samples] for split, samples in both.items()} == captions
    half = {"test_videodatainfo.json": dict(halves())["test_videodatainfo.json"]}
    results, one, _ = run("msrvtt", half | tables, folder="half")
    assert set(one) == {"test1k", "test"}
    assert [sample.captions for sample in one["test"]] == captions["test"]
    text = "annotations must hold train_val_videodatainfo.json, for video0 of MSRVTT_train.9k.csv, got"
    assert text in results["train9k"].absent
    _, preferred, _ = run("msrvtt", dict(halves()) | FILES["msrvtt"], folder="all")  # not every sentence twice
    assert [sample.captions for sample in preferred["train"]] == captions["train"]


def test_a_video_in_two_files_of_msrvtt_is_refused(run):
    text = dict(halves())["test_videodatainfo.json"]
    with pytest.raises(ManifestError, match=r"be in one file, got 'video7020' in .* too\. Name the files to read\."):
        run("msrvtt", {"test_videodatainfo.json": text, "videodatainfo_2017.json": text})


def test_json_is_parsed_once_for_all_splits(run, monkeypatch):
    from vatt_engine.data.datasets import source

    parsed, real = [], source.parse_json
    monkeypatch.setattr(source, "parse_json", lambda path, *args: parsed.append(path.name) or real(path, *args))
    run("msrvtt", FILES["msrvtt"])
    run("youcook2", FILES["youcook2"], folder="y")
    assert parsed == ["MSRVTT_data.json", "youcookii_annotations_trainval.json"]


def test_several_sentences_of_a_video_in_a_test_table(run):
    text = MSRVTT_TEST + "ret1,msr7020,video7020,another one\n"
    _, samples, missing = run("msrvtt", FILES["msrvtt"] | {"MSRVTT_JSFUSION_test.csv": text}, splits=["test1k"])
    assert [caption.text for caption in samples["test1k"][0].captions] == ["a woman, creating a flower", "another one"]
    assert missing["test1k"] == []


# ------------------------------------------------ classes


def test_a_list_without_labels_has_no_classes(tmp_path, capsys):
    annotations, media = lay_out(tmp_path, "kinetics400", {"test.csv": KINETICS["test.csv"]})
    (tmp_path / "names.txt").write_text("abseiling\nair drumming\n")
    argv = ["data", "import", "kinetics400", "--annotations", str(annotations), "--media", str(media)]
    assert main([*argv, "--out", str(tmp_path / "out"), "--classes", str(tmp_path / "names.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/out/test.jsonl: 1 samples without labels"
    assert lines[1] == "train is not imported: kinetics400: annotations must hold rows of train, got none."
