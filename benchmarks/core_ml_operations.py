"""How many operations Core ML's compiler gets; how many of them are in float32, or change a type.

python benchmarks/core_ml_operations.py    prints a table; half a minute

They depend on the cell, the layers, the tokens and the Newton iterations, not on the widths, which are small.
Every layer has the same, so that those of 24 follow from models of one and of two.
"""

import numpy as np
from coremltools.converters.mil.mil import types
from mlx.utils import tree_flatten

from mlx_pararnn import Model, ModelArgs
from mlx_pararnn.convert.coreml.mlpackage import build_function
from mlx_pararnn.convert.package.constants import stored
from mlx_pararnn.convert.package.form import Form

LAYERS = 24  # of the 400M shape
ITERATIONS = 3  # what the trained model needs
FORMS = {
    "graph": Form(),
    "io": Form(graph_state=False),
    "io, recurrence float16": Form(graph_state=False, recurrence=np.float16),
}


def main() -> None:
    print("| cell, state | function | operations | in float32 | casts |\n|---|---|---|---|---|")
    for cell in ("gru", "lstm"):
        for title, form in FORMS.items():
            for tokens in (1, 16, 64):
                one, two = (counted(cell, layers, form, tokens) for layers in (1, 2))
                counts = [a + (LAYERS - 1) * (b - a) for a, b in zip(one, two, strict=True)]
                name = f"prefill of {tokens}" if tokens > 1 else "decode"
                row = " | ".join(f"{count:,}" for count in counts)
                print(f"| {cell}, {title} | {name} | {row} |", flush=True)


def counted(cell: str, layers: int, form: Form, tokens: int) -> tuple[int, int, int]:
    """All operations but constants; those with a result in float32; casts."""
    sizes = {"hidden_size": 64, "vocab_size": 64, "intermediate_size": 64, "num_heads": 4}
    args = ModelArgs(cell=cell, num_hidden_layers=layers, **sizes)
    parameters = tree_flatten(Model(args).parameters())
    weights = {name: stored(np.array(numbers), "float16") for name, numbers in parameters}
    function = build_function(args, weights, form, tokens, ITERATIONS)
    ops = [op for op in function.operations if op.op_type != "const"]
    wide = [
        op for op in ops if any(types.is_tensor(o.sym_type) and o.dtype is types.fp32 for o in op.outputs)
    ]
    return len(ops), len(wide), sum(op.op_type == "cast" for op in ops)


if __name__ == "__main__":
    main()
