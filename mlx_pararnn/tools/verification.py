"""Does a model compute the same numbers whichever way it is run? What `mlx-pararnn verify` asks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx

from ..compute.module_arrays import named_arrays
from ..errors import PararnnError
from ..files.weights_digest import is_as_written
from ..model import Model
from .quantization_cost import divergence

# float32 implementations of one model agree to about 2e-5 in their logits.
TOLERANCE = 5e-5
# Where a row stands for a token or a position: one that training never met may be zero.
_TABLES = ("model.embed_tokens.", "model.embed_positions.", "lm_head.")
_STRETCH_BYTES = 1024


@dataclass(frozen=True)
class Check:
    """One comparison: the largest absolute difference found and the largest allowed.

    Attributes:
        tolerance: None where a difference is expected and only told, as of a quantized model's logits.
        note: what else there is to say, such as how many greedy tokens agree.
        counted: what `difference` is a number of ("numbers", "matrices"); "" where it is a difference.
    """

    name: str
    difference: float
    tolerance: float | None
    note: str = ""
    counted: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        if self.tolerance is None:
            return not math.isnan(self.difference)
        return self.difference <= self.tolerance  # False for NaN


def verify_files(folder: Path) -> bool:
    """Whether all weight files say what they hold; raises PararnnError for one that holds something else."""
    found = {file: is_as_written(file) for file in sorted(folder.glob("model*.safetensors"))}
    for file, as_written in found.items():
        if as_written is False:
            raise PararnnError(
                f"{file}: its weights are not those that were written there; copy or download the file "
                "again, or convert the checkpoint again"
            )
    return None not in found.values()


def verify_weights(model: Model, known: bool = False) -> Check:
    """Whether a matrix is zero, or has a stretch of zeros, as in a file that was not copied whole.

    Stretches are at least 1 KiB long, not looked for in embeddings, whose unused rows may be zero, and not
    where the weights are `known` to be those that were written.
    """
    weights = named_arrays(model.parameters())
    matrices = [(name, w) for name, w in weights if w.ndim > 1 and not name.endswith("recurrent_weight")]
    zero = [
        name
        for name, w in matrices
        if not mx.any(w).item() or (not known and not name.startswith(_TABLES) and _has_zero_stretch(w))
    ]
    note = f"of {len(matrices)} matrices" + (f": {', '.join(zero[:3])}" if zero else "")
    return Check("matrices with stretches of zeros only", len(zero), 0, note, counted="matrices")


def _has_zero_stretch(weight: mx.array) -> bool:
    count = _STRETCH_BYTES // weight.itemsize
    stretches = weight.reshape(-1)[: weight.size // count * count].reshape(-1, count)
    return stretches.size > 0 and not mx.all(mx.any(stretches, axis=1)).item()


def verify_methods(model: Model, tokens: list[int]) -> Iterator[Check]:
    """Newton, fused kernels if there are any, and decoding against the sequential run of a prompt.

    Args:
        model: the model.
        tokens: the prompt, at least two token ids.
    """
    inputs = mx.array([tokens])
    reference = model(inputs, method="sequential", backend="ops")
    tolerance = _tolerance(model, reference)
    newton = model(inputs, method="newton", backend="ops")
    yield _check("Newton against sequential", newton, reference, tolerance)
    backend = model.model.read(inputs, model.make_cache(inputs.shape[0]))[1].state
    if backend != "ops":
        yield _check(f"{backend} against ops", model(inputs, backend=backend), reference, tolerance)
    cache = model.make_cache()
    steps = [model(inputs[:, t : t + 1], cache=cache) for t in range(len(tokens))]
    decoded = mx.concatenate(steps, axis=1)
    yield _check("token by token against at once", decoded, reference, tolerance)


def verify_logits(model: Model, file: str | Path, quantized: bool = False) -> Check:
    """Logits that PyTorch gave, against ours; a quantized model's differ, by how much is told.

    Args:
        model: the model.
        file: .safetensors or .npz with `input_ids` (B, T) or (T,) and `logits` (B, T, V) or (T, V).

    Raises:
        PararnnError: the file is not one, or does not fit the model.
    """
    file = Path(file)
    try:
        arrays = cast(dict[str, mx.array], mx.load(str(file)))
        ids, logits = arrays["input_ids"], arrays["logits"].astype(mx.float32)
    except Exception as error:  # as many kinds as there are wrong files
        raise PararnnError(
            f"{file} is no .safetensors or .npz file with input_ids and logits; docs/converting.md shows how "
            "to export one"
        ) from error
    if ids.ndim == 1:
        ids, logits = ids[None], logits[None] if logits.ndim == 2 else logits
    expected = (*ids.shape, model.args.vocab_size)
    if ids.ndim != 2 or logits.shape != expected or not mx.issubdtype(ids.dtype, mx.integer):
        raise PararnnError(
            f"{file}: input_ids {ids.shape} and logits {logits.shape} do not fit; the model gives {expected}"
        )
    if not mx.all((ids >= 0) & (ids < model.args.vocab_size)).item():
        raise PararnnError(f"{file}: input_ids go beyond the model's vocabulary of {model.args.vocab_size}")
    ours = model(ids)
    if quantized:
        check = _check(f"logits of {file.name}", ours, logits, None)
        return replace(check, note=f"{check.note}, KL divergence {divergence(ours, logits):.2g} nats a token")
    return _check(f"logits of {file.name}", ours, logits, _tolerance(model, logits))


def _check(name: str, a: mx.array, b: mx.array, tolerance: float | None) -> Check:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    same = (mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)).sum().item()
    difference = cast(float, mx.abs(a - b).max().item())
    return Check(name, difference, tolerance, f"{same} of {a[..., 0].size} tokens equal")


def _tolerance(model: Model, logits: mx.array) -> float:
    """5e-5 in float32; in a narrower format eight roundings of the largest logit."""
    weights = named_arrays(model.parameters())
    dtypes = {w.dtype for name, w in weights if not name.endswith("recurrent_weight")}
    epsilon = max(mx.finfo(d).eps for d in dtypes if mx.issubdtype(d, mx.floating))
    return max(TOLERANCE, 8 * epsilon * cast(float, mx.abs(logits).max().item()))
