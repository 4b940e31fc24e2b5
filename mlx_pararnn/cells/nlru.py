"""NLRU, the nonlinear linear recurrent unit."""

from .cell import Cell


class NLRU(Cell):
    """The nonlinear linear-recurrent-unit cell of pararnn-torch: its gate does not see the state.

    a = sigmoid(u_a),  n = tanh(u_n + w h),  h' = a h + (1 - a) n.
    """

    name = "nlru"
    gates = ("a", "n")
    slots = ("h",)
    output = "h"
    params = ("w",)

    def step(self, state, u, params, F):
        """One step; see `Cell.step`."""
        (h,) = state
        a = F.sigmoid(u["a"])
        n = F.tanh(u["n"] + params["w"] * h)
        return (a * h + (1 - a) * n,)
