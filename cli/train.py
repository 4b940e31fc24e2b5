"""`mlx-pararnn train`: a model from scratch, or from another."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError
from mlx_pararnn.process.watchdog import ending_signals

from . import options
from .report import Debug, expand_home, launched_rank, reports_errors, size, usage_error

if TYPE_CHECKING:
    from mlx_pararnn.training.run import Run
    from mlx_pararnn.training.trainer import Trainer


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, show_default=False, **more)


@reports_errors
def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="A text file, a folder of them, or .jsonl with text, prompt and completion, or messages.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The run's folder, which becomes the model's."),
    ] = None,
    config: Annotated[
        Path | None, _option("--config", "A YAML file with settings; options go before it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT from its newest checkpoint.")
    ] = False,
    valid: Annotated[
        Path | None, _option("--valid", "Held-out text, as DATA; else a share of DATA is held out.")
    ] = None,
    init: Annotated[
        str | None,
        _option(
            "--init", "Begin with this model instead of a new one.", metavar="MODEL", callback=expand_home
        ),
    ] = None,
    preset: Annotated[
        str | None,
        _option("--preset", "A new model's size: 1m, 4m (default), 10m, 25m, 60m, 120m; 400m, 1b, 2.9b, 7b."),
    ] = None,
    cell: Annotated[
        str | None, _option("--cell", "A new model's cell: gru (default), lstm, nlru, slstm.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        _option(
            "--tokenizer", "A new model's: bytes (default), bpe:N trained on DATA, a folder or hub name."
        ),
    ] = None,
    tune: Annotated[
        str | None,
        _option("--tune", "With --init: full (default), lora, dora, or state, the initial states alone."),
    ] = None,
    steps: Annotated[int | None, _option("--steps", "Updates of the weights (1000).")] = None,
    batch_size: Annotated[int | None, _option("--batch-size", "Sequences in one pass (8).")] = None,
    accumulate: Annotated[
        int | None, _option("--accumulate", "Passes whose gradients make one update (1).")
    ] = None,
    length: Annotated[int | None, _option("--length", "Tokens of a sequence (512).")] = None,
    states: Annotated[
        str | None,
        _option(
            "--states", "carried: a row reads on with its state (default); reset: each piece begins anew."
        ),
    ] = None,
    packing: Annotated[
        bool | None,
        typer.Option(
            "--packing/--no-packing",
            help="Texts follow each other in a row, or stand one in a row, padded (default for examples).",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[float | None, _option("--learning-rate", "The highest (1e-3).")] = None,
    schedule: Annotated[str | None, _option("--schedule", "cosine (default), wsd or constant.")] = None,
    warmup: Annotated[
        int | None, _option("--warmup", "Steps in which the learning rate rises (100).")
    ] = None,
    weight_decay: Annotated[
        float | None, _option("--weight-decay", "Of matrices; none for norms, biases, embeddings (0.1).")
    ] = None,
    clip: Annotated[
        float | None, _option("--clip", "Largest norm of the gradient; 0 for no limit (1).")
    ] = None,
    max_recurrent_norm: Annotated[
        float | None, _option("--max-recurrent-norm", "Recurrent weights stay within plus and minus this.")
    ] = None,
    ema: Annotated[
        float | None, _option("--ema", "Keep a moving average of the weights with this decay, as 0.999.")
    ] = None,
    precision: Annotated[
        str | None, _option("--precision", "Of matrix products: float32 (default) or bfloat16.")
    ] = None,
    seed: Annotated[int | None, _option("--seed", "Of new weights and of the data's order (0).")] = None,
    valid_share: Annotated[
        float | None, _option("--valid-share", "Share of DATA that is held out without --valid (0.05).")
    ] = None,
    report_every: Annotated[int | None, _option("--report-every", "Steps between losses (10).")] = None,
    eval_every: Annotated[int | None, _option("--eval-every", "Steps between evaluations (200).")] = None,
    save_every: Annotated[int | None, _option("--save-every", "Steps between checkpoints (200).")] = None,
    sample_every: Annotated[
        int | None, _option("--sample-every", "Steps between sample texts; 0 for none (0).")
    ] = None,
    sample_prompt: Annotated[
        str | None, _option("--sample-prompt", 'What a sample begins with ("The").', metavar="TEXT")
    ] = None,
    divide_model: Annotated[
        bool,
        typer.Option(
            "--divide-model",
            help="Under mlx.launch: each process has a part of the weights, and all rows of a batch.",
        ),
    ] = False,
    report_to: Annotated[
        list[str] | None,
        _option("--report-to", "wandb, swanlab or tensorboard; may be given several times.", metavar="NAME"),
    ] = None,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Train a model on text; the losses to stderr as they come.

    Ctrl-C writes a checkpoint and ends, a second one ends at once; --resume goes on, to the bit, after either
    and after a crash.

    Example: mlx-pararnn train book.txt -o my-model --preset 4m --steps 2000
    """
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "length": length,
        "states": states,
        "packing": packing,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "max_recurrent_norm": max_recurrent_norm,
        "ema": ema,
        "precision": precision,
        "seed": seed,
        "valid_share": valid_share,
        "report_every": report_every,
        "eval_every": eval_every,
        "save_every": save_every,
        "sample_every": sample_every,
        "sample_prompt": sample_prompt,
    }
    beside: dict[str, Any] = {
        "data": data,
        "valid": valid,
        "init": init,
        "preset": preset,
        "cell": cell,
        "tokenizer": tokenizer,
        "tune": tune,
        "report_to": tuple(report_to) if report_to else None,
    }
    if out is None:
        usage_error("give the run's folder: -o OUT")
    if data is None and config is None and not resume:
        usage_error("give DATA: a text file, a folder of them, or .jsonl")
    if launched_rank() == 0:  # which alone reads them
        _check_paths(data, valid, None if preset else init)  # which do not go together: told below
    options.import_modules(modules)
    from mlx_pararnn.distributed import world
    from mlx_pararnn.training import run as runs
    from mlx_pararnn.training.settings import read_plan

    group = world()
    if group is not None and group.rank():
        trainer = runs.follow(group, out)
        stop_on_signals(trainer, "")
        trainer.run()
        return
    changes = {name: value for name, value in given.items() if value is not None}
    others = {name: value for name, value in beside.items() if value is not None}
    lines = _Lines()
    if resume:
        fixed = sorted({*others} - {"data"}) + (["config"] if config else [])
        fixed += ["divide-model"] if divide_model else []
        if fixed:
            usage_error(f"--resume takes the run's own {fixed[0].replace('_', '-')}; leave it out")
        run = runs.resume(out, changes, lines, at=data, group=group)
    else:
        if divide_model:
            if group is None:
                raise PararnnError("--divide-model is for several processes; start them with mlx.launch")
            others["divided"] = group.size()
        plan = read_plan(config, others, changes)
        run = runs.start(out, plan, lines, group)
    lines.begin(run)
    stop_on_signals(run.trainer)
    outcome = run.run()
    if outcome.stopped:
        command = options.command_line(modules, "train", "--resume", "-o", str(out))
        typer.echo(f"stopped after step {outcome.step}; go on with: {command}", err=True)
        raise typer.Exit(130)
    typer.echo(f"done; try it with: {options.command_line(modules, 'generate', str(out))}", err=True)


def _check_paths(data: Path | None, valid: Path | None, init: str | None) -> None:
    """Say what is not there before seconds of importing."""
    from mlx_pararnn.files.hub import find_model
    from mlx_pararnn.training.data_paths import check_data

    if data is not None:
        check_data(data)
    if valid is not None:
        check_data(valid, "the held-out text")
    if init is not None:
        find_model(init)


def stop_on_signals(
    trainer: "Trainer", says: str = "stopping after this step; once more to end at once"
) -> None:
    """The first Ctrl-C, SIGTERM or SIGHUP ends after the step, with a checkpoint; the second at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if number in asked and number != signal.SIGHUP:  # which a closed terminal sends twice
            os._exit(128 + number)  # as hard as kill -9, which checkpoints are made for
        asked.append(number)
        trainer.stop()
        if says:
            with suppress(OSError):  # a terminal that is closed, a disk that is full
                os.write(2, f"\n{says}\n".encode())

    asked: list[int] = []
    for number in ending_signals():
        signal.signal(number, stop)


class _Lines:
    """The lines of the log for a person, to stderr."""

    def __init__(self) -> None:
        self.steps = 0

    def begin(self, run: "Run") -> None:
        settings = run.plan.settings
        self.steps = settings.steps
        parts = f" in {run.plan.divided} processes" if run.plan.divided > 1 else ""
        typer.echo(
            f"{run.parameters / 1e6:.1f}M parameters{parts}, {run.tokens:,} tokens of data, "
            f"{self.steps:,} steps of {settings.batch_size * settings.accumulate} x {settings.length} tokens",
            err=True,
        )

    def __call__(self, line: dict[str, Any]) -> None:
        step = f"step {line['step']}/{self.steps}"
        if "loss" in line:
            rest = (self.steps - line["step"]) * line["tokens"] / line["step"]
            text = (
                f"{step}  loss {line['loss']:.4f}  learning rate {line['learning_rate']:.2e}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  {size(line['peak_memory'])}  "
                f"{_time(rest / max(line['tokens_per_second'], 1e-9))} left"
            )
        elif "valid_loss" in line:
            text = f"{step}  held-out loss {line['valid_loss']:.4f} on {line['valid_tokens']:,} tokens"
        elif "sample" in line:
            text = f"{step}  sample: {line['sample']}"
        else:
            text = f"{step}  checkpoint"
        print(text, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"
