"""Every way to merge, against its definition and in every way of running."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests import reference
from tests.core.test_execution import Features, loss_and_gradients
from tests.core.test_families import FAMILIES, model_of
from tests.helpers import images_for, relative_error, tiny
from tomevit.layers.matching import pitome_matching
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule

#: Of toy size: 3 x 5 patches, 3 blocks.
MIX: Schedule = ["2 pitome", "1+2 diffrate", "2 importance"]
SCHEDULES: list[Schedule] = [
    [0, "0+3 diffrate", "2 diffrate"],
    "3 pitome",
    "4 redundant",
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
@pytest.mark.parametrize("r", ["3+2 diffrate", "importance", "redundant", "pitome", "grid"])
def test_its_gradients_are_those_of_the_definition(family: str, r: str) -> None:
    model = model_of(family, depth=2)
    schedule: Schedule = [r if r[0] == "3" or r == "grid" else f"3 {r}", 1]
    images = images_for(model, 1).requires_grad_()
    wanted = [images, *model.parameters()]
    ours = torch.autograd.grad(model(images, r=schedule).square().sum(), wanted)
    theirs = torch.autograd.grad(
        reference.run(model, images[0], entries(model, schedule)).output.square().sum(), wanted
    )
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@each_schedule
def test_a_distilled_models_tokens_are_their_definition(r: Schedule) -> None:
    model = tiny(depth=3, img_size=(12, 20), dist_token=True, prop_attn=True).double()
    images = images_for(model, 1)
    with torch.no_grad():
        expected = reference.run(model, images[0], entries(model, r))
        torch.testing.assert_close(model.forward_features(images, r).x[0], expected.tokens, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- compile, export

#: For 8 x 8 patches and two blocks.
WAYS: dict[str, Schedule] = {
    "importance": ["8 importance", "6 importance"],
    "diffrate": ["6+5 diffrate", "0+4 diffrate"],
    "pitome": ["8 pitome", "6 redundant"],
    "grid": ["grid", "2 diffrate"],
}
MIXES: list[Schedule] = [["6+5 diffrate", "6 importance"], ["grid", "4 pitome"]]
each_way = pytest.mark.parametrize("r", WAYS.values(), ids=WAYS)
MODELS: dict[str, dict[str, Any]] = {
    "registers": {"pool": "avg", "reg_tokens": 2, "prop_attn": True},
    "distilled": {"dist_token": True},
    "no class token": {"class_token": False, "pool": "map"},
}
#: Every way, and every model: each once, since one has nothing to do with the other.
each_way_in_a_model = pytest.mark.parametrize(
    ("fields", "r"), list(zip([*MODELS.values(), {}], WAYS.values(), strict=True)), ids=WAYS
)


def small(r: Schedule, **fields: Any) -> VisionTransformer:
    return tiny(r, **{"depth": 2} | (fields or MODELS["registers"]))


@each_way
def test_compiled_models_answer_and_learn_alike(r: Schedule) -> None:
    torch.compiler.reset()
    model = small(r).double().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = images_for(model)
    expected = loss_and_gradients(model, images)
    torch.testing.assert_close(loss_and_gradients(model, images, compiled), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("r", MIXES, ids=str)
def test_inductors_code_answers_alike(r: Schedule) -> None:
    torch.compiler.reset()
    model = small(r).double()
    images = images_for(model)
    with torch.no_grad():
        answer = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(answer, model(images), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("r", ["3 redundant"], ids=str)
def test_compiled_models_take_any_batch(r: Schedule) -> None:
    torch.compiler.reset()
    model = small(r)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 5):
            images = images_for(model, batch)
            torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


@each_way_in_a_model
def test_exported_features_trace_alike(fields: dict[str, Any], r: Schedule) -> None:
    model = Features(small(r, **fields))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model.model, 2),), dynamic_shapes=shapes, strict=False)
        for batch in (1, 5):
            images = images_for(model.model, batch)
            found, expected = program.module()(images), model(images)
            torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-4)
            assert torch.equal(found.size, expected.size)
            assert torch.equal(found.slots, expected.slots)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    missing = ("sort", "new_ones", "autocast", "set_grad", "promote_types", "cumsum", "index_put", "tomevit")
    assert not [name for name in calls for word in missing if word in name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # of torch itself; no TracerWarning
@each_way_in_a_model
def test_torch_jit_traces_it(fields: dict[str, Any], r: Schedule) -> None:
    model = small(r, **fields)
    traced = torch.jit.trace(model, images_for(model))  # type: ignore[no-untyped-call]
    images = images_for(model, 5, seed=3)
    with torch.no_grad():
        assert relative_error(traced(images), model(images)) < 1e-5


def test_equal_tokens_are_each_kept_or_merged_once_in_a_program() -> None:
    """Where energies tie, runtimes take whichever they like: none may come twice."""
    key = torch.ones(2, 20, 4)

    class Matched(nn.Module):
        def forward(self, key: Tensor) -> tuple[Tensor, Tensor]:
            merge = pitome_matching(key, 0.0, 4, 1)
            return merge.keep, merge.src

    keep, src = torch.export.export(Matched(), (key,)).module()(key)
    assert torch.equal(torch.cat([keep, src], 1).sort(1).values, torch.arange(20).expand(2, -1))


# ------------------------------------------------------------------------------------------ training, types and copies


@each_way_in_a_model
def test_gradient_checkpointing_changes_no_gradient(fields: dict[str, Any], r: Schedule) -> None:
    model = small(r, **fields).double().train()
    images = images_for(model)
    expected = loss_and_gradients(model, images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(loss_and_gradients(model, images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@each_way_in_a_model
def test_half_precision(fields: dict[str, Any], r: Schedule, dtype: torch.dtype) -> None:
    model = small(r, **fields)
    images = images_for(model)

    def under_autocast(images: Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return model(images)

    assert all(part.isfinite().all() for part in loss_and_gradients(model, images, under_autocast))
    model, images = model.to(dtype), images.to(dtype)
    assert all(part.isfinite().all() for part in loss_and_gradients(model, images))
    with torch.no_grad():
        tokens = model.forward_features(images)
    assert tokens.x.dtype == dtype
    assert tokens.size is not None
    assert tokens.slots is not None
    assert tokens.size.dtype == torch.float32
    assert tokens.weight is None or tokens.weight.dtype == torch.float32
    assert torch.equal(tokens.size.sum((1, 2)), (tokens.slots >= 0).sum(1).float())


@pytest.mark.parametrize("r", [*WAYS.values(), "1.3x late", "8 pitome"], ids=str)
def test_copies_are_whole(r: Schedule) -> None:
    model = small(r, depth=3, prop_attn=True)
    images = images_for(model)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.r == model.r
            assert torch.equal(twin(images), model(images))


@each_way_in_a_model
def test_an_optimized_model_answers_alike(fields: dict[str, Any], r: Schedule) -> None:
    model = small(r, layer_scale=0.5, **fields)
    images = images_for(model)
    fast = tomevit.optimize(model, keep_memory=False)
    with torch.inference_mode():
        assert relative_error(fast(images), model(images)) < 1e-4


# --------------------------------------------------------------------------------------------------- whatever is asked


def test_threads_share_a_model_at_different_r() -> None:
    model = small(0)
    images, schedules = images_for(model), [0, *WAYS.values()]
    with torch.inference_mode():
        expected = [model(images, r) for r in schedules]

    def differs(case: tuple[Schedule, Tensor]) -> bool:
        with torch.inference_mode():
            return any(not torch.equal(model(images, case[0]), case[1]) for _ in range(20))

    with ThreadPoolExecutor(len(schedules)) as threads:
        assert not any(threads.map(differs, zip(schedules, expected, strict=True)))


@each_way_in_a_model
def test_an_image_does_not_depend_on_the_batch(fields: dict[str, Any], r: Schedule) -> None:
    model = small(r, **fields).double()
    images = images_for(model, 4)
    with torch.no_grad():
        together = model.forward_features(images)
        for i in range(4):
            alone = model.forward_features(images[i : i + 1])
            torch.testing.assert_close(alone.x[0], together.x[i], rtol=0, atol=1e-12)
            assert torch.equal(alone.slots[0], together.slots[i])
        images[0] = float("nan")
        beside_nan = model.forward_features(images)
        torch.testing.assert_close(beside_nan.x[1:], together.x[1:], rtol=0, atol=1e-12)
        assert torch.equal(beside_nan.slots[1:], together.slots[1:])


@each_way_in_a_model
def test_merging_by_a_product_gives_the_same(
    fields: dict[str, Any], r: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does it."""
    model = small(r, **fields).double()
    images = images_for(model)
    expected = loss_and_gradients(model, images)
    monkeypatch.setattr("tomevit.layers.backends.merges_by_index", lambda _: False)
    torch.testing.assert_close(loss_and_gradients(model, images), expected, rtol=1e-9, atol=1e-11)


def test_what_was_dropped_shows() -> None:
    model = small(["6+5 diffrate", "0+4 diffrate"])
    with torch.no_grad():
        tokens = model.forward_features(images_for(model))
    assert tokens.slots is not None
    assert tokens.size is not None
    dropped = tokens.slots < 0
    assert model.token_counts() == (67, 56, 52)
    assert tokens.x.shape[1] == 52
    assert (dropped.sum(1) >= 9).all()  # more where a merged token was dropped
    assert torch.equal(tokens.size.sum((1, 2)), 67.0 - dropped.sum(1))
    back = tomevit.unmerge(tokens)
    assert back.shape == (3, 67, 24)
    assert torch.equal((back == 0).all(2), dropped)


def test_dropped_patches_do_not_matter_after_their_block() -> None:
    model = small(["0+20 diffrate"], depth=1, class_token=True)
    images = images_for(model, 1)
    with torch.no_grad():
        kept = model.forward_features(images)
        whole = model.forward_features(images, r=0)
    assert kept.slots is not None
    there = kept.slots[0] >= 0
    assert there[:1].all()
    torch.testing.assert_close(kept.x[0], whole.x[0, there], rtol=0, atol=1e-6)


def test_neighbours_need_all_patches() -> None:
    model = small(0)
    images, visible = images_for(model, 1), torch.arange(0, 64, 2)[None]
    for r in ([0, "grid"], ["grid"]):
        with pytest.raises(ValueError, match="cannot merge neighbours 2x2: they need the whole grid of patches"):
            model.forward_features(images, r=r, visible=visible)
    with pytest.raises(ValueError, match="block 1 cannot merge neighbours"):
        model(images, r=["2 pitome", "grid"])
    with torch.no_grad():
        for way in ("importance", "diffrate", "pitome"):
            tokens = model.forward_features(images, r=WAYS[way], visible=visible)
            assert tokens.x.isfinite().all()
            assert tokens.x.shape[1] == model.token_counts(WAYS[way], 35)[-1]
