"""A family made of a table: which tensors of a state dict each of the model's parameters is made of.

For checkpoints of one's own, with a cell of one's own or not (docs/python.md has an example).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mlx_pararnn.errors import PararnnError

from ..readers.checkpoint import Checkpoint
from ..readers.dtypes import Array
from ..readers.tensors import Tensor
from ..readers.wording import listed
from .base import Canonical, Output, Shape, Source, computed

# Names of tensors, joined along the gates, rows or first axis; or a function of arrays, then their names.
Names = str | tuple[str | Callable[..., Array], ...]

_EMBEDDING = "model.embed_tokens.weight"
_LAYER = "{}"
_NUMBER = re.compile(r"\{(?:([1-9]\d*|)n(?:\+(\d+))?)?\}")  # {}, {n}, {2n}, {2n+1}, ...: of layer n


@dataclass(frozen=True)
class NamedTensors:
    """Checkpoints whose tensors are found by a table of names.

    Several tensors for one parameter are joined: `input_proj.weight` and `bias` gate after gate, rows of
    `recurrent_weight` one below the other. Axes of length 1 may differ. Where that is not enough, the first
    element of the tuple is a function of the tensors (NumPy arrays, float32) that gives the parameter.

    Attributes:
        name: what `--family` takes.
        config: fields of config.json that no shape tells: cell, num_heads, mixer, norm, mlp, ...
        parameters: the model's parameter -> state-dict names; {} in both stands for the layer's number, in
            names {2n+1} for twice that and one, and so on. For a single cell: `input_proj.weight`, `bias` and
            `recurrent_weight`.
        title: what the model card calls it.
    """

    name: str
    config: Mapping[str, Any]
    parameters: Mapping[str, Names]
    title: str = "model described by a table of names"

    def detect(self, checkpoint: Checkpoint) -> bool:
        """Whether all tensors that the table names are there, of the first layer."""
        return all(
            _numbered(name, 0) in checkpoint.tensors
            for names in self.parameters.values()
            for name in _tensor_names(names)
        )

    def map(self, checkpoint: Checkpoint, tied: bool | None) -> Canonical:
        """The checkpoint by the table; raises PararnnError where the two do not fit."""
        source = Source(checkpoint, self.name)
        single = _EMBEDDING not in self.parameters
        layers = 1 if single else self._layer_count(checkpoint)
        table = {
            parameter.replace(_LAYER, str(layer)): _of_layer(names, layer)
            for layer in range(layers)
            for parameter, names in self.parameters.items()
        }
        found = {
            parameter: [source.take(name, _shape(checkpoint, name)) for name in _tensor_names(names)]
            for parameter, names in table.items()
        }
        source.check()
        args = self._cell_args(found) if single else self._model_args(found, layers, tied)
        expected = _parameter_shapes(args, single)
        unknown, lacking = [p for p in table if p not in expected], [p for p in expected if p not in table]
        if unknown or lacking:
            parts = [f"parameters that the model does not have: {listed(unknown)}"] if unknown else []
            parts += [f"parameters without a tensor: {listed(lacking)}"] if lacking else []
            raise PararnnError(f"the table of the family {self.name} names {'; '.join(parts)}")
        outputs = [
            _output(source, parameter, expected[parameter], names, found[parameter])
            for parameter, names in table.items()
        ]
        source.finish()
        return Canonical(args, outputs, model_type="pararnn_cell" if single else "pararnn")

    def _layer_count(self, checkpoint: Checkpoint) -> int:
        names = [n for names in self.parameters.values() for n in _tensor_names(names) if _NUMBER.search(n)]
        count = 0
        while any(_numbered(name, count) in checkpoint.tensors for name in names):
            count += 1
        return max(count, 1)

    def _cell_args(self, found: dict[str, list[Tensor]]) -> dict[str, Any]:
        heads = self.config.get("num_heads", 1)
        sizes = {
            "hidden_size": self._size(found, "recurrent_weight", -1, "hidden_size"),
            "input_size": self._input_size(found, heads),
        }
        return sizes | {"num_heads": heads, "activations": None} | self._checked_config(sizes)

    def _model_args(self, found: dict[str, list[Tensor]], layers: int, tied: bool | None) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            "vocab_size": self._size(found, _EMBEDDING, 0, "vocab_size"),
            "hidden_size": self._size(found, _EMBEDDING, -1, "hidden_size"),
            "num_hidden_layers": layers,
            "intermediate_size": self._size(
                found, "model.layers.0.mlp.down_proj.weight", -1, "intermediate_size"
            ),
            "tie_word_embeddings": "lm_head.weight" not in found,
        }
        if tied is not None and tied != sizes["tie_word_embeddings"]:
            raise PararnnError(
                f"--config says that tie_word_embeddings is {str(tied).lower()}, the table of the family "
                f"{self.name} {'has no' if tied is False else 'has an'} lm_head.weight"
            )
        if "model.embed_positions.weight" in found:
            sizes["max_position_embeddings"] = self._size(
                found, "model.embed_positions.weight", 0, "max_position_embeddings"
            )
        return {"num_heads": 1} | sizes | self._checked_config(sizes)

    def _checked_config(self, sizes: dict[str, Any]) -> dict[str, Any]:
        for name, size in sizes.items():
            if name in self.config and self.config[name] != size:
                raise PararnnError(
                    f"the table of the family {self.name} says {name} is {self.config[name]!r}, but the "
                    f"tensors say {size!r}"
                )
        if "cell" not in self.config:
            raise PararnnError(f"the table of the family {self.name} does not name a cell in its config")
        return dict(self.config)

    def _input_size(self, found: dict[str, list[Tensor]], heads: int) -> int:
        size = self._size(found, "input_proj.weight", -1, "input_size")
        return size if callable(self._names("input_proj.weight")[0]) else size * heads

    def _names(self, parameter: str) -> tuple[str | Callable[..., Array], ...]:
        names = self.parameters.get(parameter.replace("layers.0.", f"layers.{_LAYER}."), ())
        return (names,) if isinstance(names, str) else names

    def _size(self, found: dict[str, list[Tensor]], parameter: str, axis: int, field: str) -> int:
        """A size as a parameter's tensors have it; what a function makes is checked when it is made."""
        if callable(next(iter(self._names(parameter)), None)):
            if field not in self.config:
                raise PararnnError(
                    f"the table of the family {self.name}: {parameter} is made by a function, so config "
                    f"must say {field}"
                )
            return int(self.config[field])
        tensors = found.get(parameter)
        if not tensors or not tensors[0].shape:
            raise PararnnError(f"the table of the family {self.name} names no tensor for {parameter}")
        return tensors[0].shape[axis]


def _tensor_names(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else [name for name in names if isinstance(name, str)]


def _of_layer(names: Names, layer: int) -> Names:
    if isinstance(names, str):
        return _numbered(names, layer)
    return tuple(_numbered(n, layer) if isinstance(n, str) else n for n in names)


def _numbered(name: str, layer: int) -> str:
    return _NUMBER.sub(lambda found: str(int(found[1] or 1) * layer + int(found[2] or 0)), name)


def _shape(checkpoint: Checkpoint, name: str) -> Shape:
    tensor = checkpoint.tensors.get(name)
    return tensor.shape if tensor else ()


def _parameter_shapes(args: dict[str, Any], single: bool) -> dict[str, Shape]:
    from mlx.utils import tree_flatten  # slow, and needed for such a table alone

    from mlx_pararnn.blocks import RecurrentLayer
    from mlx_pararnn.model import Model
    from mlx_pararnn.model_config import ModelArgs

    model: Any
    if single:
        model = RecurrentLayer(
            args["cell"], args["input_size"], args["hidden_size"], args["num_heads"], args["activations"]
        )
    else:
        model = Model(ModelArgs.from_dict(args))
    return {name: tuple(array.shape) for name, array in cast(Any, tree_flatten(model.parameters()))}


def _output(source: Source, parameter: str, shape: Shape, names: Names, tensors: list[Tensor]) -> Output:
    first = None if isinstance(names, str) else names[0]
    if callable(first):
        return computed(parameter, shape, tensors, _called(first, parameter, shape), widen=True)
    if len(tensors) == 1 and _squeezed(tensors[0].shape) == _squeezed(shape):
        return Output(parameter, shape, tensors[0].dtype, tensors[0].pieces)
    axis, rows = _joining(parameter, tensors)
    joined = _joined_shape([_rows(t.shape) if rows else t.shape for t in tensors], axis)
    if joined is None or _squeezed(joined) != _squeezed(shape):
        source.misfit(parameter, f"tensors of shapes {', '.join(str(t.shape) for t in tensors)}", str(shape))

    def join(*arrays: Array) -> Array:
        return np.concatenate([a.reshape(_rows(a.shape)) if rows else a for a in arrays], axis=axis)

    return computed(parameter, shape, tensors, join)


def _called(function: Callable[..., Array], parameter: str, shape: Shape) -> Callable[..., Array]:
    def call(*arrays: Array) -> Array:
        try:
            made = np.ascontiguousarray(function(*arrays), np.float32)
        except Exception as error:  # the function is the user's: it may fail in any way
            raise PararnnError(f"{parameter}: {type(error).__name__} in its function: {error}") from error
        if made.shape != shape:
            raise PararnnError(f"{parameter}: its function gave {made.shape}, expected {shape}")
        return made

    return call


def _joining(parameter: str, tensors: list[Tensor]) -> tuple[int, bool]:
    """The axis along which a parameter's tensors are joined, and whether vectors are rows of it."""
    if parameter.endswith("recurrent_weight"):
        return 0, True
    if parameter.endswith("input_proj.weight"):
        return -2, False
    return -1 if parameter == "bias" or parameter.endswith("cell.bias") else 0, False


def _rows(shape: Shape) -> Shape:
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _joined_shape(shapes: list[Shape], axis: int) -> Shape | None:
    """The shape of the arrays joined; None where they cannot be."""
    if len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) < max(axis + 1, -axis):
        return None
    place = axis % len(shapes[0])
    if len({(*shape[:place], *shape[place + 1 :]) for shape in shapes}) != 1:
        return None
    return (*shapes[0][:place], sum(shape[place] for shape in shapes), *shapes[0][place + 1 :])


def _squeezed(shape: Shape) -> Shape:
    return tuple(length for length in shape if length != 1)
