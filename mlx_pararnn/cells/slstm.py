"""sLSTM."""

from .cell import Cell

# The cell's own constant in pararnn-torch, not a model's norm_eps.
EPS = 1e-6


class SLSTM(Cell):
    """The sLSTM cell of xLSTM as pararnn-torch has it, with diagonal recurrent weights (`mix="diag"`).

    With p_g = u_g + r_g h:  m' = max(p_f + m, p_i),  i = exp(p_i - m'),  f = exp(p_f + m - m'),
    n' = f n + i,  c' = f c + i tanh(p_z),  h' = sigmoid(p_o) c' / (n' + 1e-6).
    """

    name = "slstm"
    gates = ("i", "f", "z", "o")
    slots = ("c", "n", "m", "h")
    output = "h"
    params = ("r_i", "r_f", "r_z", "r_o")
    # m takes a maximum, n and c grow with the length: from step(0, u), and from the unroll without R h too,
    # the iterates are often further from the answer than where they began.
    few_iterations = False

    def step(self, state, u, params, F):
        """One step; see `Cell.step`."""
        c, n, m, h = state
        p_i, p_f, p_z, p_o = (u[gate] + params[f"r_{gate}"] * h for gate in self.gates)
        m_new = F.maximum(p_f + m, p_i)
        i = F.exp(p_i - m_new)
        f = F.exp(p_f + m - m_new)
        n = f * n + i
        c = f * c + i * F.tanh(p_z)
        return c, n, m_new, F.sigmoid(p_o) * c / (n + EPS)
