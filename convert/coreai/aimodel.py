"""Writes the .aimodel: both functions in one program, each weight once."""

import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import coreai.authoring as core
import numpy as np
from coreai._compiler.ir import ArrayAttr, DictAttr, StringAttr
from coreai.runtime import AIModelAssetMetadata

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_config import ModelArgs

from ..package.constants import Stored, total_bytes
from ..package.form import Form, state_dtypes, state_shapes
from ..package.program import emit, input_shapes
from .graph_operations import CoreAI

# Says of a graph's argument that it is a state, and which output becomes its next value. coreai-core has no
# public name for it; tests/test_contract.py holds it to what it does.
STATE_ATTRIBUTE = "MutableBuffers.buffer_mutation"


def write_package(
    path: Path,
    args: ModelArgs,
    weights: Mapping[str, Stored],
    form: Form,
    tokens: Mapping[str, int],
    iterations: int,
    metadata: Mapping[str, Any],
    progress: Callable[[str, float], None],
) -> None:
    """Write the functions `tokens` (name -> tokens that it reads) to the folder `path`.

    Args:
        form: with the state in the graph.
        metadata: "author", "license", "description", and "custom": a dict of strings.
        progress: called with what is being done and the share of it that is.

    Raises:
        PararnnError: the cell's step uses what a Core AI program cannot do, or it could not be written.
        OSError: there is no room for it.
    """
    module = core.Module.create()
    with module:
        for done, (name, count) in enumerate(tokens.items()):
            progress("building", done / len(tokens))
            _add_function(name, args, weights, form, count, iterations)
    progress("writing the package", 0.0)
    about = AIModelAssetMetadata()
    about.author, about.license = metadata["author"], metadata["license"]
    about.model_description = metadata["description"]
    for key, value in metadata["custom"].items():
        about.set_custom(key, value)
    _check_room(path.parent, total_bytes(weights.values()) + (1 << 20) + (args.num_hidden_layers << 18))
    try:
        core.AIProgram(module).save_asset(path, metadata=about)
    except (OSError, RuntimeError) as error:
        raise PararnnError(
            f"{path.name} could not be written ({error.__cause__ or error}); make room in "
            f"{path.parent.parent}"
        ) from error


def _check_room(folder: Path, nbytes: int) -> None:
    """Raise OSError where a file of that size cannot be written: coreai-core's LLVM would end the process."""
    zeros = bytes(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(-(-nbytes // len(zeros))):
            file.write(zeros)


def _add_function(
    name: str,
    args: ModelArgs,
    weights: Mapping[str, Stored],
    form: Form,
    tokens: int,
    iterations: int,
) -> None:
    """Add a graph that reads `tokens` tokens to the module that is open."""
    inputs = {key: core.TensorType(s, np.int32, name=key) for key, s in input_shapes(args, tokens).items()}
    dtypes, shapes = state_dtypes(form), state_shapes(args)
    states = {key: core.TensorType(shape, dtypes[key], name=key) for key, shape in shapes.items()}
    logits = core.TensorType((1, 1, args.vocab_size), form.activations, name="logits")
    new = {key: core.TensorType(s, dtypes[key], name=f"{key}_out") for key, s in shapes.items()}

    def body(*variables: Any) -> tuple[Any, ...]:
        ops = CoreAI(form.activations)
        given = dict(zip([*inputs, *states], variables, strict=True))
        outputs = emit(args, weights, form, range(args.num_hidden_layers), iterations, ops, given)
        return (*outputs, *(ops.written[key] for key in states))

    # coreai-core reads a graph's arguments from its function's signature.
    taken = {**inputs, **states}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    body.__signature__ = inspect.Signature([inspect.Parameter(key, kind) for key in taken])  # type: ignore[attr-defined]
    body.__annotations__ = {key: Annotated[core.Value, spec] for key, spec in taken.items()}
    given_back = tuple(Annotated[core.Value, spec] for spec in (logits, *new.values()))
    body.__annotations__["return"] = tuple[given_back]  # type: ignore[valid-type]
    graph = core.graph(body, provided_name=name)
    _mark_states(graph, list(taken), {key: f"{key}_out" for key in states})


def _mark_states(graph: Any, names: list[str], becomes: Mapping[str, str]) -> None:
    """Let the arguments `becomes` be states, each of which becomes that output."""
    built = graph._callable
    marked = []
    for name, attributes in zip(names, built.arg_attrs, strict=True):
        known = {attribute.name: attribute.attr for attribute in attributes}
        if name in becomes:
            known[STATE_ATTRIBUTE] = StringAttr.get(becomes[name])
        marked.append(DictAttr.get(known))
    built.arg_attrs = ArrayAttr.get(marked)
