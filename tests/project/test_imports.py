"""The house: which part of tomevit imports which, and what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tomevit
from tomevit import cli

ROOT = Path(tomevit.__file__).parent

#: From the foundation up: a part imports what stands before it. Modules of one package import each other, without
#: cycles between packages. The first ring is what `create` needs; the second works around a model; the third is tasks.
FIRST = (
    *(
        "version",
        "errors",
        "private",
        "opening",
        "locks",
        "output",
        "progress",
        "typed",
        "words",
        "schedule",
        "config",
        "flops",
        "headers",
        "notebook",
        "cards",
        "zoo",
    ),
    *("layers", "models", "weights", "subject", "transform", "factory"),
)
SECOND = ("deploy", "training", "data", "measure")
THIRD = ("tasks", "cli", "__main__")
ORDER = (*FIRST, *SECOND, *THIRD)


def part(module: str) -> str:
    """The package or module at the root that a module is, or is in: "" for the root package itself."""
    return module.removeprefix("tomevit").removeprefix(".").partition(".")[0]


def imports() -> Iterator[tuple[str, str]]:
    """Each import within tomevit: the file that makes it, and the module's full name."""
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, name.name) for name in node.names if name.name.split(".")[0] == "tomevit")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tomevit":
                assert node.module is not None
                assert node.level == 0
                for name in node.names:
                    inside = f"{node.module}.{name.name}"
                    path_inside = ROOT.parent / inside.replace(".", "/")
                    is_module = path_inside.is_dir() or path_inside.with_suffix(".py").exists()
                    yield file, inside if is_module else node.module


def test_every_part_has_its_place() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ORDER)


def test_imports_run_down_and_never_up() -> None:
    place = {name: i for i, name in enumerate(ORDER)}
    up = []
    for file, module in imports():
        if file == "__init__.py":
            continue  # the public names, each imported on first use
        ours, theirs = part("tomevit." + file.removesuffix(".py").replace("/", ".")), part(module)
        if theirs == "":
            up.append(f"{file} imports the root package")
        elif ours != theirs and place[theirs] > place[ours]:
            up.append(f"{file} imports {module}")
    assert up == []


LOADED = (
    "import sys; {code}; print(*sorted(name for name in sys.modules if name.partition('.')[0] in ('tomevit', 'torch')))"
)


def loaded(code: str) -> set[str]:
    """The modules of tomevit and torch that a fresh process has after some code."""
    program = LOADED.format(code=code)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(out.stdout.splitlines()[-1].split())


def test_the_package_loads_nothing_before_it_is_used() -> None:
    parts = {part(name) for name in loaded("import tomevit")}
    assert parts == {"", "version", "errors", "words", "schedule", "typed", "config", "flops", "subject", "transform"}


def test_a_model_needs_the_first_ring_alone() -> None:
    found = loaded("import tomevit; tomevit.create('deit_ti16', r=8); tomevit.load, tomevit.save, tomevit.transform")
    assert {part(name) for name in found if name.startswith("tomevit.")} <= set(FIRST)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["list"], ["list", "--weights"], ["info", "vit_b16"]])
def test_commands_that_say_what_there_is_need_no_torch(arguments: list[str]) -> None:
    found = loaded(f"from tomevit.cli import cli; cli.main({arguments!r}, standalone_mode=False)")
    assert not any(name.startswith("torch") for name in found)


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.asname: f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tomevit.")
        for alias in node.names
    }
    assert declared.pop("__version__") == "tomevit.version"
    places = {"flops": "subject", "transform": "transform"} | tomevit._MODULES
    assert declared == {name: f"tomevit.{places[name]}" for name in tomevit.__all__}


def test_public_names_exist_and_only_they_are_shown() -> None:
    assert dir(tomevit) == sorted([*tomevit.__all__, "__version__"])
    for name in tomevit.__all__:
        assert not isinstance(getattr(tomevit, name), type(tomevit)), f"{name} is a module"
    with pytest.raises(AttributeError, match="has no attribute 'bench'"):
        tomevit.bench  # noqa: B018


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_command_of_the_list_is_there(name: str) -> None:
    command = cli.load_command(name)
    assert command.name == name
    assert command.help
