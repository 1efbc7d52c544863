"""Every block of code in the README and on the pages runs as it stands, and the site is built without a warning.

A block's language says what happens to it:

    python      it runs; the blocks of one page share their names; text right below it is what it prints
    pycon       it runs as a doctest: what is shown is what comes out
    console     `$ COMMAND`, and below it what is printed, where the page shows it; … stands for anything
    text        it is no code, or what the block above printed

A block without a language is a list of commands, if it begins with one, and else text. NOT_RUN has the lines that are
not run, and why; whether their options exist is seen all the same.
"""

from __future__ import annotations

import argparse
import doctest
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from PIL import Image

import tomevit
import tomevit.layers
from examples.common import parse_options
from tests import foreign
from tests.server import Server
from tomevit import cli, zoo
from tomevit.deploy import programs
from tomevit.tasks.demo import held_out

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAMS = ("tomevit", "python", "torchrun", "make")

INSTALLS = "sets up an environment; whoever runs this test has done so"
MEASURES = "takes minutes; tests/tools/test_bench.py runs it on small models"
EXPORTS = "takes long; tests/tools/test_export_programs.py does it for every format and option"
TRAINS = (
    "takes a data set and hours; tests/project/test_finetune.py and tests/project/test_torchrun.py run it on digits"
)
NOT_RUN = {
    "make demo": INSTALLS,
    "make check": INSTALLS,
    "make clean && make test CONSTRAINTS=constraints-lowest.txt": INSTALLS,
    "tomevit demo": "takes half a minute; tests/tasks/test_demo.py runs it",
    "tomevit bench vit_b16 --batch 1 8": MEASURES,
    "tomevit bench vit_b16 --batch 1 8 --mode eager optimized --markdown --plot speed.png": MEASURES,
    "tomevit bench mine.safetensors --dtype float32 bfloat16 --target 1.5 --json": MEASURES,
    "tomevit bench deit_s16 --batch 1 8 --target 1.5": MEASURES,
    "tomevit export deit_s16.safetensors --format onnx -o deit.onnx --r 13": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o mine.onnx --r 16": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit.onnx --r 16": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit.onnx --r 16 --raw": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit8.onnx --r 16 --dtype int8": EXPORTS,
    "tomevit export mine.safetensors --format pt2 -o vit.pt2": EXPORTS,
    "tomevit export mine.safetensors --format aoti -o vit.pt2": EXPORTS,
    "python -m examples.finetune --data FOLDER --model vit_b16 --pretrained true --r 13 --amp bf16 --out run": TRAINS,
    "python -m examples.finetune --recipe mae_b16.tome_r16 --dry-run --batch 4": TRAINS,
    "torchrun --nproc-per-node 2 -m examples.train_fsdp --out run": TRAINS,
}


# ------------------------------------------------------------------------------------------------------------ the pages


class Block(NamedTuple):
    language: str
    text: str
    line: int


class Command(NamedTuple):
    line: str
    shown: str | None  # below it, if anything


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[2], match[3], text[: match.start()].count("\n") + 2) for match in found]


def commands(block: Block) -> list[Command]:
    """What a block has for a shell."""
    if block.language == "":
        lines = block.text.splitlines()
        first = lines[0].split()[0] if lines else ""
        return [Command(line, None) for line in lines if line.strip()] if first in PROGRAMS else []
    if block.language != "console":
        return []
    assert block.text.startswith("$ ")
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    return [Command(line, shown.rstrip() or None) for line, _, shown in (part.partition("\n") for part in parts)]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_every_block_says_what_it_is() -> None:
    languages = {(page, block.language) for page in PAGES for block in blocks(page)}
    known = {"python", "pycon", "console", "text", "", "{toctree}", "{eval-rst}"}
    assert {(page, language) for page, language in languages if language not in known} == set()
    assert {page for page, language in languages if language.startswith("{")} <= {
        "docs/index.md",
        *(f"docs/api{part}.md" for part in ("", "_layers", "_modules")),
    }


def test_all_that_is_not_run_is_somewhere() -> None:
    lines = {" ".join(words(command.line)) for page in PAGES for block in blocks(page) for command in commands(block)}
    assert NOT_RUN.keys() - lines == set()
    assert len(NOT_RUN) == 18, "what is not run is worth a second look"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def publishers(
    server: Server, set_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Server:
    """The hub and the other publishers, as far as the pages take from them. You have an account."""
    set_environment(TOMEVIT_MIRROR=server.url, HF_TOKEN="hf_token", HF_HUB_DISABLE_XET="1")
    server.accounts["hf_token"] = "you"
    return server


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All models as deep as they are, with as many tokens and heads, and with channels that are quickly computed."""
    whole = zoo._zoo()

    def thin(card: tomevit.Card) -> tomevit.Card:
        return replace(card, config=replace(card.config, embed_dim=8 * card.config.num_heads))

    architectures = {name: thin(card) for name, card in whole.architectures.items()}
    cards = {name: tuple(map(thin, cards)) for name, cards in whole.cards.items()}
    monkeypatch.setattr(zoo, "_zoo", lambda: zoo._Zoo(architectures, cards, whole.aliases))


def deit(name: str) -> dict[str, torch.Tensor]:
    return foreign.fill(foreign.deit(foreign.sizes(tomevit.card(name).config)))


def given_to_the_readme(folder: Path, publishers: Server) -> dict[str, Any]:
    """Published weights, two checkpoints of one's own, images, batches, a stored evaluation and benchmark."""
    own = foreign.write(folder / "checkpoint.pth", deit("deit_s16"), key="model").read_bytes()
    (folder / "deit.pth").write_bytes(own)
    foreign.write(
        folder / "checkpoint.npz", foreign.fill(foreign.vit_jax(foreign.sizes(tomevit.card("deit_s16").config)))
    )
    publishers.put("/dl.fbaipublicfiles.com/tome/f367470145_deit_S_r13.pth", own)
    weights = deit("vit_b16")
    weights["head.bias"][0] = 1e3  # all it sees are tenches, and so is all that is in imagenet/
    published = foreign.write(folder / "published.safetensors", weights).read_bytes()
    publishers.put_hub("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "model.safetensors", published)
    encoder = foreign.fill(foreign.mae_encoder(foreign.sizes(tomevit.card("mae_cls_b16.pretrain").config)))
    file = foreign.write(folder / "encoder.safetensors", encoder)
    publishers.put_hub("timm/vit_base_patch16_224.mae", "model.safetensors", file.read_bytes())
    image = Image.new("RGB", (320, 240), "orange")
    for name in ("photo.jpg", "photos/1.jpg", "imagenet/n01440764/1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    for arguments in (
        "eval --data imagenet --model vit_b16 --r 0 8 --workers 0 --batch 1 -o eval.json",
        "bench vit_b16 --r 8 --batch 1 --rounds 1 --no-timm --json -o bench.json",
    ):
        assert run(["tomevit", *arguments.split()]) == 0
    return {
        "image": image,
        "loader": [(torch.randn(2, 3, 224, 224), torch.tensor([3, 9]))],
    }


def given_a_small_model(folder: Path, publishers: Server) -> dict[str, Any]:
    """A published set of weights, and the same as a checkpoint of one's own."""
    file = foreign.write(folder / "model.safetensors", deit("deit_ti16"))
    publishers.put_hub("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors", file.read_bytes())
    foreign.write(folder / "checkpoint.pth", deit("deit_ti16"), key="model")
    return {}


def given_digits(folder: Path, publishers: Server) -> dict[str, Any]:
    """A model, an image for it, and for its program one with the same ends and metadata."""
    model = tomevit.create("digits_p1.tome_r16", pretrained=True)
    tomevit.save(model, folder / "mine.safetensors")
    Image.fromarray(held_out()[0][0, 0].numpy()).save(folder / "digit.png")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("images", (1, 8, 8)), ("logits", (10,)))
    ]
    weights = onnx.numpy_helper.from_array(np.ones((64, 10), np.float32), "weights")
    nodes = [
        onnx.helper.make_node("Flatten", ["images"], ["pixels"]),
        onnx.helper.make_node("MatMul", ["pixels", "weights"], ["logits"]),
    ]
    program = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "digits", ends[:1], ends[1:], [weights]), ir_version=10
    )
    onnx.helper.set_model_props(program, programs.describe(model, "float32", None, raw=False))
    onnx.save(program, folder / "mine.onnx")
    return {}


#: What pages take for granted.
GIVEN: dict[str, Callable[[Path, Server], dict[str, Any]]] = {
    "README.md": given_to_the_readme,
    "docs/weights.md": given_a_small_model,
    "docs/finetuning.md": given_a_small_model,
    "docs/export.md": given_digits,
}


# huggingface_hub's way to send a large file is one that its HTTP library no longer likes.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_runs(page: str, folder: Path, publishers: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "README.md":
        narrow(monkeypatch)
    names: dict[str, Any] = {"__name__": "__main__"} | GIVEN.get(page, lambda *_: {})(folder, publishers)
    for block, below in zip_longest(blocks(page), blocks(page)[1:]):
        where = f"{page}:{block.line}"
        if block.language == "python":
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
            if below is not None and below.language == "text":
                assert out.getvalue() == below.text, f"{page}:{below.line}"
        elif block.language == "pycon":
            check_session(block.text, names, page, block.line)
        for command in commands(block):
            arguments = words(command.line)
            if " ".join(arguments) in NOT_RUN:
                check_options(arguments)
                assert command.shown is None, f"{where}: {command.line} is not run, so what it prints cannot be shown"
            else:
                check_command(arguments, command.shown, where)


def check_session(text: str, names: dict[str, Any], page: str, line: int) -> None:
    """Each prompt answers with what stands below it."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, names, page, page, line)
    doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert said == [], "".join(said)
    names |= test.globs


def check_command(arguments: list[str], shown: str | None, where: str) -> None:
    """A command ends well, or in the mistake that is shown, and prints what is shown."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        status = run(arguments)
    printed = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
    assert status == (2 if (shown or "").startswith("tomevit: ") else 0), f"{where}: {shlex.join(arguments)}: {printed}"
    if shown is not None:
        expected = re.escape(shown).replace("…", ".*")
        assert re.fullmatch(expected, printed, re.DOTALL), f"{where}: {shlex.join(arguments)} printed\n{printed}"


def run(arguments: list[str]) -> int:
    """A command, in this process; the exit status."""
    program, *rest = arguments
    try:
        if program == "tomevit":
            cli.main(rest)
        else:
            assert (program, rest[0]) == ("python", "-m"), f"{shlex.join(arguments)} does not run in this process"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", rest[1:])
                run_as_main(patch, rest[1])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def run_as_main(patch: pytest.MonkeyPatch, module: str) -> None:
    """As `python -m` in a fresh process: another test of this one may have imported it."""
    patch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def check_options(arguments: list[str]) -> None:
    """The program that a command is for takes its options. It is not run."""
    program, *rest = arguments
    if program == "tomevit":
        cli.cli.commands[rest[0]].make_context(rest[0], rest[1:])
    elif program == "make":
        assert rest[0] in re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        module, *options = rest[rest.index("-m") + 1 :]
        assert find_spec(module) is not None
        # torchrun's share their options, and importing their engines takes long.
        with pytest.MonkeyPatch.context() as patch:
            read = parse_options if program == "torchrun" else None
            patch.setattr(sys, "argv", [module, *options])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            with pytest.raises(SystemExit) as stop:
                read("") if read else run_as_main(patch, module)
        assert stop.value.code == 0


PARSE = argparse.ArgumentParser.parse_args


def parse_and_stop(parser: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
    """Parse the command line, and end; what else is parsed, such as an empty one for the defaults, is."""
    found = PARSE(parser, *given)
    if given and given[0] is not None:
        return found
    raise SystemExit(0)


def in_the_text(page: str) -> list[list[str]]:
    """Commands between the blocks: a program and more, in backquotes."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [words(command) for command in re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", text)]


def test_commands_in_the_text_exist() -> None:
    lines = [arguments for page in PAGES for arguments in in_the_text(page)]
    assert len(lines) > 30
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *rest in lines:
        if "tomevit" in (program, *rest[-5:]):
            verb = [program, *rest][[program, *rest].index("tomevit") + 1]
            assert verb in cli.cli.commands or verb == "--traceback", rest
        elif program == "make":
            assert rest[0] in targets, rest
        else:
            assert find_spec(rest[rest.index("-m") + 1]) if "-m" in rest else (ROOT / rest[0]).exists(), rest


EXAMPLES = [found for found in in_the_text("examples/README.md") if re.search(r"-m examples\.", shlex.join(found))]


@pytest.mark.parametrize("arguments", EXAMPLES, ids=shlex.join)
def test_examples_take_the_options_of_their_page(arguments: list[str], folder: Path) -> None:
    if arguments[-1] == "examples.own_transformer":  # it has none, and is quick
        check_command(arguments, "…\nback on the grid: (2, 50, 64)", "examples/README.md")
    else:
        check_options(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_is_there(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


# ------------------------------------------------------------------------------------------------------------- the site


class Page(HTMLParser):
    """What a page of the site links, loads and names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given:
            self.loads.append(given["href"])
        self.loads += [given["src"]] if "src" in given else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built once for all processes of a test run, without a network."""
    pytest.importorskip("myst_nb", reason="the site needs pip install 'tomevit[docs]'")
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / "site.lock"):
        if not (shared / "built.json").exists():
            nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
            built = subprocess.run(
                [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(shared / "site")],
                cwd=ROOT,
                env=os.environ | nowhere | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            (shared / "built.json").write_text(json.dumps([built.returncode, built.stdout + built.stderr]))
    status, said = json.loads((shared / "built.json").read_text())
    assert (status, said) == (0, ""), said
    return shared / "site"


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_on_the_site(pages: Mapping[Path, Page], site: Path) -> None:
    written = {str(path.relative_to(site).with_suffix(".md")) for path in pages}
    assert written >= set(PAGES)
    assert site / "docs" / "tour.html" in pages
    assert pages[site / "index.html"].links == ["docs/index.html"]


def test_every_link_within_the_site_leads_somewhere(pages: Mapping[Path, Page]) -> None:
    lost = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                assert link.startswith("https://"), (path, link)
                continue
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            if not there.is_file() or (anchor and there.suffix == ".html" and anchor not in pages[there].ids):
                lost.append((path.name, link))
    assert lost == []


def test_readers_browsers_load_nothing_from_elsewhere(pages: Mapping[Path, Page], site: Path) -> None:
    elsewhere = [(path.name, load) for path, page in pages.items() for load in page.loads if re.match(r"\w+:|//", load)]
    assert [(name, load) for name, load in elsewhere if not load.startswith("data:")] == []
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)[\s'\"]*(?:https?:|//)[^)]*", path.read_text(encoding="utf-8")) == [], path


#: Names of the modules on docs/api_modules.md that their page leaves out: they serve a command and nobody else.
NOT_IN_THE_REFERENCE = {
    *(
        "tomevit.data.labelled_images.Classes",
        "tomevit.data.labelled_images.is_imagenet",
        "tomevit.data.images.Strings",
    ),
    *("tomevit.tasks.visualize.group_sizes", "tomevit.tasks.visualize.undo_normalisation"),
}


def public_names() -> set[str]:
    names = {f"tomevit.{name}" for name in tomevit.__all__}
    names |= {f"tomevit.layers.{name}" for name in tomevit.layers.__all__ if name not in tomevit.__all__}
    described = re.findall(r"automodule:: (\S+)", (ROOT / "docs" / "api_modules.md").read_text(encoding="utf-8"))
    for module in map(import_module, described):
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
        names |= {f"{module.__name__}.{name}" for name in own if not name.startswith("_")}
    return names


def test_the_reference_has_every_public_name_once(pages: Mapping[Path, Page]) -> None:
    anchors = [name for page in pages.values() for name in page.ids if name.startswith("tomevit.")]
    assert len(anchors) == len(set(anchors))
    public = public_names()
    assert public >= NOT_IN_THE_REFERENCE
    assert public - NOT_IN_THE_REFERENCE - set(anchors) == set(), "add them to docs/api.md"
    assert NOT_IN_THE_REFERENCE & set(anchors) == set()
    assert [name for name in anchors if "._" in name] == []


def test_the_reference_says_what_fields_are(pages: Mapping[Path, Page], site: Path) -> None:
    text = "".join(pages[site / "docs" / "api.html"].text)
    assert "img_size: tuple[int, int] = (224, 224) – height, width in pixels" in text
    assert "src: Tensor – (B, N - M) int64: the tokens in that join another" in text
    modules = "".join(pages[site / "docs" / "api_modules.html"].text)
    assert "tokens: int – leaving the last block" in modules
    assert 'command      "eval"' in modules  # columns stay columns


def test_models_and_commands_are_all_there(pages: Mapping[Path, Page], site: Path) -> None:
    zoo_text, command_text, weights_text = (
        "".join(pages[site / "docs" / f"{name}.html"].text) for name in ("zoo", "commands", "weights")
    )
    assert [name for name in tomevit.list_models() if f"{name}\n" not in zoo_text] == []
    for name, command in cli.cli.commands.items():
        assert f"tomevit-{name}" in pages[site / "docs" / "commands.html"].ids
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option in command_text
    downloaded = [name for name in tomevit.list_models(weights=True) if "." in name and "digits" not in name]
    assert [name for name in downloaded if name not in weights_text] == []


def test_the_notebook_was_run(site: Path) -> None:
    (path,) = site.rglob("tour.ipynb")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream", "display_data"}
    assert {output.get("name") for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == len({output["data"]["image/png"] for output in pictures}) == 2
    assert "".join(cells[-1]["outputs"][0]["data"]["text/plain"]) == "('digits_p1.tome_r16', 12, True)"


def test_the_page_that_visualize_writes_is_shown(pages: Mapping[Path, Page], site: Path) -> None:
    assert pages[site / "docs" / "looking.html"].loads.count("visualized.html") == 1
    assert "digits_p1.tome_r16" in (site / "docs" / "visualized.html").read_text(encoding="utf-8")
    assert (site / ".nojekyll").exists()


def test_search_finds_words_of_every_page(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    found = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    for word, page in (("unmerg", "docs/merging"), ("inflect", "docs/choosing_r"), ("onnxruntim", "docs/export")):
        where = found["terms"][word]
        assert page in [found["docnames"][i] for i in (where if isinstance(where, list) else [where])]
    assert set(found["docnames"]) >= {page.removesuffix(".md") for page in PAGES}


def test_the_pictures_are_what_their_programs_draw(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the photographs come from scikit-learn")
    from docs import pictures

    pictures.main(tmp_path)
    assert pictures.PICTURES.keys() == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        ours, theirs = (
            np.asarray(Image.open(file).convert("RGB"), float) for file in (path, pictures.IMAGES / path.name)
        )
        assert ours.shape == theirs.shape, f"{path.name} is stale: python -m docs.pictures"
        assert abs(ours - theirs).mean() < 2, f"{path.name} is stale: python -m docs.pictures"
