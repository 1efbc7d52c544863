"""Every way to merge, against its definition and in every way of running."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.core.test_families import FAMILIES, images_for, model_of
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule

#: Of toy size: 3 x 5 patches, 3 blocks.
MIX: Schedule = ["2 pitome", "1+2 diffrate", "2 importance"]
SCHEDULES: list[Schedule] = [
    "4 importance",
    "4 diffrate",
    [0, "3+2 diffrate", 2],
    [0, "0+3 diffrate", "2 diffrate"],
    "3 pitome",
    [0, "grid", 2],
    ["grid", "grid"],
    "1.2x late",
    MIX,
    ["grid", "1+1 diffrate", "1 importance"],
]
each_schedule = pytest.mark.parametrize("r", SCHEDULES, ids=str)


# --------------------------------------------------------------------------------------------------------- definitions


def entries(model: VisionTransformer, r: Schedule) -> list[int | str]:
    return [step.entry for step in model.steps(r)]


@pytest.mark.parametrize("family", FAMILIES)
@each_schedule
def test_it_is_its_definition(family: str, r: Schedule) -> None:
    model = model_of(family)
    images = images_for(model)
    with torch.no_grad():
        found, output = model.forward_features(images, r=r), model(images, r=r)
        assert found.slots is not None
        assert found.size is not None
        weights = found.size if found.weight is None else found.weight
        for i, image in enumerate(images):
            expected = reference.run(model, image, entries(model, r))
            torch.testing.assert_close(found.x[i], expected.tokens, rtol=0, atol=1e-10)
            torch.testing.assert_close(output[i], expected.output, rtol=0, atol=1e-10)
            assert found.size[i, :, 0].tolist() == expected.sizes
            assert weights[i, :, 0].tolist() == pytest.approx(expected.weights, rel=0, abs=1e-12)
            slots = [-1] * model.config.num_tokens
            for token, sources in enumerate(expected.sources):
                for source in sources:
                    slots[source] = token
            assert found.slots[i].tolist() == slots


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("r", ["3+2 diffrate", "importance", "pitome", "grid"])
def test_its_gradients_are_those_of_the_definition(family: str, r: str) -> None:
    model = model_of(family, depth=2)
    schedule: Schedule = [r if r[0] in "3g" else f"3 {r}", 1]
    images = images_for(model, 1).requires_grad_()
    wanted = [images, *model.parameters()]
    ours = torch.autograd.grad(model(images, r=schedule).square().sum(), wanted)
    theirs = torch.autograd.grad(
        reference.run(model, images[0], entries(model, schedule)).output.square().sum(), wanted
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
