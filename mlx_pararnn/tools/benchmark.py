"""How fast a model runs on this machine: the measurements of `mlx-pararnn bench`.

Everything that a user waits for goes through MLX-LM's own generators (`generate_step`, and `BatchGenerator`
for batches), so that the numbers are those of `generate` and compare with `mlx_lm.benchmark`. Every number is
a median, after one run that does not count.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import BatchGenerator, generate_step

from .. import __version__
from ..cells import get_cell
from ..compute.choice import BACKENDS
from ..compute.module_arrays import named_arrays
from ..compute.recurrence import recurrence
from ..distributed import Group, any_rank
from ..errors import PararnnError
from ..model import Model
from ..model_config import ModelArgs
from ..process.address_space import check_room

SECTIONS = ("recurrence", "prefill", "decode", "batch", "memory")
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

SECONDS = 8.0  # after so long a measurement ends, however many trials were asked for
BATCH_PROMPT = 32  # tokens of each sequence's prompt in a batch


@dataclass(frozen=True)
class Measurement:
    """One row of the report.

    Attributes:
        section: one of SECTIONS.
        settings: what was varied, such as {"tokens": 512}.
        values: medians, named by what they are and their unit, such as {"tokens_per_second": 812.0}.
        runs: how many runs the medians are of.
    """

    section: str
    settings: dict[str, Any]
    values: dict[str, float]
    runs: int


@dataclass(frozen=True)
class Case:
    """One thing to measure: `run` does it once and returns its values."""

    section: str
    settings: dict[str, Any]
    run: Callable[[], dict[str, float]]

    def measure(self, trials: int, group: Group | None = None) -> Measurement:
        """The medians of at most `trials` runs, fewer where they take long, in one process of `group`."""

        def over() -> bool:
            late = time.perf_counter() - begin >= SECONDS
            return late if group is None else any_rank(group, late)

        begin = time.perf_counter()
        values = [self.run()]
        if not over():  # it was the warm-up; else it has to do
            begin = time.perf_counter()
            values = [self.run()]
            while len(values) < trials and not over():
                values.append(self.run())
        medians = {name: statistics.median(value[name] for value in values) for name in values[0]}
        return Measurement(self.section, self.settings, medians, len(values))


@dataclass(frozen=True)
class Sizes:
    """What is varied.

    Attributes:
        steps, widths: T and D of the recurrence alone; empty `widths` stands for the model's own.
        prompts: lengths of the prompts that are read.
        contexts: how many tokens have been read when decoding is timed.
        batches: how many sequences are decoded together.
        generated: how many tokens are generated to time decoding.
    """

    steps: Sequence[int]
    widths: Sequence[int]
    prompts: Sequence[int]
    contexts: Sequence[int]
    batches: Sequence[int]
    generated: int


SHORT = Sizes((1, 512), (), (128, 512), (0, 32768), (1, 8), 32)
FULL = Sizes(
    (1, 128, 512, 2048, 8192),
    (256, 1024, 2048),
    (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    (0, 1024, 8192, 32768),
    (1, 8, 32),
    128,
)


def preset_model(name: str, cell: str = "gru", dtype: str = "float32", group: Group | None = None) -> Model:
    """A model of a preset's shape with random weights in `dtype`; its recurrent weights are float32.

    Args:
        group: processes that it is divided among.

    Raises:
        PararnnError: no such preset or cell, or a limited address space is too small for it.
    """
    mx.random.seed(0)
    model = Model(ModelArgs.preset(name, cell))
    if group is None:
        nbytes = sum(array.size for _, array in named_arrays(model.parameters())) * DTYPES[dtype].size
        check_room(nbytes, f"the weights of {name} take", "choose a smaller one")
    return in_dtype(model, dtype, group)


def in_dtype(model: Model, dtype: str, group: Group | None = None) -> Model:
    """The model itself, its weights cast to `dtype` but for the recurrent ones, and evaluated."""
    cast = model.cast_predicate
    weights = tree_map_with_path(
        lambda path, array: array.astype(DTYPES[dtype]) if cast(path) else array, model.parameters()
    )
    model.update(weights)
    if group is not None:
        model.shard(group)
    mx.eval(model.parameters())
    return model


def fitting(model: Model, sizes: Sizes) -> Sizes:
    """The part of `sizes` that a model with learned positions has room for; all of it for the others."""
    room = model.args.max_position_embeddings
    if room is None:
        return sizes
    generated = min(sizes.generated, room // 4)
    return replace(
        sizes,
        prompts=[n for n in sizes.prompts if n <= room],
        contexts=[n for n in sizes.contexts if n + generated + 2 <= room],
        generated=generated,
    )


def cases(model: Model, sizes: Sizes = SHORT, sections: Sequence[str] = SECTIONS) -> Iterator[Case]:
    """What is to be measured, in the order of `sections`.

    Raises:
        PararnnError: a prompt or a context is longer than the model's learned positions.
    """
    longest = {
        "prefill": max(sizes.prompts, default=0),
        "decode": max(sizes.contexts, default=0) + sizes.generated + 2,
        "batch": BATCH_PROMPT + sizes.generated + 1,
    }
    room = model.args.max_position_embeddings
    makers = {
        "recurrence": _recurrence_cases,
        "prefill": _prefill_cases,
        "decode": _decode_cases,
        "batch": _batch_cases,
        "memory": _memory_cases,
    }
    for section in sections:
        if room is not None and longest.get(section, 0) > room:
            raise PararnnError(
                f"{section}: {longest[section]} tokens do not fit this model's {room} learned positions; ask "
                "for shorter prompts and contexts and fewer generated tokens"
            )
    for section in sections:
        yield from makers[section](model, sizes)


def _recurrence_cases(model: Model, sizes: Sizes) -> Iterator[Case]:
    args = model.args
    cell = get_cell(args.cell, args.activations)
    gates = len(cell.gates)

    @lru_cache(maxsize=1)  # made when its turn comes, and kept for those that share it
    def inputs(T: int, D: int) -> tuple[mx.array, mx.array]:
        heads = args.num_heads if D % args.num_heads == 0 else 1
        params = 0.1 * mx.random.normal((len(cell.params), D), key=mx.random.key(0))
        u = mx.random.normal((1, heads, T, gates, D // heads), key=mx.random.key(T))
        mx.eval(params, u)
        return params, u

    @lru_cache(maxsize=1)
    def copied(T: int, D: int) -> mx.array:
        """Copying it moves as many bytes as the recurrence: the gates in, hidden out."""
        x = mx.zeros(T * D * (gates + 1) // 2)
        mx.eval(x)
        return x

    def solve(T: int, D: int, method: str, backend: str) -> Any:
        return recurrence(cell, *inputs(T, D), method=method, backend=backend)

    def works(method: str, backend: str) -> bool:
        try:
            mx.eval(solve(2, args.num_heads, method, backend))
            return True
        except PararnnError:  # not on this machine, or not for this cell
            return False

    ways = [
        (method, backend)
        for backend in BACKENDS
        for method in ("sequential", "newton")
        if works(method, backend)
    ]
    for D in sizes.widths or (args.hidden_size,):
        for T in sizes.steps:
            for method, backend in ways:
                yield Case(
                    "recurrence",
                    {"T": T, "D": D, "method": method, "backend": backend},
                    _timed(inputs, solve, T, D, method, backend),
                )
            yield Case(
                "recurrence",
                {"T": T, "D": D, "method": "copy of as many bytes", "backend": "-"},
                _timed(copied, lambda T, D: copied(T, D) + 1, T, D),
            )


def _timed(
    prepare: Callable[..., Any], compute: Callable[..., Any], T: int, D: int, *how: str
) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        prepare(T, D)
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(compute(T, D, *how))
        mx.synchronize()
        return {"milliseconds": 1000 * (time.perf_counter() - begin)}

    return run


def _prefill_cases(model: Model, sizes: Sizes) -> Iterator[Case]:
    for tokens in sizes.prompts:
        yield Case("prefill", {"tokens": tokens}, partial(read_prompt, model, tokens))


def read_prompt(model: Any, tokens: int) -> dict[str, float]:
    """Read a prompt of random tokens by `generate_step`, up to the first token it yields.

    `model` is any of MLX-LM's. The values: "tokens_per_second" and "first_token_milliseconds".
    """
    prompt = mx.random.randint(0, model.args.vocab_size, (tokens,), key=mx.random.key(tokens))
    mx.eval(prompt)
    mx.synchronize()
    begin = time.perf_counter()
    for _ in generate_step(prompt, model, max_tokens=0):
        pass
    mx.synchronize()
    took = time.perf_counter() - begin
    return {"tokens_per_second": tokens / took, "first_token_milliseconds": 1000 * took}


def _decode_cases(model: Model, sizes: Sizes) -> Iterator[Case]:
    for context in sizes.contexts:
        yield Case(
            "decode",
            {"context": context},
            partial(_decode_after, model, context, sizes.generated),
        )


def _cache_after(model: Model, context: int) -> list[Any]:
    """A cache that has counted `context` tokens, of which it has read at most 32: its size and the work of a
    step are the same whatever it has read.
    """
    caches = model.make_cache()
    if context:
        model(mx.zeros((1, min(context, 32)), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])
        for cache in caches:
            cache.offsets = [context]
    return caches


def _decode_after(model: Model, context: int, tokens: int) -> dict[str, float]:
    return decode(model, _cache_after(model, context), tokens)


def decode(model: Any, cache: list[Any], tokens: int) -> dict[str, float]:
    """Generate `tokens` tokens by `generate_step` after the one that follows what `cache` has read.

    `model` is any of MLX-LM's. The values: "tokens_per_second" and "milliseconds_per_token".
    """
    steps = generate_step(mx.array([1]), model, max_tokens=tokens + 1, prompt_cache=cache)
    next(steps)
    begin = time.perf_counter()
    for _ in range(tokens):
        next(steps)
    took = time.perf_counter() - begin
    steps.close()
    mx.synchronize()
    return {"tokens_per_second": tokens / took, "milliseconds_per_token": 1000 * took / tokens}


def _batch_cases(model: Model, sizes: Sizes) -> Iterator[Case]:
    def run(size: int) -> dict[str, float]:
        prompts = mx.random.randint(0, model.args.vocab_size, (size, BATCH_PROMPT), key=mx.random.key(size))
        generator = BatchGenerator(model, completion_batch_size=size, prefill_batch_size=size)
        try:
            generator.insert(cast(list[list[int]], prompts.tolist()), [sizes.generated] * size)
            with generator.stats() as stats:
                while generator.next_generated():
                    pass
        finally:
            generator.close()
        return {"tokens_per_second": stats.generation_tps}

    for size in sizes.batches:
        yield Case("batch", {"sequences": size}, partial(run, size))


def _memory_cases(model: Model, sizes: Sizes) -> Iterator[Case]:
    def run() -> dict[str, float]:
        caches = _cache_after(model, 1)
        return {
            "weights_bytes": sum(array.nbytes for array in _weights(model).values()),
            "state_bytes": sum(cache.nbytes for cache in caches),
            "mlx_peak_bytes": mx.get_peak_memory(),
            "resident_bytes": resident_bytes(),
        }

    yield Case("memory", {}, run)


def _weights(model: Model) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def resident_bytes() -> int:
    """This process's memory that is not a file's, now; where the system does not tell, its largest so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def describe(model: Model, name: str) -> dict[str, Any]:
    """What a result has to say about itself: model, machine, versions, date."""
    arrays = _weights(model)
    divided = {} if model.group is None else {"one of processes": model.group.size()}
    return {
        "model": name,
        **divided,
        "cell": model.args.cell,
        "parameters": sum(array.size for array in arrays.values()),
        "dtype": str(arrays["model.layers.0.mixer.cell.bias"].dtype).removeprefix("mlx.core."),
        "device": f"{mx.default_device()}, {mx.device_info().get('device_name', platform.machine())}",
        "system": platform.system(),
        "mlx": version("mlx"),
        "mlx-pararnn": __version__,
        "date": str(date.today()),
    }
