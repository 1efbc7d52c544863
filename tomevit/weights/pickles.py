"""Look at a torch checkpoint's pickle without doing anything it says.

A pickle is a program. `Walk` follows it with stand-ins for everything but plain data: nothing is imported, nothing
called, no tensor made. What it wants to run, and how much memory it asks for, is known before torch.load sees the file:
torch's own safe reader (weights_only=True) forbids foreign code too, but allows bytearray(10**12).
"""

from __future__ import annotations

import math
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from tomevit.errors import CheckpointError

# The standard library's reader in Python: not documented, but a method for every instruction, found by a table, so that
# a subclass can replace some and leave out others. The documented one, in C, can be limited only in what it imports.
# A Python without it refuses pickles, and reads all else.
_PythonUnpickler: Any = getattr(pickle, "_Unpickler", object)
#: What torch.save uses; later protocols are followed as well, only to say what they want to run.
INSTRUCTIONS = """
PROTO FRAME MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT LONG1
BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET
BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET BINPERSID GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""

#: What one step of a pickle may cost in memory, at most: an empty set is 216 bytes.
STEP = 256
#: A tensor's own size, without its data.
TENSOR = 1024
MAX_DIMS = 64
MAX_NAME = 500
SCALARS = (str, int, float, bool, bytes, complex, type(None))

_STORAGES = {1: "Byte Char Bool", 2: "Half BFloat16 Short", 4: "Float Int", 8: "Double Long ComplexFloat"}
#: Bytes per element.
STORAGES = {
    f"torch.{name}Storage": size
    for size, names in (_STORAGES | {16: "ComplexDouble"}).items()
    for name in names.split()
}
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


class Storage(NamedTuple):
    """Where tensors have their values: `numel` elements of `itemsize` bytes."""

    key: str
    numel: int
    itemsize: int


class _Name(NamedTuple):
    full: str


class _Dtype(NamedTuple):
    itemsize: int


class _Tensor: ...


class _Array: ...


class _Dict(dict[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_check_key(key), value)


class Walk(_PythonUnpickler):  # type: ignore[misc]
    """Follows the pickles of one file within one limit.

    Args:
        limit: bytes of memory that the pickles and the tensors they describe may take.

    Attributes:
        storages: what the tensors lie in, by key; whoever walks must check that the file has it.
        numpy: whether numpy's scalars or arrays occur.
    """

    encoding, errors = "utf-8", "surrogatepass"

    def __init__(self, limit: int) -> None:
        self.left = self.limit = limit
        self.storages: dict[str, Storage] = {}
        self.numpy = False

    def load(self, stream: BinaryIO) -> Any:
        """Walk one pickle; the stream is then behind it.

        Returns:
            The object, as far as it is plain data; stand-ins for the rest.

        Raises:
            CheckpointError: it wants to run something, asks for too much, or is damaged; without the file's name.
        """
        if not _METHODS:
            raise CheckpointError("is a pickle, which this Python cannot look into: save it as safetensors")
        self.stream, self.proto = stream, 0
        self.memo: dict[int, Any] = {}
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append
        try:
            while (code := self.read(1)) != pickle.STOP:
                self.charge(STEP)
                if code not in _METHODS:
                    raise ValueError(f"instruction {code!r}")
                _METHODS[code](self)
            result = self.stack.pop()
        except (AttributeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"is damaged or truncated: its pickle makes no sense ({error})") from error
        if self.proto != 2:
            raise CheckpointError(
                f"is a pickle of protocol {self.proto}; torch's safe reader takes torch.save's default, 2"
            )
        return result

    def charge(self, size: int) -> None:
        """Count bytes of memory, before they are taken."""
        self.left -= size
        if self.left < 0:
            raise CheckpointError(f"asks for more than {self.limit:,} bytes of memory, far beyond the file's own size")

    # What the standard library's methods for the instructions call, or would do otherwise: under its names.

    def read(self, size: int) -> bytes:
        self.charge(4 * size)  # a text with one rare character takes four bytes for each
        data = self.stream.read(size)
        if len(data) != size:
            raise EOFError("it ends in the middle")
        return data

    def readline(self) -> bytes:
        line = self.stream.readline(MAX_NAME)
        if not line.endswith(b"\n"):
            raise EOFError("a name without an end")
        return line

    def load_proto(self) -> None:
        self.proto = max(self.proto, self.read(1)[0])

    def load_frame(self) -> None:
        self.read(8)  # its size: what is in it can as well be read piece by piece

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def find_class(self, module: str, name: str) -> _Name:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in UNUSUAL:
            raise CheckpointError(f"holds {UNUSUAL[full]}; tomevit reads plain ones")
        if full not in ALLOWED:
            raise CheckpointError(f"wants to run {full}; tomevit reads only tensors and plain data")
        self.numpy |= module.startswith("numpy")
        return _Name(full)

    def persistent_load(self, pid: Any) -> Storage:
        tag, kind, key, location, numel, *view = _expect(pid, tuple)
        if (tag, type(key), type(location)) != ("storage", str, str) or view not in ([], [None]):
            raise TypeError("not a storage")
        storage = Storage(key, _check_size(numel), STORAGES[_expect(kind, _Name).full])
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key[:40]!r} described in two ways")
        return storage

    def load_reduce(self) -> None:
        args, name = _expect(self.stack.pop(), tuple), _expect(self.stack.pop(), _Name).full
        make, *kinds = ALLOWED[name] or (None,)
        if make is None or not all(map(_fits, args, kinds)):
            given = ", ".join(type(arg).__name__ for arg in args)
            raise CheckpointError(f"holds a {name} of ({given}), which tomevit does not read")
        self.append(make(self, *args))

    def load_newobj(self) -> None:
        args, name = _expect(self.stack.pop(), tuple), _expect(self.stack.pop(), _Name).full
        if (name, args) != ("argparse.Namespace", ()):
            raise CheckpointError(f"wants to make a {name}; tomevit reads only tensors and plain data")
        self.append(Namespace())

    def load_build(self) -> None:
        state = self.stack.pop()
        match self.stack[-1], state:
            case ((Namespace() | _Dict()), _Dict()):
                self._charge_attributes(state)
            case _Dtype(), (3, "<" | ">" | "|", None, None, None, -1, -1, 0):
                pass
            case _Array(), (1, tuple(shape), _Dtype(itemsize), bool(), bytes(data)):
                if self._count_elements(shape) * itemsize != len(data):
                    raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
                self.charge(TENSOR + len(data))
            case target, _:
                raise TypeError(f"state for a {type(target).__name__}")

    # What stands in for the results of the calls that a pickle may make.

    def _tensor(self, storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
        numel = self._count_elements(size)
        last = _check_size(offset) + sum((n - 1) * _check_size(step) for n, step in zip(size, stride, strict=True))
        if numel and last >= storage.numel:
            raise CheckpointError(f"holds a tensor of shape {size} that reaches beyond its {storage.numel} values")
        self.charge(TENSOR + numel * storage.itemsize)
        return _Tensor()

    def _parameter(self, tensor: _Tensor, _grad: bool, _hooks: Any, state: Mapping[Any, Any] = {}) -> _Tensor:
        self._charge_attributes(state)
        return tensor

    def _dict(self, pairs: Iterable[Any] = ()) -> _Dict:
        made = _Dict()
        for key, value in pairs:
            self.charge(STEP)
            made[key] = value
        return made

    def _set(self, items: list[Any]) -> set[Any]:
        self.charge(STEP * len(items))
        return {_check_key(item) for item in items}

    def _bytes(self, text: str, _encoding: str) -> bytes:
        self.charge(len(text))
        return text.encode("latin1")

    def _numpy_dtype(self, code: str, _align: bool, _copy: bool) -> _Dtype:
        if not re.fullmatch("[biuf][1248]", code):
            raise CheckpointError(f"holds numpy values of type {code[:20]!r}, which tomevit does not read")
        return _Dtype(int(code[1]))

    def _count_elements(self, shape: tuple[int, ...]) -> int:
        # Beside a dimension of 0, torch would take any other.
        if len(shape) > MAX_DIMS or any(_check_size(n) > self.limit for n in shape):
            raise CheckpointError("holds a tensor of an absurd shape")
        return math.prod(shape)

    def _torch_size(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        self.charge(8 * len(sizes))
        return tuple(map(_check_size, sizes))

    def _charge_attributes(self, state: Mapping[Any, Any]) -> None:
        if any(type(name) is not str or name.startswith("__") for name in state):
            raise TypeError("a wrong attribute")
        self.charge(STEP * len(state))


def _expect(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__.strip('_')}")
    return value


def _check_size(value: Any) -> int:
    if type(value) is not int or value < 0:
        # Never the values: of nested lists, a few bytes in a pickle, repr can make terabytes.
        raise ValueError("a size that is no count")
    return value


def _check_key(key: Any) -> Any:
    # Nothing nested: hashing a tuple a million deep would overflow the interpreter's stack.
    if type(key) in SCALARS or (type(key) is tuple and all(type(part) in SCALARS for part in key)):
        return key
    raise TypeError(f"a {type(key).__name__} as a key")


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) if isinstance(kind, type) else bool(value == kind)


_METHODS: dict[bytes, Callable[[Walk], None]] = {
    code: getattr(Walk, _PythonUnpickler.dispatch[code[0]].__name__)
    for code in (getattr(pickle, name) for name in INSTRUCTIONS.split())
    if hasattr(_PythonUnpickler, "dispatch")
}
NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
NUMPY_ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_DTYPES = [str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)]
#: Everything that a pickle may name: what makes a stand-in for the result of calling it, and the types or values of the
#: first arguments. What has neither may be named, but not called.
ALLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((*STORAGES, *_DTYPES, "argparse.Namespace", "numpy.ndarray"), ()),
    **dict.fromkeys(NUMPY_SCALAR, (lambda _, _dtype, value: value, _Dtype, bytes)),
    **dict.fromkeys(NUMPY_ARRAY, (lambda _, _type, _shape, _code: _Array(), _Name("numpy.ndarray"), (0,), b"b")),
    "_codecs.encode": (Walk._bytes, str, "latin1"),  # how protocol 2 writes bytes
    "builtins.complex": (lambda _, real, imaginary: complex(real, imaginary), float, float),
    "builtins.set": (Walk._set, list),
    "collections.Counter": (lambda walk, counts: walk._dict(counts.items()), dict),
    "collections.OrderedDict": (Walk._dict, list),  # empty, or as Python 2 wrote it
    "numpy.dtype": (Walk._numpy_dtype, str, bool, bool),
    "torch.Size": (Walk._torch_size, tuple),
    "torch.device": (lambda _, _kind, _index=0: _Name("torch.device"), str, int),
    "torch._utils._rebuild_parameter": (Walk._parameter, _Tensor, bool),
    "torch._utils._rebuild_parameter_with_state": (Walk._parameter, _Tensor, bool, object, dict),
    "torch._utils._rebuild_tensor": (Walk._tensor, Storage, int, tuple, tuple),
    "torch._utils._rebuild_tensor_v2": (Walk._tensor, Storage, int, tuple, tuple),
}
