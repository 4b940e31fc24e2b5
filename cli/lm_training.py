"""What `mlx-pararnn lm lora` changes in MLX-LM's fine-tuning, so that it fits ParaRNN models.

* Full fine-tuning of float16 weights is refused, and a loss that is no number ends any training.
* `--fine-tune-type full` learns embedding, last norm and head too, which MLX-LM leaves as they are.
* `max_recurrent_norm: N` in MLX-LM's `--config` file keeps recurrent weights within N, as the ParaRNN paper
  does (arXiv 2510.21450, C.1).
* The loss of ParaRNN models is MLX-LM's, with this library's cross entropy, which the CPU backend computes.
* On a CPU the step is not compiled: within a compiled function the recurrence's gradient would be plain MLX.
  Where it is, batches have few lengths, since each is compiled anew.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

STEP = 32  # MLX-LM pads to multiples of it


def train_as_our_models_need() -> None:
    """Replace the functions by which `mlx_lm.lora` trains."""
    import mlx_lm.lora as lora

    train_model, report, train = lora.train_model, lora.print_trainable_parameters, lora.train

    def our_train_model(
        args: Any, model: Any, train_set: Any, valid_set: Any, training_callback: Any = None
    ) -> None:
        _refuse_float16(args, model)

        def with_ends(model: Any) -> None:
            if args.fine_tune_type == "full" and model.model_type == "pararnn":
                unfreeze_ends(model)
            report(model)

        def our_train(**options: Any) -> None:
            if (limit := getattr(args, "max_recurrent_norm", None)) is not None:
                cap_recurrent_weights(options["optimizer"], limit)
            run_training(train, options)

        lora.print_trainable_parameters, lora.train = with_ends, our_train  # type: ignore[assignment]
        callback: Any = _StopsWithoutNumber(training_callback)
        train_model(args, model, train_set, valid_set, callback)

    lora.train_model = our_train_model


def unfreeze_ends(model: Any) -> None:
    """Embeddings, last norm and head are learned as the layers are; no quantized matrix is."""
    for module in (model.model.embed_tokens, model.model.norm):
        module.unfreeze()
    for owner, name in ((model.model, "embed_positions"), (model, "lm_head")):
        if name in owner:
            owner[name].unfreeze()
    for _, module in model.named_modules():
        if "scales" in module:
            module.freeze()


def cap_recurrent_weights(optimizer: Any, limit: float) -> None:
    """Have every update end with the recurrent weights between -limit and limit."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    from mlx_pararnn.errors import PararnnError

    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise PararnnError(f"max_recurrent_norm is {limit!r}; it must be a positive number")
    apply_gradients = optimizer.apply_gradients

    def within(path: str, weight: mx.array) -> mx.array:
        return mx.clip(weight, -limit, limit) if path.endswith("recurrent_weight") else weight

    def capped(gradients: Any, parameters: Any) -> Any:
        return tree_map_with_path(within, apply_gradients(gradients, parameters))

    optimizer.apply_gradients = capped


def in_few_lengths(batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """MLX-LM's `iterate_batches` with rows of 1 + 32, 64, 128, ... tokens, or of the longest allowed."""
    import mlx.core as mx

    def padded(*, max_seq_length: int, **options: Any) -> Iterator[Any]:
        for tokens, lengths in batches(max_seq_length=max_seq_length, **options):
            steps = max(1, math.ceil((tokens.shape[1] - 1) / STEP))
            wanted = min(1 + STEP * (1 << (steps - 1).bit_length()), max_seq_length)
            yield mx.pad(tokens, [(0, 0), (0, max(0, wanted - tokens.shape[1]))]), lengths

    return padded


def masked_loss(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
    """MLX-LM's `default_loss`, in float32.

    Args:
        model: gives logits (B, T, V) of token ids (B, T).
        batch: token ids (B, T + 1).
        lengths: (B, 2): of each row the first target that counts, from 0, and how many tokens it has.

    Returns:
        The mean loss of the targets that count, and their number.
    """
    import mlx.core as mx

    from mlx_pararnn.compute.layer_ops import cross_entropy

    steps = mx.arange(1, batch.shape[1])
    mask = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
    count = mask.sum()
    return (cross_entropy(model(batch[:, :-1]), batch[:, 1:]) * mask).sum() / count, count


def run_training(train: Callable[..., None], options: dict[str, Any]) -> None:
    """Call `mlx_lm.lora.train` with what a ParaRNN model and this device need beside the options."""
    import mlx.core as mx
    from mlx_lm.tuner.trainer import iterate_batches

    if options["model"].model_type == "pararnn":
        options = options | {"loss": masked_loss}
    if mx.default_device().type == mx.DeviceType.gpu:
        return train(**options, iterate_batches=in_few_lengths(iterate_batches))
    mx.disable_compile()
    try:
        train(**options)
    finally:
        mx.enable_compile()
    return None


def _refuse_float16(args: Any, model: Any) -> None:
    """Adam's epsilon and the squares of gradients are 0 in float16: the first step divides by 0."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_pararnn.errors import PararnnError

    weights: Any = tree_flatten(model.parameters())
    if args.fine_tune_type == "full" and any(weight.dtype == mx.float16 for _, weight in weights):
        raise PararnnError(
            f"{args.model} has float16 weights, which full fine-tuning turns into NaN; make a bfloat16 "
            f"copy first: mlx-pararnn lm convert --hf-path {args.model} --mlx-path OUT --dtype bfloat16"
        )


class _StopsWithoutNumber:
    """MLX-LM's TrainingCallback: passes reports on, and raises at a loss that is no number."""

    def __init__(self, then: Any) -> None:
        self.then = then

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        if self.then is not None:
            self.then.on_train_loss_report(report)
        _check_loss("training", report["train_loss"], report["iteration"])

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        if self.then is not None:
            self.then.on_val_loss_report(report)
        _check_loss("validation", report["val_loss"], report["iteration"])


def _check_loss(kind: str, loss: float, iteration: int) -> None:
    from mlx_pararnn.errors import PararnnError

    if not math.isfinite(loss):
        raise PararnnError(
            f"the {kind} loss is {loss} at iteration {iteration}, so training has stopped; adapters saved "
            "since the last finite loss are of no use; try a lower --learning-rate"
        )
