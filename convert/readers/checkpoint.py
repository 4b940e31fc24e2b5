"""Opens a checkpoint, whatever its form: the one place that knows which file to read and what it is."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.hub import CHECKPOINTS, download, is_hub_name

from .dcp import METADATA
from .dtypes import FLOATS
from .forms import PACKAGE_FILE, PACKAGE_KINDS, find_weights, read_json_object, read_weights
from .links import check_link
from .tensors import Tensor
from .wording import shown

# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into a parameter's path.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Beside packed integers in GPTQ, AWQ, bitsandbytes and MLX files.
_QUANTIZED_NAMES = (".qweight", ".qzeros", ".scales", ".SCB", ".absmax", ".weight_scale", ".weight_packed")
# What else is fetched of a repository on the hub; never a Python file.
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")
_CHOICES = "pass a file or folder with the weights"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, unread.

    Attributes:
        path: the file with the weights, or the one that says where they are.
        source: the file or folder that was asked for.
        title: what to call the source where others read it.
        folder: where the user's configuration and tokenizer files are looked for.
        tensors: by name, training wrappers stripped from it; tied names are all present.
        tied: a name -> the name whose bytes it shares, as far as the file says so.
        config: config.json of the folder, or None.
        training_config: what the training loop saved as its configuration, where that is plain data.
        headers_only: tensors are not to be read; whether two matrices are equal is then taken on trust.
    """

    path: Path
    source: Path
    title: str
    folder: Path
    tensors: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    training_config: dict[str, Any] | None = None
    headers_only: bool = False


def open_checkpoint(source: str | Path, packed: bool = False) -> Checkpoint:
    """Open a checkpoint: a file, a folder, or a repository on the Hugging Face hub by its name.

    With `packed` also an MLX model whose weights are quantized; its tensors are those of the file.

    Raises:
        PararnnError: there is nothing there, or not a checkpoint that can be read; the message says which.
    """
    path = Path(source)
    if not path.exists():
        path = _from_hub(str(source))
    for kind in PACKAGE_KINDS:
        if (path / kind.name).is_dir():
            raise PararnnError(
                f"{path}: a {kind.title} package, not a checkpoint; {PACKAGE_FILE} in it says what it is, "
                "and mlx-pararnn verify checks it"
            )
    file = find_weights(path)
    weights = read_weights(file)
    tensors = _unwrapped(weights.tensors, file)
    if not tensors:
        raise PararnnError(f"{file}: there are no tensors inside")
    folder = path if path.is_dir() else path.parent
    check_link(folder / "config.json", folder)
    config = read_json_object(folder / "config.json")
    if not (packed and (config or {}).get("model_type") == "pararnn"):
        _refuse_quantized(tensors, file, config or {})
    return Checkpoint(
        path=file,
        source=path,
        title=_title(str(source), path),
        folder=folder,
        tensors=tensors,
        tied=_ties(tensors, weights.aliases),
        config=config,
        training_config=weights.training_config,
    )


def check_source(name: str) -> None:
    """Raise a PararnnError for what is neither there nor a name of the hub; nothing is opened or fetched."""
    if Path(name).exists():
        return
    if not is_hub_name(name, with_owner=True) or Path(name).suffix in (*CHECKPOINTS, ".distcp"):
        looks_like_path = "/" in name or "." in name
        other = "" if looks_like_path else ", and not a Hugging Face name (owner/name)"
        raise PararnnError(f"{shown(name)}: no such file or folder{other}")


def _from_hub(name: str) -> Path:
    check_source(name)
    folder = download(name, (*_BESIDE, "model*.safetensors"), _CHOICES)
    if not any(folder.glob("model*.safetensors")):
        folder = download(
            name, (*_BESIDE, METADATA, *(f"*{suffix}" for suffix in (*CHECKPOINTS, ".distcp"))), _CHOICES
        )
    return folder


def _title(source: str, path: Path) -> str:
    """What the model card calls the source: a name of the hub, or the last part of a path."""
    return (
        source if is_hub_name(source, with_owner=True) and not Path(source).exists() else path.resolve().name
    )


def _refuse_quantized(tensors: dict[str, Tensor], file: Path, config: dict[str, Any]) -> None:
    if config.get("model_type") == "pararnn" and "quantization" in config:
        raise PararnnError(
            f"{file}: it looks quantized, a model that convert -q wrote; convert the checkpoint that it came "
            f"from, or unpack it first: mlx-pararnn lm convert --hf-path {shlex.quote(str(file.parent))} "
            "--mlx-path UNPACKED -d"
        )
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
