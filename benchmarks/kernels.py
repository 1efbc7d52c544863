"""Ways to do each step of a block in which tokens merge, at a ViT's shapes, all ways of a step taking turns.

    python -m benchmarks.kernels --tokens 197 --r 16 --store

The first way of each step is the library's; the others are checked against it before they are timed. Of attention, the
error against float64 stands beside: whether sums are rounded to half precision on the way is no matter of taste. What
came of it is in NOTES.md. "match and merge" starts from the keys of all heads; the fused kernels run on CUDA only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from tomevit.layers import Tokens, attend, bipartite_soft_matching, merge_tokens, slot_map
from tomevit.layers.merge import mean_by_index, mean_by_product
from tomevit.layers.packed import can_pack
from tomevit.measure.timing import environment, interleave

RESULTS = Path(__file__).parent / "results"
WITHOUT = "all sizes 1"
ATTENTION = "attention"
PRODUCT = "first MLP layer"
Calls = dict[str, Callable[[], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description="ways to do each step of a merging block, interleaved, medians")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=197, help="of which the first is the class token")
    parser.add_argument("--heads", type=int, default=12, help="of 64 channels each")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()

    torch.manual_seed(0)
    dtype, dim = getattr(torch, args.dtype), 64 * args.heads
    qkv = torch.randn(args.batch, args.tokens, 3, args.heads, 64, device=args.device).to(dtype)
    query, key, value = (qkv[:, :, i].transpose(1, 2) for i in range(3))  # strided as in a block
    x = torch.randn(args.batch, args.tokens, dim, device=args.device).to(dtype)
    size = torch.randint(1, 9, (args.batch, args.tokens, 1), device=args.device).float()
    similarity = torch.rand(args.batch, (args.tokens - 1) // 2, device=args.device)

    groups = {
        ATTENTION: attentions(query, key, value, size),
        "metric": metrics(key),
        "select": selections(similarity, args.r),
        "merge": merges(x, size, key, args.r),
        "match and merge": matches(x, size, key, args.r),
        PRODUCT: products(x),
    }
    rows = []
    with torch.inference_mode():
        exact = attend(query.double(), key.double(), value.double(), size)
        for what, calls in groups.items():
            expected = next(iter(calls.values()))().float()
            errors = {way: relative_error(call(), exact) for way, call in calls.items() if what == ATTENTION}
            # Sums in another order, rounded to dtype once: their error grows with the root of how many are added.
            added = {ATTENTION: args.tokens, PRODUCT: dim}.get(what, 16)
            tolerance = 2 * added**0.5 * torch.finfo(dtype).eps
            for way, call in calls.items():
                if way == WITHOUT:
                    continue
                torch.testing.assert_close(call().float(), expected, rtol=tolerance, atol=tolerance)
            seconds = interleave(calls, rounds=args.rounds, device=args.device)
            first = seconds[next(iter(calls))]
            rows += [
                {"what": what, "way": way, "microseconds": round(1e6 * time, 1), "over_ours": round(time / first, 3)}
                | ({"error": errors[way]} if way in errors and way != WITHOUT else {})
                for way, time in seconds.items()
            ]

    shape = {"batch": args.batch, "tokens": args.tokens, "channels": dim, "r": args.r}
    setting = shape | {"dtype": args.dtype, "rounds": args.rounds} | environment(args.device)
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    print(f"{'':54}{'µs':>10}{'over ours':>11}{'error':>11}")
    for row in rows:
        error = f"{row['error']:11.1e}" if "error" in row else ""
        print(f"{row['what']:18}{row['way']:36}{row['microseconds']:10.1f}{row['over_ours']:11.3f}{error}")
    if args.store:
        name = f"kernels_n{args.tokens}_d{dim}_r{args.r}_{args.dtype}_b{args.batch}_{args.device}.json"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / name).write_text(json.dumps(setting | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
        print(f"written to {RESULTS / name}")


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def attentions(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Calls:
    """Proportional attention, and for the price of it the plain one."""
    log_size = size.log()  # (B, N, 1)
    head_dim = q.shape[-1]

    def written_out() -> Tensor:
        scores = q @ k.mT * head_dim**-0.5 + log_size.mT[:, None].to(q.dtype)
        return scores.softmax(-1) @ v

    def channel() -> Tensor:
        """The log size as one more channel of the keys, which meets a √d in the queries; padded to a multiple of 8."""
        more = q.new_zeros(*q.shape[:3], 8)
        more[..., 0] = head_dim**0.5
        extra = torch.zeros_like(more)
        extra[..., 0] = log_size.mT.to(q.dtype)
        wide = F.pad(v, (0, 8))
        wide_q, wide_k = torch.cat([q, more], -1), torch.cat([k, extra], -1)
        return F.scaled_dot_product_attention(wide_q, wide_k, wide, scale=head_dim**-0.5)[..., :head_dim]

    def in_float32() -> Tensor:
        wide_bias = log_size.mT[:, None]
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), wide_bias).to(q.dtype)

    def written_out_in_float32() -> Tensor:
        scores = (q.float() * head_dim**-0.5) @ k.float().mT
        scores += log_size.mT[:, None]
        return (torch.softmax(scores, -1, out=scores) @ v.float()).to(q.dtype)

    bias = log_size[..., 0].to(q.dtype)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex() -> Tensor:
        return compiled(q, k, v, score_mod=lambda score, b, _head, _query, j: score + bias[b, j])

    return {
        "log size as a bias": lambda: attend(q, k, v, size),
        "log size as a channel of the keys": channel,
        "FlexAttention": flex,
        "written out": written_out,
        "fused, in float32": in_float32,
        "written out, in float32": written_out_in_float32,
        WITHOUT: lambda: attend(q, k, v),
    }


def metrics(key: Tensor) -> Calls:
    """The keys averaged over the heads."""
    batch, heads, n, dim = key.shape
    average = (torch.eye(dim, device=key.device) / heads).repeat(heads, 1).to(key.dtype)
    return {
        "mean": lambda: key.mean(1),
        "one product": lambda: key.transpose(1, 2).reshape(batch, n, heads * dim) @ average,
    }


def selections(similarity: Tensor, r: int) -> Calls:
    """Which r are the largest: as a mask, which is the same whatever the order."""

    def mask(chosen: Tensor) -> Tensor:
        return torch.zeros_like(similarity).scatter_(1, chosen, 1)

    def rank() -> Tensor:
        position = torch.arange(similarity.shape[1], device=similarity.device)
        mine, other = similarity[:, :, None], similarity[:, None]
        larger = (other > mine) | ((other == mine) & (position < position[:, None]))
        return (larger.sum(2) < r).float()

    return {
        "argsort, stable": lambda: mask(similarity.argsort(dim=1, descending=True, stable=True)[:, :r]),
        "sort": lambda: mask(similarity.sort(dim=1, descending=True).indices[:, :r]),
        "topk": lambda: mask(similarity.topk(r, 1).indices),
        "topk, not sorted": lambda: mask(similarity.topk(r, 1, sorted=False).indices),
        "counting ranks": rank,
    }


def merges(x: Tensor, size: Tensor, key: Tensor, r: int) -> Calls:
    """The means, from a merge that is known."""
    merge = bipartite_soft_matching(key.mean(1), r, 1)
    batch, n, dim = x.shape
    left = n - r

    def weighted() -> tuple[Tensor, Tensor]:
        """Every token times its share in its group, and the row that it goes to."""
        slots = slot_map(merge)
        total = size.new_zeros(batch, left, 1).scatter_add_(1, slots[..., None], size)
        share = size / total.gather(1, slots[..., None])
        return x * share, slots + left * torch.arange(batch, device=x.device)[:, None]

    def scatter_reduce() -> Tensor:
        parts, rows = weighted()
        index = rows.flatten()[:, None].expand(-1, dim)
        out = parts.new_zeros(batch * left, dim).scatter_reduce_(0, index, parts.flatten(0, 1), "sum")
        return out.view(batch, left, dim).to(x.dtype)

    def index_add() -> Tensor:
        parts, rows = weighted()
        out = parts.new_zeros(batch * left, dim).index_add_(0, rows.flatten(), parts.flatten(0, 1))
        return out.view(batch, left, dim).to(x.dtype)

    def segment_sum() -> Tensor:
        parts, rows = weighted()
        sorted_rows, order = rows.flatten().sort(stable=True)
        lengths = torch.bincount(sorted_rows, minlength=batch * left)
        out = torch.segment_reduce(parts.flatten(0, 1)[order], "sum", lengths=lengths, axis=0)
        return out.view(batch, left, dim).to(x.dtype)

    return {
        "by index": lambda: mean_by_index(x, size, merge)[0],
        "gather and one-hot product": lambda: mean_by_product(x, size, merge)[0],
        "scatter_reduce": scatter_reduce,
        "index_add": index_add,
        "sorted segment sum": segment_sum,
    }


def matches(x: Tensor, size: Tensor, key: Tensor, r: int) -> Calls:
    def plain() -> Tensor:
        return merge_tokens(Tokens(x, size), bipartite_soft_matching(key.mean(1), r, 1)).x

    calls: Calls = {"plain": plain}
    if x.is_cuda:
        from tomevit.layers.triton_merge import match_and_merge_fused

        fused = partial(match_and_merge_fused, Tokens(x, size), key, r, 1)
        calls["two Triton kernels"] = lambda: fused().x
    return calls


def products(x: Tensor) -> Calls:
    """A linear layer, D to 4 D."""
    layer = nn.Linear(x.shape[2], 4 * x.shape[2]).to(x)
    calls: Calls = {"torch's": lambda: layer(x)}
    if can_pack(layer.weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        calls["weight packed for oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(
            x, packed, layer.bias, "none", [], ""
        )
    return calls


if __name__ == "__main__":
    main()
