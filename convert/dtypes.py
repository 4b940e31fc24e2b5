"""Number formats, named as safetensors names them, and exact casts between the floating ones.

numpy has no bfloat16: a BF16 array is the uint16 array of its bits.
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


def cast(array: Array, source: str, target: str) -> Array:
    """`array` of format `source` as `target`: rounded to nearest even, NaN kept, too large becomes inf."""
    if source == target:
        return array
    wide = widened(array, source)
    with np.errstate(over="ignore"):
        if target == "BF16":
            return _bfloat16_bits(wide.astype(np.float32))
        return wide.astype(STORED_AS[target])


def widened(array: Array, dtype: str) -> Array:
    """The same values in a format that numpy can compute with: float32, or float64 for F64."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array if dtype in ("F64", "F32") else array.astype(np.float32)


def all_finite(array: Array, dtype: str) -> bool:
    if dtype == "BF16":
        exponent = np.uint16(0x7F80)
        return not bool(np.any((array & exponent) == exponent))
    return bool(np.isfinite(array).all())


def _bfloat16_bits(array: Array) -> Array:
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    # Half of the last kept place, less one where the kept part is even: carries into it only past a half.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(array), quiet_nan, rounded).astype("<u2")
