"""The prefill's solver: Newton's method on a whole chunk of steps, as the ParaRNN paper has it.

All states of the chunk are unknown at once. From an iterate s_1 .. s_T (s_0 is given) one iteration solves

    d_t = J_t d_{t-1} + (step(s_{t-1}, u_t) - s_t),   d_0 = 0,   s'_t = s_t + d_t

by a parallel scan (Hillis and Steele) over time, J_t being the Jacobian of step (arXiv 2510.21450, section
3; `mlx_pararnn.compute.newton` with chunk=1). Correcting instead of solving for the states anew keeps float16
exact where it matters: d is small when the iteration ends.

The text runs on NumPy arrays, to learn how many iterations a checkpoint needs, and on a program's variables,
to put them into a package. Arrays are (1, heads, T, D / heads); an entry of J that is a number costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlx_pararnn.cells import Cell
from mlx_pararnn.cells.dual import Dual, DualFunctions
from mlx_pararnn.errors import PararnnError

Array = Any
State = tuple[Array, ...]  # one array a slot
Matrix = list[list[Any]]  # slots x slots; arrays, or numbers where constant


class Library(NamedTuple):
    """What the solver needs beside operators.

    Attributes:
        F: the op namespace.
        delay: (x, k, fill) -> x moved k steps later in time, `fill` in front.
        after: (s_0, x) -> s_0 followed by x without its last step.
        full: number -> an array of it, all steps long.
    """

    F: Any
    delay: Callable[[Array, int, float], Array]
    after: Callable[[Array, Array], Array]
    full: Callable[[float], Array]


@contextmanager
def explained(cell: Cell, title: str) -> Iterator[None]:
    """Turn whatever somebody's step leads to into a PararnnError; `title` is what the program is for."""
    try:
        yield
    except PararnnError:
        raise
    except Exception as error:
        raise PararnnError(
            f"cell {cell.name!r}: its step cannot become a {title} program ({error}); write it with "
            "operators and the functions of F only"
        ) from error


def first_guess(cell: Cell, params: Mapping[str, Array], u: Mapping[str, Array], library: Library) -> State:
    """The paper's guess s_t = step(0, u_t)."""
    guess = cell.step((0.0,) * len(cell.slots), u, params, library.F)
    return tuple(library.full(s) if isinstance(s, float) else s for s in guess)


def iterate(
    cell: Cell,
    params: Mapping[str, Array],
    u: Mapping[str, Array],
    start: State,
    states: State,
    library: Library,
    steps: int,
) -> State:
    """One iteration: better `states` (T steps a slot), given those before and the state `start` (1 step)."""
    slots = len(states)
    before = [
        Dual(library.after(s, x), tuple(float(i == j) for j in range(slots)))
        for i, (s, x) in enumerate(zip(start, states, strict=True))
    ]
    new = cell.step(
        tuple(before),
        {gate: Dual(x) for gate, x in u.items()},
        {name: Dual(x) for name, x in params.items()},
        DualFunctions(library.F),
    )
    jacobian: Matrix = [list(s.tangents or (0.0,) * slots) for s in new]
    gap = [n.value - s for n, s in zip(new, states, strict=True)]
    return tuple(s + d for s, d in zip(states, _scan(jacobian, gap, library, steps), strict=True))


def _scan(P: Matrix, r: list[Array], library: Library, steps: int) -> list[Array]:
    """x_t = P_t x_{t-1} + r_t with x_0 = 0, for all t at once."""
    shift = 1
    while shift < steps:
        r = [a + b for a, b in zip(r, _apply(P, [_delayed(x, shift, 0.0, library) for x in r]), strict=True)]
        if 2 * shift < steps:
            before = [
                [_delayed(entry, shift, float(i == j), library) for j, entry in enumerate(row)]
                for i, row in enumerate(P)
            ]
            P = [[_dot(row, column) for column in zip(*before, strict=True)] for row in P]
        shift *= 2
    return r


def _delayed(x: Any, shift: int, fill: float, library: Library) -> Any:
    return x if isinstance(x, float) and x == fill else library.delay(x, shift, fill)


def _apply(P: Matrix, x: list[Array]) -> list[Array]:
    return [_dot(row, x) for row in P]


def _dot(row: Any, column: Any) -> Any:
    total: Any = 0.0
    for a, b in zip(row, column, strict=True):
        if not any(isinstance(x, float) and x == 0 for x in (a, b)):
            total = total + a * b
    return total
