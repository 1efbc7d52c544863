"""The fused merge against the plain one: on a GPU where there is one, else in Triton's interpreter.

Triton decides when it is first imported whether it interprets. Without a GPU, most of this file therefore runs in a
process of its own, which one test here starts.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tomevit.layers import Tokens, bipartite_soft_matching, merge_tokens

INSTALLED = find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs Triton")
compiled_only = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs Triton, not interpreting")
kernels_run = pytest.mark.skipif(not INTERPRETED and not (INSTALLED and DEVICE == "cuda"), reason="needs Triton to run")

if INSTALLED and (INTERPRETED or DEVICE == "cuda"):
    from tomevit.layers.triton_merge import MAX_SOURCES, match_and_merge_fused


@pytest.fixture(autouse=True, scope="module")
def _true_bfloat16() -> None:
    """The interpreter of Triton 3.9 truncates to bfloat16, where a GPU rounds, and multiplies its bit patterns."""
    if not INTERPRETED:
        return
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (float32, bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy(), bfloat16)

    def widening_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == bfloat16:
            wide = ((each.data.astype(np.uint32) << 16).view(np.float32) for each in (a, b))
            a, b = (TensorHandle(data, float32) for data in wide)
        return dot(self, a, b, *others)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, widening_dot


def plain(tokens: Tokens, key: Tensor, r: int, num_prefix: int) -> Tokens:
    return merge_tokens(tokens, bipartite_soft_matching(key.mean(1), r, num_prefix))


def random_tokens(batch: int, n: int, dim: int = 5, dtype: torch.dtype = torch.float32, sized: bool = True) -> Tokens:
    size = torch.randint(1, 300, (batch, n, 1), device=DEVICE).float() if sized else None
    slots = torch.arange(n, device=DEVICE).expand(batch, -1)
    rope = torch.rand(batch, n, 8, device=DEVICE)
    return Tokens(torch.randn(batch, n, dim, device=DEVICE).to(dtype), size, slots, rope)


def random_key(batch: int, heads: int, n: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """Strided as in a block: a view of q, k and v in one."""
    return torch.randn(batch, n, 3, heads, dim, device=DEVICE).to(dtype)[:, :, 1].transpose(1, 2)


def tied_key(batch: int, heads: int, n: int, kinds: int, dtype: torch.dtype) -> Tensor:
    """Means of 16 times ±1, some of them zeros: each length and product is exact in any order, and many are equal."""
    kind = torch.randint(0, 2, (kinds, 16), device=DEVICE) * 2 - 1
    kind[0] = 0
    off = torch.randint(-9, 10, (batch, heads, n, 16), device=DEVICE)
    mean = kind[torch.randint(kinds, (batch, 1, n), device=DEVICE)]
    return (mean + off - off.flip(1)).to(dtype)  # heads differ, and cancel in pairs


def assert_same(ours: Tokens, theirs: Tokens) -> None:
    assert ours.slots is not None
    assert theirs.slots is not None
    assert ours.size is not None
    assert theirs.size is not None
    assert torch.equal(ours.slots, theirs.slots)
    assert torch.equal(ours.size, theirs.size)
    assert ours.rope is not None
    assert theirs.rope is not None
    torch.testing.assert_close(ours.rope, theirs.rope, rtol=0, atol=1e-5)
    eps = torch.finfo(ours.x.dtype).eps  # both means are rounded once to it
    atol = 1e-6 if ours.x.dtype == torch.float32 else 0
    torch.testing.assert_close(ours.x, theirs.x, rtol=2 * eps, atol=atol)


# ------------------------------------------------------------------------------------------------ wherever it is tested


def test_the_import_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "tomevit.layers.triton_merge", raising=False)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.import_module("tomevit.layers.triton_merge")


@compiled_only
@pytest.mark.skipif(DEVICE == "cuda", reason="runs here, on the GPU")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr


@compiled_only
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter lets types pass that the compiler refuses. No GPU is needed for this.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tomevit.layers import triton_merge

    types = {"key": f"*{dtype}", "x": f"*{dtype}", "x_out": f"*{dtype}", "nearest": "*i32", "slots": "*i64"}
    types |= {"similarity": "*fp32", "size": "*fp32", "size_out": "*fp32"}
    constants = {"stride_d": 1, "heads": 2, "targets": 32, "sources": 256}
    for kernel, more in [(triton_merge._find_nearest, {"block": 64}), (triton_merge._merge, {"block": 8})]:
        fixed = {
            name: value for name, value in (constants | more | {"channels": 64}).items() if name in kernel.arg_names
        }
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in fixed.items()})
        program = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "enable_fp_fusion": True})
        assert program.metadata.shared <= 48 * 1024  # what every GPU gives


@compiled_only
def test_tokens_on_the_cpu_are_refused() -> None:
    from tomevit.layers.triton_merge import match_and_merge_fused

    with pytest.raises(ValueError, match="on the CPU: use the plain one"):
        match_and_merge_fused(Tokens(torch.randn(1, 9, 4)), torch.randn(1, 2, 9, 8), 2, 1)


# ---------------------------------------------------------------------------------------------------- against the plain


@kernels_run
@settings(max_examples=5)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), num_prefix=st.sampled_from([0, 1, 2, 5]))
def test_ties_go_the_same_way(data: st.DataObject, dtype: torch.dtype, num_prefix: int) -> None:
    patches = data.draw(st.integers(2, 15))
    batch, heads, n = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4)), num_prefix + patches
    r = data.draw(st.integers(1, patches // 2))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    key = tied_key(batch, heads, n, data.draw(st.sampled_from([1, 3, 20])), dtype)
    tokens = random_tokens(batch, n, dtype=dtype, sized=data.draw(st.booleans()))
    assert_same(match_and_merge_fused(tokens, key, r, num_prefix), plain(tokens, key, r, num_prefix))


@kernels_run
@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False)])
def test_over_several_blocks(dtype: torch.dtype, tied: bool) -> None:
    tokens = random_tokens(1, 133, 33, dtype)
    key = tied_key(1, 3, 133, 9, dtype) if tied else random_key(1, 3, 133, 20, dtype)
    assert_same(match_and_merge_fused(tokens, key, 60, 1), plain(tokens, key, 60, 1))


@kernels_run
def test_merges_compose() -> None:
    fused = expected = random_tokens(2, 19, sized=False)
    for n, r in ((19, 7), (12, 3)):
        key = random_key(2, 2, n)
        fused, expected = match_and_merge_fused(fused, key, r, 1), plain(expected, key, r, 1)
    assert_same(fused, expected)


@kernels_run
def test_float16_does_not_overflow() -> None:
    tokens = random_tokens(1, 18, dtype=torch.float16)
    tokens = tokens._replace(x=tokens.x.sign() * 6e4)
    key = random_key(1, 2, 18, dtype=torch.float16).sign() * 6e4
    ours = match_and_merge_fused(tokens, key, 9, 0)
    assert ours.x.isfinite().all()
    assert_same(ours, plain(tokens, key, 9, 0))


@kernels_run
def test_an_image_does_not_feel_the_others() -> None:
    """Not even one that is NaN, whose tokens still each go somewhere."""
    tokens, key = random_tokens(2, 20), random_key(2, 2, 20)
    alone = match_and_merge_fused(Tokens(*(each[1:] for each in tokens[:4])), key[1:], 5, 1)
    key[0, :, 3:] = float("nan")
    tokens.x[0] = float("nan")
    both = match_and_merge_fused(tokens, key, 5, 1)
    assert all(torch.equal(a[1:], b) for a, b in zip(both[:4], alone[:4], strict=True))
    assert both.slots[0].unique().tolist() == list(range(15))
    assert both.size[0].sum() == tokens.size[0].sum()


# ------------------------------------------------------------------------------------------ gradients, compiler, errors


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gradients_are_the_plain_ones(dtype: torch.dtype) -> None:
    tokens, key = random_tokens(2, 17, dtype=dtype), random_key(2, 2, 17).requires_grad_()
    weights = torch.randn(2, 11, 5, device=DEVICE).to(dtype)
    gradients = []
    for merge in (match_and_merge_fused, plain):
        x = tokens.x.clone().requires_grad_()
        out = merge(tokens._replace(x=x), key, 6, 1)
        assert not out.size.requires_grad  # or attention would be asked for a gradient of its bias
        gradients.append(torch.autograd.grad(out.x, x, weights)[0])
    torch.testing.assert_close(*gradients, rtol=torch.finfo(dtype).eps, atol=0)


@kernels_run
def test_it_compiles_with_what_is_around_it() -> None:
    torch.compiler.reset()
    tokens, key = random_tokens(1, 13), random_key(1, 2, 13)

    def around(merge: Callable[..., Tokens], x: Tensor, r: int) -> Tokens:
        out = merge(tokens._replace(x=x.sin()), key * 2, r, 1)
        return out._replace(x=out.x.exp())

    compiled = torch.compile(partial(around, match_and_merge_fused), fullgraph=True, backend="aot_eager")
    x = tokens.x.clone().requires_grad_()
    for r in (2,) if INTERPRETED else (2, 5):  # the second time as a symbol
        ours, theirs = compiled(x, r), around(plain, x, r)
        assert_same(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(out.x.sum(), x)[0] for out in (ours, theirs)))
    torch.compiler.reset()


@kernels_run
def test_wrong_arguments_are_refused() -> None:
    tokens, key = random_tokens(1, 9), random_key(1, 2, 9)
    for r in (5, -1):
        with pytest.raises(ValueError, match=f"r is {r}, and of 8 tokens at most 4"):
            match_and_merge_fused(tokens, key, r, 1)
    with pytest.raises(ValueError, match=r"not x torch.float64 with key torch.float32"):
        match_and_merge_fused(tokens._replace(x=tokens.x.double()), key, 2, 1)
    n = 2 * MAX_SOURCES + 2
    with pytest.raises(ValueError, match=f"not {n}: use the plain one"):
        match_and_merge_fused(random_tokens(1, n, 1), random_key(1, 1, n, 1), 2, 0)
