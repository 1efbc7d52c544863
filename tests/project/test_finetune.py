"""Fine-tuning from the command line."""

from __future__ import annotations

import json
import random
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
from examples import finetune
from examples.finetune_options import FREE, command, make_parser, read_options
from tests.tools.test_training_data import folder  # noqa: F401
from tomevit.models import DistilledLogits
from tomevit.tasks.demo import accuracy, held_out
from tomevit.training.recipes import recipe

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")

ROOT = Path(__file__).parents[2]
LITTLE = "--limit 48 --measure 48 --batch 16 --epochs 2 --threads 1 --r 8"
EVERYTHING = """
    --drop-path 0.2 --ema 0.9 --mixup 0.8 --cutmix 1 --erasing 0.25 --randaugment 2 9 --repeats 2 --accumulate 2
    --clip 1 --layer-decay 0.8 --r-warmup 1.5 --freeze 1 --lr 0.01 --channels-last --grad-checkpointing
"""


def start(out: Path, options: str) -> None:
    finetune.main(["--out", str(out), *shlex.split(options)])


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
    report = run(tmp_path, "--pretrained true --keep-head --r 16 --epochs 1 --lr 4e-3 --threads 1")
    model = tomevit.load(tmp_path / "model.safetensors")
    assert accuracy(model, *held_out(), r=16) > before + 2
    assert report["accuracy"]["model"]["r = 16"] == pytest.approx(accuracy(model, *held_out(), r=16))
    assert report["accuracy"]["model"]["r = 0"] == pytest.approx(accuracy(model, *held_out(), r=0))
    assert report["epochs"][-1]["accuracy"] == report["accuracy"]["model"]["r = 16"]


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
    run(tmp_path, said.removeprefix("python -m examples.finetune"))
    assert equal(weights(tmp_path), weights(little))


# --- Interruptions ----------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    options = (
        "--limit 256 --measure 32 --batch 16 --epochs 2 --r 8 --drop-path 0.1 --ema 0.9 --save-every 2 --threads 1"
    )
    run(tmp_path / "whole", options)
    killed, checkpoint = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.finetune", "--out", str(killed), *shlex.split(options)],
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
    assert "stopped after 4 steps; --resume goes on" in capsys.readouterr().out
    resumed = run(tmp_path / "part", f"{options} --resume")
    assert resumed["steps_timed"] == 2
    for name in files:
        assert equal(weights(tmp_path / "part", name), weights(tmp_path / "whole", name))
    for same in ("accuracy", "epochs", "best_epoch", "command"):
        assert resumed[same] == whole[same]


def test_the_average_lags_behind(tmp_path):
    report = run(tmp_path, f"{LITTLE} --ema 0.9")
    now, average = weights(tmp_path), weights(tmp_path, "ema")
    assert not equal(now, average)
    assert report["accuracy"].keys() == {"model", "ema"}
    assert report["epochs"][-1]["ema_accuracy"] == report["accuracy"]["ema"]["r = 8"]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(little):
    before = weights(little)
    report = run(little, "--resume")
    assert report["seconds_per_step"] is None
    assert equal(weights(little), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--r 4", "began with --r 8, and cannot go on with --r 4"),
        ("--model vit_b16", "began with --model digits_p1, and cannot go on with --model vit_b16"),
        ("--data elsewhere", "began with --data digits, and cannot go on with --data elsewhere"),
        ("--ema 0.9", "began with --ema 0.0, and cannot go on with --ema 0.9"),
        ("--compile", "began with no --compile, and cannot go on with --compile"),
        ("--recipe mae_b16.tome_r16", "began with no --recipe, and cannot go on with --recipe mae_b16.tome_r16"),
        ("--threads 2", "began with --threads 1, and cannot go on with --threads 2"),
    ],
)
def test_another_configuration_cannot_go_on(little, change, said, capsys):
    assert refusal(capsys, little, f"--resume {change}") == f"finetune: the run in {little} {said}"


def test_other_data_in_the_same_place_cannot_go_on(folder, tmp_path, capsys):  # noqa: F811
    start(
        tmp_path / "run", f"--data {folder} --model deit_ti16 --img-size 32 --batch 2 --epochs 1 --threads 1 --steps 1"
    )
    (folder / "train" / "cat" / "0.png").unlink()
    assert "has changed since the run in" in refusal(capsys, tmp_path / "run", "--resume")


# --- Pieces -----------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    options = Namespace(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, epochs=25)
    rates = {passed: finetune.learning_rate(passed, 1e-3, options) for passed in (0, 2.5, 5, 15, 25)}
    assert rates == pytest.approx({0: 1e-6, 2.5: (1e-6 + 1e-3) / 2, 5: 1e-3, 15: (1e-3 + 1e-5) / 2, 25: 1e-5})
    options.warmup_epochs = 0
    assert finetune.learning_rate(0, 1e-3, options) == pytest.approx(1e-3)


def test_r_rises_from_nothing():
    rising = Namespace(r=16, r_warmup=4.0)
    assert [finetune.merged_at(passed, rising) for passed in (0, 1, 2, 3.5, 4, 9)] == [0, 4, 8, 14, 16, 16]
    assert finetune.merged_at(0, Namespace(r=(8, -1.0), r_warmup=0.0)) == (8, -1.0)


def test_both_heads_of_a_distilled_model_learn():
    labels = torch.tensor([1, 0])
    logits = DistilledLogits(torch.randn(2, 3), torch.randn(2, 3))
    wanted = sum(F.cross_entropy(head, labels, label_smoothing=0.1) for head in logits) / 2
    assert finetune.cross_entropy(logits, labels, 0.1) == pytest.approx(wanted)


def test_mixtures_keep_what_labels_sum_to():
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    assert finetune.mixing(0.0, 0.0, 5) is None
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, shares = finetune.mixing(*alphas, 5)(images, labels)
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
    options = f"--data {folder} --model deit_ti16 --pretrained {file} --img-size 64 --r 1 --batch 3 --epochs 1"
    report = run(tmp_path / "run", f"{options} --threads 1 --amp bf16")
    model = tomevit.load(tmp_path / "run" / "model.safetensors")
    assert model.card.class_names == ("cat", "dog")
    assert model.config.img_size == (64, 64)
    assert report["images"] == {"trained_on": 6, "measured_on": 6}
    moved = (model.blocks[0].mlp.fc1.weight - before.blocks[0].mlp.fc1.weight).abs().max()
    assert 0 < moved < 0.01  # from there, not from fresh weights


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_fills_options_in_and_given_ones_win(tmp_path):
    out = ["--out", str(tmp_path)]
    options, _ = read_options([*out, *shlex.split("--recipe mae_b16.tome_r16 --batch 64 --randaugment 1 5")])
    found = recipe("mae_b16.tome_r16")
    assert (options.model, options.pretrained, options.r) == ("mae_b16", found.start, 16)
    assert (options.lr, options.lr_batch, options.layer_decay) == (found.lr, 256, 0.65)
    assert (options.batch, options.randaugment) == (64, [1, 5])
    assert finetune.overridden(options) == {"batch": [1024, 64], "randaugment": [[2, 27], [1, 5]]}
    assert read_options([*out, *shlex.split(command(options))[3:]])[0] == options


def test_every_value_of_a_recipe_reaches_an_option():
    described = {"name", "title", "notes", "sources", "start", "optimizer", "loss", "distillation"}
    options = vars(make_parser().parse_args([]))
    assert set(recipe("mae_b16.tome_r16").__dataclass_fields__) - described <= options.keys()
    assert set(FREE) <= options.keys()


def test_a_dry_run_takes_the_whole_way_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", "--recipe deit_ti16.tome_r13 --dry-run --batch 2 --threads 1")
    tokens, costs = capsys.readouterr().out.splitlines()
    assert tokens == "deit_ti16, r = 13: 197, 184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41 tokens"
    assert json.loads(costs)["steps_timed"] == 2
    assert not list(tmp_path.iterdir())


# --- Wrong use --------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], out: Path, options: str) -> str:
    """What is said on stderr, in one line, before the program ends with status 2."""
    with pytest.raises(SystemExit) as raised:
        start(out, options)
    said = capsys.readouterr().err
    assert raised.value.code == 2
    assert said.count("\n") == 1
    return said.strip()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data nowhere", "there is no folder nowhere; the data are 'digits', 'mnist', or a folder"),
        (
            "--model vit_b16",
            "the digits have 1 channel and 8x8 pixels, and vit_b16 takes 3 and 224x224; --model digits_p1",
        ),
        ("--model vit_b17", "there is no model 'vit_b17'; did you mean vit_b16"),
        ("--recipe mae_b16.tome_r15", "there is no recipe 'mae_b16.tome_r15'; did you mean mae_b16.tome_r16"),
        (
            "--recipe mae_b16.tome_r16 --model vit_b16",
            "the recipe mae_b16.tome_r16 is for mae_b16, and --model is vit_b16",
        ),
        ("--r 33", "--r 33 asks for 33 tokens to merge in one block, and digits_p1 has 64 patches, of which half can"),
        ("--r [40,25]", "asks for 40 tokens"),
        ("--r 8,-1 --r-warmup 1", "--r-warmup raises an int from 0 on, and --r is (8, -1.0)"),
        ("--limit 50", "--batch 64 is larger than the data: there are 50 images to train on"),
        ("--batch 64 --accumulate 3", "--batch 64 does not divide into 3 parts"),
        ("--epochs 2 --warmup-epochs 2", "--warmup-epochs 2 leaves nothing of --epochs 2"),
        ("--resume", "there is nothing to resume: "),
        ("--keep-head", "--keep-head keeps a pretrained head, and --pretrained is none"),
        ("--pretrained nowhere.pth", "nowhere.pth"),
        ("--device mars", "there is no device 'mars' here"),
        ("--freeze 5", "there are 4 blocks, and 5 cannot be frozen"),
        ("--data . --validate", "--validate is for the digits"),
        ("--img-size 16", "digits_p1 takes 1 and 16x16; leave out --img-size"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path, capsys, options, said):
    assert said in refusal(capsys, tmp_path / "run", options)


def test_a_head_that_does_not_fit_is_not_kept(tmp_path, folder, capsys):  # noqa: F811
    model, file = tomevit.create("deit_ti16", num_classes=5, img_size=32), tmp_path / "head.safetensors"
    options = f"--model deit_ti16 --data {folder} --batch 2 --keep-head --pretrained {file}"
    tomevit.save(model, file)
    said = refusal(capsys, tmp_path / "run", options)
    assert said == "finetune: the head has 5 classes, and the data 2; without --keep-head it is replaced"
    model.reset_classifier(2)
    tomevit.save(model, file, card=replace(model.card, class_names=("cat", "mouse")))
    said = refusal(capsys, tmp_path / "run", options)
    assert said == "finetune: the head has a class mouse, and the data dog; without --keep-head it is replaced"


def test_a_run_is_not_written_over(little, capsys):
    said = refusal(capsys, little, "")
    assert said == f"finetune: {little} has a run in it already: go on with --resume, or name another folder with --out"


def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    assert "checkpoint.pt is no checkpoint of this program" in refusal(capsys, tmp_path, "--resume")
    for other in ({"options": {}}, [1]):
        torch.save(other, tmp_path / "checkpoint.pt")
        assert "checkpoint.pt is no checkpoint of this program" in refusal(capsys, tmp_path, "--resume")


@pytest.mark.parametrize(
    "options",
    ["--lr inf", "--lr nan", "--layer-decay 0", "--betas 0.9 1", "--ema 1", "--crop-pct 0", "--epochs 0", "--seed -1"],
)
def test_impossible_numbers(capsys, options):
    with pytest.raises(SystemExit) as raised:
        read_options(options.split())
    assert raised.value.code == 2
    assert "is not possible; it must be at least" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(tmp_path, folder, capsys):  # noqa: F811
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(b"no image")
    options = f"--data {folder} --model deit_ti16 --img-size 32 --batch 6 --workers 1 --threads 1"
    said = refusal(capsys, tmp_path / "run", options)
    assert said.startswith(f"finetune: {path} cannot be read as an image")


def test_the_program_runs_by_its_path_too(tmp_path):
    path = str(ROOT / "examples" / "finetune.py")
    done = subprocess.run(
        [sys.executable, path, "--r", "33"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("finetune: --r 33 asks for 33 tokens")
    assert done.stderr.count("\n") == 1
