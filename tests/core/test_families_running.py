"""Whatever runs, copies, stores or transforms a model does so with every family's."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests.core.test_families import DIFFERENT, FAMILIES, each_family, images_for, model_of
from tests.helpers import relative_error
from tomevit.layers.packed import PackedLinear, can_pack
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule
from tomevit.weights.adapt import adapt
from tomevit.weights.checkpoint import assemble
from tomevit.weights.rules import Resampling

ROTARY = [name for name, fields in FAMILIES.items() if "rope" in fields]


def small(family: str, **fields: Any) -> tuple[VisionTransformer, Tensor]:
    """A model in float32, at r = 2, and images for it."""
    model = model_of(family, **fields).float()
    model.r = 2
    return model, images_for(model).float()


def gradients(model: nn.Module, answer: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(answer.square().sum(), list(model.parameters())))


# ----------------------------------------------------------------------------------------------------------- compilers


@pytest.mark.parametrize(
    ("family", "backend", "r"),
    # The others are traced whole for export, in test_families.py.
    [*((family, "aot_eager", 2) for family in ("clip", "dinov2 linear", "dinov3")), ("pe core", "inductor", 2)],
)
def test_a_compiled_model_answers_alike(family: str, backend: str, r: Schedule) -> None:
    torch.compiler.reset()
    model = model_of(family, depth=1 if backend == "inductor" or FAMILIES[family].get("pool") == "map" else 2)
    images = images_for(model)
    with torch.no_grad():
        answer = torch.compile(model, fullgraph=True, backend=backend)(images, r)
        torch.testing.assert_close(answer, model(images, r), rtol=1e-9, atol=1e-11)


def test_a_compiled_model_learns_alike() -> None:
    torch.compiler.reset()
    model = model_of("pe core", depth=1)
    images = images_for(model)
    answer = torch.compile(model, fullgraph=True, backend="aot_eager")(images, 2)
    torch.testing.assert_close(gradients(model, answer), gradients(model, model(images, 2)), rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # of torch itself; no TracerWarning
@pytest.mark.parametrize("family", DIFFERENT)
def test_torch_jit_traces_it(family: str) -> None:
    model, images = small(family, depth=2)
    traced = torch.jit.trace(model, images)  # type: ignore[no-untyped-call]
    others = images_for(model, 3).float()
    with torch.no_grad():
        assert relative_error(traced(others), model(others)) < 1e-5


def test_onnxruntime_answers_alike(tmp_path: Path) -> None:
    model, images = small("pe core", depth=2)  # rotations and attention pooling
    path = tmp_path / "model.onnx"
    program = tomevit.export_program(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(answer), model(images)) < 1e-4
    assert program.metadata["output"] == f"features: float32 (batch, {answer.shape[1]})"
    assert program.parity is not None
    assert program.parity.same_top1 is None
    assert 0.999 < program.parity.least_cosine <= 1 + 1e-9


# ---------------------------------------------------------------------------------------------------- copies and files


@each_family
def test_files_and_copies_are_the_same_to_the_bit(family: str, tmp_path: Path) -> None:
    model, images = small(family)
    tomevit.save(model, tmp_path / "model.safetensors")
    again, twin = tomevit.load(tmp_path / "model.safetensors"), copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images)
        for same in (again, twin):
            assert same.config == model.config
            assert same.state_dict().keys() == model.state_dict().keys()
            assert torch.equal(same(images, 2), expected)
        for buffer in (*twin.parameters(), *twin.buffers()):
            buffer.zero_()
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("family", ROTARY)
def test_rotations_need_no_resampling(family: str) -> None:
    """What is learned at one size serves at another, but for learned positions; the rotations are that size's own."""
    model = model_of(family).float()
    wanted = replace(model.config, img_size=(20, 8))
    card, tensors, _ = adapt(model.card, model.state_dict(), wanted, Resampling(mode="bicubic", antialias=False))
    changed = {name for name in tensors if not torch.equal(tensors[name], model.state_dict()[name])}
    assert changed == ({"pos_embed"} if model.pos_embed is not None else set())
    found, expected = assemble(card, tensors, ""), model_of(family, img_size=(20, 8)).float()
    expected.load_state_dict(tensors)
    images = images_for(expected).float()
    assert torch.equal(found(images, 2), expected(images, 2))


def test_a_rotary_model_of_the_zoo_takes_any_size() -> None:
    model = tomevit.create("dinov3_s16")
    other = tomevit.create("dinov3_s16", img_size=(32, 80), pretrained=model, r=1)
    assert other.config.grid == (2, 5)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    with torch.inference_mode():
        assert other(torch.zeros(1, 3, 32, 80)).isfinite().all()


# ------------------------------------------------------------------------------------------------------------ training


@each_family
def test_checkpointing_changes_no_gradient(family: str) -> None:
    model = model_of(family, depth=2)
    images = images_for(model)
    expected = gradients(model, model(images, 2))
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model, model(images, 2)), expected, rtol=0, atol=0)


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(family: str, dtype: torch.dtype) -> None:
    model, images = small(family, depth=2)
    with torch.autocast("cpu", dtype):
        answer, tokens = model(images), model.forward_features(images)
    ends_in_product = model.config.num_classes or model.config.proj_dim
    assert answer.dtype == (dtype if ends_in_product or model.attn_pool is not None else torch.float32)
    assert tokens.size is not None
    assert tokens.size.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model, answer.float()))


@each_family
def test_heads_are_made_anew(family: str) -> None:
    model, images = small(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    for classes, width in ((4, 4), (0, model.config.num_features)):
        model.reset_classifier(classes)
        assert model(images).shape == (2, width)
        found = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
        assert found.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


@each_family
def test_frozen_blocks_learn_nothing(family: str) -> None:
    model, images = small(family)
    model.freeze(2)
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        first = name.startswith(("patch_embed", "norm_pre", "blocks.0", "blocks.1"))
        first = first or name in ("cls_token", "reg_token", "pos_embed")
        assert (parameter.grad is None) == first, name


@each_family
def test_layers_near_the_head_learn_fastest(family: str) -> None:
    model, _ = small(family)
    groups = tomevit.param_groups(model, 1.0, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        if name.startswith(("attn_pool", "proj", "norm.", "fc_norm", "head")):
            assert group["lr"] == 1.0, name
        elif not name.startswith("blocks"):
            assert group["lr"] == 0.5**4, name
        decays = not name.endswith(("bias", "gamma", "_token", "pos_embed", "latent")) and "norm" not in name
        assert (group["weight_decay"] > 0) == decays, name


# --------------------------------------------------------------------------------------------------- faster, and shared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_an_optimized_model_answers_alike(family: str, packed: bool, tmp_path: Path) -> None:
    if packed and not can_pack(torch.empty(1)):
        pytest.skip("oneDNN on x86 processors")
    model, images = small(family)
    fast = tomevit.optimize(model, packed=packed, keep_memory=False)
    assert ("LayerScale folded into the layers before it" in fast.optimizations) == ("layer_scale" in FAMILIES[family])
    assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == (4 * 3 if packed else 0)
    tomevit.save(fast, tmp_path / "fast.safetensors")
    with torch.inference_mode():
        for r in (0, 2):
            assert relative_error(fast(images, r), model(images, r)) < 1e-4
        assert relative_error(tomevit.load(tmp_path / "fast.safetensors")(images, 2), model(images, 2)) < 1e-4


@pytest.mark.parametrize("family", DIFFERENT)
def test_emulated_types_are_widened(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tomevit.layers.backends.EMULATED", frozenset({torch.float16}))
    model = model_of(family).half()
    fast, images = tomevit.optimize(model, packed=False, keep_memory=False), images_for(model).half()
    exact = copy.deepcopy(model).float()
    with torch.inference_mode():
        assert fast.dtype == torch.float32
        assert relative_error(fast(images, 2), exact(images.float(), 2)) < 1e-3
        assert model(images, 2).dtype == torch.float16  # whose products run in float32


@pytest.mark.parametrize("family", DIFFERENT)
def test_threads_share_a_model_at_different_r(family: str) -> None:
    model, images = small(family)
    schedules: list[Schedule] = [0, 3, [1, 0, 4]]
    with torch.inference_mode():
        expected = [model(images, r) for r in schedules]
    wrong: list[Schedule] = []

    def run(r: Schedule, answer: Tensor) -> None:
        with torch.inference_mode():
            wrong.extend(r for _ in range(10) if not torch.equal(model(images, r), answer))

    threads = [threading.Thread(target=run, args=arguments) for arguments in zip(schedules, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("family", DIFFERENT)
def test_data_parallel_wrappers_take_it(family: str, tmp_path: Path) -> None:
    model = model_of(family, depth=2)
    images = images_for(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        _answers_and_learns_wrapped(model, images)
    finally:
        torch.distributed.destroy_process_group()


def _answers_and_learns_wrapped(model: nn.Module, images: Tensor) -> None:
    """The wrapper ends with this function: one that outlives its process group may wait for its threads for ever."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    answer = wrapped(images, 2)
    torch.testing.assert_close(answer, model(images, 2), rtol=0, atol=0)
    answer.square().sum().backward()  # fails where a parameter has no part in the answer and is waited for
    assert all(parameter.grad is not None for parameter in model.parameters())
