"""`tomevit convert`, `verify` and `export`, as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import tomevit
from tests import foreign
from tests.server import Server
from tomevit import cli
from tomevit.cli import running
from tomevit.weights import checkpoint

Run = Any


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A checkpoint of the smallest published size."""
    return foreign.fill(foreign.deit(foreign.sizes(tomevit.card("deit_ti16").config)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    """What a user may have: only read."""
    folder = tmp_path_factory.mktemp("files")
    foreign.write(folder / "deit.pth", tensors, key="model", **foreign.TRAINING)
    foreign.write(folder / "flat.safetensors", tensors)
    foreign.write(folder / "two.pth", tensors, key="model", model_ema=tensors)
    large = tensors | {"norm.weight": tensors["norm.weight"] * 1e6}
    foreign.write(folder / "large.pth", large, key="model")
    (folder / "page.pth").write_text("<!DOCTYPE html><title>404 Not Found</title>")
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").touch()
    (folder / "directory").mkdir()
    tomevit.convert(folder / "deit.pth", folder / "ours.safetensors", img_size=(32, 32))
    return folder


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    files: Path,
    tmp_path: Path,
    set_environment: Any,
) -> Run:
    """Exit status, output and errors of `tomevit ARGUMENTS`, offline, in a directory that has the files."""
    set_environment(HF_HUB_OFFLINE="1")
    (tmp_path / "here").mkdir()
    for file in files.iterdir():
        (tmp_path / "here" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_convert_reports_what_it_did(run: Run) -> None:
    status, out, err = run("convert", "deit.pth", "-o", "out.safetensors", "--img-size", "64x32", "--num-classes", "3")
    assert (status, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["source"] == "deit.pth"
    assert len(lines["sha256"]) == 64
    assert lines["recognised"].startswith("deit under 'model': it has")
    assert lines["model"] == "deit_ti16"
    assert lines["tensors"] == "152 parameters, of which 152 keep their names"
    assert lines["left"] == "out    optimizer, lr_scheduler, epoch, args, max_accuracy: not weights of the model"
    assert "changed     positions resampled from 14x14 to 4x2 patches, bicubic\n" in out
    assert "changed     head replaced: fresh weights for 3 classes instead of 1000\n" in out
    assert lines["written"] == "out.safetensors"
    assert tomevit.load("out.safetensors").config.img_size == (64, 32)


def test_convert_json(run: Run) -> None:
    status, out, _ = run("convert", "deit.pth", "-o", "out.safetensors", "--dtype", "bfloat16", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["names"]["head.weight"] == ["head.weight"]
    assert report["left_out"]["optimizer"] == "not weights of the model"
    assert report["changes"] == ["float32 rounded to bfloat16"]
    assert report["out"] == "out.safetensors"


def test_renamed_tensors_are_shown_once_for_all_blocks(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    foreign.write(Path("model.npz"), foreign.fill(foreign.vit_jax(foreign.sizes(tomevit.card("vit_ti16").config))))
    _, out, _ = run("convert", "model.npz")
    assert "   Transformer/encoderblock_{i}/LayerNorm_2/scale -> blocks.{i}.norm2.weight\n" in out
    parts = [
        f"Transformer/encoderblock_{{i}}/MultiHeadDotProductAttention_1/{x}/bias" for x in ("query", "key", "value")
    ]
    assert f"   {' + '.join(parts)} -> blocks.{{i}}.attn.qkv.bias\n" in out
    assert "blocks.0" not in out
    assert "written     vit_ti16.safetensors" in out


def test_a_widened_dtype_is_not_called_rounded(run: Run) -> None:
    run("convert", "deit.pth", "-o", "half.safetensors", "--dtype", "float16")
    _, out, _ = run("convert", "half.safetensors", "-o", "out.safetensors", "--dtype", "float32")
    assert "changed     float16 made float32, without loss\n" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("directory", "directory is a directory without model.safetensors"),
        ("missing.pth", "there is no file missing.pth"),
        ("vit_b61", "there is no file vit_b61, and no model 'vit_b61'; did you mean vit_b16"),
        ("", "the source's name is empty"),
        ("empty.pth", "empty.pth is empty"),
        ("text.pth", 'text.pth is text ("hello")'),
        ("page.pth", "404 Not Found"),
        ("flat.safetensors", "it fits deit_ti16 or vit_ti16"),
        ("two.pth", "has several state dicts, 'model', 'model_ema'"),
        ("two.pth --key ema", "has nothing at 'ema'"),
        ("deit.pth --model vit_b61", "did you mean vit_b16"),
        ("deit.pth --model deit_s16", "does not fit deit_s16: embed_dim 192 where the model has 384"),
        ("deit.pth --format swag", "deit.pth: not of the format swag: it has no conv_proj.weight"),
        (
            "deit.pth --format swga",
            "there is no format 'swga'; there are timm, timm_clip, timm_eva, timm_eva_clip, deit, mae",
        ),
        ("deit.pth --img-size 100", "the nearest that does is 96x96"),
        ("missing.pth --model deit_ti16 --img-size 100", "the nearest that does is 96x96"),
        ("deit.pth --img-size big", "224x320"),
        ("deit.pth --num-classes -1", "--num-classes"),
        ("deit.pth --dtype int8", "--dtype"),
        ("large.pth --dtype float16", "float16 ends at 65504, and there are larger values in norm.weight"),
        ("missing.pth -o missing/out.safetensors", "there is no directory missing to write out.safetensors into"),
        ("deit.pth -o directory", "'directory' is a directory"),
        ("deit.pth -o deit.pth", "it must end in .safetensors"),
        ("ours.safetensors -o ours.safetensors", "ours.safetensors is what would be read"),
        ("ours.safetensors --format timm", "is a file of tomevit's own: it takes neither a format nor a key"),
        ("ours.safetensors --model vit_ti16", "ours.safetensors holds deit_ti16 by its own account, and not vit_ti16"),
        ("deit_s16.tome_r13", "deit_s16.tome_r13/f367470145_deit_S_r13.pth"),
        ("hf-hub:bad", "it must be hf-hub:owner/repo"),
        ("hf-hub:a/b", "HF_HUB_OFFLINE is set"),
        ("https://example.org/x.pth", "https://example.org/x.pth elsewhere and put it at"),
        ("/dev/null", "/dev/null is not a regular file"),
    ],
)
def test_a_mistake_in_convert(
    run: Run, caplog: pytest.LogCaptureFixture, arguments: str, says: str, tmp_path: Path
) -> None:
    before = sorted(Path().iterdir())
    options = arguments.split(" ")
    status, out, err = run("convert", *options, *([] if "-o" in options else ["-o", "out.safetensors"]))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("tomevit: ")
    assert says in err
    assert sorted(Path().iterdir()) == before
    assert not list((tmp_path / "home").glob("unfinished/*"))


def test_a_default_name_never_replaces_a_file(run: Run) -> None:
    Path("deit_ti16.safetensors").write_text("precious")
    status, _, err = run("convert", "deit.pth")
    assert (status, err) == (2, "tomevit: deit_ti16.safetensors exists already: name the file to write\n")
    assert Path("deit_ti16.safetensors").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(run: Run) -> None:
    Path("locked").mkdir(mode=0o500)
    status, _, err = run("convert", "deit.pth", "-o", "locked/out.safetensors")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "Permission denied: 'locked/out.safetensors'" in err


def test_interrupted_conversions_leave_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.safetensors").write_text("as it was")
    before = sorted(Path().iterdir())

    def interrupt(tensors: Any, also: Any) -> str:
        also(memoryview(b"half a file"))
        signal.raise_signal(signal.SIGINT)
        return ""

    monkeypatch.setattr(checkpoint, "digest", interrupt)
    before_us = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that runs tests may ignore it
    try:
        status, out, err = run("convert", "deit.pth", "-o", "out.safetensors")
    finally:
        signal.signal(signal.SIGINT, before_us)
    assert (status, out, err) == (130, "", "\ntomevit: interrupted\n")
    assert sorted(Path().iterdir()) == before
    assert Path("out.safetensors").read_text() == "as it was"


def test_on_a_terminal_it_asks(files: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = "from tomevit.cli import main; main()"
    arguments = ["convert", str(files / "flat.safetensors"), "-o", str(tmp_path / "out.safetensors")]
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        os.write(ours, b"neither\ndeit_ti16\n")
        out, _ = process.communicate(timeout=60)
        shown = os.read(ours, 10_000).decode()
        os.close(ours)
    assert process.returncode == 0
    assert "it fits deit_ti16 or vit_ti16, which differ in preprocessing" in shown
    assert "model (deit_ti16, vit_ti16): " in shown
    assert "model       deit_ti16\n" in out
    assert tomevit.load(tmp_path / "out.safetensors").card.full_name == "deit_ti16"


# ------------------------------------------------------------------------------------------- what --model may be


@pytest.mark.usefixtures("set_environment")
def test_of_a_repository_that_the_zoo_does_not_know_the_weights_say_what_they_are(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tomevit.save(tomevit.create("digits_p1", pretrained=True), Path(folder) / "model.safetensors")
        server.put_hub("me/mine", "model.safetensors", (Path(folder) / "model.safetensors").read_bytes())
    card, known = running.card_of_argument("hf-hub:me/mine"), tomevit.card("digits_p1")
    assert (card.config.depth, card.config.num_classes) == (known.config.depth, known.config.num_classes)
    assert running.untrained("hf-hub:me/mine").config.depth == known.config.depth


@pytest.mark.usefixtures("set_environment")
def test_what_is_published_is_known_and_measured_without_a_download(server: Server) -> None:
    for name in ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_ti16.augreg_in21k_ft_in1k"):
        assert running.card_of_argument(name).full_name == "vit_ti16.augreg_in21k_ft_in1k"
        assert running.untrained(name, (32, 32)).config.img_size == (32, 32)
    assert server.requests == []


@pytest.mark.parametrize("command", ["bench {}", "classify deit.pth --model {}", "export {} --format timm -o x.pth"])
@pytest.mark.parametrize("name", ["nope.safetensors", "./vit_b16", "no/such"])
def test_a_missing_file_is_called_so_by_every_command(run: Run, command: str, name: str) -> None:
    assert run(*command.format(name).split()) == (2, "", f"tomevit: there is no file {name}\n")


# --------------------------------------------------------------------------------------------------------------- verify


def test_verify(run: Run) -> None:
    status, out, err = run("verify", "ours.safetensors")
    assert (status, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", name] for name in ("file", "structure", "digest", "values", "forward")
    ]


def test_verify_json_and_a_damaged_file(run: Run) -> None:
    data = bytearray(Path("ours.safetensors").read_bytes())
    data[-5000] ^= 1
    Path("damaged.safetensors").write_bytes(data)
    status, out, _ = run("verify", "damaged.safetensors", "--json")
    assert status == 1
    assert [check["name"] for check in json.loads(out) if not check["passed"]] == ["digest"]


@pytest.mark.parametrize("source", ["deit.pth", "flat.safetensors", "two.pth --key model_ema", "same.safetensors"])
def test_verify_against_the_same_weights_in_any_format(run: Run, source: str, files: Path) -> None:
    run("convert", "deit.pth", "-o", "same.safetensors")
    Path("same.bin").symlink_to(Path("same.safetensors"))
    status, out, _ = run("verify", "same.bin", "--against", *source.split())
    assert status == 0
    assert "ok    source            all 152 tensors agree with" in out


def test_verify_against_others(run: Run) -> None:
    status, out, _ = run("verify", "ours.safetensors", "--against", "deit.pth")
    assert status == 1
    assert "FAIL  source            pos_embed is (1, 5, 192), and (1, 197, 192) in the source\n" in out
    bare = foreign.fill(foreign.bare_mae(foreign.sizes(tomevit.card("deit_ti16").config)))
    foreign.write(Path("bare.safetensors"), bare)
    status, out, _ = run("verify", "ours.safetensors", "--against", "bare.safetensors")
    assert status == 1
    assert "head.bias is only in the file" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("missing", "there is no file missing"),
        ("directory", "directory is a directory"),
        ("ours.safetensors --against missing.pth", "there is no file missing.pth"),
        ("ours.safetensors --against two.pth", "has several state dicts"),
        ("ours.safetensors --against text.pth", "text.pth is text"),
    ],
)
def test_a_mistake_in_verify(run: Run, arguments: str, says: str) -> None:
    status, out, err = run("verify", *arguments.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert says in err


@pytest.mark.parametrize("name", ["deit.pth", "flat.safetensors", "text.pth", "empty.pth"])
def test_what_is_no_file_of_ours_fails_verification(run: Run, name: str) -> None:
    status, out, err = run("verify", name)
    assert (status, err) == (1, "")
    assert out.startswith(f"FAIL  file  {name} ")
    assert "which tomevit convert reads" in out or "tomevit convert reads other formats" in out


# --------------------------------------------------------------------------------------------------------------- export


def test_export(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    run("convert", "deit.pth", "-o", "same.safetensors")
    status, out, err = run("export", "same.safetensors", "--format", "deit", "-o", "back.pth")
    assert (status, out, err) == (0, "written     back.pth\n", "")
    back = torch.load("back.pth", weights_only=True)["model"]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    status, out, _ = run("export", "same.safetensors", "--format", "hf_vit", "-o", "folder", "--json")
    names = ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert json.loads(out) == {"written": [f"folder/{name}" for name in names], "unsaid": []}
    assert sorted(file.name for file in Path("folder").iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("flat.safetensors --format timm -o out.pth", "it fits deit_ti16 or vit_ti16"),
        ("missing.safetensors --format timm -o out.pth", "there is no file missing.safetensors"),
        ("vit_b61 --format timm -o out.pth", "did you mean vit_b16"),
        ("directory --format timm -o out.pth", "directory is a directory"),
        ("vit_ti16 --format timm -o out.pth", "HF_HUB_OFFLINE is set"),
        (
            "ours.safetensors --format tmim -o out.pth",
            "there is no format 'tmim'; did you mean timm, timm_eva or aoti?",
        ),
        ("ours.safetensors --format timm", "--out"),
        ("ours.safetensors -o out.pth", "--format"),
        ("ours.safetensors --format timm -o missing/out.pth", "there is no directory missing"),
        ("ours.safetensors --format timm -o out.xyz", "out.xyz must end in .safetensors"),
        ("ours.safetensors --format swag -o folder", "swag has no directories of its own: name a file"),
        ("ours.safetensors --format deit3 -o out.pth", "its pos_embed_prefix is True"),
        ("ours.safetensors --format hf_deit -o folder", "transformers' deit cannot hold dist_token=False"),
        ("ours.safetensors --format timm -o ours.safetensors", "ours.safetensors is what would be read"),
    ],
)
def test_a_mistake_in_export(run: Run, caplog: pytest.LogCaptureFixture, arguments: str, says: str) -> None:
    before = sorted(Path().iterdir())
    status, out, err = run("export", *arguments.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert sorted(Path().iterdir()) == before


def test_a_failed_export_leaves_no_directory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "digest", fail)
    status, _, err = run("export", "ours.safetensors", "--format", "timm", "-o", "folder")
    assert (status, err) == (2, "tomevit: folder/model.safetensors cannot be written: No space left on device\n")
    assert not Path("folder").exists()
