"""Options that `generate` and `chat` share, and what they mean to MLX-LM."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from .report import expand_home

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_pararnn.model import Model


def _above_zero(value: float) -> float:
    if value == 0:
        raise typer.BadParameter("it must be above 0 (1 is off)")
    return value


def stop_strings(values: list[str] | None) -> list[str] | None:
    """With \\n, \\t and \\\\ as the characters they stand for, which few shells can hand over."""
    if values and "" in values:
        raise typer.BadParameter("an empty string would end every text at once")
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    return values and [re.sub(r"\\([nt\\])", lambda match: escapes[match[1]], value) for value in values]


MAX_TOKENS = 256

ModelPath = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        callback=expand_home,
        help="A folder that `mlx-pararnn convert` wrote, or a Hugging Face repository; "
        "the bundled pocket model if left out.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-m",
        min=1,
        help=f"Generate at most this many tokens; {MAX_TOKENS}, or 4096 of an answer by tools, if left out.",
    ),
]
_TEMP = typer.Option("--temp", min=0.0, max=100.0, help="Sampling temperature; 0 takes the likeliest token.")
Temp = Annotated[float, _TEMP]
TempOrModels = Annotated[float | None, _TEMP]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        callback=_above_zero,
        help="Sample from the likeliest tokens that add up to this probability; 1 is off.",
    ),
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="Sample from this many likeliest tokens; 0 is off.")
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        help="Leave out tokens less likely than this share of the likeliest; 0 is off.",
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        min=0.0,
        max=100.0,
        callback=_above_zero,
        help="Make recent tokens less likely; 1 is off.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**64 - 1, help="Draw the same tokens again.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        callback=stop_strings,
        help=r"End the text before this string; may be given several times. \n is a new line, \t a tab, \\ a "
        "backslash.",
    ),
]
Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import", metavar="MODULE", help="Import a module first, one that registers a cell of yours."
    ),
]

Adapters = Annotated[
    Path | None,
    typer.Option(
        "--adapter-path", metavar="DIR", help="Adapters that `lm lora` or `train --tune lora` made."
    ),
]

InitialState = Annotated[
    Path | None,
    typer.Option(
        "--state",
        "--initial-state",
        metavar="FILE",
        help="Begin every text from the state that `train --tune state` learned.",
    ),
]


def import_modules(names: list[str] | None) -> None:
    """Import what --import names, from the working directory too."""
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names or []:
        try:
            import_module(name)
        except Exception as error:  # the module is the user's: it may fail in any way
            hint = "; give the module's name, without .py" if name.endswith(".py") or "/" in name else ""
            raise PararnnError(f"--import {name}: {type(error).__name__}: {error}{hint}") from error


def read_stdin() -> str:
    """All of standard input without its last new line, as `as_text` reads it."""
    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        typer.echo(f"Type the text; {end} on a line of its own ends it, Ctrl-C leaves.", err=True)
    return without_new_line(as_text(sys.stdin.buffer.read()))


def as_text(data: bytes) -> str:
    """UTF-8; what is none comes through as surrogates, for the library to refuse."""
    return data.decode("utf-8", errors="surrogateescape")


def without_new_line(text: str) -> str:
    """A text without the new line that ends its last line."""
    return text.removesuffix("\n").removesuffix("\r")


def load(
    model: str | None, modules: list[str] | None, adapters: Path | None = None, state: Path | None = None
) -> "tuple[Model, TokenizerWrapper]":
    """The model that a command names, or the bundled one, and its tokenizer."""
    path = _find(model, modules)
    from mlx_pararnn.loading import load as load_pair

    return load_pair(path, adapter_path=adapters, state=state)


def load_model(
    model: str | None, modules: list[str] | None, adapters: Path | None = None, state: Path | None = None
) -> "tuple[Model, dict[str, Any], str]":
    """The same without a tokenizer: the model, its config, and its name."""
    path = _find(model, modules)
    from mlx_pararnn.loading import load_model as load_alone

    return *load_alone(path, adapter_path=adapters, state=state), model or path.name


def _find(model: str | None, modules: list[str] | None) -> Path:
    from mlx_pararnn.hub import find_model

    path = None if model is None else find_model(model)  # a wrong name is told before seconds of importing
    import_modules(modules)
    from mlx_pararnn.loading import BUNDLED

    return path or BUNDLED


def sampling(
    temp: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    vocab_size: int,
) -> dict[str, Any]:
    """The sampler and logits processors, as keyword arguments of `stream_generate`; seeds MLX."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    if seed is not None:
        mx.random.seed(seed)
    return {
        "sampler": make_sampler(temp, top_p, min_p, top_k=top_k if top_k < vocab_size else 0),
        "logits_processors": make_logits_processors(
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty
        ),
    }


def tool_sampling(
    temp: float | None,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
    model: "Model",
    tokenizer: "TokenizerWrapper",
) -> Any:
    """The sampler for a model that uses tools; None takes the likeliest token.

    Without a temperature the model's own generation_config.json is followed.

    Raises:
        PararnnError: an option that such a model's turns have no place for.
    """
    if stop or repetition_penalty != 1:
        raise PararnnError(
            "this model uses tools and ends its answers itself: --stop and --repetition-penalty are not taken"
        )
    if temp is None:
        own = generation_config(tokenizer)
        temp = 0.0
        if own.get("do_sample") is True:
            temp, top_p = _number(own, "temperature", 1.0), _number(own, "top_p", top_p)
            top_k = int(_number(own, "top_k", top_k))
    chosen = sampling(temp, top_p, top_k, min_p, repetition_penalty, seed, model.args.vocab_size)
    return chosen["sampler"] if temp else None


def generation_config(tokenizer: "TokenizerWrapper") -> dict[str, Any]:
    """What the generation_config.json beside a model's tokenizer says; nothing where there is none."""
    from mlx_pararnn.model_files import read_json

    try:
        found = read_json(Path(tokenizer.name_or_path) / "generation_config.json")
    except (PararnnError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(settings: dict[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    sound = type(value) in (int, float) and 0 <= value <= (1e9 if name == "top_k" else 100)
    return value if sound else default
