"""A training loop of the user's own: what r, precision, compilation, optimizers and copies do in one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import tomevit
from tests.helpers import images_for, tiny
from tomevit import VisionTransformer
from tomevit.layers import DropPath, Merge, bipartite_soft_matching
from tomevit.schedule import Schedule

DIGITS = Path(tomevit.__file__).parent / "assets" / "digits_p1_plain.safetensors"
SCHEDULES: list[Schedule] = [0, 7, (8, -1.0), [3, 0, 9], 0.2]


def labels_for(images: Tensor) -> Tensor:
    return torch.arange(len(images)) * 3 % 7


def loss_of(model: nn.Module, images: Tensor, **arguments: Any) -> Tensor:
    return F.cross_entropy(model(images, **arguments), labels_for(images))


def gradients(model: VisionTransformer, loss: Tensor) -> list[Tensor]:
    """At every parameter that learns."""
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all gradients as one vector, as a share of its length."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)])
    return (difference.norm() / torch.cat([b.flatten() for b in theirs]).norm()).item()


def step(model: VisionTransformer, optimizer: torch.optim.Optimizer, images: Tensor, **arguments: Any) -> float:
    loss = loss_of(model, images, **arguments)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------------------------------------------- r


def test_r_grows_while_a_model_learns() -> None:
    """A few steps in which r grows from 0 recover most of what r = 24 costs a model that was trained without."""
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
    from tomevit.training.digits import load_split

    digits, measured_on = load_split()
    model = tomevit.create("digits_p1", pretrained=DIGITS)
    preprocess = tomevit.transform(model)

    @torch.no_grad()
    def accuracy(r: int) -> float:
        return (model.eval()(preprocess(measured_on.images), r).argmax(1) == measured_on.labels).float().mean().item()

    before, steps, top = accuracy(24), 24, 24
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, lr=1e-3, layer_decay=0.9))
    model.train()
    for i in range(steps):
        model.r = round(top * min(1.0, 2 * i / steps))
        chosen = torch.randint(len(digits.labels), (64,))
        loss = F.cross_entropy(model(preprocess(digits.images[chosen])), digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.r == top
    # Without merging in these steps it rises by 2 points: mutate `top` to 0 to see it.
    assert accuracy(24) - before > 0.04


def test_each_batch_has_its_r_and_evaluation_leaves_no_trace() -> None:
    model = tiny(5, drop_path=0.2, dropout=0.1).train()
    twin, images = copy.deepcopy(model), images_for(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01, momentum=0.9) for each in (model, twin)]
    for i, r in enumerate(SCHEDULES):
        torch.manual_seed(i)
        ours = step(model, optimizers[0], images, r=r)
        model.eval()
        with torch.no_grad():
            model(images, r=16)
            assert model.forward_features(images, r=3).x.shape[1] == model.token_counts(3)[-1]
        model.train()
        twin.r = r
        torch.manual_seed(i)
        assert step(twin, optimizers[1], images) == ours
        model.r = 31 - i  # what the call was given counts
    assert_bits(weights(model), weights(twin))


def test_each_r_has_gradients_of_its_own() -> None:
    model = tiny().double().train()
    images = images_for(model)
    found = [gradients(model, loss_of(model, images, r=r)) for r in SCHEDULES]
    for i, ours in enumerate(found):
        assert all(distance(ours, other) > 1e-3 for other in found[:i])


def test_two_models_learn_at_different_r_as_they_would_alone() -> None:
    def pair() -> list[tuple[VisionTransformer, torch.optim.Optimizer]]:
        models = [tiny(r, seed=seed).train() for seed, r in enumerate([12, (6, -1.0)])]
        return [(model, torch.optim.SGD(model.parameters(), 0.01)) for model in models]

    alone, together = pair(), pair()
    images = images_for(alone[0][0])
    for learner in alone:
        for _ in range(2):
            step(*learner, images)
    for _ in range(2):
        for learner in together:
            step(*learner, images)
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert_bits(weights(one), weights(other))


def test_r_is_no_part_of_the_state() -> None:
    model = tiny(8)
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    other = tiny((3, 0.5), seed=1)
    other.load_state_dict(state)
    assert other.r == (3, 0.5)
    with torch.no_grad():
        assert torch.equal(other(images_for(model), r=8), model(images_for(model)))


# ----------------------------------------------------------------------------------------------------- mixed precision


class Replay:
    """A matching that keeps what it found, to be used again: half precision may find others than float32."""

    def __init__(self) -> None:
        self.found: list[Merge] = []
        self.again: Iterator[Merge] | None = None

    def __call__(self, key: Tensor, r: int, num_prefix: int) -> Merge:
        if self.again is not None:
            return next(self.again)
        self.found.append(bipartite_soft_matching(key, r, num_prefix))
        return self.found[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("fields", [{}, {"pool": "avg", "pool_norm": "after"}], ids=["vit", "mae"])
def test_gradients_under_autocast_are_float32s_but_for_rounding(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    matching = Replay()
    model = tiny(8, matching=matching, **fields).train()
    images = images_for(model)
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, images)
    rounded = gradients(model, loss)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in rounded)
    matching.again = iter(matching.found)
    exact = gradients(model, loss_of(model, images))
    # A rounding is off by at most eps / 2. Along the longest path are some 8 products in each of 4 blocks, forward and
    # backward, and independent roundings add up as the root of their number.
    assert 0 < distance(rounded, exact) < torch.finfo(dtype).eps / 2 * (2 * 8 * 4) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sizes_are_exact_under_autocast_in_training(checkpointing: bool) -> None:
    model = tiny(9, drop_path=0.5, dropout=0.1).train()
    model.set_grad_checkpointing(checkpointing)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_features(images_for(model))
    assert tokens.size.dtype == torch.float32
    counted = torch.stack([torch.bincount(slots, minlength=tokens.x.shape[1]) for slots in tokens.slots])
    assert torch.equal(tokens.size[..., 0], counted.float())


def test_a_scaler_skips_what_overflows_and_grows() -> None:
    model = tiny(8).train()
    images = images_for(model)
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, lr=1e-3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    scales, skipped = [scaler.get_scale()], []
    for _ in range(16):
        before = weights(model)
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, images)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(parameter.grad.isfinite().all() for parameter in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        changed = [not torch.equal(new, old) for new, old in zip(weights(model), before, strict=True)]
        assert all(changed) if finite else not any(changed)
        assert (scales[-1] < scales[-2]) == (not finite)
        skipped.append(not finite)
    assert skipped[0]
    assert not all(skipped)
    assert any(new > old for old, new in pairwise(scales))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.fixture
def compiler() -> Iterator[Any]:
    """dynamo's settings, and no programs of other tests."""
    torch.compiler.reset()
    # Here, since it imports much of the compiler.
    from torch._dynamo import config

    yield config
    torch.compiler.reset()


# dynamo looks at .grad of what enters a block, and keeps the warning from people, though not from filters.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_take_every_r_without_another_program(compiler: Any) -> None:
    """Three, whatever the depth and the probabilities of drop path: the first block, those after it, and the last."""
    model = tiny(4, depth=6, drop_path=0.3).train()
    eager, images = copy.deepcopy(model), images_for(model)
    for block in model.blocks:
        block.compile(dynamic=True, fullgraph=True, backend="eager")

    def compare(**arguments: Any) -> None:
        both = []
        for each in (model, eager):
            torch.manual_seed(3)
            both.append(gradients(each, loss_of(each, images, **arguments)))
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)

    with compiler.patch(cache_size_limit=4):  # fewer than blocks; torch 2.6 needs a fourth
        compare()
    with compiler.patch(error_on_recompile=True):
        for r in (3, 7, 2, [2, 8, 3, 5, 2], (4, -0.5), 0.09):
            compare(r=r)
        model.r = eager.r = 5
        model.set_grad_checkpointing()
        compare()
        torch.manual_seed(4)
        assert not torch.equal(model(images), model(images))  # dropout and drop path still draw


def test_drop_path_of_any_rate_is_one_program(compiler: Any) -> None:
    x = torch.randn(5, 3, 2, requires_grad=True)
    found = []
    for rate in (0.1, 0.2, 0.3, 0.4):
        module = DropPath(rate).train()
        torch.manual_seed(3)
        expected = module(x)
        module.compile(dynamic=True, fullgraph=True, backend="aot_eager")
        with compiler.patch(error_on_recompile=rate > 0.1):
            torch.manual_seed(3)
            found.append(module(x))
        torch.testing.assert_close(found[-1], expected, rtol=1e-6, atol=0)
    assert found[0].detach().ne(0).sum() > found[3].detach().ne(0).sum()


def test_compiled_blocks_evaluate_at_every_r(compiler: Any) -> None:
    model = tiny(4, depth=3, dist_token=True)
    eager, images = copy.deepcopy(model), images_for(model)
    for block in model.blocks:
        block.compile(dynamic=True, fullgraph=True, backend="eager")
    with torch.no_grad():
        for r, new in ((4, True), (0, True), (9, False), ([5, 3], False), ((4, -0.5), False), (0, False)):
            with compiler.patch(error_on_recompile=not new):
                torch.testing.assert_close(model(images, r), eager(images, r), rtol=0, atol=1e-5)
                few = images[:2]  # the last batch of an epoch
                torch.testing.assert_close(model(few, r), eager(few, r), rtol=0, atol=1e-5)
        # A copy is a plain model under the same names.
        for plain in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(plain.state_dict()) == list(eager.state_dict())
            assert torch.equal(plain(images, 6), eager(images, 6))


def test_a_frozen_model_compiles_whole(compiler: Any) -> None:
    model = tiny(8, depth=2).train()
    model.freeze(1)
    optimizer = torch.optim.SGD(tomevit.param_groups(model, 0.01))
    eager, images = copy.deepcopy(model), images_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = weights(model.blocks[0])
    for _ in range(2):
        expected = gradients(eager, loss_of(eager, images))
        torch.testing.assert_close(gradients(model, loss_of(compiled, images)), expected, rtol=1e-5, atol=1e-6)
        optimizer.step()
        eager.load_state_dict(model.state_dict())
    assert_bits(weights(model.blocks[0]), before)


# -------------------------------------------------------------------------------------------------- batches and formats


def test_channels_last() -> None:
    model = tiny(8).double().train()
    images = images_for(model)
    plain = gradients(model, loss_of(model, images))
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    found = gradients(model, loss_of(model, images))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    torch.optim.SGD(model.parameters(), 0.01).step()
    kernel = model.patch_embed.proj.weight
    for tensor in (kernel, kernel.grad, model.patch_embed.proj(images)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    # Channels are last in tokens too: what the convolution wrote is not copied.
    assert model.patch_embed(images).is_contiguous()


@pytest.mark.parametrize("fields", [{}, {"pool": "avg", "pool_norm": "after"}], ids=["vit", "mae"])
def test_accumulated_gradients_are_those_of_the_whole_batch(fields: dict[str, Any]) -> None:
    model = tiny(11, **fields).double().train()
    images = images_for(model, 6)
    labels = labels_for(images)
    expected = gradients(model, F.cross_entropy(model(images), labels))
    model.zero_grad()
    for chosen in (slice(0, 1), slice(1, 3), slice(3, 6)):
        (F.cross_entropy(model(images[chosen]), labels[chosen], reduction="sum") / len(images)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=1e-10)


# -------------------------------------------------------------------------------------------------------------- copies


def test_an_ema_follows_and_is_saved(tmp_path: Path) -> None:
    model = tiny(8).train()
    images, decay = images_for(model), 0.75
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    average.update_parameters(model)  # the first one copies
    expected = weights(model)
    for _ in range(3):
        step(model, optimizer, images)
        average.update_parameters(model)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights(model), strict=True)]
    torch.testing.assert_close(weights(average), expected, rtol=1e-6, atol=1e-7)
    model.r = 2
    assert isinstance(average.module, VisionTransformer)
    assert average.module.r == 8
    tomevit.save(average.module, tmp_path / "ema.safetensors")
    loaded = tomevit.load(tmp_path / "ema.safetensors")
    assert loaded.r == 8
    average.eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), average(images))
        assert torch.equal(loaded(images, r=3), average(images, r=3))


def test_swa() -> None:
    model = tiny(8).train()
    images = images_for(model)
    optimizer = torch.optim.SGD(tomevit.param_groups(model, lr=0.02, layer_decay=0.5))
    scales = [group["scale"] for group in optimizer.param_groups]
    schedule = SWALR(optimizer, [0.01 * scale for scale in scales], anneal_epochs=2)
    average, seen = AveragedModel(model), []
    for _ in range(3):
        step(model, optimizer, images)
        schedule.step()
        average.update_parameters(model)
        seen.append(weights(model))
    rates = [group["lr"] / group["scale"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01] * len(rates))
    expected = [torch.stack(parameter).mean(0) for parameter in zip(*seen, strict=True)]
    torch.testing.assert_close(weights(average), expected, rtol=1e-5, atol=1e-6)
    before = weights(average)
    update_bn([images], average)  # there is none
    assert_bits(weights(average), before)


# -------------------------------------------------------------------------------------------------------------- losses


def mixup(images: Tensor) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(labels_for(images), 7).float()
    return 0.7 * images + 0.3 * images.flip(0), 0.7 * one_hot + 0.3 * one_hot.flip(0)


def cutmix(images: Tensor) -> tuple[Tensor, Tensor]:
    one_hot, mixed = F.one_hot(labels_for(images), 7).float(), images.clone()
    mixed[:, :, :16, :16] = images.flip(0)[:, :, :16, :16]
    return mixed, 0.75 * one_hot + 0.25 * one_hot.flip(0)


@pytest.mark.parametrize("loss", ["soft", "smoothed", "bce"])
@pytest.mark.parametrize(("mix", "autocast"), [(mixup, False), (cutmix, True)], ids=["mixup-f32", "cutmix-bf16"])
def test_soft_labels_are_learned(mix: Callable[[Tensor], tuple[Tensor, Tensor]], autocast: bool, loss: str) -> None:
    model = tiny(8, depth=2).train()
    images, target = mix(images_for(model))
    # What no logits can go below: the entropy of the targets.
    if loss == "bce":
        least = F.binary_cross_entropy(target, target)
    else:
        smoothed = 0.9 * target + 0.1 / 7 if loss == "smoothed" else target
        least = -torch.xlogy(smoothed, smoothed).sum(1).mean()
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, lr=5e-3))
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
            if loss == "bce":
                value = F.binary_cross_entropy_with_logits(logits, target)
            else:
                value = F.cross_entropy(logits, target, label_smoothing=0.1 if loss == "smoothed" else 0.0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert -0.01 < value.item() - least.item() < 0.05


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_distillation_teaches_each_head_its_own(hard: bool) -> None:
    """DeiT's losses (arXiv:2012.12877, section 4): labels for the one head, a teacher for the other."""
    teacher, student = tiny(seed=9), tiny(8, dist_token=True).train()
    images, temperature = images_for(student), 3.0
    with torch.no_grad():
        taught = teacher(images)

    def losses() -> tuple[Tensor, Tensor]:
        logits = student(images)
        if hard:
            dist = F.cross_entropy(logits.dist, taught.argmax(1))
        else:
            logs = (F.log_softmax(each / temperature, 1) for each in (logits.dist, taught))
            dist = F.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2
        return F.cross_entropy(logits.cls, labels_for(images)), dist

    for index, other in ((0, student.head_dist), (1, student.head)):
        student.zero_grad()
        losses()[index].backward()
        assert all(parameter.grad is None for parameter in other.parameters())
        assert student.dist_token.grad.any()  # one trunk
        assert student.blocks[0].attn.qkv.weight.grad.isfinite().all()
    optimizer = torch.optim.AdamW(tomevit.param_groups(student, lr=3e-3))
    start = [loss.item() for loss in losses()]
    for _ in range(40):
        optimizer.zero_grad()
        (sum(losses()) / 2).backward()
        optimizer.step()
    assert all(loss.item() < before / 4 for loss, before in zip(losses(), start, strict=True))
    with torch.no_grad():
        cls, dist = student(images)
        assert (cls.argmax(1) == labels_for(images)).all()
        assert not hard or (dist.argmax(1) == taught.argmax(1)).all()


# ------------------------------------------------------------------------------------------------------ regularisation


def test_pretrained_weights_take_drop_path_and_dropout() -> None:
    dropping = tomevit.create("digits_p1", pretrained=DIGITS, drop_path=0.3, dropout=0.2, attn_dropout=0.1, r=8)
    plain = tomevit.create("digits_p1", pretrained=DIGITS, r=8)
    rates = [module.probability for module in dropping.modules() if isinstance(module, DropPath)]
    depth = len(dropping.blocks)
    assert rates == pytest.approx([0.3 * i / (depth - 1) for i in range(depth)])
    images = images_for(plain)
    with torch.no_grad():
        assert torch.equal(dropping(images), plain(images))
        assert torch.equal(plain.train()(images), plain.eval()(images))
        assert not torch.equal(dropping.train()(images), plain(images))
    assert not any(module.training for module in tomevit.create("digits_p1", drop_path=0.1).modules())


def test_drop_path_drops_whole_branches_of_single_images_and_keeps_sizes() -> None:
    model = tiny(8, depth=2, drop_path=0.5).train()
    image = images_for(model, 1)
    with torch.no_grad():
        tokens = model.forward_features(image.expand(64, -1, -1, -1))
    assert tokens.size.sum(1).eq(model.config.num_tokens).all()
    counted = torch.stack([torch.bincount(slots, minlength=tokens.x.shape[1]) for slots in tokens.slots])
    assert torch.equal(tokens.size[..., 0], counted.float())
    # Equal images part only in the last block, whose two branches are each there or not.
    assert len(tokens.x.unique(dim=0)) == 4


@pytest.mark.parametrize("matching", ["bipartite", "random"])
def test_checkpointing_follows_r_from_step_to_step(matching: str) -> None:
    """The recomputation merges as the forward did, whatever r and the generator are by then."""
    model = tiny(8, drop_path=0.3, dropout=0.1, matching=matching).train()
    images = images_for(model)
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        for i, r in enumerate(SCHEDULES):
            found = []
            for enable in (False, True):
                model.set_grad_checkpointing(enable)
                torch.manual_seed(i)
                with autocast:
                    loss = loss_of(model, images, r=r)
                model.r = 31
                torch.manual_seed(1234)
                found.append(gradients(model, loss))
            assert_bits(*found)


@pytest.mark.parametrize("blocks", [1, 4])
def test_frozen_blocks_learn_nothing_and_change_no_other_gradient(blocks: int) -> None:
    model = tiny(8).double().train()
    images = images_for(model)
    names = [name for name, _ in model.named_parameters()]
    expected = dict(zip(names, gradients(model, loss_of(model, images)), strict=True))
    model.freeze(blocks)
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        loss_of(model, images).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) != parameter.requires_grad
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_fused_and_foreach_optimizers_learn_alike(make: Callable[..., torch.optim.Optimizer], how: str) -> None:
    learned = []
    for arguments in ({"foreach": False}, {how: True}):
        # float64: the biases of keys have no gradient but rounding, which Adam brings to size.
        model = tiny(8).double().train()
        model.freeze(1)
        optimizer = make(tomevit.param_groups(model, 1e-2, layer_decay=0.5), **arguments)
        for _ in range(3):
            step(model, optimizer, images_for(model))
        learned.append(weights(model))
    torch.testing.assert_close(*learned, rtol=0, atol=1e-7)


def test_schedulers_keep_the_layers_apart() -> None:
    model = tiny(8).train()
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, 0.1, layer_decay=0.5))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    for i in range(4):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.1 * group["scale"] / (1 + i))
        step(model, optimizer, images_for(model))
        schedule.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == model.config.depth + 2


def test_a_resumed_run_is_the_run() -> None:
    """To the bit, in a schedule of r, with what a file takes that holds nothing but tensors and numbers."""

    def start(r: int = 0) -> tuple[VisionTransformer, torch.optim.Optimizer, Any]:
        model = tiny(r, drop_path=0.2).train()
        optimizer = torch.optim.AdamW(tomevit.param_groups(model, 1e-2, layer_decay=0.7))
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    def go(run: tuple[VisionTransformer, torch.optim.Optimizer, Any], steps: range) -> None:
        for i in steps:
            run[0].r = 2 * i
            step(*run[:2], images_for(run[0], seed=i))
            run[2].step()

    whole = start()
    go(whole, range(3))
    file = io.BytesIO()
    torch.save([torch.get_rng_state(), *(each.state_dict() for each in whole)], file)
    go(whole, range(3, 6))
    file.seek(0)
    generator, *states = torch.load(file, weights_only=True)
    resumed = start(r=31)
    for group in resumed[1].param_groups:
        group["name"] = "another"
    for each, state in zip(resumed, states, strict=True):
        each.load_state_dict(state)
    torch.set_rng_state(generator)
    go(resumed, range(3, 6))
    assert_bits(weights(resumed[0]), weights(whole[0]))
    names = [group["name"] for group in resumed[1].param_groups]
    assert names[0::2] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert [(g["lr"], g["scale"]) for g in resumed[1].param_groups] == [
        (g["lr"], g["scale"]) for g in whole[1].param_groups
    ]


def test_clipping() -> None:
    model = tiny(8).train()
    before = gradients(model, 100 * loss_of(model, images_for(model)))
    length = torch.cat([gradient.flatten() for gradient in before]).norm()
    assert length > 1
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(length.item())
    after = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(after, [gradient / length for gradient in before], rtol=1e-4, atol=1e-9)


def test_nothing_lingers_in_a_gradient() -> None:
    model = tiny(8).train()
    images = images_for(model)
    expected = gradients(model, loss_of(model, images))
    loss_of(model, images, r=3).backward()
    for to_none in (False, True):
        model.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none for p in model.parameters())
        loss_of(model, images).backward()
        assert_bits([p.grad for p in model.parameters()], expected)


def test_a_nan_is_seen_and_stays_with_its_image() -> None:
    model = tiny(8).train()
    images = images_for(model)
    with torch.autograd.set_detect_anomaly(True):
        gradients(model, loss_of(model, images))
        logits = model(images)
        with pytest.warns(UserWarning, match="Traceback of forward call"), pytest.raises(RuntimeError, match="nan"):
            (logits - logits.detach()).abs().sqrt().sum().backward()
    clean = model(images)
    images[1, 0, 3, 3] = torch.nan
    logits = model(images)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])
    assert loss_of(model, images).isnan()
