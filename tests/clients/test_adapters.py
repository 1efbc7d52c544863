"""Adapters of peft, in the place of every layer that has weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import works_with

EVERY_LAYER = ["qkv", "proj", "fc1", "fc2", "head"]  # "proj" is the patch embedding's convolution too
R_VALUES = (0, 8)
MODELS = [{}, {"pool": "avg", "class_token": False}, {"dist_token": True}]


@works_with("peft", "LoRA, DoRA and LoHa on qkv, proj, fc1, fc2, the patch embedding and the head: trained and merged")
@pytest.mark.parametrize("fields", MODELS, ids=["token", "avg", "distilled"])
@pytest.mark.parametrize("r", R_VALUES)
@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_adapters_learn_in_every_block_and_merge(kind: str, r: int, fields: dict[str, object]) -> None:
    import peft

    model = tiny(r, **fields)
    images, before = images_for(model), model(images_for(model))
    if kind == "loha":
        config = peft.LoHaConfig(r=2, target_modules=EVERY_LAYER, init_weights=False)
    else:
        config = peft.LoraConfig(r=2, target_modules=EVERY_LAYER, use_dora=kind == "dora", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    logits = adapted(images)
    # A distilled model answers with two logits, in training.
    torch.stack(list(logits) if isinstance(logits, tuple) else [logits]).square().mean().backward()
    without = [
        name
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) >= 2 * (4 * model.config.depth + 2)
    optimizer.step()
    with torch.no_grad():
        after = adapted.eval()(images)
        merged = adapted.merge_and_unload()
        assert relative_error(after, before) > 1e-3
        assert relative_error(merged(images), after) < 1e-5
    assert type(merged) is type(model)


@works_with("peft", "save_pretrained, and load into another copy of the model")
@pytest.mark.parametrize("r", R_VALUES)
def test_adapters_are_saved_and_loaded(r: int, tmp_path: Path) -> None:
    import peft

    model = tiny(r)
    config = peft.LoraConfig(
        r=2, target_modules=["qkv", "proj"], modules_to_save=["head"], use_dora=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(deepcopy(model), config).eval()
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(deepcopy(model), tmp_path).eval()
    images = images_for(model)
    assert torch.equal(loaded(images), adapted(images))
    with adapted.disable_adapter():
        assert relative_error(adapted(images), model(images)) < 1e-6


@works_with("peft", "save, param_groups, optimize and export_program ask for merge_and_unload()")
def test_what_needs_the_model_itself_says_so(tmp_path: Path) -> None:
    import peft

    adapted = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    for call in (
        lambda: tomevit.save(adapted, tmp_path / "model.safetensors"),
        lambda: tomevit.param_groups(adapted, lr=0.1),
        lambda: tomevit.optimize(adapted),
        lambda: tomevit.export_program(adapted, tmp_path / "model.onnx"),
        lambda: tomevit.export(adapted, tmp_path / "model.safetensors", format="timm"),
    ):
        with pytest.raises(ValueError, match="merge_and_unload"):
            call()


@works_with("bitsandbytes", "8-bit and 4-bit linear layers in the place of all others, on a CPU")
@pytest.mark.parametrize("r", R_VALUES)
@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_quantised_layers_of_bitsandbytes(kind: str, r: int) -> None:
    import bitsandbytes

    model = tiny(r, embed_dim=96)
    quantised = deepcopy(model)
    for parent in list(quantised.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                if kind == "Linear8bitLt":
                    new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
                else:
                    new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
                new.load_state_dict(layer.state_dict())
                setattr(parent, name, new)
    quantised.to("cpu")
    images = images_for(model)
    with torch.no_grad():
        assert relative_error(quantised(images), model(images)) < (0.1 if kind == "Linear8bitLt" else 0.5)
