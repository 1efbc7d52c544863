from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.faults.special import SPECIAL, each_special
from tomevit.errors import NotRegularFileError
from tomevit.opening import open_file, read_small_file


@each_special
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, special: str) -> None:
    SPECIAL[special](tmp_path / "a")
    with pytest.raises(NotRegularFileError, match=f"a is {special}, not a regular file"):
        open_file(tmp_path / "a")


@pytest.mark.parametrize("special", ["a pipe", "a device"])
def test_nor_what_takes_the_place_of_a_file_meanwhile(
    tmp_path: Path, special: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a file")
    system = os.open

    def replaced_first(name: str, flags: int) -> int:
        path.unlink()
        SPECIAL[special](path)
        return system(name, flags)

    monkeypatch.setattr(os, "open", replaced_first)
    with pytest.raises(NotRegularFileError, match=special):
        open_file(path)


def test_a_folder_and_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a directory, not a file"):
        open_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "a"))):
        open_file(tmp_path / "a")


def test_a_small_file_is_read_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"1234")
    assert read_small_file(path, 4) == b"1234"
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=r"a\.json has more than 67,108,864 bytes"):
        read_small_file(path)
