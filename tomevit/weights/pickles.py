"""Look at a torch checkpoint's pickle without doing anything it says.

A pickle is a program. `Walk` follows it with stand-ins for everything but plain data: nothing is imported, nothing
called, no tensor made. What it wants to run, and how much memory it asks for, is known before torch.load sees the file:
torch's own safe reader (weights_only=True) forbids foreign code too, but allows bytearray(10**12).
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from typing import Any, NamedTuple, Protocol

import torch

from tomevit.errors import CheckpointError


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
#: Everything that a pickle may name, beside storages and dtypes.
KNOWN = frozenset(
    {
        "argparse.Namespace",
        "builtins.complex",
        "builtins.set",
        "_codecs.encode",  # how protocol 2 writes bytes
        "collections.Counter",
        "collections.OrderedDict",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        *NUMPY_SCALAR,
        *NUMPY_ARRAY,
    }
)
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
NUMBERS = {
    pickle.BININT: "<i",
    pickle.BININT1: "<B",
    pickle.BININT2: "<H",
    pickle.BINFLOAT: ">d",
}
INDICES = {
    pickle.BINGET: "<B",
    pickle.LONG_BINGET: "<I",
    pickle.BINPUT: "<B",
    pickle.LONG_BINPUT: "<I",
}
STRINGS = {
    pickle.BINUNICODE: "<I",
    pickle.SHORT_BINSTRING: "<B",
    # Later protocols are followed as well, only to say what they want to run.
    pickle.SHORT_BINUNICODE: "<B",
    pickle.BINUNICODE8: "<Q",
}
BYTES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q"}
CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}


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
        try:
            return self._load(stream)
        except (AttributeError, EOFError, KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"is damaged or truncated: its pickle makes no sense ({error})") from error

    def _load(self, stream: Stream) -> Any:
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks under each mark
        memo: dict[int, Any] = {}
        protocol = 0
        while True:
            self._spend(STEP)
            op = _exactly(stream, 1)
            if op == pickle.PROTO:
                protocol = max(protocol, _exactly(stream, 1)[0])
            elif op == pickle.STOP:
                if protocol != 2:
                    raise CheckpointError(
                        f"is a pickle of protocol {protocol}; torch's safe reader takes torch.save's default, 2"
                    )
                return stack.pop()
            elif op == pickle.MARK:
                below.append(stack)
                stack = []
            elif op in CONSTANTS:
                stack.append(CONSTANTS[op])
            elif op in NUMBERS:
                stack.append(_number(stream, NUMBERS[op]))
            elif op == pickle.LONG1:
                stack.append(pickle.decode_long(_exactly(stream, _number(stream, "<B"))))
            elif op in STRINGS:
                stack.append(self._bytes(stream, _number(stream, STRINGS[op])).decode("utf-8", "surrogatepass"))
            elif op in BYTES:
                stack.append(self._bytes(stream, _number(stream, BYTES[op])))
            elif op == pickle.EMPTY_TUPLE:
                stack.append(())
            elif op == pickle.EMPTY_LIST:
                stack.append([])
            elif op == pickle.EMPTY_DICT:
                stack.append({})
            elif op == pickle.EMPTY_SET:
                stack.append(set())
            elif op in (pickle.BINGET, pickle.LONG_BINGET):
                stack.append(memo[_number(stream, INDICES[op])])
            elif op in (pickle.BINPUT, pickle.LONG_BINPUT):
                memo[_number(stream, INDICES[op])] = stack[-1]
            elif op in (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
                count = 1 + (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3).index(op)
                stack[-count:] = [tuple(stack[-count:])]
            elif op in (pickle.TUPLE, pickle.APPENDS, pickle.SETITEMS):
                items, stack = stack, below.pop()
                if op == pickle.TUPLE:
                    stack.append(tuple(items))
                elif op == pickle.APPENDS:
                    _expect(stack[-1], list).extend(items)
                else:
                    self._fill(stack[-1], zip(items[::2], items[1::2], strict=True))
            elif op == pickle.APPEND:
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            elif op == pickle.SETITEM:
                item, key = stack.pop(), stack.pop()
                self._fill(stack[-1], [(key, item)])
            elif op == pickle.GLOBAL:
                stack.append(self._name(_line(stream), _line(stream)))
            elif op == pickle.STACK_GLOBAL:
                name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                stack.append(self._name(module, name))
            elif op == pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif op == pickle.FRAME:
                _exactly(stream, 8)
            elif op == pickle.BINPERSID:
                stack.append(self._storage(*_expect(stack.pop(), tuple)))
            elif op in (pickle.REDUCE, pickle.NEWOBJ):
                args, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Name)
                stack.append(self._call(function.full, args, new=op == pickle.NEWOBJ))
            elif op == pickle.BUILD:
                state = stack.pop()
                self._set_state(stack[-1], state)
            else:
                raise ValueError(f"instruction {op!r}")

    def _spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise CheckpointError(f"asks for more than {self.limit:,} bytes of memory, far beyond the file's own size")

    def _bytes(self, stream: Stream, size: int) -> bytes:
        self._spend(size)
        return _exactly(stream, size)

    def _fill(self, target: Any, items: Any) -> None:
        if type(target) not in (dict, _OrderedDict):
            raise TypeError(f"items for a {type(target).__name__}")
        for key, value in items:
            target[_hashable(key)] = value

    def _name(self, module: str, name: str) -> _Name:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in UNUSUAL:
            raise CheckpointError(f"holds {UNUSUAL[full]}; tomevit reads plain ones")
        if full not in KNOWN and full not in STORAGES and full not in DTYPES:
            raise CheckpointError(f"wants to run {full}; tomevit reads only tensors and plain data")
        self.numpy |= module.startswith("numpy")
        return _Name(full)

    def _storage(self, tag: str, kind: _Name, key: str, location: str, numel: int, view: None = None) -> Storage:
        if (tag, type(key), type(location), view) != ("storage", str, str, None):
            raise TypeError("not a storage")
        storage = Storage(key, _size(numel), STORAGES[kind.full])
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key[:40]!r} described in two ways")
        return storage

    def _call(self, name: str, args: tuple[Any, ...], *, new: bool) -> Any:
        match name, args:
            case "argparse.Namespace", () if new:
                return _Namespace()
            case _ if new:
                raise CheckpointError(f"wants to make a {name}; tomevit reads only tensors and plain data")
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (
                storage,
                offset,
                size,
                stride,
                *_,
            ):
                return self._tensor(_expect(storage, Storage), offset, _expect(size, tuple), _expect(stride, tuple))
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, bool(), _):
                return tensor
            case "torch._utils._rebuild_parameter_with_state", (_Tensor() as tensor, bool(), _, dict(state)):
                _check_attributes(state)
                self._spend(STEP * len(state))
                return tensor
            case "collections.OrderedDict", ():
                return _OrderedDict()
            case "collections.OrderedDict", (list(pairs),):  # as Python 2 wrote it
                self._spend(STEP * len(pairs))
                return _OrderedDict({_hashable(key): value for key, value in pairs})
            case "collections.Counter", (dict(counts),):
                self._spend(STEP * len(counts))
                return _OrderedDict(counts)
            case "builtins.set", (list(items),):
                self._spend(STEP * len(items))
                return {_hashable(item) for item in items}
            case "builtins.complex", (float(real), float(imaginary)):
                return complex(real, imaginary)
            case "torch.Size", (tuple(sizes),):
                return tuple(map(_size, sizes))
            case "torch.device", (str(), *_):
                return _Name(name)
            case "_codecs.encode", (str(text), "latin1"):
                self._spend(len(text))
                return text.encode("latin1")
            case "numpy.dtype", (str(code), bool(), bool()) if re.fullmatch("[biuf][1248]", code):
                return _Dtype(int(code[1]))
            case _, (_Dtype(itemsize), bytes(value)) if name in NUMPY_SCALAR and len(value) == itemsize:
                return value
            case _, (_Name("numpy.ndarray"), (0,), b"b") if name in NUMPY_ARRAY:
                return _Array()
        kinds = ", ".join(type(arg).__name__ for arg in args)
        raise CheckpointError(f"holds a {name} of ({kinds}), which tomevit does not read")

    def _tensor(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> _Tensor:
        numel = self._numel(size)
        last = _size(offset) + sum((n - 1) * _size(step) for n, step in zip(size, stride, strict=True))
        if numel and last >= storage.numel:
            raise CheckpointError(f"holds a tensor of shape {size} that reaches beyond its {storage.numel} values")
        self._spend(TENSOR + numel * storage.itemsize)
        return _Tensor()

    def _numel(self, shape: tuple[int, ...]) -> int:
        # Beside a dimension of 0, torch would take any other.
        if len(shape) > MAX_DIMS or any(_size(n) > self.limit for n in shape):
            raise CheckpointError("holds a tensor of an absurd shape")
        return math.prod(shape)

    def _set_state(self, target: Any, state: Any) -> None:
        match target, state:
            case ((_Namespace() | _OrderedDict()), dict()):
                _check_attributes(state)
                self._spend(STEP * len(state))
            case _Dtype(), (3, "<" | ">" | "|", None, None, None, -1, -1, 0):
                pass
            case _Array(), (1, tuple(shape), _Dtype(itemsize), bool(), bytes(data)):
                if self._numel(shape) * itemsize != len(data):
                    raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
                self._spend(TENSOR + len(data))
            case _:
                raise TypeError(f"state for a {type(target).__name__}")


def _exactly(stream: Stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it ends in the middle")
    return data


def _number(stream: Stream, form: str) -> Any:
    return struct.unpack(form, _exactly(stream, struct.calcsize(form)))[0]


def _line(stream: Stream) -> str:
    line = b""
    while not line.endswith(b"\n"):
        if len(line) > 500:
            raise ValueError("a name without an end")
        line += _exactly(stream, 1)
    return line[:-1].decode()


def _expect(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__.strip('_')}")
    return value


def _size(value: Any) -> int:
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
