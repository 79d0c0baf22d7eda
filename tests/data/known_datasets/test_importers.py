"""Each importer on files in the genuine format: the exact samples, what is missing, the splits."""

import itertools
import json
import os
from fractions import Fraction

import numpy as np
import pytest

from tests.data.known_datasets.genuine import (
    ESC_CSV,
    FILES,
    HMDB_CLIPS,
    KINETICS,
    MEDIA,
    MSRVTT_TEST_SEMICOLON,
    UCF_CLIPS,
    lay_out,
)
from vatt_engine.cli import main
from vatt_engine.data import decode_clip
from vatt_engine.data.datasets import DATASETS, import_dataset
from vatt_engine.data.manifest import Caption, ManifestError, read_manifest


@pytest.fixture
def imported(tmp_path):
    """Imports a dataset: (samples by split, left out by split, classes); paths below the media folder."""

    def run(name, *splits, files=None, media=(), folder="x", **options):
        annotations, root = lay_out(tmp_path / folder, name, files)
        for file in media:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        out = tmp_path / folder / "out"
        results = list(import_dataset(name, annotations=[annotations], media=root, out=out, splits=splits, **options))
        samples, missing = {}, {}
        for result in results:
            rows = read_manifest(result.manifest)
            assert len(rows) == result.num_samples
            samples[result.split] = [(s.path.resolve().relative_to(root).as_posix(), s) for s in rows]
            missing[result.split] = [json.loads(line) for line in result.missing.read_text().splitlines()]
            assert sum(result.left_out.values()) == len(missing[result.split])
        classes = (out / "classes.txt").read_text().splitlines() if (out / "classes.txt").exists() else None
        return samples, missing, classes

    return run


def labels(samples):
    return {path: sample.label for path, sample in samples}


def places(missing):
    """(file:line, name, reason) with the file's name alone."""
    return [(row["at"].rpartition("/")[2], row["name"], row["reason"]) for row in missing]


def test_howto100m(imported):
    samples, missing, classes = imported("howto100m")
    assert [(path, sample.captions) for path, sample in samples["train"]] == [
        ("gkjnR3-ZVts.mp4.webm", (Caption("pour water", 1.5, 4.25), Caption("stir \u00e9", 4.0, 6.0))),
        ("nVbIUDjzWY4.mp4", (Caption("one", 0.0, 2.0),)),
        ("a/-_97kyZVWV0.webm", ()),  # without captions, behind those of the JSON file
    ]
    reason = "a caption without text or without usable times"
    assert places(missing["train"]) == [
        ("caption.json:3", "nVbIUDjzWY4, caption 1", reason),
        ("caption.json:3", "nVbIUDjzWY4, caption 2", reason),
        ("caption.json:4", "CTPAZ2euJ2Q", "no file"),
    ]
    assert classes is None


def test_audioset(imported):
    samples, missing, classes = imported("audioset")
    assert classes == ["Speech", "Male speech, man speaking", "Clatter"]
    assert labels(samples["balanced_train"]) == {
        "--PJHxphWEs_30000.flac": (0, 2),
        "x/Y--ZhevVpy1s.wav": (1,),
        "--aE2O5G5WE.mp4": (0, 1, 2),  # the video before the sound
    }
    assert {(s.start, s.end) for _, s in samples["balanced_train"]} == {(0.0, None)}
    assert places(missing["balanced_train"]) == [("balanced_train_segments.csv:7", "-0RWZT-miFs", "no file")]
    assert labels(samples["eval"]) == {"-5EVALclip0.wav": (0,)}


@pytest.mark.parametrize(
    "name",
    ["a_7000.wav", "a_7000_15500.mp4", "a_7_16.wav", "a_000007.mp4", "a_7.000.wav", "a_7.0.flac", "Ya.wav", "a.ogg"],
)
def test_names_of_audioset_files(imported, name):
    name = name.replace("a", "-5EVALclip0", 1)
    samples, _, _ = imported("audioset", "eval", media=["clips/" + name, "clips/-5EVALclip.wav"])
    assert "clips/" + name in labels(samples["eval"]) or name.startswith("-5EVALclip0.")  # which lies twice


def test_parts_of_whole_videos(imported):
    samples, missing, _ = imported("audioset", "balanced_train", whole_videos=True)
    assert [(path, s.start, s.end) for path, s in samples["balanced_train"]] == [("--aE2O5G5WE.mp4", 0.0, 10.0)]
    assert len(missing["balanced_train"]) == 3
    twice = KINETICS["val.csv"] + "abseiling,lqciwm6gDrk,700,709.5,val,0\n"
    samples, _, _ = imported(
        "kinetics400",
        "val",
        files={"val.csv": twice},
        media=["v/lqciwm6gDrk.webm", "v/_P_1FroaCdc.mp4"],
        folder="y",
        whole_videos=True,
    )
    assert [(path, s.start, s.end, s.label) for path, s in samples["val"]] == [
        ("v/_P_1FroaCdc.mp4", 0.0, 10.0, 1),
        ("v/lqciwm6gDrk.webm", 659.0, 669.0, 0),
        ("v/lqciwm6gDrk.webm", 700.0, 709.5, 0),
    ]
    assert len({s.id for _, s in samples["val"]}) == 3


def test_kinetics(imported):
    samples, missing, classes = imported("kinetics400")
    assert classes == ["abseiling", "air drumming", "massaging person's head", "petting animal (not cat)"]
    assert labels(samples["train"]) == {
        "train/abseiling/-3B32lodo2M_000059_000069.mp4": 0,
        "train/petting_animal_(not_cat)/--nQbRBEz2s.mp4": 3,
    }
    assert labels(samples["val"]) == {
        "val/air drumming/_P_1FroaCdc_000000_000010.mkv": 1,
        "val/abseiling/lqciwm6gDrk_659_669.mp4": 0,
    }
    assert labels(samples["test"]) == {"test/--6bJUbfpnQ_000017_000027.mp4": None}
    assert places(missing["train"]) == [
        ("train.csv:3", "_dbcJuKJQNs_000040_000050", "no file"),
        ("train.csv:5", "-3B32lodo2M_000059_000069", "a file that an earlier row names"),
    ]


def test_kinetics_classes_of_a_list(imported, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("abseiling\napplauding\nair drumming\n")
    samples, _, classes = imported("kinetics700", "val", files={"k.csv": KINETICS["val.csv"]}, classes=path)
    assert sorted(labels(samples["val"]).values()) == [0, 2]
    assert classes == ["abseiling", "applauding", "air drumming"]


MEDIA["kinetics600"] = MEDIA["kinetics700"] = MEDIA["kinetics400"]


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", "])
def test_path_label_lists(imported, separator):
    rows = ["val/air drumming/_P_1FroaCdc_000000_000010.mp4", "lqciwm6gDrk_659_669", "not,here.mp4"]
    lines = "".join(f"{row}{separator}{i + 7}\n" for i, row in enumerate(rows))
    samples, missing, classes = imported("kinetics400", "val", files={"k_val.csv": lines, "k_train.csv": "x 1\n"})
    assert labels(samples["val"]) == {
        "val/air drumming/_P_1FroaCdc_000000_000010.mkv": 7,
        "val/abseiling/lqciwm6gDrk_659_669.mp4": 8,
    }
    assert places(missing["val"]) == [("k_val.csv:3", "not,here.mp4", "no file")]
    assert classes is None


def test_moments(imported):
    samples, missing, classes = imported("moments")
    assert classes == ["clapping", "adult+female+singing", "blocking"]
    assert labels(samples["train"]) == {
        "training/blocking/getty-karate-video-id635808620_4.mp4": 2,
        "training/clapping/yt-5of6ffo6-Bw_205.mp4": 0,
    }
    name = "adult+female+singing/yt-5of6ffo6-Bw_205.mp4"  # its namesake in another class's folder is another file
    assert places(missing["train"]) == [("trainingSet.csv:3", name, "no file")]
    assert labels(samples["val"]) == {"validation/clapping/yt-5of6ffo6-Bw_205.mp4": 0}


def test_three_splits_of_ucf101(imported):
    samples, missing, classes = imported("ucf101", media=["YoYo/v_YoYo_g03_c01.avi"])
    assert classes == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    for fold in (1, 2, 3):
        train, test = labels(samples[f"train{fold}"]), labels(samples[f"test{fold}"])
        assert {**train, **test} == {clip: i // 3 for i, clip in enumerate(UCF_CLIPS)}
        assert not train.keys() & test.keys()
        assert all(f"_g0{fold}_" in clip for clip in test)
    assert not any(missing.values())
    tests = [set(labels(samples[f"test{fold}"])) for fold in (1, 2, 3)]
    assert all(not a & b for a, b in itertools.combinations(tests, 2))


@pytest.mark.parametrize("folder", ["HandstandPushups", "HandStandPushups"])
@pytest.mark.parametrize(("listed", "on_disk"), [("Stand", "stand"), ("stand", "Stand")])
def test_the_two_spellings_of_a_class_of_ucf101(imported, folder, listed, on_disk):
    files = {**FILES["ucf101"], "testlist01.txt": f"{folder}/v_Hand{listed}Pushups_g01_c02.avi\n"}
    media = f"HandstandPushups/v_Hand{on_disk}Pushups_g01_c02.avi"
    samples, _, classes = imported("ucf101", "test1", files=files, media=[media])
    assert labels(samples["test1"]) == {media: 1}
    assert classes[1] == "HandstandPushups"


def test_three_splits_of_hmdb51(imported):
    samples, missing, classes = imported("hmdb51")
    assert classes == ["brush_hair", "cartwheel", "fencing"]
    used = {
        f"{n}/{c}": classes.index(n) for n, clips in HMDB_CLIPS.items() for c in clips if not c.startswith("unused")
    }
    for fold in (1, 2, 3):
        train, test = labels(samples[f"train{fold}"]), labels(samples.get(f"test{fold}", []))
        assert {**train, **test} == used
        assert not train.keys() & test.keys()
    assert not any(missing.values())


def test_five_folds_of_esc50(imported):
    samples, _, classes = imported("esc50")
    assert classes == ["dog", "rooster", "door_wood_knock"]
    everything = {row.split(",")[0]: int(row.split(",")[2]) for row in ESC_CSV.splitlines()[1:]}
    tests = [labels(samples[f"test{fold}"]) for fold in range(1, 6)]
    assert {k: v for test in tests for k, v in test.items()} == everything
    assert sum(map(len, tests)) == len(everything)
    for fold, test in enumerate(tests, 1):
        assert all(name.startswith(f"{fold}-") for name in test)
        assert labels(samples[f"train{fold}"]) == {k: v for k, v in everything.items() if k not in test}


def test_youcook2(imported):
    samples, missing, classes = imported("youcook2")
    assert [(path, s.start, s.end, s.captions) for path, s in samples["train"]] == [
        (
            "training/113/GLd3aX16zBg.mp4",
            start,
            end,
            (Caption(text, start, end),),
        )
        for start, end, text in [
            (90.0, 102.0, "spread margarine on two slices of white bread"),
            (114.0, 127.5, "place a slice of cheese on the bread"),
        ]
    ]
    assert [path for path, _ in samples["val"]] == ["validation/212/9GX8f5EwwE4.mkv"]
    file = "youcookii_annotations_trainval.json"
    assert places(missing["val"]) == [(f"{file}:0O4bxhpFX9o.annotations[0]", "0O4bxhpFX9o", "no file")]
    assert classes is None


@pytest.mark.parametrize("table", [None, MSRVTT_TEST_SEMICOLON])
def test_msrvtt(imported, table):
    files = FILES["msrvtt"] | ({"MSRVTT_JSFUSION_test.csv": table} if table else {})
    samples, _, _ = imported("msrvtt", files=files)
    both = (Caption("a woman creating a fondant baby", 0.0, 14.75), Caption("someone makes a flower", 0.0, 14.75))
    car = (Caption("a car is shown", 0.0, 11.72), Caption("a red car", 0.0, 11.72))
    found = {split: [(path, s.captions) for path, s in rows] for split, rows in samples.items()}
    assert found == {
        "train9k": [("TrainValVideo/video0.mp4", car)],
        "train7k": [("TrainValVideo/video0.mp4", car)],
        "test1k": [("TestVideo/video7020.mp4", (Caption("a woman, creating a flower", 0.0, 14.75),))],
        "train": [("TrainValVideo/video0.mp4", car)],
        "val": [("video6513.mp4", ())],
        "test": [("TestVideo/video7020.mp4", both)],
    }


def test_imagenet(imported):
    samples, _, classes = imported("imagenet")
    assert classes == ["n01440764", "n01443537"]
    assert labels(samples["train"]) == {
        "ILSVRC/train/n01440764/n01440764_10026.JPEG": 0,
        "ILSVRC/train/n01443537/n01443537_2.JPEG": 1,
    }
    assert labels(samples["val"]) == {"ILSVRC/val/n01443537/ILSVRC2012_val_00000293.JPEG": 1}


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    import av

    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 48, "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 200, np.uint8), format="rgb24").reformat(format="yuvj420p")
    frame.pts = 0
    content = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    path = tmp_path / "val" / "n01443537" / "ILSVRC2012_val_00000293.JPEG"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (result,) = import_dataset("imagenet", media=tmp_path, out=tmp_path / "out", splits=["val"])
    clip = decode_clip(read_manifest(result.manifest)[0].path, 0.0, num_frames=4)
    assert (clip.num_real_frames, clip.audio) == (1, None)
    assert clip.video.shape == (4, 48, 64, 3)
    assert (clip.video.float() - 200).abs().max() <= 2


def test_byte_order_marks_and_line_ends_change_nothing(imported):
    for name, files in FILES.items():
        plain, *_ = imported(name, folder=f"{name}-plain")
        windows = {file: "\ufeff" + text.replace("\r\n", "\n").replace("\n", "\r\n") for file, text in files.items()}
        dressed, *_ = imported(name, folder=f"{name}-windows", files=windows)
        for split, rows in plain.items():
            assert [(p, s.label, s.captions, s.start, s.end) for p, s in rows] == [
                (p, s.label, s.captions, s.start, s.end) for p, s in dressed[split]
            ]


def test_the_media_folder_is_walked_once_and_files_are_not_asked_for(imported, monkeypatch):
    calls = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **kw: calls.append(str(path)) or real(path, *args, **kw))
    many = "".join(f'a{i:010d}, 0.000, 10.000, "/m/09x0r"\n' for i in range(500))
    imported(
        "audioset", "eval", files=FILES["audioset"] | {"eval_segments.csv": many + '-5EVALclip0, 0, 1, "/m/09x0r"\n'}
    )
    assert len([call for call in calls if "/media" in call]) < 10


def test_links_into_a_parent_end(imported, tmp_path):
    annotations, media = lay_out(tmp_path / "links", "esc50")
    (media / "loop").symlink_to(media)
    (media / "\udcff").mkdir()
    (media / "\udcff" / "x.wav").touch()
    (result,) = import_dataset("esc50", annotations=[annotations], media=media, out=tmp_path / "o", splits=["test1"])
    assert result.num_samples == 4


def test_another_class_list_is_not_overwritten(tmp_path):
    annotations, media = lay_out(tmp_path, "kinetics400")
    list(import_dataset("kinetics400", annotations=[annotations], media=media, out=tmp_path / "out", splits=["val"]))
    with pytest.raises(ManifestError, match=r"classes\.txt: the class list must be that of this import, got another"):
        list(
            import_dataset(
                "kinetics400", annotations=[annotations / "val.csv"], media=media, out=tmp_path / "out", splits=["val"]
            )
        )


def test_command(tmp_path, capsys):
    annotations, media = lay_out(tmp_path, "kinetics400")
    argv = [
        "data",
        "import",
        "kinetics400",
        "--annotations",
        str(annotations / "train.csv"),
        str(annotations / "val.csv"),
    ]
    argv += ["--media", str(media), "--out", str(tmp_path / "out"), "--split", "train", "val"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("train.jsonl: 2 samples of 4 classes (not 400: are all annotation files there?)")
    assert [line.partition(".jsonl: ")[2] for line in lines[1:3]] == [
        "1 left out, no file",
        "1 left out, a file that an earlier row names",
    ]
    assert not list((tmp_path / "out").glob(".*"))
    assert main(["data", "import", "kinetics500", "--media", "m", "--out", "o"]) == 2
    assert "--name must be one of 'howto100m'" in capsys.readouterr().err
    assert main(["data", "inport"]) == 2
    assert "vatt data: the subcommand must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "import", "--help"])
    out = capsys.readouterr().out
    assert [name for name in DATASETS if f"\n  {name} " not in out] == []
