"""Shards and lists of labels that are damaged, hostile, or as other systems write them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.faults.special import SPECIAL, each_special
from tests.outcomes import survives
from tests.tools.test_shards import GREY, digit, write_shard
from tomevit.data.labelled_images import labelled, read_class_names
from tomevit.data.shards import MOST, Sample, expand_braces, find_shards, samples, stream_samples
from tomevit.errors import ImageError

LARGE = survives(
    "images",
    "a sparse member in a shard (10 kB that expand to gigabytes), or one larger than any image",
    "is a line of the report; all others are read, in no more memory",
)
LYING = survives(
    "images",
    "a shard whose headers lie: sizes beyond its end, negative ones, headers of headers, records without sense",
    "samples in front of that are kept, the damage is named, in bounded time and memory",
)
BOMB = survives("images", "a compressed shard that expands without end", "is named as such after a few hundred MB")
NO_FILE = survives(
    "images", "a pipe, a device, a socket or a folder with a shard's name", "is named, and never waited for"
)
ONE_KEY = survives(
    "images",
    "samples of a shard that share a key, at once or later, and samples of several images",
    "each sample is one, as in webdataset; an image beyond the first of a sample is named as left out",
)
WINDOWS = survives(
    "images",
    "a list of labels from Windows: CRLF, BOM, UTF-16, backslashes, semicolons, quotes, Ctrl-Z",
    "is read as one of Linux",
)
NO_LIST = survives(
    "images",
    "a list of labels in another encoding, without end, or that is no file",
    "is one sentence, with the line",
)


# ------------------------------------------------------------------------------------------------------------- hostile


def pax(records: dict[str, object], kind: bytes = tarfile.XHDTYPE) -> bytes:
    body = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest)
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return header("pax", len(body), kind) + padded(body)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def sparse(name: str, stored: bytes, expands: int) -> bytes:
    """A member as GNU tar stored it first: all but its beginning is a hole."""
    block = bytearray(header(name, len(stored), tarfile.GNUTYPE_SPARSE))
    block[345:] = bytes(512 - 345)
    numbers = [(386, 0), (398, len(stored)), (410, expands), (422, 0)]
    for at, number in (*numbers, (483, expands)):
        block[at : at + 12] = f"{number:011o}\0".encode()
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + padded(stored)


END = bytes(1024)
FIRST, LAST = member("0.png", digit(0)), member("9.png", digit(9))
GIGABYTES = 3 * 2**30
#: A shard with a member in its middle that is not worth its size: only that member is lost.
OVERSIZED: dict[str, bytes] = {
    "sparse as of old": sparse("1.png", b"\1" * 512, GIGABYTES),
    "sparse 0.0": pax({"GNU.sparse.size": GIGABYTES, "GNU.sparse.numblocks": 1}) + member("1.png", b"\1" * 512),
    "sparse 0.1": pax({"GNU.sparse.map": f"0,512,{GIGABYTES},0", "GNU.sparse.size": GIGABYTES})
    + member("1.png", b"\1" * 512),
    "sparse 1.0": pax({
        "GNU.sparse.major": 1,
        "GNU.sparse.minor": 0,
        "GNU.sparse.name": "1.png",
        "GNU.sparse.realsize": GIGABYTES,
    })
    + member("GNUSparseFile.0/1.png", padded(f"2\n0\n512\n{GIGABYTES}\n0\n".encode()) + b"\1" * 512),
}  # fmt: skip
#: What follows the first sample, and makes no sense.
SENSELESS: dict[str, bytes] = {
    "a size beyond the end": header("1.png", 2**33 - 1) + b"\1" * 2000,
    "a size of petabytes": header("1.png", 2**60) + b"\1" * 2000,
    "a negative size": pax({"size": -2048}) + member("1.png", b"\1"),
    "a negative number in base 256": header("1.png", 0)[:124] + b"\xff" * 12 + header("1.png", 0)[136:],
    "a size that is no number": pax({"size": "1e9"}) + member("1.png", b"\1"),
    "a huge extended header": header("pax", 2**33 - 1, tarfile.XHDTYPE) + b"\1" * 2000,
    "a huge long name": header("name", 2**31, tarfile.GNUTYPE_LONGNAME) + b"a" * 2000,
    "a record of no length": header("pax", 512, tarfile.XHDTYPE) + padded(b"0 path=a\n") + member("1.png", b""),
    "a record beyond its header": header("pax", 512, tarfile.XHDTYPE) + padded(b"9999 path=a\n") + member("1.png", b""),
    "a map without end": sparse("1.png", b"", 0)[:482] + b"\1" + sparse("1.png", b"", 0)[483:] + b"\1" * 2000,
    "headers of headers": header("name", 1, tarfile.GNUTYPE_LONGNAME) * 5000 + b"no header",
    "digits without end": (header("pax", 2**17, tarfile.XHDTYPE) + b"1" * 2**17) * 8 + b"no header",
}


def shard(path: Path, *pieces: bytes) -> Path:
    path.write_bytes(b"".join(pieces))
    return path


def collected(path: Path) -> tuple[list[Sample], str]:
    """The samples of a shard, and what it is said to suffer from."""
    found: list[Sample] = []
    try:
        for sample in samples(path):
            found.append(sample)  # noqa: PERF402
    except ImageError as error:
        return found, error.reason
    return found, ""


@LARGE
@pytest.mark.parametrize("kind", OVERSIZED)
def test_a_sparse_member_is_named_and_not_read(kind: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", FIRST, OVERSIZED[kind], LAST, END)
    (batch,) = stream_samples([str(path)], GREY)
    assert batch.keys == ["0", "9"]
    assert batch.unreadable == [(f"{path}/1.png", "it is stored as a sparse file, which is not read")]


@LARGE
def test_a_member_larger_than_any_image_is_named_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(FIRST + header("1.png", 2**32))
        file.seek(2**32, os.SEEK_CUR)
        file.write(header("2.json", 2**33 - 512))  # what is no image may be as large as it likes
        file.seek(2**33 - 512, os.SEEK_CUR)
        file.write(LAST + END)
    (batch,) = stream_samples([str(path)], GREY)
    assert batch.keys == ["0", "9"]
    assert batch.unreadable == [
        (f"{path}/1.png", f"it has 4,294,967,296 bytes, more than the {MOST:,} that are read"),
        (f"{path}/2", "no image in this sample, which holds json"),
    ]


@LYING
@pytest.mark.parametrize("kind", SENSELESS)
def test_headers_that_lie_end_a_shard_after_what_is_whole(kind: str, tmp_path: Path) -> None:
    began = time.perf_counter()
    found, reason = collected(shard(tmp_path / "a.tar", FIRST, SENSELESS[kind], LAST))
    assert [sample.image for sample in found if not sample.problem] == [digit(0)]
    assert reason.startswith("damaged after ")
    assert "\n" not in reason
    assert time.perf_counter() - began < 5


CHILD = """
import json, resource, sys, time
from tomevit.data import shards
from tomevit.data.shards import samples
from tomevit.errors import ImageError
shards.EXPANDED = 2**26  # the test is to be done in seconds
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for _ in samples(sys.argv[1]):
    pass
before, said = peak(), {}
for path in sys.argv[2:]:
    began = time.perf_counter()
    try:
        for _ in samples(path):
            pass
        reason = ""
    except ImageError as error:
        reason = error.reason
    said[path] = reason, time.perf_counter() - began
print(json.dumps([peak() - before, said]))
"""


def in_child(good: Path, *paths: Path) -> tuple[int, dict[str, tuple[str, float]]]:
    """How many MB more hostile shards take than a good one; and of each what is said of it, and the seconds taken."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(good), *map(str, paths)], capture_output=True, text=True, timeout=240
    )
    assert not done.returncode, done.stderr
    more, said = json.loads(done.stdout)
    return more, said


@LARGE
@LYING
@BOMB
def test_hostile_shards_take_little_memory_and_time(tmp_path: Path) -> None:
    good = shard(tmp_path / "good.tar", FIRST, LAST, END)
    pieces = OVERSIZED | SENSELESS
    paths = [shard(tmp_path / f"{i}.tar", FIRST, piece, LAST) for i, piece in enumerate(pieces.values())]
    for path in paths[::2]:
        os.truncate(path, 2**40)  # a shard may be sparse itself: there is something behind its end
    bombs = []
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        zeros = pack(bytes(2**25)) * 240  # streams follow streams
        bombs.append(shard(tmp_path / pack.__module__, pack(FIRST + header("1.json", 2**33 - 1)), zeros))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, (good, *paths, *bombs))], capture_output=True, text=True, timeout=240
    )
    assert not done.returncode, done.stderr
    more, said = json.loads(done.stdout)
    assert more < 50
    assert max(seconds for _, seconds in said.values()) < 20
    for path in bombs:
        assert said[str(path)][0] == "damaged after 2 samples: it expands to more than 200 times its size"


@NO_FILE
@each_special
def test_a_shard_that_is_no_file_is_never_waited_for(special: str, tmp_path: Path) -> None:
    good = write_shard(tmp_path / "0.tar", [("0.png", digit(0))])
    SPECIAL[special](tmp_path / "1.tar")
    (tmp_path / "2.tar").mkdir()
    (tmp_path / "._0.tar").write_bytes(b"of macOS")
    assert find_shards(tmp_path) == [str(good), str(tmp_path / "1.tar")]
    batches = list(stream_samples([str(good), str(tmp_path / "1.tar"), str(tmp_path / "2.tar")], GREY))
    assert [key for batch in batches for key in batch.keys] == ["0"]
    assert [line for batch in batches for line in batch.unreadable] == [
        (str(tmp_path / "1.tar"), f"is {special}, not a regular file"),
        (str(tmp_path / "2.tar"), "is a directory, not a file"),
    ]


@LYING
def test_what_is_no_file_in_a_shard_is_passed_over(tmp_path: Path) -> None:
    kinds = (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"Z")
    others = [header(f"{i}.png", 0, kind) for i, kind in enumerate(kinds, 1)]
    path = shard(tmp_path / "a.tar", FIRST, *others, LAST, member("../../up.png", b"1"), member("/root.png", b"2"), END)
    found, reason = collected(path)
    assert ([sample.key for sample in found], reason) == (["0", "9", "../../up", "/root"], "")


@LYING
def test_a_sample_of_very_many_members_has_a_short_line(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [(f"0.k{i}", b"") for i in range(5000)])
    ((_, reason),) = next(stream_samples([str(path)], GREY)).unreadable
    assert reason == "no image in this sample, which holds k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, …"


@LYING
def test_braces_for_very_many_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="names 1,000,000,000 files, more than 1,000,000"):
        expand_braces("a-{0..999999999}.tar")


# ------------------------------------------------------------------------------------------------------------ one key


@ONE_KEY
def test_samples_that_share_a_key_are_samples_each(tmp_path: Path) -> None:
    """webdataset refuses a kind that comes twice at once; later it is another sample there too."""
    members = [("a.png", digit(0)), ("a.png", digit(1)), ("a.cls", b""), ("b.png", digit(2)), ("a.png", digit(3))]
    path = write_shard(tmp_path / "a.tar", members)
    found, _ = collected(path)
    assert [(sample.key, sample.image, sample.kinds) for sample in found] == [
        ("a", digit(0), ["png"]),
        ("a", digit(1), ["png", "cls"]),
        ("b", digit(2), ["png"]),
        ("a", digit(3), ["png"]),
    ]
    for begin in range(5):
        assert list(samples(path, begin)) == found[begin:]


@ONE_KEY
def test_an_image_beyond_the_first_of_a_sample_is_named(tmp_path: Path) -> None:
    names = ["a.seg.png", "a.jpg", "a.PNG", "a.left.png", "b.left.png", "b.right.png"]
    path = write_shard(tmp_path / "a.tar", [(name, digit(0)) for name in names])
    (batch,) = stream_samples([str(path)], GREY)
    assert batch.keys == ["a", "b"]
    assert batch.unreadable == [
        (f"{path}/a.PNG", "another image of a"),
        (f"{path}/b.right.png", "another image of b"),
    ]


# ------------------------------------------------------------------------------------------------------ lists of labels

NAMES = ("cat", "tench, Tinca", "great white shark")
FILES = {"val/cat/1.jpg": 0, "val/fish/ü.JPEG": 1, "val/fish/a b.png": 2}
PLAIN = 'cat/1.jpg,cat\nfish/ü.JPEG,"tench, Tinca"\nfish/a b.png,great white shark\n'
CRLF = PLAIN.replace("\n", "\r\n")
#: The same list, as programs of Windows write it.
LISTS: dict[str, bytes] = {
    "CRLF": CRLF.encode(),
    "a mark of UTF-8": CRLF.encode("utf-8-sig"),
    "UTF-16 of Notepad": f"\ufeff{CRLF}".encode("utf-16-le"),
    "UTF-16, the other way": f"\ufeff{CRLF}".encode("utf-16-be"),
    "UTF-32": CRLF.encode("utf-32"),
    "CR": PLAIN.replace("\n", "\r").encode(),
    "Ctrl-Z": f"{CRLF}\x1a".encode(),
    "backslashes": CRLF.replace("/", "\\").encode(),
    "absolute paths": CRLF.replace("cat/", "C:\\set\\val\\cat\\").replace("fish/", ".\\").encode(),
    "semicolons": f"Image;Label\r\n{CRLF}".replace(",", ";").replace('"tench; Tinca"', "tench, Tinca").encode(),
    "a separator that is said": f"sep=;\r\n{CRLF.replace(',', ';')}".replace("tench;", "tench,").encode(),
    "quotes": CRLF.replace("1.jpg,cat", '1.jpg","cat"').replace("cat/1", '"cat/1').encode(),
    "Unicode text of Excel": f"\ufeff{CRLF.replace(',', chr(9))}".replace("tench\t", "tench,").encode("utf-16-le"),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "val"


@WINDOWS
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_windows_is_read(kind: str, images: Path) -> None:
    truth = images.parent / "truth.csv"
    truth.write_bytes(LISTS[kind])
    found = labelled(images, 3, NAMES, truth=truth)
    assert dict(zip(found.files, found.labels, strict=True)) == {
        str(images.parent / name): label for name, label in FILES.items()
    }


@WINDOWS
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_classes_of_windows_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes('cat\r\n"tench, Tinca"\r\nlocomotive "Rocket"\r\n5½" disk\r\n\x1a'.encode(encoding))
    assert read_class_names(path, 4) == ("cat", "tench, Tinca", 'locomotive "Rocket"', '5½" disk')
    path.write_bytes('cat\r"the ""Rocket"""\r'.encode(encoding))
    assert read_class_names(path, 2) == ("cat", 'the "Rocket"')


@NO_LIST
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.jpg,cat\nb.jpg,höhle".encode("latin-1"), r"is no text file in UTF-8.*: line 2 has b'\\xf6hle'; save it as"),
        ("cat".encode("utf-16-le"), "is no text file in UTF-8"),
        (bytes(5000), "is no text file in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is no text file in UTF-8.*: line 1 has"),
        (b"a.jpg," + b"c" * 200_000, "is no list of images and classes: field larger than field limit"),
    ],
)
def test_a_list_that_is_none_is_one_sentence(content: bytes, says: str, images: Path) -> None:
    truth = images.parent / "truth.txt"
    truth.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        labelled(images, 3, NAMES, truth=truth)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@NO_LIST
@each_special
def test_a_list_that_is_no_file_is_never_waited_for(special: str, images: Path) -> None:
    truth = images.parent / "truth.txt"
    SPECIAL[special](truth)
    for call in (lambda: labelled(images, 3, NAMES, truth=truth), lambda: read_class_names(truth, 3)):
        with pytest.raises(OSError, match=f"truth.txt is {special}, not a regular file"):
            call()


@NO_LIST
def test_a_list_without_end_is_refused(images: Path) -> None:
    truth = images.parent / "truth.txt"
    truth.touch()
    os.truncate(truth, 2**40)
    with pytest.raises(ValueError, match=r"truth\.txt has more than 268,435,456 bytes"):
        labelled(images, 3, NAMES, truth=truth)
    with pytest.raises(ValueError, match=r"truth\.txt has more than 268,435,456 bytes"):
        read_class_names(truth, 3)
