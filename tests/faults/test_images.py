"""Whatever lies under the name of an image: it is read, or has a line in the report, and costs what it is worth."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from tests.faults.special import SPECIAL, each_special
from tests.helpers import tiny
from tests.outcomes import survives
from tests.tools.test_images import CHINA, FILES, SMALL, encoded
from tomevit import cli, save
from tomevit.config import Preprocess
from tomevit.data.images import find, prepare_image, read, search, stream
from tomevit.data.labelled_images import labelled
from tomevit.errors import ImageError
from tomevit.transform import Transform

TRANSFORM = Transform(Preprocess(), (32, 32))

OTHER_FORMATS = survives(
    "images", "an EPS, PDF, FITS, WMF or ICO file called photo.jpg", "is no image, and no other program is started"
)
SPECIAL_FILES = survives(
    "images",
    "a pipe, a socket, or a link to a device, with an image's name",
    "is passed over in folders and counted, refused by name, and never waited for",
)
SIZE = survives("images", "a sparse file of a terabyte", "is refused by its size, and not read")
SHAPES = survives(
    "images", "20,000 × 1 and 65,500 × 2 pixels, a small TIFF with one vast tile", "cost no more memory than others"
)
LARGE = survives("images", "a photograph of 24 million pixels", "takes its decoded size once, and little more")
DECODERS = survives(
    "images", "a decoder that lacks memory or raises anything else", "is that image's line; the others are done"
)
HIDDEN = survives(
    "images", ".ipynb_checkpoints and ._photo.jpg, at any depth", "are passed over and counted, unless named"
)
LINKS = survives("images", "links to files and folders, in circles too", "are followed, and every folder searched once")
BESIDE = survives(
    "images", "EXIF data, texts or profiles that are damaged or long, around whole pixels", "do not matter"
)
MODES = survives(
    "images", "16-bit grey, Lab, opacity, palettes, moving pictures", "look as they should, or are refused in words"
)
THREADS = survives("images", "reading in many threads", "leaves the process's filters of warnings alone")


@OTHER_FORMATS
@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "FITS", "WMF"])
def test_other_formats_are_not_decoded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    made = {"FITS": b"SIMPLE  =                    T".ljust(2880), "WMF": b"\xd7\xcd\xc6\x9a\0\0".ljust(99)}
    (tmp_path / "photo.jpg").write_bytes(made[kind] if kind in made else encoded(SMALL, kind))
    with pytest.raises(ImageError, match=r"photo.jpg: not an image of a known format"):
        read(tmp_path / "photo.jpg")


@SPECIAL_FILES
@each_special
def test_what_is_no_file_is_passed_over_and_refused_by_name(special: str, tmp_path: Path) -> None:
    SPECIAL[special](tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(FILES["odd.png"])
    for source in (tmp_path, tmp_path / "*.png", tmp_path / "**" / "*.png"):
        found = search([source])
        assert found.files == [str(tmp_path / "b.png")]
        assert found.passed_over() == f"1 file was passed over: 1 {special}"
    assert find([tmp_path / "a.png"]) == [str(tmp_path / "a.png")]
    assert prepare_image(str(tmp_path / "a.png"), TRANSFORM) == f"{special}, not a regular file"
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=f"no image in this folder; .*; 1 file was passed over: 1 {special}"):
        find([tmp_path])


@SIZE
def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(FILES["alpha.webp"])
    os.truncate(tmp_path / "a.webp", 2**40)
    with pytest.raises(ImageError, match=r"a\.webp: the file has 1,099,511,627,776 bytes, and no image has more than"):
        read(tmp_path / "a.webp")


def tiff_with_a_vast_tile() -> bytes:
    tags = {
        256: 16,
        257: 16,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: 40_000,
        323: 40_000,
        324: 8 + 2 + 10 * 12 + 4,
        325: 0,
    }
    data = zlib.compress(bytes(10**6))
    fields = b"".join(struct.pack("<HHLL", tag, 4, 1, value or len(data)) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + fields + bytes(4) + data


GROWTH = """
import sys, torch
from tomevit.config import Preprocess
from tomevit.data.images import prepare_image
from tomevit.transform import Transform

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

transform = Transform(Preprocess(), (224, 224))
first, *others = sys.argv[1:]
prepare_image(first, transform)
before = peak()
for file in others:
    found = prepare_image(file, transform)
    print(peak() - before, found if isinstance(found, str) else tuple(found.shape), sep="\\t")
"""


def growth(*files: Path) -> list[tuple[float, str]]:
    """By how many MB each image raises the peak of a process that read another, and what became of it."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *map(str, files)], capture_output=True, text=True, check=True, timeout=120
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return [(float(megabytes), found) for megabytes, found in lines]


@SHAPES
@LARGE
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_follows_the_image(tmp_path: Path) -> None:
    made = {"plain": encoded(SMALL, "PNG"), "tile": tiff_with_a_vast_tile()}
    for width, height in ((20_000, 1), (1, 2000), (65_500, 2)):
        made[f"{width} × {height}"] = encoded(Image.linear_gradient("L").resize((width, height)), "PNG")
    made["large"] = encoded(Image.linear_gradient("L").resize((6000, 4000)).convert("RGB"), "JPEG")
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    tile, *shapes, large = growth(*(tmp_path / name for name in made))
    assert "tiles of 1,600,000,000 pixels" in tile[1]
    assert all(found == "(3, 224, 224)" for _, found in (*shapes, large))
    assert max(megabytes for megabytes, _ in (tile, *shapes)) < 50
    assert large[0] < 1.3 * 4 * 24_000_000 / 2**20  # Pillow has four bytes for a pixel


@DECODERS
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "there is too little memory for it"),
        (OverflowError("too large"), "damaged: too large"),
        (struct.error("short"), "damaged: short"),
        (RecursionError(), "damaged: RecursionError"),
        (KeyError(5), "damaged: 5"),
        (UserWarning("odd"), "damaged: odd"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("place", [(ImageFile.ImageFile, "load"), (Image.Image, "resize")], ids=["decode", "resize"])
def test_whatever_a_decoder_raises_is_its_images_line(
    place: tuple[type, str], error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(*place)

    def fails(image: Image.Image, *arguments: object) -> object:
        if image.size == (60, 40):
            raise error
        return method(image, *arguments)

    monkeypatch.setattr(*place, fails)
    good, bad = encoded(SMALL, "PNG"), encoded(SMALL.resize((60, 40)), "PNG")
    (batch,) = stream([good, bad, good], TRANSFORM)
    assert batch.places.tolist() == [0, 2]
    assert batch.unreadable == [(1, reason)]


@DECODERS
def test_an_interrupt_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(image: Image.Image) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_image(FILES["odd.png"], TRANSFORM)


# -------------------------------------------------------------------------------------------------------------- folders


@HIDDEN
def test_what_begins_with_a_dot_is_passed_over_unless_it_is_named(tmp_path: Path) -> None:
    root = tmp_path / ".set"
    for name in ("cat", "dog"):
        (root / name / "deep" / ".ipynb_checkpoints").mkdir(parents=True)
        for file in (f"{name}.png", "deep/2.png", "deep/._2.png", ".DS_Store", "deep/.ipynb_checkpoints/2.png"):
            (root / name / file).touch()
    (root / ".Trash").mkdir()
    found = search([root])
    assert found.files == [
        str(root / name) for name in ("cat/cat.png", "cat/deep/2.png", "dog/deep/2.png", "dog/dog.png")
    ]
    assert found.passed_over() == "5 files were passed over: 5 hidden"
    images = labelled(root, 2, ("cat", "dog"))
    assert (images.files, images.labels, images.passed_over) == (found.files, [0, 0, 1, 1], found.passed_over())
    for named in ("cat/deep/.ipynb_checkpoints", "cat/deep/.ipynb_checkpoints/2.png", "cat/deep/._2.png"):
        assert len(find([root / named])) == 1
    assert len(find([root / "**" / ".ipynb_checkpoints" / "*.png"])) == 2


@HIDDEN
def test_commands_say_what_they_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0", "1"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(FILES["odd.png"])
        (tmp_path / "set" / name / "._1.png").touch()
    os.mkfifo(tmp_path / "set" / "1" / "2.png")
    save(tiny(num_classes=2), tmp_path / "tiny.safetensors")
    folder, model = str(tmp_path / "set"), ["--model", str(tmp_path / "tiny.safetensors")]
    for command in (
        ["classify", folder, *model],
        ["embed", folder, "-o", str(tmp_path / "out.safetensors"), *model, "--workers", "0"],
        ["eval", "--data", folder, *model, "--workers", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        assert not stop.value.code
        assert "3 files were passed over: 2 hidden, 1 a pipe\n" in capsys.readouterr().err


def test_the_command_is_quiet_about_odd_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tomevit", "--version"])
    with warnings.catch_warnings():
        with pytest.raises(SystemExit):
            cli.main()
        warnings.warn_explicit("odd", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")


@LINKS
def test_links_are_followed_but_not_in_circles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "1.png").touch()
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.png").symlink_to(tmp_path / "elsewhere" / "deep" / "1.png")
    (folder / "a").symlink_to(folder / "b")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    for name in ("up", "b/up", "b/top"):
        (folder / name).symlink_to(folder)
    (folder / "missing.png").symlink_to(tmp_path / "nothing")
    (folder / "self.png").symlink_to("self.png")
    expected = [str(folder / name) for name in ("b/2.png", "c/deep/1.png", "missing.png", "self.png")]
    found = search([folder])
    assert found.files == expected
    assert found.passed_over() == "4 files were passed over: 4 a link to a folder that was searched"
    assert find([folder / "**" / "*.png"]) == expected
    assert "Too many levels" in str(prepare_image(expected[-1], TRANSFORM))
    monkeypatch.chdir(folder)
    assert find(["."]) == find(["**"]) == [str(Path(name).relative_to(folder)) for name in expected]
    assert find(["./**/*.png"]) == [f"./{Path(name).relative_to(folder)}" for name in expected]


def test_folders_that_cannot_be_opened_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "1.png").touch()
    system = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: system(path if "closed" not in path else "/none"))
    assert search([tmp_path]).passed_over() == "1 file was passed over: 1 a folder that cannot be opened"


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes there alone")
def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\n\x1b[31m.png"
    Path(os.fsdecode(path)).write_bytes(FILES["odd.png"])
    (file,) = find([tmp_path])
    assert os.fsencode(file) == path
    assert isinstance(prepare_image(file, TRANSFORM), torch.Tensor)


# --------------------------------------------------------------------------------------------------------------- pixels


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    png = encoded(SMALL, "PNG")
    return png[:33] + b"".join(chunks) + png[33:]


def jpeg_with(marker: int, data: bytes) -> bytes:
    jpeg = encoded(SMALL, "JPEG")
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


AROUND = {
    "a long text": png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3 * 10**6)))),
    "texts": png_with(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))] * 80),
    "a long profile": png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3 * 10**6)))),
    "half a profile": png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(999))[:9])),
    "half a density": png_with(chunk(b"pHYs", b"a")),
    "half an opacity": png_with(chunk(b"tRNS", b"a")),
    "a wrong checksum": png_with(chunk(b"tEXt", b"a\0b")[:-1] + b"\0"),
    "no frames": png_with(chunk(b"acTL", bytes(8))),
    "half a JPEG profile": jpeg_with(0xE2, b"ICC_PROFILE\0\1\5abc"),
    "pictures that are not there": jpeg_with(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "EXIF cut off": jpeg_with(0xE1, b"Exif\0\0II*\0"),
    "EXIF that is none": jpeg_with(0xE1, b"Exif\0\0" + bytes(range(60))),
}


@BESIDE
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("what", AROUND)
def test_what_is_beside_the_pixels_does_not_matter(what: str, upright: bool) -> None:
    plain = encoded(SMALL, "JPEG" if AROUND[what].startswith(b"\xff\xd8") else "PNG")
    assert np.array_equal(read(AROUND[what], upright=upright), read(plain))


def entry(tag: int, kind: int, value: bytes) -> bytes:
    return struct.pack("<HHL", tag, kind, 1) + value.ljust(4, b"\0")


@BESIDE
@pytest.mark.parametrize(
    "other",
    [
        entry(0x100, 9, struct.pack("<l", -1)),
        entry(0x102, 4, struct.pack("<L", 70_000)),
        entry(0x8825, 9, struct.pack("<l", -5)),
    ],
    ids=["a negative width", "a long for a short", "a negative place"],
)
def test_photographs_are_turned_whatever_else_their_exif_data_holds(other: bytes) -> None:
    entries = sorted([entry(0x112, 3, struct.pack("<H", 6)), other], key=lambda field: field[1::-1])
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + b"".join(entries) + bytes(4)
    data = encoded(SMALL, "JPEG", exif=exif)
    assert np.array_equal(read(data, upright=True), read(data).transpose(Image.Transpose.ROTATE_270))


GREY = SMALL.convert("L")
DEEP = np.asarray(GREY).astype(np.uint16) * 256 + 77


def lab() -> Image.Image:
    made = ImageCms.profileToProfile(
        SMALL, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert made is not None
    return made


def moving(kind: str, **options: object) -> bytes:
    first = SMALL.copy()  # saving leaves marks on it
    return encoded(first, kind, save_all=True, append_images=[SMALL.rotate(180)], **options)


#: What is in a file, and what is to be seen.
ODD: dict[str, Callable[[], tuple[bytes, Image.Image]]] = {
    "16-bit PNG": lambda: (encoded(Image.fromarray(DEEP), "PNG"), GREY),
    "16-bit TIFF": lambda: (encoded(Image.fromarray(DEEP), "TIFF"), GREY),
    "16-bit TIFF, big-endian": lambda: (encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), GREY),
    "16-bit PGM": lambda: (b"P5 61 43 65535\n" + DEEP.astype(">u2").tobytes(), GREY),
    "Lab": lambda: (encoded(lab(), "TIFF"), SMALL),
    "CMYK": lambda: (encoded(SMALL.convert("CMYK"), "TIFF"), SMALL),
    "palette and opacity": lambda: (encoded(PALETTE, "TIFF"), PALETTE),
    "GIF, moving": lambda: (moving("GIF"), read(encoded(SMALL, "GIF"))),
    "WebP, moving": lambda: (moving("WEBP", lossless=True), SMALL),
    "PNG, moving": lambda: (moving("PNG"), SMALL),
    "MPO": lambda: (moving("MPO"), read(encoded(SMALL, "JPEG"))),
    "TIFF of pages": lambda: (moving("TIFF"), SMALL),
}
PALETTE = SMALL.convert("RGBA").convert("PA")


@MODES
@pytest.mark.parametrize("kind", ODD)
def test_odd_kinds_look_as_they_should(kind: str) -> None:
    data, expected = ODD[kind]()
    found = np.asarray(read(data)).astype(int)
    assert np.abs(found - np.asarray(expected.convert("RGB"))).mean() < (2 if kind == "Lab" else 0.01)


@MODES
@pytest.mark.parametrize("kind", ["I", "F"])
def test_grey_of_32_bits_is_refused_in_words(kind: str) -> None:
    with pytest.raises(ImageError, match="its pixels have 32 bits, of which nothing says what is white"):
        read(encoded(SMALL.convert(kind), "TIFF"))


@THREADS
def test_threads_leave_the_filters_of_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*arguments: object, **how: object) -> None:
        raise AssertionError("a filter of warnings is changed")

    before = [*warnings.filters]
    for name in ("catch_warnings", "simplefilter", "filterwarnings"):
        monkeypatch.setattr(warnings, name, changed)
    files = [FILES["palette_transparent.png"], FILES["turned.jpg"], AROUND["EXIF cut off"], encoded(CHINA, "JPEG")] * 8
    with ThreadPoolExecutor(8) as threads:
        assert all(image.mode == "RGB" for image in threads.map(read, files))
    assert warnings.filters == before


def test_the_bound_on_pixels_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (9000, 9999)).save(file, "PNG")
    with pytest.raises(ImageError, match="too many pixels"):
        read(file.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read(FILES["odd.png"]).mode == "RGB"
