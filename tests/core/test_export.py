"""Where `export` puts its files, and what it leaves alone. What is in them is compared in test_convert.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import tomevit
from tests.helpers import tiny
from tomevit.errors import OutputError
from tomevit.weights import checkpoint, export

FILES = {"config.json", "model.safetensors"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "digest", fail)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("full_disk")
def test_a_failure_removes_the_directories_that_export_made_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for out in ("mine", "mine/a/b", "other"):
        with pytest.raises(OutputError, match=r"model\.safetensors cannot be written: No space left"):
            tomevit.export(tiny(), tmp_path / out, "timm")
    assert names(tmp_path) == {"mine"}
    assert names(tmp_path / "mine") == set()


def test_all_files_of_a_directory_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomevit.export(tiny(), tmp_path, "timm")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == FILES
    monkeypatch.setattr(export, "configs_from_card", lambda *_: {"config.json": {"no": object()}})
    with pytest.raises(TypeError, match="JSON"):
        tomevit.export(tiny(seed=1), tmp_path, "timm")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    tomevit.save(tiny(), source)
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for out in (source, tmp_path / "link.safetensors", tmp_path):
        with pytest.raises(ValueError, match="is what would be read"):
            tomevit.export(source, out, "timm")
    assert source.read_bytes() == before
    assert names(tmp_path) == {"model.safetensors", "link.safetensors"}


def test_a_file_without_a_suffix_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file must end in \.safetensors, .* or be a directory"):
        tomevit.export(tiny(), tmp_path / "file", "timm")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_format(tmp_path: Path) -> None:
    says = (
        r"no format 'onyx' of weights; there are timm, .*; for programs use tomevit\.export_program, or tomevit export"
    )
    with pytest.raises(ValueError, match=says):
        tomevit.export(tiny(), tmp_path / "model.onnx", "onyx")
