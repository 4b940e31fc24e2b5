"""What every export to a package does: `to_coreml.py` and `to_coreai.py` add what only their runtime knows.

A checkpoint is converted to an MLX model folder first, beside the output. The model runs in MLX, in float32:
for what the stored weights cost against the original ones, for the Newton iterations its prefill needs, and
for the reference that `verify` compares with. The package itself is built from the weights, in
coreml/ and coreai/.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_pararnn import __version__
from mlx_pararnn.adapters import unpack
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import TOKENIZER_FILES
from mlx_pararnn.loading import load_adapters, load_model, load_states, load_tokenizer
from mlx_pararnn.model import Model
from mlx_pararnn.model_config import ModelArgs

from .inspection import inspect, inspect_checkpoint
from .package.chat_format import add_chat_format
from .package.constants import Plain, Stored, stored, total_bytes
from .package.description import MAX_CHUNK, PACKED
from .package.export_memory import check_memory
from .package.form import Form, parts, state_dtypes, state_shapes
from .package.iterations import iterations_needed
from .package.package_digest import stored_digest
from .package.program import EXPORTED
from .package.reference import TAIL, write_reference
from .readers.checkpoint import Checkpoint, open_checkpoint
from .readers.forms import COREML, PACKAGE_FILE, PackageKind
from .readers.wording import listed, shown
from .to_mlx import convert_to_mlx
from .writers.output_folder import MLX_PART, check_output, whole_or_nothing, write_json
from .writers.quantize import is_matrix
from .writers.tokenizer import prepare_tokenizer

# (what is being done, share done from 0 to 1)
Progress = Callable[[str, float], None]
Array = npt.NDArray[Any]

CHUNK = 64
SHORT_CHUNK = 16  # of the second prefill of a Core ML package, for texts that are shorter, and ends
# Fields of config.json that say nothing about what a model computes.
_BESIDE = {
    "eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id", "quantization", "quantization_config",
    "quantization_cost", "model_file", "auto_map", "architectures", "dtype", "torch_dtype",
    "transformers_version", "_name_or_path", "use_cache", "tokenizer_class",
}  # fmt: skip
_SAMPLED = 128  # tokens, at least, that iterations and the cost of the stored weights are measured on
_SAMPLE = (
    "Language models read a text from left to right and guess what comes next. def tokens(text): return "
    "text.split() # one word after another. In 1997 the long short-term memory was 1 of 2 ways to remember. "
)


@dataclass(frozen=True)
class Exported(os.PathLike[str]):
    """What an export wrote; usable as the path of the folder.

    Attributes:
        weights: the file that was read: the weights, or what says where they are.
        settings: pararnn.json.
        nbytes: size of the matrices and vectors as stored.
        error: ||logits - logits of the original weights|| / ||the latter|| over a sample, both in float32.
        agreeing: of how many sample tokens the likeliest next token is the same; `sample` is how many.
        exceptions: a phrase for each kind of matrix that is not stored as asked.
    """

    path: Path
    weights: Path
    settings: dict[str, Any]
    nbytes: int
    error: float
    agreeing: int
    sample: int
    exceptions: tuple[str, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Functions:
    """What a package's functions are built from.

    Attributes:
        tokens: name -> tokens that the function reads, the default function first.
        iterations: Newton iterations of a function that reads several.
    """

    args: ModelArgs
    weights: Mapping[str, Stored]
    form: Form
    tokens: Mapping[str, int]
    iterations: int


# (folder of the package to make, its functions, pararnn.json, where the model came from, progress)
Write = Callable[[Path, Functions, dict[str, Any], str, Progress], None]


def export(
    source: str | Path,
    out: str | Path,
    kind: PackageKind,
    write: Write,
    form_of: Callable[[str], Form],
    *,
    chunk: int | None,
    iterations: int | None,
    weights: str,
    initial_state: str | Path | None,
    adapter_path: str | Path | None,
    tokenizer: str | Path | None,
    family: str | None,
    config: str | Path | None,
    force: bool,
    allow_nonfinite: bool,
    progress: Progress | None,
    settings: Mapping[str, Any],
) -> Exported:
    """Export `source` to the folder `out`, as `convert_to_coreml` and `convert_to_coreai` say.

    Args:
        kind: of package.
        write: writes the package itself.
        form_of: how a package of a cell, by its name, is to be.
        settings: fields of pararnn.json that only this kind of package has.

    Raises:
        PararnnError: anything wrong with the input, with `out` or with this machine; nothing is left.
    """
    out = Path(out)
    say = progress or (lambda what, share: None)
    checkpoint = open_checkpoint(source, packed=True)
    check_output(out, force, checkpoint.source)
    is_mlx, parameters, vocab_size = _measured(checkpoint, source, kind)
    check_memory(parameters, kind.title)
    with whole_or_nothing(out, force, checkpoint.source, 4 * parameters) as folder:
        if is_mlx:
            if family or config:
                raise PararnnError(f"{source}: an MLX model already; leave out --family and --config")
            model_folder = checkpoint.folder
            prepare_tokenizer(tokenizer, model_folder, vocab_size, {}).write(folder)
        else:
            model_folder = folder / MLX_PART
            convert_to_mlx(
                checkpoint,
                model_folder,
                tokenizer=tokenizer,
                family=family,
                config=config,
                allow_nonfinite=allow_nonfinite,
                progress=lambda done, total: say("reading the checkpoint", done / total),
            )
            prepare_tokenizer(_found(model_folder), model_folder, vocab_size, {}).write(folder)
        model, model_config = load_model(model_folder)
        model.set_dtype(mx.float32)
        unpack(model)  # in float32: what its quantized matrices stand for, exactly
        if adapter_path is not None:
            load_adapters(model, Path(adapter_path))
        if initial_state is not None:
            load_states(model, Path(initial_state))
        model.set_dtype(mx.float32)
        args: ModelArgs = model.args
        form = form_of(args.cell)
        _check_fields(model_folder, model_config, kind)
        length = _chunk_for(args, chunk)
        tokens = _sample_tokens(folder, model_config, args, max(2 * length, _SAMPLED))
        say("running the model", 0.0)
        original = _logits(model, tokens)
        store, exceptions = _stored_weights(model, weights, form, allow_nonfinite, say)
        logits = _logits(model, tokens)
        half = _half_logits(model, tokens) if form.activations == np.float16 else None
        if iterations is None:
            say("counting Newton iterations", 0.0)
            iterations = iterations_needed(model, tokens, length, form.recurrence, kind.title)
        del model  # its float32 weights are not needed any more
        mx.clear_cache()
        shutil.rmtree(folder / MLX_PART, ignore_errors=True)
        functions = {"decode": 1} | ({"prefill": length} if iterations else {})
        if iterations and kind == COREML and length >= 2 * SHORT_CHUNK:
            # as many iterations do: Newton's iterate of a step is of those before it
            functions[f"prefill_{SHORT_CHUNK}"] = SHORT_CHUNK
        described = _settings(args, model_config, kind, form, functions, iterations, weights, parameters)
        described |= {"weights_digest": stored_digest(store), **settings}
        add_chat_format(described, folder, model_config)
        write_json(folder / PACKAGE_FILE, described)
        built = Functions(args, store, form, functions, iterations or 0)
        write(folder / kind.name, built, described, shown(checkpoint.title), say)
        first = functions.get("prefill", 1)
        count = min(len(tokens), first + TAIL if "prefill" in functions else TAIL)
        answers = slice(first - 1, count)
        of_half = None if half is None else half[answers]
        write_reference(folder, folder / kind.name, tokens[:count], logits[answers], of_half)
    return Exported(
        path=out,
        weights=checkpoint.path,
        settings=described,
        nbytes=total_bytes(store.values()),
        error=float(np.linalg.norm(logits - original) / np.linalg.norm(original)),
        agreeing=int((logits.argmax(-1) == original.argmax(-1)).sum()),
        sample=len(tokens),
        exceptions=exceptions,
    )


def description(settings: Mapping[str, Any], title: str, page: str) -> dict[str, str]:
    """What a package says of itself; `title` is the checkpoint's, `page` that of docs/ which explains it."""
    return {
        "author": f"converted from {title}",
        "license": "that of the model it was converted from",
        "description": f"ParaRNN language model ({settings['cell']}, {settings['parameters']:,} parameters); "
        f"mlx-pararnn's docs/{page} says how to run it",
    }


def check_options(chunk: int | None, iterations: int | None, weights: str, plain: str) -> None:
    """Raise PararnnError for a value that no export takes; `plain` is how weights are that are not packed."""
    if weights not in (plain, *PACKED):
        raise PararnnError(f"weights {weights!r}: choose one of {', '.join((plain, *PACKED))}")
    if chunk is not None and not 2 <= chunk <= MAX_CHUNK:
        raise PararnnError(f"--chunk {chunk}: choose 2 to {MAX_CHUNK} tokens")
    if iterations is not None and iterations < 1:
        raise PararnnError(f"--iterations {iterations}: choose at least 1")


def _measured(checkpoint: Checkpoint, source: str | Path, kind: PackageKind) -> tuple[bool, int, int]:
    """Whether it is an MLX model, how many parameters it has, its vocabulary; without reading a weight."""
    config = checkpoint.config or {}
    if config.get("model_type") == "pararnn":
        parameters = inspect(checkpoint.folder).parameters
        return True, parameters, ModelArgs.from_dict(config).vocab_size
    found = inspect_checkpoint(checkpoint)
    if found.config["model_type"] == "pararnn_cell":
        raise PararnnError(
            f"{source}: a single cell is no language model; {kind.title} export takes models only"
        )
    return False, found.parameters, found.config["vocab_size"]


def _check_fields(folder: Path, config: dict[str, Any], kind: PackageKind) -> None:
    """Raise for a field that may change what the model computes and that the export does not know."""
    unknown = sorted(config.keys() - EXPORTED - _BESIDE)
    if unknown:
        raise PararnnError(
            f"{folder / 'config.json'}: the export to {kind.title} does not know the fields "
            f"{listed(unknown)}, and the package could compute something else than the model; update "
            "mlx-pararnn, or remove them"
        )


def _found(folder: Path) -> str | None:
    """What `prepare_tokenizer` is to do with a folder that it made: None to take its files, or "none"."""
    return None if any((folder / name).exists() for name in TOKENIZER_FILES) else "none"


def _chunk_for(args: ModelArgs, asked: int | None) -> int:
    room = args.max_position_embeddings
    if room is not None and (asked or 2) > room:
        raise PararnnError(
            f"--chunk {asked or 2}: this model has {room} learned positions; choose at most as many tokens"
        )
    chunk = asked or CHUNK
    return chunk if room is None else min(chunk, room)


def _sample_tokens(folder: Path, config: dict[str, Any], args: ModelArgs, count: int) -> list[int]:
    """Tokens of a sample text; random ones for a model without a tokenizer."""
    count = min(count, args.max_position_embeddings or count)
    try:
        tokenizer = load_tokenizer(folder, config)
    except PararnnError:
        return [int(t) for t in np.random.default_rng(0).integers(0, args.vocab_size, count)]
    tokens = [t for t in tokenizer.encode(_SAMPLE) if t < args.vocab_size]
    return (tokens * (count // max(1, len(tokens)) + 1))[:count] or [0] * count


def _logits(model: Model, tokens: list[int]) -> Array:
    """(T, V) in float32."""
    return np.array(model(mx.array([tokens]), method="sequential", backend="ops")[0])


def _half_logits(model: Model, tokens: list[int]) -> Array:
    """(T, V), computed in float16; the model is as before."""
    weights = model.parameters()
    model.set_dtype(mx.float16)
    logits = _logits(model, tokens).astype(np.float32)
    model.update(weights)
    return logits


def _stored_weights(
    model: Model, how: str, form: Form, allow_nonfinite: bool, say: Progress
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The model's weights as the package holds them, put back into the model as well; what `how` left out."""
    originals = dict(tree_flatten(model.parameters()))
    names = list(originals)
    weights: dict[str, Stored] = {}
    plain = np.dtype(form.activations)
    left: dict[str, int] = {}
    for done, name in enumerate(names):
        say("rounding the weights", done / len(names))
        numbers = np.array(originals.pop(name))  # popped: memory holds the original or what replaces it
        kept = plain.name if how == plain.name else "float16"  # scales and palettes are float16
        largest = np.finfo(kept).max
        if not allow_nonfinite and not np.abs(numbers).max(initial=0) <= largest:
            raise PararnnError(
                f"{name}: holds NaN or numbers beyond {largest:.6g}, the largest of {kept}, which it would "
                "be stored in; rescale the weight, or pass --allow-nonfinite to store infinity instead"
            )
        with np.errstate(over="ignore"):
            weights[name] = stored(numbers, how if is_matrix(name) else plain.name, plain)
        if is_matrix(name) and how != plain.name and isinstance(weights[name], Plain):
            kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
            left[kind] = left.get(kind, 0) + 1
        model.load_weights([(name, mx.array(weights[name].values(form.activations)))], strict=False)
    return weights, tuple(f"{kind} left {plain} ({count})" for kind, count in left.items())


def _settings(
    args: ModelArgs,
    config: dict[str, Any],
    kind: PackageKind,
    form: Form,
    functions: dict[str, int],
    iterations: int | None,
    weights: str,
    parameters: int,
) -> dict[str, Any]:
    """pararnn.json."""
    dtypes = state_dtypes(form)
    divided = [list(parts(form, args.num_hidden_layers, name)) for name in functions]
    end = config.get("eos_token_id")
    return {
        "format": kind.format,
        "format_version": 2 if len(divided[-1]) > 1 else 1,  # a runner of 1 knows no parts
        "package": kind.name,
        "functions": [part for whole in divided for part in whole],
        "chunk": functions.get("prefill"),
        "chunks": {name: count for name, count in functions.items() if count > 1},
        **({"parts": len(divided[-1])} if len(divided[-1]) > 1 else {}),
        "iterations": iterations if "prefill" in functions else None,
        "state": "graph" if form.graph_state else "io",
        "states": [
            {"name": name, "shape": list(shape), "dtype": np.dtype(dtypes[name]).name}
            for name, shape in state_shapes(args).items()
        ],
        "output": "token" if form.argmax else "logits",
        "weights": weights,
        "eos_token_id": end if isinstance(end, list) else [] if end is None else [end],
        "bos_token_id": config.get("bos_token_id"),
        **{field.name: getattr(args, field.name) for field in fields(args) if field.name != "model_type"},
        "parameters": parameters,
        "version": __version__,
    }
