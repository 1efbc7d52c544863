"""What a training loop gets: parameter groups, fresh heads, frozen blocks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tomevit
from benchmarks.peers import timm
from tests.helpers import images_for, tiny
from tomevit import VisionTransformer
from tomevit.weights import checkpoint


def groups_of(model: VisionTransformer, **arguments: float) -> dict[str, dict[str, object]]:
    """By parameter, what its group says."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    out = {}
    for group in tomevit.param_groups(model, 1.0, **arguments):
        for parameter in group["params"]:
            assert names[id(parameter)] not in out
            out[names[id(parameter)]] = group
    return out


def test_layer_decay_is_timms() -> None:
    """timm has MAE's and BEiT's, but for the final norm: theirs learns with the head, timm's with the last block."""
    model = tomevit.create("deit_ti16")
    theirs = timm.create_model("deit_tiny_patch16_224")
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    expected = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in importlib.import_module("timm.optim").param_groups_layer_decay(
            theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.75
        )
        for parameter in group["params"]
    }
    ours = groups_of(model, weight_decay=0.05, layer_decay=0.75)
    expected |= dict.fromkeys(("norm.weight", "norm.bias"), (1.0, 0.0))
    assert {name: (group["scale"], group["weight_decay"]) for name, group in ours.items()} == expected


@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"reg_tokens": 2}, {"layer_scale": 0.1}, {"pool": "avg"}])
def test_every_parameter_is_in_one_group(fields: dict[str, object]) -> None:
    model = tiny(**fields)
    groups = groups_of(model, weight_decay=0.1, layer_decay=0.5)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        matrix = name.endswith("weight") and model.get_parameter(name).ndim > 1
        assert group["weight_decay"] == (0.1 if matrix else 0.0), name
        assert group["lr"] == group["scale"]
    assert groups["blocks.3.mlp.fc1.weight"]["name"] == "blocks.3"
    assert groups["blocks.3.mlp.fc1.bias"]["name"] == "blocks.3, no decay"
    assert groups["blocks.3.mlp.fc1.bias"]["lr"] == 0.5
    assert groups["head.weight"]["lr"] == 1.0
    assert groups["cls_token"]["lr"] == 0.5**5


def test_groups_are_an_optimizers() -> None:
    model = tiny()
    model.freeze(2)
    groups = tomevit.param_groups(model, lr=1e-2, layer_decay=0.9)
    assert [group["name"] for group in groups] == [
        "blocks.2", "blocks.2, no decay", "blocks.3", "blocks.3, no decay", "head", "head, no decay",
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()(images_for(model)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        learns = name.startswith(("blocks.2", "blocks.3", "norm", "head"))
        assert torch.equal(parameter, before[name]) != learns, name


@pytest.mark.parametrize(
    "arguments", [{"lr": -1.0}, {"weight_decay": -0.1}, {"layer_decay": 0.0}, {"layer_decay": 1.5}]
)
def test_wrong_numbers(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        tomevit.param_groups(tiny(), **{"lr": 1.0, **arguments})


def test_frozen_blocks() -> None:
    model = tiny(reg_tokens=1)
    model.freeze(4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip
    model.freeze(0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for blocks in (-1, 5):
        with pytest.raises(ValueError, match=f"there are 4 blocks, and {blocks} cannot be frozen"):
            model.freeze(blocks)


@pytest.mark.parametrize("dist_token", [False, True])
def test_a_fresh_head(dist_token: bool) -> None:
    model = tiny(8, dist_token=dist_token, init="deit").to(torch.bfloat16).train()
    heads = [getattr(model, name) for name in model.head_names]
    assert len(heads) == 1 + dist_token
    torch.manual_seed(3)
    model.reset_classifier(12)
    for old, name in zip(heads, model.head_names, strict=True):
        head = getattr(model, name)
        assert head is not old
        assert head.weight.shape == (12, 24)
        assert head.weight.dtype == torch.bfloat16
        assert head.training
        assert head.weight.std() > 0.01
        assert not head.bias.any()
    assert model.config.num_classes == model.card.config.num_classes == 12
    model.eval()
    assert model(images_for(model)).shape == (3, 12)
    model.reset_classifier(0)
    assert model(images_for(model)).shape == (3, 24)
    assert [name for name, _ in model.named_parameters() if "head" in name] == []


def test_a_group_has_its_rate_once_whoever_sets_it() -> None:
    model, schedulers = tiny(), importlib.import_module("timm.scheduler")
    makers: list[Callable[[torch.optim.Optimizer], object]] = [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        lambda optimizer: schedulers.CosineLRScheduler(optimizer, t_initial=10).step(0),
        lambda optimizer: schedulers.StepLRScheduler(optimizer, decay_t=5).step_update(0),
        lambda optimizer: schedulers.create_scheduler_v2(optimizer, "poly", num_epochs=10)[0].step(0),
    ]
    expected = {group["name"]: group["lr"] for group in tomevit.param_groups(model, 1e-3, layer_decay=0.5)}
    assert set(expected.values()) == {1e-3 * 0.5**i for i in range(6)}
    for make in makers:
        optimizer = torch.optim.AdamW(tomevit.param_groups(model, 1e-3, layer_decay=0.5))
        make(optimizer)
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx(expected)
        assert [1e-3 * group["scale"] for group in optimizer.param_groups] == pytest.approx([*found.values()])


def wrapped(model: VisionTransformer) -> list[torch.nn.Module]:
    return [
        torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel(model),
        torch.nn.DataParallel(torch.compile(model, backend="eager")),
        torch.compile(torch.nn.DataParallel(model), backend="eager"),
        importlib.import_module("timm.utils").ModelEmaV3(model),
    ]


def test_the_model_in_a_wrapper(tmp_path: Path) -> None:
    model = tiny(8)
    names = [(group["name"], group["lr"]) for group in tomevit.param_groups(model, 1.0, layer_decay=0.5)]
    images = images_for(model)
    for i, wrapper in enumerate(wrapped(model)):
        groups = tomevit.param_groups(wrapper, 1.0, layer_decay=0.5)
        assert [(group["name"], group["lr"]) for group in groups] == names
        tomevit.save(wrapper, tmp_path / f"{i}.safetensors")
        assert torch.equal(tomevit.load(tmp_path / f"{i}.safetensors")(images), model(images))
        assert repr(tomevit.transform(wrapper)) == repr(tomevit.transform(model))


def test_r_set_on_a_wrapper(tmp_path: Path) -> None:
    """Where it does not reach the model, all of ours that is given the wrapper says so; with the call it does."""
    functions: list[Callable[[torch.nn.Module], object]] = [
        tomevit.transform,
        tomevit.optimize,
        lambda wrapper: tomevit.param_groups(wrapper, 1.0),
        lambda wrapper: tomevit.save(wrapper, tmp_path / "x.safetensors"),
        lambda wrapper: tomevit.export(wrapper, tmp_path / "x.pth", "timm"),
        lambda wrapper: tomevit.export_program(wrapper, tmp_path / "x.onnx"),
        lambda wrapper: tomevit.create("digits_p1", pretrained=wrapper),
    ]
    reached = []
    for wrapper in wrapped(tiny(8)):
        model = next(module for module in wrapper.modules() if isinstance(module, VisionTransformer))
        images, model.r = images_for(model), 8
        wrapper.r = 0  # type: ignore[assignment]
        reached.append(model.r == 0)
        if model.r:
            for function in functions:
                with pytest.raises(
                    ValueError, match=r"^r was set on a \w+, where it acts on nothing: pass it with the"
                ):
                    function(wrapper)
            del wrapper.r
            tomevit.param_groups(wrapper, 1.0)
        merged = wrapper(images)
        assert torch.equal(merged, model(images))
        assert torch.equal(wrapper(images, r=4), model(images, 4))
        assert not torch.equal(wrapper(images, r=4), merged)
    assert reached == [True, False, False, False, False]
    assert [*tmp_path.iterdir()] == []


class Adapter(torch.nn.Module):
    """As peft's stand in a model: beside the layer that was there."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Adapted(torch.nn.Module):
    """As peft wraps it then."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        model.requires_grad_(False)
        for block in model.blocks:
            block.mlp.fc1 = Adapter(block.mlp.fc1)  # type: ignore[union-attr]
        self.base_model = model


def adapted_by_peft(model: VisionTransformer) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"]))


@pytest.mark.parametrize("adapt", [Adapted, adapted_by_peft])
def test_a_model_with_adapters(adapt: Callable[[VisionTransformer], torch.nn.Module], tmp_path: Path) -> None:
    model = tiny(8)
    wrapper = adapt(model)
    for given in (wrapper, torch.nn.DataParallel(wrapper), model):
        for function in (
            tomevit.optimize,
            lambda given: tomevit.save(given, tmp_path / "x.safetensors"),
            lambda given: tomevit.export(given, tmp_path / "x.pth", "timm"),
            lambda given: tomevit.export_program(given, tmp_path / "x.onnx"),
            lambda given: tomevit.push(given, "owner/repo"),
            lambda given: tomevit.create("digits_p1", pretrained=given),
        ):
            with pytest.raises(ValueError, match=r"^model .*: give what .*merge_and_unload\(\) .*returns$"):
                function(given)
    with pytest.raises(
        ValueError, match=r"give its get_base_model\(\) to train .* what its merge_and_unload\(\) returns"
    ):
        tomevit.param_groups(wrapper, 1.0)
    groups = tomevit.param_groups(model, 1.0, layer_decay=0.5)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        (f"blocks.{i}", 0.5 ** (4 - i), 2) for i in range(4)
    ]
    assert [*tmp_path.iterdir()] == []


def test_what_is_no_model_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is a Linear, and must be a model of tomevit's"):
        tomevit.param_groups(torch.nn.Linear(2, 2), 1.0)
    autoencoder = tomevit.MaskedAutoencoder(tiny(), decoder_dim=8, decoder_depth=1, decoder_heads=1)
    with pytest.raises(
        ValueError, match="model is a MaskedAutoencoder, and must be a VisionTransformer of tomevit's: give its encoder"
    ):
        tomevit.save(autoencoder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


class Part(torch.Tensor):
    """As DTensor is: a tensor that is no plain one."""


def test_weights_that_are_spread_over_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny(8)
    monkeypatch.setattr(checkpoint, "SPREAD", {"Part"})
    whole = model.state_dict()
    spread = {name: tensor.as_subclass(Part) for name, tensor in whole.items()}
    with pytest.raises(ValueError, match=r"the weights are of type Part; .* state_dict=get_model_state_dict"):
        tomevit.save(model, tmp_path / "x.safetensors", state_dict=spread)
    assert not (tmp_path / "x.safetensors").exists()
    wrapped = {f"module.{name}": tensor for name, tensor in whole.items()}
    for other, wrong in ((wrapped, r"blocks\.0"), (whole | {"norm.bias": torch.zeros(1)}, r"norm\.bias")):
        with pytest.raises(ValueError, match=f"state_dict is of another model: {wrong}.* is missing, left over"):
            tomevit.save(model, tmp_path / "x.safetensors", state_dict=other)
    tomevit.save(model, tmp_path / "x.safetensors", state_dict={name: 2 * tensor for name, tensor in whole.items()})
    assert torch.equal(tomevit.load(tmp_path / "x.safetensors").pos_embed, 2 * model.pos_embed)
