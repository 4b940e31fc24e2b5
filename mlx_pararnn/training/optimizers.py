"""The optimizers of a training run: learning rate, which weights decay, their states in a checkpoint."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim

from .settings import Settings

Weights = dict[str, mx.array]


def schedule(settings: Settings) -> Callable[[mx.array], mx.array]:
    """The learning rate of a step, counted from 0."""
    high, last = settings.learning_rate, settings.learning_rate * settings.final_rate
    warmup = min(settings.warmup, settings.steps - 1)
    rest = settings.steps - warmup
    if settings.schedule == "cosine":
        after = optim.cosine_decay(high, rest, last)
    elif settings.schedule == "wsd":
        falling = max(1, round(settings.decay * settings.steps))
        stays = optim.linear_schedule(high, high, 1)
        falls = optim.linear_schedule(high, last, falling)
        after = optim.join_schedules([stays, falls], [max(0, rest - falling)])
    else:
        after = optim.linear_schedule(high, high, 1)
    if not warmup:
        return cast(Callable[[mx.array], mx.array], after)
    rises = optim.linear_schedule(high / (warmup + 1), high, warmup)
    return cast(Callable[[mx.array], mx.array], optim.join_schedules([rises, after], [warmup]))


def decays(name: str, weight: mx.array) -> bool:
    """Whether weight decay is for this weight: a matrix, but no embedding and nothing recurrent."""
    return (
        name.endswith("weight")
        and weight.ndim >= 2
        and not name.endswith("recurrent_weight")
        and ("embed" not in name)
    )


def optimizers_of(settings: Settings) -> tuple[optim.AdamW, optim.AdamW]:
    """One for the weights that decay, one for the others."""
    options: dict[str, Any] = {
        "betas": [settings.beta1, settings.beta2],
        "eps": settings.epsilon,
        "bias_correction": True,
    }
    return tuple(  # type: ignore[return-value]
        optim.AdamW(schedule(settings), weight_decay=decay, **options)
        for decay in (settings.weight_decay, 0.0)
    )


def groups(weights: Weights) -> tuple[Weights, Weights]:
    """The weights that decay, and the others."""
    decayed = {name: weight for name, weight in weights.items() if decays(name, weight)}
    return decayed, {name: weight for name, weight in weights.items() if name not in decayed}


def copied(state: Any) -> Any:
    """A state whose dicts are its own; the arrays are the same."""
    return {k: copied(v) for k, v in state.items()} if isinstance(state, dict) else state


def optimizer_arrays(optimizers: Iterable[optim.AdamW]) -> Weights:
    """Their states by name, as a checkpoint keeps them."""
    arrays: Weights = {}
    for number, optimizer in enumerate(optimizers):
        for name, value in optimizer.state.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            arrays |= {f"{number}/{name}/{part}": array for part, array in parts}
    return arrays


def restore_optimizers(optimizers: Iterable[optim.AdamW], arrays: Weights) -> None:
    """Give them the states that `optimizer_arrays` gave."""
    for number, optimizer in enumerate(optimizers):
        state: dict[str, Any] = {}
        for key, array in arrays.items():
            group, name, part = key.split("/")
            if int(group) == number:
                if part:
                    state.setdefault(name, {})[part] = array
                else:
                    state[name] = array
        optimizer.state = state
