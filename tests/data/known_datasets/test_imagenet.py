"""ImageNet: class folders, and flat images whose classes one of many lists knows."""

import numpy as np
import pytest

from vatt_engine.data.datasets import import_dataset
from vatt_engine.data.manifest import ManifestError, read_manifest

WNIDS = ["n01440764", "n01443537", "n01751748"]
CLASSES = [2, 0, 1]  # of the first three validation images
IDS = {"n01440764": 2, "n01443537": 3, "n01751748": 1}  # the devkit numbers classes in an order of its own
FLAT = [f"ILSVRC/val/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)]
SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{i:08d},{WNIDS[k]} 85 1 499 272 {WNIDS[k]} 1 2 3 4 \n" for i, k in enumerate(CLASSES, 1)
)


@pytest.fixture
def run(tmp_path):
    def run(annotations=None, media=FLAT, splits=(), root="media"):
        (tmp_path / "lists").mkdir(exist_ok=True)
        for name, text in (annotations or {}).items():
            (tmp_path / "lists" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        for file in media:
            (tmp_path / "media" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "media" / file).touch()
        options = {"annotations": [tmp_path / "lists"], "media": tmp_path / root, "out": tmp_path / "out"}
        results = list(import_dataset("imagenet", splits=splits, **options))
        samples = {r.split: read_manifest(r.manifest) for r in results if not r.absent}
        labels = {split: {s.path.stem: s.label for s in rows} for split, rows in samples.items()}
        classes = tmp_path / "out" / "classes.txt"
        return labels, classes.read_text().split() if classes.exists() else None

    return run


def meta_mat(path):
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "U9"), ("num_children", "f8")]
    rows = [(number, wnid, 0) for wnid, number in sorted(IDS.items(), key=lambda item: item[1])]
    savemat(path, {"synsets": np.array([*rows, (1001, "n00001740", 3)], dtype=kinds).reshape(-1, 1)})
    return path.read_bytes()


LISTS = {
    "LOC_val_solution.csv": SOLUTION,
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{WNIDS[k]}\n" for k in CLASSES),
    "val.txt": "".join(f"{WNIDS[k]}/ILSVRC2012_val_{i:08d}.JPEG {k}\n" for i, k in enumerate(CLASSES, 1)),
    "ILSVRC2012_validation_ground_truth.txt": "".join(f"{IDS[WNIDS[k]]}\n" for k in CLASSES),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_flat_folder_with_a_list(run, tmp_path, name):
    extra = {"meta.mat": meta_mat(tmp_path / "meta.mat")} if "ground" in name else {}
    labels, classes = run({name: LISTS[name]} | extra)
    expected = {f"ILSVRC2012_val_{i:08d}": k for i, k in enumerate(CLASSES, 1)}
    assert labels == {"val": expected}
    assert classes == WNIDS


def test_a_list_of_numbers_alone_takes_its_names_from_a_class_list(run):
    rows = "".join(f"ILSVRC2012_val_{i:08d}.JPEG {k}\n" for i, k in enumerate(CLASSES, 1))
    labels, classes = run({"val.txt": rows})
    assert (list(labels["val"].values()), classes) == (CLASSES, None)
    words = "".join(f"{wnid} name, other name\n" for wnid in WNIDS)
    labels, classes = run({"val.txt": rows, "LOC_synset_mapping.txt": words})
    assert (list(labels["val"].values()), classes) == (CLASSES, WNIDS)


def test_numbers_that_count_lines_are_no_classes(run):
    rows = "".join(f"ILSVRC2012_val_{i:08d} {i}\n" for i in (1, 2, 3))  # the challenge's ImageSets/CLS-LOC/val.txt
    labels, _ = run({"val.txt": rows, "LOC_val_solution.csv": SOLUTION})
    assert list(labels["val"].values()) == CLASSES
    (train, first, second) = ("train/n01440764/n01440764_1.JPEG", "n01440764/n01440764_1 1\n", "n01751748/x_2 2\n")
    labels, _ = run({"train_cls.txt": first + second, "train_loc.txt": first + second}, media=[train])
    assert labels["train"] == {"n01440764_1": 0}


def test_a_subset_of_images_has_the_numbers_of_the_whole_set(run):
    labels, classes = run({"LOC_val_solution.csv": SOLUTION}, media=["train/n01751748/n01751748_7.JPEG", *FLAT])
    assert labels["train"] == {"n01751748_7": 2}
    assert classes == WNIDS


def test_the_media_folder_may_be_that_of_a_split(run):
    labels, _ = run(media=["train/n01751748/a.JPEG", "train/n01440764/b.JPEG"], root="media/train")
    assert labels == {"train": {"a": 1, "b": 0}}


def test_the_media_folder_may_be_that_of_a_split_and_flat(run):
    labels, _ = run({"LOC_val_solution.csv": SOLUTION}, root="media/ILSVRC/val")
    assert list(labels["val"].values()) == CLASSES


def test_flat_training_images_have_their_class_in_their_name(run):
    labels, _ = run(media=["train/n01751748_9.JPEG", "train/n01440764_3.JPEG"])
    assert labels == {"train": {"n01751748_9": 1, "n01440764_3": 0}}


def test_the_message_says_what_lies_there(run, tmp_path):
    with pytest.raises(ManifestError) as error:
        run()
    assert str(error.value).splitlines()[1] == (
        f"{tmp_path}/media: media must hold images in val/<wnid>/, got 3 images in ILSVRC/val itself."
        " Give LOC_val_solution.csv, or the devkit's ground truth and meta.mat, with --annotations."
    )
    with pytest.raises(ManifestError, match=r"must hold the devkit's meta\.mat, which says what the numbers"):
        run({"ILSVRC2012_validation_ground_truth.txt": LISTS["ILSVRC2012_validation_ground_truth.txt"]})
    for wrong in (b"", b"no matrix", bytes(200)):
        with pytest.raises(ManifestError, match=r"meta\.mat:1: the file must be that of the ILSVRC2012 devkit"):
            run({"meta.mat": wrong})
    with pytest.raises(ManifestError, match=r"one list of the split val, got .* Name the one to read"):
        run({"LOC_val_solution.csv": SOLUTION, "LOC_val_solution_2.csv": SOLUTION + "\n"})
