"""How a command chooses tokens: by its options, then the model's generation_config.json, then its default."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_pararnn.errors import PararnnError

from .tool_lines import printable

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# What generation_config.json calls the fields of Sampling that it may hold.
IN_CONFIG = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
# The least and the largest value; 0 is no value of top_p and of repetition_penalty.
LIMITS: dict[str, tuple[float, float]] = {
    "temp": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 1e9),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "seed": (0, 2**64 - 1),
}
ABOVE_ZERO = ("top_p", "repetition_penalty")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults take the likeliest."""

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def replaced(self, **given: Any) -> "Sampling":
        """The same with what was given, which leaves out what is None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


LIKELIEST = Sampling()
# Of a conversation without a word from its model: the likeliest token again and again repeats itself.
CONVERSATION = Sampling(temp=0.7, top_p=0.95)


def choose_sampling(
    folder: Path, default: Sampling, given: dict[str, Any], uses_tools: bool = False
) -> Sampling:
    """What was given, else what the model folder's generation_config.json says, else `default`.

    A model that uses tools takes the likeliest instead of `default`, and its file's penalty has no place.
    """
    said = said_by_model(generation_config(folder))
    if uses_tools:
        default = LIKELIEST
        said.pop("repetition_penalty", None)
    return replace(default, **said).replaced(**given)


def said_by_model(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Sampling` that a generation_config.json determines.

    `do_sample: false` is the likeliest token; `true`, or a setting of sampling without it, is sampling, at
    temperature 1 where none is named. Values that are no sound numbers are left out.
    """
    found: dict[str, Any] = {}
    for field, name in IN_CONFIG.items():
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and is_sound(field, value):
            found[field] = int(value) if field == "top_k" else float(value)
    penalty = {k: v for k, v in found.items() if k == "repetition_penalty"}
    samples = config.get("do_sample")
    if samples is False:
        return {**vars(LIKELIEST), **penalty}
    if samples is True or found.keys() - penalty.keys():
        return {**vars(LIKELIEST), "temp": 1.0, **found}
    return penalty


def is_sound(field: str, value: float) -> bool:
    """Whether a field of `Sampling` may have this value."""
    low, high = LIMITS[field]
    if not low <= value <= high or (value == 0 and field in ABOVE_ZERO):
        return False
    return field not in ("top_k", "seed") or value == int(value)


def sampler(sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """The sampler and logits processors, as keyword arguments of `stream_generate`; seeds MLX.

    The sampler has been called once: what MLX compiles for it belongs to no text's speed.
    """
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from mlx_pararnn.generation import COLDEST

    top_k, penalty = sampling.top_k, sampling.repetition_penalty
    temp = sampling.temp if sampling.temp >= COLDEST else 0.0
    draw = make_sampler(temp, sampling.top_p, sampling.min_p, top_k=top_k if top_k < vocab_size else 0)
    mx.eval(draw(mx.zeros((1, vocab_size))))
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    processors = make_logits_processors(repetition_penalty=None if penalty == 1 else penalty)
    return {"sampler": draw, "logits_processors": processors}


def tool_sampler(sampling: Sampling, stop: list[str] | None, vocab_size: int) -> Any:
    """The sampler for a model that uses tools; None takes the likeliest token.

    Raises:
        PararnnError: an option that such a model's turns have no place for.
    """
    if stop or sampling.repetition_penalty != 1:
        raise PararnnError(
            "this model uses tools and ends its answers itself: --stop and --repetition-penalty are not taken"
        )
    chosen = sampler(sampling, vocab_size)
    return chosen["sampler"] if sampling.temp else None


def suggested_questions(folder: Path) -> list[str]:
    """At most two, of `examples` in a model folder's generation_config.json."""
    examples = generation_config(folder).get("examples")
    if not isinstance(examples, list) or not all(isinstance(text, str) for text in examples[:2]):
        return []
    return [shown for text in examples[:2] if (shown := printable(text)[:200].strip())]


def generation_config(folder: Path) -> dict[str, Any]:
    """What a model folder's generation_config.json says; nothing where there is none."""
    from mlx_pararnn.files.model_files import read_json

    try:
        found = read_json(folder / "generation_config.json")
    except (PararnnError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def folder_of(tokenizer: "TokenizerWrapper") -> Path:
    """The model folder that a tokenizer was loaded from."""
    return Path(tokenizer.name_or_path)


NAMES = tuple(field.name for field in fields(Sampling))
