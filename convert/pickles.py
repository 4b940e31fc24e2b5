"""Reads the pickle inside a PyTorch file as data: nothing that it names is imported or called.

Python's own pickle module runs what a file says. Here `pickletools` only splits the bytes into
instructions, and a small stack machine understands those that plain containers and tensors need. The
names in `_GLOBALS` stand for functions of this file; every other name or instruction is refused.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_pararnn.errors import PararnnError

from .wording import shown

MAX_PICKLE_BYTES = 256 << 20
_RESAVE = 'load it in PyTorch and save only the weights: torch.save(model.state_dict(), "weights.pt")'


@dataclass(frozen=True)
class StorageRef:
    """A run of numbers kept outside the pickle, in the record `data/<key>`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage; offset and strides count elements and stay inside `storage.numel`."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load_pickle(data: bytes, where: str) -> Any:
    """The value that `data` describes: dicts, lists, tuples, sets, scalars, strings and TensorRefs.

    Raises:
        PararnnError: it names or does anything else, or is damaged; the message begins with `where`.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise PararnnError(
            f"{where}: the pickle inside is {len(data)} bytes, too large to be a checkpoint's; {_RESAVE}"
        )
    machine = _Machine(where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
    except PararnnError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise PararnnError(
            f"{where}: the pickle inside is damaged; save or download the file again"
        ) from error
    return machine.result


@dataclass(frozen=True)
class _Global:
    """An allowed name; `call` is what stands in for calling it, None where it is never called."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: str | None = None


class _Mark:
    pass


_MARK = _Mark()
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "MARK": lambda: _MARK,
}  # fmt: skip


class _Machine:
    """The pickle stack machine, less everything that makes or changes an object of a class."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        # A dict: a list would let a file ask for a slot number of four billion.
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("PROTO", "FRAME"):
            pass
        else:
            action = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise self._refusal(
                    f"the pickle inside uses the instruction {name}, which makes Python objects"
                )
            action(argument)

    def _refusal(self, what: str) -> PararnnError:
        return PararnnError(f"{self.where}: {what}, and nothing in a checkpoint is ever run; {_RESAVE}")

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    # One method an instruction, called by its pickletools name; the argument is used by two of them.

    def _stop(self, _: Any) -> None:
        self.result = self.stack.pop()

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append({})
        _set_items(self.stack[-1], items)

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        _container(self.stack[-1], list).append(item)

    def _appends(self, _: Any) -> None:
        items = self._since_mark()
        _container(self.stack[-1], list).extend(items)

    def _setitem(self, _: Any) -> None:
        items = [self.stack.pop(), self.stack.pop()][::-1]
        _set_items(self.stack[-1], items)

    def _setitems(self, _: Any) -> None:
        items = self._since_mark()
        _set_items(self.stack[-1], items)

    def _additems(self, _: Any) -> None:
        items = self._since_mark()
        _container(self.stack[-1], set).update(_key(item) for item in items)

    def _frozenset(self, _: Any) -> None:
        self.stack.append({_key(item) for item in self._since_mark()})

    def _global(self, argument: str) -> None:
        self.stack.append(self._find(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError
        self.stack.append(self._find(module, name))

    def _find(self, module: str, name: str) -> _Global:
        found = _GLOBALS.get((module, name))
        if found:
            return found
        full = shown(f"{module}.{name}")
        if "qtensor" in name or name.startswith(("QInt", "QUInt", "qint", "quint")) or "quantized" in module:
            raise PararnnError(
                f"{self.where}: it holds quantized tensors ({full}), which cannot be converted; "
                'save the unquantized model: torch.save(model.state_dict(), "weights.pt")'
            )
        if module.startswith("torch.distributed") or name in (
            "_rebuild_from_type_v2",
            "_rebuild_wrapper_subclass",
        ):
            raise PararnnError(
                f"{self.where}: it holds DTensor values of a distributed run ({full}), which are not read "
                "yet; gather them in PyTorch with get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) and torch.save the result"
            )
        raise self._refusal(f"the pickle inside names {full}")

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or function.call is None or not isinstance(arguments, tuple):
            raise self._refusal("the pickle inside calls something that is not a function it may name")
        self.stack.append(function.call(arguments))

    def _build(self, _: Any) -> None:
        # torch gives a state dict's OrderedDict an attribute, `_metadata` (module versions): dropped.
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise self._refusal("the pickle inside sets the state of an object")

    def _binpersid(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", _Global(dtype=str() as dtype), str() as key, str(), int() as numel) if (
                numel >= 0 and not isinstance(numel, bool)
            ):
                self.stack.append(StorageRef(key, dtype, numel))
            case _:
                raise TypeError("not a storage")


def _container(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not a {kind.__name__}")
    return value


def _key(value: Any) -> Any:
    # Only scalars: hashing nested tuples that share their parts takes exponential time.
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError("not a scalar key")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    _container(target, dict)
    if len(items) % 2:
        raise ValueError("odd number of items")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 32:
        raise TypeError("not a shape")
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise ValueError("not a size")
    return tuple(value)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> TensorRef:
    storage = arguments[0]
    (offset,) = _sizes(arguments[1:2])
    shape, strides = _sizes(arguments[2]), _sizes(arguments[3])
    if not isinstance(storage, StorageRef) or len(shape) != len(strides):
        raise TypeError("not a tensor")
    numel, last = 1, offset
    for n, stride in zip(shape, strides, strict=True):
        numel *= n
        last += (n - 1) * stride
    # A view with more elements than its storage overlaps itself: no model has one, and it can be of any size.
    if numel > storage.numel or (numel and last >= storage.numel):
        raise ValueError("a tensor outside its storage")
    return TensorRef(storage, offset, shape, strides)


def _rebuild_parameter(arguments: tuple[Any, ...]) -> TensorRef:
    if not isinstance(arguments[0], TensorRef):
        raise TypeError("not a parameter")
    return arguments[0]


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise TypeError("an OrderedDict with arguments")
    return {}


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    return {_key(item) for item in _container(arguments[0], list)}


_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


def _allowed() -> dict[tuple[str, str], _Global]:
    entries = [
        ("collections", _Global("OrderedDict", _empty_dict)),
        ("torch._utils", _Global("_rebuild_tensor_v2", _rebuild_tensor)),
        ("torch._utils", _Global("_rebuild_parameter", _rebuild_parameter)),
        ("torch._utils", _Global("_rebuild_parameter_with_state", _rebuild_parameter)),
        ("torch", _Global("Size", lambda arguments: _sizes(arguments[0]))),
        ("torch", _Global("device", lambda arguments: ":".join(str(_key(part)) for part in arguments))),
        # Protocol 2, which torch writes, spells builtins as Python 2 did.
        *((module, _Global("set", _set)) for module in ("builtins", "__builtin__")),
        *(("torch", _Global(name, dtype=tag)) for name, tag in _STORAGES.items()),
        *(("torch", _Global(name)) for name in _DTYPE_NAMES),
    ]
    return {(module, entry.name): entry for module, entry in entries}


_GLOBALS = _allowed()
