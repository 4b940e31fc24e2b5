"""Count what a step of each cell costs: additions, multiplications and divisions, and exponentials or tanhs.

python benchmarks/flops.py            prints the table of metal/README.md
"""

from mlx_pararnn import get_cell
from mlx_pararnn.cells.activations import ACTIVATIONS
from mlx_pararnn.cells.dual import Dual, DualFunctions

COUNT = {"flops": 0, "special": 0}
# sigmoid = 1 / (1 + exp(-x)): an addition, a division, a negation and an exponential
SPECIAL = {"exp": (0, 1), "tanh": (0, 1), "sigmoid": (3, 1)}


class Number:
    def _flop(self, other=None):
        COUNT["flops"] += 1
        return Number()

    __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _flop
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _flop
    __gt__ = __lt__ = _flop


class Functions:
    def __init__(self):
        for name in ACTIVATIONS:
            setattr(self, name, lambda x, name=name: self._special(name))

    def _special(self, name):
        flops, special = SPECIAL[name]
        COUNT["flops"] += flops
        COUNT["special"] += special
        return Number()

    def maximum(self, a, b):
        return a._flop(b)

    def where(self, condition, a, b):
        return Number()


def count(cell, dual):
    COUNT.update(flops=0, special=0)
    slots = range(len(cell.slots))
    gates = {name: Number() for name in cell.gates}
    weights = {name: Number() for name in cell.params}
    if not dual:
        cell.step(tuple(Number() for _ in slots), gates, weights, Functions())
    else:
        state = tuple(Dual(Number(), tuple(Number() for _ in slots)) for _ in slots)
        constants = ({k: Dual(v) for k, v in group.items()} for group in (gates, weights))
        cell.step(state, *constants, DualFunctions(Functions()))
    return COUNT["flops"], COUNT["special"]


def main():
    print("| cell | plain step: flops, exponentials | step with Jacobian |\n|---|---|---|")
    for name in ("gru", "lstm", "nlru", "slstm"):
        cell = get_cell(name)
        plain, dual = count(cell, dual=False), count(cell, dual=True)
        print(f"| {name} | {plain[0]}, {plain[1]} | {dual[0]}, {dual[1]} |")


if __name__ == "__main__":
    main()
