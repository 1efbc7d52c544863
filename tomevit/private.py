"""Names that torch keeps to itself and may change in any release: each here alone, with what is done without it.

Where a name is gone, something is slower or is not counted; nothing answers otherwise, and tomevit still imports.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.export import ExportedProgram

F = TypeVar("F", bound=Callable[..., Any])

#: Where torch's wrappers keep what they wrap: torch.compile, and data parallelism and averaged models.
WRAPPED = ("_orig_mod", "module")


#: How torch and oneDNN say that memory or address space ended, where the error has no class of its own.
_NO_MEMORY = re.compile(
    r"can't allocate|cannot allocate memory|not enough memory|unable to mmap|bad_alloc|MPS backend out of memory"
    r"|Storage size calculation overflowed|could not create a (primitive|memory)",
    re.IGNORECASE,
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python's, torch's or the system's says that there is no more memory, of whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def has_onednn() -> bool:
    """Whether torch was built with oneDNN; without the name, none of its operators is used."""
    return bool(getattr(torch._C, "_has_mkldnn", False))


def emulated_dtypes() -> frozenset[torch.dtype]:
    """Half-precision types that this processor has no instructions for; without the names, none is known to be so."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    found = {dtype: _onednn(name) for dtype, name in names.items()}
    return frozenset(dtype for dtype, supported in found.items() if supported is not None and not supported())


def pack_weight(weight: Tensor) -> Tensor | None:
    """A linear layer's weight in the order in which oneDNN multiplies by it; None without the operators for it."""
    pack = _onednn("_reorder_linear_weight")
    return None if pack is None or _onednn("_linear_pointwise") is None else pack(weight)


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by a weight of `pack_weight`."""
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


def _onednn(name: str) -> Callable[..., Any] | None:
    return getattr(torch.ops.mkldnn, name, None) if has_onednn() else None


def times_written(tensor: Tensor) -> object:
    """What is equal as long as nobody writes to a tensor; without the name, equal to nothing.

    Tensors made in inference mode keep no count, and are equal to nothing too.
    """
    return object() if tensor.is_inference() else getattr(tensor, "_version", object())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALL_MODULES = nn.modules.module


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is of one of these very classes, and calling it does no more than the class says.

    Not so an adapter in its place, one whose weight is computed, quantised or spread over processes, or one with hooks,
    its own or those of all modules. Without the names, none is plain.
    """
    state = vars(layer)
    return (
        type(layer) in kinds
        and "forward" not in state  # accelerate puts one there
        and not any(state.get(name, True) or getattr(_ALL_MODULES, f"_global{name}", True) for name in _HOOKS)
        and not any(is_wrapped(tensor) for tensor in state.get("_parameters", {}).values() if tensor is not None)
    )


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor only stands for others, as quantised and distributed ones do; without the name, by its class."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    try:
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    except ImportError:
        return True
    return is_traceable_wrapper_subclass(tensor)


def has_hooks(layers: Iterable[nn.Module]) -> bool:
    """Whether something is called with one of these layers, or with all modules; without the names, True."""
    return any(
        getattr(_ALL_MODULES, f"_global{name}", True) or any(vars(layer).get(name, True) for layer in layers)
        for name in _HOOKS
    )


def live_contents(model: nn.Module) -> Callable[[], tuple[list[Tensor], list[nn.Module]]]:
    """A function that tells in microseconds which tensors and layers a model has: a tenth of what `parameters()` takes.

    It sees new tensors in the same layers. Once the layers are others, another function must be made.
    """
    layers = list(model.modules())
    names = ("_parameters", "_buffers", "_modules")
    if not all(name in vars(layer) for name in names for layer in layers):
        return lambda: ([*model.parameters(), *model.buffers()], list(model.modules()))
    kept = [vars(layer)[name] for layer in layers for name in names[:2] if vars(layer)[name]]
    inside = [vars(layer)["_modules"] for layer in layers if vars(layer)["_modules"]]

    def look() -> tuple[list[Tensor], list[nn.Module]]:
        tensors = [tensor for each in kept for tensor in each.values() if tensor is not None]
        return tensors, [layer for each in inside for layer in each.values() if layer is not None]

    return look


def wrap_compiled_call(model: nn.Module, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> bool:
    """Have calls of a module go through what `wrap` makes of the program that `Module.compile` made of them.

    Returns:
        False without the name: then nothing was done.
    """
    program: Callable[..., Tensor] | None = getattr(model, "_compiled_call_impl", None)
    if program is None:
        return False
    # Copies and pickles of a module leave this attribute out.
    vars(model)["_compiled_call_impl"] = wrap(program)
    return True


def is_watched() -> bool:
    """Whether a mode sees every operator, as one that counts does, or a function of torch.func transforms them.

    Without the names, none is known to.
    """
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return (modes is not None and modes() > 0) or (transforms is not None and transforms() is not None)


def allow_many_programs() -> AbstractContextManager[Any]:
    """Let torch.compile make more than eight programs of one function, past which it runs it eagerly, in silence."""
    try:
        from torch._dynamo import config

        return config.patch(cache_size_limit=1024, accumulated_cache_size_limit=1024)  # names that torch 2.6 has too
    except (ImportError, AttributeError):
        return nullcontext()


def watch_operators(see: Callable[[Any, list[Tensor]], None]) -> AbstractContextManager[Any] | None:
    """Within it, `see` is given every operator that has run, with all tensors that it took and made.

    Returns:
        None without the names for it.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
    except ImportError:
        return None

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            see(func, [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)])
            return out

    return Watch()  # type: ignore[no-untyped-call]


def constant_to_compilers(function: F) -> F:
    """A function of which torch.compile takes the answer for a constant; without the name, it follows its steps.

    It is `torch.compiler.assume_constant_result`, but that loads torch.compile where a function is declared.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def missing_compiler() -> bool:
    """Whether torch finds no C++ compiler; without the name, it will say so itself."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return False
    try:
        get_cpp_compiler()
    except RuntimeError:  # InvalidCxxCompiler, and on Windows its plain parent
        return True
    return False


def compile_package(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Compile an exported program ahead of time.

    Raises:
        ValueError: this torch cannot.
    """
    try:
        from torch._inductor import aoti_compile_and_package
    except ImportError as error:
        raise ValueError(f"torch {torch.__version__} has no aoti_compile_and_package: write another format") from error
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})


def load_package(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs a package that `compile_package` wrote."""
    from torch._inductor import aoti_load_package

    return cast("Callable[[Tensor], Tensor]", aoti_load_package(str(path)))
