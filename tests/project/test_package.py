"""What is built carries all that runs: the configs, which lie beside the package in a checkout, among it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tomevit import zoo
from tomevit.version import __version__

ROOT = Path(__file__).parents[2]
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()

pytestmark = pytest.mark.skipif(not FILES, reason="what belongs to it is what git has")


def build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (built,) = folder.iterdir()
    assert __version__ in built.name
    return built


def test_the_wheel_carries_package_and_configs(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(build("wheel", tmp_path)).namelist())
    wanted = {name for name in FILES if name.startswith("tomevit/")}
    wanted |= {f"tomevit/{name}" for name in FILES if name.startswith("configs/")}
    assert {name for name in names if name.startswith("tomevit/")} == wanted


def test_an_unpacked_wheel_has_the_whole_zoo(tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    zipfile.ZipFile(build("wheel", tmp_path / "built")).extractall(tmp_path / "site")
    code = "import tomevit; print(tomevit.__file__, len(tomevit.list_models()), len(tomevit.list_recipes()))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    file, models, recipes = out.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert (int(models), int(recipes) > 0) == (len(zoo.list_models()), True)


def test_the_sdist_carries_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {name for name in FILES if name.startswith(("tomevit/", "configs/", "tests/"))}
