"""WebDataset shards are read as webdataset reads them, and what is damaged is named."""

from __future__ import annotations

import gzip
import io
import tarfile
from functools import cache
from pathlib import Path

import braceexpand
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tomevit.config import Preprocess
from tomevit.data.shards import Batch, expand_braces, find_shards, samples, stream_samples
from tomevit.errors import ImageError
from tomevit.tasks.demo import held_out
from tomevit.transform import Transform

GREY = Transform(Preprocess(mean=(0.3,), std=(0.4,), crop_pct=1.0), (8, 8))


@cache
def digit(number: int) -> bytes:
    """A held-out digit as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(held_out()[0][number, 0].numpy()).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]], kind: str = "w") -> Path:
    with tarfile.open(path, kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_digits(path: Path, numbers: range) -> Path:
    """With webdataset's own writer: an image and a label under each key."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            writer.write({"__key__": f"digit/{number:03}", "png": digit(number), "cls": b"3"})
    return path


MEMBERS = [
    ("./a/000.jpg", b"0"),
    ("./a/000.json", b"{}"),
    ("b.d/001.seg.png", b"wrong"),
    ("b.d/001.PNG", b"1"),
    ("b.d/001.left.png", b"wrong"),
    ("002.left.webp", b"2"),
    ("002.right.webp", b"wrong"),
    ("__index__", b"meta"),
    ("__meta__/003.jpg", b"meta"),
    ("no_kind", b"skipped"),
    (".hidden.jpg", b"skipped"),
    ("004.txt", b"text"),
    ("004.cls", b"7"),
    ("000.jpg", b"5"),
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", MEMBERS)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    ours = list(samples(path))
    assert [(sample.key, sorted(sample.kinds)) for sample in ours] == [
        (sample["__key__"], sorted(name for name in sample if not name.startswith("__"))) for sample in theirs
    ]
    assert [sample.image for sample in ours] == [b"0", b"1", b"2", None, b"5"]
    assert [sample.name for sample in ours] == ["./a/000.jpg", "b.d/001.PNG", "002.left.webp", "004", "000.jpg"]
    for begin in range(len(ours) + 2):
        assert list(samples(path, begin)) == ours[begin:]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_shards_may_be_compressed(kind: str, tmp_path: Path) -> None:
    path = write_shard(tmp_path / f"a.tar.{kind}", MEMBERS, f"w:{kind}")
    assert find_shards(path) == [str(path)]
    assert list(samples(path, 1)) == list(samples(write_shard(tmp_path / "a.tar", MEMBERS), 1))


def test_folders_and_links_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("f.jpg")
        tar.addfile(info)
    assert [sample.key for sample in samples(tmp_path / "a.tar")] == ["f"]


def damaged(path: Path, change: str) -> Path:
    data = bytearray(path.read_bytes())
    block = tarfile.BLOCKSIZE
    if change == "cut in an image":
        del data[5 * block + 40 :]
    elif change == "cut in a header":
        del data[4 * block + 100 :]
    elif change == "a header overwritten":
        data[4 * block : 4 * block + 8] = b"\xff" * 8
    elif change == "text":
        data[:] = b"<html>404</html>\n" * 99
    elif change == "empty":
        data.clear()
    elif change == "no members":
        data[:] = bytes(20 * block)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("change", "says", "before"),
    [
        ("cut in an image", "damaged after 2 samples: unexpected end of data", 2),
        ("cut in a header", "damaged after 2 samples: no header where one should be", 2),
        ("a header overwritten", "damaged after 2 samples: no header where one should be", 2),
        ("text", "damaged, or no tar file", 0),
        ("empty", "damaged, or no tar file", 0),
        ("no members", "there are no samples in it", 0),
    ],
)
def test_damaged_shards_give_what_stands_in_front_and_say_so(
    change: str, says: str, before: int, tmp_path: Path
) -> None:
    members = [(f"{i}.png", digit(i)) for i in range(4)]  # each a block for its header and one for its data
    assert all(len(data) <= tarfile.BLOCKSIZE for _, data in members)
    path = damaged(write_shard(tmp_path / "a.tar", members), change)
    found = []
    with pytest.raises(ImageError, match=says) as caught:
        found.extend(append_to(found, path))
    assert [sample.image for sample in found] == [digit(i) for i in range(before)]
    assert caught.value.path == str(path)
    assert "\n" not in caught.value.reason
    batches = list(stream_samples([str(path)], GREY, batch=2))
    assert [key for batch in batches for key in batch.keys] == [str(i) for i in range(before)]
    assert [name for batch in batches for name in batch.unreadable] == [(str(path), caught.value.reason)]
    assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]


def append_to(found: list, path: Path) -> list:
    for sample in samples(path):
        found.append(sample)  # noqa: PERF402
    return []


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.tar: No such file or directory"):
        list(samples(tmp_path / "none.tar"))


PLAIN = io.BytesIO()
with tarfile.open(fileobj=PLAIN, mode="w", format=tarfile.PAX_FORMAT) as _tar:
    for _name in ("a.png", "b.jpg", "ü" * 120 + ".png"):
        _info = tarfile.TarInfo(_name)
        _info.size = 700
        _tar.addfile(_info, io.BytesIO(bytes(range(250)) * 3))


@settings(max_examples=300)
@given(packed=st.booleans(), cut=st.floats(0, 1), at=st.floats(0, 0.55), noise=st.binary(min_size=0, max_size=12))
def test_whatever_is_damaged_it_is_samples_or_an_error(
    packed: bool, cut: float, at: float, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(gzip.compress(PLAIN.getvalue(), mtime=0) if packed else PLAIN.getvalue())
    del data[round(cut * len(data)) :]
    place = round(at * len(data))
    data[place : place + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(data)
    try:
        found = list(samples(path))
    except ImageError:
        return
    assert found


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "pattern",
    [
        "a.tar",
        "a-{000..003}.tar",
        "a-{8..11}.tar",
        "{x,y}/a-{08..11}.tar",
        "a-{3..1}.tar",
        "a{b,{c,d}e}.tar",
        "{0..2}{a,}",
        "a{b}.tar",
        "{}.tar",
    ],
)
def test_braces_are_expanded_as_webdataset_does(pattern: str) -> None:
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


def test_braces_of_a_name_that_exists_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "{1..3}.tar"
    path.touch()
    assert expand_braces(str(path)) == [str(path)]


def test_what_is_a_shard(tmp_path: Path) -> None:
    for name in ("s/b.tar", "s/a.TGZ", "s/notes.txt", "i/1.jpg", "both/a.tar", "both/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [Path(shard).name for shard in find_shards(tmp_path / "s")] == ["a.TGZ", "b.tar"]
    assert find_shards(tmp_path / "s" / "*.tar") == [str(tmp_path / "s" / "b.tar")]
    assert find_shards(tmp_path / "s" / "*") == []
    assert find_shards(tmp_path / "i") == []
    with pytest.raises(ValueError, match="holds both shards and images"):
        find_shards(tmp_path / "both")
    with pytest.raises(ValueError, match=r"c\.tar: No such file or directory"):
        find_shards(tmp_path / "c.tar")


# -------------------------------------------------------------------------------------------------------------- stream


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Of 7, 4 and 0 samples that can be read, and some that cannot."""
    write_digits(tmp_path / "0.tar", range(7))
    members = [(f"{i}.png", digit(i)) for i in (20, 21)] + [("22.jpg", b"no image"), ("23.txt", b""), ("23.cls", b"")]
    write_shard(tmp_path / "1.tar", [*members, *((f"{i}.png", digit(i)) for i in (24, 25))])
    (tmp_path / "2.tar").write_bytes(b"no shard")
    return [str(tmp_path / f"{i}.tar") for i in range(3)]


def by_shard(batches: list[Batch], count: int) -> list[list[Batch]]:
    return [[batch for batch in batches if batch.shard == shard] for shard in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 7, 32])
def test_a_stream_has_every_sample_in_order_or_says_why_not(workers: int, size: int, shards: list[str]) -> None:
    found = by_shard(list(stream_samples(shards, GREY, batch=size, workers=workers)), 3)
    for batches in found:
        assert [batch.first for batch in batches] == [i * size for i in range(len(batches))]
        assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
        for batch in batches:
            assert len(batch.keys) == len(batch.images) <= size
    assert [[key for batch in batches for key in batch.keys] for batches in found] == [
        [f"digit/{i:03}" for i in range(7)],
        ["20", "21", "24", "25"],
        [],
    ]
    for batches, numbers in zip(found, (range(7), (20, 21, 24, 25)), strict=False):
        images = torch.cat([batch.images for batch in batches if batch.keys])
        assert torch.equal(images, GREY(held_out()[0][list(numbers)]))
    assert [name for batches in found for batch in batches for name in batch.unreadable] == [
        (f"{shards[1]}/22.jpg", "not an image of a known format"),
        (f"{shards[1]}/23", "no image in this sample, which holds txt, cls"),
        (shards[2], "damaged, or no tar file"),
    ]


def test_a_stream_goes_on_anywhere(shards: list[str]) -> None:
    whole = by_shard(list(stream_samples(shards, GREY, batch=2)), 3)
    again = by_shard(list(stream_samples(shards, GREY, batch=2, begin=[(1, 4), (0, 2)])), 3)
    for ours, theirs in zip(again, (whole[0][1:], whole[1][2:], []), strict=True):
        assert [(batch[:3], batch[4:]) for batch in ours] == [(batch[:3], batch[4:]) for batch in theirs]
        assert all(torch.equal(a.images, b.images) for a, b in zip(ours, theirs, strict=True))
