"""Runs an .aimodel by Core AI's own runtime: on a Mac, and on Linux by the one that coreai-core carries."""

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_pararnn.errors import PararnnError, one_line

Array = npt.NDArray[Any]


class Runner:
    """One sequence read by the package of an exported folder, as docs/coreai.md tells an app to.

    Use it as a context manager.

    Args:
        package: the .aimodel.
        settings: pararnn.json.

    Raises:
        PararnnError: the runtime does not load the package.
    """

    def __init__(self, package: Path, settings: Mapping[str, Any]) -> None:
        self._package, self._settings = package, settings
        self._stack = ExitStack()

    def __enter__(self) -> "Runner":
        from coreai.authoring import AIModelAsset

        with ExitStack() as stack:
            loop = stack.enter_context(asyncio.Runner())
            try:
                opened = AIModelAsset.load(self._package).executable()
                with _silent():
                    model = loop.run(opened.__aenter__())
                    stack.callback(lambda: loop.run(opened.__aexit__(None, None, None)))
                    functions = {name: model.load_function(name) for name in self._settings["functions"]}
            except Exception as error:  # the runtime has its own for each thing that may be wrong
                raise PararnnError(
                    f"{self._package}: Core AI does not load it ({one_line(error)}); export the model again"
                ) from error
            self._functions, self._loop = functions, loop
            self._stack = stack.pop_all()
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self._functions.clear()
        self._stack.close()

    def reset(self) -> None:
        """Begin again with the state before the first token."""
        from coreai.runtime import NDArray

        self.position = 0
        self._states = {
            s["name"]: NDArray(np.zeros(s["shape"], s["dtype"])) for s in self._settings["states"]
        }

    def states(self) -> dict[str, Array]:
        """Copies of the states, by name."""
        return {name: state.numpy().copy() for name, state in self._states.items()}

    def call(self, name: str, tokens: Array) -> Array:
        """The logits (vocab_size,) that a function gives after `tokens`, as many as it reads.

        Raises:
            PararnnError: the program does not take or give what pararnn.json says.
        """
        from coreai.runtime import NDArray

        inputs = {"tokens": NDArray(np.asarray(tokens, np.int32)[None])}
        if self._settings["max_position_embeddings"] is not None:
            inputs["position"] = NDArray(np.array([self.position], np.int32))
        function = self._functions[name]

        async def run() -> Any:
            return await function(inputs=inputs, state=self._states)

        try:
            logits = np.array(self._loop.run(run())["logits"].numpy()).reshape(-1)
            if logits.shape != (self._settings["vocab_size"],):
                raise ValueError(f"{logits.size} logits")
        except Exception as error:  # the runtime has its own for each thing that may be wrong
            raise PararnnError(
                f"{self._package}: is not the program that pararnn.json describes ({one_line(error)}); "
                "export the model again"
            ) from error
        self.position += len(tokens)
        return logits


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the runtime writes to file descriptor 2 as it loads a function."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
