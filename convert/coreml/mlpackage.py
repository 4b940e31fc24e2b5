"""Writes the .mlpackage: both functions in one program, each weight once."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import coremltools as ct
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.converters.mil.mil.passes import pass_pipeline
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_config import ModelArgs

from ..package.constants import Stored
from ..package.form import Form, state_dtypes, state_shapes
from ..package.layouts import LAYOUTS
from ..package.program import emit, input_shapes
from .mil import MIL
from .require_coremltools import quiet

# Of coremltools' hundred passes those that a program built as it is meant to be needs: the others look for
# what frameworks write clumsily, and take minutes over the operations of a deep model's prefill.
_PASSES = [
    "common::const_elimination",
    "common::const_deduplication",
    "common::dead_code_elimination",
    "common::dedup_op_and_var_names",
]


def build_function(
    args: ModelArgs, weights: Mapping[str, Stored], form: Form, layers: range, tokens: int, iterations: int
) -> Any:
    """A MIL function of some layers that reads `tokens` tokens; more than one by so many Newton `iterations`.

    Raises:
        PararnnError: the cell's step uses what a Core ML program cannot do.
    """
    if layers.start:
        hidden = types.numpy_type_to_builtin_type(form.activations)
        inputs = {"hidden": mb.placeholder(LAYOUTS[form.layout].shape(args, tokens), hidden)}
    else:
        shapes = input_shapes(args, tokens)
        inputs = {name: mb.placeholder(shape, types.int32) for name, shape in shapes.items()}
    for name, shape in state_shapes(args).items():
        if form.graph_state:
            inputs[name] = mb.state_tensor_placeholder(shape, types.fp16)
        else:
            inputs[name] = mb.placeholder(shape, types.numpy_type_to_builtin_type(state_dtypes(form)[name]))
    with Function(inputs, ct.target.iOS18) as function:
        function.set_outputs(emit(args, weights, form, layers, iterations, MIL(), function.inputs))
    return function


def write_package(
    path: Path,
    functions: Mapping[str, Any],
    metadata: Mapping[str, Any],
    progress: Callable[[str, float], None],
) -> None:
    """Write MIL `functions` by name, the first of them the default, to the folder `path`.

    Args:
        metadata: "user" (a dict of strings), "author", "license", "description", "version".
        progress: called with what is being done and the share of it that is.

    Raises:
        PararnnError: there is no room for it, here or in the folder for temporary files.
    """
    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = True
    # What coremltools' own save_multifunction does to share weights, without two packages in between.
    PASS_REGISTRY["common::const_deduplication"]._deduplicate_const_across_functions(program)

    def passes(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        """In the place of coremltools' own progress bar."""
        items = list(items)
        for done, item in enumerate(items):
            progress("writing the package", done / len(items))
            yield item

    with quiet(), _explained_writing(), mock.patch.object(pass_pipeline, "tqdm", passes):
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,  # leave the types as they were built
            pass_pipeline=ct.PassPipeline(_PASSES),
            skip_model_load=True,
        )
        model.user_defined_metadata.update(metadata["user"])
        model.author, model.license = metadata["author"], metadata["license"]
        model.short_description, model.version = metadata["description"], metadata["version"]
        model.save(str(path))


@contextmanager
def _explained_writing() -> Iterator[None]:
    """coremltools writes a package among the temporary files and copies it; neither failure names a cause."""
    try:
        yield
    except (RuntimeError, shutil.Error) as error:
        if isinstance(error, RuntimeError) and "FileWriter" not in str(error):
            raise
        raise PararnnError(
            f"the package could not be written; make room in {tempfile.gettempdir()}, where coremltools "
            "writes it first (TMPDIR names another folder), and in the output's"
        ) from error
