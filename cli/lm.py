"""`mlx-pararnn lm`: MLX-LM's own commands, with this package's model and cache registered."""

import argparse
import logging
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.process.watchdog import ending_signals

from .report import Debug, reports_errors, show_tracebacks

COMMANDS = (
    *("awq", "benchmark", "cache_prompt", "chat", "convert", "dwq", "dynamic_quant", "evaluate", "fuse"),
    *("generate", "gptq", "lora", "manage", "perplexity", "server", "share", "upload"),
)
# Options of theirs that name a model to be read, and folders of adapters.
MODELS = ("--model", "--hf-path", "--quantized-model", "--draft-model")
ADAPTERS = "--adapter-path"
# Those that without --model take, and download, a model of gigabytes that is not ours.
NEED_MODEL = ("awq", "benchmark", "chat", "dynamic_quant", "generate", "gptq")


@reports_errors
def lm(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND", help=f"One of: {', '.join(COMMANDS)}.")],
    debug: Debug = False,
) -> None:
    """Run an MLX-LM command on ParaRNN models.

    Everything after COMMAND goes to it, but for --debug.

    Example: mlx-pararnn lm generate --model my-model --prompt "import os"
    """
    if command not in COMMANDS:
        raise typer.BadParameter(f"no MLX-LM command {command!r}; one of: {', '.join(COMMANDS)}")
    args = [arg for arg in context.args if arg != "--debug"]
    if len(args) < len(context.args):
        show_tracebacks(True)
    if command == "server" and _names("--draft-model", args):
        raise typer.BadParameter(
            "lm server takes no --draft-model: MLX-LM's server cannot rewind a recurrent state; leave it "
            "out, or use mlx-pararnn lm generate --draft-model"
        )
    if command in NEED_MODEL and not names_a_model(command, args):
        raise typer.BadParameter(
            f"give lm {command} a --model, a folder or a Hugging Face repository; left out, MLX-LM downloads "
            "one that is no ParaRNN model"
        )
    _check_folders(command, args)
    from mlx_lm.cli import main

    _watch_tokenizers(command, args)
    _expect_our_model_type()
    if command == "generate":
        _remember_for_draft(args)
    if command in ("convert", "fuse"):
        _dequantize_every_matrix(command)
    if command in ("dwq", "lora", "perplexity"):
        _read_texts_without_an_end()
    if command == "lora":
        from .lm_training import train_as_our_models_need

        train_as_our_models_need()
    for number in ending_signals()[1:]:
        signal.signal(number, signal.SIG_DFL)  # a server's threads would outlive ours
    sys.argv = ["mlx_lm", command, *args]
    main()


def _check_folders(command: str, args: list[str]) -> None:
    """Say what MLX-LM would end in a traceback for: models and adapters that are not there."""
    from mlx_pararnn.files.hub import find_model

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in (*MODELS, ADAPTERS):
        parser.add_argument(option, dest=option)
    given = vars(parser.parse_known_args(args)[0])
    for option in MODELS:
        if given[option] is not None:
            find_model(given[option])
    adapters = given[ADAPTERS]
    if adapters is not None and command != "lora" and not Path(adapters).is_dir():  # which makes the folder
        raise PararnnError(f"{adapters}: no such folder of adapters; mlx-pararnn lm lora writes them")


def _names(option: str, args: list[str]) -> bool:
    """Whether an option is among the arguments, whole or as short as argparse takes it."""
    return any(len(arg) > 3 and option.startswith(arg.partition("=")[0]) for arg in args)


def names_a_model(command: str, args: list[str]) -> bool:
    """Whether MLX-LM is told a model, or asked for help; a kept prompt has its model's name."""
    rest = [arg for arg in args if arg.partition("=")[0] != "--prompt"]  # an option of its own
    named = any(_names(option, rest) for option in ("--model", "--prompt-cache-file", "--help"))
    short = ("-h", "-m") if command in ("awq", "dynamic_quant", "gptq") else "-h"
    return named or any(arg.startswith(short) for arg in args)


def _watch_tokenizers(command: str, args: list[str]) -> None:
    """Without --trust-remote-code a tokenizer's Python is refused; a folder without one is told so.

    Left to themselves some commands say nothing about it, so that transformers asks on stdin, and `benchmark`
    allows it always.
    """
    from transformers import AutoTokenizer

    from mlx_pararnn.loading import check_has_tokenizer

    trusted = _names("--trust-remote-code", args)
    from_pretrained = AutoTokenizer.from_pretrained

    def refusing(*positional: Any, **options: Any) -> Any:
        allowed = options.get("trust_remote_code") or False
        options["trust_remote_code"] = allowed and (trusted or command != "benchmark")
        if positional and Path(positional[0]).is_dir():
            check_has_tokenizer(Path(positional[0]))
        return from_pretrained(*positional, **options)

    AutoTokenizer.from_pretrained = refusing  # type: ignore[method-assign]


def _expect_our_model_type() -> None:
    """Of a model_type that it does not know transformers warns whenever a tokenizer is loaded."""
    transformers_log = logging.getLogger("transformers.configuration_utils")
    transformers_log.addFilter(lambda record: "model of type `pararnn`" not in record.getMessage())


def _remember_for_draft(args: list[str]) -> None:
    """MLX-LM makes the caches for --draft-model itself: let them remember as many steps as it guesses."""
    parser = argparse.ArgumentParser(add_help=False)  # abbreviations are taken, as by MLX-LM
    parser.add_argument("--draft-model")
    parser.add_argument("--num-draft-tokens", type=int, default=0)
    known, _ = parser.parse_known_args(args)
    if known.draft_model is not None:
        from mlx_pararnn.cache import RECENT_STEPS
        from mlx_pararnn.model import Model

        Model.recent_steps = max(RECENT_STEPS, known.num_draft_tokens)


def _dequantize_every_matrix(command: str) -> None:
    """MLX-LM's --dequantize passes over quantized MultiLinear, and writes a model that does not load."""
    from mlx_pararnn.adapters import unpack

    import_module(f"mlx_lm.{command}").dequantize_model = unpack  # type: ignore[attr-defined]


def _read_texts_without_an_end() -> None:
    """MLX-LM ends every text of a data set with the tokenizer's end-of-text token, None where it has none."""
    from mlx_lm.tuner.datasets import TextDataset

    process = TextDataset.process

    def without_none(self: TextDataset, text: dict[str, str]) -> tuple[list[int], int]:
        tokens, offset = process(self, text)
        return [token for token in tokens if token is not None], offset

    TextDataset.process = without_none  # type: ignore[method-assign]
