"""Runs a saved .mlpackage in NumPy: what Core ML would be asked to compute, on any machine.

It reads what lies on disk, the protobuf program and weight.bin, with coremltools' message classes and nothing
else of coremltools, and shares no code with the exporter. An op that it does not know is an error.

Every function of a package is compiled once to a list of closures over a list of values: constants and
quantized weights are decoded then, and a step of a small model takes about a millisecond.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.proto import MIL_pb2 as MIL
from coremltools.proto import Model_pb2

from tests.support.coreml.mil_operations import DATA, MOVES, OPS

MODES = ("float64", "float32", "float16")

DTYPES = {
    MIL.FLOAT16: np.float16,
    MIL.FLOAT32: np.float32,
    MIL.BOOL: np.bool_,
    MIL.INT8: np.int8,
    MIL.UINT8: np.uint8,
    MIL.INT16: np.int16,
    MIL.UINT16: np.uint16,
    MIL.INT32: np.int32,
}
# bits, signed
PACKED = {
    MIL.UINT1: (1, False),
    MIL.UINT2: (2, False),
    MIL.UINT3: (3, False),
    MIL.UINT4: (4, False),
    MIL.UINT6: (6, False),
    MIL.INT4: (4, True),
}
FLOATS = (MIL.FLOAT16, MIL.FLOAT32)


# --- quantized weights, exactly in the type the program declares for them -----------------------------------


def blockwise_shift_scale(data, scale, offset=None):
    """scale * (data - offset), each scale for a block of data."""

    def spread(a):
        for axis, (n, blocks) in enumerate(zip(data.shape, a.shape, strict=True)):
            a = a.repeat(n // blocks, axis)
        return a

    shifted = data.astype(scale.dtype)
    if offset is not None:
        shifted = shifted - spread(offset).astype(scale.dtype)
    return spread(scale) * shifted


def lut_to_dense(indices, lut, vector_axis=None):
    """lut (*groups, 2^bits, 1): each group of indices has its own table."""
    if lut.shape[-1] != 1:
        raise NotImplementedError("constexpr_lut_to_dense with vectors")
    groups = [np.arange(n) // (n // g) for n, g in zip(indices.shape, lut.shape, strict=False)]
    return lut[(*np.ix_(*groups), indices, 0)]


CONSTEXPR: dict[str, Callable[..., np.ndarray]] = {
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
}


# --- the package --------------------------------------------------------------------------------------------


def shape_of(tensor_type):
    return tuple(d.constant.size for d in tensor_type.dimensions)


def unpack(raw, bits, signed, count):
    """`count` values of fewer than 8 bits, least significant first."""
    planes = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
    values = (planes << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    sign = 1 << bits - 1
    return (values ^ sign).astype(np.int8) - np.int8(sign) if signed else values


class Package:
    """A saved ML program.

    Attributes:
        spec: the protobuf message.
        functions: names of the functions; the default one is `default`.
        metadata: the author's own fields.
        weights_folder: where weight.bin lies.
    """

    def __init__(self, path):
        path = Path(path)
        manifest = json.loads((path / "Manifest.json").read_text())
        self._program_file = (
            path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        )
        self.weights_folder = self._program_file.parent / "weights"
        self.spec = Model_pb2.Model()
        self.spec.ParseFromString(self._program_file.read_bytes())
        self.functions = sorted(self.spec.mlProgram.functions)
        self.default = self.spec.description.defaultFunctionName or "main"
        self.metadata = dict(self.spec.description.metadata.userDefined)
        self._files: dict[str, np.ndarray] = {}
        self._cache: dict[tuple, Any] = {}

    def function(self, name=None, mode="float16"):
        """The function `name` in one of MODES, compiled once.

        float64, float32: every float in that type, nothing rounded in between. float16: what the program
        declares float16 is rounded to it after each op; products and sums are accumulated in float32.
        """
        key = ("function", name or self.default, mode)
        if key not in self._cache:
            self._cache[key] = Function(self, name or self.default, mode)
        return self._cache[key]

    def inputs(self, name=None):
        """The function's inputs and states as the program declares them."""
        return self.spec.mlProgram.functions[name or self.default].inputs

    def block(self, name=None):
        function = self.spec.mlProgram.functions[name or self.default]
        return function.block_specializations[function.opset]

    def op_types(self, name=None):
        """How often each op occurs in a function."""
        return Counter(op.type for op in self.block(name).operations)

    def constants(self, name=None):
        """Name -> value of each constant and each decompressed weight of a function, in its declared type."""
        found: dict[str, Any] = {}
        for op in self.block(name).operations:
            if op.type == "const":
                found[op.outputs[0].name] = self.decode(op.attributes["val"])
            elif op.type.startswith("constexpr_"):
                if op.type not in CONSTEXPR:
                    raise NotImplementedError(f"the interpreter does not know the op {op.type}")
                arguments = {
                    k: found[a.name] if a.WhichOneof("binding") == "name" else self.decode(a.value)
                    for k, (a,) in ((k, v.arguments) for k, v in op.inputs.items())
                }
                arguments |= {k: self.decode(v) for k, v in op.attributes.items() if k != "name"}
                key = (op.type, *sorted((k, id(v)) for k, v in arguments.items()))
                if key not in self._cache:  # kept with its arguments, so that nothing else gets their ids
                    self._cache[key] = (CONSTEXPR[op.type](**arguments), arguments)
                found[op.outputs[0].name] = self._cache[key][0]
        return found

    def decode(self, value):
        """A constant of the program as an array of its declared type, or as a string."""
        tensor_type = value.type.tensorType
        if value.WhichOneof("value") == "blobFileValue":
            key = ("blob", value.blobFileValue.fileName, value.blobFileValue.offset)
            if key not in self._cache:
                self._cache[key] = _array(self._record(*key[1:]), tensor_type)
            return self._cache[key]
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "strings":
            return tensor.strings.values[0]
        if kind == "bytes":
            return _array(np.frombuffer(tensor.bytes.values, np.uint8), tensor_type)
        values = getattr(tensor, kind).values if kind else np.zeros(shape_of(tensor_type))
        return np.array(values, DTYPES[tensor_type.dataType]).reshape(shape_of(tensor_type))

    def widened(self, array, dtype):
        """A float constant in the type that a mode computes with: one copy for all functions."""
        key = ("widened", id(array), dtype)
        if key not in self._cache:
            self._cache[key] = (array.astype(dtype), array)
        return self._cache[key][0]

    def _record(self, name, offset):
        # A record {u32 0xDEADBEEF, u32 type, u64 bytes, u64 where} stands at `offset`; the data is elsewhere.
        if name not in self._files:
            file = name.replace("@model_path", str(self._program_file.parent))
            self._files[name] = np.memmap(file, np.uint8, "r")
        blob = self._files[name]
        sentinel, _, size, start = struct.unpack("<IIQQ", blob[offset : offset + 24].tobytes())
        if sentinel != 0xDEADBEEF:
            raise ValueError(f"{name}: no weight record at {offset}")
        return np.array(blob[start : start + size])


def _array(raw, tensor_type):
    shape = shape_of(tensor_type)
    if tensor_type.dataType in PACKED:
        bits, signed = PACKED[tensor_type.dataType]
        return unpack(raw, bits, signed, math.prod(shape)).reshape(shape)
    return raw.view(DTYPES[tensor_type.dataType]).reshape(shape)


class Function:
    """One function of a package in one mode, ready to run.

    Attributes:
        inputs: name -> (shape, declared NumPy type).
        states: name -> shape; states are float16.
        outputs: names.
    """

    def __init__(self, package, name, mode):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}; choose one of {', '.join(MODES)}")
        self._mode = mode
        self._wide = np.float64 if mode == "float64" else np.float32
        self.inputs: dict[str, tuple] = {}
        self.states: dict[str, tuple] = {}
        self._values: list[Any] = []  # one place for each value of the program; constants stand in theirs
        self._places: dict[str, int] = {}
        self._steps: list[Callable[[list, dict], None]] = []
        self._round_input = {}
        for declared in package.inputs(name):
            if declared.type.WhichOneof("type") == "stateType":
                self.states[declared.name] = shape_of(declared.type.stateType.wrappedType.tensorType)
            else:
                tensor_type = declared.type.tensorType
                self.inputs[declared.name] = (shape_of(tensor_type), DTYPES[tensor_type.dataType])
                self._round_input[declared.name] = self._rounding(tensor_type.dataType)
                self._place(declared.name)
        block = package.block(name)
        self.outputs = list(block.outputs)
        self._constants = package.constants(name)
        for key, value in self._constants.items():
            is_float = isinstance(value, np.ndarray) and value.dtype.kind == "f"
            self._place(key, package.widened(value, self._wide) if is_float else value)
        for op in block.operations:
            if op.outputs and op.outputs[0].name in self._constants:
                continue
            try:
                self._steps.append(self._compiled(op, package))
            except Exception as error:
                error.add_note(f"in function {name}, op {op.type} giving {[o.name for o in op.outputs]}")
                raise
        del self._constants

    def new_state(self):
        """All states at zero, by name."""
        return {name: np.zeros(shape, self._wide) for name, shape in self.states.items()}

    def __call__(self, inputs, state=None):
        """Run once; returns the outputs by name, floats in the type that the mode computes with.

        Args:
            inputs: exactly the function's, by name, in their shapes.
            state: what `new_state` gave, of this function or of one with the same states; it is updated.
        """
        state = {} if state is None else state
        for given, own, what in ((inputs, self.inputs, "inputs"), (state, self.states, "states")):
            if set(given) != set(own):
                raise ValueError(f"{what} {sorted(given)}; the function takes {sorted(own)}")
        values = self._values.copy()
        for name, (shape, dtype) in self.inputs.items():
            array = np.asarray(inputs[name])
            if array.shape != shape or array.dtype.kind != np.dtype(dtype).kind:
                raise ValueError(
                    f"input {name}: {array.dtype}{array.shape}; the function takes {dtype}{shape}"
                )
            values[self._places[name]] = self._round_input[name](array)
        with np.errstate(all="ignore"):  # an overflow is an answer: infinity
            for step in self._steps:
                step(values, state)
        return {name: values[self._places[name]] for name in self.outputs}

    def _place(self, name, value=None):  # name None: a value that nothing else refers to
        self._places[name] = len(self._values)
        self._values.append(value)
        return self._places[name]

    def _rounding(self, data_type, rounded=False):
        """What makes an op's result a value of its declared type, as this mode holds it."""
        wide = self._wide
        if data_type not in FLOATS:
            return lambda y: np.asarray(y, DTYPES[data_type])
        if data_type == MIL.FLOAT16 and self._mode == "float16" and not rounded:
            return lambda y: np.asarray(y).astype(np.float16).astype(np.float32)
        return lambda y: np.asarray(y, wide)

    def _compiled(self, op, package):
        """An op as a function of all values and the states."""
        if op.type == "write_state":
            return self._write_state(op)
        if op.type == "read_state":
            return self._read_state(op)
        if op.type not in OPS:
            raise NotImplementedError(f"the interpreter does not know the op {op.type}")
        constant, places = {}, []
        arguments = [(k, list(v.arguments)) for k, v in op.inputs.items()]
        for key, bound in arguments:
            one = len(bound) == 1 and key != "values"
            inline = [package.decode(a.value) if a.WhichOneof("binding") == "value" else None for a in bound]
            if one and (inline[0] is not None or bound[0].name in self._constants):
                value = inline[0] if inline[0] is not None else self._values[self._places[bound[0].name]]
                constant[key] = self._setting(key, value)
            else:
                slots = [
                    self._places[a.name] if v is None else self._place(None, self._setting("values", v))
                    for a, v in zip(bound, inline, strict=True)
                ]
                places.append((key, slots[0] if one else slots))
        constant |= {k: self._setting(k, package.decode(v)) for k, v in op.attributes.items() if k != "name"}
        run = partial(OPS[op.type], **constant)
        outputs = [
            (
                self._place(o.name),
                shape_of(o.type.tensorType),
                self._rounding(o.type.tensorType.dataType, rounded=op.type in MOVES),
            )
            for o in op.outputs
        ]
        return _call(op.type, run, places, outputs)

    def _setting(self, key, value):
        """Floats and data stay arrays; what tells an op how to work becomes plain Python values."""
        if isinstance(value, str):
            return value
        if value.dtype.kind == "f":
            return value.astype(self._wide, copy=False)
        if key in DATA:
            return value
        return tuple(value.tolist()) if value.ndim else value.item()

    def _write_state(self, op):
        (state,), (source,) = (op.inputs[k].arguments for k in ("input", "data"))
        name, place, shape = state.name, self._places[source.name], self.states[state.name]

        def step(values, states):
            _check_shape("write_state", values[place], shape)
            states[name] = values[place]  # arrays are never written into: no copy is needed

        return step

    def _read_state(self, op):
        (state,) = op.inputs["input"].arguments
        name, place = state.name, self._place(op.outputs[0].name)

        def step(values, states):
            values[place] = states[name]

        return step


def _call(op_type, run, places, outputs):
    def step(values, states):
        arguments = {k: [values[i] for i in p] if type(p) is list else values[p] for k, p in places}
        results = run(**arguments)
        for (place, shape, rounded), y in zip(
            outputs, results if type(results) is list else (results,), strict=True
        ):
            _check_shape(op_type, y, shape)
            values[place] = rounded(y)

    return step


def _check_shape(op_type, y, declared):
    if y.shape != declared:
        raise ValueError(f"{op_type} gives {y.shape}; the program declares {declared}")
