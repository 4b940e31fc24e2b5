"""Models from folders and from the Hugging Face hub. No Python file of a model folder is ever run."""

import json
import shlex
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tokenizer_utils
import mlx_lm.utils
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors import SafetensorError, safe_open

from .blocks import RecurrentLayer
from .cache import RecurrentCache
from .compute.module_arrays import named_arrays
from .distributed import Group
from .errors import PararnnError, one_line
from .files.hub import BUNDLED, find_model
from .files.model_files import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    check_files,
    check_json,
    check_safetensors,
    open_regular,
    plain_tokenizer_parts,
    read_json,
)
from .mlx_lm_internals import plain_tokenizer, set_chat_template, set_detokenizer
from .model import Model
from .model_config import ModelArgs, check_end_ids, check_layers, weight_bits
from .process.address_space import check_room
from .process.forking import note_use_of_mlx
from .quick_start import started_quickly
from .text.detokenizer import Detokenizer
from .text.plain_tokenizer import PlainTokenizer

STATES = "initial_state.safetensors"

# What transformers calls a tokenizer that is its tokenizer.json and nothing else; any model type that has one
# gives that class.
PLAIN_TOKENIZER_TYPE = "glm4"

MAX_TEMPLATE = 1 << 17

# What MLX and MLX-LM raise where weights are not those that a config describes.
_MISFITS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)


def load(
    path_or_hf_repo: str | Path = BUNDLED,
    *,
    adapter_path: str | Path | None = None,
    state: str | Path | None = None,
    group: Group | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """A model and its tokenizer.

    Args:
        path_or_hf_repo: a folder that `mlx-pararnn convert` wrote, or a repository on the Hugging Face hub;
            without it, the pocket model that comes with the package.
        adapter_path: a folder of adapters for this model, as `mlx-pararnn lm lora` and `mlx-pararnn train
            --tune lora` write them; they are added into the weights unless these are quantized.
        state: a file of learned initial states (`mlx-pararnn train --tune state`) that goes before those
            of the model's own weights; None for these, or zeros.
        group: processes that the model is divided among (`Model.shard`); each reads its part of the weights.

    Raises:
        PararnnError: there is no such model, or it is not whole; the message says what to do.
    """
    path = find_model(path_or_hf_repo)
    model, config = load_model(path, adapter_path=adapter_path, state=state, group=group)
    return model, load_tokenizer(path, config)


def load_model(
    path_or_hf_repo: str | Path = BUNDLED,
    *,
    adapter_path: str | Path | None = None,
    state: str | Path | None = None,
    lazy: bool = False,
    group: Group | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model and its config.json as a dict, without a tokenizer; as `load` otherwise.

    With `lazy` a weight is read from its file when it is first used.
    """
    note_use_of_mlx()
    path = find_model(path_or_hf_repo)
    config = _read_config(path)
    if config.get("model_type") != "pararnn":
        raise PararnnError(
            f"{path / 'config.json'} has model_type {config.get('model_type')!r}, not 'pararnn'; "
            + (
                "a single cell is loaded with mlx_pararnn.load_cell"
                if config.get("model_type") == "pararnn_cell"
                else "convert a PyTorch checkpoint first: mlx-pararnn convert CKPT -o OUT"
            )
        )
    _check_config(path, config)
    try:
        nbytes = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
        check_room(nbytes, f"the weights in {path} take", "choose a smaller model")
        # model_file is what would make MLX-LM run Python from the folder
        model, config = mlx_lm.utils.load_model(
            path,
            lazy=lazy or group is not None,
            model_config={"model_file": None},
            get_model_classes=lambda config: (Model, ModelArgs),
        )
        model = cast(Model, model)
        check_dtypes(path, model)
        if adapter_path is not None:
            load_adapters(model, Path(adapter_path))
        if state is not None:
            load_states(model, Path(state))
        if group is not None:
            model.shard(group)
            if not lazy:
                mx.eval(model.parameters())
        return model, config
    except PararnnError:
        raise
    except FileNotFoundError:
        raise PararnnError(f"no model*.safetensors in {path}; convert the checkpoint again") from None
    except OSError as error:
        raise PararnnError(f"the weights in {path} cannot be read ({one_line(error)})") from error
    except _MISFITS as error:
        raise _misfit(path, error) from error


def load_adapters(model: Model, folder: Path) -> None:
    """Give the model the adapters in `folder`, added into its weights unless these are quantized.

    Raises:
        PararnnError: the folder holds no adapters, or they are of another model.
    """
    for name in ("adapter_config.json", "adapters.safetensors"):
        try:
            with open_regular(folder / name):
                pass
        except (FileNotFoundError, NotADirectoryError):
            raise PararnnError(
                f"{folder}: holds no adapters ({name} is missing); mlx-pararnn lm lora writes them"
            ) from None
    import mlx_lm.tuner.utils

    _read_object(folder / "adapter_config.json")  # for its size; MLX-LM reads it itself
    check_safetensors(folder / "adapters.safetensors")
    try:
        mlx_lm.tuner.utils.load_adapters(model, str(folder))
        with safe_open(folder / "adapters.safetensors", "numpy") as file:
            given = set(file.keys())
    except (*_MISFITS, SafetensorError) as error:
        raise PararnnError(
            f"{folder}: its adapters do not fit this model ({one_line(error)}); give the model that they "
            "were trained with"
        ) from error
    # A rank that the file does not bear out would be made up, in any size, when it is evaluated.
    names = [name for name, _ in named_arrays(model.parameters())]
    lacking = [name for name in names if name.endswith((".lora_a", ".lora_b")) and name not in given]
    if lacking or not given:
        raise PararnnError(
            f"{folder}: its adapters are not whole ({lacking[0] if lacking else 'every weight'} is missing); "
            "copy or download the folder again"
        )
    model.eval()
    if not any("scales" in module for _, module in model.named_modules()):
        fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
        model.update_modules(tree_unflatten(fused))
    mx.eval(model.parameters())


def load_states(model: Model, file: Path) -> None:
    """Give every layer the initial state that `file` has for it.

    Raises:
        PararnnError: the file cannot be read, or is of another model.
    """
    try:
        check_safetensors(file)
        arrays = cast(dict[str, mx.array], mx.load(str(file), "safetensors"))
        mx.eval(arrays)
    except FileNotFoundError:
        raise PararnnError(f"{file}: no such file; --state takes what train --tune state wrote") from None
    except (RuntimeError, OSError, ValueError) as error:  # a name in it may be no UTF-8
        raise PararnnError(f"{file} cannot be read ({one_line(error)})") from error
    wanted = {}
    for number, layer in enumerate(model.layers):
        cell = layer.mixer.cell
        wanted[f"layers.{number}"] = (len(cell.cell.slots), cell.recurrent_weight.shape[1])
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise PararnnError(
            f"{file}: is not the initial states of this model, which has {len(wanted)} layers with states of "
            f"{' x '.join(map(str, wanted['layers.0']))}; give the model that they were learned with"
        )
    for number, layer in enumerate(model.layers):
        layer.mixer.cell.add_initial_state(arrays[f"layers.{number}"])


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse what would take the machine before MLX-LM looks at the weights, or end the process."""
    file = path / "config.json"
    weight_bits(config, file)
    check_end_ids(config, file)
    if isinstance(config.get("text_config"), dict):  # where MLX-LM looks for what it misses
        weight_bits(config["text_config"], file)
    for name in ("generation_config.json", "hf_quant_config.json"):  # which MLX-LM reads too
        try:
            more = _read_object(path / name)
        except FileNotFoundError:
            continue
        except PararnnError as error:
            if name.startswith("generation_") and isinstance(error.__cause__, json.JSONDecodeError):
                continue  # as MLX-LM passes over it
            raise
        check_end_ids(more, path / name)
        if name.startswith("hf_") and not config.keys() & {"quantization", "quantization_config"}:
            weight_bits({"quantization_config": more}, path / name)
    names = _names_of_weights(path)
    if names is not None:
        check_layers(config, names, path)


def check_dtypes(path: Path, model: nn.Module) -> None:
    """Refuse weights that are no floating-point numbers, but for those that are packed with scales."""
    weights = dict(named_arrays(model.parameters()))
    for name, weight in weights.items():
        packed = f"{name.rpartition('.')[0]}.scales" in weights
        if not (packed or mx.issubdtype(weight.dtype, mx.floating)):
            kind = str(weight.dtype).removeprefix("mlx.core.")
            raise PararnnError(
                f"the weights in {path} cannot be used: {name} holds {kind} numbers; convert the checkpoint "
                "again"
            )


def _names_of_weights(path: Path) -> set[str] | None:
    """What the headers of the weights name; None where there are no weights to ask."""
    files = sorted(path.glob("model*.safetensors"))
    names: set[str] = set()
    for file in files:
        check_safetensors(file)
        try:
            with safe_open(file, "numpy") as opened:
                names.update(opened.keys())
        except (SafetensorError, OSError) as error:
            raise _misfit(path, error) from error
    return names if files else None


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer in a model folder, as MLX-LM wraps it.

    Raises:
        PararnnError: there is none, or it cannot be read.
    """
    check_has_tokenizer(path)
    check_files(path)
    for name in TOKENIZER_FILES:
        if name.endswith(".json"):
            check_json(path / name)
    try:
        tokenizer = (_plain if started_quickly() else _by_transformers)(path, config)
    except PararnnError:
        raise
    except BaseException as error:  # transformers raises whatever the broken file leads it to
        # a panic of the library in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PararnnError(f"the tokenizer in {path} cannot be read ({one_line(error)})") from error
    _check_templates(tokenizer.chat_template, path)
    # MLX-LM's own drops the first space of a byte-level tokenizer's text, and slows down along a line.
    set_detokenizer(tokenizer, Detokenizer(tokenizer))
    if tokenizer.has_chat_template:
        from .text.chat_template import ChatTemplate

        set_chat_template(tokenizer, ChatTemplate(plain_tokenizer(tokenizer)))
    return tokenizer


def _plain(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    tokenizer = PlainTokenizer(path, *plain_tokenizer_parts(path))
    ends = config.get("eos_token_id")
    wrapper = TokenizerWrapper(
        tokenizer, Detokenizer, eos_token_ids=[ends] if isinstance(ends, int) else ends
    )
    wrapper.has_chat_template = tokenizer.chat_template is not None  # MLX-LM asks transformers' classes
    return wrapper


def _by_transformers(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    from transformers import PreTrainedConfig
    from transformers.utils import logging as transformers_logging

    # transformers asks on stdin whether it may run a folder's Python unless it is told. Given a config it
    # does not read config.json, whose model_type it does not know and whose auto_map may name Python too.
    options: dict[str, Any] = {"trust_remote_code": False, "config": PreTrainedConfig()}
    if _names_python(path):
        if not (path / "tokenizer.json").is_file():
            raise PararnnError(
                f"the tokenizer in {path} is Python code (auto_map in tokenizer_config.json), which is never "
                "run; convert again with --tokenizer and a folder that has a tokenizer.json"
            )
        options["tokenizer_type"] = PLAIN_TOKENIZER_TYPE
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of every model_type that is not its own
    try:
        return mlx_lm.tokenizer_utils.load(path, options, eos_token_ids=config.get("eos_token_id"))
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_has_tokenizer(path: Path) -> None:
    """Raise a PararnnError if there is no file of a tokenizer in a model folder."""
    if not any((path / name).exists() for name in ("tokenizer_config.json", *VOCABULARY_FILES)):
        raise PararnnError(
            f"no tokenizer in {path}; mlx-pararnn add-tokenizer {shlex.quote(str(path))} DIR, REPO or bytes "
            "gives it one, and mlx_pararnn.load_model works with token ids"
        )


def _check_templates(templates: Any, path: Path) -> None:
    """`templates`: a text, or a text for each purpose; compiling one takes 2 KB a character and more."""
    for text in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(text, str) and len(text) > MAX_TEMPLATE:
            raise PararnnError(
                f"the chat template in {path} is larger than any model's ({len(text):,} characters, "
                f"{MAX_TEMPLATE:,} at most); put the model's own chat_template.jinja there"
            )


def _names_python(path: Path) -> bool:
    """Whether the tokenizer's class is in a Python file, of the folder or of another repository."""
    file = path / "tokenizer_config.json"
    try:
        config = read_json(file)
    except FileNotFoundError:
        return False
    return isinstance(config, dict) and "auto_map" in config


def load_cell(path: str | Path) -> tuple[RecurrentLayer, dict[str, Any]]:
    """A bare cell that `mlx-pararnn convert` wrote, and its config: call it with x (B, T, input_size).

    Raises:
        PararnnError: the folder holds no cell, or one whose weights do not fit.
    """
    note_use_of_mlx()
    path = Path(path)
    config = _read_config(path)
    if config.get("model_type") != "pararnn_cell":
        raise PararnnError(
            f"{path / 'config.json'} has model_type {config.get('model_type')!r}, not 'pararnn_cell'"
        )
    weights = path / "model.safetensors"
    try:
        check_safetensors(weights)
        layer = RecurrentLayer(
            config["cell"],
            config["input_size"],
            config["hidden_size"],
            config["num_heads"],
            config.get("activations"),
        )
        layer.load_weights(str(weights))
    except PararnnError:
        raise
    except FileNotFoundError:
        raise PararnnError(f"no model.safetensors in {path}; convert the checkpoint again") from None
    except _MISFITS as error:
        raise _misfit(path, error) from error
    mx.eval(layer.parameters())
    return layer, config


def warm_up(model: Model) -> list[RecurrentCache]:
    """Read two tokens and one more, so that nothing is compiled any more at a text; gives the state after."""
    states = model.make_cache()
    for tokens in ([[0, 0]], [[0]]):
        mx.eval(model(mx.array(tokens), cache=states))
    return states


def _read_config(path: Path) -> dict[str, Any]:
    try:
        check_files(path)
        return _read_object(path / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        for title, package in (("Core ML", "model.mlpackage"), ("Core AI", "model.aimodel")):
            if (path / package).exists():
                raise PararnnError(
                    f"{path} is a {title} package, which Swift runs and mlx-pararnn verify checks; here "
                    "give a model folder: convert the checkpoint again without --to"
                ) from None
        raise PararnnError(
            f"no config.json in {path}: not a model folder; make one with mlx-pararnn convert CKPT -o OUT"
        ) from None


def _read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise PararnnError(f"{file} is not a JSON object")
    return value


def _misfit(path: Path, error: Exception) -> PararnnError:
    return PararnnError(
        f"the weights in {path} do not fit its config.json ({one_line(error)}); convert the checkpoint again"
    )
