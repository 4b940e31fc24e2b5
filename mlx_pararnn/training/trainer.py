"""The training loop: a model, batches and settings in; a trained model and checkpoints out.

Letters in shapes: B sequences, T tokens.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..compute.layer_ops import cross_entropy
from ..distributed import Group, all_lists, meet, share, share_arrays
from ..errors import PararnnError
from . import checkpoints
from .batches import Batch, Resumable, arrays_of, batches_from, shared, targets
from .optimizers import Weights, copied, groups, optimizer_arrays, optimizers_of, restore_optimizers
from .settings import Settings

logger = logging.getLogger(__name__)

# A layer's recurrent state and its convolution's window, as RecurrentCache.cache has them.
State = list[mx.array | None]
# (model, what a batch holds by name, states) -> the sum over the targets, and the new states.
Losses = Callable[[Any, Weights, "list[State] | None"], "tuple[mx.array, list[State]]"]


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: updates made, those before a resumption too.
        loss: mean loss of the last lines of the log, or None if there was none.
        stopped: it was stopped before its last step.
    """

    step: int
    loss: float | None
    stopped: bool


class Trainer:
    """Trains `model` on `batches`.

    Args:
        model: called with token ids (B, T) and cache=, which `model.make_cache(B)` gives; its trainable
            parameters are trained.
        batches: at least `settings.steps` of them, or endless; see `Batch`.
        settings: how.
        folder: where checkpoints go; None for no checkpoints.
        held_out: batches for evaluation, or None.
        report: is given each line of the log: a dict with "step", and one of "loss", "valid_loss",
            "sample" or "checkpoint".
        sample: gives a sample text of the model, or None.
        after_checkpoint: is called when a checkpoint is there.
        losses: what is learned: from the model, arrays by name ("tokens", "mask" and a batch's `others`) and
            the states that the rows have (None: they begin anew) to the sum of the losses and new states.
        compiled: the gradient goes through mx.compile; None: on a GPU it does. On a CPU the fast backend
            computes at once, which a compiled function may not.
        group: processes that train together, each on its share of a batch's rows; None for this one alone.
            The batches, the weights and the checkpoint to begin with are rank 0's, and so is what is
            written: on the other ranks give `batches` as () and none of folder, held_out, report, sample.
            Where the model is divided among them (`Model.shard`) each has all rows, and checkpoints of its
            own part in a `folder` of its own; batches, held_out and report are rank 0's, and none samples.
        run_id: what tells the checkpoints of this run from another's, where the model is divided.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch] | Resumable,
        settings: Settings,
        *,
        folder: Path | None = None,
        held_out: Iterable[Batch] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        sample: Callable[[], str] | None = None,
        after_checkpoint: Callable[[], None] | None = None,
        losses: Losses | None = None,
        compiled: bool | None = None,
        group: Group | None = None,
        run_id: str | None = None,
    ) -> None:
        self.group, self.run_id = group, run_id
        self._parts = model.part.parts if getattr(model, "group", None) is not None else None
        # which of the rows, of how many shares
        shared_rows = group is not None and self._parts is None
        self._rank, self._size = (group.rank(), group.size()) if group is not None and shared_rows else (0, 1)
        self.model, self.batches, self.settings, self.folder = model, batches, settings, folder
        self.held_out, self.sample = held_out, sample
        self._report = report or (lambda line: None)
        self._after_checkpoint = after_checkpoint or (lambda: None)
        self._losses = losses or token_losses
        self._stop = False  # asked of this process
        self._all_stop = False  # known to all ranks

        self.step = 0
        self.tokens = 0  # targets learned from so far
        self.weights: Weights = dict(tree_flatten(model.trainable_parameters()))
        if not self.weights:
            raise PararnnError("the model has no trainable parameters; unfreeze some")
        for name, weight in self.weights.items():
            if weight.dtype in (mx.float16, mx.bfloat16):
                self.weights[name] = weight.astype(mx.float32)
        self.average: Weights = dict(self.weights) if settings.ema is not None else {}
        self._optimizers = optimizers_of(settings)
        for optimizer, weights in zip(self._optimizers, groups(self.weights), strict=True):
            optimizer.init(weights)
        self._states: list[list[State]] | None = None  # of each part of a batch, of each layer
        self._since_report = {"loss": 0.0, "tokens": 0, "steps": 0, "norm": 0.0}
        self.loss: float | None = None
        self.valid_loss: float | None = None
        self._saved = 0  # the step of the newest checkpoint

        self._gradient = mx.value_and_grad(self._objective)
        self._apply: Callable[..., Any] = mx.compile(self._updated)
        if mx.default_device().type == mx.DeviceType.gpu if compiled is None else compiled:
            self._gradient = mx.compile(self._gradient)

    def stop(self) -> None:
        """End after the step that is being made, with a checkpoint; may be called from a signal handler."""
        self._stop = True

    def resume(self) -> bool:
        """Continue from the newest checkpoint, bit for bit; False where there is none.

        Of a divided model it is the newest that all processes have, and all have to call this.

        Raises:
            PararnnError: it cannot be read or is of another model or run, or a process lacks its part.
        """
        if self.folder is None:
            return False
        step = None
        if self._parts is not None and (step := self._go_back_together(self.folder)) == 0:
            return False
        found = checkpoints.load(self.folder, step)
        if found is None:
            return False
        self._restore(*found)
        return True

    def _go_back_together(self, folder: Path) -> int:
        """The newest step of which all processes have a checkpoint, 0 for none; newer ones go.

        So that what they have is the same again: each deletes its older ones by the number that is left.
        Where nothing would be left they are set aside: a folder may be missing because a disk is.
        """
        states, problem = {}, None
        try:
            states = {step: checkpoints.state_of(folder, step) for step in checkpoints.steps(folder)}
        except PararnnError as error:
            problem = f"{error}"
        everyones = [set(steps) for steps in all_lists(self.model.group, [*states])]
        step = max(set.intersection(*everyones), default=0)
        newer = [each for each in states if each > step]
        if any(state.get("run") != self.run_id for state in states.values()):
            problem = (
                f"{folder}: holds checkpoints of another run; delete that folder and continue with --resume, "
                "or choose another OUT"
            )
        elif not step and any(states[each].get("previous") for each in newer):  # the first is on some alone
            problem = (
                f"{folder}: has no checkpoint of a step of which all processes have one; put back the "
                "checkpoints of each, or start a new run"
            )
        meet(self.model.group, step + 1, problem)
        for each in newer:
            what = "deleted"
            if step:
                checkpoints.delete(folder, each)
            else:
                what = f"set aside as {checkpoints.set_aside(folder, each).name}"
            logger.warning(
                "%s: another process has no checkpoint of step %d; this one's is %s, going on from %d",
                folder,
                each,
                what,
                step,
            )
        return step

    def _restore(self, arrays: Weights, state: dict[str, Any]) -> None:
        kinds: dict[str, Weights] = {
            "weights": {},
            "average": {},
            "optimizer": {},
            "carried": {},
            "random": {},
        }
        for name, array in arrays.items():
            kind, _, rest = name.partition("/")
            kinds.get(kind, {})[rest] = array
        for kind, ours in (("weights", self.weights), ("average", self.average)):
            theirs = kinds[kind]
            if {n: a.shape for n, a in theirs.items()} != {n: a.shape for n, a in ours.items()}:
                raise PararnnError(
                    f"{self.folder}: the checkpoint's {kind} are of another model or of other settings; "
                    "resume with those that the run was started with"
                )
        # in their own order: the norm of the gradient is summed in it
        self.weights = {name: kinds["weights"][name] for name in self.weights}
        self.average = {name: kinds["average"][name] for name in self.average}
        restore_optimizers(self._optimizers, kinds["optimizer"])
        self._states = _restore_states(kinds["carried"], state["parts"])
        mx.random.seed(state["random"])
        self.step, self.tokens = state["step"], state["tokens"]
        self._saved = self.step
        self._since_report, self.loss = state["since_report"], state["loss"]
        self.valid_loss = state["valid_loss"]

    def run(self) -> Outcome:
        """Train until the last step, or until `stop` is called.

        Raises:
            PararnnError: a loss is no number, the batches end too early, or a checkpoint cannot be written.
        """
        settings = self.settings
        self._begin_together()
        begin, seconds = time.perf_counter(), 0.0
        for batch in shared(batches_from(self.batches, self.step), self.group):
            if self.step >= settings.steps or self._stopping():
                break
            begin = time.perf_counter()
            self._make_step(batch)
            seconds += time.perf_counter() - begin
            if self._due(settings.report_every) or self.step == settings.steps:
                self._report_loss(seconds)
                seconds = 0.0
            if self._evaluates and (self._due(settings.eval_every) or self.step == settings.steps):
                self._report(self._evaluation())
            if self.sample is not None and self._due(settings.sample_every):
                with self.averaged():
                    self._report({"step": self.step, "sample": self.sample()})
            if self._due(settings.save_every) and self.step < settings.steps:  # the last comes below
                self.save()
        self._use(self.weights)
        if self.step < settings.steps and not self._stopping():
            raise PararnnError(
                f"the batches ended at step {self.step} of {settings.steps}; give more, or fewer steps"
            )
        self.save()
        return Outcome(self.step, self.loss, self.step < settings.steps)

    def evaluate(self, batches: Iterable[Batch], most: int = 0) -> tuple[float, int]:
        """Mean loss over the targets of at most `most` batches (0: of all), and their number.

        The weights that are used are the moving average where there is one.
        """
        total, count, states = 0.0, 0, None
        with self.averaged():
            first = itertools.islice(batches, most or None)
            for batch in shared(first, None if self._parts is None else self.group):
                loss, states = self._losses(self.model, arrays_of(batch), None if batch.fresh else states)
                mx.eval(loss, states)
                total += cast(float, loss.item())
                count += targets(batch)
        return total / max(count, 1), count

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it; all ranks have to call it."""
        states = self._joint_states()
        if self.folder is None:
            return
        keep, settle = self.settings.keep, self._all_have_written
        place = checkpoints.save(self.folder, self.step, *self._snapshot(states), keep, settle)
        self._saved = self.step
        self._after_checkpoint()
        self._report({"step": self.step, "checkpoint": place.name})

    def _all_have_written(self) -> None:
        """Where each process has a part: so that all can go back to one step, whenever they end."""
        if self._parts is not None:
            meet(self.model.group, self.step + 1)

    def _snapshot(self, states: list[list[State]] | None) -> tuple[Weights, dict[str, Any]]:
        """A checkpoint's arrays and the rest of it."""
        arrays = {f"weights/{name}": array for name, array in self.weights.items()}
        arrays |= {f"average/{name}": array for name, array in self.average.items()}
        arrays |= {f"optimizer/{name}": a for name, a in optimizer_arrays(self._optimizers).items()}
        arrays |= {f"carried/{name}": array for name, array in _state_arrays(states).items()}
        return arrays, {
            "tokens": self.tokens,
            "random": random_seed(),
            "loss": self.loss,
            "valid_loss": self.valid_loss,
            "since_report": self._since_report,
            "parts": None if states is None else [len(part) for part in states],
            "step": self.step,
            "previous": self._saved,
            "run": self.run_id,
        }

    def _joint_states(self) -> list[list[State]] | None:
        """The states of all rows of a batch, in their order."""
        if self.group is None or self._states is None or self._parts is not None:
            return self._states
        joint = [
            [[None if a is None else mx.distributed.all_gather(a, group=self.group) for a in s] for s in part]
            for part in self._states
        ]
        mx.eval(joint)  # on all ranks, also on those that do not look at it
        return joint

    def _begin_together(self) -> None:
        """All ranks have what rank 0 has, and each the states of its own rows."""
        self._evaluates = self.held_out is not None
        if self.group is None:
            return
        if self._parts is not None:
            self._evaluates = share(self.group, self._evaluates)
            return
        arrays, state = self._snapshot(self._states)
        self._restore(share_arrays(self.group, arrays), share(self.group, state))
        self._states = self._states and [
            [[None if a is None else mx.split(a, self._size)[self._rank] for a in s] for s in part]
            for part in self._states
        ]

    def averaged(self) -> "_InUse":
        """A context in which the model has the moving average of the weights, where there is one."""
        return _InUse(self)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stopping(self) -> bool:
        return self._stop if self.group is None else self._all_stop

    def _use(self, weights: Weights) -> None:
        self.model.update(tree_unflatten(list(weights.items())))

    def _make_step(self, batch: Batch) -> None:
        parts = self.settings.accumulate
        rows, odd = divmod(batch.tokens.shape[0], parts * self._size)
        if odd or not rows:
            ranks = f" on {self._size} processes" if self.group else ""
            raise PararnnError(
                f"a batch has {batch.tokens.shape[0]} rows, which accumulate={parts}{ranks} does not divide"
            )
        arrays = arrays_of(batch)
        count = targets(batch)
        before = None if batch.fresh else self._states
        if before is not None and len(before) != parts:
            raise PararnnError("accumulate changed between two pieces; a fresh batch must come first")
        gradients: Weights = {}
        total, states = mx.array(0.0), []
        for part in range(parts):
            first = (part * self._size + self._rank) * rows
            here = slice(first, first + rows)
            (_, loss, after), grown = self._gradient(
                self.weights,
                {name: array[here] for name, array in arrays.items()},
                mx.array(self._size / max(count, 1)),  # since gradients are averaged over the ranks
                None if before is None else before[part],
            )
            gradients = {n: g + gradients[n] if gradients else g for n, g in grown.items()}
            total = total + loss
            states.append(after)
            if parts > 1:
                mx.eval(total, gradients, after)
        ends = mx.array(float(self._stop))
        if self.group is not None:
            totals, ends = mx.distributed.all_sum(mx.stack([total, ends]), group=self.group)
            if self._parts is None:
                averaged = dict(tree_flatten(nn.average_gradients(gradients, self.group)))
                gradients = {name: averaged[name] for name in gradients}
                total = totals
        optimizer_states = [optimizer.state for optimizer in self._optimizers]
        weights, new_states, average, norm = self._apply(
            self.weights, gradients, optimizer_states, self.average
        )
        mx.eval(total, ends, norm, weights, new_states, average, states)
        self._use(weights)  # not the traced arrays of the gradient
        mean, length = cast(float, total.item()) / max(count, 1), cast(float, norm.item())
        if not (math.isfinite(mean) and math.isfinite(length)):
            self._diverged(mean)
        for optimizer, new in zip(self._optimizers, new_states, strict=True):
            optimizer.state = new
        self.weights, self.average = weights, average
        self._states, self._all_stop = states, bool(ends.item())
        self.step += 1
        self.tokens += count
        since = self._since_report
        since["loss"] += mean * count
        since["tokens"] += count
        since["steps"] += 1
        since["norm"] = max(since["norm"], length)

    def _objective(
        self, weights: Weights, arrays: Weights, scale: mx.array, states: list[State] | None
    ) -> tuple[mx.array, mx.array, list[State]]:
        """The sum of the losses times `scale`, which is differentiated; the sum; and the new states."""
        if self.settings.precision == "bfloat16":
            exact = ("recurrent_weight", "initial_state")
            weights = {n: w if n.endswith(exact) else w.astype(mx.bfloat16) for n, w in weights.items()}
        self._use(weights)
        loss, after = self._losses(self.model, arrays, states)
        return loss * scale, loss, after

    def _updated(
        self, weights: Weights, gradients: Weights, optimizer_states: list[Any], average: Weights
    ) -> tuple[Weights, list[Any], Weights, mx.array]:
        """New weights, optimizer states and moving average, and the norm of the gradient before clipping."""
        settings = self.settings
        gradients, norm = self._clipped(gradients, settings.clip or math.inf)
        new: Weights = {}
        states = []
        for optimizer, group, state in zip(
            self._optimizers, groups(gradients), optimizer_states, strict=True
        ):
            optimizer.state = copied(state)
            new |= optimizer.apply_gradients(group, {name: weights[name] for name in group})
            states.append(optimizer.state)
        if (limit := settings.max_recurrent_norm) is not None:
            for name in new:
                if name.endswith("recurrent_weight"):
                    new[name] = mx.clip(new[name], -limit, limit)
        if average and settings.ema is not None:
            step = states[0]["step"].astype(mx.float32)
            decay = mx.minimum(settings.ema, (1 + step) / (10 + step))  # less at first, to leave the start
            average = {name: decay * average[name] + (1 - decay) * new[name] for name in new}
        return {name: new[name] for name in weights}, states, average, norm

    def _clipped(self, gradients: Weights, limit: float) -> tuple[Weights, mx.array]:
        """Gradients whose norm is at most `limit`, and the norm that they had, of all processes' parts."""
        if self._parts is None:
            return optim.clip_grad_norm(gradients, limit)  # type: ignore[return-value]
        whole, divided = mx.array(0.0), mx.array(0.0)
        for name, gradient in gradients.items():
            if self._parts[name][1]:
                divided = divided + gradient.square().sum()
            else:
                whole = whole + gradient.square().sum()
        norm = mx.sqrt(whole + mx.distributed.all_sum(divided, group=self.group))
        factor = mx.minimum(limit / (norm + 1e-6), 1.0)
        return {name: gradient * factor for name, gradient in gradients.items()}, norm

    def _diverged(self, loss: float) -> None:
        kept = checkpoints.steps(self.folder) if self.folder is not None else []
        left = (
            f"the last good checkpoint is that of step {kept[-1]}" if kept else "no checkpoint was made yet"
        )
        what = "the gradient is" if math.isfinite(loss) else "the loss is"
        raise PararnnError(
            f"{what} no number at step {self.step + 1}, so training has stopped; {left}; try a lower "
            "learning rate, more warm-up steps or clipping"
        )

    def _report_loss(self, seconds: float) -> None:
        since = self._since_report
        self.loss = since["loss"] / max(since["tokens"], 1)
        self._report(
            {
                "step": self.step,
                "loss": self.loss,
                "learning_rate": cast(float, self._optimizers[0].learning_rate.item()),
                "gradient_norm": since["norm"],
                "tokens": self.tokens,
                "tokens_per_second": since["tokens"] / seconds if seconds else 0.0,
                "peak_memory": mx.get_peak_memory(),
            }
        )
        self._since_report = {"loss": 0.0, "tokens": 0, "steps": 0, "norm": 0.0}

    def _evaluation(self) -> dict[str, Any]:
        begin = time.perf_counter()
        loss, count = self.evaluate(self.held_out or (), self.settings.eval_batches)
        self.valid_loss = loss
        return {
            "step": self.step,
            "valid_loss": loss,
            "valid_tokens": count,
            "seconds": time.perf_counter() - begin,
        }


def token_losses(model: Any, arrays: Weights, states: list[State] | None) -> tuple[mx.array, list[State]]:
    """A language model's: of each token, after those before it in its row."""
    tokens = arrays["tokens"]
    cache = model.make_cache(tokens.shape[0])
    for layer, state in zip(cache, states or [], strict=False):
        layer.cache = list(state)
    logits = model(tokens[:, :-1], cache=cache, output_wanted=True)
    losses = cross_entropy(logits, tokens[:, 1:])
    return (losses * arrays["mask"]).sum(), [list(layer.cache) for layer in cache]


class _InUse:
    """The model has the averaged weights while this context is open."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        self.trainer._use(self.trainer.average or self.trainer.weights)

    def __exit__(self, *_: Any) -> None:
        self.trainer._use(self.trainer.weights)


def _state_arrays(states: list[list[State]] | None) -> Weights:
    return {
        f"{part}/{layer}/{slot}": array
        for part, layers in enumerate(states or [])
        for layer, arrays in enumerate(layers)
        for slot, array in enumerate(arrays)
        if array is not None
    }


def _restore_states(arrays: Weights, parts: list[int] | None) -> list[list[State]] | None:
    if parts is None:
        return None
    states: list[list[State]] = [[[None, None] for _ in range(layers)] for layers in parts]
    for key, array in arrays.items():
        part, layer, slot = map(int, key.split("/"))
        states[part][layer][slot] = array
    return states


def random_seed() -> int:
    """What `mx.random.seed` takes to go on as MLX's generator would now."""
    high, low = cast(Any, mx.random.state)[0].tolist()
    return high << 32 | low  # type: ignore[no-any-return]
