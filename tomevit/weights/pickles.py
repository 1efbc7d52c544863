"""Read a torch checkpoint's pickle without doing anything it says.

A pickle is a program. `Walk` follows it with stand-ins for everything but plain data: nothing is imported, nothing
called, no tensor made. So hyper-parameters of any class may lie beside the weights, and none of their code runs;
torch's own safe reader (weights_only=True) refuses them, and allows bytearray(10**12).
"""

from __future__ import annotations

import math
import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

import torch

from tomevit.errors import CheckpointError

# The standard library's reader in Python: not documented, but a method for every instruction, found by a table, so that
# a subclass can replace some and leave out others. The documented one, in C, can be limited only in what it imports.
# A Python without it refuses pickles, and reads all else.
_PythonUnpickler: Any = getattr(pickle, "_Unpickler", object)
#: What torch.save uses; other protocols are followed as well, only to say what they want to run.
INSTRUCTIONS = """
PROTO FRAME MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT LONG1
BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET STRING
BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET BINPERSID GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""

#: How the names of classes begin that lie in a TorchScript archive.
SCRIPTED = "__torch__."
MAX_ARGUMENTS = 8  # of a call: a tensor's are 7
#: What one step of a pickle may cost in memory, at most: an empty set is 216 bytes.
STEP = 256
#: A tensor's own size, without its data.
TENSOR = 1024
MAX_DIMS = 64
MAX_NAME = 500

_QUANTIZED = {
    **dict.fromkeys(("UInt8", "UInt4x2", "UInt2x4"), torch.uint8),
    "Int8": torch.int8,
    "Int32": torch.int32,
}
STORAGES = {
    **dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), torch.uint8),
    **{f"torch.Q{kind}Storage": dtype for kind, dtype in _QUANTIZED.items()},
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.BoolStorage": torch.bool,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ShortStorage": torch.int16,
    "torch.FloatStorage": torch.float32,
    "torch.IntStorage": torch.int32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
#: Tensors that a vision transformer's weights are not.
UNUSUAL = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has a shape but no values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a special class",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a special class",
    "torch._utils._rebuild_tensor_v3": "a tensor of an unusual dtype (float8, or unsigned of 16 bits or more)",
}


#: What may be made although its code is not the checkpoint's own: hyper-parameters of the standard library, losses and
#: optimizers of torch, and the states of random generators. Nothing is made in truth; all else of these packages is a
#: sign of a hostile file.
HARMLESS = re.compile(
    r"pathlib(\._local)?\.\w*Path|datetime\.\w+|zoneinfo\.ZoneInfo(\._unpickle)?|decimal\.\w+|fractions\.\w+|uuid\.\w+"
    r"|ipaddress\.\w+|collections\.\w+|enum\.\w+|types\.(SimpleNamespace|GenericAlias|UnionType)|argparse\.Namespace"
    r"|dataclasses\.\w+|functools\.(partial|reduce)|copyreg\.\w+|array\.\w+|re\.(_compile|RegexFlag)|random\.Random"
    r"|http\.\w+|signal\.\w+|logging\.\w+|string\.Template|time\.struct_time|typing\.\w+|_?io\.(BytesIO|StringIO)"
    r"|inspect\._ParameterKind|calendar\.\w+|operator\.\w+getter"
    r"|builtins\.(frozenset|type|bytearray|slice|range|object|float|int|str|bool|list|tuple|dict|\w+(Error|Exception))"
    r"|numpy\.random\.\w+(\.\w+)?|torch(\._C)?\.Generator|torch\.serialization\._get_layout|torch\.distributed\.[\w.]+"
    r"|torch\.(nn|optim)\.[\w.]+|torch\.jit\._pickle\.\w+"
)
_NOT_THE_USERS = {*sys.stdlib_module_names, "torch", "numpy"}


class Storage(NamedTuple):
    """Where tensors have their values: `numel` elements of a dtype."""

    key: str
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor that lies within its storage; every element does."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class StoredArray:
    """A numpy array: what its values are, and their bytes; None until the pickle has said it."""

    content: tuple[tuple[int, ...], str, bool, bytes] | None = None  # shape, type, whether in Fortran's order, values


class _Name(NamedTuple):
    full: str


class _Dtype:
    def __init__(self, code: str) -> None:
        self.code = f"<{code}"

    @property
    def itemsize(self) -> int:
        return int(self.code[2])


class _Key:
    """Stands in for a key that is no text: its own hash could be chosen so that all are alike, which takes hours."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:  # never of what can hold itself, or the same a million times
        kind = type(self.value)
        return repr(self.value) if kind in (int, float, bool, type(None)) else f"a {kind.__name__}"


class _Dict(dict[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key if type(key) is str else _Key(key), value)


class Unknown(_Dict):
    """Stands in for an object whose class is code: nothing of it is kept but its items, if it is a dict.

    Of a module in a TorchScript archive, whose class lies in the archive, the attributes are kept as items.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def extend(self, items: list[Any]) -> None:
        """Where it is a list, what it holds is not kept."""

    append = extend


class Walk(_PythonUnpickler):  # type: ignore[misc]
    """Follows the pickles of one file within one limit.

    Args:
        limit: bytes of memory that the pickles and the tensors they describe may take.

    Attributes:
        storages: what the tensors lie in, by key; whoever walks must check that the file has it.
        module: the class of an nn.Module among the objects, in which weights may lie that are not looked for.
    """

    encoding, errors = "utf-8", "surrogatepass"

    def __init__(self, limit: int) -> None:
        self.left = self.limit = limit
        self.module: str | None = None
        self.storages: dict[str, Storage] = {}

    def load(self, stream: BinaryIO) -> Any:
        """Walk one pickle; the stream is then after it.

        Returns:
            The object, as far as it is plain data; of tensors and arrays where they lie; stand-ins for the rest.

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
                f"is a pickle of protocol {self.proto}; tomevit reads torch.save's default, 2: save it anew with that"
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
        # Protocol 2 writes the names that Python 2 had.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return _Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage | _Name:
        tag, kind, key, *rest = _expect_few(pid)
        if tag == "module":  # how torch.save wrote the class of a module before zip archives
            return _Name(_expect(kind, _Name).full)
        location, numel, *view = rest
        if (tag, type(key), type(location)) != ("storage", str, str) or view not in ([], [None]):
            raise TypeError("not a storage")
        storage = Storage(key, _check_size(numel), STORAGES[_expect(kind, _Name).full])
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key[:40]!r} described in two ways")
        return storage

    def load_reduce(self) -> None:
        args, name = _expect(self.stack.pop(), tuple), _expect(self.stack.pop(), _Name).full
        if name not in ALLOWED:
            self.append(_unknown(name))
            return
        args, (make, *kinds) = _expect_few(args), ALLOWED[name] or (None,)
        if make is None or not all(map(_fits, args, kinds)):
            given = ", ".join(type(arg).__name__ for arg in args)
            raise CheckpointError(f"holds a {name} of ({given}), which tomevit does not read")
        self.append(make(self, *args))

    def load_newobj(self) -> None:
        _, name = _expect(self.stack.pop(), tuple), _expect(self.stack.pop(), _Name).full
        self.append(_unknown(name))

    def load_build(self) -> None:
        state = self.stack.pop()
        match self.stack[-1], state:
            case Unknown() as made, _:
                if isinstance(state, _Dict) and state.keys() >= {"_parameters", "_modules"}:
                    self.module = made.name
                elif isinstance(state, _Dict) and made.name.startswith(SCRIPTED):
                    self.charge(STEP * len(state))
                    dict.update(made, state)  # a module's attributes: its weights, and the modules within
            case _Dict(), _Dict():
                pass  # attributes, such as _metadata of a state dict
            case _Dtype() as dtype, (3, "<" | ">" | "|" as order, None, None, None, -1, -1, 0):
                dtype.code = dtype.code.replace("<", order)
            case StoredArray() as array, (1, tuple(shape), _Dtype() as dtype, bool(fortran), bytes(data)):
                if self._count_elements(shape) * dtype.itemsize != len(data):
                    raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
                self.charge(TENSOR + len(data))
                array.content = shape, dtype.code, fortran, data
            case StoredArray(), (_, _, Unknown(), _, _):
                pass  # of strings, objects, dates
            case target, _:
                raise TypeError(f"state for a {type(target).__name__}")

    # What stands in for the results of the calls that a pickle may make.

    def _tensor(self, storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
        numel = self._count_elements(size)
        last = _check_size(offset) + sum((n - 1) * _check_size(step) for n, step in zip(size, stride, strict=True))
        if numel and last >= storage.numel:
            raise CheckpointError(f"holds a tensor of shape {size} that reaches beyond its {storage.numel} values")
        self.charge(TENSOR + numel * storage.dtype.itemsize)
        return StoredTensor(storage, offset, size, stride)

    def _attribute(self, owner: _Name, name: str) -> _Name:
        if len(owner.full) + len(name) > 2 * MAX_NAME:
            raise ValueError("a name without an end")
        return _Name(f"{owner.full}.{name}")

    def _dict(self, pairs: Iterable[Any] = ()) -> _Dict:
        made = _Dict()
        for key, value in pairs:
            self.charge(STEP)
            made[key] = value
        return made

    def _bytes(self, text: str, _encoding: str) -> bytes:
        self.charge(len(text))
        return text.encode("latin1")

    def _numpy_dtype(self, code: str, *_: Any) -> _Dtype | Unknown:
        return _Dtype(code) if re.fullmatch("[biuf][1248]", code) else Unknown("numpy.dtype")

    def _count_elements(self, shape: tuple[int, ...]) -> int:
        # Beside a dimension of 0, torch would take any other.
        if len(shape) > MAX_DIMS or any(_check_size(n) > self.limit for n in shape):
            raise CheckpointError("holds a tensor of an absurd shape")
        return math.prod(shape)

    def _torch_size(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        self.charge(8 * len(sizes))
        return tuple(map(_check_size, sizes))


def _unknown(name: str) -> Unknown:
    """What stands in for an object that only code can make.

    Raises:
        CheckpointError: the code is of Python's, torch's or numpy's, and not known to be harmless.
    """
    if name.partition(".")[0] in _NOT_THE_USERS and name not in UNUSUAL and not HARMLESS.fullmatch(name):
        raise refused(name)
    return Unknown(name)


def refused(name: str) -> CheckpointError:
    return CheckpointError(
        f"wants to run {name}; tomevit reads only tensors and plain data: whoever made the file can torch.save its "
        f"state dict alone"
    )


def _expect(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__.strip('_')}")
    return value


def _expect_few(values: Any) -> tuple[Any, ...]:
    if len(_expect(values, tuple)) > MAX_ARGUMENTS:  # each call would go through all of them
        raise ValueError(f"a call with {len(values):,} arguments")
    return tuple(values)


def _check_size(value: Any) -> int:
    if type(value) is not int or value < 0:
        # Never the values: of nested lists, a few bytes in a pickle, repr can make terabytes.
        raise ValueError("a size that is no count")
    return value


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) if isinstance(kind, type) else bool(value == kind)


_METHODS: dict[bytes, Callable[[Walk], None]] = {
    code: getattr(Walk, _PythonUnpickler.dispatch[code[0]].__name__)
    for code in (getattr(pickle, name) for name in INSTRUCTIONS.split())
    if hasattr(_PythonUnpickler, "dispatch")
}
_NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NUMPY_ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
#: What a pickle calls to make plain data: what makes the same, or a stand-in, and the types or values of the first
#: arguments. What has neither may be named, but not called.
ALLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(STORAGES, ()),
    **dict.fromkeys(_NUMPY_SCALAR, (lambda _, _dtype, value: value, object, object)),
    **dict.fromkeys(_NUMPY_ARRAY, (lambda _, _type, _shape, _code: StoredArray(), _Name("numpy.ndarray"), (0,), b"b")),
    "_codecs.encode": (Walk._bytes, str, "latin1"),  # how protocol 2 writes bytes
    "builtins.complex": (lambda _, real, imaginary: complex(real, imaginary), float, float),
    "builtins.getattr": (Walk._attribute, _Name, str),  # of a class: how some enums are written, and time zones
    "builtins.set": (lambda _, _items: Unknown("builtins.set"), list),
    "collections.Counter": (lambda walk, counts: walk._dict(counts.items()), dict),
    "collections.OrderedDict": (Walk._dict, list),  # empty, or as Python 2 wrote it
    "numpy.dtype": (Walk._numpy_dtype, str),
    "torch.Size": (Walk._torch_size, tuple),
    "torch.device": (lambda _, _kind, _index=0: _Name("torch.device"), str, int),
    "torch._utils._rebuild_parameter": (lambda _, tensor, _grad, _hooks: tensor, StoredTensor, bool),
    "torch._utils._rebuild_parameter_with_state": (
        lambda _, tensor, _grad, _hooks, _state: tensor,
        *(StoredTensor, bool, object, dict),
    ),
    "torch._utils._rebuild_tensor": (Walk._tensor, Storage, int, tuple, tuple),
    "torch._utils._rebuild_tensor_v2": (Walk._tensor, Storage, int, tuple, tuple),
}
