"""pararnn-torch in a block of our shape, and a plain PyTorch loop. Needs `pip install -e ".[bench]"`."""

import os

import torch
import torch.nn.functional as F
from models import HEADS, INTERMEDIATE, LAYERS, VOCABULARY, D
from pararnn import NewtonConfig
from pararnn.cells import ParaGRU, ParaLSTM
from pararnn.solvers import vjp
from pararnn.solvers.newton import newton_apply
from pararnn.solvers.sequential import sequential_apply
from torch import nn

torch.set_num_threads(os.cpu_count())
CELLS = {"gru": ParaGRU, "lstm": ParaLSTM}
SOLVERS = {
    "sequential": sequential_apply,
    "Newton": lambda cell, x: newton_apply(cell, x, NewtonConfig()),
}


class HeadsProjection(nn.Module):
    """Our block-diagonal input projection, instead of pararnn-torch's dense one: as much work as ours."""

    def __init__(self, gates):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HEADS, D // HEADS, gates * D // HEADS) * D**-0.5)
        self.bias = nn.Parameter(torch.zeros(gates * D))

    def forward(self, x):
        rows = x.reshape(-1, HEADS, D // HEADS).transpose(0, 1)
        u = torch.bmm(rows, self.weight).view(HEADS, rows.shape[1], -1, D // HEADS)
        return u.permute(1, 2, 0, 3).reshape(*x.shape[:-1], -1) + self.bias  # gate by gate, as its cells read


class Block(nn.Module):
    """Input projection and gate, causal convolution, SiLU, cell, gated RMSNorm, output projection; SwiGLU."""

    def __init__(self, cell, solver):
        super().__init__()
        self.norm, self.gated_norm, self.mlp_norm = (nn.RMSNorm(D, eps=1e-6) for _ in range(3))
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.conv = nn.Conv1d(D, D, 4, groups=D, padding=3)
        self.cell = CELLS[cell](D, D)
        self.cell.W_x = HeadsProjection(3)
        self.solve = SOLVERS[solver]
        self.out_proj = nn.Linear(D, D, bias=False)
        self.gate_proj = nn.Linear(D, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(D, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, D, bias=False)

    def forward(self, x, last_only):
        main, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        main = F.silu(self.conv(main.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        hidden = self.solve(self.cell, main)
        if hidden.ndim == 4:  # all slots: hidden is the LSTM's second
            hidden = hidden[:, :, 1]
        if last_only:  # what generate_step does not need of the last block, MLX does not compute either
            x, gate, hidden = x[:, -1:], gate[:, -1:], hidden[:, -1:]
        x = x + self.out_proj(self.gated_norm(hidden) * F.silu(gate))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class LanguageModel(nn.Module):
    def __init__(self, cell, solver):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(Block(cell, solver) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.head = nn.Linear(D, VOCABULARY, bias=False)

    @torch.inference_mode()
    def forward(self, ids):
        """Logits of the last token of ids (B, T)."""
        x = self.embedding(ids)
        for k, block in enumerate(self.blocks):
            x = block(x, last_only=k == LAYERS - 1)
        return self.head(self.norm(x[:, -1]))


def prefill(cell, solver, tokens):
    """A function that reads a prompt once."""
    torch.manual_seed(0)
    model = LanguageModel(cell, solver).eval()
    ids = torch.randint(0, VOCABULARY, (1, tokens))

    def run():
        model(ids)

    return run


def recurrence_alone(cell, solver, u):
    """A function that solves the recurrence on u (1, T, gates * D), a numpy array."""
    layer = CELLS[cell](D, D).eval()
    layer.W_x = nn.Identity()
    x = torch.from_numpy(u)

    def run():
        with torch.inference_mode():
            SOLVERS[solver](layer, x)

    return run


def recurrence_with_gradient(cell, solver, u, slope):
    """As `recurrence_alone`, then the gradients of u and weights for that of hidden, slope (1, T, D)."""
    # Its Newton takes the projection's gradient itself: two large products, which nobody else here makes.
    vjp._linear_vjp = lambda _, x, d_u: (d_u.reshape(x.shape), None, None)
    layer = CELLS[cell](D, D)
    layer.W_x = nn.Identity()
    x, d_hidden = torch.from_numpy(u).requires_grad_(), torch.from_numpy(slope)
    inputs = [x, *(p for p in layer.parameters())]

    def run():
        hidden = SOLVERS[solver](layer, x)
        if hidden.ndim == 4:  # all slots: hidden is the LSTM's second
            hidden = hidden[:, :, 1]
        torch.autograd.grad(hidden, inputs, d_hidden)

    return run


def plain_loop(cell, params, u):
    """The recurrence as one writes it in PyTorch, step by step: numpy, params (P, D), u (T, gates, D)."""
    weights = [torch.from_numpy(row) for row in params]
    gates = torch.from_numpy(u)

    def gru(state, x):
        (h,), (a_z, a_r, a_h) = state, weights
        z, r = torch.sigmoid(a_z * h + x[0]), torch.sigmoid(a_r * h + x[1])
        n = torch.tanh(a_h * (h * r) + x[2])
        return (h + z * (n - h),)

    def lstm(state, x):
        (c, h), (a_f, a_o, a_c, c_f, c_o) = state, weights
        f = torch.sigmoid(a_f * h + x[0] + c_f * c)
        c = f * c + (1 - f) * torch.tanh(a_c * h + x[2])
        return c, torch.sigmoid(a_o * h + x[1] + c_o * c) * torch.tanh(c)

    step, slots = {"gru": (gru, 1), "lstm": (lstm, 2)}[cell]

    def run():
        with torch.inference_mode():
            state = (torch.zeros(D),) * slots
            hidden = []
            for x in gates:
                state = step(state, x)
                hidden.append(state[-1])
            torch.stack(hidden)

    return run
