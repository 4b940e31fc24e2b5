"""Opens a checkpoint, whatever its form: the one place that knows which file to read and what it is."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError

from .dtypes import FLOATS
from .safetensors_file import read_safetensors
from .tensors import Tensor
from .torch_file import read_torch_file
from .wording import listed, shown

# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into a parameter's path.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Beside packed integers in GPTQ, AWQ, bitsandbytes and MLX files.
_QUANTIZED_NAMES = (".qweight", ".qzeros", ".scales", ".SCB", ".absmax", ".weight_scale", ".weight_packed")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, unread.

    Attributes:
        path: the file.
        folder: where the user's configuration and tokenizer files are looked for.
        tensors: by name, training wrappers stripped from it; tied names are all present.
        tied: a name -> the name whose bytes it shares, as far as the file says so.
        config: config.json of the folder, or None.
        training_config: what the training loop saved as its configuration, where that is plain data.
    """

    path: Path
    folder: Path
    tensors: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    training_config: dict[str, Any] | None = None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors, .pt, .pth or .bin file, or a folder with one of them.

    Raises:
        PararnnError: there is nothing there, or not a checkpoint that can be read; the message says which.
    """
    path = Path(path)
    if not path.exists():
        raise PararnnError(f"{path}: no such file or folder")
    file = _weights_in(path) if path.is_dir() else path
    if not file.is_file():
        raise PararnnError(f"{file}: not a regular file")
    aliases: dict[str, str] = {}
    training_config = None
    match _kind(file):
        case "safetensors":
            raw, aliases = read_safetensors(file)
        case _:
            raw, training_config = read_torch_file(file)
    tensors = _unwrapped(raw, file)
    if not tensors:
        raise PararnnError(f"{file}: there are no tensors inside")
    _refuse_quantized(tensors, file)
    return Checkpoint(
        path=file,
        folder=file.parent,
        tensors=tensors,
        tied=_ties(tensors, aliases),
        config=read_json_object(file.parent / "config.json"),
        training_config=training_config,
    )


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file.

    Raises:
        PararnnError: it cannot be parsed or is not an object.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PararnnError(f"{path}: not valid JSON ({shown(str(error))})") from error
    if not isinstance(value, dict):
        raise PararnnError(f"{path}: a JSON object was expected")
    return value


def _weights_in(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
        if (folder / f"{name}.index.json").is_file():
            raise PararnnError(
                f"{folder}: the checkpoint is split into several files ({name}.index.json), which is not "
                "read yet; save it as one file in PyTorch"
            )
    if (folder / ".metadata").is_file():
        raise PararnnError(
            f"{folder}: this is a torch.distributed.checkpoint folder, which is not read yet; turn it into "
            f"one file with: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} "
            "weights.pt"
        )
    found = sorted(entry for entry in folder.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = listed([entry.name for entry in found])
        raise PararnnError(f"{folder}: there are several checkpoints inside ({names}); pass one of the files")
    raise PararnnError(f"{folder}: no checkpoint inside (a file ending in {', '.join(_SUFFIXES)})")


def _kind(file: Path) -> str:
    """ "safetensors" or "torch", by the first bytes: a name may say anything."""
    with open(file, "rb") as opened:
        start = opened.read(64)
    if not start:
        raise PararnnError(f"{file}: the file is empty")
    if start.startswith(b"PK\x03\x04"):
        return "torch"
    if start.startswith(b"version https://git-lfs"):
        raise PararnnError(f"{file}: this is a Git LFS pointer, not the weights; run: git lfs pull")
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise PararnnError(
            f"{file}: this is a pickle in PyTorch's old format (before 1.6), which is not read; "
            'load it in PyTorch and save it again: torch.save(model.state_dict(), "weights.pt")'
        )
    if file.suffix == ".safetensors" or start[8:9] == b"{":
        return "safetensors"
    raise PararnnError(f"{file}: neither a safetensors file nor a PyTorch checkpoint (torch.save)")


def _refuse_quantized(tensors: dict[str, Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        if name.endswith(_QUANTIZED_NAMES) or (name.endswith(".weight") and tensor.dtype not in FLOATS):
            raise PararnnError(
                f"{file}: it looks quantized ({shown(name)} holds {tensor.dtype} numbers), which cannot be "
                "converted; save the unquantized model in PyTorch"
            )


def _unwrapped(raw: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        plain = _without_wrappers(name)
        if plain in tensors:
            raise PararnnError(
                f"{file}: {shown(plain)} is there twice, with and without a training wrapper's prefix"
            )
        tensors[plain] = tensor
    return tensors


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ties(tensors: dict[str, Tensor], aliases: dict[str, str]) -> dict[str, str]:
    """Names that share bytes; those that safetensors' metadata names as left out are added to `tensors`."""
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if tensor.storage in first:
            tied[name] = first[tensor.storage]
        first.setdefault(tensor.storage, name)
    for alias, target in ((_without_wrappers(a), _without_wrappers(t)) for a, t in aliases.items()):
        if target in tensors and alias not in tensors:
            tensors[alias] = tensors[target]
            tied[alias] = target
    return tied
