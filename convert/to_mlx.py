"""Writes a model folder for MLX from a PyTorch checkpoint, one piece of one tensor at a time."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError

from .checkpoint import Checkpoint, open_checkpoint
from .dtypes import FLOATS, NAMES, TAGS, Array, all_finite, cast
from .families import Canonical, find_family
from .families.base import Output, element_count
from .model_card import model_card
from .output_folder import check_output, whole_or_nothing
from .overrides import apply_overrides, read_overrides
from .safetensors_file import Entry, write_safetensors
from .tensors import Tensor
from .tokenizer import TokenizerFiles, prepare_tokenizer
from .wording import shown

WEIGHTS = "model.safetensors"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted(os.PathLike[str]):
    """What a conversion wrote; usable as the path of the folder.

    Attributes:
        parameters: how many numbers the weights hold.
        dtypes: their formats, most numbers first ("float32", "bfloat16", ...).
        nbytes: size of the weights file.
    """

    path: Path
    family: str
    config: dict[str, Any]
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int

    def __fspath__(self) -> str:
        return str(self.path)


def convert_to_mlx(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert the checkpoint `source` (a file or folder) to the model folder `out`.

    Args:
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own (float64 becomes float32,
            MLX's widest on a GPU). Where a dtype is given, recurrent weights are stored as float32.
        tokenizer: a folder, a Hugging Face name, "bytes", "none"; None takes the files beside the checkpoint.
        family: a name of `families.family_names()`; None finds it out.
        config: a JSON file of model fields that go before what was inferred.
        force: replace `out` if it is a model folder.
        progress: called with (bytes written, bytes in all).

    Raises:
        PararnnError: anything wrong with the input or with `out`; nothing is left behind then.
    """
    source, out = Path(source), Path(out)
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise PararnnError(f"dtype {dtype!r}: choose float32, float16 or bfloat16")
    overrides = read_overrides(None if config is None else Path(config))
    checkpoint = open_checkpoint(source)
    check_output(out, force, checkpoint.path)
    if (checkpoint.config or {}).get("model_type") in ("pararnn", "pararnn_cell"):
        raise PararnnError(f"{source}: this is an MLX model already, nothing to convert")
    if not allow_nonfinite:
        checkpoint = _finite(checkpoint)
    chosen = find_family(checkpoint, family)
    model = chosen.map(checkpoint, overrides.get("tie_word_embeddings"))
    args = apply_overrides(model.args, model.model_type, overrides, str(checkpoint.path))
    files = _tokenizer_files(tokenizer, checkpoint, model, args)
    entries = [_entry(output, dtype, allow_nonfinite, checkpoint.path) for output in model.outputs]
    full_config = {"model_type": model.model_type} | files.token_ids | args
    result = Converted(
        path=out,
        family=chosen.name,
        config=full_config,
        parameters=element_count(model.outputs),
        dtypes=_dtypes(entries),
        nbytes=sum(entry.nbytes for entry in entries),
    )
    options = _options(dtype, tokenizer, family, overrides)
    with whole_or_nothing(out, force, checkpoint.path) as folder:
        _write_weights(folder / WEIGHTS, entries, progress)
        files.write(folder)
        _write_json(folder / "config.json", full_config)
        card = model_card(
            checkpoint, chosen.title, model.notes, full_config, result.parameters, result.dtypes, options
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return result


def _options(
    dtype: str | None, tokenizer: str | Path | None, family: str | None, overrides: dict[str, Any]
) -> list[str]:
    """The options for the model card; a folder by its last name only, since a card is published."""
    if tokenizer is not None and Path(tokenizer).is_dir():
        tokenizer = Path(tokenizer).resolve().name
    given = {"--dtype": dtype, "--tokenizer": tokenizer, "--family": family}
    given |= {"--config": json.dumps(overrides) if overrides else None}
    return [f"{option} {shown(str(value))}" for option, value in given.items() if value is not None]


def _tokenizer_files(
    choice: str | Path | None, checkpoint: Checkpoint, model: Canonical, args: dict[str, Any]
) -> TokenizerFiles:
    if model.model_type == "pararnn_cell":
        return TokenizerFiles()
    given: dict[str, Any] = {key: args[key] for key in ("eos_token_id", "bos_token_id") if key in args}
    return prepare_tokenizer(choice, checkpoint.folder, args["vocab_size"], given)


def _entry(output: Output, dtype: str | None, allow_nonfinite: bool, path: Path) -> Entry:
    target = "F32" if output.dtype == "F64" else output.dtype
    if dtype is not None:
        target = "F32" if output.name.endswith("recurrent_weight") else TAGS[dtype]

    def pieces() -> Iterator[Array]:
        for piece in output.pieces():
            result = cast(piece, output.dtype, target)
            # The source's own infinities were looked for on reading: what is left came from the cast.
            if not all_finite(result, target) and (
                not allow_nonfinite or _overflowed(piece, result, output, target)
            ):
                raise PararnnError(
                    f"{path}: {output.name} holds numbers too large for {NAMES[target]}; convert with "
                    "--dtype bfloat16 or float32"
                )
            yield result

    return Entry(output.name, output.shape, target, pieces)


def _overflowed(piece: Array, result: Array, output: Output, target: str) -> bool:
    before = np.isfinite(cast(piece, output.dtype, "F64"))
    return bool((before & ~np.isfinite(cast(result, target, "F64"))).any())


def _finite(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with tensors that refuse NaN and inf when they are read."""

    def checked(tensor: Tensor) -> Tensor:
        load = tensor.load

        def finite(start: int, stop: int) -> Array:
            array = load(start, stop)
            if tensor.dtype in FLOATS and not all_finite(array, tensor.dtype):
                raise PararnnError(
                    f"{checkpoint.path}: {tensor.name} holds NaN or infinite numbers; the training may have "
                    "diverged (--allow-nonfinite converts it all the same)"
                )
            return array

        return replace(tensor, load=finite)

    return replace(checkpoint, tensors={name: checked(tensor) for name, tensor in checkpoint.tensors.items()})


def _write_weights(path: Path, entries: list[Entry], progress: Progress | None) -> None:
    total = sum(entry.nbytes for entry in entries)
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    write_safetensors(path, entries, {"format": "mlx"}, written)


def _dtypes(entries: list[Entry]) -> tuple[str, ...]:
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[NAMES[entry.dtype]] = sizes.get(NAMES[entry.dtype], 0) + entry.nbytes
    return tuple(sorted(sizes, key=lambda name: -sizes[name]))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
