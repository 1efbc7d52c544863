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
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import tomevit
import tomevit.layers
from benchmarks import peers  # noqa: F401  # the way to import timm beside a CPU torch, for the page about it
from examples.common import parse_options
from tests import foreign
from tests.server import Server
from tests.tasks.test_tune import clock
from tomevit import cli, zoo
from tomevit.deploy import programs
from tomevit.tasks.demo import held_out
from tomevit.tasks.tune import costs

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
TUNES = "takes minutes, and photographs; tests/tasks/test_tune_command.py runs it on digits"
TRAINS = (
    "takes a data set and hours; tests/tasks/test_train_command.py and tests/project/test_torchrun.py run it on digits"
)
COMPARES = "takes ImageNet and the published weights; tests/tasks/test_evaluate.py runs it on digits"
NOT_RUN = {
    "make demo": INSTALLS,
    "make check": INSTALLS,
    "make lowest": INSTALLS,
    "make gpu": "takes a GPU, and minutes; tests/tools/test_gpu_programme.py runs it small, on a CPU",
    "tomevit demo": "takes half a minute; tests/tasks/test_demo.py runs it",
    "tomevit eval --data imagenet --model deit_s16 --r 0 13 2x 2x late 2x redundant diffrate-2.9g --expect": (COMPARES),
    "tomevit bench vit_b16 --batch 1 8": MEASURES,
    "tomevit bench vit_b16 --batch 1 8 --mode eager optimized --markdown --plot speed.png": MEASURES,
    "tomevit bench mine.safetensors --dtype float32 bfloat16 --target 1.5 --json": MEASURES,
    "tomevit bench deit_s16 --batch 1 8 --target 1.5": MEASURES,
    "tomevit bench tuned.safetensors --front front.json": TUNES,
    "tomevit tune photos/ --model vit_b16 --speed-up 1.5 -o tuned.safetensors": TUNES,
    "tomevit tune photos --model vit_b16 --speed-up 1.5 --front front.json -o tuned.safetensors": TUNES,
    "tomevit export deit_s16.safetensors --format onnx -o deit.onnx --r 13": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o mine.onnx --r 16": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit.onnx --r 16": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit.onnx --r 16 --raw": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit8.onnx --r 16 --dtype int8": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o vit8.onnx --r 16 --dtype int8 --calibrate photos": EXPORTS,
    "tomevit export mine.safetensors --format onnx -o mine.onnx --r 16 --dtype int8 --calibrate photos": EXPORTS,
    "tomevit export mine.safetensors --format openvino -o vit.xml --r 16": EXPORTS,
    "tomevit export mine.safetensors --format pt2 -o vit.pt2": EXPORTS,
    "tomevit export mine.safetensors --format aoti -o vit.pt2": EXPORTS,
    "tomevit train FOLDER --model vit_b16 --pretrained --r 13 --amp bf16 -o run": TRAINS,
    "tomevit train digits --model digits_p1": TRAINS,
    "tomevit train --recipe mae_b16.tome_r16 --dry-run --batch 4": TRAINS,
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


def test_the_library_at_a_glance_has_every_public_name() -> None:
    text = (ROOT / "docs" / "at_a_glance.md").read_text(encoding="utf-8")
    assert [name for name in tomevit.__all__ if f"tomevit.{name}" not in text] == []
    assert [verb for verb in cli.VERBS if f"\ntomevit {verb} " not in text] == []


def test_every_command_has_an_example() -> None:
    shown = [words(command.line)[:2] for block in blocks("docs/commands.md") for command in commands(block)]
    assert [verb for verb in cli.VERBS if ["tomevit", verb] not in shown] == []


def test_all_that_is_not_run_is_somewhere() -> None:
    lines = {" ".join(words(command.line)) for page in PAGES for block in blocks(page) for command in commands(block)}
    assert NOT_RUN.keys() - lines == set()
    assert len(NOT_RUN) == 27, "what is not run is worth a second look"


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
    """All models as deep as they are, with as many tokens and heads, and with channels that are quickly computed.

    Those of the digits stay: their weights are shipped.
    """
    whole = zoo._zoo()

    def thin(card: tomevit.Card) -> tomevit.Card:
        if card.name.startswith("digits"):
            return card
        return replace(card, config=replace(card.config, embed_dim=8 * card.config.num_heads))

    architectures = {name: thin(card) for name, card in whole.architectures.items()}
    cards = {name: tuple(map(thin, cards)) for name, cards in whole.cards.items()}
    monkeypatch.setattr(zoo, "_zoo", lambda: whole._replace(architectures=architectures, cards=cards))


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
    put_autoencoder(folder, publishers)
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


def given_to_finetuning(folder: Path, publishers: Server) -> dict[str, Any]:
    """What `given_a_small_model` gives, and a published autoencoder."""
    put_autoencoder(folder, publishers)
    return given_a_small_model(folder, publishers)


def put_autoencoder(folder: Path, publishers: Server) -> None:
    encoder = foreign.fill(foreign.mae_encoder(foreign.sizes(tomevit.card("mae_cls_b16.pretrain").config)))
    file = foreign.write(folder / "encoder.safetensors", encoder)
    publishers.put_hub("timm/vit_base_patch16_224.mae", "model.safetensors", file.read_bytes())


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
    onnx.helper.set_model_props(program, programs.describe_program(model, "float32", None, raw=False))
    onnx.save(program, folder / "mine.onnx")
    return {}


def given_a_folder_of_digits(folder: Path, publishers: Server) -> dict[str, Any]:
    """As docs/looking.md writes it; and beside it, for commands, a checkpoint."""
    for i, (image, label) in enumerate(zip(*held_out(), strict=True)):
        file = folder / "digits" / str(label.item()) / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)
    return given_a_small_model(folder, publishers)


#: What pages take for granted.
GIVEN: dict[str, Callable[[Path, Server], dict[str, Any]]] = {
    "README.md": given_to_the_readme,
    "docs/index.md": given_to_the_readme,
    "docs/at_a_glance.md": given_to_the_readme,
    "docs/commands.md": given_a_folder_of_digits,
    "docs/embeddings.md": given_a_folder_of_digits,
    "docs/weights.md": given_a_small_model,
    "docs/finetuning.md": given_to_finetuning,
    "docs/export.md": given_digits,
}


#: Pages that take models of which a forward pass lasts.
NARROW = ("README.md", "docs/index.md", "docs/at_a_glance.md", "docs/finetuning.md")

#: Where a schedule is searched, which need not be by a clock.
TUNES_HERE = "docs/tuning.md"

#: tests/clients/test_page.py runs its blocks, where the packages are that they take.
ELSEWHERE = "docs/works_with.md"


# huggingface_hub's way to send a large file is one that its HTTP library no longer likes.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != ELSEWHERE])
def test_every_block_runs(page: str, folder: Path, publishers: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in NARROW:
        narrow(monkeypatch)
    if page == TUNES_HERE:
        monkeypatch.setattr(costs, "time_rounds", clock(tomevit.create("digits_p1")))
    monkeypatch.setattr("urllib.request.urlopen", lambda url: io.BytesIO((folder / "photo.jpg").read_bytes()))
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
        cli.load_command(rest[0]).make_context(rest[0], rest[1:])
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
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *rest in lines:
        if "tomevit" in (program, *rest[-5:]):
            verb = [program, *rest][[program, *rest].index("tomevit") + 1]
            assert verb in cli.VERBS or verb in ("--traceback", "--version"), rest
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
