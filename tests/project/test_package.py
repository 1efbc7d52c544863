"""What is built carries all that runs: the configs, which lie beside the package in a checkout, among it.

And what is said of a release in several places is said alike.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tomevit import zoo
from tomevit.deploy.programs import LEAST_TORCH
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


def test_the_lowest_versions_that_are_run_are_those_that_are_taken() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def taken(*requirements: list[str]) -> set[str]:
        bounds = [Requirement(line) for lines in requirements for line in lines]
        return {f"{b.name}{str(b.specifier).replace('>=', '==')}" for b in bounds if b.name != "tomevit"}

    def run(file: str) -> set[str]:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        return {line for line in lines if not line.startswith(("#", "timm=="))}

    for_users = {"plot", "video", "train", "engines", "parquet", "ray", "docs"}
    assert run("constraints-lowest.txt") == taken(project["dependencies"], *(extras[name] for name in for_users))
    torch = {f"torch=={'.'.join(map(str, LEAST_TORCH))}", "torchvision==0.28"}
    assert run("constraints-lowest-programs.txt") - torch == taken(extras["export"], extras["openvino"])
    assert torch < run("constraints-lowest-programs.txt")
    assert extras.keys() - for_users == {"export", "openvino", "clients", "dist", "quick", "test"}  # and tools


def test_a_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall("^version: (.*)$", citation, re.MULTILINE) == [__version__]


@pytest.mark.parametrize("file", [".github/workflows/checks.yml", ".pre-commit-config.yaml", ".ci/run"])
def test_what_is_called_elsewhere_is_a_target_of_make(file: str) -> None:
    targets = set(
        re.findall(r"^([\w./-]+(?: [\w./-]+)*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    called = re.findall(
        r"^\W*(?:run: |entry: )?make (?:-j\d+ )?([\w./-]+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert called
    assert set(called) <= {name for line in targets for name in line.split()}


def test_the_quick_part_is_there() -> None:
    (names,) = re.findall(
        r"^QUICK := .*test_%.py,(.*)\)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name for name in names.split() if not (ROOT / f"tests/core/test_{name}.py").is_file()] == []
