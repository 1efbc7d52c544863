"""Files become images as timm's and torchvision's loaders make them; what cannot be read is named and passed over."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

import tomevit
from benchmarks.peers import timm, torchvision
from tomevit.config import Preprocess
from tomevit.data.images import Strings, find, read, stream
from tomevit.errors import ImageError
from tomevit.transform import Transform

CHINA, FLOWER = (Image.fromarray(pixels) for pixels in load_sample_images().images)  # 640 × 427
SMALL = CHINA.resize((61, 43))
TRANSFORM = Transform(Preprocess(), (32, 32))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(SMALL, "JPEG", exif=exif)


def transparent_palette() -> bytes:
    image = FLOWER.resize((50, 31)).quantize(16)
    return encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))


FILES = {
    "photograph.jpg": encoded(CHINA, "JPEG", quality=90),
    "progressive.jpg": encoded(FLOWER, "JPEG", progressive=True),
    "odd.png": encoded(CHINA.crop((3, 5, 400, 222)), "PNG"),
    "one_pixel.png": encoded(CHINA.crop((3, 5, 4, 6)), "PNG"),
    "grey.jpg": encoded(CHINA.convert("L"), "JPEG"),
    "grey_alpha.png": encoded(SMALL.convert("LA"), "PNG"),
    "cmyk.jpg": encoded(CHINA.convert("CMYK"), "JPEG"),
    "cmyk.tif": encoded(SMALL.convert("CMYK"), "TIFF"),
    "palette.png": encoded(FLOWER.quantize(32), "PNG"),
    "palette_transparent.png": transparent_palette(),
    "animation.gif": encoded(SMALL, "GIF", save_all=True, append_images=[SMALL.rotate(90)]),
    "alpha.png": encoded(Image.merge("RGBA", [*SMALL.split(), SMALL.convert("L")]), "PNG"),
    "alpha.webp": encoded(Image.merge("RGBA", [*SMALL.split(), SMALL.convert("L")]), "WEBP", lossless=True),
    "black_and_white.png": encoded(SMALL.convert("1"), "PNG"),
    "turned.jpg": turned(6),
    "bitmap.bmp": encoded(SMALL, "BMP"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # from timm's loader,
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # which leaves files open
@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_timm_and_torchvision_read_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    (tmp_path / "set" / "class").mkdir(parents=True)
    (tmp_path / "set" / "class" / name).write_bytes(FILES[name])
    ours = np.asarray(read(path))
    assert np.array_equal(ours, np.asarray(torchvision.datasets.folder.default_loader(str(path))))
    if name != "animation.gif" and not name.endswith((".tif", ".webp", ".bmp")):  # timm's folders pass over these
        theirs, _ = timm.data.ImageDataset(str(tmp_path / "set"))[0]
        assert np.array_equal(ours, np.asarray(theirs))
    assert np.array_equal(ours, np.asarray(read(path.read_bytes())))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright_if_asked(orientation: int) -> None:
    plain, upright = read(turned(orientation)), read(turned(orientation), upright=True)
    operations = [None, 0, 3, 1, 5, 4, 6, 2]  # Pillow's Transpose for each EXIF orientation
    turn = operations[orientation - 1]
    assert np.array_equal(upright, plain if turn is None else plain.transpose(turn))


BROKEN = {
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"this is no image\n" * 9, "not an image of a known format"),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image of a known format"),
    "truncated.jpg": (FILES["photograph.jpg"][:9000], "damaged: .*truncated"),
    "truncated.png": (FILES["odd.png"][:9000], "damaged: .*"),
    "truncated.gif": (FILES["animation.gif"][:1000], "damaged: .*"),
    "checksum.png": (FILES["odd.png"][:9000] + b"\0" + FILES["odd.png"][9001:], "damaged: .*"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    data, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"{name}: {reason}") as caught:
        read(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "lost on the way from a process"


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none.jpg: No such file or directory"):
        read(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match=r"Is a directory"):
        read(tmp_path)


def test_more_pixels_than_memory_wants_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ImageError, match="too many pixels"):
        read(FILES["photograph.jpg"])
    with pytest.raises(ImageError, match="too many pixels"):
        read(encoded(CHINA.resize((60, 40)), "PNG"))


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(FILES)),
    cut=st.floats(0, 1),
    at=st.floats(0, 1),
    noise=st.binary(min_size=0, max_size=8),
)
def test_whatever_is_broken_it_is_an_image_or_an_image_error(name: str, cut: float, at: float, noise: bytes) -> None:
    data = bytearray(FILES[name])
    del data[round(cut * len(data)) :]
    place = round(at * len(data))
    data[place : place + len(noise)] = noise
    try:
        image = read(bytes(data))
    except ImageError:
        return
    assert image.mode == "RGB"


def test_files_folders_and_patterns_are_found(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.webp", "b/notes.txt", "b/c/3.jpeg", "[odd].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    def found(*sources: str) -> list[str]:
        return [str(Path(file).relative_to(tmp_path)) for file in find(tmp_path / source for source in sources)]

    assert found("") == ["[odd].jpg", "a.webp", "b/1.png", "b/2.JPG", "b/c/3.jpeg"]
    assert found("b/notes.txt", "a.webp") == ["b/notes.txt", "a.webp"]
    assert found("[odd].jpg") == ["[odd].jpg"]
    assert found("*/*.[jJ]*") == ["b/2.JPG"]
    assert found("**/*.jpeg") == ["b/c/3.jpeg"]
    (tmp_path / "empty").mkdir()
    for source, complaint in (
        ("none.jpg", "No such file or directory"),
        ("*.bmp", "no file matches this pattern"),
        ("empty", r"no image in this folder; looked for \.avif, "),
    ):
        with pytest.raises(ValueError, match=complaint):
            find([tmp_path / source])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_every_file_in_order_or_says_why_not(workers: int, tmp_path: Path) -> None:
    everything = {**FILES, **{name: data for name, (data, _) in BROKEN.items()}}
    for name, data in everything.items():
        (tmp_path / name).write_bytes(data)
    files = find([tmp_path])
    images, unreadable = {}, {}
    for batch in stream(files, TRANSFORM, batch=4, workers=workers):
        assert len(batch.places) + len(batch.unreadable) <= 4
        images |= dict(zip(batch.places.tolist(), batch.images, strict=True))
        unreadable |= dict(batch.unreadable)
    assert list(images) == sorted(images)
    assert {files[place].rpartition("/")[2] for place in unreadable} == BROKEN.keys()
    assert len(images) == len(FILES)
    for place, image in images.items():
        assert torch.equal(image, TRANSFORM(read(files[place])))
    chosen = [3, 11, 0]
    again = list(stream(files, TRANSFORM, batch=2, workers=workers, indices=chosen))
    assert [place for batch in again for place in batch.places.tolist()] == [i for i in chosen if i in images]


def test_a_batch_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (batch,) = stream([str(tmp_path / "empty.png")], TRANSFORM)
    assert len(batch.places) == 0
    assert batch.unreadable == [(0, "the file is empty")]


def test_models_of_one_channel_get_grey_images(tmp_path: Path) -> None:
    (tmp_path / "colour.png").write_bytes(FILES["odd.png"])
    transform = tomevit.transform(tomevit.create("digits_p1"))
    (batch,) = stream([str(tmp_path / "colour.png")], transform)
    assert batch.images.shape == (1, 1, 8, 8)


@given(st.lists(st.text(max_size=9)))
def test_strings_are_kept(strings: list[str]) -> None:
    strings = [string.encode("utf-8", "replace").decode() for string in strings]
    assert list(Strings([*strings, "\udc80 not utf-8"])) == [*strings, "\udc80 not utf-8"]
