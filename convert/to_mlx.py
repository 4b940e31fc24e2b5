"""Writes a model folder for MLX from a PyTorch checkpoint, one piece of one tensor at a time."""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError

from .families import Canonical, find_family
from .families.base import element_count
from .overrides import apply_overrides, check_source_config, read_overrides
from .readers.checkpoint import Checkpoint, open_checkpoint
from .readers.wording import shown
from .writers.model_card import model_card
from .writers.output_folder import MODEL_FILE, check_output, whole_or_nothing, write_json
from .writers.quantize import Plan, quantization
from .writers.safetensors_writer import write_model
from .writers.tokenizer import TokenizerFiles, prepare_tokenizer
from .writers.weight_jobs import finite, formats, weight_job

Progress = Callable[[int, int], None]


_MODEL_FILE_TEXT = (
    "# For mlx_lm --trust-remote-code.\nfrom mlx_pararnn.model import Model, ModelArgs  # noqa: F401\n"
)


@dataclass(frozen=True)
class Converted(os.PathLike[str]):
    """What a conversion wrote; usable as the path of the folder.

    Attributes:
        weights: the file that was read: the weights, or what says where they are.
        parameters: how many numbers the weights hold.
        dtypes: formats of those that are not quantized, most numbers first ("float32", "bfloat16", ...).
        nbytes: size of the weights.
        bits_per_weight: of the whole model, scales included.
        exceptions: a phrase for each kind of matrix that is not quantized as asked.
    """

    path: Path
    weights: Path
    family: str
    config: dict[str, Any]
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int
    exceptions: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each parameter, scales and biases included."""
        return self.nbytes * 8 / self.parameters

    def __fspath__(self) -> str:
        return str(self.path)


def convert_to_mlx(
    source: str | Path | Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    tokenizer: str | Path | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    model_file: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert the checkpoint `source` to the model folder `out`.

    Args:
        source: a file, a folder or a Hugging Face name; or what `open_checkpoint` made of one.
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own (float64 becomes float32,
            MLX's widest on a GPU). Where a dtype is given, recurrent weights are stored as float32.
        quantize: pack the matrices into `q_bits` (default 4) bits a weight with a scale for each group of
            `q_group_size` (default 64), or in the format `q_mode` ("mxfp4", "nvfp4", "mxfp8"). Needs MLX.
        tokenizer: a folder, a Hugging Face name, "bytes", "none"; None takes the files beside the checkpoint.
        family: a name of `families.family_names()`; None finds it out.
        config: a JSON file of model fields that go before what was inferred.
        model_file: add the two-line Python file by which bare `mlx_lm` finds the model's class; MLX-LM then
            wants --trust-remote-code for the folder.
        force: replace `out` if it is a model folder.
        progress: called with (bytes written, bytes in all).

    Raises:
        PararnnError: anything wrong with the input or with `out`; nothing is left then.
    """
    out = Path(out)
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise PararnnError(f"dtype {dtype!r}: choose float32, float16 or bfloat16")
    asked = quantization(q_bits, q_group_size, q_mode) if quantize else None
    overrides = read_overrides(None if config is None else Path(config))
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    where = checkpoint.source if isinstance(source, Checkpoint) else source
    check_output(out, force, checkpoint.source)
    if (checkpoint.config or {}).get("model_type") in ("pararnn", "pararnn_cell"):
        given, todo = str(checkpoint.folder), ""
        if tokenizer not in (None, "none"):
            command = ["mlx-pararnn", "add-tokenizer", given, str(tokenizer)]
            todo = f"; to give it a tokenizer: {shlex.join(command)}"
        if quantize:
            given_options = {"--q-bits": q_bits, "--q-group-size": q_group_size, "--dtype": dtype}
            how = [word for name, value in given_options.items() if value for word in (name, str(value))]
            how += [] if q_mode == "affine" else ["--q-mode", q_mode]
            command = ["mlx-pararnn", "lm", "convert", "--hf-path", given, "--mlx-path", str(out), "-q", *how]
            todo += f"; to quantize it: {shlex.join(command)}"
        raise PararnnError(f"{where}: this is an MLX model already, nothing to convert{todo}")
    if not allow_nonfinite:
        checkpoint = finite(checkpoint)
    chosen = find_family(checkpoint, family)
    model = chosen.map(checkpoint, overrides.get("tie_word_embeddings"))
    if asked and model.model_type == "pararnn_cell":
        raise PararnnError(f"{where}: a single cell is not quantized; convert it without --quantize")
    check_source_config(checkpoint, model.args)
    args = apply_overrides(model.args, model.model_type, overrides, str(checkpoint.path))
    has_head = any(output.name == "lm_head.weight" for output in model.outputs)
    if model.model_type == "pararnn" and args.get("tie_word_embeddings", False) == has_head:
        raise PararnnError(
            f"{checkpoint.path}: the family {chosen.name} gives the model {'an' if has_head else 'no'} "
            f"lm_head.weight, and tie_word_embeddings is {str(has_head).lower()}: one of them is wrong"
        )
    files = _tokenizer_files(tokenizer, checkpoint, model, args)
    if model_file and model.model_type == "pararnn_cell":
        raise PararnnError(f"{where}: a single cell is no model for MLX-LM; convert it without --model-file")
    plan = Plan(model.outputs, asked)
    jobs = [weight_job(output, dtype, plan, checkpoint.path) for output in model.outputs]
    total = sum(job.nbytes for job in jobs)
    result = Converted(
        path=out,
        weights=checkpoint.path,
        family=chosen.name,
        config={"model_type": model.model_type}
        | files.token_ids
        | args
        | plan.config()
        | ({"model_file": MODEL_FILE} if model_file else {}),
        parameters=element_count(model.outputs),
        dtypes=formats(jobs),
        nbytes=total,
        exceptions=tuple(plan.exceptions()),
    )
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    options = _options(dtype, plan.config().get("quantization"), tokenizer, family, overrides)
    with whole_or_nothing(out, force, checkpoint.source, total) as folder:
        write_model(folder, jobs, result.parameters, written)
        files.write(folder)
        write_json(folder / "config.json", result.config)
        if model_file:
            (folder / MODEL_FILE).write_text(_MODEL_FILE_TEXT, encoding="utf-8")
        card = model_card(
            checkpoint, chosen.title, model.notes, result.config, result.parameters, result.dtypes, options
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return result


def _options(
    dtype: str | None,
    quantized: dict[str, Any] | None,
    tokenizer: str | Path | None,
    family: str | None,
    overrides: dict[str, Any],
) -> list[str]:
    """The options for the model card; a folder by its last name only, since a card is published."""
    if tokenizer is not None and Path(tokenizer).is_dir():
        tokenizer = Path(tokenizer).resolve().name
    given: dict[str, Any] = {"--dtype": dtype}
    if quantized:
        given |= {f"--q-{name.replace('_', '-')}": quantized[name] for name in ("mode", "bits", "group_size")}
    given |= {"--tokenizer": tokenizer, "--family": family}
    given |= {"--config": json.dumps(overrides) if overrides else None}
    return [f"{option} {shown(str(value))}" for option, value in given.items() if value is not None]


def _tokenizer_files(
    choice: str | Path | None, checkpoint: Checkpoint, model: Canonical, args: dict[str, Any]
) -> TokenizerFiles:
    if model.model_type == "pararnn_cell":
        return TokenizerFiles()
    given: dict[str, Any] = {key: args[key] for key in ("eos_token_id", "bos_token_id") if key in args}
    return prepare_tokenizer(choice, checkpoint.folder, args["vocab_size"], given)
