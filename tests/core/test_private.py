"""Names that torch keeps to itself: each exists in this torch, and without it something is slower and nothing wrong."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tomevit
from tests.helpers import images_for, tiny
from tomevit import private
from tomevit.deploy.optimize import compile_whole
from tomevit.layers.packed import PackedLinear, can_pack
from tomevit.measure.bounds import Limits, bounds

NAMES = (
    "torch._C._has_mkldnn",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._functorch.peek_interpreter_stack",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported",
    "torch.ops.mkldnn._reorder_linear_weight",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.modules.module._global_backward_hooks",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
    "torch._inductor.cpp_builder.get_cpp_compiler",
    "torch._inductor.aoti_compile_and_package",
    "torch._inductor.aoti_load_package",
    "torch._dynamo.config.cache_size_limit",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    if not module.startswith("torch.ops") and module != "torch._C":
        __import__(module)
    assert hasattr(eval(module, {"torch": torch}), attribute)


def test_what_modules_and_tensors_have() -> None:
    layer = nn.Linear(2, 2)
    assert {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks"} <= vars(layer).keys()
    assert {"_parameters", "_buffers", "_modules"} <= vars(layer).keys()
    assert hasattr(layer, "_compiled_call_impl")
    assert torch.ones(1)._version == 0
    assert hasattr(nn.DataParallel(layer), "module")
    assert hasattr(torch.compile(layer), "_orig_mod")


def test_a_constant_is_marked_as_torch_does_it() -> None:
    assert (
        vars(private.constant_to_compilers(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1)) != {}
    )


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As in a torch that has renamed it."""
    module, _, attribute = name.rpartition(".")
    monkeypatch.delattr(sys.modules.get(module) or eval(module, {"torch": torch}), attribute)


@pytest.mark.parametrize("name", ["_reorder_linear_weight", "_linear_pointwise"])
def test_weights_are_not_packed_without_the_operators(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    x, plain = torch.randn(5, 8), nn.Linear(8, 8)
    monkeypatch.setattr(private, "_onednn", lambda asked: None if asked == name else getattr(torch.ops.mkldnn, asked))
    packed = PackedLinear(plain)
    assert packed._packed is None
    torch.testing.assert_close(packed(x), plain(x), rtol=0, atol=0)


def test_nothing_is_emulated_or_packed_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch._C._has_mkldnn")
    assert private.emulated_dtypes() == frozenset()
    assert not can_pack(torch.ones(2, 2))


def test_packed_weights_are_never_trusted_without_a_count_of_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncounted:
        def is_inference(self) -> bool:
            return False

    tensor: Any = Uncounted()
    assert private.times_written(tensor) != private.times_written(tensor)


@pytest.mark.parametrize("name", ["_global_forward_hooks", "_global_backward_pre_hooks"])
def test_no_layer_is_plain_without_the_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    layer = nn.Linear(2, 2)
    assert private.is_plain(layer, nn.Linear)
    without(monkeypatch, f"torch.nn.modules.module.{name}")
    assert not private.is_plain(layer, nn.Linear)


def test_a_model_is_not_captured_where_its_calls_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    model = tiny().eval()
    driver: Any = object()
    monkeypatch.setattr(type(model), "compile", lambda self, **how: asked.append(how["mode"]))
    assert not compile_whole(model, driver=lambda _: driver)  # this compile leaves no _compiled_call_impl behind
    assert asked == ["default"]


@pytest.mark.parametrize("names", [True, False])
def test_what_a_model_is_made_of_is_seen_without_the_names_too(names: bool) -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2, bias=False)))
    if not names:
        model[0]._parameters = dict(vars(model[0]).pop("_parameters"))
        model[0].__class__ = type("Renamed", (nn.BatchNorm1d,), {"_parameters": model[0]._parameters})
        vars(model[0]).pop("_parameters")
    look = private.live_contents(model)
    tensors, layers = look()
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert set(layers) - {model} == {model[0], model[1], model[1][0]}
    model[1][0].weight = nn.Parameter(torch.ones(2, 3))
    assert any(tensor is model[1][0].weight for tensor in look()[0])
    assert not private.has_hooks(layers)
    model[1][0].register_forward_pre_hook(lambda *_: None)
    assert private.has_hooks(layers)


def test_no_mode_is_seen_without_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert private.is_watched()
        without(monkeypatch, "torch._C._len_torch_dispatch_stack")
        assert not private.is_watched()


def test_operators_are_not_counted_where_they_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    model, limits = tiny().eval(), Limits("cpu")
    images = images_for(model)
    found = bounds(
        lambda: model(images), 1.0, limits, config=model.config, dtype=torch.float32, flops=1, tokens=9, weights=1
    )
    assert found.memory is None
    assert found.launches is None


def test_programs_are_made_as_torch_likes_without_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    with private.allow_many_programs():
        pass


def test_a_package_is_refused_where_torch_cannot_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor", None)
    program: Any = None
    with pytest.raises(ValueError, match="has no aoti_compile_and_package"):
        private.compile_package(program, tmp_path / "x.pt2", {})
    monkeypatch.setitem(sys.modules, "torch._inductor.cpp_builder", None)
    assert not private.missing_compiler()


def test_no_other_module_uses_private_names_of_torch() -> None:
    """Strings do not count: a checkpoint's pickle names some."""
    root = Path(tomevit.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if path != root / "private.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = ""
                if isinstance(node, ast.Attribute):
                    name = ast.unparse(node)
                elif isinstance(node, ast.ImportFrom):
                    name = node.module or ""
                if name.startswith("torch.") and any(part.startswith("_") for part in name.split(".")):
                    found.append(f"{path.relative_to(root)}: {name}")
    assert [name for name in found if "__" not in name] == []


def test_a_quantised_weight_is_not_plain_without_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantised(torch.Tensor): ...

    assert not private.is_wrapped(torch.ones(2))
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    assert not private.is_wrapped(nn.Parameter(torch.ones(2)))
    assert private.is_wrapped(torch.ones(2).as_subclass(Quantised))
