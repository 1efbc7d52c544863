"""The distributed examples, run by torchrun with two processes on the CPU, against a plain loop in one.

In float64: the gradient of the keys' bias is zero but for rounding, since softmax ignores it, and AdamW divides it by
its own size. In float32 the quotient is noise, of which the matching then sees the keys; in float64 it is below AdamW's
epsilon, and what remains is rounding.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tomevit

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

OPTIONS = {"data": "digits", "model": "digits_p1", "pretrained": False, "r": 12, "epochs": 2, "batch": 16, "lr": 0.003}
OPTIONS |= {"seed": 3, "limit": 83}
STEPS = 5  # of an epoch; three images are left over

# Where each is killed: before it gives the second checkpoint its name, or records the last step.
KILLS = {
    "train_ddp": ("keep", 2),
    "train_fsdp": ("keep", 2),
    "train_accelerate": ("keep", 2),
    "train_transformers": ("record", 2 * STEPS),
    "train_lightning": ("record", 2 * STEPS),
}


def torchrun(*arguments: str, processes: int = 2, timeout: float = 240) -> str:
    """What it printed. Nothing that it started outlives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--monitor-interval=0.1", "-m", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            return process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its processes before itself
            pytest.fail(f"{' '.join(arguments)} took longer than {timeout} s:\n{process.communicate()[0]}")


def command_line(out: Path, **changes: Any) -> list[str]:
    options = OPTIONS | changes | {"out": out}
    options["merge"] = options.pop("r")
    return [f"--{name}={value}" for name, value in options.items() if value is not False]


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], tomevit.VisionTransformer, Any]:
    """The losses, the model and the held-out images of a loop in one process, without any engine."""
    from tomevit.training.datasets import load_data
    from tomevit.training.digits import init_small

    options = Namespace(**OPTIONS)
    torch.manual_seed(options.seed)
    data = load_data("digits", tomevit.transform(tomevit.create(options.model)), limit=options.limit)
    model = tomevit.create(options.model, num_classes=10).double().train()
    init_small(model)
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, options.lr, layer_decay=0.75))
    losses = []
    for epoch in range(options.epochs):
        order = torch.randperm(options.limit, generator=torch.Generator().manual_seed(options.seed + epoch))
        for chosen in order.split(options.batch)[:STEPS]:
            images, labels = zip(*(data.train[int(i)] for i in chosen), strict=True)
            r = min(options.r, 2 * options.r * len(losses) // (2 * STEPS))
            loss = F.cross_entropy(model(torch.stack(images).double(), r), torch.tensor(labels))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    held_out = torch.stack([data.test[i][0] for i in range(32)]).double()
    return losses, model.eval(), held_out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tomevit.training.digits import load_split

    path = tmp_path_factory.mktemp("digits") / "digits.pt"
    torch.save(load_split(), path)
    return str(path)


@pytest.mark.parametrize(
    "program",  # the others run the same loop in their own words, and the engines take long to import
    [pytest.param(name, marks=[] if name == "train_fsdp" else pytest.mark.soak) for name in KILLS],
)
def test_two_processes_train_as_one_does_and_resume_after_kill_9(
    plain: tuple[list[float], tomevit.VisionTransformer, Any], digits: str, program: str, tmp_path: Path
) -> None:
    name, call = KILLS[program]
    arguments = command_line(tmp_path)
    printed = torchrun("tests.launch", digits, program, name, str(call), *arguments)
    assert not (tmp_path / "model.safetensors").exists(), printed
    # FSDP goes on in one process: its checkpoint is cut for two.
    processes = 1 if program == "train_fsdp" else 2
    printed += torchrun("tests.launch", digits, program, name, "0", *arguments, "--resume", processes=processes)

    assert (tmp_path / "model.safetensors").exists(), printed
    losses, model, images = plain
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    before = 2 * STEPS - (name == "record")  # the last step was killed before it was recorded
    assert [line["step"] for line in lines] == [*range(before), *range(STEPS, 2 * STEPS)], printed
    # 2^-52 is 2e-16; ten steps add some of it up. A step of another image, or r, changes the third digit.
    assert [line["loss"] for line in lines] == pytest.approx(losses[:before] + losses[STEPS:], rel=1e-12, abs=0)

    trained = tomevit.load(tmp_path / "model.safetensors")
    assert trained.r == OPTIONS["r"]
    assert trained.card.class_names == tuple("0123456789")
    theirs, ours = trained.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-9, atol=1e-10, msg=lambda text, key=key: key + text)
    with torch.inference_mode():
        torch.testing.assert_close(trained(images), model(images, OPTIONS["r"]), rtol=1e-9, atol=1e-9)
    assert printed.count("of 360 held-out images") == 1, printed


def test_wrong_use_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import common

    def refused(pattern: str, call: Callable[[], Any]) -> None:
        with pytest.raises(SystemExit) as stopped:
            call()
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said.count("\n") == 1
        assert re.search(pattern, said), said

    def prepare(**changes: Any) -> Callable[[], Any]:
        return lambda: common.prepare(
            Namespace(**OPTIONS | {"out": tmp_path / "run", "resume": False} | changes), "epoch_*"
        )

    refused("start it as torchrun --nproc-per-node 2 -m examples", common.join)
    refused("holds no checkpoint to resume from", prepare(resume=True))
    refused("no folder nowhere", prepare(data="nowhere"))
    refused("no model 'digit_p1'", prepare(model="digit_p1"))
    refused("--batch is 0, and must be a positive multiple", prepare(batch=0))
    refused("--batch is 128, and there are only 83 images", prepare(batch=128))
    prepare()()
    (tmp_path / "run" / "epoch_1").mkdir()
    refused("holds the checkpoint of an earlier run; go on with --resume", prepare())
    refused("was begun with lr 0.003, not 1.0", prepare(resume=True, lr=1.0))
    _, _, checkpoint = prepare(resume=True)()
    assert checkpoint == tmp_path / "run" / "epoch_1"
