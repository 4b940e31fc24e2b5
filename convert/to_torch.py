"""Writes a model folder's weights for the PyTorch code that has such a model: where `to_mlx` began."""

from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.model_config import ModelArgs

from .families.base import Source, element_count
from .families.pytorch_layouts import find_layout
from .readers.checkpoint import open_checkpoint
from .writers.output_folder import check_output, whole_or_nothing, write_json
from .writers.quantize import Plan
from .writers.safetensors_writer import write_model
from .writers.tokenizer import prepare_tokenizer
from .writers.weight_jobs import weight_job


@dataclass(frozen=True)
class ToTorch:
    """What was written: the folder, the code that loads it, how many numbers and bytes its weights have."""

    path: Path
    family: str
    parameters: int
    nbytes: int


def convert_to_torch(source: str | Path, out: str | Path, *, force: bool = False) -> ToTorch:
    """Write the MLX model folder `source` as model.safetensors in the names of ml-pararnn or pararnn-torch.

    Numbers stay bit for bit, in their formats. Tokenizer files are copied. For pararnn-torch a config.json
    comes with them, which its `from_pretrained` reads.

    Raises:
        PararnnError: `source` is no MLX model, is quantized, has a learned initial state, or is of a shape
            that neither code has; nothing is left then.
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
    weights = Source(checkpoint, layout.name)
    outputs = layout.outputs(weights, args)
    weights.finish()
    written = layout.config(weights, args)
    plan = Plan(outputs, None)
    jobs = [weight_job(output, None, plan, checkpoint.path) for output in outputs]
    total, parameters = sum(job.nbytes for job in jobs), element_count(outputs)
    tokenizer = prepare_tokenizer(
        None if (checkpoint.folder / "tokenizer.json").is_file() else "none",
        checkpoint.folder,
        args["vocab_size"],
        {},
    )
    with whole_or_nothing(out, force, checkpoint.source, total) as folder:
        write_model(folder, jobs, parameters, lambda count: None)
        tokenizer.write(folder)
        if written:
            write_json(folder / "config.json", written)
    return ToTorch(out, layout.name, parameters, total)
