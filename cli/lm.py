"""`mlx-pararnn lm`: MLX-LM's own commands, with this package's model and cache registered."""

import signal
import sys
from typing import Annotated

import typer

COMMANDS = (
    *("awq", "benchmark", "cache_prompt", "chat", "convert", "dwq", "dynamic_quant", "evaluate", "fuse"),
    *("generate", "gptq", "lora", "manage", "perplexity", "server", "share", "upload"),
)


def lm(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="COMMAND", help=f"One of: {', '.join(COMMANDS)}.")],
) -> None:
    """Run an MLX-LM command on ParaRNN models; everything after COMMAND goes to it.

    Example: mlx-pararnn lm generate --model my-model --prompt "import os"
    """
    # MLX-LM parses and reports for itself, so nothing here is caught.
    if command not in COMMANDS:
        raise typer.BadParameter(f"no MLX-LM command {command!r}; one of: {', '.join(COMMANDS)}")
    from mlx_lm.cli import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a server's threads would outlive ours
    sys.argv = ["mlx_lm", command, *context.args]
    main()
