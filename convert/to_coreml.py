"""Writes a Core ML package from a PyTorch checkpoint or an MLX model folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.errors import PararnnError

from .coreml.require_coremltools import require_coremltools
from .exporting import Exported, Functions, Progress, check_options, description, export
from .package.form import GROWING, Form, parts
from .package.layouts import LAYOUTS
from .readers.forms import COREML


def convert_to_coreml(
    source: str | Path,
    out: str | Path,
    *,
    state: str | None = None,
    recurrence: str | None = None,
    layout: str = "plain",
    layers_per_function: int | None = None,
    chunk: int | None = None,
    iterations: int | None = None,
    argmax: bool = False,
    weights: str = "float16",
    initial_state: str | Path | None = None,
    adapter_path: str | Path | None = None,
    tokenizer: str | Path | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Export `source` (an MLX model folder, or anything `convert_to_mlx` takes) to the folder `out`.

    docs/coreml.md says what `out` then holds.

    Args:
        state: "graph", Core ML's own states in float16; "io", inputs and outputs. By default "io" where the
            recurrence is in float32, else "graph".
        recurrence: what the recurrence is computed in and its state is in, "float16" or "float32", which
            "graph" does not have. By default "float32" for cells whose state grows (sLSTM), else "float16".
        layout: "plain", (1, T, D); "ane", (1, D, 1, T) with 1x1 convolutions in place of matrix products, and
            the state in and out in float16, whatever the recurrence is computed in.
        layers_per_function: divide each prefill into functions of at most so many layers, which a runner
            calls one after another; None leaves it whole.
        chunk: tokens that `prefill` reads at once, 2 to 128; 64 by default.
        iterations: of Newton's method in `prefill`; None measures how many this model needs.
        argmax: give the likeliest token instead of the logits.
        weights: how matrices are stored: "float16", "int8", "int4" or "palette4".
        initial_state: a file of `mlx-pararnn train --tune state`, which the package then begins with.
        adapter_path: a folder of adapters, as for `load`, which are added into the weights.
        tokenizer, family, config, force, allow_nonfinite: as for `convert_to_mlx`.
        progress: called with what is being done and the share of it that is.

    Raises:
        PararnnError: anything wrong with the input, with `out` or with this machine; nothing is left.
    """
    if layout not in LAYOUTS:
        raise PararnnError(f"layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    if state not in (None, "graph", "io"):
        raise PararnnError(f"state {state!r}: choose graph or io")
    if recurrence not in (None, "float32", "float16"):
        raise PararnnError(f"recurrence {recurrence!r}: choose float32 or float16")
    if layers_per_function is not None and layers_per_function < 1:
        raise PararnnError(f"--layers-per-function {layers_per_function}: choose at least 1")
    if state == "graph" and layout == "ane":
        raise PararnnError("--layout ane passes its state in and out: leave out --state graph")
    if state == "graph" and recurrence == "float32":
        raise PararnnError(
            "--recurrence float32: Core ML keeps its own states in float16; leave out --state graph, and "
            "they are passed in and out"
        )

    def form_of(cell: str) -> Form:
        wide = recurrence == "float32" or (recurrence is None and cell in GROWING and state != "graph")
        in_graph = state != "io" and layout != "ane" and not wide
        return Form(
            in_graph,
            argmax,
            recurrence=np.float32 if wide else np.float16,
            layers_per_function=layers_per_function,
            layout=layout,
        )

    check_options(chunk, iterations, weights, "float16")
    require_coremltools()
    return export(
        source,
        out,
        COREML,
        _write,
        form_of,
        chunk=chunk,
        iterations=iterations,
        weights=weights,
        initial_state=initial_state,
        adapter_path=adapter_path,
        tokenizer=tokenizer,
        family=family,
        config=config,
        force=force,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
        settings={"layout": layout},
    )


def _write(
    path: Path, functions: Functions, settings: dict[str, Any], title: str, progress: Progress
) -> None:
    from .coreml.mlpackage import build_function, write_package

    args, form, built = functions.args, functions.form, {}
    for done, (name, count) in enumerate(functions.tokens.items()):
        progress("building", done / len(functions.tokens))
        for part, layers in parts(form, args.num_hidden_layers, name).items():
            built[part] = build_function(args, functions.weights, form, layers, count, functions.iterations)
    metadata = {
        "user": {"pararnn": json.dumps(settings)},
        "version": settings["version"],
        **description(settings, title, "coreml.md"),
    }
    write_package(path, built, metadata, progress)
