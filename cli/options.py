"""Options that `generate` and `chat` share, and what they mean to MLX-LM."""

import codecs
import os
import re
import select
import shlex
import stat
import sys
from collections.abc import Iterator
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar, cast

import typer

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.files.model_files import has_plain_tokenizer
from mlx_pararnn.quick_start import start_quickly

from .progress import loading
from .report import expand_home, launched, size

T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_pararnn.images.image_model import ImageModel
    from mlx_pararnn.model import Model


class Dtype(StrEnum):
    """Number formats of weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _above_zero(value: float | None) -> float | None:
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
PIPE_SECONDS = 1.0
MAX_TEXT_BYTES = 64 << 20  # a million tokens take less than a tenth
BLOCK_BYTES = 64 << 10

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
PREFILL_STEP_SIZE = 2048  # MLX-LM's
PrefillStepSize = Annotated[
    int,
    typer.Option(
        "--prefill-step-size", min=1, help="Read so many tokens of a prompt at once; fewer take less memory."
    ),
]
# Left out, an option of sampling is what the model's generation_config.json says, or the command's default.
Temp = Annotated[
    float | None,
    typer.Option(
        "--temp",
        "--temperature",
        min=0.0,
        max=100.0,
        help="Sampling temperature; 0 takes the likeliest token. Left out, the model's own setting.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        callback=_above_zero,
        help="Sample from the likeliest tokens that add up to this probability; 1 is off.",
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=0, help="Sample from this many likeliest tokens; 0 is off.")
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        min=0.0,
        max=1.0,
        help="Leave out tokens less likely than this share of the likeliest; 0 is off.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
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


def command_line(modules: list[str] | None, *words: str) -> str:
    """A command to give next, with the modules that this one was given, as a shell takes it."""
    imports = [word for name in modules or [] for word in ("--import", name)]
    return shlex.join(["mlx-pararnn", *words, *imports])


def read_stdin(most: int | None) -> Iterator[str]:
    """All of standard input, as `read_blocks` gives it."""
    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        typer.echo(f"Type the text; {end} on a line of its own ends it, Ctrl-C leaves.", err=True)
    return read_blocks(sys.stdin.buffer, "standard input", most)


def read_piped(most: int | None) -> Iterator[str]:
    """What a pipe or a file at standard input holds, as `read_blocks` gives it; nothing of anything else.

    A pipe that another program has left open never ends: after a second it is said what is waited for.
    """
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed
        return iter(())
    if launched() or not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return iter(())
    if not select.select([sys.stdin], [], [], PIPE_SECONDS)[0]:
        typer.echo(
            "Waiting for the end of the pipe at standard input, which goes before the prompt; "
            "</dev/null leaves it out.",
            err=True,
        )
    return read_blocks(sys.stdin.buffer, "standard input", most)


def read_file(path: Path, most: int | None) -> Iterator[str]:
    """What `path` holds, a file or a pipe, as `read_blocks` gives it."""
    with path.open("rb") as file:
        yield from read_blocks(file, str(path), most)


def read_blocks(file: BinaryIO, name: str, most: int | None) -> Iterator[str]:
    """What is left in `file`, as `as_text` reads it, without the new line that ends its last line.

    Raises:
        PararnnError: it has more than `most` bytes, as a device's zeros have, which never end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    held, read, ended = "", 0, False
    while not ended:
        data = file.read(BLOCK_BYTES)
        read += len(data)
        if most is not None and read > most:
            raise PararnnError(
                f"{name} holds more than {most >> 20} MB, too much for one text; give a part of it"
            )
        ended = len(data) < BLOCK_BYTES  # a terminal is not asked again
        held += decoder.decode(data, ended)
        yield held[:-2]
        held = held[-2:]
    yield held.removesuffix("\n").removesuffix("\r")


def as_text(data: bytes) -> str:
    """UTF-8; what is none comes through as surrogates, for the library to refuse."""
    return data.decode("utf-8", errors="surrogateescape")


def load(
    model: str | None, modules: list[str] | None, adapters: Path | None = None, state: Path | None = None
) -> "tuple[Model, TokenizerWrapper]":
    """The model that a command names, or the bundled one, and its tokenizer."""
    path = find(model, modules)
    with loading(model or "the bundled model"):
        _start(path)
        from mlx_pararnn.distributed import world
        from mlx_pararnn.loading import load as load_pair
        from mlx_pararnn.loading import warm_up
        from mlx_pararnn.pocket.protocol import check_is_whole

        pair = load_pair(path, adapter_path=adapters, state=state, group=world())
        check_is_whole(*pair)
        warm_up(pair[0])
    say_parts(pair[0])
    return pair


def load_with_images(
    model: str | None, modules: list[str] | None, adapters: Path | None = None, state: Path | None = None
) -> "tuple[Model, TokenizerWrapper, ImageModel | None]":
    """As `load`, and the model that sees images where that is one."""
    path = find(model, modules)
    with loading(model or "the bundled model"):
        _start(path)
        from mlx_pararnn.distributed import world
        from mlx_pararnn.images.image_model import load_with_images as load_all
        from mlx_pararnn.loading import warm_up
        from mlx_pararnn.pocket.protocol import check_is_whole

        loaded = load_all(path, adapter_path=adapters, state=state, group=world())
        check_is_whole(*loaded[:2])
        warm_up(loaded[0])
    say_parts(loaded[0])
    return loaded


def load_image_model(
    model: str | None, modules: list[str] | None, adapters: Path | None = None, state: Path | None = None
) -> "tuple[ImageModel, TokenizerWrapper]":
    """The model that a command names if it sees images, and its tokenizer."""
    from mlx_pararnn.images.config import NONE_BUNDLED

    if model is None:
        raise PararnnError(NONE_BUNDLED)
    if launched():
        raise PararnnError("a model that sees images runs in one process; start it without mlx.launch")
    path = find(model, modules)
    with loading(model):
        from mlx_pararnn.images.image_model import load_image_model as load_pair
        from mlx_pararnn.loading import warm_up

        pair = load_pair(path, adapter_path=adapters, state=state)
        warm_up(pair[0].language_model)
    return pair


def load_model(
    model: str | None, modules: list[str] | None, adapters: Path | None = None, state: Path | None = None
) -> "tuple[Model, dict[str, Any], Path]":
    """The same without a tokenizer: the model, its config, and its folder."""
    path = find(model, modules)
    with loading(model or "the bundled model"):
        start_quickly()
        from mlx_pararnn.distributed import world
        from mlx_pararnn.loading import load_model as load_alone
        from mlx_pararnn.loading import warm_up

        alone, config = load_alone(path, adapter_path=adapters, state=state, group=world())
        warm_up(alone)
    say_parts(alone)
    return alone, config, path


def _start(path: Path) -> None:
    """Have MLX-LM without transformers where the model's tokenizer does not need it."""
    if has_plain_tokenizer(path):
        start_quickly()


def say_parts(model: "Model") -> None:
    """How many bytes of weights each of several processes has."""
    if model.group is None:
        return
    from mlx_pararnn.compute.module_arrays import named_arrays
    from mlx_pararnn.distributed import all_numbers

    own = sum(array.nbytes for _, array in named_arrays(model.parameters()))
    parts = [f"{size(nbytes)} in rank {rank}" for rank, nbytes in enumerate(all_numbers(model.group, own))]
    typer.echo(f"weights: {', '.join(parts)}", err=True)


def from_rank_0(read: "Callable[[], T]") -> "T":
    """What `read` gives in rank 0, in all processes; only rank 0 calls it."""
    if not launched():
        return read()
    from mlx_pararnn.distributed import share, world

    group = world()
    if group is None:
        return read()
    return cast("T", share(group, read() if group.rank() == 0 else None))


def blocks_from_rank_0(blocks: Iterator[str]) -> Iterator[str]:
    """What `blocks` gives in rank 0, in all processes, one after another."""
    while (block := from_rank_0(lambda: next(blocks, None))) is not None:
        yield block


def check_for_prompt(model: str | None, *, or_word: bool) -> None:
    """Refuse a MODEL that is no folder and reads like a prompt: text between words, or with `or_word` one."""
    text = model and (re.search(r"[\s()?!,;:=\"']", model) or (or_word and model.isalpha()))
    if model and text and not Path(model).exists():
        from mlx_pararnn.files.hub import find_model

        try:
            find_model(model)
        except PararnnError as error:
            raise PararnnError(f"{error}; {meant_prompt(None, model)}") from None


def meant_prompt(model: str | None, text: str) -> str:
    """The question whether the command with that prompt was meant; a MODEL that is none belongs to it."""
    from mlx_pararnn.files.hub import is_hub_name

    if model and not Path(model).exists() and not is_hub_name(model, with_owner=True):
        model, text = None, f"{model} {text}"
    words = ["mlx-pararnn", "generate", *([model] if model else []), "-p", text]
    return f"did you mean {shlex.join(words)}?"


def find(model: str | None, modules: list[str] | None) -> Path:
    """The folder of the model that a command names; --import's modules are imported once it is known."""
    from mlx_pararnn.files.hub import BUNDLED, find_model

    path = BUNDLED if model is None else find_model(model)  # a wrong name is told before seconds of importing
    import_modules(modules)
    return path


def given_sampling(
    temp: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The options of sampling by the names of `Sampling`; None where one is left out."""
    return {
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
