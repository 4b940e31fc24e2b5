"""The optimizers of a training run: learning rate, which weights decay, their states in a checkpoint."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..compute import cpu_gradients
from ..compute.layer_ops import updates_at_once
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


Call = tuple[mx.array, mx.array, dict[str, mx.array]]  # gradient, weight, moments


class AdamW(optim.AdamW):
    """MLX's AdamW with bias correction; on a CPU all weights are updated in one pass, by all cores.

    There it gives MLX's numbers but for rounding, and computes at once: leave it out of `mx.compile`. Weights
    that are not float32 are updated by MLX's own operations.

    Attributes:
        at_once: whether the CPU backend computes.
        factor: what gradients are multiplied by first.
    """

    def __init__(self, learning_rate: Any, **options: Any) -> None:
        super().__init__(learning_rate, bias_correction=True, **options)
        self.at_once = updates_at_once()
        self.factor = mx.array(1.0)
        self._calls: list[Call] = []

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The new parameters, in the tree of `gradients`."""
        self._calls = []
        places = super().apply_gradients(gradients, parameters)  # and the next step and learning rate
        calls, self._calls = self._calls, []
        exact = all(a.dtype == mx.float32 for g, p, state in calls for a in (g, p, state["m"], state["v"]))
        if calls and exact and self.at_once:
            new = self._updated(calls)
        else:
            new = []
            for gradient, parameter, state in calls:
                scaled = (self.factor * gradient).astype(gradient.dtype)
                new.append(super().apply_single(scaled, parameter, state))
        return tree_map(lambda place: new[place], places)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> int:
        """The weight's place among those that are updated together."""
        self._calls.append((gradient, parameter, state))
        return len(self._calls) - 1

    def _updated(self, calls: list[Call]) -> list[mx.array]:
        gradients, weights, states = ([*column] for column in zip(*calls, strict=True))
        firsts, seconds = ([state[name] for state in states] for name in ("m", "v"))
        rate, (beta1, beta2) = self.learning_rate.astype(mx.float32), self.betas
        numbers = [beta1, 1 - beta1, beta2, 1 - beta2, rate / (1 - beta1**self.step)]
        numbers += [mx.rsqrt(1 - beta2**self.step), self.eps, 1 - rate * self.weight_decay, self.factor]
        joined = mx.stack([mx.array(number, mx.float32) for number in numbers])
        weights, firsts, seconds = cpu_gradients.adamw(joined, gradients, weights, firsts, seconds)
        for state, first, second in zip(states, firsts, seconds, strict=True):
            state["m"], state["v"] = first, second
        return weights


def clipping(gradients: Weights, largest: float, at_once: bool) -> tuple[mx.array, mx.array]:
    """What to multiply gradients by for a norm of at most `largest` (0: any), and their norm.

    Args:
        at_once: the CPU backend computes the norm.
    """
    if at_once:
        squares = cpu_gradients.squares([*gradients.values()])
    else:
        squares = mx.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
    norm = mx.sqrt(squares)
    return mx.minimum((largest or math.inf) / (norm + 1e-6), 1.0), norm


def moving_average(average: Weights, weights: Weights, decay: mx.array) -> Weights:
    """An average after the next weights."""
    return {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}


def optimizers_of(settings: Settings) -> tuple[AdamW, AdamW]:
    """One for the weights that decay, one for the others."""
    options: dict[str, Any] = {
        "betas": [settings.beta1, settings.beta2],
        "eps": settings.epsilon,
    }
    return tuple(  # type: ignore[return-value]
        AdamW(schedule(settings), weight_decay=decay, **options) for decay in (settings.weight_decay, 0.0)
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
