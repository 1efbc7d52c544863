"""The benchmark of a training step compares with what it says: the reference design computes what we compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.reference import reference
from benchmarks.train_step import peak_allocated
from tests.helpers import images_for, tiny

MAE = {"pool": "avg", "pool_norm": "after", "prop_attn": False}


@pytest.mark.parametrize(
    "fields", [{}, MAE, {"pool": "avg", "layer_scale": 0.5, "qk_norm": True}], ids=["vit", "mae", "all"]
)
@pytest.mark.parametrize("r", [0, 8])
def test_the_reference_design_answers_and_learns_alike(fields: dict[str, Any], r: int) -> None:
    model = tiny(**fields).double().train()
    images, labels = images_for(model), torch.tensor([0, 3, 6])
    results = []
    for logits in (model(images, r), reference(model, images, r)):
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
        results.append([logits, *gradients])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert r == 0 or not torch.allclose(model(images, 0), results[0][0], rtol=1e-3)


def test_peak_allocated_is_what_lives_at_once() -> None:
    def call() -> None:
        first = torch.empty(1000)
        del first
        _ = torch.empty(400), torch.empty(500)

    assert peak_allocated(call) == 4 * 1000
