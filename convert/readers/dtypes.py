"""Number formats, named as safetensors names them, and exact casts between the floating ones.

numpy has no bfloat16: a BF16 array is the uint16 array of its bits. Work on large arrays goes in steps that
fit into a processor's cache: numpy makes a temporary array at every operation.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

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
# Shorter steps fit a cache better, but threads pass on Python's lock at each: measured the fastest.
_STEP = 1 << 17
_STRIP = 64


def cast(array: Array, source: str, target: str) -> Array:
    """`array` of format `source` as `target`: rounded to nearest even, NaN kept, too large becomes inf."""
    if source == target:
        return array
    wide = widened(array, source)
    with np.errstate(over="ignore"):
        if target == "BF16":
            return _bfloat16_bits(wide.astype(np.float32, copy=False))
        if target == "F16" and wide.dtype == np.float32:
            return _float16_bits(wide).view(np.float16)
        result = np.empty(wide.shape, STORED_AS[target])
        np.copyto(result, wide, casting="same_kind")
        return result


def widened(array: Array, dtype: str) -> Array:
    """The same values in a format that numpy can compute with: float32, or float64 for F64."""
    if dtype == "BF16":
        wide = np.empty(array.shape, np.uint32)
        np.left_shift(array, 16, out=wide, dtype=np.uint32)
        return wide.view(np.float32)
    return array if dtype in ("F64", "F32") else array.astype(np.float32)


def all_finite(array: Array, dtype: str) -> bool:
    """Whether an array in the stored format `dtype` holds neither NaN nor infinity."""
    infinity, itemsize = _INFINITY[dtype], STORED_AS[dtype].itemsize
    numbers = np.ascontiguousarray(array).reshape(-1)
    signed, unsigned = numbers.view(f"<i{itemsize}"), numbers.view(f"<u{itemsize}")
    for start in range(0, numbers.size, _STEP):
        # As signed integers the positive numbers are the largest, as unsigned ones the negative.
        positive = int(signed[start : start + _STEP].max())
        negative = int(unsigned[start : start + _STEP].max())
        if positive >= infinity or negative >= infinity + (1 << (8 * itemsize - 1)):
            return False
    return True


def transposed(array: Array, axes: tuple[int, ...]) -> Array:
    """`array` with its axes in another order, contiguous."""
    turned = array.transpose(axes)
    result = np.empty(turned.shape, array.dtype)
    # Strips that read and write whole cache lines: four times as fast as one assignment.
    for start in range(0, turned.shape[-1], _STRIP):
        result[..., start : start + _STRIP] = turned[..., start : start + _STRIP]
    return result


def _bfloat16_bits(array: Array) -> Array:
    flat, result = _flat(array)
    scratch = np.empty([_STEP], np.uint32)
    for start in range(0, flat.size, _STEP):
        values = flat[start : start + _STEP]
        bits, rounded = values.view(np.uint32), scratch[: values.size]
        # Half of the last kept place, less one where the kept part is even: carries only past a half.
        np.right_shift(bits, 16, out=rounded)
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        if not all_finite(values, "F32"):
            nan = np.isnan(values)
            rounded[nan] = (bits[nan] >> 16) | 0x0040  # a quiet one
        result[start : start + _STEP] = rounded
    return result.reshape(array.shape)


def _float16_bits(array: Array) -> Array:
    """As numpy's astype, which on x86-64 goes number by number and takes half as long again.

    With e the exponent of x, at least -14, float16's last place is 2^(e-10). |x| is added to 2^(e+13), whose
    last place as a float32 that is: so the sum is rounded to it, and its fraction counts k such places.
    float16's bits are ((e + 14) << 10) + k: k has the leading one that makes 14 into float16's bias of 15.
    """
    flat, result = _flat(array)
    scratch, more = np.empty([_STEP], np.uint32), np.empty([_STEP], np.uint32)
    # An array, for numpy takes three times as long to compare with a single number.
    least = np.full(min(_STEP, flat.size), (127 - 14) << 23, np.uint32)
    for start in range(0, flat.size, _STEP):
        values, out = flat[start : start + _STEP], result[start : start + _STEP]
        bits, power, total = values.view(np.uint32), scratch[: values.size], more[: values.size]
        np.bitwise_and(bits, 0x7F800000, out=power)
        if power.max() >= (127 + 16) << 23:
            out[...] = values.astype(np.float16).view(np.uint16)
            continue
        np.maximum(power, least[: values.size], out=power)
        # The count does not start at 0 but at what makes up for e's bits, added later: they stand for
        # e + 127 + 13, not e + 14. Only the lower 16 bits of the sum are kept.
        power += (13 << 23) + (-((127 + 13 - 14) << 10) & 0xFFFF)
        np.bitwise_and(bits, 0x7FFFFFFF, out=total)
        np.add(total.view(np.float32), power.view(np.float32), out=total.view(np.float32))
        power >>= 13
        total += power
        out[...] = total
        np.right_shift(bits, 16, out=power)
        sign = more.view(np.uint16)[: values.size]
        sign[...] = power
        sign &= 0x8000
        out |= sign
    return result.reshape(array.shape)


def _flat(array: Array) -> tuple[Array, Array]:
    """Float32 numbers in a row, and room for as many of 16 bits."""
    flat = np.ascontiguousarray(array, "<f4").reshape(-1)
    return flat, np.empty(flat.shape, np.uint16)
