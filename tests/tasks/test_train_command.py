"""Training from the command line."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tomevit
from benchmarks.peers import torchvision  # noqa: F401  # the way to import it beside a CPU torch
from tests.tools.test_training_data import folder  # noqa: F401
from tomevit import cli
from tomevit.models import DistilledLogits
from tomevit.tasks.demo import accuracy, held_out
from tomevit.tasks.train import loop
from tomevit.tasks.train.options import FREE, Options, command, complete, overridden
from tomevit.tasks.train.report import COSTS, not_learned
from tomevit.training.recipes import recipe

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")

ROOT = Path(__file__).parents[2]
DIGITS = "digits --model digits_p1"
LITTLE = f"{DIGITS} --limit 48 --measure 48 --batch 16 --epochs 2 --threads 1 --r 8"
EVERYTHING = """
    --drop-path 0.2 --ema 0.9 --mixup 0.8 --cutmix 1 --erasing 0.25 --randaugment 2 9 --repeats 2 --accumulate 2
    --clip 1 --layer-decay 0.8 --r-warmup 1.5 --freeze 1 --lr 0.01 --channels-last --grad-checkpointing
"""


def start(out: Path, options: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--out", str(out), *shlex.split(options)])
    assert not ended.value.code


def run(out: Path, options: str) -> dict[str, Any]:
    """The report."""
    start(out, options)
    return json.loads((out / "report.json").read_text())


def weights(out: Path, name: str = "model") -> dict[str, Tensor]:
    return tomevit.load(out / f"{name}.safetensors").state_dict()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """A run of 6 steps with nothing special about it."""
    out = tmp_path_factory.mktemp("little")
    run(out, LITTLE)
    return out


def test_training_with_merging_recovers_what_merging_cost(tmp_path):
    before = accuracy(tomevit.create("digits_p1.plain", pretrained=True), *held_out(), r=16)
    report = run(tmp_path, f"{DIGITS} --pretrained true --keep-head --r 16 --epochs 1 --lr 4e-3 --threads 1")
    model = tomevit.load(tmp_path / "model.safetensors")
    assert accuracy(model, *held_out(), r=16) > before + 2
    assert report["accuracy"]["model"]["r = 16"] == pytest.approx(accuracy(model, *held_out(), r=16))
    assert report["accuracy"]["model"]["r = 0"] == pytest.approx(accuracy(model, *held_out(), r=0))
    assert report["epochs"][-1]["accuracy"] == report["accuracy"]["model"]["r = 16"]


def test_fresh_weights_learn_with_the_defaults(tmp_path, capsys):
    report = run(tmp_path, f"{DIGITS} --r 16 --epochs 4 --measure 180 --threads 1")
    assert report["accuracy"]["model"]["r = 16"] > 45
    assert report["not_learned"] is None
    said = capsys.readouterr()
    assert said.out.startswith(
        "digits_p1 from fresh weights, r = 16, 4 epochs of 22 steps; 1437 images to train on, 180"
    )
    assert said.err == ""


def test_a_run_that_learned_nothing_says_so(tmp_path, capsys):
    report = run(tmp_path, f"{LITTLE} --lr 0")
    said = capsys.readouterr().err
    assert said == f"tomevit: {report['not_learned']}\n"
    assert re.search(r"no better than guessing, as far as 48 images can tell: [\d.]+ % are right", said)
    assert "Try more --epochs, or another --lr than 0, or to begin with --pretrained weights" in said


def test_what_to_try_depends_on_the_loss():
    run = Namespace(data=Namespace(classes=("a", "b")), options=Options(pretrained="true", lr=1e-3))
    trained = loop.Trained([{"loss": 0.69}, {"loss": 0.1}], 2, [], None)
    said = not_learned(loop.Accuracy(55, 100, 52), trained, run)
    assert said.endswith("knows the images it was trained on, and no others. Try more images")
    assert "the commonest class alone would make 52.00 %" in said
    assert not_learned(loop.Accuracy(65, 100, 52), trained, run) is None
    assert not_learned(loop.Accuracy(90, 100, 90), trained, run)


def test_what_is_written_describes_itself(little):
    assert all(check.passed for check in tomevit.verify(little / "model.safetensors"))
    card, report = tomevit.load(little / "model.safetensors").card, json.loads((little / "report.json").read_text())
    assert (card.name, card.r, card.class_names) == ("digits_p1", 8, tuple("0123456789"))
    assert card.notes == f"Trained with: {report['command']}"
    assert report["steps_timed"] == 6
    assert report["images_per_second"] == pytest.approx(16 / report["seconds_per_step"])
    assert report["peak_memory_mib"] > 50
    assert [entry["epoch"] for entry in report["epochs"]] == [1, 2]
    assert report["best_epoch"] == 1 + max(range(2), key=lambda i: report["epochs"][i]["accuracy"])
    assert {"torch", "python", "device", "tomevit"} <= report["environment"].keys()
    assert sorted(path.name for path in little.iterdir()) == ["checkpoint.pt", "model.safetensors", "report.json"]


def test_the_command_of_the_report_makes_the_same_weights(little, tmp_path):
    said = json.loads((little / "report.json").read_text())["command"]
    run(tmp_path, said.removeprefix("tomevit train"))
    assert equal(weights(tmp_path), weights(little))


# --- Interruptions ----------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    options = f"{DIGITS} --limit 256 --measure 32 --batch 16 --epochs 2 --r 8"
    options += " --drop-path 0.1 --ema 0.9 --save-every 2 --threads 1"
    run(tmp_path / "whole", options)
    killed, checkpoint = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, "-m", "tomevit", "train", "--out", str(killed), *shlex.split(options)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    saves, seen, wanted = 0, 0, random.Random().randint(1, 12)  # of 18
    while saves < wanted and process.poll() is None:
        if checkpoint.exists() and (changed := checkpoint.stat().st_mtime_ns) != seen:
            saves, seen = saves + 1, changed
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it should not have ended by itself"
    assert not (killed / "report.json").exists()

    report = run(killed, "--resume")
    assert 0 < report["steps_timed"] < 32
    for name in ("model", "ema"):
        assert equal(weights(killed, name), weights(tmp_path / "whole", name)), f"killed after save {wanted}"
    assert sorted(path.name for path in killed.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, capsys):
    options, files = f"{LITTLE} {EVERYTHING}", ["model", "ema"]
    whole = run(tmp_path / "whole", options)
    start(tmp_path / "part", f"{options} --steps 1")
    start(tmp_path / "part", "--resume --steps 4 --workers 1")
    assert "stopped after 4 steps; tomevit train --resume -o" in capsys.readouterr().out
    resumed = run(tmp_path / "part", f"{options} --resume")
    assert resumed["steps_timed"] == 2
    for name in files:
        assert equal(weights(tmp_path / "part", name), weights(tmp_path / "whole", name))
    for same in ("accuracy", "epochs", "best_epoch", "command"):
        assert resumed[same] == whole[same]


def test_ctrl_c_ends_after_the_step_and_says_how_to_go_on(little, tmp_path, monkeypatch, capsys):
    merged_at, steps = loop.merged_at, iter(range(6))
    interrupted = [signal.SIGINT if step == 3 else signal.SIGURG for step in range(6)]  # Python ignores SIGURG

    def press(*arguments: Any) -> Any:
        signal.raise_signal(interrupted[next(steps)])
        return merged_at(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "merged_at", press)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--out", str(tmp_path), *shlex.split(LITTLE)])
    assert ended.value.code == 130
    said = capsys.readouterr().err.strip()
    goes_on = re.fullmatch("tomevit: interrupted; tomevit (train --resume -o .*) goes on from there", said)
    assert goes_on, said
    with pytest.raises(SystemExit):
        cli.main(shlex.split(goes_on[1]))
    assert json.loads((tmp_path / "report.json").read_text())["steps_timed"] == 2
    assert equal(weights(tmp_path), weights(little))


def test_the_average_lags_behind(tmp_path):
    report = run(tmp_path, f"{LITTLE} --ema 0.9")
    now, average = weights(tmp_path), weights(tmp_path, "ema")
    assert not equal(now, average)
    assert report["accuracy"].keys() == {"model", "ema"}
    assert report["epochs"][-1]["ema_accuracy"] == report["accuracy"]["ema"]["r = 8"]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(little, capsys):
    before, told = weights(little), json.loads((little / "report.json").read_text())
    again = run(little, "--resume")
    assert {name: again[name] for name in COSTS} == {name: told[name] for name in COSTS}
    assert equal(weights(little), before)
    assert "the run had ended: nothing was left to train" in capsys.readouterr().out
    (little / "report.json").write_text("[")
    assert run(little, "--resume")["seconds_per_step"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--r 4", "began with --r 8, and cannot go on with --r 4"),
        ("--model vit_b16", "began with --model digits_p1, and cannot go on with --model vit_b16"),
        ("elsewhere", "began with digits, and cannot go on with elsewhere"),
        ("--ema 0.9", "began with --ema 0.0, and cannot go on with --ema 0.9"),
        ("--compile", "began with no --compile, and cannot go on with --compile"),
        ("--recipe mae_b16.tome_r16", "began with no --recipe, and cannot go on with --recipe mae_b16.tome_r16"),
        ("--threads 2", "began with --threads 1, and cannot go on with --threads 2"),
    ],
)
def test_another_configuration_cannot_go_on(little, change, said, capsys):
    assert refusal(capsys, little, f"--resume {change}") == f"tomevit: the run in {little} {said}"


def test_other_data_in_the_same_place_cannot_go_on(folder, tmp_path, capsys):  # noqa: F811
    start(tmp_path / "run", f"{folder} --model deit_ti16 --img-size 32 --batch 2 --epochs 1 --threads 1 --steps 1")
    (folder / "train" / "cat" / "0.png").unlink()
    assert "has changed since the run in" in refusal(capsys, tmp_path / "run", "--resume")


# --- Pieces -----------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    options = Options(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, epochs=25)
    rates = {passed: loop.learning_rate(passed, 1e-3, options) for passed in (0, 2.5, 5, 15, 25)}
    assert rates == pytest.approx({0: 1e-6, 2.5: (1e-6 + 1e-3) / 2, 5: 1e-3, 15: (1e-3 + 1e-5) / 2, 25: 1e-5})
    assert loop.learning_rate(0, 1e-3, replace(options, warmup_epochs=0)) == pytest.approx(1e-3)


def test_r_rises_from_nothing():
    rising = Options(r=16, r_warmup=4.0)
    assert [loop.merged_at(passed, rising) for passed in (0, 1, 2, 3.5, 4, 9)] == [0, 4, 8, 14, 16, 16]
    assert loop.merged_at(0, Options(r=(8, -1.0), r_warmup=0.0)) == (8, -1.0)


def test_both_heads_of_a_distilled_model_learn():
    labels = torch.tensor([1, 0])
    logits = DistilledLogits(torch.randn(2, 3), torch.randn(2, 3))
    wanted = sum(F.cross_entropy(head, labels, label_smoothing=0.1) for head in logits) / 2
    assert loop.cross_entropy(logits, labels, 0.1) == pytest.approx(wanted)


def test_mixtures_keep_what_labels_sum_to():
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    assert loop.mixing(0.0, 0.0, 5) is None
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, shares = loop.mixing(*alphas, 5)(images, labels)
        assert mixed.shape == images.shape
        assert not torch.equal(mixed, images)
        assert torch.allclose(shares.sum(1), torch.ones(8))


def test_accumulated_parts_learn_as_the_whole(little, tmp_path):
    run(tmp_path, f"{LITTLE} --accumulate 4")
    ours, theirs = weights(tmp_path), weights(little)
    assert not equal(ours, theirs)  # sums in another order
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_checkpointing_changes_no_weight(little, tmp_path):
    run(tmp_path, f"{LITTLE} --grad-checkpointing")
    assert equal(weights(tmp_path), weights(little))


def test_frozen_blocks_keep_their_weights(tmp_path):
    run(tmp_path, f"{LITTLE} --freeze 2 --pretrained true")
    before, after = tomevit.create("digits_p1", pretrained=True).state_dict(), weights(tmp_path)
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {n for n in after if n.startswith(("blocks.0", "blocks.1", "patch_embed", "pos_embed", "cls_token"))}


def test_a_folder_of_images_from_another_models_weights(folder, tmp_path):  # noqa: F811
    before, file = tomevit.create("deit_ti16", num_classes=5), tmp_path / "before.safetensors"
    tomevit.save(before, file)
    options = f"{folder} --model deit_ti16 --pretrained {file} --img-size 64 --r 1 --batch 3 --epochs 1"
    report = run(tmp_path / "run", f"{options} --threads 1 --amp bf16")
    model = tomevit.load(tmp_path / "run" / "model.safetensors")
    assert model.card.class_names == ("cat", "dog")
    assert model.config.img_size == (64, 64)
    assert report["images"] == {"trained_on": 6, "measured_on": 6}
    moved = (model.blocks[0].mlp.fc1.weight - before.blocks[0].mlp.fc1.weight).abs().max()
    assert 0 < moved < 0.01  # from there, not from fresh weights


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_fills_options_in_and_given_ones_win(tmp_path):
    given = {"data": "digits", "recipe": "mae_b16.tome_r16", "batch": 64, "randaugment": (1, 5), "out": str(tmp_path)}
    options, found = complete(given), recipe("mae_b16.tome_r16")
    assert (options.model, options.pretrained, options.r) == ("mae_b16", found.start, 16)
    assert (options.lr, options.lr_batch, options.layer_decay) == (found.lr, 256, 0.65)
    assert (options.batch, options.randaugment) == (64, (1, 5))
    assert overridden(options) == {"batch": [1024, 64], "randaugment": [(2, 27), (1, 5)]}
    assert command(options).startswith("tomevit train digits --recipe mae_b16.tome_r16 --batch 64 --randaugment 1 5 ")
    parsed = cli.load_command("train").make_context("train", shlex.split(command(options))[2:]).params
    again = {name: value for name, value in parsed.items() if value is not None and name != "resume"}
    assert complete(again | {"out": str(tmp_path)}) == options


def test_defaults_depend_on_the_start():
    fresh = complete({"data": "digits", "model": "digits_p1"})
    assert (fresh.epochs, fresh.lr, fresh.lr_batch, fresh.betas) == (60, pytest.approx(3e-3), 0, (0.9, 0.99))
    assert complete({"data": "mnist", "model": "digits_p2"}).lr == pytest.approx(2e-3)
    assert complete({"data": "digits", "model": "digits_p1", "epochs": 2}).warmup_epochs == pytest.approx(0.1)
    tuned = complete({"data": "digits", "model": "digits_p1", "pretrained": "true"})
    assert tuned == replace(Options(), data="digits", model="digits_p1", pretrained="true")
    assert (tuned.epochs, tuned.lr, tuned.lr_batch, tuned.warmup_epochs) == (10, 5e-4, 256, 0.5)
    assert complete({"data": "x", "recipe": "deit_ti16.tome_r13"}).lr == recipe("deit_ti16.tome_r13").lr
    assert command(fresh) == f"tomevit train digits --model digits_p1 --device cpu --threads {torch.get_num_threads()}"


def test_every_value_of_a_recipe_reaches_an_option():
    described = {"name", "title", "notes", "sources", "start", "optimizer", "loss", "distillation"}
    options = Options.__dataclass_fields__.keys()
    assert set(recipe("mae_b16.tome_r16").__dataclass_fields__) - described <= options
    assert set(FREE) <= options
    assert {parameter.name for parameter in cli.load_command("train").params} - {"resume"} == options


def test_a_dry_run_takes_the_whole_way_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", "--recipe deit_ti16.tome_r13 --dry-run --batch 2 --threads 1")
    tokens, costs = capsys.readouterr().out.splitlines()
    assert tokens == "deit_ti16, r = 13: 197, 184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41 tokens"
    assert re.fullmatch(r"[\d.e-]+ s per step, [\d.e+]+ images/s, \d+ MiB of memory at most", costs)
    assert not list(tmp_path.iterdir())


# --- Wrong use --------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], out: Path, options: str) -> str:
    """What is said on stderr, in one line, before the program ends with status 2."""
    with pytest.raises(SystemExit) as raised:
        cli.main(["train", "--out", str(out), *shlex.split(options)])
    said = capsys.readouterr().err
    assert raised.value.code == 2
    assert said.count("\n") == 1
    return said.strip()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nowhere --model digits_p1", "there is no folder nowhere; the data are 'digits', 'mnist', or a folder"),
        (
            "digits --model vit_b16",
            "the digits have 1 channel and 8x8 pixels, and vit_b16 takes 3 and 224x224; --model digits_p1",
        ),
        ("digits --model vit_b17", "there is no model 'vit_b17'; did you mean vit_b16"),
        ("digits --recipe mae_b16.tome_r15", "there is no recipe 'mae_b16.tome_r15'; did you mean mae_b16.tome_r16"),
        (
            "digits --recipe mae_b16.tome_r16 --model vit_b16",
            "the recipe mae_b16.tome_r16 is for mae_b16, and --model is vit_b16",
        ),
        (
            f"{DIGITS} --r 33",
            "--r 33 asks for 33 tokens to merge in one block, and digits_p1 has 64 patches, of which half can",
        ),
        (f"{DIGITS} --r [40,25]", "asks for 40 tokens"),
        (f"{DIGITS} --r 8,-1 --r-warmup 1", "--r-warmup raises an int from 0 on, and --r is (8, -1.0)"),
        (f"{DIGITS} --limit 50", "--batch 64 is larger than the data: there are 50 images to train on"),
        (f"{DIGITS} --batch 64 --accumulate 3", "--batch 64 does not divide into 3 parts"),
        (f"{DIGITS} --epochs 2 --warmup-epochs 2", "--warmup-epochs 2 leaves nothing of --epochs 2"),
        ("--resume", "there is nothing to resume: "),
        ("digits", "name a model with --model, as in --model vit_b16, or a recipe with --recipe"),
        ("--model digits_p1", "name the data: a folder with train/ and val/ in it, or digits, or mnist"),
        (f"{DIGITS} --keep-head", "--keep-head keeps a pretrained head, and --pretrained is none"),
        (f"{DIGITS} --pretrained nowhere.pth", "nowhere.pth"),
        (f"{DIGITS} --device mars", "there is no device 'mars' here"),
        (f"{DIGITS} --freeze 5", "there are 4 blocks, and 5 cannot be frozen"),
        (". --model vit_b16 --validate", "--validate is for the digits"),
        (f"{DIGITS} --img-size 16", "digits_p1 takes 1 and 16x16; leave out --img-size"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, capsys, options, said):
    assert said in refusal(capsys, tmp_path / "run", options)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    said = refusal(capsys, tmp_path, DIGITS)
    assert said == "tomevit: the digits need scikit-learn: pip install 'tomevit[train]'"


def test_a_head_that_does_not_fit_is_not_kept(tmp_path, folder, capsys):  # noqa: F811
    model, file = tomevit.create("deit_ti16", num_classes=5, img_size=32), tmp_path / "head.safetensors"
    options = f"{folder} --model deit_ti16 --batch 2 --keep-head --pretrained {file}"
    tomevit.save(model, file)
    said = refusal(capsys, tmp_path / "run", options)
    assert said == "tomevit: the head has 5 classes, and the data 2; without --keep-head it is replaced"
    model.reset_classifier(2)
    tomevit.save(model, file, card=replace(model.card, class_names=("cat", "mouse")))
    said = refusal(capsys, tmp_path / "run", options)
    assert said == "tomevit: the head has a class mouse, and the data dog; without --keep-head it is replaced"


def test_a_run_is_not_written_over(little, capsys):
    said = refusal(capsys, little, DIGITS)
    assert said == f"tomevit: {little} has a run in it already: go on with --resume, or name another folder with --out"


def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    assert "checkpoint.pt is no checkpoint of this program" in refusal(capsys, tmp_path, "--resume")
    names = ("options", "data", "done", "generators", "model", "optimizer", "scaler")
    for other in ({"options": {}}, [1], {name: {} for name in names}):
        torch.save(other, tmp_path / "checkpoint.pt")
        assert "checkpoint.pt is no checkpoint of this program" in refusal(capsys, tmp_path, "--resume")


@pytest.mark.parametrize(
    "option",
    ["--lr inf", "--lr nan", "--layer-decay 0", "--betas 0.9 1", "--ema 1", "--crop-pct 0", "--epochs 0", "--seed -1"],
)
def test_impossible_numbers(capsys, tmp_path, option):
    said = refusal(capsys, tmp_path, f"{DIGITS} {option}")
    assert said.startswith(f"tomevit: Invalid value for '{option.split()[0]}': ")
    assert "is not in the range" in said or "is no finite number" in said


def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(tmp_path, folder, capsys):  # noqa: F811
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(b"no image")
    options = f"{folder} --model deit_ti16 --img-size 32 --batch 6 --workers 1 --threads 1"
    said = refusal(capsys, tmp_path / "run", options)
    assert said.startswith(f"tomevit: {path} cannot be read as an image")
