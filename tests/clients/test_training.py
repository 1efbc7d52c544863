"""Frameworks that train a model, and wrappers that stand around it meanwhile."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import works_with

merged_or_not = pytest.mark.parametrize("r", [0, 8])
LABELS = torch.tensor([1, 2, 0, 3, 6, 5, 4, 1])


@works_with("skorch", "NeuralNetClassifier: fit, predict_proba, within scikit-learn's cross_val_score, pickled")
@merged_or_not
def test_skorch(r: int) -> None:
    import pickle

    import skorch
    from sklearn.model_selection import cross_val_score

    images, labels = images_for(tiny(), 16).numpy(), np.tile(LABELS.numpy(), 2)
    net = skorch.NeuralNetClassifier(
        tiny(r), criterion=nn.CrossEntropyLoss, max_epochs=3, lr=0.01, train_split=None, verbose=0, batch_size=8
    )
    net.fit(images, labels)
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0]
    assert net.predict_proba(images).shape == (16, 7)
    assert np.allclose(pickle.loads(pickle.dumps(net)).predict_proba(images), net.predict_proba(images))
    assert np.isfinite(cross_val_score(net, images, labels, cv=2)).all()


@works_with("lightning", "a module around the model: fit, checkpoint, load")
@merged_or_not
def test_lightning(r: int, tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny(r)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(tomevit.param_groups(self.model, lr=1e-3))

    module = Module()
    data = torch.utils.data.TensorDataset(images_for(module.model, 8), LABELS)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    images = images_for(module.model)
    assert torch.equal(loaded.eval().model(images), module.eval().model(images))


@works_with("opacus", "PrivacyEngine.make_private: clipped gradients of each image, noise, the privacy that is spent")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@merged_or_not
def test_opacus(r: int, mode: str) -> None:
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    model = tiny(r).train()
    assert ModuleValidator.validate(model) == []
    model.requires_grad_(True)
    # Of parameters that are no layer's opacus knows no gradient of each image.
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(False)
    data = torch.utils.data.TensorDataset(images_for(model, 8), LABELS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(secure_mode=False)
    extra = {"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}
    private, optimizer, *criterion, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **extra,
    )
    before = deepcopy(model.state_dict())
    for images, labels in loader:
        optimizer.zero_grad()
        loss = (criterion[0] if criterion else F.cross_entropy)(private(images), labels)
        loss.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert engine.get_epsilon(delta=1e-5) > 0


@works_with("opacus", "gradients of each image are those of the image alone")
@merged_or_not
def test_opacus_gradients(r: int) -> None:
    from opacus import GradSampleModule

    model = tiny(r).train()
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(False)
    images, alone = images_for(model, 3), deepcopy(model)
    sampled = GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(sampled(images), LABELS[:3], reduction="sum").backward()
    for i in range(3):
        alone.zero_grad()
        F.cross_entropy(alone(images[i : i + 1]), LABELS[i : i + 1]).backward()
        for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            if theirs.grad is not None:
                assert relative_error(mine.grad_sample[i], theirs.grad) < 1e-4, name


@works_with("torch", "torch.func: functional_call, and vmap of grad for gradients of each image")
@merged_or_not
def test_torch_func(r: int) -> None:
    from torch.func import functional_call, grad, vmap

    model = tiny(r)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    images = images_for(model, 3)

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, LABELS[:3])
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), LABELS[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert relative_error(found[name][i], parameter.grad) < 1e-4, name


@works_with("accelerate", "cpu_offload, disk_offload and dispatch_model")
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
@merged_or_not
def test_accelerate(r: int, way: str, tmp_path: Path) -> None:
    import accelerate

    model = tiny(r)
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        if way == "cpu_offload":
            offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        elif way == "disk_offload":
            offloaded = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            on_disk = {"blocks.1": "disk", "blocks.3": "disk", "patch_embed": "disk", "head": "disk"}
            where = {
                name: on_disk.get(name, "cpu") for name in ("patch_embed", "cls_token", "pos_embed", "norm", "head")
            }
            where |= {f"blocks.{i}": on_disk.get(f"blocks.{i}", "cpu") for i in range(4)}
            offloaded = accelerate.dispatch_model(
                model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True
            )
        assert relative_error(offloaded(images), expected) < 1e-5
        assert relative_error(offloaded(images, r=4), tiny(4)(images)) < 1e-5


@works_with("timm", "create_optimizer_v2(layer_decay=), and CosineLRScheduler")
def test_timm_optimizer() -> None:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    model = tiny()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    CosineLRScheduler(optimizer, t_initial=10).step(0)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1
    assert [scale[id(block.attn.qkv.weight)] for block in model.blocks] == [0.5 ** (4 - i) for i in range(4)]
    assert scale[id(model.pos_embed)] == scale[id(model.patch_embed.proj.weight)] == 0.5**5
    assert {decay[id(p)] for p in (model.pos_embed, model.cls_token, model.norm.weight, model.head.bias)} == {0}
    assert decay[id(model.head.weight)] == 0.05


@works_with("timm", "resolve_model_data_config, and transforms from what it says")
def test_timm_data_config() -> None:
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    model = tomevit.create("deit_ti16", num_classes=3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8))
    theirs = create_transform(**resolve_model_data_config(model))(image)
    assert torch.allclose(theirs, tomevit.transform(model)(image), atol=0.02)


@works_with("timm", "ModelEmaV3, and freeze")
@merged_or_not
def test_timm_averages(r: int) -> None:
    from timm.utils import ModelEmaV3, freeze

    model = tiny(r)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    average.update(model)
    assert torch.allclose(average.module.head.weight, model.head.weight * (0.5 + 0.5 / 1.5), rtol=1e-5)
    assert average(images_for(model)).shape == (3, 7)
    freeze(model, ["blocks.0"])
    assert not any(parameter.requires_grad for parameter in model.blocks[0].parameters())


@works_with("pytorch-metric-learning", "TripletMarginLoss of what a model without a head gives")
@merged_or_not
def test_metric_learning(r: int) -> None:
    from pytorch_metric_learning.losses import TripletMarginLoss

    model = tiny(r, num_classes=0)
    TripletMarginLoss()(model(images_for(model, 8)), LABELS % 2).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@works_with("fastai", "Learner: fit")
@merged_or_not
def test_fastai(r: int, tmp_path: Path) -> None:
    import fastai.callback.progress  # noqa: F401
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    model = tiny(r)
    data = torch.utils.data.TensorDataset(images_for(model, 8), LABELS)
    before = deepcopy(model.state_dict())
    learner = Learner(
        DataLoaders.from_dsets(data, data, bs=4, device="cpu"), model, loss_func=nn.CrossEntropyLoss(), path=tmp_path
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=1e-3)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@works_with("lightly", "a backbone for SimCLR: features of a model without a head, and its loss")
@merged_or_not
def test_lightly(r: int) -> None:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    backbone = tiny(r, num_classes=0)
    head = SimCLRProjectionHead(backbone.num_features, 32, 16)
    views = [head(backbone(images_for(backbone, 4, seed=seed))) for seed in (1, 2)]
    NTXentLoss()(*views).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
