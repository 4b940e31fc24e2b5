"""Small Core AI programs, executed."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np


def executed(body: Callable, x: np.ndarray, names: list[str], path: Path) -> dict[str, np.ndarray]:
    """What a graph of one input gives; `body` (ops, variable) gives its outputs by name, all in x's shape."""
    import coreai.authoring as core
    from coreai.runtime import NDArray

    from mlx_pararnn.convert.coreai.graph_operations import CoreAI

    def graph(variable: Any) -> tuple:
        outputs = body(CoreAI(x.dtype), variable)
        return tuple(outputs[name] for name in names)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    graph.__signature__ = inspect.Signature([inspect.Parameter("x", kind)])  # type: ignore[attr-defined]
    given = tuple(Annotated[core.Value, core.TensorType(x.shape, x.dtype.type, name=name)] for name in names)
    graph.__annotations__ = {
        "x": Annotated[core.Value, core.TensorType(x.shape, x.dtype.type, name="x")],
        "return": tuple[given],  # type: ignore[valid-type]
    }
    module = core.Module.create()
    with module:
        core.graph(graph, provided_name="main")
    asset = core.AIProgram(module).save_asset(path)

    async def run() -> dict[str, np.ndarray]:
        async with asset.executable() as model:
            outputs = await model.load_function("main")({"x": NDArray(x)})
            return {name: np.array(output.numpy()) for name, output in outputs.items()}

    return asyncio.run(run())
