"""The example of a loop of one's own."""

from __future__ import annotations

import sys
from functools import partial

import pytest

import tomevit
from benchmarks.peers import torchvision  # noqa: F401  # the way to import it beside a CPU torch
from examples import finetune
from tomevit.tasks.demo import accuracy, held_out
from tomevit.training.datasets import load_data

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")


def test_a_fresh_head_learns_on_pretrained_blocks(tmp_path, monkeypatch, capsys):
    file = tmp_path / "tuned.safetensors"
    arguments = f"digits --model digits_p1 --r 16 --epochs 2 --batch 32 --lr 4e-3 --out {file}"
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments.split()])
    monkeypatch.setattr(finetune, "load_data", partial(load_data, limit=256))
    finetune.main()
    model = tomevit.load(file)
    assert (model.r, model.card.class_names) == (16, tuple("0123456789"))
    assert accuracy(model, *held_out(), r=16) > 50
    assert f"r = 16: {accuracy(model, *held_out(), r=16):.2f} % of 360 images" in capsys.readouterr().out
