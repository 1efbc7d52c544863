"""The model under everything that runs, transforms, copies or stores one."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import images_for, relative_error, tiny
from tests.matchings import DETERMINISTIC, case_of
from tomevit.layers import MATCHINGS, Block, PatchEmbed, Tokens
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule

FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {"dist_token": True},
    "mae": {"pool": "avg", "pool_norm": "after"},
}
families = pytest.mark.parametrize("fields", FAMILIES.values(), ids=FAMILIES)


def loss_and_gradients(model: VisionTransformer, images: Tensor, run: Callable[..., Any] | None = None) -> list[Tensor]:
    """The loss, and its gradient at the images and at every parameter."""
    model.zero_grad()
    images = images.detach().requires_grad_()
    answer = (model if run is None else run)(images)
    loss = sum(part.float().square().sum() for part in answer) if isinstance(answer, tuple) else answer.square().sum()
    loss.backward()
    return [loss.detach(), images.grad, *(p.grad for p in model.parameters())]


class Features(nn.Module):
    """forward_features as a module: what torch.export takes."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tokens:
        return self.model.forward_features(images)


# ------------------------------------------------------------------------------------------------- compile and export


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("family", "backend"), [("vit", "inductor"), ("deit", "aot_eager"), ("mae", "aot_eager")])
def test_compiled_models_answer_and_learn_alike(family: str, backend: str) -> None:
    model = tiny(8, depth=2, **FAMILIES[family]).double().train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    images = images_for(model)
    expected = loss_and_gradients(model, images)
    torch.testing.assert_close(loss_and_gradients(model, images, compiled), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_follows_r() -> None:
    model = tiny(8, depth=2).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = images_for(model)
    with torch.no_grad():
        for r in (8, 4, [16, 2]):
            model.r = r
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-9, atol=1e-11)
        assert relative_error(compiled(images), model(images, r=0)) > 1e-4


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_takes_any_r_with_the_call() -> None:
    # Deep enough that shapes in a symbolic r would not end: torch.compile makes a symbol of an argument that changes.
    model = tiny(depth=4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = images_for(model)
    with torch.no_grad():
        for r in (4, 3, 0.05, ["4+1 diffrate", 3]):
            torch.testing.assert_close(compiled(images, r), model(images, r))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_takes_budgets_with_the_call() -> None:
    model = tiny(depth=3, pool="avg")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = images_for(model)
    with torch.no_grad():
        for r in ("1.3x", "1.4x late", "1.3x"):
            torch.testing.assert_close(compiled(images, r), model(images, model.plain(r)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*jit.*is deprecated:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("r", "strict"), [("1.3x late", True), ("8 pitome", False)])
def test_budgets_are_exported_and_traced(r: str, strict: bool) -> None:
    model = tiny(depth=3, pool="avg")
    images = images_for(model, 2)
    with torch.no_grad():
        expected = model(images, model.plain(r))
        program = torch.export.export(model, (images, r), strict=strict).module()
        torch.testing.assert_close(program(images, r), expected, rtol=0, atol=1e-5)
        model.r = r
        torch.testing.assert_close(torch.jit.trace(model, images)(images), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_traced_features_compile() -> None:
    model = tiny((6, 0.5), depth=2, reg_tokens=2).double()
    images = images_for(model)
    with torch.no_grad():
        expected = model.forward_features(images)
        answer = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(answer.x, expected.x, rtol=1e-9, atol=1e-11)
    assert torch.equal(answer.size, expected.size)
    assert torch.equal(answer.slots, expected.slots)


@pytest.mark.parametrize(
    ("family", "batch", "strict"),
    [
        ("vit", "dynamic", False),
        ("vit", "dynamic", True),
        ("deit", "dynamic", False),
        ("mae", "dynamic", False),
    ],
)
def test_exported_models_answer_alike(family: str, batch: str, strict: bool) -> None:
    model = tiny((8, -0.5), depth=2, **FAMILIES[family])
    images = images_for(model, 2)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if batch == "dynamic" else None
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)
        for count in (1, 2, 5) if shapes else (2,):
            images = images_for(model, count, seed=count)
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)


def test_exported_features_trace_alike() -> None:
    model = Features(tiny(8, depth=2))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model.model, 2),), dynamic_shapes=shapes, strict=False)
        images = images_for(model.model, 4)
        answer, expected = program.module()(images), model(images)
    assert isinstance(answer, Tokens)
    torch.testing.assert_close(answer.x, expected.x, rtol=0, atol=1e-5)
    assert torch.equal(answer.size, expected.size)
    assert torch.equal(answer.slots, expected.slots)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("matching", [*MATCHINGS, "diffrate with drops"])
def test_every_matching_compiles_and_exports(matching: str) -> None:
    entries = {"grid": ["grid", 7], "diffrate with drops": ["7+3 diffrate", "2+7 diffrate"]}.get(matching)
    model = tiny(entries, depth=2) if entries else tiny(7, depth=2, matching=matching)
    images = images_for(model, 2)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False).module()
        answers = []
        for run in (model, torch.compile(model, fullgraph=True, backend="eager"), program):
            torch.manual_seed(0)
            answers.append(run(images))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answers[2], answers[0], rtol=0, atol=1e-5)


def test_an_exported_program_survives_a_file() -> None:
    model = tiny(8, depth=2)
    images, file = images_for(model, 2), io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (images,)), file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(images), model(images))


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "changes",
    [{}, {"drop_path": 0.3, "dropout": 0.2, "attn_dropout": 0.2}, {"matching": "random"}],
    ids=["plain", "dropout", "random"],
)
@families
def test_gradient_checkpointing_changes_no_gradient(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    model = tiny(8, **fields, **changes).double().train()
    images = images_for(model)
    torch.manual_seed(3)
    expected = loss_and_gradients(model, images)
    model.set_grad_checkpointing()
    torch.manual_seed(3)
    torch.testing.assert_close(loss_and_gradients(model, images), expected, rtol=0, atol=0)


def test_gradient_checkpointing_keeps_less() -> None:
    def stored_by(model: VisionTransformer) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(images_for(model))
        return total

    model = tiny(8).train()
    before = stored_by(model)
    model.set_grad_checkpointing()
    assert stored_by(model) < before / 4


def test_gradients_are_those_of_finite_differences() -> None:
    model = tiny([10, 6], depth=2, embed_dim=6, num_heads=2, img_size=(16, 16)).double()
    images = images_for(model, 1)
    direction = torch.randn_like(images)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = model(images + step * direction), model(images - step * direction)
        slots = [model.forward_features(images + sign * step * direction).slots for sign in (-1, 1)]
    assert torch.equal(*slots)  # the merges are the same: only then is there a derivative
    slope = (ahead - behind).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=0)


@families
def test_drop_path_scales_up_what_it_keeps(fields: dict[str, Any]) -> None:
    dropping, plain = tiny(0, drop_path=0.5, **fields), tiny(0, **fields)
    assert [block.drop_path.probability for block in dropping.blocks] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    images = images_for(plain)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(dropping(images), plain(images), strict=True))
        branch = dropping.blocks[3].drop_path.train()
        kept = branch(torch.ones(1000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))  # whole images


# ---------------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@families
def test_autocast(fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny(8, **fields)
    images = images_for(model)

    def run(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(images)

    assert all(part.isfinite().all() for part in loss_and_gradients(model, images, run))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits, tokens = model(images), model.forward_features(images)
    assert logits.dtype == dtype
    assert tokens.size.dtype == torch.float32
    assert tokens.size.sum(1).eq(model.config.num_tokens).all()
    with torch.no_grad():
        assert relative_error(run(images), model(images)) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("matching", DETERMINISTIC)
def test_autocast_measures_similarity_in_float32(matching: str, dtype: torch.dtype) -> None:
    """The same keys merge alike with and without autocast: similarities in half precision would be full of ties."""
    case = case_of(torch.randn(2, 101, 16).to(dtype), 40, 1, drop=9)
    with torch.autocast("cpu", dtype):
        merge = case.find(matching)
    assert all(a is b or torch.equal(a, b) for a, b in zip(merge, case.find(matching), strict=True))  # None is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@families
def test_half_precision_models(fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny(8, **fields).to(dtype)
    images = images_for(model)
    assert images.dtype == dtype
    gradients = loss_and_gradients(model, images)
    assert all(part.isfinite().all() for part in gradients)
    assert gradients[1].dtype == dtype
    with torch.no_grad():
        logits, tokens = model(images), model.forward_features(images)
        exact = copy.deepcopy(model).float()
        slots = tokens.slots
        assert relative_error(logits.float(), exact(images.float())) < 0.2
    assert logits.dtype == tokens.x.dtype == dtype
    assert tokens.size.dtype == torch.float32
    assert tokens.size.sum(1).eq(model.config.num_tokens).all()
    counted = torch.stack([torch.bincount(s, minlength=tokens.x.shape[1]) for s in slots])
    assert torch.equal(tokens.size[..., 0], counted.float())


def test_float16_survives_large_activations() -> None:
    model = tiny(12, depth=2).half()
    with torch.no_grad():
        model.pos_embed.add_(30000.0)
        tokens = model.forward_features(images_for(model))
    assert tokens.x.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- copies


def through_pickle(model: VisionTransformer) -> VisionTransformer:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: VisionTransformer) -> VisionTransformer:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("r", [8, (8, -1.0), [3, 2, 1], 0.25], ids=repr)
def test_copies_are_whole_and_independent(
    duplicate: Callable[[VisionTransformer], VisionTransformer], r: Schedule
) -> None:
    model = tiny(r, dist_token=True)
    twin = duplicate(model)
    assert twin.r == r
    assert type(twin.r) is type(r)
    assert twin.config == model.config
    assert twin.card == model.card
    images = images_for(model)
    with torch.no_grad():
        before = model(images)
        assert torch.equal(twin(images), before)
        twin.r = 0
        for parameter in twin.parameters():
            parameter.zero_()
        assert model.r == r
        assert torch.equal(model(images), before)


# ---------------------------------------------------------------------------------------------------------- purity


def state(model: VisionTransformer) -> dict[str, Any]:
    """Everything that is stored in the model and its parts, by name, tensors by their bytes and version."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") or attribute == "_r":
                found[f"{name}.{attribute}"] = value if callable(value) else copy.copy(value)
        found[f"{name}.hooks"] = [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
        found[f"{name}.class"] = type(module), list(vars(module))
    for name, tensor in model.state_dict().items():
        found[name] = tensor.data_ptr(), tensor._version, tensor.numpy().tobytes()
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@families
def test_nothing_in_a_model_changes_when_it_runs(fields: dict[str, Any], training: bool) -> None:
    model = tiny((8, 0.5), drop_path=0.1, **fields).train(training)
    images = images_for(model)
    original = images.clone()
    before = state(model)
    with torch.no_grad():
        model(images)
        model(images, r=[16, 1])
        model.forward_features(images, r=3)
        model.forward_intermediates(images, norm=True)
    loss_and_gradients(model, images)
    assert state(model) == before
    assert torch.equal(images, original)


def test_schedules_in_a_model_are_its_own() -> None:
    r = [4, 3]
    model = tiny(r)
    r[0] = 30
    assert model.r == [4, 3]


def test_threads_share_a_model_at_different_r() -> None:
    model = tiny(5)
    images = images_for(model)
    schedules: list[Schedule] = [0, 12, (8, -1.0), [20, 0, 7]]
    with torch.inference_mode():
        expected = [model(images, r) for r in schedules]
    wrong: list[str] = []
    start = threading.Barrier(len(schedules))

    def run(r: Schedule, answer: Tensor) -> None:
        start.wait()
        with torch.inference_mode():
            wrong.extend(f"r={r}, iteration {i}" for i in range(60) if not torch.equal(model(images, r), answer))

    threads = [threading.Thread(target=run, args=arguments) for arguments in zip(schedules, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.r == 5


# ------------------------------------------------------------------------------------------------------- torch.func


def test_functional_call_and_grad() -> None:
    model, donor = tiny(8).double(), tiny(8, seed=5).double()
    images = images_for(model)
    parameters = dict(donor.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(model, parameters, images), donor(images), rtol=0, atol=0)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, images).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    _, _, *expected = loss_and_gradients(donor, images)
    torch.testing.assert_close(list(gradients.values()), expected, rtol=0, atol=1e-12)


def batchable_attention() -> AbstractContextManager[None]:
    # For the fused CPU kernel torch has no batching rule: vmap loops over it and warns that this is slow.
    return sdpa_kernel(SDPBackend.MATH)


def test_vmap_over_parameters() -> None:
    models = [tiny(8, seed=seed, depth=2).double() for seed in range(3)]
    images = images_for(models[0])
    stacked, _ = torch.func.stack_module_state(models)

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], parameters, images)

    with torch.no_grad(), batchable_attention():
        answer = torch.func.vmap(run)(stacked)
        expected = torch.stack([model(images) for model in models])
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)


def test_per_image_gradients_by_vmap() -> None:
    model = tiny(8, depth=2).double()
    images = images_for(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, image[None]).square().sum()

    with batchable_attention():
        by_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    _, _, *together = loss_and_gradients(model, images)
    torch.testing.assert_close([g.sum(0) for g in by_image.values()], together, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------- programs of other kinds


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")  # of torch itself; no TracerWarning
@pytest.mark.parametrize("r", [0, 4, [8, 0, 3]], ids=str)
@families
def test_torch_jit_traces_it(fields: dict[str, Any], r: Schedule) -> None:
    model = tiny(r, depth=3, **fields)
    traced = torch.jit.trace(model, images_for(model))  # type: ignore[no-untyped-call]
    images = images_for(model, 5, seed=3)  # of another batch
    with torch.no_grad():
        assert relative_error(traced(images), model(images)) < 1e-5


@families
def test_programs_are_of_operators_that_runtimes_have(fields: dict[str, Any]) -> None:
    model = tiny(4, depth=3, **fields)
    program = torch.export.export(model, (images_for(model),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    names = {str(node.target) for node in calls}
    missing = ("sort", "new_ones", "autocast", "set_grad", "promote_types", "cumsum", "scatter", "index_put", "tomevit")
    assert not [name for name in names for word in missing if word in name]
    for node in calls:
        shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else None
        if "slice" in str(node.target):
            assert node.args[0].meta["val"].shape != shape  # a whole slice shares its memory
        if "mul" in str(node.target):
            assert not [
                arg for arg in node.args if isinstance(arg, torch.fx.Node) and arg.meta["val"].dtype == torch.bool
            ]


@families
def test_shapes_without_values(fields: dict[str, Any]) -> None:
    model = tiny(4, depth=3, **fields).to("meta")
    assert model(images_for(model).to("meta")).shape == (3, model.config.num_classes)
    features = model.forward_features(images_for(model).to("meta"))
    assert features.x.shape[1] == model.token_counts()[-1]


@pytest.mark.parametrize("matching", [name for name in DETERMINISTIC if name != "grid"])
def test_a_matching_compiles_where_nothing_merges(matching: str, fresh_compiler: None) -> None:
    find = MATCHINGS[matching]
    compiled = torch.compile(find, fullgraph=True, backend="aot_eager")
    for r, drop in ((0, 0), (3, 0), (0, 2), (3, 2)) if matching == "diffrate" else ((0, 0), (3, 0)):
        arguments = case_of(torch.randn(2, 9, 4), r, 1, drop=drop).arguments(matching)
        for ours, theirs in zip(compiled(*arguments), find(*arguments), strict=True):
            assert ours is theirs or torch.equal(ours, theirs)  # None is None


@pytest.mark.parametrize("r", [0, 4])
@families
def test_torch_fx_follows_it_from_block_to_block(fields: dict[str, Any], r: int) -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Block | PatchEmbed) or super().is_leaf_module(module, name)

    model = tiny(r, depth=3, **fields)
    graph = Leaves().trace(model, concrete_args={"r": None})
    images = images_for(model)
    assert torch.equal(torch.fx.GraphModule(model, graph)(images, None), model(images))
