"""What of a model is learned, and how what was learned is written: weights, adapters, or initial states."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..compute.module_arrays import named_arrays
from ..files.whole_file import whole_file, write_whole
from ..loading import STATES
from ..model import Model
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
    """Write what makes `folder` the tuned model; every file is there whole, the old or the new one."""
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
    if plan.settings.precision == "bfloat16":
        exact = {name for name in weights if not model.cast_predicate(name)}
        weights = {n: w if n in exact else w.astype(mx.bfloat16) for n, w in weights.items()}
    _save(folder / WEIGHTS, weights)


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
