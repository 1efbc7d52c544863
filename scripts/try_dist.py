"""Build wheel and sdist, and try them as those who install them will: `make dist`.

    python scripts/try_dist.py --out dist TEST ...

The wheel is built from the sdist, both from an environment of their own, and their metadata is checked. The wheel then
goes into an empty environment in a temporary folder, outside the repository: first alone, to see that what it declares
is all it needs, then with its extras. There the commands run, and the tests, those of the unpacked sdist. What passes
lies in the folder of --out. It runs with any Python that has build and twine, on any system.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Makes a checkpoint as others write it, a state dict by torch.save, and says where tomevit was imported from.
SAVE = """
import torch, tomevit
torch.save(tomevit.create("deit_ti16", num_classes=10).state_dict(), "theirs.pth")
print(tomevit.__file__)
"""
#: What was converted is what was saved, and answers with merging.
CREATE = """
import torch, tomevit
model = tomevit.load("mine.safetensors")
theirs = torch.load("theirs.pth", weights_only=True)
assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
assert model(torch.zeros(1, 3, 224, 224), r=13).shape == (1, 10)
"""


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Show the command and what it prints, and return that; end here if it fails."""
    print("$", *(part if "\n" not in str(part) else "…" for part in command), flush=True)
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return "".join(lines)


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, their metadata checked."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=folder)
    return sdist, wheel


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def main() -> None:
    parser = argparse.ArgumentParser(description="Build wheel and sdist, and try them outside the repository.")
    parser.add_argument("tests", nargs="+", metavar="TEST", help="files of tests in the sdist, or: all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where wheel and sdist go; default: dist")
    options = parser.parse_args()
    everything = options.tests == ["all"]

    with tempfile.TemporaryDirectory(prefix="tomevit-", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary).resolve()
        for name in ("built", "elsewhere", "source"):
            (work / name).mkdir()
        sdist, wheel = build(work / "built")
        source = unpack(sdist, work / "source")

        venv.create(work / "env", with_pip=True)
        scripts = work / "env" / ("Scripts" if os.name == "nt" else "bin")
        python, tomevit, here = scripts / "python", scripts / "tomevit", work / "elsewhere"
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"TOMEVIT_HOME": str(work / "cache"), "PYTHONUTF8": "1"}

        run(python, "-m", "pip", "install", "--quiet", wheel, cwd=here, env=env)
        run(tomevit, "--version", cwd=here, env=env)
        run(tomevit, "list", cwd=here, env=env)
        run(tomevit, "info", "vit_b16", cwd=here, env=env)
        imported = run(python, "-c", SAVE, cwd=here, env=env)
        if not Path(imported.strip()).is_relative_to(work / "env"):
            sys.exit(f"tomevit was imported from {imported.strip()}, not from the environment")
        run(tomevit, "convert", "theirs.pth", "--model", "deit_ti16", "-o", "mine.safetensors", cwd=here, env=env)
        run(python, "-c", CREATE, cwd=here, env=env)

        extra = "test" if everything else "quick"
        run(python, "-m", "pip", "install", "--quiet", f"tomevit[{extra}] @ {wheel.as_uri()}", cwd=here, env=env)
        run(python, "-m", "pip", "check", cwd=here, env=env)
        run(tomevit, "demo", "-o", "demo", cwd=here, env=env)
        tests = ["tests"] if everything else options.tests
        run(python, "-m", "pytest", "--numprocesses=auto", "--dist=worksteal", *tests, cwd=source, env=env)

        options.out.mkdir(parents=True, exist_ok=True)
        for file in (sdist, wheel):
            print("built:", shutil.copy2(file, options.out))


if __name__ == "__main__":
    main()
