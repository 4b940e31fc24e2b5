"""The forms that weights come in: one file, several with an index, a distributed checkpoint's folder."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.hub import CHECKPOINTS
from mlx_pararnn.files.model_files import open_regular, read_json

from .budget import check_count
from .dcp import METADATA, read_dcp
from .links import check_link
from .safetensors_file import read_safetensors
from .tensors import Tensor
from .torch_file import read_torch_file
from .wording import listed

# What a folder holds that `convert --to coreml` or `--to coreai` wrote, beside the package and a tokenizer.
PACKAGE_FILE = "pararnn.json"
PACKAGE_REFERENCE = "reference.safetensors"
_INDEX = ".index.json"
_ACCELERATE = "pytorch_model_fsdp_0"  # where accelerate saves a sharded model, as a distributed checkpoint
# What trainers put beside the weights: of accelerate and of transformers' Trainer.
_COMPANION = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|training_args)(_\d+)?\.(bin|pt|pth)"
)
_SHARD = re.compile(r"(.+)-\d+-of-\d+(\.safetensors|\.bin)")
# DeepSpeed: one rank's optimizer states, and with ZeRO-3 its part of the weights.
_ZERO = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+.*states\.pt")
_MAKE_WHOLE = (
    "make it whole first: python zero_to_fp32.py FOLDER OUT, where FOLDER holds `latest`; then pass OUT"
)


@dataclass(frozen=True)
class PackageKind:
    """A kind of package for apps.

    Attributes:
        title: its runtime's name.
        format: what its `PACKAGE_FILE` says it is.
        name: of the package in its folder.
    """

    title: str
    format: str
    name: str


COREML = PackageKind("Core ML", "pararnn-coreml", "model.mlpackage")
COREAI = PackageKind("Core AI", "pararnn-coreai", "model.aimodel")
PACKAGE_KINDS = (COREML, COREAI)


@dataclass
class Weights:
    """Tensors by name as the files spell them, unread; names whose bytes another has; the training's cfg."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    training_config: dict[str, Any] | None = None


def is_mlx_model(source: str | Path) -> bool:
    """Whether `source` is a folder with a model for MLX."""
    config = read_json_object(Path(source) / "config.json") if Path(source).is_dir() else None
    return config is not None and config.get("model_type") == "pararnn"


def find_weights(path: Path) -> Path:
    """The file to begin with: `path`, or in a folder the weights, their index or a distributed .metadata.

    Raises:
        PararnnError: there is none, several, or only a part of one.
    """
    if path.is_dir():
        file = _in_folder(path)
        check_link(file, path)
        return file
    if path.suffix == ".distcp":
        raise PararnnError(
            f"{path}: this is one rank's part of a torch.distributed.checkpoint folder; pass the folder"
        )
    if _ZERO.fullmatch(path.name):
        raise PararnnError(f"{path}: this is one rank's part of a DeepSpeed ZeRO checkpoint; {_MAKE_WHOLE}")
    if (match := _SHARD.fullmatch(path.name)) and (path.parent / f"{match[1]}{match[2]}{_INDEX}").is_file():
        raise PararnnError(f"{path}: this is one of several files that belong together; pass their folder")
    if not path.is_file():
        raise PararnnError(f"{path}: not a regular file")
    return path


def read_weights(file: Path) -> Weights:
    """What `file` (from `find_weights`) and those that belong to it hold; only headers are read.

    Raises:
        PararnnError: it is not a checkpoint, is damaged, names more tensors than any has, or a part of it is
            missing.
    """
    weights = _read(file)
    check_count(file, len(weights.tensors))
    return weights


def _read(file: Path) -> Weights:
    if file.name.endswith(_INDEX):
        return _read_sharded(file)
    if file.name == METADATA:
        return Weights(read_dcp(file.parent))
    if _kind(file) == "safetensors":
        return Weights(*read_safetensors(file))
    tensors, training_config = read_torch_file(file)
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    if 2 * len(empty) > len(tensors):
        raise PararnnError(
            f"{file}: {len(empty)} of {len(tensors)} tensors are empty ({listed(empty)}), as in one rank's "
            f"file of DeepSpeed ZeRO-3; {_MAKE_WHOLE}"
        )
    return Weights(tensors, training_config=training_config)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file.

    Raises:
        PararnnError: it cannot be parsed or is not an object.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise PararnnError(f"{path}: a JSON object was expected")
    return value


def package_kind(folder: Path) -> PackageKind | None:
    """The kind of package that a folder says it holds; None for any other folder.

    Raises:
        PararnnError: its `PACKAGE_FILE` cannot be parsed.
    """
    settings = (read_json_object(folder / PACKAGE_FILE) if folder.is_dir() else None) or {}
    return next((kind for kind in PACKAGE_KINDS if kind.format == settings.get("format")), None)


def check_package_files(folder: Path) -> None:
    """Raise a PararnnError for a pipe or a device in an exported folder, which a library would wait for."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            with open_regular(path):
                pass


def _in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (folder / name, folder / f"{name}{_INDEX}"):
            if file.is_file():
                return file
    if (folder / METADATA).is_file():
        return folder / METADATA
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))  # Finder's files
    found = [entry for entry in entries if entry.suffix in CHECKPOINTS and entry.is_file()]
    _check_other_trainers(folder, entries)
    files = [file for file in found if not _COMPANION.fullmatch(file.name)]
    names = listed([file.name for file in files])
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            raise PararnnError(
                f"{folder}: the weights are split into several files ({names}) and their index "
                f"{match[1]}{match[2]}{_INDEX} is missing; download or copy it too"
            )
    if len(files) == 1:
        return files[0]
    if not files and (folder / _ACCELERATE / METADATA).is_file():
        return folder / _ACCELERATE / METADATA
    if files:
        raise PararnnError(f"{folder}: there are several checkpoints inside ({names}); pass one of the files")
    nested = [entry.name for entry in entries if any(file.suffix in CHECKPOINTS for file in entry.glob("*"))]
    advice = (
        f"; {listed(nested)} in it {'has' if len(nested) == 1 else 'have'} such files, pass the folder meant"
    )
    if found and not nested:
        raise PararnnError(
            f"{folder}: no weights inside, only what a trainer saves beside them "
            f"({listed([file.name for file in found])}); pass the folder with the model"
        )
    raise PararnnError(
        f"{folder}: no checkpoint inside (a file ending in {', '.join(CHECKPOINTS)})"
        + (advice if nested else "")
    )


def _check_other_trainers(folder: Path, entries: list[Path]) -> None:
    """Raise for what a distributed trainer left that is not whole, and say how it becomes so."""
    names = [entry.name for entry in entries]
    if (folder / "latest").is_file() or any(map(_ZERO.fullmatch, names)):
        raise PararnnError(
            f"{folder}: this is a DeepSpeed checkpoint, whose weights are split; {_MAKE_WHOLE}"
        )
    parts = [name for name in names if name.endswith(".distcp")]
    if parts:
        raise PararnnError(
            f"{folder}: {len(parts)} parts of a torch.distributed.checkpoint ({listed(parts)}) without their "
            f"{METADATA}, a hidden file that says what they hold; copy it too"
        )


def _read_sharded(index: Path) -> Weights:
    folder = index.parent
    weight_map = (read_json_object(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in weight_map.values()
    ):
        raise PararnnError(
            f"{index}: it does not say which file holds which tensor (weight_map); download it again"
        )
    names = sorted(set(weight_map.values()))
    # Not Path.is_file, which raises where a name is too long for any file.
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise PararnnError(
            f"{index}: {len(missing)} of the {len(names)} files it names are not there: {listed(missing)}; "
            "download or copy them beside it"
        )
    stem = index.name.removesuffix(_INDEX).partition(".")[0]
    beside = [
        entry.name for entry in folder.iterdir() if (m := _SHARD.fullmatch(entry.name)) and m[1] == stem
    ]
    surplus = sorted(set(beside) - set(names))
    if surplus:
        raise PararnnError(
            f"{index}: it does not name {listed(surplus)}, which stand beside it; if they are left over from "
            "another download, delete them"
        )
    whole = Weights({})
    for name in names:
        check_link(folder / name, folder)
        part = read_weights(folder / name)
        said = {tensor for tensor, file in weight_map.items() if file == name}
        for difference, verb in (
            (said - part.tensors.keys(), "lacks"),
            (part.tensors.keys() - said, "holds"),
        ):
            if difference:
                raise PararnnError(
                    f"{folder / name}: it {verb} {listed(sorted(difference))}, and {index.name} says "
                    "otherwise; download both again"
                )
        whole.tensors |= part.tensors
        whole.aliases |= part.aliases
    return whole


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
    if start[8:9] == b"{":  # before all else: the size in front of it may begin like a pickle
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise PararnnError(
            f"{file}: this is a pickle in PyTorch's old format (before 1.6), which is not read; "
            'load it in PyTorch and save it again: torch.save(model.state_dict(), "weights.pt")'
        )
    if file.suffix == ".safetensors":
        return "safetensors"
    raise PararnnError(f"{file}: neither a safetensors file nor a PyTorch checkpoint (torch.save)")
