"""`mlx-pararnn convert`: a PyTorch checkpoint to an MLX model folder, or either to a package for apps."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .progress import progress_bar, working
from .report import Debug, expand_home, reports_errors, size, usage_error


class Bits(StrEnum):
    """What --q-bits takes."""

    two = "2"
    three = "3"
    four = "4"
    five = "5"
    six = "6"
    eight = "8"


class GroupSize(StrEnum):
    """What --q-group-size takes."""

    small = "32"
    middle = "64"
    large = "128"


class Mode(StrEnum):
    """What --q-mode takes."""

    affine = "affine"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


class Target(StrEnum):
    """What --to takes."""

    mlx = "mlx"
    coreml = "coreml"
    coreai = "coreai"
    torch = "torch"


class State(StrEnum):
    """What --state takes."""

    graph = "graph"
    io = "io"


class Layout(StrEnum):
    """What --layout takes."""

    plain = "plain"
    ane = "ane"


class Precision(StrEnum):
    """What --precision and --recurrence take."""

    float32 = "float32"
    float16 = "float16"


class Palette(StrEnum):
    """What --palettize takes."""

    four = "4"


@reports_errors
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            callback=expand_home,
            help="A .pt, .pth, .bin or .safetensors file; a folder that holds one, several with an index, or "
            "a torch.distributed.checkpoint; or a Hugging Face name. For a package an MLX model folder, too.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT", help="The model folder to make.", show_default=False),
    ],
    to: Annotated[
        Target,
        typer.Option(
            help="What to make: an MLX model, a package for Core ML or (experimental) Core AI, or weights "
            "for PyTorch."
        ),
    ] = Target.mlx,
    dtype: Annotated[
        options.Dtype | None,
        typer.Option(
            help="Format of the weights; recurrent weights stay float32. Default: as in the checkpoint."
        ),
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Pack the matrices into few bits; needs MLX.")
    ] = False,
    q_bits: Annotated[Bits | None, typer.Option(help="Bits a weight. Default: 4.")] = None,
    q_group_size: Annotated[
        GroupSize | None,
        typer.Option(
            help="Weights that share a scale; a matrix that it does not divide takes a smaller one. "
            "Default: 64."
        ),
    ] = None,
    q_mode: Annotated[
        Mode | None, typer.Option(help="Format; those other than affine fix bits and group size.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|REPO|bytes|none",
            callback=expand_home,
            help="Where the tokenizer is: a folder, a Hugging Face name (EleutherAI/gpt-neox-20b), 'bytes' "
            "for models of raw bytes, 'none' for ids only. Default: the files beside the checkpoint.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take the checkpoint for one of this family.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON fields that go before what was inferred: {"tie_word_embeddings": false}.',
        ),
    ] = None,
    model_file: Annotated[
        bool,
        typer.Option(
            "--model-file",
            help="Add a file by which bare mlx_lm --trust-remote-code finds the model's class.",
        ),
    ] = False,
    state: Annotated[
        State | None,
        typer.Option(
            help="Core ML: keep the state inside, in float16 (graph), or pass it in and out (io). "
            "Default: graph, but io where the recurrence is in float32."
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Core ML: tensors as usual (plain), or as the Neural Engine has them (ane): 1x1 "
            "convolutions, the state in and out in float16. Default: plain."
        ),
    ] = None,
    layers_per_function: Annotated[
        int | None,
        typer.Option(
            help="Core ML: divide what reads prompts into functions of at most so many layers, called one "
            "after another. Default: all layers in one."
        ),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Core AI: what it computes in. Default: float32.")
    ] = None,
    recurrence: Annotated[
        Precision | None,
        typer.Option(
            help="Packages: what the recurrence and its state are in. Default: for Core AI float32, for "
            "Core ML float16, and float32 for sLSTM, whose state grows."
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(help="Packages: tokens of a prompt that are read at once. Default: 64."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Packages: Newton iterations in reading a prompt. Default: as many as this model needs."
        ),
    ] = None,
    argmax: Annotated[
        bool, typer.Option("--argmax", help="Core ML: give the likeliest token instead of the logits.")
    ] = False,
    palettize: Annotated[
        Palette | None,
        typer.Option(help="Packages: store the matrices as indices of so many bits into 16 numbers."),
    ] = None,
    initial_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Packages: begin every text from the state that `train --tune state` learned.",
        ),
    ] = None,
    adapter_path: Annotated[
        Path | None,
        typer.Option(
            "--adapter-path",
            metavar="DIR",
            help="Packages and PyTorch: add the adapters that `lm lora` or `train --tune lora` made.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a model folder.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert weights that hold NaN or infinity.")
    ] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to MLX, Core ML, Core AI or PyTorch.

    Nothing in the checkpoint is executed, and PyTorch is not needed.

    Example: mlx-pararnn convert final.pt -o my-model --tokenizer bytes
    """
    packages = (Target.coreml, Target.coreai)
    _check_target(
        to,
        [
            ((Target.mlx,), {"--dtype": dtype, "--q-group-size": q_group_size, "--q-mode": q_mode}),
            ((Target.mlx,), {"--model-file": model_file}),
            ((Target.coreml,), {"--state": state, "--layout": layout, "--argmax": argmax}),
            ((Target.coreml,), {"--layers-per-function": layers_per_function}),
            ((Target.coreai,), {"--precision": precision}),
            (packages, {"--chunk": chunk, "--iterations": iterations, "--recurrence": recurrence}),
            (packages, {"--palettize": palettize, "--initial-state": initial_state}),
            ((*packages, Target.torch), {"--adapter-path": adapter_path}),
            ((Target.mlx, *packages), {"--quantize": quantize, "--tokenizer": tokenizer}),
            ((Target.mlx, *packages), {"--family": family, "--config": config}),
        ],
    )
    if to in packages:
        if quantize and palettize:
            usage_error("--quantize and --palettize are two ways to store the matrices; choose one")
        if q_bits not in (None, Bits.four, Bits.eight):
            usage_error(f"--q-bits {q_bits.value}: packages have 8 or 4")
    if not quantize and (q_bits or q_group_size or q_mode):
        usage_error("--q-bits, --q-group-size and --q-mode need --quantize")
    options.import_modules(modules)
    if to in packages:
        of_target: dict[str, Any] = {"state": state.value if state else None, "argmax": argmax}
        of_target |= {"layout": (layout or Layout.plain).value, "layers_per_function": layers_per_function}
        if to == Target.coreai:
            of_target = {"precision": (precision or Precision.float32).value}
        if recurrence:
            of_target["recurrence"] = recurrence.value
        _to_package(
            to,
            checkpoint,
            output,
            **of_target,
            chunk=chunk,
            iterations=iterations,
            weights=_weights(to, quantize, q_bits, palettize),
            initial_state=initial_state,
            adapter_path=adapter_path,
            tokenizer=tokenizer,
            family=family,
            config=config,
            force=force,
            allow_nonfinite=allow_nonfinite,
        )
        where = "on a Mac" if to == Target.coreml else "here or on a Mac"
        typer.echo(f"Check it {where}: {options.command_line(modules, 'verify', str(output))}", err=True)
        return
    if to == Target.torch:
        _to_torch(checkpoint, output, adapter_path, force)
        return
    from mlx_pararnn.convert.to_mlx import convert_to_mlx

    with _progress_bar() as progress:
        done = convert_to_mlx(
            checkpoint,
            output,
            dtype=dtype.value if dtype else None,
            quantize=quantize,
            q_bits=int(q_bits) if q_bits else None,
            q_group_size=int(q_group_size) if q_group_size else None,
            q_mode=q_mode.value if q_mode else "affine",
            tokenizer=tokenizer,
            family=family,
            config=config,
            model_file=model_file,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    _say_what_was_read(checkpoint, done.weights)
    typer.echo(
        f"{done.path}: {done.family}, {done.config['cell']}, {done.parameters:,} parameters, "
        f"{' and '.join(done.dtypes)}, {size(done.nbytes)}"
    )
    if quantize:
        asked = done.config["quantization"]
        how = f"{asked['mode']}, {asked['bits']} bits in groups of {asked['group_size']}"
        exceptions = "".join(f"; {phrase}" for phrase in done.exceptions)
        typer.echo(f"quantized: {done.bits_per_weight:.2f} bits per weight ({how}){exceptions}")
        _tell_cost(done.path, checkpoint, family)
    if done.config["model_type"] == "pararnn_cell":
        if not done.config.get("activations"):
            typer.echo("Taken for granted: the cell's default activations (--config names others).", err=True)
        imports = "".join(f"import {name}; " for name in modules or [])
        typer.echo(f"Try it: {imports}mlx_pararnn.load_cell({str(done.path)!r})", err=True)
    elif tokenizer == "none":
        typer.echo(
            f"It has no tokenizer; later: mlx-pararnn add-tokenizer {shlex.quote(str(done.path))} "
            "DIR|REPO|bytes",
            err=True,
        )
    else:
        command = options.command_line(modules, "generate", str(done.path))
        typer.echo(f'Try it: {command} -p "..." --temp 0.7', err=True)


def _check_target(to: Target, options: list[tuple[tuple[Target, ...], dict[str, Any]]]) -> None:
    """Say which option that was given does not go with what is to be made.

    `options` are those of which targets, by name.
    """
    for targets, values in options:
        for name, value in values.items():
            if value not in (None, False) and to not in targets:
                *others, last = [target.value for target in targets]
                needed = f"{', '.join(others)} or {last}" if others else last
                usage_error(f"{name} needs --to {needed}")


def _say_what_was_read(source: str, weights: Path) -> None:
    """Of a folder or a repository: which file of it."""
    if not os.path.isfile(source):
        typer.echo(f"Read: {weights}", err=True)


def _weights(to: Target, quantize: bool, q_bits: Bits | None, palettize: Palette | None) -> str | None:
    """How a package's matrices are to be stored; None is as Core AI computes."""
    if palettize:
        return "palette4"
    if quantize:
        return f"int{q_bits.value if q_bits else 8}"
    return "float16" if to == Target.coreml else None


def _to_torch(source: str, output: Path, adapter_path: Path | None, force: bool) -> None:
    from mlx_pararnn.convert.to_torch import convert_to_torch

    done = convert_to_torch(source, output, adapter_path=adapter_path, force=force)
    typer.echo(f"{done.path}: for {done.family}, {done.parameters:,} parameters, {size(done.nbytes)}")
    if done.family == "pararnn-torch":
        how = f"pararnn.ParaSLSTMForCausalLM.from_pretrained({str(done.path)!r})"
    else:
        file = str(done.path / "model.safetensors")
        how = f"model.load_state_dict(safetensors.torch.load_file({file!r}))"
    typer.echo(f"Load it: {how}", err=True)


def _tell_cost(model: Path, checkpoint: str, family: str | None) -> None:
    """Print what quantizing cost, and note it in the model's config.json."""
    try:
        with working("Measuring what quantizing cost"):
            from mlx_pararnn.convert.original import cost_against, note_cost

            cost = cost_against(model, checkpoint, family)
    except PararnnError as error:  # the model is written: it is as good as before
        typer.echo(f"What quantizing cost was not measured: {error}", err=True)
        return
    note_cost(model, cost)
    typer.echo(f"its cost {cost.sentence()}")


def _to_package(to: Target, source: str, output: Path, **how: Any) -> None:
    os.environ.setdefault(
        "MLX_ENABLE_TF32", "0"
    )  # before MLX's first matrix product: the reference is float32
    with _stages() as progress:
        if to == Target.coreai:
            from mlx_pararnn.convert.to_coreai import convert_to_coreai

            done = convert_to_coreai(source, output, **how, progress=progress)
        else:
            from mlx_pararnn.convert.to_coreml import convert_to_coreml

            done = convert_to_coreml(source, output, **how, progress=progress)
    _say_what_was_read(source, done.weights)
    made = done.settings
    title = "Core AI (experimental)" if to == Target.coreai else "Core ML"
    typer.echo(
        f"{done.path}: {title}, {made['cell']}, {made['parameters']:,} parameters, {made['weights']}, "
        f"{size(done.nbytes)}"
    )
    typer.echo(
        f"stored weights against float32: logits differ by {done.error:.1e} (relative), {done.agreeing} of "
        f"{done.sample} likeliest tokens are the same" + "".join(f"; {phrase}" for phrase in done.exceptions)
    )
    kept = f"state {made['state']}" if to == Target.coreml else f"state {made['states'][0]['dtype']}"
    is_ane = made.get("layout") == "ane"
    kept += ", layout ane" if is_ane else ""
    if made["chunk"]:
        listed = " and ".join(f"{name} {count}" for name, count in made["chunks"].items())
        divided = f" in {made['parts']} parts" if "parts" in made else ""
        typer.echo(
            f"decode reads one token, {listed}{divided}, with {made['iterations']} Newton iterations; {kept}"
        )
    else:
        typer.echo(
            "warning: this model's prompts need more than 8 Newton iterations at once, or numbers beyond "
            "float16's, so the package has decode only and prompts are read token by token "
            "(--iterations N forces a prefill)",
            err=True,
        )
    if made["cell"] == "slstm" and made["states"][0]["dtype"] == "float16":
        halving = {"state": "graph", "layout": "ane", "recurrence": "float16"}
        asked = " and ".join(f"--{name} {value}" for name, value in halving.items() if how.get(name) == value)
        typer.echo(
            f"warning: sLSTM's state grows with the text and loses digits in float16; without {asked} it is "
            "kept in float32",
            err=True,
        )


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    if not sys.stderr.isatty():  # importing rich takes as long as converting 100 MB
        yield lambda done, total: None
        return
    with progress_bar(
        lambda rich: (
            rich.TextColumn("converting"),
            rich.BarColumn(),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
        )
    ) as update:
        yield lambda done, total: update(total=total, completed=done)


@contextmanager
def _stages() -> Iterator[Callable[[str, float], None]]:
    """A bar for work of several stages: called with what is being done and the share of it that is."""
    with progress_bar(
        lambda rich: (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
        ),
        description="starting",
        total=1.0,
    ) as update:
        yield lambda what, share: update(description=what, completed=share)
