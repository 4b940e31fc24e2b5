"""`mlx-pararnn bench`: how fast a model runs here."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_pararnn.errors import PararnnError

from . import options
from .progress import loading, progress_bar
from .report import Debug, reports_errors, size

if TYPE_CHECKING:
    from mlx_pararnn.model import Model
    from mlx_pararnn.tools.benchmark import Measurement, Sizes

PRESET = "400m"


class Section(StrEnum):
    """What is measured."""

    recurrence = "recurrence"
    prefill = "prefill"
    decode = "decode"
    batch = "batch"
    memory = "memory"


def _numbers(least: int) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        for word in value.split(",") if value is not None else ():
            if not word.strip().isdecimal() or int(word) < least:
                raise typer.BadParameter(f"{word.strip()!r} is not a whole number of at least {least}")
        return value

    return check


@reports_errors
def bench(
    model: options.ModelPath = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="The paper's shapes with random weights: 400m, 1b, 2.9b or 7b; 400m with --cell or --dtype.",
        ),
    ] = None,
    cell: Annotated[
        str | None, typer.Option(metavar="NAME", help="A preset's cell (gru); alone it takes 400m.")
    ] = None,
    dtype: Annotated[
        options.Dtype | None, typer.Option(help="A preset's weights (float32); alone it takes 400m.")
    ] = None,
    only: Annotated[
        list[Section] | None, typer.Option("--only", help="Measure this alone; may be given several times.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All sizes that docs/performance.md has.")] = False,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens", "-p", metavar="N,...", callback=_numbers(1), help="Lengths of the prompts."
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            "-c",
            metavar="N,...",
            callback=_numbers(0),
            help="Tokens before those that are generated; the state is set to it, not read.",
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size", "-b", metavar="N,...", callback=_numbers(1), help="Sequences decoded together."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps", metavar="N,...", callback=_numbers(1), help="Steps T of the recurrence alone."
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            metavar="N,...",
            callback=_numbers(1),
            help="Channels D of the recurrence alone. Default: the model's.",
        ),
    ] = None,
    generation_tokens: Annotated[
        int | None, typer.Option("--generation-tokens", "-g", min=1, help="Tokens to generate for decoding.")
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            "--num-trials",
            "-n",
            min=1,
            help="Runs that a median is of; fewer where they take more than 8 seconds.",
        ),
    ] = 5,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the numbers, as .svg, .png or .pdf.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object instead of the table.")
    ] = False,
    adapter_path: options.Adapters = None,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Time a model, and show its memory.

    Timed are the recurrence alone, reading prompts, generating, and batches. Ctrl-C prints what there is.

    Example: mlx-pararnn bench my-model --only decode --contexts 0,8192
    """
    if model is not None and (preset or cell or dtype):
        raise PararnnError("give a MODEL or a --preset (with --cell and --dtype), not both")
    if adapter_path is not None and (preset or cell or dtype):
        raise PararnnError("--adapter-path needs the MODEL that the adapters were trained with")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise PararnnError(f"--plot: there is no folder {plot.parent}")
    folder = options.find(model, modules)
    preset = preset or (PRESET if cell or dtype else None)
    with loading(model or preset or "the bundled model"):
        from mlx_pararnn.tools import benchmark

        if plot is not None:
            from mlx_pararnn.tools.plot import require_matplotlib

            require_matplotlib()
        loaded = _load(folder, adapter_path, preset, cell or "gru", dtype.value if dtype else "float32")
    options.say_parts(loaded)
    sizes = _sizes(
        benchmark.fitting(loaded, benchmark.FULL if full else benchmark.SHORT),
        generation_tokens,
        prompts=prompt_tokens,
        contexts=contexts,
        batches=batch_size,
        steps=steps,
        widths=widths,
    )
    sections = [section.value for section in only] if only else list(benchmark.SECTIONS)
    cases = list(benchmark.cases(loaded, sizes, sections))
    results: list[Measurement] = []
    interrupted = None
    try:
        with _progress_bar(len(cases)) as progress:
            for done, case in enumerate(cases):
                progress(done, f"{case.section} {_in_words(case.settings)}")
                results.append(case.measure(trials, loaded.group))
    except KeyboardInterrupt as error:
        if not results:
            raise
        interrupted = error
    about = benchmark.describe(loaded, model or preset or folder.name)
    _report(about, results, sections, plot, as_json)
    if interrupted:
        raise interrupted


def _report(
    about: dict[str, Any],
    results: "list[Measurement]",
    sections: list[str],
    plot: Path | None,
    as_json: bool,
) -> None:
    if plot is not None:
        _draw(results, plot)
    if as_json:
        typer.echo(json.dumps({**about, "results": [asdict(result) for result in results]}, indent=2))
        return
    typer.echo(", ".join(f"{name} {value}" for name, value in about.items()))
    for section in sections:
        _print_table(section, [result for result in results if result.section == section])


def _sizes(sizes: "Sizes", generated: int | None, **lists: str | None) -> "Sizes":
    """`sizes`, with what was asked for put in."""
    chosen = {name: [int(n) for n in text.split(",")] for name, text in lists.items() if text is not None}
    return replace(sizes, **chosen, generated=generated or sizes.generated)


def _load(folder: Path, adapters: Path | None, preset: str | None, cell: str, dtype: str) -> "Model":
    from mlx_pararnn.distributed import world

    if preset is not None:
        from mlx_pararnn.tools.benchmark import preset_model

        return preset_model(preset, cell, dtype, world())
    from mlx_pararnn.loading import load_model

    return load_model(folder, adapter_path=adapters, group=world())[0]


def _in_words(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _print_table(section: str, results: "list[Measurement]") -> None:
    if not results:
        return
    if section == "memory":
        header = [name.removesuffix("_bytes").replace("_", " ") for name in results[0].values]
        rows = [[size(value) for value in results[0].values.values()]]
    else:
        header = [*results[0].settings, *(name.replace("_", " ") for name in results[0].values)]
        rows = [
            [*map(str, result.settings.values()), *(f"{value:.2f}" for value in result.values.values())]
            for result in results
        ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    typer.echo(f"\n{section}")
    for row in (header, *rows):
        typer.echo("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def _draw(results: "list[Measurement]", file: Path) -> None:
    from mlx_pararnn.tools.plot import Panel, draw

    panels: dict[str, Panel] = {}
    for section, x, y, title in (
        ("recurrence", "T", "milliseconds", "Recurrence alone"),
        ("prefill", "tokens", "tokens_per_second", "Reading a prompt"),
        ("decode", "context", "tokens_per_second", "Generating"),
        ("batch", "sequences", "tokens_per_second", "Generating in a batch"),
    ):
        for result in results:
            if result.section != section:
                continue
            panel = panels.setdefault(section, Panel(title, x, y.replace("_", " "), {}))
            others = {name: value for name, value in result.settings.items() if name != x}
            points = panel.lines.setdefault(_in_words(others) or section, [])
            points.append((result.settings[x], result.values[y]))
    draw(list(panels.values()), file)


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """A function to call with how much is done, and the name of what begins."""
    with progress_bar(
        lambda rich: (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(),
        ),
        total=total,
    ) as update:
        yield lambda done, name: update(completed=done, description=name)
