"""`convert -q`: matrices to MLX's quantized formats, some rows at a time, with MLX's own mx.quantize.

Groups of weights run along a row, so blocks of rows give exactly what the whole matrix would. Which matrices
are quantized and what config.json says of them is as `mlx_lm.convert -q` does it, but for one thing: a matrix
whose rows the group size does not divide takes a smaller group size instead of staying float.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.quantization_formats import BITS, GROUP_SIZES, MODES

from ..families.base import Output
from ..readers.dtypes import Array
from .safetensors_writer import Entry

# What `Model.quant_predicate` says yes to; a test holds the two against each other.
_MATRICES = (
    "embed_tokens", "lm_head", "in_proj", "input_proj", "out_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How matrices are quantized; the fields are those of config.json's "quantization"."""

    group_size: int
    bits: int
    mode: str

    def for_width(self, width: int) -> "Quantization | None":
        """The same with the largest group size, no larger than this one, that divides `width`; or None."""
        sizes = GROUP_SIZES if self.mode == "affine" else (self.group_size,)
        # MLX unpacks 32 weights at a time, in nvfp4's groups of 16 too.
        fitting = [n for n in sizes if n <= self.group_size and width % n == 0 and width % 32 == 0]
        return replace(self, group_size=max(fitting)) if fitting else None

    def entries(self, name: str, shape: Sequence[int], dtype: str) -> tuple[Entry, ...]:
        """What stands for the matrix `name`: packed weights, scales and, for affine, biases."""
        path, rows, width = name.removesuffix("weight"), tuple(shape[:-1]), shape[-1]
        groups = (*rows, width // self.group_size)
        packed = Entry(name, (*rows, width * self.bits // 32), "U32")
        if self.mode != "affine":
            return packed, Entry(f"{path}scales", groups, "U8")
        return packed, Entry(f"{path}scales", groups, dtype), Entry(f"{path}biases", groups, dtype)

    def quantized(self, rows: Array, dtype: str) -> list[Array]:
        """Numbers of those entries for whole rows (n, width) of format `dtype`."""
        import mlx.core as mx

        # On the CPU everywhere: there each thread has a stream, and a core, of its own.
        matrix = mx.array(rows)
        if dtype == "BF16":
            matrix = matrix.view(mx.bfloat16, stream=mx.cpu)
        parts = mx.quantize(matrix, self.group_size, self.bits, mode=self.mode, stream=mx.cpu)
        mx.eval(parts)  # unlike what numpy would do, without Python's lock
        return [_numbers(part) for part in parts]


def quantization(bits: int | None, group_size: int | None, mode: str) -> Quantization:
    """The user's choice, completed by the mode's defaults.

    Raises:
        PararnnError: MLX has no such combination.
    """
    if mode not in MODES:
        raise PararnnError(f"quantization mode {mode!r}: choose one of {', '.join(MODES)}")
    own_size, own_bits = MODES[mode]
    chosen = Quantization(group_size or own_size, bits or own_bits, mode)
    if mode != "affine" and (chosen.group_size, chosen.bits) != (own_size, own_bits):
        raise PararnnError(
            f"quantization mode {mode} has {own_bits} bits and group size {own_size}, no others; leave out "
            "--q-bits and --q-group-size, or use --q-mode affine"
        )
    if mode == "affine" and (chosen.bits not in BITS or chosen.group_size not in GROUP_SIZES):
        raise PararnnError(
            f"{chosen.bits} bits in groups of {chosen.group_size}: MLX has bits {', '.join(map(str, BITS))} "
            f"and group sizes {', '.join(map(str, GROUP_SIZES))}"
        )
    return chosen


class Plan:
    """Which outputs are quantized and how: all of them float where nothing was asked for."""

    def __init__(self, outputs: Sequence[Output], asked: Quantization | None) -> None:
        self.asked = asked
        matrices = [output for output in outputs if is_matrix(output.name)] if asked else []
        self.chosen = {
            output.name: asked.for_width(output.shape[-1]) if asked else None for output in matrices
        }

    def __getitem__(self, name: str) -> Quantization | None:
        return self.chosen.get(name)

    def config(self) -> dict[str, Any]:
        """The fields for config.json: "quantization", and the same again under Hugging Face's name for it."""
        if self.asked is None:
            return {}
        fields: dict[str, Any] = asdict(self.asked)
        for name, chosen in self.chosen.items():
            if chosen and chosen != self.asked:
                fields[name.removesuffix(".weight")] = asdict(chosen)
        return {"quantization": fields, "quantization_config": fields}

    def exceptions(self) -> list[str]:
        """A phrase for every kind of matrix that is not quantized as asked."""
        counts: dict[str, int] = {}
        for name, chosen in self.chosen.items():
            if chosen == self.asked:
                continue
            kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
            became = f"in groups of {chosen.group_size}" if chosen else "left float"
            counts[f"{kind} {became}"] = counts.get(f"{kind} {became}", 0) + 1
        return [f"{phrase} ({count})" for phrase, count in counts.items()]


def _numbers(part: Any) -> Array:
    import mlx.core as mx

    return np.asarray(part.view(mx.uint16, stream=mx.cpu) if part.dtype == mx.bfloat16 else part)


def is_matrix(name: str) -> bool:
    """True for the weights that quantization packs: embedding, projections, MLP, head."""
    return name.endswith(tuple(f"{module}.weight" for module in _MATRICES))
