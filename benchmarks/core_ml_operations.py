"""How many operations Core ML's compiler gets: in float32, casts, of kinds that the Neural Engine may take.

python benchmarks/core_ml_operations.py    prints two tables; a minute

They depend on the cell, the layers, the tokens and the Newton iterations, not on the widths, which are small.
Every layer has the same, so that those of 24 follow from models of one and of two.
"""

from collections import Counter
from typing import Any

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
    "io, recurrence float32": Form(graph_state=False, recurrence=np.float32),
    "layout ane": Form(graph_state=False, layout="ane"),
}
# Kinds of operations by what is published of the Neural Engine; docs/coreml.md names where.
PRODUCTS = {"linear", "matmul"}
STATES = {"read_state", "write_state", "coreml_update_state"}
LISTED = {
    *("abs", "add", "equal", "exp", "greater", "less", "maximum", "mul", "not_equal", "real_div", "sub"),
    *("concat", "pad", "reshape", "slice_by_size", "split", "transpose", "select"),
    *("conv", "reduce_l2_norm", "reduce_max", "reduce_mean", "reduce_sum"),
    *("gelu", "relu", "sigmoid", "silu", "softplus", "tanh"),
}
PLACES = ("listed", "matrix products", "Core ML states", "float32, casts", "look-ups, integers")


def main() -> None:
    """Print both tables."""
    print("\n".join([*operations(), "", *placement()]))


def operations() -> list[str]:
    """The lines of a table: how many operations each function has."""
    rows = ["| cell, state | function | operations | in float32 | casts |", "|---|---|---|---|---|"]
    for cell in ("gru", "lstm"):
        for title, form in FORMS.items():
            for tokens in (1, 16, 64):
                counts = counted(cell, form, tokens)
                name = f"prefill of {tokens}" if tokens > 1 else "decode"
                total = sum(count for key, count in counts.items() if key in PLACES)
                row = " | ".join(f"{count:,}" for count in (total, counts["wide"], counts["cast"]))
                rows.append(f"| {cell}, {title} | {name} | {row} |")
    return rows


def placement() -> list[str]:
    """The lines of a table: the operations of `decode` by what is published of the Neural Engine."""
    rows = [f"| cell, state | {' | '.join(PLACES)} |", "|---" * (len(PLACES) + 1) + "|"]
    for cell in ("gru", "lstm"):
        for title, form in FORMS.items():
            counts = counted(cell, form, 1)
            rows.append(f"| {cell}, {title} | {' | '.join(f'{counts[place]:,}' for place in PLACES)} |")
    return rows


def counted(cell: str, form: Form, tokens: int) -> Counter[str]:
    """By place, of all operations but constants; and how many have a result in float32 ("wide"), or cast."""
    one, two = (_counted(cell, layers, form, tokens) for layers in (1, 2))
    return Counter({key: one[key] + (LAYERS - 1) * (two[key] - one[key]) for key in two})


def _counted(cell: str, layers: int, form: Form, tokens: int) -> Counter[str]:
    sizes = {"hidden_size": 64, "vocab_size": 64, "intermediate_size": 64, "num_heads": 4}
    args = ModelArgs(cell=cell, num_hidden_layers=layers, **sizes)
    parameters = tree_flatten(Model(args).parameters())
    weights = {name: stored(np.array(numbers), "float16") for name, numbers in parameters}
    function = build_function(args, weights, form, range(layers), tokens, ITERATIONS)
    counts: Counter[str] = Counter()
    for op in function.operations:
        if op.op_type != "const":
            counts[_place(op)] += 1
            counts["wide"] += types.fp32 in _dtypes(op)
            counts["cast"] += op.op_type == "cast"
    return counts


def _place(op: Any) -> str:
    dtypes = _dtypes(op)
    if op.op_type in STATES:
        return "Core ML states"
    if op.op_type == "gather" or types.int32 in dtypes:
        return "look-ups, integers"
    if types.fp32 in dtypes or op.op_type == "cast":
        return "float32, casts"
    if op.op_type in PRODUCTS:
        return "matrix products"
    if op.op_type in LISTED:
        return "listed"
    raise ValueError(f"nothing is known of {op.op_type}: say in LISTED or here where it belongs")


def _dtypes(op: Any) -> list[Any]:
    return [o.dtype for o in op.outputs if types.is_tensor(o.sym_type)]


if __name__ == "__main__":
    main()
