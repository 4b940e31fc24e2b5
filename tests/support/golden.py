"""Recorded numbers in tests/data: cells, language models, and what counts as equal to them."""

import json
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_pararnn import get_cell

DATA = Path(__file__).parents[1] / "data"


@cache
def unpacked() -> tempfile.TemporaryDirectory:
    """The files of lm/forms.tar.xz, which repeat each other's bytes, in a folder of this process."""
    folder = tempfile.TemporaryDirectory(prefix="mlx-pararnn-golden-")
    with tarfile.open(DATA / "lm" / "forms.tar.xz") as archive:
        checked: dict[str, Any] = (
            {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        )  # since Python 3.11.4
        archive.extractall(Path(folder.name) / "lm", **checked)
    return folder


def golden_file(name: str | Path) -> Path:
    """A file or folder by its path in tests/data ("lm/paragru_s64/dcp_flat"), unpacked if need be."""
    return DATA / name if (DATA / name).exists() else Path(unpacked().name) / name


def arrays_in(file: Path) -> dict[str, mx.array]:
    """What a safetensors file holds."""
    return cast(dict[str, mx.array], mx.load(str(file)))


def cell_cases() -> list[dict]:
    """The cases of golden/cells, by their metadata."""
    return json.loads((DATA / "cells" / "metadata.json").read_text())["cases"]


def shown(case: dict) -> list[str]:
    """What a case is there for: its kind of cell and its activations."""
    return [case["kind"], *case["nonlinearities"].values()]


def read(case):
    """cell, params (P, D), u (B, heads, T, gates, W) in float32, and the golden arrays with a batch axis."""
    golden = {k: np.array(v) for k, v in arrays_in(DATA / "cells" / case["file"]).items()}
    for name, array in golden.items():
        if name == "x" or name.startswith("y_"):
            golden[name] = array[None] if array.ndim == 2 else array
    activations = {k.removeprefix("nonlin_"): v for k, v in case["nonlinearities"].items()}
    gru = case["kind"].startswith("GRU")
    cell = get_cell("gru" if gru else "lstm", activations)
    params = golden["A"] if gru else np.concatenate([golden["A"], golden["C"]])
    heads, _, gates, width = golden["B"].shape
    B, T, _ = golden["x"].shape
    x = mx.array(golden["x"]).reshape(B, T, heads, -1).transpose(2, 0, 1, 3).reshape(heads, B * T, -1)
    weight = mx.array(golden["B"]).reshape(heads, -1, gates * width)
    u = (x @ weight).reshape(heads, B, T, gates, width).swapaxes(0, 1)
    u = u + mx.array(golden["b"]).reshape(gates, heads, width).swapaxes(0, 1)[None, :, None]
    return cell, mx.array(params), u, golden


def allowed(golden):
    """Equal: 2e-6 of the largest |y|, or four times the case's own float32-float64 gap."""
    gap = np.abs(golden["y_seq"] - golden["y_seq_f64"]).max()
    return max(2e-6 * max(1.0, np.abs(golden["y_seq"]).max()), 4 * gap)


# source of the weights, its golden file, prefix of the golden names, conversion options
GOLDEN = [
    ("lm/paragru_s64/state_dict.pt", "lm/paragru_s64", "T50.", {}),
    ("lm/paragru_s64/state_dict.pt", "lm/paragru_s64", "T1.", {}),
    ("lm/paragru_s64/ckpt_bf16.pt", "lm/paragru_s64", "bf16w.", {"dtype": "float32"}),
    ("lm/paralstm_s96/state_dict.pt", "lm/paralstm_s96", "T50.", {}),
    ("lm/paralstm_s96/state_dict.pt", "lm/paralstm_s96", "T1.", {}),
    ("lm/paralstm_s96/ckpt_bf16.pt", "lm/paralstm_s96", "bf16w.", {"dtype": "float32"}),
    ("trained/paragru/final.pt", "trained/paragru", "", {}),
    ("pararnn_torch/paraslstm_causal_lm_0", "pararnn_torch/paraslstm_causal_lm_0", "", {}),
    ("pararnn_torch/paraslstm_causal_lm_1", "pararnn_torch/paraslstm_causal_lm_1", "", {}),
    ("pararnn_torch/babylm_paragru", "pararnn_torch/babylm_paragru", "", {}),
    ("pararnn_torch/babylm_paralstm", "pararnn_torch/babylm_paralstm", "", {}),
    ("pararnn_torch/babylm_paraslstm", "pararnn_torch/babylm_paraslstm", "", {}),
    ("pararnn_torch/babylm_paranlru", "pararnn_torch/babylm_paranlru", "", {}),
]


def golden_of(folder, prefix=""):
    arrays = arrays_in(DATA / folder / "golden.safetensors")
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def gap(a, b):
    return mx.abs(a - b).max().item()
