"""The names that a checkpoint's pickle may use, and what stands in for each: data, never the thing itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .dtypes import STORED_AS


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


@dataclass(eq=False)
class Record:
    """An object that is only described: its class's name, what it was made from, the state it was given."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def get(self, field: str) -> Any:
        """A field of a state that is a dict; None where there is none."""
        return self.state.get(field) if isinstance(self.state, dict) else None


# The kind of a Record that stands for a tensor whose numbers cannot be had; its argument says what it is.
UNREADABLE_TENSOR = "unreadable tensor"
# Its argument for a view that repeats numbers (Tensor.expand): it can be of any size.
EXPANDED = "expanded"
QUANTIZED = "quantized"


@dataclass(frozen=True)
class Name:
    """An allowed name.

    Attributes:
        call: what stands in for calling it; None where it is never called.
        dtype: safetensors' tag, where it names a storage type.
        number: safetensors' tag, where it names a number format that only untyped storages hold.
        is_record: whether objects of it become a Record.
        is_foreign: whether it is of no library known here; what it makes of nothing is an empty dict, as a
            subclass of OrderedDict is.
    """

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: str | None = None
    number: str | None = None
    is_record: bool = False
    is_foreign: bool = False


class Unreadable(Exception):
    """A value that is well formed but cannot be had from this file; the message says why and what to do."""


def scalar_key(value: Any) -> Any:
    """`value`, which is a scalar, for use as a key or as a part of a text."""
    if value is not None and not isinstance(value, (str, bytes, int, float)):
        raise TypeError("not a scalar key")
    # Larger integers can be chosen to have one hash; each look-up then goes through all of them.
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise Unreadable(
            "the pickle inside has integers of more than 64 bits as keys, which is no checkpoint"
        )
    return value


def as_key(value: Any) -> Any:
    """What stands for `value` as a key of a dict or in a set."""
    if isinstance(value, (list, dict)):
        raise TypeError("not a key")
    if isinstance(value, Record):
        return value
    if value is None or isinstance(value, (str, bytes, int, float)):
        return scalar_key(value)
    # Nobody looks one up: hashing it is left out, which a file could make slow.
    return Record("key", (value,))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > 32:
        raise TypeError("not a shape")
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise ValueError("not a size")
    return tuple(value)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> "TensorRef | Record":
    storage = arguments[0]
    (offset,) = _sizes(arguments[1:2])
    shape, strides = _sizes(arguments[2]), _sizes(arguments[3])
    if not isinstance(storage, StorageRef) or len(shape) != len(strides):
        raise TypeError("not a tensor")
    if storage.dtype not in STORED_AS:
        return Record(UNREADABLE_TENSOR, (storage.dtype,))
    numel, last = 1, offset
    for n, stride in zip(shape, strides, strict=True):
        numel *= n
        last += (n - 1) * stride
    if numel and last >= storage.numel:
        raise ValueError("a tensor outside its storage")
    if numel > storage.numel:
        return Record(UNREADABLE_TENSOR, (EXPANDED,))
    return TensorRef(storage, offset, shape, strides)


def _rebuild_untyped(arguments: tuple[Any, ...]) -> "TensorRef | Record":
    """_rebuild_tensor_v3: the storage counts bytes, the number format is the seventh argument."""
    storage, kind = arguments[0], arguments[6]
    if not isinstance(storage, StorageRef) or storage.dtype != "U8" or not isinstance(kind, Name):
        raise TypeError("not a tensor")
    if kind.number not in STORED_AS:
        return Record(UNREADABLE_TENSOR, (kind.name,))
    numel = storage.numel // STORED_AS[kind.number].itemsize
    return _rebuild_tensor((StorageRef(storage.key, kind.number, numel), *arguments[1:6]))


def _unreadable_tensor(kind: str, _: tuple[Any, ...]) -> Record:
    return Record(UNREADABLE_TENSOR, (kind,))


def _rebuild_parameter(arguments: tuple[Any, ...]) -> "TensorRef | Record":
    if isinstance(arguments[0], Record) and arguments[0].kind == UNREADABLE_TENSOR:
        return arguments[0]
    if not isinstance(arguments[0], TensorRef):
        raise TypeError("not a parameter")
    return arguments[0]


def _rebuild_from_type(arguments: tuple[Any, ...]) -> "TensorRef | Record":
    """A tensor that has attributes of its own (nn.Buffer is one), which are passed over; or a DTensor."""
    function, kind, inner, _ = arguments
    if isinstance(kind, Name) and kind.name in ("Tensor", "Parameter", "Buffer"):
        plain = isinstance(function, Name) and function.name.startswith(("_rebuild_tensor", "_rebuild_param"))
        if not plain or function.call is None or not isinstance(inner, tuple):
            raise TypeError("not a tensor")
        return function.call(inner)
    return _rebuild_dtensor(arguments)


def _rebuild_dtensor(arguments: tuple[Any, ...]) -> TensorRef:
    """The local part of a DTensor, where it is all there is: on a mesh of one device.

    `arguments` are those of torch._tensor._rebuild_from_type_v2: function, class, its arguments, state.
    """
    function, kind, (_, _, size, *_), state = arguments
    if not (isinstance(function, Name) and function.name == "_rebuild_wrapper_subclass") or not (
        isinstance(kind, Name) and kind.name == "DTensor"
    ):
        raise Unreadable(
            "it holds tensors of a class of its own, which are not read; save plain tensors: "
            'torch.save({name: value.data for name, value in model.state_dict().items()}, "weights.pt")'
        )
    local, spec = state[1]["_local_tensor"], state[1]["_spec"]
    mesh = spec.get("mesh") if isinstance(spec, Record) else None
    # The ranks of the mesh: a tensor called `mesh` until torch 2.8, `_rank_map` since.
    ranks = (mesh.get("_rank_map") or mesh.get("mesh")) if isinstance(mesh, Record) else None
    devices = math.prod(ranks.shape) if isinstance(ranks, TensorRef) else 0
    if not isinstance(local, TensorRef):
        raise TypeError("not a DTensor")
    if devices != 1 or local.shape != _sizes(size):
        raise Unreadable(
            f"it holds DTensor values of a run on {devices or 'several'} devices, so this file has one "
            "rank's part of the weights only; gather them in PyTorch with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) and torch.save the result"
        )
    return local


def _path(arguments: tuple[Any, ...]) -> str:
    return "/".join(str(scalar_key(part)) for part in arguments)


def _memory_format(arguments: tuple[Any, ...]) -> str:
    """Python 3.11.0 to 3.11.3 write a member of an enumeration as getattr(class, name); .metadata has one."""
    match arguments:
        case (Name(name=kind), str() as member) if kind == _MEMORY_FORMAT:
            return member
    raise Unreadable(
        "the pickle inside names builtins.getattr, and nothing in a checkpoint is ever run; load it in "
        'PyTorch and save only the weights: torch.save(model.state_dict(), "weights.pt")'
    )


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise TypeError("an OrderedDict with arguments")
    return {}


def _default_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if len(arguments) > 1:
        raise TypeError("a defaultdict with items")
    return {}


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError("not a list")
    return value


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    return set(map(as_key, _list(arguments[0])))


_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    **dict.fromkeys(
        ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage"), QUANTIZED
    ),
}  # fmt: skip
# Formats that have no storage type of their own; those without a tag are known by name only.
_UNTYPED = {
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": None, "float8_e5m2fnuz": None, "float8_e8m0fnu": None, "float4_e2m1fn_x2": None,
    "complex32": None, "complex64": None, "complex128": None,
}  # fmt: skip
_UNREADABLE = {
    "_rebuild_sparse_tensor": "sparse", "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested", "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_qtensor": QUANTIZED,
}  # fmt: skip
# Values that stand beside the model in training checkpoints: kept as Records, never made.
_BESIDE = {
    "collections": ("Counter",),
    "_codecs": ("encode",),  # how protocol 2 writes bytes
    **dict.fromkeys(("builtins", "__builtin__"), ("bytearray", "complex")),
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar", "_reconstruct")),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
    "numpy": ("dtype",),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
}
# What defaultdict may make its values with; never called.
_FACTORIES = ("int", "float", "str", "bool", "list", "dict", "tuple")
_DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "qint8", "quint8", "qint32", "quint4x2", "quint2x4",
)  # fmt: skip

_DISTRIBUTED = "torch.distributed"
_MEMORY_FORMAT = "_MEM_FORMAT_ENCODING"  # an enumeration
# Objects of these are read as Records: what .metadata of torch.distributed.checkpoint and DTensors are made
# of, under every module that has been their home since torch 2.2.
_RECORDS = {
    f"{_DISTRIBUTED}.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    ),
    f"{_DISTRIBUTED}.checkpoint.filesystem": ("_StorageInfo",),
    f"{_DISTRIBUTED}.device_mesh": ("DeviceMesh",),
    f"{_DISTRIBUTED}._mesh_layout": ("_MeshLayout", "_FlatLayout"),
    **dict.fromkeys(
        (f"{_DISTRIBUTED}._tensor.placement_types", f"{_DISTRIBUTED}.tensor.placement_types",
         f"{_DISTRIBUTED}.tensor._dtensor_spec"),
        ("DTensorSpec", "TensorMeta", "ShardOrderEntry", "Shard", "Replicate", "Partial", "_Partial",
         "_StridedShard"),
    ),
}  # fmt: skip


def _allowed() -> dict[tuple[str, str], Name]:
    entries = [
        ("collections", Name("OrderedDict", _empty_dict)),
        ("torch._utils", Name("_rebuild_tensor_v2", _rebuild_tensor)),
        ("torch._utils", Name("_rebuild_tensor_v3", _rebuild_untyped)),
        *(
            ("torch._utils", Name(name, partial(_unreadable_tensor, kind)))
            for name, kind in _UNREADABLE.items()
        ),
        ("torch.storage", Name("UntypedStorage", dtype="U8")),
        ("torch", Name("UntypedStorage", dtype="U8")),
        *(("torch", Name(name, number=tag)) for name, tag in _UNTYPED.items()),
        *((module, Name("Tensor")) for module in ("torch", "torch._tensor")),
        *(("torch.nn.parameter", Name(name)) for name in ("Parameter", "Buffer")),
        *(("torch", Name(name)) for name in ("strided", "sparse_coo", "sparse_csr")),
        ("collections", Name("defaultdict", _default_dict)),
        ("argparse", Name("Namespace", is_record=True)),
        *((module, Name(name, partial(Record, name))) for module, names in _BESIDE.items() for name in names),
        *((module, Name(name)) for module in ("builtins", "__builtin__") for name in _FACTORIES),
        ("numpy", Name("ndarray")),
        ("torch._utils", Name("_rebuild_parameter", _rebuild_parameter)),
        ("torch._utils", Name("_rebuild_parameter_with_state", _rebuild_parameter)),
        ("torch", Name("Size", lambda arguments: _sizes(arguments[0]))),
        ("torch", Name("device", lambda arguments: ":".join(str(scalar_key(part)) for part in arguments))),
        ("torch._tensor", Name("_rebuild_from_type_v2", _rebuild_from_type)),
        ("torch._utils", Name("_rebuild_wrapper_subclass")),
        *((f"{_DISTRIBUTED}.{module}", Name("DTensor")) for module in ("tensor", "_tensor", "_tensor.api")),
        *((module, Name(name, is_record=True)) for module, names in _RECORDS.items() for name in names),
        # Enumerations and paths: their value is all that is kept of them, and not looked at.
        ("torch.serialization", Name("_get_layout", _path)),
        (f"{_DISTRIBUTED}.checkpoint.metadata", Name(_MEMORY_FORMAT, _path)),
        *((module, Name("getattr", _memory_format)) for module in ("builtins", "__builtin__")),
        *(
            (module, Name(f"{system}Path", _path))
            for module in ("pathlib", "pathlib._local")
            for system in ("Posix", "Windows")
        ),
        # Protocol 2, which torch writes, spells builtins as Python 2 did.
        *((module, Name("set", _set)) for module in ("builtins", "__builtin__")),
        *(("torch", Name(name, dtype=tag)) for name, tag in _STORAGES.items()),
        *(("torch", Name(name)) for name in _DTYPE_NAMES),
    ]
    return {(module, entry.name): entry for module, entry in entries}


ALLOWED = _allowed()
