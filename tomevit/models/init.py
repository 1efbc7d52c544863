"""Fresh weights, as the code that each family was trained with draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Generator, Tensor, nn

from tomevit.config import Config
from tomevit.layers.mlp import LayerScale
from tomevit.layers.uninitialised import linear

Draw = Callable[[Tensor, Generator], Tensor]


def _normal(std: float) -> Draw:
    return lambda tensor, generator: tensor.normal_(std=std, generator=generator)


def _zeros(tensor: Tensor, _: Generator) -> Tensor:
    return tensor.zero_()


def _xavier(tensor: Tensor, generator: Generator, parts: int = 1) -> Tensor:
    """Glorot and Bengio's uniform, for each of the parts that a weight stacks along its outputs."""
    fan_out, fan_in = len(tensor) // parts, tensor[0].numel()
    bound = math.sqrt(6 / (fan_in + fan_out))
    return tensor.uniform_(-bound, bound, generator=generator)


def _lecun(tensor: Tensor, generator: Generator) -> Tensor:
    return tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)


def _lecun_truncated(tensor: Tensor, generator: Generator) -> Tensor:
    """Cut at two standard deviations, as JAX does it: 0.8796 is what the cut leaves of a normal's."""
    std = tensor[0].numel() ** -0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)


def _torch_default(tensor: Tensor, generator: Generator) -> Tensor:
    """As torch's Linear and Conv2d start: uniform up to 1 / √fan_in."""
    bound = tensor[0].numel() ** -0.5
    return tensor.uniform_(-bound, bound, generator=generator)


#: By name of an init, how parameters are drawn: the first pattern that fits a name counts. What no pattern names is 0
#: for a bias, 1 for a norm, and for LayerScale what the config says. (Nothing sets the bias of the patch embedding in
#: DeiT's and MAE's code, where it begins as torch's, uniform up to 1 / √fan_in. Here it is 0.)
INITS: dict[str, dict[str, Draw]] = {
    # google-research/vision_transformer@c6de1e5, vit_jax/models_vit.py, and Flax's defaults where that is silent
    "vit": {
        "head*": _zeros,
        "reg_token": _normal(1e-6),  # no part of ViT: equal ones would stay equal (arXiv:2309.16588, DINOv2's code)
        "*_token": _zeros,
        "attn_pool.latent": _xavier,  # google-research/big_vision@0127fb6, models/vit.py
        "*attn_pool.qkv.weight": partial(_xavier, parts=3),
        "pos_embed": _normal(0.02),
        "patch_embed.proj.weight": _lecun_truncated,
        "*.attn.qkv.weight": partial(_xavier, parts=3),
        "*.mlp.*.bias": _normal(1e-6),
        "*.weight": _xavier,
    },
    # facebookresearch/deit@7e160fe, models.py and models_v2.py; the convolution's kernel is torch's own, as in timm
    # 0.3.2. What is called a truncated normal there is cut at 100 deviations.
    "deit": {
        "patch_embed.proj.weight": _torch_default,
        "*": _normal(0.02),
    },
    # facebookresearch/mae@efb2a80, models_mae.py, and for the head main_finetune.py. Positions: `sincos_positions`.
    "mae": {
        "head*": _normal(2e-5),
        "*_token": _normal(0.02),
        "*": _xavier,
    },
    # facebookresearch/SWAG@77b98f5, models/vision_transformer.py, and torch's MultiheadAttention
    "swag": {
        "head*": _zeros,
        "reg_token": _normal(1e-6),
        "*_token": _zeros,
        "attn_pool.latent": _normal(0.02),
        "pos_embed": _normal(0.02),
        "patch_embed.proj.weight": _lecun,
        "*.attn.proj.weight": _torch_default,
        "*.mlp.*.bias": _normal(1e-6),
        "*.weight": _xavier,
    },
}


def initial_weights(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """Fresh float32 weights, drawn as `config.init` says.

    They depend on torch's default generator, and not on the number of threads that draw them.
    """
    parameters, rules = model.state_dict(), INITS[config.init]
    seeds = torch.randint(2**62, (len(parameters),), device="cpu").tolist()
    generators = [Generator().manual_seed(seed) for seed in seeds]
    scales = {f"{name}.gamma": m.init_value for name, m in model.named_modules() if isinstance(m, LayerScale)}

    def draw(name: str, shape: torch.Size, generator: Generator) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.float32, device="cpu")
        if config.init == "mae" and name.endswith("pos_embed"):
            return sincos_positions(config.grid, *shape[1:])
        for pattern, rule in rules.items():
            if fnmatch(name, pattern) and (tensor.ndim > 1 or "bias" in pattern):
                return rule(tensor, generator)
        return tensor.fill_(0.0 if name.endswith("bias") else scales.get(name, 1.0))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        shapes = (tensor.shape for tensor in parameters.values())
        return dict(zip(parameters, pool.map(draw, parameters, shapes, generators), strict=True))


def initial_heads(names: Iterable[str], config: Config) -> nn.ModuleDict:
    """Fresh classifiers by name, drawn from torch's default generator; without classes, modules that do nothing."""
    with torch.device("meta"):
        heads = nn.ModuleDict(
            {
                name: linear(config.num_features, config.num_classes) if config.num_classes else nn.Identity()
                for name in names
            }
        )
    heads.load_state_dict(initial_weights(heads, config), assign=True)
    return heads


def sincos_positions(grid: tuple[int, int], length: int, dim: int) -> Tensor:
    """Fixed positions of sines and cosines: a half of the channels for the column, the other for the row.

    As MAE has them (facebookresearch/mae, util/pos_embed.py; wavelengths as in arXiv:1706.03762, section 3.5), here for
    grids that are no squares too.

    Args:
        grid: patches along height and width.
        length: of the result; what is there beyond the patches lies in front, and is 0.
        dim: channels.

    Returns:
        (1, length, dim) float32

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, and this one is {dim}")
    channel, *lengths = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (dim // 4, *grid))
    frequency = 10000 ** -(channel / (dim // 4))
    row, column = torch.meshgrid(*lengths, indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (column, row)]  # (N, dim / 4)
    patches = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return torch.cat([patches.new_zeros(length - len(patches), dim), patches])[None].float()
