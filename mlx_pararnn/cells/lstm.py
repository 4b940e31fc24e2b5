"""ParaLSTM."""

from typing import ClassVar

from .cell import Cell


class LSTM(Cell):
    """ParaLSTM: coupled input and forget gates, peepholes, all diagonal (`LSTMCIFGDiagMH` in ml-pararnn).

    f = sigmoid(a_f h + u_f + c_f c),  n = tanh(a_c h + u_c),  c' = f c + (1 - f) n,
    o = sigmoid(a_o h + u_o + c_o c'),  h' = o tanh(c').  The output gate looks at the new c'.
    """

    name = "lstm"
    gates = ("f", "o", "c")
    slots = ("c", "h")
    output = "h"
    params = ("a_f", "a_o", "a_c", "c_f", "c_o")
    default_activations: ClassVar[dict[str, str]] = {
        "f": "sigmoid",
        "o": "sigmoid",
        "c": "tanh",
        "state": "tanh",
    }

    def step(self, state, u, params, F):
        """One step; see `Cell.step`."""
        c, h = state
        f = getattr(F, self.activations["f"])(params["a_f"] * h + u["f"] + params["c_f"] * c)
        n = getattr(F, self.activations["c"])(params["a_c"] * h + u["c"])
        c = f * c + (1 - f) * n
        o = getattr(F, self.activations["o"])(params["a_o"] * h + u["o"] + params["c_o"] * c)
        return c, o * getattr(F, self.activations["state"])(c)
