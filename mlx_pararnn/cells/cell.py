"""What a cell says about itself; everything else (prefill, decoding, gradients) is derived from it."""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from ..errors import PararnnError
from .activations import ACTIVATIONS, Functions

# Arrays of any library that has operators: MLX, NumPy, a dual number, a Core ML builder's variable.
Array = Any


class Cell:
    """A recurrence s_t = step(s_{t-1}, u_t; params), elementwise over channels.

    A subclass gives five tuples of names and `step`. Two cells with the same class and activations are equal.

    Attributes:
        name: what config.json calls it.
        gates: the parts of the input projection u, in the order in which its rows are stored.
        slots: the parts of the state, in the order of the state array (B, slots, D).
        output: the slot that is the layer's hidden state.
        params: the recurrent weight's rows (P, D), one vector of D channels each.
        default_activations: place -> activation, where a checkpoint may name another (`get_cell`).
        msl: for the fused kernels, the text of a struct pararnn::<class name> with the same step in Metal's
            language (metal/README.md); None where there is none. The built-in cells' stand in metal/cells.
        few_iterations: whether a few of Newton's iterations come near the answer, as they do for the paper's
            cells. Where they do not, a model refuses `max_iters`.
        activations: those of this instance.
    """

    name: ClassVar[str]
    gates: ClassVar[tuple[str, ...]]
    slots: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    params: ClassVar[tuple[str, ...]]
    default_activations: ClassVar[Mapping[str, str]] = {}
    msl: ClassVar[str | None] = None
    few_iterations: ClassVar[bool] = True

    def __init__(self, activations: Mapping[str, str] | None = None) -> None:
        chosen = dict(activations or {})
        for place, function in chosen.items():
            if place not in self.default_activations:
                places = ", ".join(self.default_activations) or "none"
                raise PararnnError(
                    f"cell {self.name!r} has no activation called {place!r} (it has: {places}); correct its "
                    "'activations'"
                )
            if function not in ACTIVATIONS:
                raise PararnnError(
                    f"unknown activation {function!r} for {place!r} of cell {self.name!r}; choose one of "
                    f"{', '.join(ACTIVATIONS)}"
                )
        self.activations = {**self.default_activations, **chosen}

    def step(
        self, state: tuple[Array, ...], u: Mapping[str, Array], params: Mapping[str, Array], F: Any
    ) -> tuple[Array, ...]:
        """The state after one time step.

        Args:
            state: one array a slot, in the order of `slots`; all arrays here broadcast to (..., D).
            u: gate name -> its input projection at this time step, bias included.
            params: recurrent weight by name.
            F: exp, tanh, sigmoid, maximum, where and the twelve activations, for the arrays' library.
        """
        raise NotImplementedError

    @property
    def output_slot(self) -> int:
        """The place of `output` in `slots`."""
        return self.slots.index(self.output)

    @classmethod
    def check(cls) -> None:
        """Raise PararnnError unless every field is there and fits the others."""
        for field in ("name", "gates", "slots", "output", "params"):
            if not hasattr(cls, field):
                raise PararnnError(f"cell class {cls.__name__} lacks the field {field!r}")
        if cls.output not in cls.slots:
            raise PararnnError(
                f"cell {cls.name!r}: its output {cls.output!r} is none of its slots {cls.slots}"
            )

    @classmethod
    def check_step(cls) -> None:
        """Run `step` once, on NumPy arrays of two channels; raise PararnnError if it fails."""
        import numpy as np

        two = np.ones(2, np.float32)
        gates, params = (dict.fromkeys(names, two) for names in (cls.gates, cls.params))
        try:
            with np.errstate(all="ignore"):
                state = cls().step((two,) * len(cls.slots), gates, params, Functions(np))
        except Exception as error:  # whatever a user's step raises
            reason = f"{type(error).__name__}: {error}"
            raise PararnnError(
                f"cell {cls.name!r}: its step fails ({reason}); docs/python.md shows how one is written"
            ) from error
        if not isinstance(state, tuple) or len(state) != len(cls.slots):
            raise PararnnError(
                f"cell {cls.name!r}: its step must return a tuple of {len(cls.slots)} arrays, one for each "
                f"of its slots {cls.slots}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and (type(self), self.activations) == (type(other), other.activations)

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(self.activations.items()))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.activations)})"


CellType = TypeVar("CellType", bound=type[Cell])
