"""What can be set for a training run, and the sizes of models that are trained from scratch."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import PararnnError
from ..files.model_files import open_regular
from ..model_config import PRESETS, ModelArgs

# name -> hidden_size, num_hidden_layers, num_heads, intermediate_size; the name is about the number of
# parameters without the embedding, which is tied to the head.
SMALL_PRESETS = {
    "1m": (128, 5, 4, 352),
    "4m": (256, 5, 4, 704),
    "10m": (384, 6, 4, 1024),
    "25m": (512, 8, 4, 1408),
    "60m": (768, 8, 4, 2112),
    "120m": (768, 16, 4, 2112),
}

SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("float32", "bfloat16")
STATES = ("carried", "reset")
TUNING = ("full", "lora", "dora", "state")


@dataclass(frozen=True)
class Settings:
    """How a model is trained. Every field can stand in the YAML file of `--config`.

    Attributes:
        steps: updates of the weights.
        batch_size: sequences in one pass through the model.
        accumulate: passes whose gradients are added up for one update.
        length: tokens of a sequence (T).
        states: "carried": a row reads on where it stopped, from the state that it had (truncated
            backpropagation through time); "reset": each piece starts from the initial state.
        packing: texts follow each other in a row; None: plain texts do, and examples with a prompt stand
            one in a row, padded.
        learning_rate: the highest.
        final_rate: the last learning rate, as a share of the highest.
        schedule: after the warm-up "cosine" falls to the last rate; "wsd" stays at the highest and falls in
            a straight line in the last `decay` of the steps; "constant" stays.
        warmup: steps in which the learning rate rises from 0 in a straight line.
        decay: share of the steps, for "wsd".
        beta1, beta2, epsilon: AdamW's.
        weight_decay: of matrices; none for norms, biases, recurrent weights and embeddings.
        clip: largest norm of the gradient of all weights together; 0 for no limit.
        max_recurrent_norm: recurrent weights stay within plus and minus this; None for no limit.
        ema: decay of the moving average of the weights, which is then what the model folder holds; None
            for none.
        precision: what matrix products compute in. The weights that are trained, and the recurrence, are
            float32 with either.
        seed: of initial weights and of the order of the data.
        valid_share: share of the data that is held out where no file for it is given.
        report_every, eval_every, save_every, sample_every: steps between lines of the log, evaluations,
            checkpoints and samples; 0 for none.
        eval_batches: at most so many batches of held-out text; 0 for all.
        keep: checkpoints that are kept.
        lora_rank, lora_scale: of adapters.
        sample_prompt, sample_tokens: what samples begin with and how long they are.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    length: int = 512
    states: str = "carried"
    packing: bool | None = None
    learning_rate: float = 1e-3
    final_rate: float = 0.1
    schedule: str = "cosine"
    warmup: int = 100
    decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    max_recurrent_norm: float | None = None
    ema: float | None = None
    precision: str = "float32"
    seed: int = 0
    valid_share: float = 0.05
    report_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    sample_every: int = 0
    eval_batches: int = 0
    keep: int = 2
    lora_rank: int = 8
    lora_scale: float = 20.0
    sample_prompt: str = "The"
    sample_tokens: int = 100

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PararnnError(f"{name} is {value!r}; it must be a whole number, {least} or more")
        for name, (least, most, least_too) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not right or not (least < value < most or (least_too and value == least)):
                above = "at least" if least_too else "above"
                below = "" if most == math.inf else f" and below {most:g}"
                raise PararnnError(f"{name} is {value!r}; it must be a number {above} {least:g}{below}")
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("states", STATES)):
            if getattr(self, name) not in choices:
                raise PararnnError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        if self.packing not in (None, True, False):
            raise PararnnError(f"packing is {self.packing!r}; it must be true or false")
        if not isinstance(self.sample_prompt, str):
            raise PararnnError(f"sample_prompt is {self.sample_prompt!r}; it must be a text")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings by name; raises PararnnError for a name that is none of them, or a wrong value."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise PararnnError(f"there is no setting {name!r}; there are {', '.join(sorted(known))}")
        # YAML reads 1e-3 as a text
        read = {name: _number(value) if name in _NUMBERS else value for name, value in values.items()}
        return cls(**read)


@dataclass(frozen=True)
class Plan:
    """What a run is started with.

    Attributes:
        data: a text file, a folder of them, or JSON Lines.
        valid: the same, held out; None to hold out `settings.valid_share` of the data.
        init: the model that training begins with, a folder or Hugging Face name; None for a new one.
        preset, cell, model: a new model's shape: a preset's, changed by fields of config.json.
        tokenizer: of a new model: "bytes", "bpe:N", a folder or Hugging Face name.
        tune: what is learned: "full", all weights; "lora" and "dora", adapters of matrices (MLX-LM's);
            "state", each layer's initial state alone.
        report_to: dashboards (`reporting.REPORTERS`).
        divided: among so many processes the model is divided, each with a part of the weights.
        settings: how it is trained.
    """

    data: Path
    valid: Path | None = None
    init: str | None = None
    preset: str = "4m"
    cell: str = "gru"
    model: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "bytes"
    tune: str = "full"
    report_to: tuple[str, ...] = ()
    divided: int = 1
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.tune not in TUNING:
            raise PararnnError(f"tune is {self.tune!r}; it must be one of {', '.join(TUNING)}")
        if self.tune != "full" and self.init is None:
            raise PararnnError(
                f"tune {self.tune}: is for a model that was trained; give it with --init MODEL"
            )
        if self.divided > 1 and self.tune != "full":
            raise PararnnError(f"tune {self.tune}: of a model that is divided all weights are trained")
        if self.divided > 1 and self.settings.sample_every:
            raise PararnnError("sample_every: a model that is divided writes no samples; leave it out")
        if self.tune == "state" and self.settings.states == "carried" and self.settings.packing is not False:
            object.__setattr__(self, "settings", replace(self.settings, states="reset"))

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint, with absolute paths."""
        values = asdict(self) | {"data": os.path.abspath(self.data), "report_to": list(self.report_to)}
        values["valid"] = None if self.valid is None else os.path.abspath(self.valid)
        if self.init is not None and Path(self.init).is_dir():
            values["init"] = os.path.abspath(Path(self.init))
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """What `to_json` wrote."""
        valid = values["valid"]
        return cls(
            **values
            | {
                "data": Path(values["data"]),
                "valid": None if valid is None else Path(valid),
                "report_to": tuple(values["report_to"]),
                "settings": Settings.from_dict(values["settings"]),
            }
        )


# the least whole number
_WHOLE = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "length", "keep", "lora_rank"), 1),
    **dict.fromkeys(("warmup", "seed", "report_every", "eval_every", "save_every", "sample_every"), 0),
    **{"eval_batches": 0, "sample_tokens": 1},
}
# above what, below what, and whether the first is allowed
_NUMBERS = {
    **{"learning_rate": (0, math.inf, False), "final_rate": (0, 1.001, True), "decay": (0, 1.001, True)},
    **{"beta1": (0, 1, True), "beta2": (0, 1, True), "epsilon": (0, math.inf, False)},
    **{"weight_decay": (0, math.inf, True), "clip": (0, math.inf, True), "valid_share": (0, 1, True)},
    **{"lora_scale": (0, math.inf, False), "max_recurrent_norm": (0, math.inf, False), "ema": (0, 1, False)},
}
_OPTIONAL = ("max_recurrent_norm", "ema")


def read_plan(config: Path | None, others: Mapping[str, Any], settings: Mapping[str, Any]) -> Plan:
    """A plan out of a YAML file, as MLX-LM's `lora --config` is one, and of what goes before it.

    The file has the fields of `Settings` and of `Plan` side by side; paths in it start from its folder.

    Args:
        config: the file, or None.
        others: fields of `Plan`.
        settings: fields of `Settings`.

    Raises:
        PararnnError: the file cannot be read, or something is unknown, wrong or missing.
    """
    values: dict[str, Any] = {} if config is None else _yaml(config)
    names = {field.name for field in fields(Plan)} - {"settings", "divided"}
    known = names | {field.name for field in fields(Settings)}
    for name in values:
        if name not in known:
            raise PararnnError(
                f"{config}: there is no setting {name!r}; there are {', '.join(sorted(known))}"
            )
    rest = {name: value for name, value in values.items() if name in names} | dict(others)
    if rest.get("data") is None:
        raise PararnnError("no DATA: give a text file, a folder of them, or .jsonl")
    for name in ("data", "valid"):
        if name in values and name not in others and config is not None:
            rest[name] = config.parent / _text(name, values[name])
    for name in ("init", "preset", "cell", "tokenizer", "tune"):
        if name in rest:
            rest[name] = _text(name, rest[name])
    if rest.get("init") is not None:
        for name in ("preset", "cell", "tokenizer", "model"):
            if rest.get(name):
                raise PararnnError(f"{name} is the model's own with --init; leave it out")
    report_to = rest.get("report_to") or ()
    rest["report_to"] = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    if not isinstance(rest.get("model", {}), Mapping):
        raise PararnnError(f"{config}: model must hold fields of a model's config.json")
    chosen = {name: value for name, value in values.items() if name not in names} | dict(settings)
    if rest.get("tune") == "state" and chosen.get("states") == "carried":
        raise PararnnError(
            "states carried: with tune state each piece begins from the state that is learned; leave states "
            "out, or give states reset"
        )
    return Plan(**rest, settings=Settings.from_dict(chosen))


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with open_regular(path) as file:
            values = yaml.safe_load(file.read().decode("utf-8"))
    except FileNotFoundError:
        raise PararnnError(f"{path}: no such file; --config takes a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PararnnError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise PararnnError(f"{path}: must hold settings, one a line, as in: steps: 1000")
    return values


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PararnnError(f"{name} is {value!r}; it must be a text")
    return value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def model_args(preset: str, cell: str, vocab_size: int) -> ModelArgs:
    """The shape of a new model: a small preset's or one of `ModelArgs.preset`, with this vocabulary.

    Raises:
        PararnnError: no such preset.
    """
    if preset in SMALL_PRESETS:
        hidden_size, layers, heads, intermediate_size = SMALL_PRESETS[preset]
        tied = True
    elif preset in PRESETS:
        hidden_size, layers, heads, intermediate_size = PRESETS[preset]
        tied = False
    else:
        raise PararnnError(
            f"unknown preset {preset!r}; choose one of {', '.join([*SMALL_PRESETS, *PRESETS])}"
        )
    return ModelArgs(
        cell=cell,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_heads=heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
    )
