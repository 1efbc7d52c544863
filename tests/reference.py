"""A vision transformer with token merging written from the definitions, image by image and token by token.

Slow, and of nothing but the parameters of a model: what `tomevit` computes must come out, at any r, with its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tomevit import VisionTransformer
from tomevit.config import Config


class Token(NamedTuple):
    x: Tensor  # (D,)
    sources: tuple[int, ...]  # numbers of the initial tokens that it is made of


class Answer(NamedTuple):
    tokens: Tensor  # (N, D), behind the final norm
    sizes: list[int]
    sources: list[tuple[int, ...]]
    output: Tensor


def run(model: VisionTransformer, image: Tensor, schedule: Sequence[int]) -> Answer:
    """One image (C, H, W) through a model, of which only the parameters are taken."""
    weights, config = dict(model.named_parameters()), model.config
    tokens = [Token(x, (i,)) for i, x in enumerate(_embed(image, weights, config))]
    for depth, r in enumerate(schedule):
        block = {name.removeprefix(f"blocks.{depth}."): value for name, value in weights.items()}
        tokens = _block(tokens, r, block, config)
    if config.pool_norm == "before":
        tokens = [token._replace(x=_norm(token.x, weights, "norm", config)) for token in tokens]
    return Answer(
        torch.stack([token.x for token in tokens]),
        [len(token.sources) for token in tokens],
        [token.sources for token in tokens],
        _head(tokens, weights, config),
    )


def _embed(image: Tensor, weights: dict[str, Tensor], config: Config) -> list[Tensor]:
    size = config.patch_size
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    patches = []
    for row in range(config.grid[0]):
        for column in range(config.grid[1]):
            pixels = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            patches.append(kernel @ pixels.flatten() + weights.get("patch_embed.proj.bias", 0))
    cls = [weights["cls_token"][0, 0]] if config.class_token else []
    cls += [weights["dist_token"][0, 0]] if config.dist_token else []
    registers = list(weights["reg_token"][0]) if config.reg_tokens else []
    if config.pos_embed == "none":
        tokens = [*cls, *registers, *patches]
    elif config.pos_embed_prefix == "class":
        placed = [x + position for x, position in zip([*cls, *patches], weights["pos_embed"][0], strict=True)]
        tokens = [*placed[:1], *registers, *placed[1:]]
    elif config.pos_embed_prefix:
        everything = [*cls, *registers, *patches]
        tokens = [x + position for x, position in zip(everything, weights["pos_embed"][0], strict=True)]
    else:
        tokens = [*cls, *registers, *(x + y for x, y in zip(patches, weights["pos_embed"][0], strict=True))]
    return [_norm(x, weights, "norm_pre", config) for x in tokens] if config.pre_norm else tokens


def _block(tokens: list[Token], r: int, weights: dict[str, Tensor], config: Config) -> list[Token]:
    normed = [_norm(token.x, weights, "norm1", config) for token in tokens]
    bias = weights.get("attn.qkv.bias", torch.zeros(1, dtype=torch.float64))
    qkv = [(weights["attn.qkv.weight"] @ x + bias).view(3, config.num_heads, -1) for x in normed]
    q, k, v = ([one[i] for one in qkv] for i in range(3))  # each N times (H, d)
    if config.qk_norm:
        q = [torch.stack([_norm(head, weights, "attn.q_norm", config) for head in one]) for one in q]
        k = [torch.stack([_norm(head, weights, "attn.k_norm", config) for head in one]) for one in k]
    if config.rope is not None:
        rotations = [_mean_rotation(token.sources, config) for token in tokens]
        turned = [(a @ turn.T, b @ turn.T) for a, b, turn in zip(q, k, rotations, strict=True)]
    else:
        turned = list(zip(q, k, strict=True))
    sizes = [len(token.sources) if config.prop_attn else 1 for token in tokens]
    out = []
    for token, (query, _) in zip(tokens, turned, strict=True):
        attended = _attend(query, [key for _, key in turned], v, sizes)
        if config.attn_norm:
            attended = _norm(attended, weights, "attn.norm", config)
        x = weights["attn.proj.weight"] @ attended + weights["attn.proj.bias"]
        out.append(token._replace(x=token.x + x * weights.get("ls1.gamma", 1)))
    out = _merge(out, [one.mean(0) for one in k], r, config.num_prefix)
    return [
        token._replace(
            x=token.x
            + _mlp(_norm(token.x, weights, "norm2", config), weights, config, config.mlp) * weights.get("ls2.gamma", 1)
        )
        for token in out
    ]


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor], sizes: list[int]) -> Tensor:
    """Each head (H, d) by itself: the weights of the keys are size · exp(q · k / √d), divided by their sum."""
    heads = []
    for head in range(query.shape[0]):
        scores = torch.stack([query[head] @ key[head] / math.sqrt(query.shape[1]) for key in keys])
        share = torch.tensor(sizes, dtype=torch.float64) * (scores - scores.max()).exp()
        heads.append(sum(weight * value[head] for weight, value in zip(share / share.sum(), values, strict=True)))
    return torch.cat(heads)


def _merge(tokens: list[Token], keys: list[Tensor], r: int, num_prefix: int) -> list[Token]:
    """ToMe, section 3: even tokens propose to the most similar odd one, and the r most similar of them join it."""
    if r == 0:
        return tokens
    even = [i for i in range(0, len(tokens), 2) if i >= num_prefix]
    odd = [i for i in range(1, len(tokens), 2) if i >= num_prefix]
    unit = [(key / key.norm()).detach() for key in keys]
    best = {i: max(odd, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in even}
    joining = sorted(even, key=lambda i: -float(unit[i] @ unit[best[i]]))[:r]
    groups = {j: [j, *(i for i in joining if best[i] == j)] for j in odd}
    staying = [*range(num_prefix), *(i for i in even if i not in joining)]
    out = [tokens[i] for i in staying]
    for j in odd:
        group = [tokens[i] for i in groups[j]]
        count = sum(len(token.sources) for token in group)
        x = sum(token.x * (len(token.sources) / count) for token in group)
        out.append(Token(x, tuple(source for token in group for source in token.sources)))
    return out


def _mean_rotation(sources: tuple[int, ...], config: Config) -> Tensor:
    return torch.stack([rotation(source - config.num_prefix, config) for source in sources]).mean(0)


def rotation(patch: int, config: Config) -> Tensor:
    """The matrix that turns the channels of a head for a patch; a prefix token, of a number below 0, is not turned."""
    d, (height, width) = config.embed_dim // config.num_heads, config.grid
    matrix = torch.eye(d, dtype=torch.float64)
    if patch < 0:
        return matrix
    row, column = divmod(patch, width)
    for f in range(d // 4):
        if config.rope == "dinov3":
            period = 100 ** (f / (d / 4)) / (2 * math.pi)
            turns = {
                (f, f + d // 2): (2 * (row + 0.5) / height - 1) / period,
                (f + d // 4, f + d // 4 + d // 2): (2 * (column + 0.5) / width - 1) / period,
            }
        else:
            speed = 10000 ** (-4 * f / d)
            first, second = (2 * f, 2 * f + 1), (2 * f + d // 2, 2 * f + 1 + d // 2)
            if config.rope == "eva":
                turns = {first: row / height * 16 * speed, second: column / width * 16 * speed}
            else:
                start = 1 if config.class_token else 0
                turns = {first: (column + start) * speed, second: (row + start) * speed}
        for (a, b), angle in turns.items():
            matrix[a, a] = matrix[b, b] = math.cos(angle)
            matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def _mlp(x: Tensor, weights: dict[str, Tensor], config: Config, kind: str, name: str = "mlp") -> Tensor:
    hidden = weights[f"{name}.fc1.weight"] @ x + weights[f"{name}.fc1.bias"]
    if kind == "swiglu":
        gate, value = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        hidden = gate / (1 + (-gate).exp()) * value
        if config.mlp_norm:
            hidden = _norm(hidden, weights, f"{name}.norm", config)
    elif config.act == "quick_gelu":
        hidden = hidden / (1 + (-1.702 * hidden).exp())
    elif config.act == "gelu_tanh":
        hidden = hidden * (1 + (math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)).tanh()) / 2
    else:
        hidden = hidden * (1 + (hidden / math.sqrt(2)).erf()) / 2
    return weights[f"{name}.fc2.weight"] @ hidden + weights[f"{name}.fc2.bias"]


def _norm(x: Tensor, weights: dict[str, Tensor], name: str, config: Config) -> Tensor:
    centred = x - x.mean()
    return (
        centred / (centred.square().mean() + config.norm_eps).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def _head(tokens: list[Token], weights: dict[str, Tensor], config: Config) -> Tensor:
    patches = tokens[config.num_prefix :]
    total = sum(len(token.sources) for token in patches)
    mean = sum(token.x * (len(token.sources) / total) for token in patches)
    if config.pool == "token":
        x = tokens[0].x
    elif config.pool == "avg":
        x = mean
    elif config.pool == "token_avg":
        x = torch.cat([tokens[0].x, mean])
    else:
        x = _attention_pool(tokens, weights, config)
    if config.pool_norm == "after":
        x = _norm(x, weights, "fc_norm", config)
    if config.proj_dim:
        x = weights["proj.weight"] @ x + weights.get("proj.bias", 0)
    return weights["head.weight"] @ x + weights["head.bias"] if config.num_classes else x


def _attention_pool(tokens: list[Token], weights: dict[str, Tensor], config: Config) -> Tensor:
    weight, bias = (weights[f"attn_pool.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
    heads = config.pool_heads or config.num_heads
    query = (weight[0] @ weights["attn_pool.latent"][0, 0] + bias[0]).view(heads, -1)
    keys, values = ([(weight[i] @ token.x + bias[i]).view(heads, -1) for token in tokens] for i in (1, 2))
    attended = _attend(query, keys, values, [len(token.sources) for token in tokens])
    x = weights["attn_pool.proj.weight"] @ attended + weights["attn_pool.proj.bias"]
    normed = _norm(x, weights, "attn_pool.norm", config)
    return x + _mlp(normed, weights, config, "mlp", "attn_pool.mlp")
