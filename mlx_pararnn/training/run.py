"""A training run in a folder: started, resumed, and at any time a model folder that `load` reads.

OUT/run.json            what the run was started with, and its id; what makes the folder a run
OUT/checkpoints/N/      what resumes it bit for bit (checkpoints.py)
OUT/log.jsonl, loss.png the losses
OUT/initial_state.safetensors   of `--tune state`; OUT/adapters.safetensors, adapter_config.json of adapters
OUT/model.safetensors, config.json, tokenizer files, README.md   the model, as of the newest checkpoint
"""

import dataclasses
import fcntl
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cells import get_cell
from ..compute.module_arrays import named_arrays
from ..convert.writers.output_folder import whole_or_nothing
from ..convert.writers.tokenizer import prepare_tokenizer
from ..distributed import Group, share, share_arrays
from ..errors import PararnnError, is_lost
from ..files.model_files import read_json
from ..files.whole_file import write_whole
from ..generation import generate
from ..loading import find_model, load_model, load_tokenizer
from ..model import Model
from ..model_config import ModelArgs
from ..sharding import Shard
from . import data, tuning
from .card import training_card
from .reporting import Log, Reporters, check_reporters, draw_losses
from .settings import Plan, model_args
from .tokenizers import write_tokenizer
from .trainer import Outcome, Trainer, random_seed

logger = logging.getLogger(__name__)

RUN = "run.json"
# What may be changed when a run is resumed; everything else would make it another run.
CHANGEABLE = frozenset(
    ("steps", "report_every", "eval_every", "save_every", "sample_every", "sample_prompt", "sample_tokens")
) | {"keep", "eval_batches"}

Report = Callable[[dict[str, Any]], None]


class Run:
    """A run that can be carried out, once: see `start`, `resume` and, on the other ranks, `follow`."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        report: Report | None = None,
        group: Group | None = None,
        run_id: str | None = None,
    ) -> None:
        self.out, self.plan, self.group = out, plan, group
        if plan.divided > 1 and (group is None or group.size() != plan.divided):
            raise PararnnError(
                f"{out}: the model of this run is divided among {plan.divided} processes; start as many, by "
                "mlx.launch"
            )
        self.divided = group if plan.divided > 1 else None
        if self.divided is None and group is not None and plan.settings.batch_size % group.size():
            raise PararnnError(
                f"a batch of {plan.settings.batch_size} rows cannot be divided by {group.size()} processes; "
                f"choose a batch size that is a multiple of {group.size()}"
            )
        config = read_json(out / "config.json")
        self.model = _model(ModelArgs.from_dict(config), plan, self.divided)
        self.tokenizer = load_tokenizer(out, config)
        learned, held_out = _documents(plan, self.tokenizer, self.model.args)
        self.digest = learned.digest
        shapes = [array.shape for _, array in named_arrays(self.model.parameters())]
        if isinstance(self.model.part, Shard):
            shapes = [shape for shape, _ in self.model.part.parts.values()]
        self.parameters = sum(map(math.prod, shapes))
        self.tokens = sum(map(len, learned.tokens))
        tuning.prepare(self.model, plan)
        self._show = report or (lambda line: None)
        settings = plan.settings
        rows = settings.batch_size * settings.accumulate
        packed = not learned.examples if settings.packing is None else settings.packing
        carried = packed and settings.states == "carried"
        self._check_positions(carried, settings.length)
        batches: data.Stream | data.Rows
        if packed:
            batches = data.Stream(learned, rows, settings.length, carried=carried, seed=settings.seed)
        else:
            batches = data.Rows(learned, rows, settings.length, seed=settings.seed)
            if batches.cut:
                logger.warning(
                    "%d examples are longer than %d tokens and are cut there", batches.cut, settings.length
                )
        evaluated = None
        if held_out is not None:
            size = settings.batch_size
            evaluated = data.HeldOut(held_out, size, settings.length, carried=carried, packed=packed)
        self._targets: list[Report] = []
        self.trainer = Trainer(
            self.model,
            batches,
            settings,
            folder=self._checkpoints(),
            held_out=evaluated,
            report=self._report,
            sample=self._sample,
            after_checkpoint=self._write_model,
            group=group,
            run_id=run_id,
        )

    def run(self) -> Outcome:
        """Train, from the newest checkpoint if there is one.

        Raises:
            PararnnError: see `Trainer.run`; or another process trains in this folder, or it cannot be
                written to. What was written before stays, and the run can be resumed.
        """
        with _alone(self.out), _explained_writing(self.out):
            if find_spec("matplotlib") is None:
                logger.info("no plot of the losses: it needs pip install 'mlx-pararnn[plot]'")
            if self.group is not None:
                described = [self.plan.to_json(), dataclasses.asdict(self.model.args), self.trainer.run_id]
                share(self.group, described)
            self.trainer.resume()
            if self.group is not None and self.divided is None:
                share_arrays(self.group, dict(named_arrays(self.model.parameters())))
            reporters = Reporters(self.plan.report_to, self.out, self.out.name, self.plan.to_json())
            self._targets = [Log(self.out, self.trainer.step), reporters, self._show]
            try:
                return self.trainer.run()
            except PararnnError:  # where the losses diverged the plot shows how
                self._draw()
                raise
            finally:
                reporters.close()

    def _checkpoints(self) -> Path:
        return self.out / "checkpoints" if self.divided is None else _part_of(self.out, self.divided)

    def _report(self, line: dict[str, Any]) -> None:
        for target in self._targets:
            target(line)

    def _sample(self) -> str:
        settings, seed = self.plan.settings, random_seed()
        mx.random.seed(settings.seed + self.trainer.step)
        text = generate(
            self.model,
            self.tokenizer,
            settings.sample_prompt,
            max_tokens=settings.sample_tokens,
            sampler=make_sampler(temp=0.8),
        )
        mx.random.seed(seed)  # training goes on as if there had been no sample
        return text

    def _write_model(self) -> None:
        try:
            with self.trainer.averaged():
                tuning.write(self.model, self.plan, self.out)
        except RuntimeError as error:  # what MLX raises where a file cannot be written
            if is_lost(error):
                raise
            raise OSError(str(error)) from error
        card = training_card(self.plan, self.model.args, self.parameters, self.trainer, self.tokens)
        write_whole(self.out / "README.md", card.encode())
        self._draw()

    def _draw(self) -> None:
        """The plot of the losses so far, without which a run goes on all the same."""
        try:
            draw_losses(self.out)
        except Exception as error:  # of a plotting library any
            logger.warning("the losses cannot be plotted: %s", error)

    def _check_positions(self, carried: bool, length: int) -> None:
        room = self.model.args.max_position_embeddings
        if room is not None and (carried or length > room):
            raise PararnnError(
                f"this model has {room} learned positions: train it with states reset and a length of at "
                f"most {room}"
            )


def follow(group: Group, out: Path) -> Trainer:
    """What ranks other than 0 carry out beside `Run.run`: all they need comes from rank 0.

    Of a divided model each keeps checkpoints of its part, and reads its part of the model to begin with.
    """
    described, config, run_id = share(group)
    plan, args = Plan.from_json(described), ModelArgs.from_dict(config)
    if plan.divided > 1:
        model = _model(args, plan, group)

        def write_model() -> None:
            with trainer.averaged():
                tuning.write(model, plan, out)

        folder = _part_of(out, group)
        trainer = Trainer(
            model, (), plan.settings, folder=folder, after_checkpoint=write_model, group=group, run_id=run_id
        )
        trainer.resume()
        return trainer
    model = Model(args)
    tuning.prepare(model, plan)
    model.update(tree_unflatten(list(share_arrays(group).items())))
    return Trainer(model, (), plan.settings, group=group)


def start(out: Path, plan: Plan, report: Report | None = None, group: Group | None = None) -> Run:
    """Make the folder of a new run.

    Args:
        out: the folder, which must not exist.
        plan: what is trained on what.
        report: is given each line of the log, and {"step", "checkpoint"}.
        group: processes that train together, of which this is rank 0; the others `follow`.

    Raises:
        PararnnError: `out` exists, or the data, tokenizer or model cannot be had; nothing is left then.
    """
    if out.is_dir() and any(out.iterdir()):
        if (out / RUN).is_file():
            raise PararnnError(
                f"{out}: holds a training run; continue it with --resume, or choose another OUT"
            )
        raise PararnnError(f"{out}: already exists and is no training run; choose another output folder")
    if plan.data.is_dir() and out.resolve().is_relative_to(plan.data.resolve()):
        raise PararnnError(f"{out}: lies inside DATA; choose an output folder outside")
    check_reporters(plan.report_to)
    with whole_or_nothing(out, False, plan.data, 0) as partial:
        _write_description(partial, plan)
        run_id = secrets.token_hex(8)
        run = Run(partial, plan, report, group, run_id)
        written = {"format": "mlx-pararnn run", "version": 1, "digest": run.digest, "id": run_id}
        written |= plan.to_json()
        (partial / RUN).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    run.out = out
    run.trainer.folder = run._checkpoints()
    return run


def resume(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    report: Report | None = None,
    *,
    at: Path | None = None,
    group: Group | None = None,
) -> Run:
    """A run that was begun, to be continued.

    Args:
        out: its folder.
        changes: settings that are to be others from here on; of `CHANGEABLE`.
        report: as for `start`.
        at: where the data is now, if it was moved.
        group: as for `start`; a run may be resumed on more or fewer processes than it was begun on, one whose
            model is divided on as many.

    Raises:
        PararnnError: `out` is no run, its data changed, or a setting may not be changed.
    """
    try:
        values = read_json(out / RUN)
    except (FileNotFoundError, NotADirectoryError):
        raise PararnnError(
            f"{out}: is no training run (it has no {RUN}); start one without --resume"
        ) from None
    if not isinstance(values, dict) or values.pop("format", None) != "mlx-pararnn run":
        raise PararnnError(f"{out / RUN}: is not the description of a training run")
    digest, run_id, _ = (values.pop(name, None) for name in ("digest", "id", "version"))
    fixed = sorted(set(changes or {}) - CHANGEABLE)
    if fixed:
        raise PararnnError(
            f"{fixed[0]} cannot be changed when a run is resumed; these can: {', '.join(sorted(CHANGEABLE))}"
        )
    try:
        values["settings"] = values["settings"] | dict(changes or {})
        plan = Plan.from_json(values)
    except (TypeError, KeyError) as error:
        raise PararnnError(f"{out / RUN}: is not the description of a training run ({error})") from error
    if at is not None:
        plan = dataclasses.replace(plan, data=at)
    run = Run(out, plan, report, group, run_id)
    if run.digest != digest:
        raise PararnnError(
            f"{plan.data}: holds other tokens than when the run was started; put the data back as it was, or "
            "start a new run with --init"
        )
    return run


def _write_description(folder: Path, plan: Plan) -> None:
    """config.json and the tokenizer of the model that is to be trained."""
    if plan.init is not None:
        source = find_model(plan.init)
        config = dict(read_json(source / "config.json"))
        if "quantization" in config or "quantization_config" in config:
            raise PararnnError(
                f"{source}: its weights are quantized, which cannot be trained; take the model that it was "
                "made of"
            )
        ModelArgs.from_dict(config)
        files = prepare_tokenizer(None, source, config["vocab_size"], {})
        files.write(folder)
    else:
        texts = data.read_texts(data.training_file(plan.data)) if plan.tokenizer.startswith("bpe") else ()
        write_tokenizer(plan.tokenizer, texts, folder)
        tokenizer = load_tokenizer(folder, {})
        size = max(tokenizer.get_vocab().values()) + 1
        config = dataclasses.asdict(model_args(plan.preset, plan.cell, size))
        config = dataclasses.asdict(ModelArgs.from_dict(_changed(config, plan.model)))
        if tokenizer.eos_token_id is not None:
            config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _changed(config: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in fields:
        if name not in config or name == "model_type":
            raise PararnnError(f"model: there is no field {name!r}; there are {', '.join(sorted(config))}")
    return config | dict(fields)


def _model(args: ModelArgs, plan: Plan, group: Group | None) -> Model:
    """The model to begin with, or this process's part of it; no process has all of it at any time then."""
    mx.random.seed(plan.settings.seed)
    if plan.init is not None:
        return load_model(plan.init, group=group)[0]
    model = Model(args)
    initialize(model)
    if group is not None:
        model.shard(group)
    mx.eval(model.parameters())
    return model


def _part_of(out: Path, group: Group) -> Path:
    """Where a process keeps the checkpoints of its part."""
    return out / "checkpoints" / f"rank-{group.rank()}"


def initialize(model: Model) -> None:
    """New weights where those of the modules are not what the ParaRNN paper (App. C.1) takes.

    Recurrent weights are normal with a deviation of 1 / sqrt(D). The last matrices of mixer and MLP are
    divided by the square root of their number, so that the residual stream keeps its size in deep models.
    """
    depth = (2 * len(model.layers)) ** -0.5
    for layer in model.layers:
        cell = layer.mixer.cell
        shape = cell.recurrent_weight.shape
        cell.recurrent_weight = mx.random.normal(shape, scale=shape[1] ** -0.5)
        if "out_proj" in layer.mixer:
            layer.mixer.out_proj.weight = layer.mixer.out_proj.weight * depth
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * depth


# Of the gate that keeps the state: its name, and whether it opens for new input (GRU) or for what was there.
_MEMORY_GATES = {"gru": ("z", -1), "lstm": ("f", 1)}


def remember_long(model: Model, longest: int) -> None:
    """Let the units of each head begin with memories of 1 to `longest` tokens.

    By the bias of the gate that keeps the state, as in "Can recurrent neural networks warp time?" (arXiv
    1804.11188); with a bias of 0 a unit forgets half at each token. Cells other than "gru" and "lstm" stay as
    they are.
    """
    name, sign = _MEMORY_GATES.get(model.args.cell, (None, 0))
    if name is None:
        return
    gates = get_cell(model.args.cell).gates
    for layer in model.layers:
        cell = layer.mixer.cell
        bias = np.array(cell.bias)
        by_gate = bias.reshape(bias.shape[0], len(gates), -1)  # (heads, gates, D / heads), a view
        steps = np.geomspace(1, longest, by_gate.shape[2], dtype=np.float32)
        by_gate[:, gates.index(name)] = sign * np.log(steps)
        cell.bias = mx.array(bias)


def _documents(
    plan: Plan, tokenizer: TokenizerWrapper, args: ModelArgs
) -> tuple[data.Documents, data.Documents | None]:
    vocabulary, settings = args.vocab_size, plan.settings
    learned = data.read_documents(data.training_file(plan.data), tokenizer, vocabulary)
    valid = plan.valid or data.validation_file(plan.data)
    if valid is not None:
        held_out = data.read_documents(valid, tokenizer, vocabulary, what="the held-out text")
        if held_out.examples != learned.examples:
            raise PararnnError(
                f"{valid}: examples and plain texts do not go together; give the data's format"
            )
        if sum(map(len, held_out.tokens)) < 2:
            raise PararnnError(f"{valid}: the held-out text is empty; give a file with text in it")
        return learned, held_out
    if settings.valid_share and settings.eval_every:
        return data.split(learned, settings.valid_share, settings.seed)
    return learned, None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other process trains in this folder meanwhile; the lock ends with the process, however it ends."""
    descriptor = os.open(out / RUN, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PararnnError(f"{out}: another process is training there; stop it first") from None
        except OSError:
            logger.debug("%s: this file system has no locks", out)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _explained_writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PararnnError(
            f"{out}: it cannot be written to ({error.strerror or error}); make room, and continue with "
            "--resume"
        ) from error
