"""Reads the pickle inside a PyTorch file as data: nothing that it names is imported or called.

Python's own pickle module runs what a file says. Here `pickletools` only splits the bytes into
instructions, and a small stack machine understands those that plain containers and tensors need. The
names it may meet are those of pickle_names.py. Of a class that is not in Python's library only an object
made of nothing is understood, as a subclass of OrderedDict is: it is read as a dict, and the class is not
looked for. Every other use of a name, and every other instruction, is refused.
"""

import pickletools
import sys
from collections.abc import Callable
from typing import Any

from mlx_pararnn.errors import PararnnError

from .budget import MAX_PICKLE_BYTES, VALUE_BYTES, Budget, OverBudget
from .pickle_names import ALLOWED, Name, Record, StorageRef, Unreadable, as_key
from .wording import shown

_RESAVE = 'load it in PyTorch and save only the weights: torch.save(model.state_dict(), "weights.pt")'


def load_pickle(data: bytes, where: str) -> Any:
    """The value that `data` describes: dicts, lists, tuples, sets, scalars, strings, TensorRefs and Records.

    Raises:
        PararnnError: it names or does anything else, or is damaged; the message begins with `where`.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise PararnnError(
            f"{where}: the pickle inside is {len(data)} bytes, too large to be a checkpoint's; {_RESAVE}"
        )
    machine = _Machine(where, len(data))
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
    except PararnnError:
        raise
    except Unreadable as error:
        raise PararnnError(f"{where}: {error}") from error
    except OverBudget as error:
        raise PararnnError(f"{where}: the pickle inside is too large: {error}; {_RESAVE}") from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise PararnnError(
            f"{where}: the pickle inside is damaged; save or download the file again"
        ) from error
    return machine.result


class _Mark:
    pass


_MARK = _Mark()
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "MARK": lambda: _MARK,
}  # fmt: skip


_SET_BYTES = 400
_CHARACTERS_AN_OPERATION = 16


class _Machine:
    """The pickle stack machine, less everything that makes or changes an object of a class."""

    def __init__(self, where: str, size: int) -> None:
        self.where = where
        self.budget = Budget(size)
        self.stack: list[Any] = []
        # A dict: a list would let a file ask for a slot number of four billion.
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        self.budget.spend(1, _SET_BYTES if name in ("EMPTY_SET", "FROZENSET") else VALUE_BYTES)
        if name in _VALUES:
            if isinstance(argument, (str, bytes, bytearray)):
                self.budget.spend(0, 4 * len(argument))
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            # Larger numbers, which a text may spell, can be chosen to have one hash.
            if not 0 <= argument < 1 << 32:
                raise ValueError("not a memo slot")
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
        _container(self.stack[-1], set).update(map(as_key, items))

    def _frozenset(self, _: Any) -> None:
        self.stack.append(set(map(as_key, self._since_mark())))

    def _global(self, argument: str) -> None:
        self.stack.append(self._find(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError
        self.budget.spend((len(module) + len(name)) // _CHARACTERS_AN_OPERATION, 0)
        self.stack.append(self._find(module, name))

    def _find(self, module: str, name: str) -> Name:
        found = ALLOWED.get((module, name))
        if found:
            return found
        full = shown(f"{module}.{name}")
        if "qtensor" in name or name.startswith(("QInt", "QUInt", "qint", "quint")) or "quantized" in module:
            raise PararnnError(
                f"{self.where}: it holds quantized tensors ({full}), which cannot be converted; "
                'save the unquantized model: torch.save(model.state_dict(), "weights.pt")'
            )
        if module.startswith("torch.distributed"):
            raise PararnnError(
                f"{self.where}: it holds values of a distributed run that are not plain DTensors ({full}); "
                "gather them in PyTorch with get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)) and torch.save the result"
            )
        if module.partition(".")[0] in sys.stdlib_module_names:
            raise self._refusal(f"the pickle inside names {full}")
        return Name(full, is_foreign=True)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Name) and function.is_foreign:
            if arguments != ():
                raise self._refusal(f"the pickle inside names {function.name}")
            self.stack.append({})
            return
        if not isinstance(function, Name) or function.call is None or not isinstance(arguments, tuple):
            raise self._refusal("the pickle inside calls something that is not a function it may name")
        # The same large arguments can be used many times.
        for value in (arguments, *arguments):
            if isinstance(value, str):  # an array of NumPy writes its bytes so
                self.budget.spend(len(value) // _CHARACTERS_AN_OPERATION, len(value))
            elif isinstance(value, (tuple, list)):
                self.budget.spend(len(value), VALUE_BYTES * len(value))
        self.stack.append(function.call(arguments))

    def _newobj(self, _: Any) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if isinstance(kind, Name) and kind.is_foreign:
            raise self._refusal(f"the pickle inside names {kind.name}")
        if not isinstance(kind, Name) or not kind.is_record or not isinstance(arguments, tuple):
            raise self._refusal("the pickle inside makes an object of a class that it may not")
        self.stack.append(Record(kind.name, arguments))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        # torch gives a state dict's OrderedDict an attribute, `_metadata` (module versions): dropped.
        elif not isinstance(self.stack[-1], dict):
            raise self._refusal("the pickle inside sets the state of an object")

    def _binpersid(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", Name(dtype=str() as dtype), str() as key, str(), int() as numel) if (
                numel >= 0 and not isinstance(numel, bool)
            ):
                self.stack.append(StorageRef(key, dtype, numel))
            case ("storage", *_):
                raise TypeError("not a storage")
            case _:
                raise self._refusal(
                    "the pickle inside asks for an object that is no tensor's storage (BINPERSID)"
                )


def _container(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not a {kind.__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    _container(target, dict)
    if len(items) % 2:
        raise ValueError("odd number of items")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[as_key(key)] = value
