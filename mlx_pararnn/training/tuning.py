"""What of a model is learned, and how what was learned is written: weights, adapters, or initial states."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..compute.module_arrays import named_arrays
from ..distributed import meet
from ..files.whole_file import whole_file, write_whole
from ..loading import STATES
from ..model import Model
from ..sharding import Shard
from .settings import Plan

WEIGHTS = "model.safetensors"
ADAPTERS = "adapters.safetensors"


def prepare(model: Model, plan: Plan) -> None:
    """Leave those parameters of `model` trainable that `plan.tune` means, and add them where they are new."""
    if plan.tune == "full":
        return
    model.freeze()
    if plan.tune == "state":
        for layer in model.layers:
            cell = layer.mixer.cell
            if "initial_state" not in cell:
                cell.add_initial_state()
            cell.unfreeze(recurse=False, keys="initial_state")
    else:
        settings = _adapter_settings(model, plan)
        dora = plan.tune == "dora"
        linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"], use_dora=dora)


def write(model: Model, plan: Plan, folder: Path) -> None:
    """Write what makes `folder` the tuned model; every file is there whole, the old or the new one.

    Where the model is divided among processes all have to call it, and rank 0 writes.
    """
    if isinstance(model.part, Shard):
        _write_joined(model, plan, folder / WEIGHTS)
        return
    weights = _fused(model)
    learned = {
        f"layers.{number}": layer.mixer.cell.initial_state
        for number, layer in enumerate(model.layers)
        if "initial_state" in layer.mixer.cell
    }
    if learned:
        _save(folder / STATES, learned)
    if plan.tune in ("lora", "dora"):
        _save(folder / ADAPTERS, dict(named_arrays(model.trainable_parameters())))
        settings = json.dumps({"fine_tune_type": plan.tune, **_adapter_settings(model, plan)}, indent=2)
        write_whole(folder / "adapter_config.json", f"{settings}\n".encode())
    _save(folder / WEIGHTS, {name: w.astype(_dtype(model, plan, name, w)) for name, w in weights.items()})


def _dtype(model: Model, plan: Plan, name: str, weight: mx.array) -> mx.Dtype:
    half = plan.settings.precision == "bfloat16" and model.cast_predicate(name)
    return mx.bfloat16 if half else weight.dtype


def _write_joined(model: Model, plan: Plan, path: Path) -> None:
    """The weights of all processes in one file, of which rank 0 has one at a time in memory."""
    assert isinstance(model.part, Shard)
    weights, part, end = dict(named_arrays(model.parameters())), model.part, 0
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    for name, weight in weights.items():
        dtype, shape = _dtype(model, plan, name, weight), part.parts[name][0]
        begin, end = end, end + math.prod(shape) * dtype.size
        kind = "BF16" if dtype == mx.bfloat16 else "F32"
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with ExitStack() as stack:
        file = None
        if part.group.rank() == 0:
            file = stack.enter_context(stack.enter_context(whole_file(path)).open("wb"))
            file.write(len(written).to_bytes(8, "little") + written)
        for name, weight in weights.items():
            whole = part.joined(name, weight)
            mx.eval(whole)
            if file is not None:
                whole = whole.astype(_dtype(model, plan, name, weight))
                file.write(np.array(whole.reshape(-1).view(mx.uint8)).tobytes())
        meet(part.group, end)  # before the file takes its place


def _adapter_settings(model: Model, plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    parameters = {"rank": settings.lora_rank, "scale": settings.lora_scale, "dropout": 0.0}
    return {"num_layers": len(model.layers), "lora_parameters": parameters}


def _fused(model: Model) -> dict[str, mx.array]:
    """The weights of the model with its adapters added in."""
    weights = dict(named_arrays(model.parameters()))
    for name, module in model.named_modules():
        if "lora_a" in module:
            weights = {n: w for n, w in weights.items() if not n.startswith(f"{name}.")}
            fused = named_arrays(module.fuse().parameters())
            weights |= {f"{name}.{part}": weight for part, weight in fused}
    return weights


def _save(path: Path, arrays: dict[str, mx.array]) -> None:
    with whole_file(path) as partial:
        mx.save_safetensors(str(partial), arrays, metadata={"format": "mlx"})
