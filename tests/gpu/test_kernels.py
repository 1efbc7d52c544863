"""The two Triton kernels on a device, against their definition in float64.

Where two similarities differ by no more than rounding either may win: what is chosen must be within rounding of the
best, and what is merged must be the mean of what was chosen. Where all is exact, ties included, all must be equal.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from tomevit.layers import Tokens, bipartite_soft_matching, merge_tokens

if find_spec("triton") is not None:
    from tomevit.layers.triton_merge import match_and_merge_fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
#: Around every block of the kernels, and every number of tokens of the zoo's models.
COUNTS = [2, 3, 7, 16, 31, 32, 33, 64, 65, 127, 128, 129, 196, 197, 198, 257, 577, 1025, 1370, 2049, 4097, 8193]


@pytest.fixture(autouse=True)
def _kernels_run(device: torch.device) -> None:
    """On a GPU, or in Triton's interpreter, which multiplies bfloat16 wrongly: to try these tests, not the kernels."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("of CUDA alone")


def random_key(batch: int, heads: int, n: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Strided as in a block: a view of q, k and v in one."""
    return torch.randn(batch, n, 3, heads, dim, device=device).to(dtype)[:, :, 1].transpose(1, 2)


def random_tokens(batch: int, n: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tokens:
    size = torch.randint(1, 300, (batch, n, 1), device=device).float()
    slots = torch.arange(n, device=device).expand(batch, -1)
    return Tokens(torch.randn(batch, n, dim, device=device).to(dtype), size, slots, torch.rand(batch, n, 8).to(device))


def tied_key(batch: int, heads: int, n: int, kinds: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Means of 16 times ±1, some of them zeros: each length and product is exact in any order, and many are equal."""
    kind = torch.randint(0, 2, (kinds, 16), device=device) * 2 - 1
    kind[0] = 0
    off = torch.randint(-9, 10, (batch, heads, n, 16), device=device)
    mean = kind[torch.randint(kinds, (batch, 1, n), device=device)]
    return (mean + off - off.flip(1)).to(dtype)  # heads differ, and cancel in pairs


def plain(tokens: Tokens, key: Tensor, r: int, num_prefix: int) -> Tokens:
    return merge_tokens(tokens, bipartite_soft_matching(key.mean(1), r, num_prefix))


def sets(n: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Positions of the sources, which are even, and of the targets."""
    return torch.arange(num_prefix + num_prefix % 2, n, 2), torch.arange(num_prefix + 1 - num_prefix % 2, n, 2)


def assert_defined(tokens: Tokens, key: Tensor, r: int, num_prefix: int) -> None:
    """What the kernels make is a bipartite merge of the most similar tokens, up to rounding of the similarities."""
    out = match_and_merge_fused(tokens, key, r, num_prefix)
    slots, size, x = out.slots.cpu(), tokens.size.cpu().double(), tokens.x.cpu().double()
    batch, n = slots.shape
    sources, targets = sets(n, num_prefix)
    # Tokens that stay: the prefix and sources by position, then every target.
    place = n - r - len(targets) + torch.arange(len(targets))
    assert torch.equal(slots[:, targets], place.expand(batch, -1))
    assert torch.equal(slots[:, :num_prefix], torch.arange(num_prefix).expand(batch, -1))
    merged = slots[:, sources] >= n - r - len(targets)
    assert (merged.sum(1) == r).all()
    for b in range(batch):
        staying = slots[b, sources[~merged[b]]]
        assert torch.equal(staying, num_prefix + torch.arange(len(staying)))
    if r:
        assert_most_similar(key, slots, merged, r, num_prefix)
    # Sizes are exact, and means weighted by them.
    total = torch.zeros(batch, n - r, 1, dtype=torch.float64).scatter_add_(1, slots[..., None], size)
    assert torch.equal(out.size.cpu().double(), total)
    share = x * (size / total.gather(1, slots[..., None]))
    expected = torch.zeros(batch, n - r, x.shape[2], dtype=torch.float64)
    expected.scatter_add_(1, slots[..., None].expand_as(x), share)
    eps = torch.finfo(tokens.x.dtype).eps
    torch.testing.assert_close(out.x.cpu().double(), expected, rtol=2 * eps, atol=2 * eps)


def assert_most_similar(key: Tensor, slots: Tensor, merged: Tensor, r: int, num_prefix: int) -> None:
    """Up to rounding of the similarities, each source that merges joins its best target, and the best sources merge.

    Args:
        key: (B, H, N, d).
        slots: (B, N), on the CPU.
        merged: (B, S), which sources merge.
        r, num_prefix: as in the call.
    """
    sources, targets = sets(key.shape[2], num_prefix)
    # The similarities, of keys that are rounded to their dtype once, as the kernels round them.
    mean = key.mean(1).cpu().double()
    unit = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    scores = unit[:, sources] @ unit[:, targets].mT
    rounding = (16 if key.dtype == torch.float32 else 4) * torch.finfo(key.dtype).eps
    chosen = (slots[:, sources] - slots[:, targets[:1]]).clamp(min=0)
    similarity, best = scores.gather(2, chosen[..., None])[..., 0], scores.amax(2)
    assert (similarity[merged] >= best[merged] - rounding).all()
    if r < len(sources):
        least, most = best.masked_fill(~merged, 9).amin(1), best.masked_fill(merged, -9).amax(1)
        assert (least >= most - rounding).all()


def assert_equal(ours: Tokens, theirs: Tokens) -> None:
    assert torch.equal(ours.slots, theirs.slots)
    assert torch.equal(ours.size, theirs.size)
    eps = torch.finfo(ours.x.dtype).eps
    torch.testing.assert_close(ours.x, theirs.x, rtol=2 * eps, atol=1e-6 if ours.x.dtype == torch.float32 else 0)
    torch.testing.assert_close(ours.rope, theirs.rope, rtol=0, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("n", COUNTS)
def test_any_number_of_tokens(device: torch.device, n: int, dtype: torch.dtype) -> None:
    for num_prefix in sorted({0, 1, min(5, n - 1)}):
        for r in sorted({0, (n - num_prefix) // 4, (n - num_prefix) // 2}):
            tokens = random_tokens(2 if n < 1000 else 1, n, 24, dtype, device)
            assert_defined(tokens, random_key(len(tokens.x), 3, n, 64, dtype, device), r, num_prefix)


@each_dtype
@pytest.mark.parametrize("num_prefix", range(7))
@pytest.mark.parametrize("half", [False, True], ids=["r=0", "half"])
def test_any_prefix(device: torch.device, num_prefix: int, half: bool, dtype: torch.dtype) -> None:
    for patches in (2, 3, 49, 64, 196):
        n, r = num_prefix + patches, patches // 2 if half else 0
        assert_defined(random_tokens(3, n, 48, dtype, device), random_key(3, 2, n, 32, dtype, device), r, num_prefix)


@each_dtype
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("kinds", [1, 3, 20])
def test_ties_go_to_the_same_token(device: torch.device, num_prefix: int, kinds: int, dtype: torch.dtype) -> None:
    for patches in (2, 15, 64, 133, 576):
        n = num_prefix + patches
        for r in (1, patches // 2):
            tokens, key = random_tokens(2, n, 5, dtype, device), tied_key(2, 4, n, kinds, dtype, device)
            assert_equal(match_and_merge_fused(tokens, key, r, num_prefix), plain(tokens, key, r, num_prefix))


@each_dtype
@pytest.mark.parametrize(("dim", "head_dim"), [(1, 1), (5, 3), (33, 20), (192, 24), (768, 64), (1280, 80), (1664, 104)])
def test_channels_that_are_no_power_of_two(device: torch.device, dim: int, head_dim: int, dtype: torch.dtype) -> None:
    assert_defined(random_tokens(2, 50, dim, dtype, device), random_key(2, 3, 50, head_dim, dtype, device), 16, 1)


@each_dtype
def test_inputs_that_are_not_contiguous(device: torch.device, dtype: torch.dtype) -> None:
    tokens = random_tokens(4, 101, 96, dtype, device)
    key = random_key(4, 6, 101, 64, dtype, device)
    assert_defined(tokens._replace(x=tokens.x[..., ::2], size=tokens.size.flip(1)), key[..., ::2], 30, 1)
    every_second = Tokens(*(each[::2] for each in tokens[:4]))
    assert_defined(every_second, key[::2], 30, 1)
    turned = torch.randn(4, 96, 101, device=device).to(dtype).transpose(1, 2)
    assert_defined(tokens._replace(x=turned), key.transpose(2, 3).contiguous().transpose(2, 3), 30, 1)


@each_dtype
def test_the_last_device(device: torch.device, dtype: torch.dtype) -> None:
    """Kernels run where the tensors are, whichever device is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    assert_defined(random_tokens(2, 65, 32, dtype, last), random_key(2, 2, 65, 32, dtype, last), 20, 1)


@each_dtype
def test_deterministic_mode_and_repetition(device: torch.device, dtype: torch.dtype) -> None:
    tokens, key = random_tokens(8, 197, 768, dtype, device), random_key(8, 12, 197, 64, dtype, device)
    first = match_and_merge_fused(tokens, key, 98, 1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # uninitialised memory is filled then, too
    try:
        for _ in range(5):
            again = match_and_merge_fused(tokens, key, 98, 1)
            assert all(torch.equal(a, b) for a, b in zip(again[:3], first[:3], strict=True))
    finally:
        torch.use_deterministic_algorithms(before)


@each_dtype
def test_an_image_does_not_feel_the_others(device: torch.device, dtype: torch.dtype) -> None:
    tokens, key = random_tokens(3, 197, 64, dtype, device), random_key(3, 4, 197, 64, dtype, device)
    alone = match_and_merge_fused(Tokens(*(each[1:2] for each in tokens[:4])), key[1:2], 60, 1)
    key[0] = float("nan")
    tokens.x[2] = float("inf")
    together = match_and_merge_fused(tokens, key, 60, 1)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together[:4], alone[:4], strict=True))
    assert (together.slots < 137).all()


@each_dtype
def test_gradients(device: torch.device, dtype: torch.dtype) -> None:
    tokens, key = random_tokens(2, 65, 32, dtype, device), tied_key(2, 4, 65, 20, dtype, device)
    ahead = torch.randn(2, 45, 32, device=device).to(dtype)
    gradients = []
    for merge in (match_and_merge_fused, plain):
        x = tokens.x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(merge(tokens._replace(x=x), key, 20, 1).x, x, ahead)[0])
    torch.testing.assert_close(*gradients, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_ends_of_float16(device: torch.device) -> None:
    tokens = random_tokens(1, 64, 32, torch.float16, device)
    tokens = tokens._replace(x=torch.full_like(tokens.x, 65504.0))
    key = random_key(1, 2, 64, 32, torch.float16, device).sign() * 6e4
    assert match_and_merge_fused(tokens, key, 32, 0).x.isfinite().all()
