"""Writes tests/data/gradients.safetensors: pararnn-torch's gradients of the recurrence.

python -m tests.support.record_gradients         needs torch and pararnn-torch

For each cell, in float64 by autograd through its sequential solver: u (B, T, gates, D) in our order of gates,
params (P, D), slope (B, T, D), the loss's derivative by hidden, and what follows: hidden, d_u, d_params.
"""

from pathlib import Path

import mlx.core as mx

from mlx_pararnn import get_cell
from tests.support.peers import PEERS

FILE = Path(__file__).parents[1] / "data" / "gradients.safetensors"
B, T, D = 2, 70, 8


def recorded(name, seed=0):
    """The arrays of one cell, as torch tensors in float64."""
    import pararnn
    import torch
    from pararnn.solvers.sequential import sequential_apply
    from torch import nn

    torch.manual_seed(seed)
    kind, order, rows = PEERS[name]
    peer = getattr(pararnn, kind)(D, D).double()
    peer.W_x = nn.Identity()
    weights = [getattr(peer, row) for row in rows]
    with torch.no_grad():
        for weight in weights:
            weight.uniform_(-0.45, 0.45)  # inside its clamp, which has no gradient outside
    # what float32 holds, so that the recorded answer is that of the recorded question
    x = torch.randn(B, T, len(order), D).float().double().requires_grad_()
    slope = torch.randn(B, T, D).float().double()
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.float().double())
    hidden = sequential_apply(peer, x.flatten(2))
    if hidden.ndim == 4:  # all slots
        hidden = hidden[:, :, get_cell(name).output_slot]
    d_u, *d_weights = torch.autograd.grad(hidden, [x, *weights], slope)
    return {
        "u": x.detach()[:, :, list(order)],
        "params": torch.cat([w.detach().reshape(-1, D) for w in weights]),
        "slope": slope,
        "hidden": hidden.detach(),
        "d_u": d_u[:, :, list(order)],
        "d_params": torch.cat([d.reshape(-1, D) for d in d_weights]),
    }


def main():
    arrays = {
        f"{name}.{key}": mx.array(value.float().contiguous().numpy())
        for name in ("gru", "lstm", "nlru", "slstm")
        for key, value in recorded(name).items()
    }
    mx.save_safetensors(str(FILE), arrays)


if __name__ == "__main__":
    main()
