"""pararnn-torch in a block of our shape, and a plain PyTorch loop. Needs `pip install -e ".[bench]"`."""

import os

import torch
import torch.nn.functional as F
from models import LARGE, D
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

    def __init__(self, gates, sizes):
        super().__init__()
        d, heads = sizes.d, sizes.heads
        self.weight = nn.Parameter(torch.randn(heads, d // heads, gates * d // heads) * d**-0.5)
        self.bias = nn.Parameter(torch.zeros(gates * d))

    def forward(self, x):
        heads, width, _ = self.weight.shape
        rows = x.reshape(-1, heads, width).transpose(0, 1)
        u = torch.bmm(rows, self.weight).view(heads, rows.shape[1], -1, width)
        return u.permute(1, 2, 0, 3).reshape(*x.shape[:-1], -1) + self.bias  # gate by gate, as its cells read


def _projection_vjp(projection, x, slope):
    """Gradients of x, weight and bias: what pararnn-torch's Newton asks of the cell's projection."""
    if not isinstance(projection, HeadsProjection):
        return _dense_vjp(projection, x, slope)
    heads, width, _ = projection.weight.shape
    rows = x.reshape(-1, heads, width).transpose(0, 1)
    slopes = slope.reshape(rows.shape[1], -1, heads, width).permute(2, 0, 1, 3).flatten(2)
    d_x = torch.bmm(slopes, projection.weight.transpose(1, 2)).transpose(0, 1).reshape(x.shape)
    return d_x, torch.bmm(rows.transpose(1, 2), slopes), slope.flatten(0, 1).sum(0)


# It writes the gradient of its dense projection out by hand, in this function.
_dense_vjp, vjp._linear_vjp = vjp._linear_vjp, _projection_vjp


class Block(nn.Module):
    """Input projection and gate, causal convolution, SiLU, cell, gated RMSNorm, output projection; SwiGLU."""

    def __init__(self, cell, solver, sizes):
        super().__init__()
        d, wide = sizes.d, sizes.intermediate
        self.norm, self.gated_norm, self.mlp_norm = (nn.RMSNorm(d, eps=1e-6) for _ in range(3))
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.conv = nn.Conv1d(d, d, 4, groups=d, padding=3)
        self.cell = CELLS[cell](d, d)
        self.cell.W_x = HeadsProjection(3, sizes)
        self.solve = SOLVERS[solver]
        self.out_proj = nn.Linear(d, d, bias=False)
        self.gate_proj = nn.Linear(d, wide, bias=False)
        self.up_proj = nn.Linear(d, wide, bias=False)
        self.down_proj = nn.Linear(wide, d, bias=False)

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
    def __init__(self, cell, solver, sizes=LARGE):
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.d)
        self.blocks = nn.ModuleList(Block(cell, solver, sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.d, eps=1e-6)
        self.head = nn.Linear(sizes.d, sizes.vocabulary, bias=False)

    @torch.inference_mode()
    def read(self, ids):
        """Logits of the last token of ids (B, T)."""
        return self(ids, last_only=True)[:, -1]

    def forward(self, ids, last_only=False):
        """Logits of ids (B, T), of all tokens or of the last."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, last_only=last_only and block is self.blocks[-1])
        return self.head(self.norm(x))


def prefill(cell, solver, tokens):
    """A function that reads a prompt once."""
    torch.manual_seed(0)
    model = LanguageModel(cell, solver).eval()
    ids = torch.randint(0, LARGE.vocabulary, (1, tokens))

    def run():
        model.read(ids)

    return run


def training_step(cell, solver, tokens, targets, sizes, rate):
    """A function that makes one step: forward, cross entropy, backward, AdamW; tokens and targets (B, T)."""
    torch.manual_seed(0)
    model = LanguageModel(cell, solver, sizes).train()
    tokens, targets = torch.tensor(tokens), torch.tensor(targets)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()

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
