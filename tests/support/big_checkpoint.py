"""For tests and benchmarks of size: a checkpoint as large as one likes, and a process's memory."""

import json
import math
from pathlib import Path

import numpy as np

_BLOCK = 1 << 22


def write_big_checkpoint(path: Path, nbytes: int, d: int = 2048, heads: int = 4) -> int:
    """An untrained float32 ml-pararnn model in safetensors, layers added until it has `nbytes`; its size."""
    shapes = {"embedding.weight": (50432, d), "final_norm.weight": (d,)}
    layer = 0
    while 4 * sum(math.prod(shape) for shape in shapes.values()) < nbytes:
        shapes |= _layer(layer, d, heads, width=11 * d // 4)
        layer += 1
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    block = (np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * np.float32(0.02)).data.cast("B")
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for start in range(0, position, len(block)):
            file.write(block[: position - start])
    return 8 + len(raw) + position


def _layer(layer: int, d: int, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    mixer, mlp = f"blocks.{2 * layer}.", f"blocks.{2 * layer + 1}."
    return {
        f"{mixer}residual_scale": (1,),
        f"{mixer}norm.weight": (d,),
        f"{mixer}in_proj.weight": (2 * d, d),
        f"{mixer}conv.conv.weight": (d, 1, 4),
        f"{mixer}conv.conv.bias": (d,),
        f"{mixer}rnn_cell.A": (3, d),
        f"{mixer}rnn_cell.B": (heads, d // heads, 3, d // heads),
        f"{mixer}rnn_cell.b": (3, d),
        f"{mixer}gate_norm.weight": (d,),
        f"{mixer}out_proj.weight": (d, d),
        f"{mlp}0.weight": (d,),
        f"{mlp}1.w1.weight": (width, d),
        f"{mlp}1.w2.weight": (d, width),
        f"{mlp}1.w3.weight": (width, d),
    }
