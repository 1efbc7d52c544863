"""Which class each image has, in every layout that ImageNet comes in; what is not certain is refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from benchmarks.peers import timm
from tomevit.data.labelled_images import (
    Labelled,
    ilsvrc_wnids,
    imagenet_classes,
    is_imagenet,
    labelled,
    read_class_names,
)

WNIDS = sorted(ilsvrc_wnids())
#: The classes of the first validation images: Kaggle's ids, the numbers of the ground truth, and models' outputs.
FIRST = {
    "n01751748": (490, 65),
    "n09193705": (361, 970),
    "n02105855": (171, 230),
    "n04263257": (822, 809),
    "n03125729": (297, 516),
    "n01735189": (482, 57),
    "n02346627": (13, 334),
    "n02776631": (704, 415),
}
OUTPUTS = [output for _, output in FIRST.values()]


def tree(root: Path, *names: str, **texts: str) -> Path:
    """Empty images, and files with text (name and suffix are joined by two underscores)."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, text in texts.items():
        path = root / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def validation(count: int = len(FIRST)) -> list[str]:
    return [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, count + 1)]


def by_name(found: Labelled) -> dict[str, int]:
    return {Path(file).name: label for file, label in zip(found.files, found.labels, strict=True)}


def test_the_order_of_imagenet() -> None:
    theirs = files(timm).joinpath("data", "_info", "imagenet_synsets.txt").read_text().split()
    assert list(imagenet_classes()) == theirs
    assert len(set(ilsvrc_wnids())) == 1000
    for wnid, (number, output) in FIRST.items():
        assert ilsvrc_wnids()[number - 1] == wnid
        assert imagenet_classes()[wnid] == output


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    tree(tmp_path, "cat/2.jpg", "cat/deep/1.PNG", "ape/3.jpeg", "bee/4.webp", "ape/notes.txt", ".cache/5.jpg")
    found = labelled(tmp_path, 3)
    assert by_name(found) == {"3.jpeg": 0, "4.webp": 1, "1.PNG": 2, "2.jpg": 2}
    assert "sorted by name" in found.how
    found = labelled(tmp_path, 3, ("cat", "ape", "bee"))
    assert by_name(found) == {"3.jpeg": 1, "4.webp": 2, "1.PNG": 0, "2.jpg": 0}
    assert "named as the model's classes" in found.how
    assert not found.notes
    found = labelled(tmp_path, 4, ("dog", "cat", "ape", "bee"))
    assert found.labels == [2, 3, 1, 1]
    assert found.notes == ("Images of 3 classes; answers are among all 4.",)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "1.jpg")
    tree(tmp_path / "set", "b/2.jpg")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    assert labelled(tmp_path / "set", 2).labels == [0, 1]


@pytest.mark.parametrize("place", ["", "val", "validation", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val"])
@pytest.mark.parametrize("names", [(), ("tench, Tinca tinca", *WNIDS[1:999], "toilet tissue, toilet paper")])
def test_wordnet_ids_in_every_place(place: str, names: tuple[str, ...], tmp_path: Path) -> None:
    tree(tmp_path / place, *(f"{wnid}/{wnid}.JPEG" for wnid in FIRST))
    if place:
        tree(tmp_path, "train/n01440764/1.JPEG")
    found = labelled(tmp_path, 1000, names)
    assert by_name(found) == {f"{wnid}.JPEG": output for wnid, (_, output) in FIRST.items()}
    assert found.notes == ("Images of 8 classes; answers are among all 1000.",)


def test_numbered_folders_of_an_imagenet_model_are_outputs(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{i}/{i}.jpg" for i in range(12)))  # as ImageNetV2 has them, of which text puts 10 before 2
    assert by_name(labelled(tmp_path, 1000)) == {f"{i}.jpg": i for i in range(12)}


SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"{Path(name).stem},{wnid} 1 2 499 272 {wnid} 5 6 7 8 \n"
    for name, wnid in reversed(list(zip(validation(), FIRST, strict=True)))
)
NUMBERS = "".join(f"{number}\n" for number, _ in FIRST.values())
TRUTHS = {
    "LOC_val_solution.csv": SOLUTION,
    "solution.txt": SOLUTION,
    "ILSVRC2012_validation_ground_truth.txt": NUMBERS,
    "ILSVRC2015_clsloc_validation_ground_truth.txt": NUMBERS,
    "renamed.txt": NUMBERS,  # known by how it begins
    "imagenet_2012_validation_synset_labels.txt": "\n".join(FIRST),
    "val.txt": "".join(f"{name} {output}\n" for name, output in zip(validation(), OUTPUTS, strict=True)),
    "zip.txt": "".join(f"val.zip@/{name} {output}\n" for name, output in zip(validation(), OUTPUTS, strict=True)),
    "tab.tsv": "".join(f"{name}\t{wnid}\n" for name, wnid in zip(validation(), FIRST, strict=True)),
    "bom.csv": "\ufefffilename, label\r\n"
    + "".join(f"{name}, {output}\r\n" for name, output in zip(validation(), OUTPUTS, strict=True)),
    "outputs.txt": "\n".join(map(str, OUTPUTS)),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_flat_folder_and_every_list_of_classes(name: str, tmp_path: Path) -> None:
    tree(tmp_path / "val", *validation())
    (tmp_path / name).write_text(TRUTHS[name], encoding="utf-8")
    found = labelled(tmp_path, 1000, truth=tmp_path / name)
    assert [Path(file).name for file in found.files] == validation()
    assert found.labels == OUTPUTS
    assert found.how.startswith(name)
    assert not found.notes
    (tmp_path / "val" / validation()[2]).unlink()
    fewer = labelled(tmp_path, 1000, truth=tmp_path / name)
    assert fewer.labels == OUTPUTS[:2] + OUTPUTS[3:]
    assert fewer.notes == (f"{name} has 8 classes, and there are 7 images.",)


@pytest.mark.parametrize(
    ("images", "truth"),
    [
        ("ILSVRC/Data/CLS-LOC/val", "LOC_val_solution.csv"),
        ("val", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"),
        (".", "ILSVRC2012_validation_ground_truth.txt"),
        ("val", "val/imagenet_2012_validation_synset_labels.txt"),
    ],
)
def test_a_list_is_found_by_its_name(images: str, truth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / images, *validation())
    (tmp_path / truth).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / truth).write_text(TRUTHS[Path(truth).name])
    assert labelled(tmp_path, 1000).labels == OUTPUTS
    assert labelled(tmp_path / images, 1000).labels == OUTPUTS
    monkeypatch.chdir(tmp_path / images)
    assert labelled(".", 1000).labels == OUTPUTS


def test_lists_with_names_of_classes_and_paths(tmp_path: Path) -> None:
    tree(tmp_path / "set", "a/1.jpg", "b/1.jpg", "2.jpg")
    truth = tree(tmp_path, truth__csv='a/1.jpg,great white shark\nb/1.jpg,"tench, Tinca"\nfolder/2.jpg,cat\n')
    names = ("cat", "tench, Tinca", "great white shark")
    found = labelled(tmp_path / "set", 3, names, truth=truth / "truth.csv")
    assert {
        Path(f).relative_to(tmp_path / "set").as_posix(): i for f, i in zip(found.files, found.labels, strict=True)
    } == {
        "a/1.jpg": 2,
        "b/1.jpg": 1,
        "2.jpg": 0,
    }


REFUSED = {
    "no folder": ((), {}, (10,), "there is no such folder"),
    "no classes": (("a/1.jpg",), {}, (0,), "0 classes"),
    "nothing there": (("notes.txt",), {}, (10,), "no image in this folder"),
    "an empty class": (("a/1.jpg", "b/notes.txt"), {}, (2,), "b: no image in this folder"),
    "both": (("a/1.jpg", "2.jpg"), {}, (2,), "both folders and images, as a/ and 2.jpg"),
    "no list": (
        (validation()[0],),
        {},
        (1000,),
        "name it with --truth, or put one of LOC_val_solution.csv, ILSVRC2012_",
    ),
    "fewer folders than classes": (("a/1.jpg", "b/1.jpg"), {}, (3,), r"are 2, as 'a', and the model's 3 classes"),
    "other names": (
        ("a/1.jpg", "b/1.jpg"),
        {},
        (2, ("a", "c")),
        "names of the model's 2 classes, such as 'a', and 'b'",
    ),
    "names for WordNet ids": (("tench/1.jpg", "n01440764/1.jpg"), {}, (1000,), "n01440764, and 'tench' is not"),
    "1000 other names": (
        tuple(f"class{i:03}/1.jpg" for i in range(1000)),
        {},
        (1000,),
        "WordNet ids of ImageNet-1k, such as n01440764, and 'class000' is not",
    ),
    "WordNet ids for 1000 other classes": (
        tuple(f"{wnid}/1.jpg" for wnid in WNIDS[:3]),
        {},
        (1000, tuple(f"class {i}" for i in range(1000))),
        "names of the model's 1000 classes",
    ),
    "numbers in which order": (tuple(f"{i}/1.jpg" for i in range(12)), {}, (12,), "in the order of text, 0, 1, 10"),
    "numbers from 1": (("1/1.jpg", "2/1.jpg"), {}, (3,), "are 2, as '1'"),
    "empty list": ((validation()[0],), {"truth__txt": "\n"}, (1000,), "is empty"),
    "of two kinds": ((*validation(2),), {"truth__txt": f"{validation()[0]} 3\n4\n"}, (1000,), "lines of two kinds"),
    "numbers of ILSVRC, unsaid": (
        (*validation(2),),
        {"truth__txt": "3\n1000\n"},
        (1000,),
        "the class 1000, and the model's are 0 to 999; the numbers of ILSVRC's own ground truth",
    ),
    "numbers of images": (
        (*validation(3),),
        {"val__txt": "".join(f"ILSVRC2012_val_{i:08} {i}\n" for i in range(1, 50001))},
        (1000,),
        "the class 50000",
    ),
    "other numbers": ((*validation(2),), {"ILSVRC2012_validation_ground_truth__txt": "3\n0\n"}, (1000,), "has '0'"),
    "another model": (
        (*validation(2),),
        {"ILSVRC2012_validation_ground_truth__txt": "3\n4\n"},
        (10,),
        "the classes of ImageNet-1k, and the model has 10 others",
    ),
    "too short": (
        (*validation(3),),
        {"truth__txt": "3\n4\n"},
        (1000,),
        "no class for 1 of 3 images, as .*00000003.JPEG",
    ),
    "whose is whose": (("a.jpg", "b.jpg"), {"truth__txt": "3\n4\n5\n"}, (10,), "which class is whose is not certain"),
    "not listed": (("a.jpg", "b.jpg"), {"truth__txt": "a.jpg 3\n"}, (10,), "no class for 1 of 2 images, as .*b.jpg"),
    "two classes": (("a.jpg",), {"truth__txt": "a.jpg 3\na.jpg 4\n"}, (10,), "two classes for a.jpg: 3 and 4"),
    "two images of one name": (
        ("x/1.jpg", "y/1.jpg"),
        {"truth__txt": "1.jpg 3\n"},
        (10,),
        "no class for 2 of 2 images",
    ),
    "unknown name": (("a.jpg",), {"truth__txt": "a.jpg cat\n"}, (2, ("ape", "bee")), "such as 'ape', and 'cat' is not"),
    "no text": (("a.jpg",), {"truth__txt": "\0"}, (10,), "text file in UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused(case: str, tmp_path: Path) -> None:
    images, texts, model, says = REFUSED[case]
    tree(tmp_path / "set", *images)
    tree(tmp_path, **texts)
    if case == "no text":
        (tmp_path / "truth.txt").write_bytes(b"\xff\xfe\x00")
    truth = next((tmp_path / name.replace("__", ".") for name in texts), None)
    with pytest.raises(ValueError, match=says) as refused:
        labelled(tmp_path / "set", *model, truth=truth)
    assert "\n" not in str(refused.value)


def test_names_of_classes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("great white shark\n\ncat \nape\n", encoding="utf-8")
    assert read_class_names(path, 3) == ("great white shark", "cat", "ape")
    with pytest.raises(ValueError, match="names 3 classes, and the model has 4"):
        read_class_names(path, 4)
    path.write_text("cat\nape\ncat\n")
    with pytest.raises(ValueError, match="'cat' twice"):
        read_class_names(path, 3)


def test_names_that_come_twice_name_no_class(tmp_path: Path) -> None:
    tree(tmp_path, "crane/1.jpg")
    with pytest.raises(ValueError, match="names of the model's 3 classes"):
        labelled(tmp_path, 3, ("crane", "cat", "crane"))


def test_other_models_of_1000_classes_are_not_imagenets() -> None:
    assert is_imagenet(1000, ())
    assert is_imagenet(1000, WNIDS)
    assert not is_imagenet(999, ())
    assert not is_imagenet(1000, WNIDS[::-1])
    assert not is_imagenet(1000, [f"class {i}" for i in range(1000)])
