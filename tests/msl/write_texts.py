"""Writes the Metal text of every instantiation, as MLX compiles it, into a folder: for Apple's own compiler.

    python -m tests.msl.write_texts FOLDER
    ls FOLDER/*.metal | xargs -n 1 xcrun -sdk macosx metal -fno-fast-math \\
      -I "$(cat FOLDER/include)" -o /dev/null -c

`FOLDER/include` names the folder of MLX's headers. That needs a Mac with Xcode and no GPU.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from ..support.msl.adjoint_kernel import all_adjoints
from ..support.msl.instances import all_instances
from ..support.msl.layer_kernels import all_calls
from ..support.msl.wrap import wrap
from . import preamble


def texts() -> Iterator[tuple[str, str]]:
    """(name, text) of each, the same text once; MLX's preamble is included and not written out."""
    seen = set()
    for made in (*all_instances(), *all_calls(), *all_adjoints()):
        wrapped = wrap(made.launch, made.inputs)
        if wrapped.text not in seen:
            seen.add(wrapped.text)
            yield wrapped.kernel, f'#include "{preamble.HEADER}"\n\n{wrapped.text}'


def write(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "include").write_text(str(preamble.include_folder()))
    written = [(folder / f"{name}.metal").write_text(text) for name, text in texts()]
    return len(written)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} texts")
