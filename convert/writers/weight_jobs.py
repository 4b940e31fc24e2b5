"""From a family's outputs to what is written: checked for NaN, cast to the chosen format, quantized."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mlx_pararnn.errors import PararnnError

from ..families.base import Output
from ..readers.checkpoint import Checkpoint
from ..readers.dtypes import FLOATS, NAMES, TAGS, Array, all_finite, cast
from ..readers.tensors import Box, Piece, Tensor
from .quantize import Plan
from .safetensors_writer import Entry, Job


def finite(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with tensors that refuse NaN and inf when they are read."""

    def checked(tensor: Tensor) -> Tensor:
        load = tensor.load

        def finite(box: Box) -> Array:
            array = load(box)
            if tensor.dtype in FLOATS and not all_finite(array, tensor.dtype):
                raise PararnnError(
                    f"{checkpoint.path}: {tensor.name} holds NaN or infinite numbers; the training may have "
                    "diverged (--allow-nonfinite converts it all the same)"
                )
            return array

        return replace(tensor, load=finite)

    return replace(checkpoint, tensors={name: checked(tensor) for name, tensor in checkpoint.tensors.items()})


def weight_job(output: Output, dtype: str | None, plan: Plan, path: Path) -> Job:
    """How `output` is written; `path` is named where a number does not fit the format."""
    target = "F32" if output.dtype == "F64" else output.dtype
    if dtype is not None:
        target = "F32" if output.name.endswith("recurrent_weight") else TAGS[dtype]
    quantization = plan[output.name]

    def fitted(load: Piece) -> Array:
        piece = load()
        result = cast(piece, output.dtype, target)
        # NaN and infinities were looked for on reading: what is there now came from the cast.
        if (
            result is not piece
            and not all_finite(result, target)
            and _overflowed(piece, result, output, target)
        ):
            raise PararnnError(
                f"{path}: {output.name} holds numbers too large for {NAMES[target]}; convert with "
                "--dtype bfloat16 or float32"
            )
        return result

    def made(load: Piece) -> Sequence[Array]:
        numbers = fitted(load)
        if quantization is None:
            return [numbers]
        return quantization.quantized(numbers.reshape(-1, output.shape[-1]), target)

    def pieces() -> Iterator[Callable[[], Sequence[Array]]]:
        return (partial(made, piece) for piece in output.pieces())

    if quantization is None:
        entries: tuple[Entry, ...] = (Entry(output.name, output.shape, target),)
    else:
        entries = quantization.entries(output.name, output.shape, target)
    return Job(entries, pieces)


def formats(jobs: Iterable[Job]) -> tuple[str, ...]:
    """The number formats of what is written, most bytes first; packed and scale integers are not named."""
    sizes: dict[str, int] = {}
    for entry in (entry for job in jobs for entry in job.entries if entry.dtype in NAMES):
        sizes[NAMES[entry.dtype]] = sizes.get(NAMES[entry.dtype], 0) + entry.nbytes
    return tuple(sorted(sizes, key=lambda name: -sizes[name]))


def _overflowed(piece: Array, result: Array, output: Output, target: str) -> bool:
    before = np.isfinite(cast(piece, output.dtype, "F64"))
    return bool((before & ~np.isfinite(cast(result, target, "F64"))).any())
