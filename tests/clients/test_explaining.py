"""What a model looks at: attributions and class activation maps, with merging and without; features by their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import works_with
from tomevit.layers import Block, PatchEmbed, Tokens
from tomevit.models import VisionTransformer
from tomevit.tasks.demo import held_out

R_VALUES = (0, 8)


class Images(nn.Module):
    """A model of images alone, with slots: torch.fx would follow r too."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images))


@pytest.fixture(params=R_VALUES)
def model(request: pytest.FixtureRequest) -> VisionTransformer:
    """One that can read digits."""
    return tomevit.create("digits_p1.plain", pretrained=True, r=request.param)


@pytest.fixture
def images(model: VisionTransformer) -> Tensor:
    transform = tomevit.transform(model)
    return torch.stack([transform(image) for image in held_out()[0][:4]])


@works_with("captum", "IntegratedGradients, Saliency, Occlusion of the pixels")
def test_attributions_of_pixels(model: VisionTransformer, images: Tensor) -> None:
    from captum import attr

    target = model(images).argmax(1)
    attributions, error = attr.IntegratedGradients(model).attribute(
        images, target=target, n_steps=64, return_convergence_delta=True
    )
    assert attributions.shape == images.shape
    change = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    # Where other tokens merge along the way the logits jump, and the sum of the gradients misses what they jump by.
    assert (error.abs() <= (0.05 if model.r == 0 else 0.5) * change.abs()).all()
    assert attr.Saliency(model).attribute(images, target=target).flatten(1).any(1).all()
    occluded = attr.Occlusion(model).attribute(
        images, target=target, sliding_window_shapes=(1, 2, 2), strides=(1, 2, 2)
    )
    assert occluded.flatten(1).any(1).all()


@works_with("captum", "LayerGradCam and LayerActivation of a block's norm; Shapley values of regions")
def test_attributions_of_layers(model: VisionTransformer, images: Tensor) -> None:
    from captum import attr

    target = model(images).argmax(1)
    layer = model.blocks[2].norm1
    found = attr.LayerGradCam(model, layer).attribute(images, target=target, attr_dim_summation=False)
    tokens = model.forward_intermediates(images)[1]  # those that enter blocks[2]
    assert found.shape == (4, tokens.x.shape[1], model.config.embed_dim)
    activations = attr.LayerActivation(model, layer).attribute(images)
    assert torch.allclose(activations, layer(tokens.x), atol=1e-5)
    assert tomevit.unmerge(Tokens(found, None, tokens.slots)).shape[1] == 64 + model.config.num_prefix
    regions = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
    shapley = attr.ShapleyValueSampling(model).attribute(images, target=target, feature_mask=regions, n_samples=4)
    total = (model(images) - model(torch.zeros_like(images))).gather(1, target[:, None])[:, 0]
    per_region = shapley[:, 0, ::4, ::4].sum((1, 2))
    assert torch.allclose(per_region, total, atol=1e-3)


@works_with("grad-cam", "GradCAM, GradCAM++ and EigenCAM, of a model that merges and of one that does not")
@pytest.mark.parametrize("kind", ["GradCAM", "GradCAMPlusPlus", "EigenCAM"])
def test_class_activation_maps(kind: str, model: VisionTransformer, images: Tensor) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    labels = held_out()[1][:4].tolist()
    slots = model.forward_intermediates(images)[-2].slots

    def to_grid(tokens: Tensor) -> Tensor:
        patches = tomevit.unmerge(Tokens(tokens, None, slots))[:, model.config.num_prefix :]
        return patches.transpose(1, 2).unflatten(2, model.config.grid)

    with getattr(pytorch_grad_cam, kind)(model, [model.blocks[-1].norm1], reshape_transform=to_grid) as cam:
        maps = torch.from_numpy(cam(images, [ClassifierOutputTarget(label) for label in labels]))
    assert maps.shape == (4, 8, 8)
    assert (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all()
    if model.r:  # what has merged has one value
        slots = slots[:, model.config.num_prefix :]
        for one, places in zip(maps.flatten(1), slots, strict=True):
            values = [one[places == place] for place in places.unique()]
            assert len(values) < 64
            assert all(torch.allclose(value, value[:1], atol=1e-5) for value in values)


@works_with("torch", "hooks on blocks, which receive and return Tokens; register_full_backward_hook on their layers")
def test_hooks_on_blocks(model: VisionTransformer, images: Tensor) -> None:
    seen: list[Tokens] = []
    gradients: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, tokens: seen.append(tokens)) for block in model.blocks]
    hooks.append(model.blocks[1].mlp.register_full_backward_hook(lambda _, __, given: gradients.append(given[0])))
    model.forward_features(images)  # with a record of where each token goes
    expected = model.forward_intermediates(images)
    assert all(torch.equal(a.x, b.x) for a, b in zip(seen, expected, strict=False))
    assert [tomevit.unmerge(tokens).shape[1] for tokens in seen[:4]] == 4 * [64 + model.config.num_prefix]
    model(images).sum().backward()
    assert gradients[-1].shape == expected[1].x.shape
    for hook in hooks:
        hook.remove()
    before = model(images)
    model.blocks[0].register_forward_hook(lambda _, __, tokens: tokens._replace(x=tokens.x + 1))
    assert not torch.equal(model(images), before)


@works_with("torchvision", "create_feature_extractor")
@pytest.mark.parametrize("r", R_VALUES)
def test_create_feature_extractor(r: int) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = tiny(r, depth=3)
    extractor = create_feature_extractor(
        Images(model),
        {"model.blocks.1": "tokens", "model.head": "logits"},
        tracer_kwargs={"leaf_modules": [Block, PatchEmbed]},
    )
    found, images = extractor(images_for(model)), images_for(model)
    expected = model.forward_intermediates(images)[1]
    assert torch.equal(found["tokens"].x, expected.x)
    assert torch.equal(tomevit.unmerge(found["tokens"]), tomevit.unmerge(expected))
    assert relative_error(found["logits"], model(images)) < 1e-5


@works_with("timm", "FeatureHookNet: what named modules of a model give")
@pytest.mark.parametrize("r", R_VALUES)
def test_timm_features(r: int) -> None:
    from timm.models import FeatureHookNet

    model = tiny(r)
    model.feature_info = [{"num_chs": 24, "reduction": 4, "module": f"blocks.{i}.mlp"} for i in (1, 2)]
    features = FeatureHookNet(model, out_indices=(0, 1))(images_for(model, 2))
    assert [tuple(each.shape) for each in features] == [(2, n, 24) for n in model.token_counts()[2:4]]
