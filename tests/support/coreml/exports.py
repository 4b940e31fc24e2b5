"""Models to export, the command that exports them, and how what a package computes is read and compared."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from typer.testing import CliRunner, Result

import mlx_pararnn
from mlx_pararnn import Cell, Model, ModelArgs
from mlx_pararnn.adapters import unpack
from mlx_pararnn.cli.app import app
from mlx_pararnn.files.hub import BUNDLED, COMPLETION
from tests.support.converting import convert
from tests.support.golden import DATA, arrays_in

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 16}

TRAINED = "trained/paragru/final.pt"
ONE = {"num_hidden_layers": 1}
KINDS = {
    "gru": {"cell": "gru", "num_heads": 3},
    "lstm": {"cell": "lstm", "num_heads": 2, "conv_kernel": 2, **ONE},
    "nlru": {"cell": "nlru", "conv_kernel": 1, "tie_word_embeddings": True, "norm_eps": 2**-4},
    "slstm": {"cell": "slstm", "mixer": "plain", "mlp_bias": True, **ONE},
    "slstm_conv": {"cell": "slstm", "norm": "layer", "norm_eps": 1e-5, "mlp": "gelu", **ONE},
    "ml_pararnn": {
        "cell": "gru",
        "mlp_residual": False,
        "residual_scale": True,
        "tie_word_embeddings": True,
    },
    "babylm": {
        "cell": "nlru",
        "mixer": "plain",
        "norm": "layer",
        "mlp": "gelu",
        "mlp_bias": True,
        "max_position_embeddings": 40,
        "tie_word_embeddings": True,
    },
    "gru_activations": {
        "cell": "gru",
        "activations": {"update": "half_sigmoid", "reset": "relu", "state": "softplus"},
    },
    "lstm_exp": {
        "cell": "lstm",
        "activations": {"f": "half_sigmoid", "o": "tanh", "c": "elu", "state": "exp"},
        **ONE,
    },
    "lstm_more": {
        "cell": "lstm",
        "activations": {"f": "half_sigmoid", "o": "identity", "c": "gelu", "state": "silu"},
        **ONE,
    },
    "lstm_constants": {"cell": "lstm", "activations": {"o": "leaky_relu", "state": "selu"}, **ONE},
}
GOLDEN = [
    ("lm/paragru_s64/state_dict.pt", "lm/paragru_s64", "T50."),
    ("lm/paralstm_s96/state_dict.pt", "lm/paralstm_s96", "T50."),
    *(
        (f"pararnn_torch/{name}", f"pararnn_torch/{name}", "")
        for name in (
            "paraslstm_causal_lm_0",
            "paraslstm_causal_lm_1",
            "babylm_paragru",
            "babylm_paralstm",
            "babylm_paraslstm",
            "babylm_paranlru",
        )
    ),
]
BUNDLED_MODELS = {  # with a text of the kind that each was trained on
    "pocket": (BUNDLED, "What is 12 times 34, and remind me in 5 minutes"),
    "completion": (
        COMPLETION,
        "import os\n\n\ndef read(path):\n    with open(path) as f:\n        return f.read()\n",
    ),
}
QUANTIZED = {
    "int8": ("-q", "--q-bits", 8),
    "int4": ("-q", "--q-bits", 4),
    "palette4": ("--palettize", 4),
}


def small_model(
    folder: Path,
    seed: int = 0,
    embedding_scale: float = 1,
    recurrent_scale: float = 2,
    gate_bias: float = 0,
    **fields,
) -> Path:
    """An MLX model folder of random weights; the recurrent ones are large, so that the state counts."""
    args = {"model_type": "pararnn", "cell": "gru", **SMALL, **fields}
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(args))

    def adjusted(path, p):
        if path.endswith("recurrent_weight"):
            return recurrent_scale * p
        if path.endswith("cell.bias") and gate_bias:
            return gate_bias * mx.random.normal(p.shape)
        if "embed_tokens" in path:
            return embedding_scale * p
        return p + mx.random.normal(p.shape) / 4 if p.ndim == 1 else p

    model.update(tree_map_with_path(adjusted, model.parameters()))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(args))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def rounded_model(folder: Path) -> Model:
    """The MLX model of a folder, its weights rounded to float16 and computing in float32."""
    return rounded(unpacked_model(folder))


def unpacked_model(folder: Path) -> Model:
    """The MLX model of a folder, computing in float32, its matrices unpacked where they are quantized."""
    model = mlx_pararnn.load_model(folder)[0]
    model.set_dtype(mx.float32)
    unpack(model)
    return model


def rounded(model: Model) -> Model:
    """The model, its weights rounded to float16 and computing in float32."""
    model.update(tree_map(lambda p: p.astype(mx.float16).astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    return model


def export(source: Path | str, out: Path, *options: object, to: str = "coreml"):
    """`mlx-pararnn convert SOURCE --to TO -o OUT OPTIONS`, in this process."""
    arguments = ["convert", source, "--to", to, "-o", out, *options]
    return CliRunner().invoke(app, [str(a) for a in arguments])


class Exports:
    """Models and what was exported from them, each made once a session."""

    def __init__(self, root: Path, converted: Callable, to: str = "coreml") -> None:
        self._root, self._converted, self._to = root, converted, to
        self._made: dict[tuple, Path] = {}
        self._models: dict[Path | tuple[str, Path], Model] = {}

    def source(self, name: str) -> Path:
        """A golden checkpoint's MLX folder, by its path in tests/data."""
        return self._converted(name)

    def small(self, **fields) -> Path:
        key = ("small", *sorted((k, str(v)) for k, v in fields.items()))
        if key not in self._made:
            self._made[key] = small_model(self._root / f"small{len(self._made)}", **fields)
        return self._made[key]

    def model(self, folder: Path) -> Model:
        if folder not in self._models:
            self._models[folder] = rounded_model(folder)
        return self._models[folder]

    def exact(self, folder: Path) -> Model:
        """The MLX model as it is, computing in float32."""
        if ("exact", folder) not in self._models:
            self._models["exact", folder] = unpacked_model(folder)
        return self._models["exact", folder]

    def __call__(self, source: Path, *options: object) -> Path:
        key = (source, *map(str, options))
        if key not in self._made:
            self._made[key] = self.run(source, *options)[1]
        return self._made[key]

    def run(self, source: Path, *options: object) -> tuple[Result, Path]:
        """What the command printed, and the folder it made."""
        out = self._root / f"export{len(list(self._root.iterdir()))}"
        tokenizer = () if "--tokenizer" in options else ("--tokenizer", "none")
        result = export(source, out, *options, *tokenizer, to=self._to)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result, out


def golden(name: str) -> dict[str, mx.array]:
    return arrays_in(DATA / name / "golden.safetensors")


def held_out(count):
    return np.array(golden("trained/paragru")["heldout_input_ids"]).ravel()[:count]


def bundled(name: str) -> tuple[Path, np.ndarray]:
    """A bundled model's folder, and its tokens of a text."""
    folder, text = BUNDLED_MODELS[name]
    return folder, np.array(mlx_pararnn.load(folder)[1].encode(text))


def some_ids(vocab, count, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, count)


class Damped(Cell):
    """Two slots, a comparison, a division: what the built-in cells do not use."""

    name, gates, slots, output, params = "damped", ("n", "g"), ("h", "top"), "h", ("a",)

    def step(self, state, u, params, F):
        h, top = state
        g = F.sigmoid(u["g"] - params["a"] * h)
        n = F.where(u["n"] > 0, F.tanh(u["n"]), F.exp(u["n"] - 1) / (2 + h * h))
        top = F.maximum(0.5 * top, n)
        return g * h + (1 - g) * n + 0.125 * top, top


def greedy(model, prompt, count):
    """The greedy continuation, and the logits (count, V) it was chosen by."""
    cache = model.make_cache()
    logits, tokens, seen = model(mx.array([prompt]), cache=cache), [], []
    for _ in range(count):
        seen.append(np.array(logits[0, -1]))
        tokens.append(int(seen[-1].argmax()))
        logits = model(mx.array([tokens[-1:]]), cache=cache)
    return tokens, np.stack(seen)


def until_a_tie(tokens, logits):
    """The tokens up to the first whose lead over the next likeliest float16 cannot hold, at that size."""
    best = np.sort(logits, axis=1)[:, -2:]
    ties = best[:, 1] - best[:, 0] < np.spacing(best[:, 1].astype(np.float16))
    return tokens[: int(ties.argmax()) if ties.any() else len(tokens)]


def formula(name, F, x):
    """An expression that uses one function of F, or what `name` says."""
    if name == "maximum":
        return F.maximum(x, 0.25 - x)
    if name == "where":
        return F.where((x > 0.5) | ~(x <= 0.5) & (x >= -9), x * x, F.where(x < -1, 2.0, -x))
    if name == "equal":
        return F.where(x == 0, 5 * x + 1, F.where((x != 1) & (x != 0.5), x * x, -x))
    if name == "arithmetic":
        return (1 - x) / (2 + x * x) - 3 / (x + 9) + (-x) ** 2 * 1 + 0 * x
    return getattr(F, name)(x)


def failing_export(export: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """A function that runs an export that must fail and leave nothing; it gives the sentence."""

    def run(source, *options, out=None, code=1):
        before = sorted(tmp_path.rglob("*"))
        result = export(source, out or tmp_path / "out", *(options or ("--tokenizer", "none")))
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert "--debug" not in result.stderr, "an error that nobody foresaw"
        assert sorted(tmp_path.rglob("*")) == before, "something was left"
        return result.stderr.removeprefix("error: ").strip()

    return run


def difference(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.isfinite(ours).all()
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def reference_logits(model, ids):
    return np.array(model(mx.array([[int(i) for i in ids]]), method="sequential")[0])


def prefilled(runner, ids, chunk):
    """What each call gives, prefill as far as it goes; and which of the logits that are."""
    whole = len(ids) - len(ids) % chunk
    assert whole, "too few tokens for a prefill"
    starts = range(0, whole, chunk)
    read = [runner.call("prefill", ids[start : start + chunk]) for start in starts]
    read += [runner.call("decode", [token]) for token in ids[whole:]]
    return np.stack(read), [start + chunk - 1 for start in starts] + list(range(whole, len(ids)))


def plain_model(folder: Path, scale: float = 1, **fields) -> Path:
    """An MLX model folder as it is made; `scale` multiplies its recurrent weights."""
    mx.random.seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "intermediate_size": 64}
    args = {"model_type": "pararnn", **sizes, **fields}
    model = Model(ModelArgs.from_dict(args))
    model.update(
        tree_map_with_path(
            lambda name, p: scale * p if name.endswith("recurrent_weight") else p, model.parameters()
        )
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(args))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def export_to_coreml(source, out, *options):
    return convert(source, "--to", "coreml", "-o", out, *options)


def weight_bytes(out: Path) -> int:
    return (out / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size


def settings(out: Path) -> dict:
    return json.loads((out / "pararnn.json").read_text())
