"""Writes a model folder's weights for the PyTorch code that has such a model: where `to_mlx` began."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_config import ModelArgs

from .families.base import Output, Source, element_count
from .families.pytorch_layouts import Layout, find_layout
from .readers.checkpoint import Checkpoint, open_checkpoint
from .writers.output_folder import MLX_PART, check_output, whole_or_nothing, write_json
from .writers.quantize import Plan
from .writers.safetensors_writer import Job, write_model
from .writers.tokenizer import prepare_tokenizer
from .writers.weight_jobs import weight_job


@dataclass(frozen=True)
class ToTorch:
    """What was written: the folder, the code that loads it, how many numbers and bytes its weights have."""

    path: Path
    family: str
    parameters: int
    nbytes: int


def convert_to_torch(
    source: str | Path, out: str | Path, *, adapter_path: str | Path | None = None, force: bool = False
) -> ToTorch:
    """Write the MLX model folder `source` as model.safetensors in the names of ml-pararnn or pararnn-torch.

    Numbers stay bit for bit, in their formats. Tokenizer files are copied. For pararnn-torch a config.json
    comes with them, which its `from_pretrained` reads. With `adapter_path`, a folder of adapters as for
    `load`, they are added into the weights, and memory holds the whole model.

    Raises:
        PararnnError: `source` is no MLX model, is quantized, has a learned initial state, or is of a shape
            that neither code has; or the adapters are not of it; nothing is left then.
    """
    out = Path(out)
    checkpoint = open_checkpoint(source)
    config = checkpoint.config or {}
    if config.get("model_type") != "pararnn":
        raise PararnnError(f"{source}: --to torch takes an MLX model folder, which has model_type pararnn")
    if any(name.endswith(".initial_state") for name in checkpoint.tensors):
        raise PararnnError(
            f"{source}: it has learned initial states, which the PyTorch code does not know; give the model "
            "that they were learned with"
        )
    check_output(out, force, checkpoint.source)
    args = asdict(ModelArgs.from_dict(config))
    layout = find_layout(checkpoint, args)
    outputs, written = _mapped(checkpoint, layout, args)
    parameters = element_count(outputs)
    total = sum(job.nbytes for job in _jobs(outputs, checkpoint))
    tokenizer = prepare_tokenizer(
        None if (checkpoint.folder / "tokenizer.json").is_file() else "none",
        checkpoint.folder,
        args["vocab_size"],
        {},
    )
    with whole_or_nothing(out, force, checkpoint.source, total) as folder:
        if adapter_path is not None:
            adapted = _with_adapters(checkpoint.folder, Path(adapter_path), folder / MLX_PART)
            outputs, written = _mapped(adapted, layout, args)
        write_model(folder, _jobs(outputs, checkpoint), parameters, lambda count: None)
        shutil.rmtree(folder / MLX_PART, ignore_errors=True)
        tokenizer.write(folder)
        if written:
            write_json(folder / "config.json", written)
    return ToTorch(out, layout.name, parameters, total)


def _mapped(
    checkpoint: Checkpoint, layout: Layout, args: dict[str, Any]
) -> tuple[list[Output], dict[str, Any]]:
    """The tensors to write, and config.json, empty for code that has none."""
    weights = Source(checkpoint, layout.name)
    outputs = layout.outputs(weights, args)
    weights.finish()
    return outputs, layout.config(weights, args)


def _jobs(outputs: list[Output], checkpoint: Checkpoint) -> list[Job]:
    plan = Plan(outputs, None)
    return [weight_job(output, None, plan, checkpoint.path) for output in outputs]


def _with_adapters(model: Path, adapters: Path, folder: Path) -> Checkpoint:
    """The MLX model in the folder `model` with the adapters added in, written into `folder`."""
    import mlx.core as mx

    from mlx_pararnn.compute.module_arrays import named_arrays
    from mlx_pararnn.loading import load_model

    fused, _ = load_model(model, adapter_path=adapters)
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(named_arrays(fused.parameters())))
    return open_checkpoint(folder)
