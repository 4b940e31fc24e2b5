"""ParaGRU."""

from typing import ClassVar

from .cell import Cell


class GRU(Cell):
    """ParaGRU: a GRU whose recurrent matrices are diagonal (arXiv 2510.21450; `GRUDiagMH` in ml-pararnn).

    z = sigmoid(a_z h + u_z),  r = sigmoid(a_r h + u_r),  n = tanh(a_h (r h) + u_h),  h' = z n + (1 - z) h.
    z gates the new candidate: the opposite of torch.nn.GRU.
    """

    name = "gru"
    gates = ("z", "r", "h")
    slots = ("h",)
    output = "h"
    params = ("a_z", "a_r", "a_h")
    default_activations: ClassVar[dict[str, str]] = {"update": "sigmoid", "reset": "sigmoid", "state": "tanh"}

    def step(self, state, u, params, F):
        """One step; see `Cell.step`."""
        (h,) = state
        z = getattr(F, self.activations["update"])(params["a_z"] * h + u["z"])
        r = getattr(F, self.activations["reset"])(params["a_r"] * h + u["r"])
        n = getattr(F, self.activations["state"])(params["a_h"] * (h * r) + u["h"])
        return (z * n + (1 - z) * h,)
