"""A saved .mlpackage, its operations translated one by one and executed by Core AI's runtime.

It reads what interpreter.py reads. States go in and out of each call, wherever the package keeps them.
"""

import asyncio
import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import coreai.authoring as core
import numpy as np
from coreai.runtime import NDArray

from mlx_pararnn.convert.coreai.graph_operations import CoreAI
from mlx_pararnn.convert.coreai.runtime import _silent
from mlx_pararnn.convert.package.constants import Plain
from tests.support.coreml.interpreter import DTYPES, FLOATS, Package, shape_of
from tests.support.coreml.runner import Runner

# MIL's names of what CoreAI calls otherwise; what is called alike stands in neither.
NAMES = {
    "real_div": "divide",
    "pow": "power",
}


class Translated:
    """In the place of interpreter.py's Package, for `Runner`; use it as a context manager.

    Args:
        path: the .mlpackage.
        folder: an empty one.
        exact: all floats in float32; else each in the type that the package declares.
    """

    def __init__(self, path: Path, folder: Path, exact: bool) -> None:
        self.package, self._folder, self._exact = Package(path), folder, exact
        self._stack = ExitStack()

    def __enter__(self):
        module = core.Module.create()
        with module:
            for name in self.package.functions:
                self._add(name)
        self._loop = self._stack.enter_context(asyncio.Runner())
        opened = core.AIProgram(module).save_asset(self._folder / "translated.aimodel").executable()
        with _silent():
            self._model = self._loop.run(opened.__aenter__())
        self._stack.callback(lambda: self._loop.run(opened.__aexit__(None, None, None)))
        return self

    def __exit__(self, *_):
        self._model = None
        self._stack.close()

    def function(self, name, mode):
        with _silent():
            return Called(self, name, self._model.load_function(name))

    def declared(self, tensor_type):
        """A type of the package as the translation has it: shape, NumPy type."""
        wide = self._exact and tensor_type.dataType in FLOATS
        return shape_of(tensor_type), np.float32 if wide else DTYPES[tensor_type.dataType]

    def inputs(self, name):
        """Name -> declared, of the function's inputs and states."""
        found = {}
        for declared in self.package.inputs(name):
            is_state = declared.type.WhichOneof("type") == "stateType"
            tensor = (declared.type.stateType.wrappedType if is_state else declared.type).tensorType
            found[declared.name] = self.declared(tensor)
        return found

    def states(self, name):
        """Names of those that the program keeps."""
        return [i.name for i in self.package.inputs(name) if i.type.WhichOneof("type") == "stateType"]

    def _add(self, name):
        inputs, block = self.inputs(name), self.package.block(name)
        made = {o.name: o.type.tensorType for op in block.operations for o in op.outputs}
        outputs = {output: self.declared(made[output]) for output in block.outputs}
        outputs |= {f"{state}_new": inputs[state] for state in self.states(name)}

        def body(*variables):
            values = self._translate(name, dict(zip(inputs, variables, strict=True)))
            return tuple(values[output] for output in outputs)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(key, kind) for key in inputs])
        setattr(body, "__signature__", signature)  # noqa: B010 - no type knows it
        given = {k: Annotated[core.Value, core.TensorType(*v, name=k)] for k, v in (inputs | outputs).items()}
        body.__annotations__ = {key: given[key] for key in inputs}
        body.__annotations__["return"] = tuple.__class_getitem__(tuple(given[key] for key in outputs))
        core.graph(body, provided_name=name)

    def _translate(self, name, values):
        """Name -> variable or array of everything the function computes."""
        ops = CoreAI(np.float32 if self._exact else np.float16)
        constants = {k: self._typed(v) for k, v in self.package.constants(name).items()}
        values = constants | values
        states = {state: values[state] for state in self.states(name)}
        for op in self.package.block(name).operations:
            if op.outputs and op.outputs[0].name in constants:
                continue
            arguments = {}
            for key, bound in op.inputs.items():
                found = [
                    self._typed(self.package.decode(a.value)) if a.WhichOneof("binding") == "value" else
                    states[a.name] if a.name in states else values[a.name]
                    for a in bound.arguments
                ]  # fmt: skip
                arguments[key] = found if key == "values" else found[0]
            if op.type == "write_state":
                states[op.inputs["input"].arguments[0].name] = arguments["data"]
                continue
            if op.type == "cast":
                wide = self._exact or str(arguments["dtype"]) == "fp32"
                results = ops.cast(arguments["x"], np.float32 if wide else np.float16)
            else:
                results = _operation(ops, op.type, arguments)
            results = results if isinstance(results, list) else [results]
            for output, result in zip(op.outputs, results, strict=True):
                values[output.name] = result
        return values | {f"{state}_new": value for state, value in states.items()}

    def _typed(self, value):
        is_float = isinstance(value, np.ndarray) and value.dtype == np.float16
        return value.astype(np.float32) if is_float and self._exact else value


def _operation(ops, kind, a):
    """The variable, or variables, of an operation with the arguments `a`."""
    if kind in OPERATIONS:
        return OPERATIONS[kind](ops, a)
    second = [a[key] for key in ("y", "alpha") if key in a]
    return getattr(ops, NAMES.get(kind, kind))(a["x"], *second)


def _numbers(a, key):
    return [int(i) for i in np.atleast_1d(a[key])]


def _concat(ops, a):
    parts = [ops.constant(part) if isinstance(part, np.ndarray) else part for part in a["values"]]
    return ops.concat(parts, int(a["axis"]) % len(ops.shape(parts[0])))


def _matrix(ops, a, key):
    return ops.matrix(Plain(a[key]))


OPERATIONS = {
    "read_state": lambda ops, a: a["input"],
    "linear": lambda ops, a: ops.linear(a["x"], _matrix(ops, a, "weight"), a.get("bias")),
    "gather": lambda ops, a: ops.gather(_matrix(ops, a, "x"), a["indices"]),
    "matmul": lambda ops, a: ops.linear_by_head(a["x"], _matrix(ops, a, "y")),
    "conv": lambda ops, a: ops.convolve(a["x"], a["weight"], a.get("bias"), int(a["groups"])),
    "reduce_sum": lambda ops, a: ops.total(a["x"], *_numbers(a, "axes")),
    "reduce_mean": lambda ops, a: ops.mean(a["x"], *_numbers(a, "axes")),
    "reduce_max": lambda ops, a: ops.largest(a["x"], *_numbers(a, "axes")),
    "reduce_l2_norm": lambda ops, a: ops.length(a["x"], *_numbers(a, "axes")),
    "reshape": lambda ops, a: ops.reshape(a["x"], _numbers(a, "shape")),
    "transpose": lambda ops, a: ops.transpose(a["x"], _numbers(a, "perm")),
    "concat": _concat,
    "split": lambda ops, a: ops.split(a["x"], int(a["num_splits"]), int(a["axis"])),
    "slice_by_size": lambda ops, a: ops.slice(a["x"], _numbers(a, "begin"), _numbers(a, "size")),
    "pad": lambda ops, a: ops.pad(a["x"], _numbers(a, "pad"), a["constant_val"]),
    "gelu": lambda ops, a: ops.gelu(a["x"], exact=str(a["mode"]) == "EXACT"),
    "select": lambda ops, a: ops.select(a["cond"], a["a"], a["b"]),
    "rsqrt": lambda ops, a: ops.rsqrt(a["x"]),
}


class Called:
    """One function, as interpreter.py's Function is called."""

    def __init__(self, translated, name, function):
        self._all, self._function = translated, function
        self._inputs, self._states = translated.inputs(name), translated.states(name)

    def new_state(self):
        return {name: np.zeros(*self._inputs[name]) for name in self._states}

    def __call__(self, inputs, state=None):
        state = {} if state is None else state
        given = {k: NDArray(np.asarray(v, self._inputs[k][1])) for k, v in (inputs | state).items()}

        async def run():
            return await self._function(given)

        outputs = {k: np.array(v.numpy()) for k, v in self._all._loop.run(run()).items()}
        for name in self._states:
            state[name] = outputs.pop(f"{name}_new")
        return outputs


def runner(folder: Path, translated: Translated) -> Runner:
    """Reads texts by the translation of the package in an exported folder."""
    return Runner(folder, package=translated)
