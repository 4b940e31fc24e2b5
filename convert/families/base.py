"""What a family file is made of: the canonical model, and a record of which source tensors were used."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from ..readers.dtypes import FLOATS, STORED_AS, Array, cast, transposed, widened
from ..readers.tensors import Box, Piece, Tensor, boxes
from ..readers.wording import listed, shape_text, shown
from .names import family_names

Shape = tuple[int, ...]
Pieces = Callable[[], Iterable[Piece]]


@dataclass(frozen=True)
class Output:
    """One tensor of the MLX model: what `pieces` yields read its numbers in C order, in format `dtype`."""

    name: str
    shape: Shape
    dtype: str
    pieces: Pieces = field(repr=False)


@dataclass
class Canonical:
    """A checkpoint in the names and layouts of `mlx_pararnn.model`.

    Attributes:
        args: config.json without model_type and token ids.
        notes: sentences for the model card about what was changed (clamps baked in).
    """

    args: dict[str, Any]
    outputs: list[Output]
    notes: list[str] = field(default_factory=list)
    model_type: str = "pararnn"


class Family(Protocol):
    """A source of checkpoints: recognises its names and maps them.

    `title` is for people; `name` is what `--family` takes. Entry points of the group
    `mlx_pararnn.families` name an object of this kind.
    """

    name: str
    title: str

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is of this family."""

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        """`tied` is what the user says about the output head; None: find out."""
        ...


class Source:
    """A checkpoint's tensors while a family takes them; all that does not fit is told at once.

    `prefix` is cut off the checkpoint's names where it stands.
    """

    def __init__(self, checkpoint: Checkpoint, family: str, prefix: str = "") -> None:
        self.checkpoint = checkpoint
        self.family = family
        self.prefix = prefix
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in checkpoint.tensors.items():
            if self._tensors.setdefault(name.removeprefix(prefix), tensor) is not tensor:
                raise PararnnError(
                    f"{checkpoint.path}: {shown(name)} is there with and without the prefix {prefix}"
                )
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._misshapen: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str, ndim: int) -> Shape:
        """The shape of a tensor that sizes are read from.

        Raises:
            PararnnError: it is missing or has another number of axes.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            self._missing.append(name)
        elif len(tensor.shape) != ndim or 0 in tensor.shape:
            self._misshapen.append(f"{name} is {shape_text(tensor.shape)}, expected {ndim} axes, none empty")
        else:
            return tensor.shape
        # Without it no other shape can be judged.
        raise self._error()

    def take(self, name: str, shape: Shape) -> Tensor:
        """The tensor called `name`; where it is missing or not of `shape`, zeros, and `finish` raises."""
        self._taken.add(name)
        tensor = self._tensors.get(name)
        if tensor is None:
            self._missing.append(name)
        elif tensor.shape != shape:
            self._misshapen.append(f"{name} is {shape_text(tensor.shape)}, expected {shape_text(shape)}")
        elif tensor.dtype not in FLOATS:
            raise PararnnError(
                f"{self.checkpoint.path}: {shown(name)} holds {tensor.dtype} numbers, not floating-point "
                "weights; quantized checkpoints cannot be converted, save the unquantized model"
            )
        else:
            return tensor
        return Tensor(
            name, shape, "F32", lambda box: np.zeros([stop - start for start, stop in box], np.float32)
        )

    def misfit(self, name: str, found: str, expected: str) -> None:
        """Note a contradiction between tensors that each have a possible shape; `finish` will raise."""
        self._misshapen.append(f"{name} has {found}, expected {expected}")

    def block_count(self, prefix: str = "blocks.") -> int:
        """How many different indices follow `prefix`; never the largest, which a file may choose freely."""
        rests = (name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix))
        return len({rest.split(".")[0] for rest in rests if rest.split(".")[0].isdecimal()})

    def check(self) -> None:
        """Raise if anything taken so far was missing or misshapen."""
        if self._missing or self._misshapen:
            raise self._error()

    def finish(self) -> None:
        """Raise if anything was missing, misshapen or never taken."""
        self.check()
        if self._surplus():
            raise self._error()

    def _surplus(self) -> list[str]:
        return [name for name in self._tensors if name not in self._taken]

    def _error(self) -> PararnnError:
        parts = [f"missing ({len(self._missing)}): {listed(self._missing)}"] if self._missing else []
        if self._misshapen:
            parts.append(f"wrong shape ({len(self._misshapen)}): {listed(self._misshapen)}")
        surplus = self._surplus() if self._taken else []
        if surplus:
            parts.append(f"not expected ({len(surplus)}): {listed(surplus)}")
        return PararnnError(
            f"{self.checkpoint.path}: it does not fit the family {self.family} (families considered: "
            f"{', '.join(family_names())}); {'; '.join(parts)}"
        )


def copied(name: str, tensor: Tensor) -> Output:
    """`tensor` under a new name, read some rows at a time."""
    return Output(name, tensor.shape, tensor.dtype, tensor.pieces)


def computed(
    name: str, shape: Shape, tensors: Sequence[Tensor], compute: Callable[..., Array], widen: bool = False
) -> Output:
    """What `compute` makes of small tensors; with `widen` it sees float32 instead of stored bits.

    Formats that differ are brought to F32 first.
    """
    kinds = {tensor.dtype for tensor in tensors}
    dtype = kinds.pop() if len(kinds) == 1 else "F32"

    def whole() -> Array:
        arrays = [cast(tensor.read(), tensor.dtype, dtype) for tensor in tensors]
        if not widen:
            return compute(*arrays).reshape(shape)
        wide = compute(*(widened(array, dtype) for array in arrays)).reshape(shape)
        return cast(wide, "F64" if dtype == "F64" else "F32", dtype)

    return Output(name, shape, dtype, lambda: [whole])


def head_outputs(
    source: Source, embedding: str, head: str, tied: bool | None, source_says_tied: bool | None, shape: Shape
) -> tuple[list[Output], bool]:
    """The output head where it is a matrix of its own, and whether it is the embedding's.

    `tied` is the user's word, `source_says_tied` the source's (None: nothing said, equal weights mean tied).

    Raises:
        PararnnError: the weights differ where they are said to be tied.
    """
    if head not in source:
        if tied is False:
            raise PararnnError(
                f"{source.checkpoint.path}: there is no {head}, so tie_word_embeddings cannot be false in "
                "--config"
            )
        if source_says_tied is not False:
            return [], True
    matrix = source.take(head, shape)
    if tied is False or (tied is None and source_says_tied is False):
        return [copied("lm_head.weight", matrix)], False
    embedded = source.take(embedding, shape)
    source.check()
    same = _same_values(source, embedding, head, embedded, matrix)
    if not same and tied is None and source_says_tied is None:
        return [copied("lm_head.weight", matrix)], False
    if not same:
        raise PararnnError(
            f"{source.checkpoint.path}: {head} and {embedding} are tied in this family but differ here; "
            "if the model was trained untied, pass --config with a file that says "
            '{"tie_word_embeddings": false}'
        )
    return [], True


def _same_values(source: Source, first: str, second: str, a: Tensor, b: Tensor) -> bool:
    tied = source.checkpoint.tied
    names = [
        source.prefix + name if source.prefix + name in source.checkpoint.tensors else name
        for name in (first, second)
    ]
    if tied.get(names[1], names[1]) == tied.get(names[0], names[0]):
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if source.checkpoint.headers_only:
        return True
    return all(np.array_equal(_bits(x()), _bits(y())) for x, y in zip(a.pieces(), b.pieces(), strict=True))


def _bits(array: Array) -> Array:
    return array.view(f"<u{array.dtype.itemsize}")


def permuted(name: str, tensor: Tensor, axes: tuple[int, ...], shape: Shape) -> Output:
    """`tensor` with its axes in another order, then seen as `shape`; read and turned a box at a time."""
    moved = tuple(tensor.shape[axis] for axis in axes)

    def piece(box: Box) -> Array:
        before = dict(zip(axes, box, strict=True))
        return transposed(tensor.load(tuple(before[axis] for axis in range(len(axes)))), axes)

    itemsize = STORED_AS[tensor.dtype].itemsize
    return Output(name, shape, tensor.dtype, lambda: (partial(piece, box) for box in boxes(moved, itemsize)))


def element_count(outputs: Iterable[Output]) -> int:
    """How many numbers the outputs hold."""
    return sum(math.prod(output.shape) for output in outputs)
