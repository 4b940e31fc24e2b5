"""Number formats, named as safetensors names them, and exact casts between the floating ones.

numpy has no bfloat16: a BF16 array is the uint16 array of its bits. Work on large arrays goes in steps that
fit into a processor's cache: numpy makes a temporary array at every operation.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from .buffers import empty

Array = npt.NDArray[Any]

# tag -> the little-endian numpy type that holds its bytes
STORED_AS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TAGS = {name: tag for tag, name in NAMES.items()}

# The bits of infinity: those of NaN are larger, those of every other number smaller, sign apart.
_INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
_STEP = 1 << 15
_STRIP = 64


def cast(array: Array, source: str, target: str) -> Array:
    """`array` of format `source` as `target`: rounded to nearest even, NaN kept, too large becomes inf."""
    if source == target:
        return array
    wide = widened(array, source)
    with np.errstate(over="ignore"):
        if target == "BF16":
            return _bfloat16_bits(wide.astype(np.float32, copy=False))
        result = empty(wide.shape, STORED_AS[target])
        np.copyto(result, wide, casting="same_kind")
        return result


def widened(array: Array, dtype: str) -> Array:
    """The same values in a format that numpy can compute with: float32, or float64 for F64."""
    if dtype == "BF16":
        wide = empty(array.shape, np.uint32)
        np.left_shift(array, np.uint32(16), out=wide)
        return wide.view(np.float32)
    return array if dtype in ("F64", "F32") else array.astype(np.float32)


def all_finite(array: Array, dtype: str) -> bool:
    infinity = _INFINITY[dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(f"<u{STORED_AS[dtype].itemsize}")
    sign = bits.dtype.type(1 << (bits.itemsize * 8 - 1))
    return all(
        int((bits[start : start + _STEP] & ~sign).max()) < infinity for start in range(0, bits.size, _STEP)
    )


def transposed(array: Array, axes: tuple[int, ...]) -> Array:
    """`array` with its axes in another order, contiguous."""
    turned = array.transpose(axes)
    result = empty(turned.shape, array.dtype)
    # Strips that read and write whole cache lines: four times as fast as one assignment.
    for start in range(0, turned.shape[-1], _STRIP):
        result[..., start : start + _STRIP] = turned[..., start : start + _STRIP]
    return result


def _bfloat16_bits(array: Array) -> Array:
    flat = np.ascontiguousarray(array, "<f4").reshape(-1)
    result = empty(flat.shape, "<u2")
    for start in range(0, flat.size, _STEP):
        values = flat[start : start + _STEP]
        bits = values.view("<u4")
        # Half of the last kept place, less one where the kept part is even: carries only past a half.
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        nan = np.isnan(values)
        if nan.any():
            rounded[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x0040)  # a quiet one
        result[start : start + _STEP] = rounded
    return result.reshape(array.shape)
