"""A vision transformer with token merging written from the definitions, image by image and token by token.

Slow, and of nothing but the parameters of a model: what `tomevit` computes must come out, at any r, with its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tomevit import VisionTransformer
from tomevit.config import Config


class Token(NamedTuple):
    x: Tensor  # (D,)
    sources: tuple[int, ...]  # numbers of the initial tokens that it is made of
    turn: Tensor | None  # (d, d), the rotation of its position
    weight: Tensor | None = None  # what it counts in attention and pooling, if not as many as its sources


class Seen(NamedTuple):
    """What a matching may look at, of each token."""

    x: list[Tensor]  # (D,), after attention
    key: list[Tensor]  # (d,), averaged over the heads
    importance: list[float]
    depth: float  # blocks before this one, as a share of all
    side: int  # patches along the edge of what a token stands for, where neighbours merged


class Groups(NamedTuple):
    """What a matching makes of the tokens: those of no group are dropped."""

    members: list[list[int]]  # the token that stays first, then those that join it; in order
    similarity: dict[int, Tensor] | None = None  # of each token that joins, where the mean is plain


class Answer(NamedTuple):
    tokens: Tensor  # (N, D), after the final norm
    sizes: list[int]
    sources: list[tuple[int, ...]]
    weights: list[float]
    output: Tensor


def run(model: VisionTransformer, image: Tensor, schedule: Sequence[int | str]) -> Answer:
    """One image (C, H, W) through a model, of which only the parameters are taken.

    Args:
        schedule: of each block 8, "8 pitome", "grid", or "8+3 diffrate" where 8 merge and 3 are dropped.
    """
    weights, config = dict(model.named_parameters()), model.config
    tokens = [
        Token(x, (i,), None if config.rope is None else rotation(i - config.num_prefix, config))
        for i, x in enumerate(_embed(image, weights, config))
    ]
    for depth, entry in enumerate(schedule):
        block = {name.removeprefix(f"blocks.{depth}."): value for name, value in weights.items()}
        side = 2 ** list(schedule[:depth]).count("grid")
        tokens = _block(tokens, entry, block, config, depth / len(schedule), side)
    if config.pool_norm == "before":
        tokens = [token._replace(x=_norm(token.x, weights, "norm", config)) for token in tokens]
    return Answer(
        torch.stack([token.x for token in tokens]),
        [len(token.sources) for token in tokens],
        [token.sources for token in tokens],
        [float(_count(token)) for token in tokens],
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


def _count(token: Token) -> float | Tensor:
    return len(token.sources) if token.weight is None else token.weight


def _block(
    tokens: list[Token], entry: int | str, weights: dict[str, Tensor], config: Config, depth: float, side: int
) -> list[Token]:
    normed = [_norm(token.x, weights, "norm1", config) for token in tokens]
    bias = weights.get("attn.qkv.bias", torch.zeros(1, dtype=torch.float64))
    qkv = [(weights["attn.qkv.weight"] @ x + bias).view(3, config.num_heads, -1) for x in normed]
    q, k, v = ([one[i] for one in qkv] for i in range(3))  # each N times (H, d)
    if config.qk_norm:
        q = [torch.stack([_norm(head, weights, "attn.q_norm", config) for head in one]) for one in q]
        k = [torch.stack([_norm(head, weights, "attn.k_norm", config) for head in one]) for one in k]
    turned = list(zip(q, k, strict=True))
    if config.rope is not None:
        turned = [(a @ token.turn.T, b @ token.turn.T) for token, (a, b) in zip(tokens, turned, strict=True)]
    counts = [_count(token) if config.prop_attn or token.weight is not None else 1 for token in tokens]
    out = []
    for token, (query, _) in zip(tokens, turned, strict=True):
        attended = _attend(query, [key for _, key in turned], v, counts)
        if config.attn_norm:
            attended = _norm(attended, weights, "attn.norm", config)
        x = weights["attn.proj.weight"] @ attended + weights["attn.proj.bias"]
        out.append(token._replace(x=token.x + x * weights.get("ls1.gamma", 1)))
    states = [token.x.detach() for token in out]
    heeded = _importance(turned[0][0], [key for _, key in turned], counts)
    seen = Seen(
        states,
        [one.mean(0).detach() for one in k],
        heeded if config.class_token else [_unlikeness(x, states[config.num_prefix :]) for x in states],
        depth,
        side,
    )
    out = _merge(out, seen, entry, config)
    return [
        token._replace(
            x=token.x
            + _mlp(_norm(token.x, weights, "norm2", config), weights, config, config.mlp) * weights.get("ls2.gamma", 1)
        )
        for token in out
    ]


def _shares(query: Tensor, keys: list[Tensor], counts: Sequence[float | Tensor], head: int) -> Tensor:
    """What each key has of a head's attention: count · exp(q · k / √d), divided by the sum of all."""
    scores = torch.stack([query[head] @ key[head] / math.sqrt(query.shape[1]) for key in keys])
    share = (
        torch.stack([torch.as_tensor(count, dtype=torch.float64) for count in counts]) * (scores - scores.max()).exp()
    )
    return share / share.sum()


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor], counts: Sequence[float | Tensor]) -> Tensor:
    """Each head (H, d) by itself."""
    heads = []
    for head in range(query.shape[0]):
        shares = _shares(query, keys, counts, head)
        heads.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
    return torch.cat(heads)


def _importance(query: Tensor, keys: list[Tensor], counts: Sequence[float | Tensor]) -> list[float]:
    """The mean over the heads of what each token has of one query's attention."""
    heads = [_shares(query, keys, counts, head).detach() for head in range(query.shape[0])]
    return [float(sum(head[i] for head in heads)) / len(heads) for i in range(len(keys))]


def _unlikeness(x: Tensor, patches: list[Tensor]) -> float:
    return 1 - sum(_cosine(x, patch) for patch in patches) / len(patches)


# ------------------------------------------------------------------------------------------------------------- merging


def _merge(tokens: list[Token], seen: Seen, entry: int | str, config: Config) -> list[Token]:
    """The groups that a matching finds: each becomes the mean of its tokens."""
    counts, _, name = str(entry).partition(" ")
    name = "grid" if entry == "grid" else name or str(config.matching)
    merge, _, drop = ("0" if entry == "grid" else counts).partition("+")
    if entry == 0:
        return tokens
    groups = MATCHINGS[name](seen, int(merge), int(drop or 0), config)
    return [_joined([tokens[i] for i in members], members, groups.similarity) for members in groups.members]


def _joined(group: list[Token], members: list[int], similarity: dict[int, Tensor] | None) -> Token:
    """One token of a group: its mean by size, or a plain one where what joins brings only a part of its weight."""
    sources = tuple(source for token in group for source in token.sources)
    if similarity is None:
        shares = [len(token.sources) / len(sources) for token in group]
        weight = None if group[0].weight is None else sum(token.weight for token in group)
    else:
        shares = [1 / len(group)] * len(group)
        weight = torch.as_tensor(_count(group[0]), dtype=torch.float64)
        for i, token in zip(members[1:], group[1:], strict=True):
            weight = weight + _count(token) * similarity[i]
    x, turn = (
        None if values[0] is None else sum(value * share for value, share in zip(values, shares, strict=True))
        for values in ([token.x for token in group], [token.turn for token in group])
    )
    return Token(x, sources, turn, weight)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (float(a.norm()) * float(b.norm()))


def _join_best(best: dict[int, int], joining: list[int], stay: list[int], join_to: list[int]) -> Groups:
    """First those that stay alone, then those that others joined or could have."""
    return Groups([*([i] for i in stay), *([j, *(i for i in joining if best[i] == j)] for j in join_to)])


def bipartite(seen: Seen, r: int, _: int, config: Config, penalty: Callable[[int], float] = lambda i: 0.0) -> Groups:
    """ToMe, section 3: even tokens propose to the most similar odd one, and the r most similar of them join it."""
    even, odd = (range(config.num_prefix + (config.num_prefix + odd) % 2, len(seen.key), 2) for odd in (0, 1))
    best = {i: max(odd, key=lambda j, i=i: _cosine(seen.key[i], seen.key[j])) for i in even}
    joining = sorted(even, key=lambda i: penalty(i) - _cosine(seen.key[i], seen.key[best[i]]))[:r]
    return _join_best(best, joining, [*range(config.num_prefix), *(i for i in even if i not in joining)], odd)


def importance(seen: Seen, r: int, _: int, config: Config) -> Groups:
    """As bipartite, less the token's importance as a share of the most that a patch has."""
    most = max(seen.importance[config.num_prefix :])
    return bipartite(seen, r, 0, config, lambda i: seen.importance[i] / most)


def diffrate(seen: Seen, r: int, drop: int, config: Config) -> Groups:
    """The least important are dropped, the next r join the most similar patch that stays, with a part of their weight.

    The similarity is that of the tokens themselves, and a negative one counts as none.
    """
    ranked = sorted(range(config.num_prefix, len(seen.x)), key=lambda i: seen.importance[i])[drop:]
    joining, staying = ranked[:r], sorted(ranked[r:])
    best = {i: max(staying, key=lambda j, i=i: _cosine(seen.x[i], seen.x[j])) for i in joining}
    similarity = {
        i: torch.tensor(max(_cosine(seen.x[i], seen.x[j]), 0.0), dtype=torch.float64) for i, j in best.items()
    }
    return Groups(_join_best(best, joining, list(range(config.num_prefix)), staying).members, similarity)


def redundant(seen: Seen, r: int, _: int, config: Config) -> Groups:
    """The r patches that are most like all others join the most similar one that stays."""
    patches = seen.x[config.num_prefix :]
    ranked = sorted(range(config.num_prefix, len(seen.x)), key=lambda i: _unlikeness(seen.x[i], patches))
    joining, staying = ranked[:r], sorted(ranked[r:])
    best = {i: max(staying, key=lambda j, i=i: _cosine(seen.x[i], seen.x[j])) for i in joining}
    return _join_best(best, joining, list(range(config.num_prefix)), staying)


def pitome(seen: Seen, r: int, _: int, config: Config) -> Groups:
    """The 2r of the highest energy merge: the first of them joins the most similar of the second, the fourth, …

    The energy of a patch is the mean over all patches of ELU(cosine - margin), the margin 0.75 (1 - depth).
    """
    patches = range(config.num_prefix, len(seen.key))
    energy = {}
    for i in patches:
        beyond = [_cosine(seen.key[i], seen.key[j]) - 0.75 * (1 - seen.depth) for j in patches]
        energy[i] = sum(each if each > 0 else math.exp(each) - 1 for each in beyond) / len(beyond)
    ranked = sorted(patches, key=lambda i: -energy[i])
    joining, join_to = ranked[: 2 * r : 2], sorted(ranked[1 : 2 * r : 2])
    best = {i: max(join_to, key=lambda j, i=i: _cosine(seen.key[i], seen.key[j])) for i in joining}
    return _join_best(best, joining, [*range(config.num_prefix), *sorted(ranked[2 * r :])], join_to)


def grid(seen: Seen, _: int, __: int, config: Config) -> Groups:
    """What lies in the same square of twice the edge becomes one."""
    columns = math.ceil(config.grid[1] / seen.side)
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(config.num_prefix, len(seen.x)):
        row, column = divmod(i - config.num_prefix, columns)
        cells.setdefault((row // 2, column // 2), []).append(i)
    return Groups([*([i] for i in range(config.num_prefix)), *cells.values()])


MATCHINGS = {
    "bipartite": bipartite,
    "importance": importance,
    "diffrate": diffrate,
    "redundant": redundant,
    "pitome": pitome,
    "grid": grid,
}


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
    total = sum(_count(token) for token in patches)
    mean = sum(token.x * (_count(token) / total) for token in patches)
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
    attended = _attend(query, keys, values, [_count(token) for token in tokens])
    x = weights["attn_pool.proj.weight"] @ attended + weights["attn_pool.proj.bias"]
    normed = _norm(x, weights, "attn_pool.norm", config)
    return x + _mlp(normed, weights, config, "mlp", "attn_pool.mlp")
