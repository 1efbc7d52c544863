"""Faster ways to the same result: those that every model takes, and `tomevit.optimize`."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tests.matchings import case_of
from tomevit.deploy.optimize import FOLDED, compile_whole
from tomevit.layers import MATCHINGS, backends, bipartite_soft_matching, packed
from tomevit.layers.attention import attend
from tomevit.layers.merge import mean_by_index, mean_by_product, merge_mean
from tomevit.layers.uninitialised import linear

HALF = [torch.bfloat16, torch.float16]


def tokens(dtype: torch.dtype, seed: int, count: int = 41, dim: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, count, dim, generator=draw).to(dtype)
    return x, torch.randint(1, 200, (3, count, 1), generator=draw).float()


# ------------------------------------------------------------------------------------------------------------- merging


@settings(max_examples=60)
@given(
    matching=st.sampled_from(sorted(MATCHINGS)),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALF]),
    count=st.integers(6, 60),
    share=st.floats(0, 1),
    num_prefix=st.integers(0, 3),
    drop=st.integers(0, 2),
    seed=st.integers(0, 2**20),
)
def test_both_ways_to_average_agree(
    matching: str, dtype: torch.dtype, count: int, share: float, num_prefix: int, drop: int, seed: int
) -> None:
    x, size = tokens(dtype, seed, count)
    merge = case_of(x, round(share * ((count - num_prefix - drop) // 2)), num_prefix, drop=drop).find(matching)
    by_index, by_product = mean_by_index(x, size, merge), mean_by_product(x, size, merge)
    assert torch.equal(by_index[1], by_product[1])
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(by_index[0], by_product[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", [mean_by_index, mean_by_product])
def test_many_join_one_at_the_ends_of_float16(way: Any) -> None:
    x = torch.full((1, 40, 8), 65504.0, dtype=torch.float16)
    x[:, ::2] *= -1
    merge = MATCHINGS["every_kth"](torch.ones(1, 40, 4), None, 0)
    merged, size = way(x, torch.ones(1, 40, 1), merge)
    assert merged.isfinite().all()
    assert size.sum() == 40
    assert (merge.dst[0].bincount() > 5).any(), "no group is large"


def test_autocast_leaves_the_product_its_precision() -> None:
    x, size = tokens(torch.float32, 0)
    merge = bipartite_soft_matching(x, 18, 1)
    expected = mean_by_product(x, size, merge)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, mean_by_product(x, size, merge), expected))


def test_the_gradient_is_that_of_the_product() -> None:
    x, size = tokens(torch.float64, 0)
    merge = bipartite_soft_matching(x, 18, 1)
    x.requires_grad_()
    ahead = torch.randn(3, 23, 16, dtype=torch.float64)
    expected = torch.autograd.grad(mean_by_product(x, size, merge)[0], x, ahead)
    torch.testing.assert_close(torch.autograd.grad(merge_mean(x, size, merge)[0], x, ahead), expected)
    assert torch.autograd.gradgradcheck(lambda x: merge_mean(x, size, merge)[0], x[:, :, :2].detach().requires_grad_())


# The checker of torch 2.14 looks at the gradient of copies that it made itself of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operators_for_compilers_keep_their_promises() -> None:
    x, size = tokens(torch.float32, 1, dim=4)
    case = case_of(x, 9, 1, drop=5)
    for name in ("bipartite", "importance", "pitome", "diffrate"):
        operator = getattr(torch.ops.tomevit, MATCHINGS[name].__name__)
        torch.library.opcheck(operator.default, tuple(case.arguments(name)))
        merge = case.find(name)
        arguments = x.detach().clone().requires_grad_(), size, *merge[:3]
        torch.library.opcheck(torch.ops.tomevit.merge_mean.default, arguments)


def test_exported_programs_hold_operators_of_torch_alone() -> None:
    model = tiny(4, depth=2)
    program = torch.export.export(model, (images_for(model),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "tomevit" in name or "index_add" in name or "index_put" in name]


# ------------------------------------------------------------------------------------------- products and activations


@pytest.mark.parametrize("dtype", HALF)
def test_emulated_types_are_widened_and_round_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "EMULATED", frozenset({dtype}))
    layer, x = linear(32, 8), torch.randn(5, 32)
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    wide, x = layer.to(dtype).float()(x.to(dtype).float()), x.to(dtype)
    assert torch.equal(backends.call(layer.to(dtype), x), wide.to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(backends.call(layer.float(), x.float()), wide.to(dtype))
    q, k, v = torch.randn(3, 2, 4, 9, 16).to(dtype)
    size = torch.randint(1, 5, (2, 9, 1)).float()
    bias = size.log().to(dtype).float().mT[:, None]
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
    assert torch.equal(attend(q, k, v, size), expected.to(dtype))


HOOKS: dict[str, Callable[[tomevit.VisionTransformer, Any], Any]] = {
    "after fc1": lambda model, keep: model.blocks[0].mlp.fc1.register_forward_hook(keep),
    "before the activation": lambda model, keep: model.blocks[0].mlp.act.register_forward_pre_hook(keep),
    "after the activation": lambda model, keep: model.blocks[0].mlp.act.register_forward_hook(keep),
    "after all": lambda _, keep: torch.nn.modules.module.register_module_forward_hook(keep),
    "before all": lambda _, keep: torch.nn.modules.module.register_module_forward_pre_hook(keep),
}


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_leaves_float64_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "EMULATED", frozenset({dtype}))
    layer = nn.Linear(32, 8).double()
    with torch.autocast("cpu", dtype):
        without_emulation = backends.without_emulation(
            F.linear, torch.ones(5, 32, dtype=torch.float64), layer.weight, layer.bias
        )
        assert torch.equal(without_emulation, layer(torch.ones(5, 32, dtype=torch.float64)))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("where", HOOKS)
def test_what_a_hook_kept_is_left_alone(where: str, act: str) -> None:
    model, kept = tiny(4, depth=2, act=act), []
    images = images_for(model)

    def keep(_: nn.Module, args: Any, out: Any = None) -> None:
        kept.extend((each, each.clone()) for each in (*args, out) if isinstance(each, Tensor))

    with torch.no_grad():
        expected = model(images)
        handle = HOOKS[where](model, keep)
        try:
            # The last qkv sees all tokens then, and a product of more rows rounds otherwise.
            assert relative_error(model(images), expected) < 1e-5
        finally:
            handle.remove()
    assert kept
    assert all(torch.equal(*each) for each in kept)
    torch.testing.assert_close(model(images), expected)  # with gradients, so not in place


def test_an_activation_of_the_user_s_own_is_called_as_it_is() -> None:
    model = tiny(4, depth=2)
    for block in model.blocks:
        block.mlp.act = nn.GELU()
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), tiny(4, depth=2)(images))


@pytest.mark.parametrize("r", [0, 4])
def test_no_images_have_no_answers(r: int) -> None:
    model = tiny(r)
    with torch.no_grad():
        assert model(images_for(model)[:0]).shape == (0, model.config.num_classes)


WITHOUT_ONEDNN = """
import torch
torch._C._has_mkldnn = False

torch.ops.mkldnn = None  # an operator that is looked up would raise
import tomevit
from tests.helpers import images_for, tiny
model = tiny(4).bfloat16()
fast = tomevit.optimize(model, keep_memory=False)
with torch.inference_mode():
    print(fast.optimizations, torch.equal(fast(images_for(model)), model(images_for(model))))
"""


def test_torch_without_onednn_will_do() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_ONEDNN], capture_output=True, text=True, check=True)
    assert run.stdout == "() True\n"


# ------------------------------------------------------------------------------------------------------------ optimize


def test_layer_scale_is_folded(tmp_path: Path) -> None:
    model = tiny(4, depth=3, layer_scale=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = tomevit.optimize(model, packed=False, keep_memory=False)
    images = images_for(model)
    with torch.inference_mode():
        assert relative_error(fast(images), model(images)) < 1e-5
        assert relative_error(fast(images, r=0), model(images, r=0)) < 1e-5
    assert fast.optimizations == ("LayerScale folded into the layers before it",)
    assert fast.optimizations[0] in str(fast)
    assert not [name for name in fast.state_dict() if "ls1" in name]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tomevit.save(fast, tmp_path / "fast.safetensors")
    again = tomevit.load(tmp_path / "fast.safetensors")
    assert all(torch.equal(tensor, fast.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert relative_error(again(images), fast(images)) < 1e-5


def test_emulated_types_become_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(4, depth=2).bfloat16()
    images = images_for(model)
    for emulated, dtype in ((frozenset({torch.bfloat16}), torch.float32), (frozenset(), torch.bfloat16)):
        monkeypatch.setattr(backends, "EMULATED", emulated)
        fast = tomevit.optimize(model, packed=False, keep_memory=False)
        assert fast.dtype == dtype
        assert ("float32: this processor emulates bfloat16" in fast.optimizations) == bool(emulated)
        with torch.inference_mode():
            assert relative_error(fast(images.bfloat16()).float(), model(images).float()) < 0.05


def can_pack() -> bool:
    return packed.can_pack(torch.empty(1))


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
@pytest.mark.parametrize("fields", [{}, {"pool": "avg", "class_token": False}, {"qkv_bias": False, "dist_token": True}])
def test_packed_weights_give_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(4, depth=3, **fields)
    fast = tomevit.optimize(model, packed=True, keep_memory=False)
    images, weights = images_for(model), model.state_dict()
    assert "weights packed" in fast.optimizations[-1]
    assert sum(isinstance(module, packed.PackedLinear) for module in fast.modules()) == 12
    for same in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert same.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in same.state_dict().items())
        for r in (0, 4, [8, 0, 3]):
            with torch.inference_mode():
                assert relative_error(same(images, r), model(images, r)) < 1e-5
        with torch.inference_mode():
            features, expected = (each.forward_features(images, 4).x for each in (same, model))
            assert relative_error(features, expected) < 1e-5
    tomevit.save(fast, tmp_path / "fast.safetensors")
    again = tomevit.load(tmp_path / "fast.safetensors")
    assert torch.equal(again(images), model(images))


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
def test_packed_weights_step_aside_where_their_product_does_not_do() -> None:
    model = tiny(4, depth=3)
    fast = tomevit.optimize(model, packed=True, keep_memory=False)
    images = images_for(model)
    gradients = [torch.autograd.grad(each(x).sum(), x)[0] for each in (fast, model) for x in [images.requires_grad_()]]
    assert relative_error(*gradients) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(images).dtype == torch.bfloat16
        assert torch.equal(fast(images), model(images))
    with torch.no_grad():
        in_double = copy.deepcopy(fast).double()(images.double())
        torch.testing.assert_close(in_double, copy.deepcopy(model).double()(images.double()))
    layer = fast.blocks[0].mlp.fc1
    with torch.inference_mode():  # a product of packed weights minds neither strides nor how many dimensions there are
        x = torch.randn(5, 2 * 24, 7).mT[..., ::2]
        expected = F.linear(x, layer.weight, layer.bias)
        assert relative_error(layer(x), expected) < 1e-5
        assert relative_error(layer(x[0, 0]), expected[0, 0]) < 1e-5
        assert layer(x[:0]).shape == (0, 7, 96)
        rows = torch.randn(packed.MOST_ROWS + 1, 24)
        assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))
    fast.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})
    with torch.inference_mode():
        assert relative_error(layer(x), -expected) < 1e-5


def sgd(layer: nn.Linear) -> None:
    layer.weight.requires_grad_().grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()
    layer.weight.requires_grad_(False)


def average(layer: nn.Linear) -> None:
    torch._foreach_lerp_([layer.weight], [torch.zeros_like(layer.weight)], 0.5)


def replace_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
@pytest.mark.parametrize("write", [sgd, average, replace_weight, lambda layer: layer.weight.mul_(2)])
def test_packed_weights_notice_what_is_written(write: Callable[[nn.Linear], None]) -> None:
    layer = packed.PackedLinear(nn.Linear(24, 96).requires_grad_(False))
    x = torch.randn(5, 24)
    before = layer(x)
    write(layer)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert relative_error(layer(x), before) > 1e-2
    other = torch.randn(96, 24)
    assert torch.equal(torch.func.functional_call(layer, {"weight": other}, (x,)), F.linear(x, other, layer.bias))


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_a_packed_layer_that_learns_has_its_gradient(learns: str) -> None:
    layer = packed.PackedLinear(nn.Linear(24, 96).requires_grad_(False))
    getattr(layer, learns).requires_grad_(True)
    layer(torch.ones(5, 24)).sum().backward()
    torch.testing.assert_close(getattr(layer, learns).grad, torch.full_like(getattr(layer, learns), 5.0))


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
def test_packing_leaves_hooks_and_foreign_layers() -> None:
    model, seen = tiny(4, depth=2), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    model.blocks[0].mlp.fc1.colour = "red"
    model.blocks[0].mlp.fc2 = nn.Sequential(model.blocks[0].mlp.fc2)
    model.blocks[1].mlp.fc1 = torch.nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.fc1)
    images = images_for(model)
    fast = tomevit.optimize(model, packed=True, keep_memory=False)
    assert not seen, "a hook was called while a layer was timed"
    with torch.inference_mode():
        assert relative_error(fast(images), model(images)) < 1e-5
    assert seen == ["fc1", "fc1"]
    assert isinstance(fast.blocks[0].mlp.fc1, packed.PackedLinear)
    assert fast.blocks[0].mlp.fc1.colour == "red"
    assert not any(isinstance(module, packed.PackedLinear) for module in fast.blocks[0].mlp.fc2.modules())


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
def test_what_was_optimized_is_optimized_anew() -> None:
    model = tiny(4, depth=2, layer_scale=0.1)
    fast = tomevit.optimize(model, packed=True, keep_memory=False)
    again = tomevit.optimize(fast, packed=False, keep_memory=False)
    assert again.optimizations == fast.optimizations[:1] == (FOLDED,)
    assert not any(isinstance(module, packed.PackedLinear) for module in again.modules())
    assert tomevit.optimize(again, packed=True, keep_memory=False).optimizations[0] == FOLDED
    images = images_for(model)
    with torch.inference_mode():
        assert relative_error(again(images), model(images)) < 1e-5
    assert any(isinstance(module, packed.PackedLinear) for module in fast.modules()), "the given model was changed"


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
@pytest.mark.usefixtures("fresh_compiler")
def test_models_with_packed_weights_compile_and_export() -> None:
    model = tiny(4, depth=2)
    fast, images = tomevit.optimize(model, packed=True, keep_memory=False), images_for(model)
    with torch.inference_mode():
        compiled = torch.compile(fast, fullgraph=True, backend="eager")
        assert relative_error(compiled(images), model(images)) < 1e-5
    for strict in (True, False):
        program = torch.export.export(fast, (images,), strict=strict)
        assert relative_error(program.module()(images), model(images)) < 1e-5


def test_packed_weights_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"cannot be packed here: .*; the model is torch.float64 on cpu"):
        tomevit.optimize(tiny(4).double(), packed=True)
    with pytest.raises(ValueError, match="packed weights are not for compiled models"):
        tomevit.optimize(tiny(4), packed=True, compiled=True)


@pytest.mark.parametrize(
    ("gains", "most", "said"),
    [
        ((1.5, 1.2, 1.1), math.inf, "128 rows 1.50, 512 rows 1.20, 1536 rows 1.10 times as fast"),
        ((1.5, 1.2, 0.9), 886, "128 rows 1.50, 512 rows 1.20 times as fast"),
        ((1.5, 0.9, 1.2), 256, "128 rows 1.50 times as fast"),
        ((0.9, 1.2, 1.2), None, ""),
    ],
)
def test_weights_are_packed_for_as_many_rows_as_are_faster(
    gains: tuple[float, ...], most: float | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def median_seconds(candidates: dict[tuple[int, int], Any]) -> dict[tuple[int, int], float]:
        for call in candidates.values():
            for _ in range(3):  # one more than there are blocks
                call()
        gain = dict(zip(dict.fromkeys(rows for rows, _ in candidates), gains, strict=True))
        return {(rows, packed): 1.0 if packed else gain[rows] for rows, packed in candidates}

    monkeypatch.setattr(importlib.import_module("tomevit.deploy.optimize"), "_median_seconds", median_seconds)
    model = tiny(4, depth=2)
    fast = tomevit.optimize(model, keep_memory=False)
    if not can_pack():
        most, said = None, ""
    assert fast.optimizations == ((f"weights packed: products of {said}",) if said else ())
    for block in fast.blocks:
        assert getattr(block.mlp.fc1, "most_rows", None) == (most and pytest.approx(most, abs=1))
    images = images_for(model)
    with torch.inference_mode():
        assert relative_error(fast(images), model(images)) < 1e-5


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_take_one_program_for_every_r() -> None:
    model = tiny(depth=4)
    fast = tomevit.optimize(model, compiled=True, keep_memory=False)
    images, counters = images_for(model), torch._dynamo.utils.counters
    with torch.inference_mode():
        for r, programs in ((5, 1), (3, 1), ([6, 2, 4, 1], 1), (0, 2)):
            torch.testing.assert_close(fast(images, r), model(images, r), rtol=1e-4, atol=1e-5)
            assert counters["stats"]["unique_graphs"] == programs, r
    assert fast.optimizations == ("compiled block by block, one program for every r",)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_compiled_model_has_a_program_for_every_batch() -> None:
    programs: list[Any] = []
    limit = 8  # some libraries raise it to a million

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        programs.append(module)
        return module

    model = tiny(depth=1).eval().requires_grad_(False)
    fast = copy.deepcopy(model)
    assert not compile_whole(fast, backend=keep), "captured on a CPU"
    images = images_for(model)
    with torch.inference_mode(), torch._dynamo.config.patch(cache_size_limit=limit):
        torch.testing.assert_close(fast(images), model(images))
        for batch in range(1, limit + 2):
            fast(images[:1].expand(batch, -1, -1, -1).contiguous())
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        assert len(programs) > limit, "torch gave up in silence"
    count = len(programs)
    torch.testing.assert_close(copy.deepcopy(fast)(images), model(images))
    assert len(programs) == count, "a copy is not compiled"


def test_a_model_of_two_blocks_does_not_claim_to_be_compiled() -> None:
    fast = tomevit.optimize(tiny(4, depth=2), compiled=True, packed=False)
    assert fast.optimizations == ()
    assert all(block._compiled_call_impl is None for block in fast.blocks)


def test_freed_memory_is_kept_on_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    module = importlib.import_module("tomevit.deploy.optimize")
    monkeypatch.setattr(module, "_keep_freed_memory", lambda: asked.append("mallopt") or True)
    assert tomevit.optimize(tiny(), packed=False).optimizations == ()
    assert not asked
    assert tomevit.optimize(tiny(), packed=False, keep_memory=True).optimizations == (
        "freed memory kept by the process",
    )


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
def test_a_flop_counter_counts_packed_layers() -> None:
    model = tiny(4, depth=2)
    fast, images = tomevit.optimize(model, packed=True), images_for(model)
    counted = []
    for each in (model, fast):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            each(images)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def test_the_fused_merge_is_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="bipartite matching on a GPU, and this model has 'bipartite' on cpu"):
        tomevit.optimize(tiny(4), fused_merge=True)


@pytest.mark.skipif(not can_pack(), reason="oneDNN on x86 processors")
def test_packed_weights_made_in_inference_mode_notice_what_is_written() -> None:
    images = images_for(tiny(4, depth=2))
    with torch.inference_mode():
        fast = tomevit.optimize(copy.deepcopy(tiny(4, depth=2)), packed=True, keep_memory=False)
        layer = fast.blocks[0].mlp.fc1
        assert isinstance(layer, packed.PackedLinear)
        assert layer._packed is not None
        layer.weight.mul_(2)
        assert torch.equal(
            layer(images.flatten(2)[..., :24]), F.linear(images.flatten(2)[..., :24], layer.weight, layer.bias)
        )
        assert packed.PackedLinear(nn.Linear(24, 96))._packed is None  # this weight would not tell


@pytest.mark.filterwarnings("ignore:torch.*quant.* deprecated")  # still what many use
def test_quantised_layers_are_left_as_they_are(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny(4, depth=2, layer_scale=0.5), {nn.Linear}, torch.qint8)
    quantised = [name for name, m in model.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(quantised) == 4 * 2 + 1
    images = images_for(model)
    with torch.no_grad():
        answer = model(images)
    assert 1e-4 < relative_error(answer, tiny(4, depth=2, layer_scale=0.5)(images)) < 0.1
    fast = tomevit.optimize(model, packed=False, keep_memory=False)
    assert not fast.optimizations
    with torch.no_grad():
        assert torch.equal(fast(images), answer)
    with pytest.raises(ValueError, match="save it before it is quantised, and quantise what load returns"):
        tomevit.save(model, tmp_path / "quantised.safetensors")


@pytest.mark.parametrize("what", ["ls1", "attn.proj"])
def test_layer_scale_is_not_folded_where_something_is_in_its_place(what: str) -> None:
    model = tiny(4, depth=2, layer_scale=0.5)
    parent, _, last = f"blocks.1.{what}".rpartition(".")
    layer = model.get_submodule(f"{parent}.{last}")
    setattr(model.get_submodule(parent), last, nn.Sequential(layer, layer if what == "ls1" else nn.Identity()))
    images = images_for(model)
    fast = tomevit.optimize(model, packed=False, keep_memory=False)
    assert not fast.optimizations
    assert relative_error(fast(images), model(images)) < 1e-6
