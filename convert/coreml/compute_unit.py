"""Runs a compiled package on one kind of processor in a process of its own: Core ML may hang, or end it.

python -m mlx_pararnn.convert.coreml.compute_unit FOLDER   (what FOLDER holds: see `run_on`)
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_pararnn.errors import PararnnError, one_line

from ..package.description import parts_of, prefills
from .require_coremltools import quiet

Array = npt.NDArray[Any]

# coremltools' names of the kinds of processors that a package may run on, and ours.
UNITS = {"CPU_ONLY": "CPU", "CPU_AND_GPU": "GPU", "CPU_AND_NE": "Neural Engine"}
_DEVICES = {
    "MLCPUComputeDevice": "CPU_ONLY",
    "MLGPUComputeDevice": "CPU_AND_GPU",
    "MLNeuralEngineComputeDevice": "CPU_AND_NE",
}
COMMAND = [sys.executable, "-m", "mlx_pararnn.convert.coreml.compute_unit"]
_ASKED, _ANSWERS, _PLACES = "asked.json", "answers.npy", "places.json"


def present_units() -> list[str]:
    """Those of `UNITS` that this machine has, by Core ML's own list of its devices."""
    from coremltools.models.compute_device import MLComputeDevice

    found = {_DEVICES.get(type(device).__name__) for device in MLComputeDevice.get_all_compute_devices()}
    return [unit for unit in UNITS if unit in found]


@contextmanager
def compiled(package: Path) -> Iterator[Path]:
    """A package, compiled once for all processors; removed afterwards.

    Raises:
        PararnnError: Core ML does not.
    """
    from coremltools.models.utils import compile_model

    with tempfile.TemporaryDirectory(prefix="mlx-pararnn-") as folder:
        try:
            with quiet():
                made = Path(compile_model(str(package), str(Path(folder, "model.mlmodelc"))))
        except Exception as error:  # Core ML has its own for each thing that may be wrong
            raise PararnnError(
                f"{package}: Core ML does not compile it ({one_line(error)}); export the model again"
            ) from error
        yield made


def run_on(
    unit: str, package: Path, settings: Mapping[str, Any], tokens: Array, seconds: float
) -> tuple[Array, dict[str, dict[str, int]]]:
    """What a runner's calls on `tokens` give on `unit`, as `read` has it; and where operations are placed.

    Args:
        package: compiled.
        settings: pararnn.json, checked.
        seconds: after which the process is ended.

    Returns:
        The answers, and by function how many of its operations Core ML prefers to run on which processor;
        empty where it does not say.

    Raises:
        PararnnError: it could not be run there; the sentence says why.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-pararnn-") as name:
        folder = Path(name)
        asked = {"unit": unit, "compiled": str(package), "settings": settings, "tokens": tokens.tolist()}
        (folder / _ASKED).write_text(json.dumps(asked), encoding="utf-8")
        try:
            done = subprocess.run(
                [*COMMAND, str(folder)], stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds
            )
            end = f"it ended with code {done.returncode}"
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            why = f"{end}: {lines[-1][:300]}" if lines else end
        except subprocess.TimeoutExpired:
            why = f"not done after {seconds:.0f} seconds"
        if not (folder / _ANSWERS).exists():  # written whole, before Core ML is asked anything else
            raise PararnnError(why)
        places = folder / _PLACES
        return np.load(folder / _ANSWERS), json.loads(places.read_text("utf-8")) if places.exists() else {}


def main(folder: Path) -> None:
    """What the process does that `run_on` starts."""
    asked = json.loads((folder / _ASKED).read_text("utf-8"))
    settings, package, unit = asked["settings"], asked["compiled"], asked["unit"]
    try:
        functions = {name: open_function(package, name, unit) for name in settings["functions"]}
        answers = read(settings, functions, np.array(asked["tokens"], np.int32))
    except Exception as error:  # Core ML has its own for each thing that may be wrong
        sys.exit(one_line(error))
    _write(folder / _ANSWERS, lambda file: np.save(file, answers))
    try:
        places = json.dumps(placed(package, unit)).encode()
    except Exception as error:  # of a plan there is no need
        sys.exit(f"no plan: {one_line(error)}")
    _write(folder / _PLACES, lambda file: file.write(places))


def open_function(compiled: str, name: str, unit: str) -> Any:
    """A coremltools model of one function, on one kind of processor."""
    import coremltools as ct

    with quiet():
        return ct.models.CompiledMLModel(
            compiled, compute_units=getattr(ct.ComputeUnit, unit), function_name=name
        )


def placed(compiled: str, unit: str) -> dict[str, dict[str, int]]:
    """By function, how many operations Core ML prefers to run on which processor."""
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(compiled, getattr(ct.ComputeUnit, unit))
    places = {}
    for name, function in plan.model_structure.program.functions.items():
        usages = [
            plan.get_compute_device_usage_for_mlprogram_operation(operation)
            for operation in function.block.operations
        ]
        devices = [type(usage.preferred_compute_device).__name__ for usage in usages if usage is not None]
        places[name] = dict(Counter(UNITS[_DEVICES[device]] for device in devices if device in _DEVICES))
    return places


def read(settings: Mapping[str, Any], functions: Mapping[str, Any], tokens: Array) -> Array:
    """What the calls of a runner give after the first chunk and each token that follows: (prefills, m, V).

    The chunk is read once by each prefill, the largest first, and what it leaves by `decode`; or once by
    `decode` alone, where there is no other. V is 1 where the token comes out, not the logits.
    """
    chunk, wanted = settings.get("chunk") or 1, len(tokens) - (settings.get("chunk") or 1) + 1
    readings = []
    for name, count in (prefills(dict(settings)) or {"decode": 1}).items():
        pieces = [(name, tokens[t : t + count]) for t in range(0, chunk - count + 1, count)]
        pieces += [("decode", tokens[t : t + 1]) for t in range(chunk - chunk % count, len(tokens))]
        readings.append(_read(settings, functions, pieces)[-wanted:])
    return np.stack(readings)


def _read(
    settings: Mapping[str, Any], functions: Mapping[str, Any], pieces: list[tuple[str, Array]]
) -> Array:
    in_graph = settings["state"] == "graph"
    state = functions["decode"].make_state() if in_graph else None
    passed = {} if in_graph else {s["name"]: np.zeros(s["shape"], s["dtype"]) for s in settings["states"]}
    answers, position = [], 0
    for name, piece in pieces:
        inputs = {"tokens": np.asarray(piece, np.int32)[None]}
        if settings["max_position_embeddings"] is not None:
            inputs["position"] = np.array([position], np.int32)
        for part in parts_of(dict(settings), name):
            function, inputs = functions[part], {**inputs, **passed}
            outputs = function.predict(inputs, state=state) if in_graph else function.predict(inputs)
            passed = {key: outputs[f"{key}_out"] for key in passed}
            inputs = {"hidden": outputs.get("hidden_out")}
        answers.append(np.asarray(outputs[settings["output"]]).reshape(-1))
        if len(answers[-1]) != (1 if settings["output"] == "token" else settings["vocab_size"]):
            raise ValueError(f"{name} gives {len(answers[-1])} numbers")
        position += len(piece)
    return np.stack(answers)


def _write(path: Path, write: Any) -> None:
    """A file that is whole once it has its name."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
