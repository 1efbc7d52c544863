"""Look at a torch checkpoint's pickle without doing anything it says.

A pickle is a program. `Walk` follows it with stand-ins for everything but plain data: nothing is imported, nothing
called, no tensor made. What it wants to run, and how much memory it asks for, is known before torch.load sees the file:
torch's own safe reader (weights_only=True) forbids foreign code too, but allows bytearray(10**12).
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from tomevit.errors import CheckpointError

#: The standard library's unpickler as it is written in Python, with a method for each instruction. Its name is private:
#: in a Python without it, pickles are refused, and safetensors are read as ever.
Unpickler: Any = getattr(pickle, "_Unpickler", object)


class Stream(Protocol):
    """Bytes to read in order: a BytesIO, an mmap."""

    def read(self, size: int, /) -> bytes: ...


#: What one step of a pickle may cost in memory, at most: an empty set is 216 bytes.
STEP = 256
MAX_DIMS = 64
#: A tensor's own size, without its data.
TENSOR = 1024

#: Bytes per element.
STORAGES = {
    f"torch.{name}Storage": size
    for size, names in {
        1: ("Byte", "Char", "Bool"),
        2: ("Half", "BFloat16", "Short"),
        4: ("Float", "Int"),
        8: ("Double", "Long", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}
DTYPES = frozenset(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))
NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
NUMPY_ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
#: Harmless, but nothing that a vision transformer's weights are.
UNUSUAL = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has a shape but no values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a special class",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a special class",
    "torch._utils._rebuild_tensor_v3": "a tensor of an unusual dtype (float8, or unsigned of 16 bits or more)",
}
SCALARS = (str, int, float, bool, bytes, complex, type(None))


class Storage(NamedTuple):
    """Where tensors have their values: `numel` elements of `itemsize` bytes."""

    key: str
    numel: int
    itemsize: int


class _Name(NamedTuple):
    full: str


class _Dtype(NamedTuple):
    itemsize: int


class _Tensor:
    pass


class _Array:
    pass


class _Namespace:
    pass


class _OrderedDict(dict[Any, Any]):
    pass


class Walk:
    """Follows the pickles of one file within one limit.

    Args:
        limit: bytes of memory that the pickles and the tensors they describe may take.

    Attributes:
        storages: what the tensors lie in, by key; whoever walks must check that the file has it.
        numpy: whether numpy's scalars or arrays occur.
    """

    def __init__(self, limit: int) -> None:
        self.left = self.limit = limit
        self.storages: dict[str, Storage] = {}
        self.numpy = False

    def load(self, stream: Stream) -> Any:
        """Walk one pickle; the stream is then behind it.

        Returns:
            The object, as far as it is plain data; stand-ins for the rest.

        Raises:
            CheckpointError: it wants to run something, asks for too much, or is damaged; without the file's name.
        """
        if not _Steps.dispatch:
            raise CheckpointError("is a pickle, which this Python cannot look into: save it as safetensors")
        try:
            return _Steps(self, stream).load()
        except CheckpointError:
            raise
        # Also what instructions raise that no checkpoint has, since the table below lacks them.
        except (AttributeError, EOFError, LookupError, TypeError, ValueError, pickle.PickleError) as error:
            raise CheckpointError(f"is damaged or truncated: its pickle makes no sense ({error})") from error

    def spend(self, size: int) -> None:
        """Charge memory, before it is taken: the one place where a pickle is held to its limit."""
        self.left -= size
        if self.left < 0:
            raise CheckpointError(f"asks for more than {self.limit:,} bytes of memory, far beyond the file's own size")

    def add_storage(self, tag: str, kind: _Name, key: str, location: str, numel: int, view: None = None) -> Storage:
        if (tag, type(key), type(location), view) != ("storage", str, str, None):
            raise TypeError("not a storage")
        storage = Storage(key, _count(numel), STORAGES[kind.full])
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key[:40]!r} described in two ways")
        return storage

    def tensor(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Tensor:
        storage, size, stride = _only(Storage, storage), _only(tuple, size), _only(tuple, stride)
        numel = self.count_elements(size)
        last = _count(offset) + sum((n - 1) * _count(step) for n, step in zip(size, stride, strict=True))
        if numel and last >= storage.numel:
            raise CheckpointError(f"holds a tensor of shape {size} that reaches beyond its {storage.numel} values")
        self.spend(TENSOR + numel * storage.itemsize)
        return _Tensor()

    def count_elements(self, shape: tuple[int, ...]) -> int:
        # Beside a dimension of 0, torch would take any other.
        if len(shape) > MAX_DIMS or any(_count(n) > self.limit for n in shape):
            raise CheckpointError("holds a tensor of an absurd shape")
        return math.prod(shape)

    def sized(self, items: Any, kind: type[Any]) -> Any:
        """A collection of this very type, of which a copy is charged."""
        self.spend(STEP * len(_only(kind, items)))
        return items

    def set_state(self, target: Any, state: Any) -> None:
        match target, state:
            case ((_Namespace() | _OrderedDict()), dict()):
                _check_attributes(self.sized(state, dict))
            case _Dtype(), (3, "<" | ">" | "|", None, None, None, -1, -1, 0):
                pass
            case _Array(), (1, tuple(shape), _Dtype(itemsize), bool(), bytes(data)):
                if self.count_elements(shape) * itemsize != len(data):
                    raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
                self.spend(TENSOR + len(data))
            case _:
                raise TypeError(f"state for a {type(target).__name__}")


def _parameter(walk: Walk, tensor: _Tensor, grad: bool, _: Any, state: Any = None) -> _Tensor:
    _only(bool, grad)
    if state is not None:
        _check_attributes(walk.sized(state, dict))
    return _only(_Tensor, tensor)


def _ordered_dict(walk: Walk, pairs: Any = ()) -> _OrderedDict:  # with pairs as Python 2 wrote it
    return _OrderedDict({_hashable(key): value for key, value in (walk.sized(pairs, list) if pairs != () else ())})


def _numpy_dtype(_: Walk, code: str, align: bool, copy: bool) -> _Dtype:
    if not re.fullmatch("[biuf][1248]", code) or (type(align), type(copy)) != (bool, bool):
        raise TypeError(code)
    return _Dtype(int(code[1]))


def _numpy_scalar(_: Walk, dtype: _Dtype, value: bytes) -> bytes:
    if len(_only(bytes, value)) != _only(_Dtype, dtype).itemsize:
        raise TypeError("its size")
    return value


def _numpy_array(_: Walk, kind: _Name, shape: tuple[int], code: bytes) -> _Array:
    if (kind, shape, code) != (_Name("numpy.ndarray"), (0,), b"b"):
        raise TypeError("no array")
    return _Array()


def _encoded(walk: Walk, text: str, encoding: str) -> bytes:  # how protocol 2 writes bytes
    if encoding != "latin1":
        raise TypeError(encoding)
    walk.spend(len(_only(str, text)))
    return text.encode("latin1")


#: Everything that a pickle may name, beside storages and dtypes; what it may call, with what stands in for that.
KNOWN: dict[str, Callable[..., Any] | None] = {
    "argparse.Namespace": None,
    "builtins.complex": lambda _, real, imaginary: complex(_only(float, real), _only(float, imaginary)),
    "builtins.set": lambda walk, items: {_hashable(item) for item in walk.sized(items, list)},
    "_codecs.encode": _encoded,
    "collections.Counter": lambda walk, counts: _OrderedDict(walk.sized(counts, dict)),
    "collections.OrderedDict": _ordered_dict,
    "numpy.dtype": _numpy_dtype,
    "numpy.ndarray": None,
    "torch.Size": lambda _, sizes: tuple(map(_count, _only(tuple, sizes))),
    "torch.device": lambda _, kind, *index: _Name(_only(str, kind)),  # noqa: ARG005
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": Walk.tensor,
    "torch._utils._rebuild_tensor_v2": Walk.tensor,
    **dict.fromkeys(NUMPY_SCALAR, _numpy_scalar),
    **dict.fromkeys(NUMPY_ARRAY, _numpy_array),
}


class _Steps(Unpickler):  # type: ignore[misc]
    """One pickle's instructions: plain data as the standard library makes it, the rest by Walk."""

    def __init__(self, walk: Walk, stream: Stream) -> None:
        self.walk, self.stream = walk, stream
        super().__init__(self, encoding="utf-8", errors="surrogatepass")

    def read(self, size: int) -> bytes:
        """So many bytes of the stream, charged before they are read."""
        self.walk.spend(size)
        data = self.stream.read(size)
        if len(data) != size:
            raise EOFError("it ends in the middle")
        return data

    def readline(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if len(line) > 500:
                raise ValueError("a name without an end")
            line += self.read(1)
        return line

    def find_class(self, module: str, name: str) -> _Name:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in UNUSUAL:
            raise CheckpointError(f"holds {UNUSUAL[full]}; tomevit reads plain ones")
        if full not in KNOWN and full not in STORAGES and full not in DTYPES:
            raise CheckpointError(f"wants to run {full}; tomevit reads only tensors and plain data")
        self.walk.numpy |= module.startswith("numpy")
        return _Name(full)

    def persistent_load(self, pid: Any) -> Storage:
        return self.walk.add_storage(*_only(tuple, pid))

    def load_stop(self) -> None:
        if self.proto != 2:
            raise CheckpointError(
                f"is a pickle of protocol {self.proto}; torch's safe reader takes torch.save's default, 2"
            )
        super().load_stop()

    def load_frame(self) -> None:  # of later protocols, followed only to say what they want to run
        self.read(8)

    def load_setitem(self) -> None:
        item, key = self.stack.pop(), self.stack.pop()
        self._fill([(key, item)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._fill(zip(items[::2], items[1::2], strict=True))

    def _fill(self, items: Iterable[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, _OrderedDict):
            raise TypeError(f"items for a {type(target).__name__}")
        for key, value in items:
            target[_hashable(key)] = value

    def load_reduce(self) -> None:
        args, name = _only(tuple, self.stack.pop()), _only(_Name, self.stack.pop()).full
        call = KNOWN.get(name)
        try:
            if call is None:
                raise TypeError(name)
            self.append(call(self.walk, *args))
        except TypeError as error:
            kinds = ", ".join(type(arg).__name__ for arg in args)
            raise CheckpointError(f"holds a {name} of ({kinds}), which tomevit does not read") from error

    def load_newobj(self) -> None:
        args, name = _only(tuple, self.stack.pop()), _only(_Name, self.stack.pop()).full
        if name != "argparse.Namespace" or args:
            raise CheckpointError(f"wants to make a {name}; tomevit reads only tensors and plain data")
        self.append(_Namespace())

    def load_build(self) -> None:
        state = self.stack.pop()
        self.walk.set_state(self.stack[-1], state)


#: The instructions that checkpoints have, each charged as it runs.
INSTRUCTIONS = (
    *("proto", "frame", "stop", "mark", "memoize", "binget", "long_binget", "binput", "long_binput"),
    *("none", "true", "false", "binint", "binint1", "binint2", "binfloat", "long1"),
    *("binunicode", "short_binstring", "short_binunicode", "binunicode8", "short_binbytes", "binbytes", "binbytes8"),
    *("empty_tuple", "tuple1", "tuple2", "tuple3", "tuple", "empty_list", "append", "appends"),
    *("empty_dictionary", "setitem", "setitems", "empty_set"),
    *("global", "stack_global", "reduce", "newobj", "build", "binpersid"),
)


def _run_charged(step: Callable[[_Steps], None], steps: _Steps) -> None:
    steps.walk.spend(STEP)
    step(steps)


_Steps.dispatch = {
    code: partial(_run_charged, getattr(_Steps, step.__name__))
    for code, step in getattr(Unpickler, "dispatch", {}).items()
    if step.__name__.removeprefix("load_") in INSTRUCTIONS
}


def _only(kind: type[Any], value: Any) -> Any:
    """A value of this very type."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__.strip('_')}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        # Never the values: of nested lists, a few bytes in a pickle, repr can make terabytes.
        raise ValueError("a size that is no count")
    return value


def _hashable(key: Any) -> Any:
    # Nothing nested: hashing a tuple a million deep would overflow the interpreter's stack.
    if type(key) in SCALARS or (type(key) is tuple and all(type(part) in SCALARS for part in key)):
        return key
    raise TypeError(f"a {type(key).__name__} as a key")


def _check_attributes(state: dict[Any, Any]) -> None:
    for name in state:
        if type(name) is not str or name.startswith("__"):
            raise TypeError("a wrong attribute")
