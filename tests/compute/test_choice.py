"""Which backend computes a call: decided once, right under transformations, no more than is asked for."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_pararnn import PararnnError, get_cell
from mlx_pararnn.compute import choice, cpu, gpu
from mlx_pararnn.compute.choice import Choice, Evaluation, Solver, evaluation
from tests.support.random_models import make

TOKENS = mx.array(np.random.default_rng(5).integers(0, 37, (2, 9)))


@pytest.fixture
def asked(monkeypatch):
    """What was asked so far: "choice" for a backend, "evaluation" for what MLX allows."""
    made = []
    places = [module for name, module in sys.modules.items() if name.startswith("mlx_pararnn.")]
    for name, what in (("choose", "choice"), ("choose_elementwise", "choice"), ("evaluation", "evaluation")):
        function = getattr(choice, name)
        for module in places:
            if getattr(module, name, None) is function:
                spy = lambda *a, f=function, w=what, **k: made.append(w) or f(*a, **k)  # noqa: E731
                monkeypatch.setattr(module, name, spy)
    return made


def test_one_place_reads_what_the_environment_asks_for():
    package = Path(choice.__file__).parents[1]
    reads = [p.name for p in package.rglob("*.py") if 'get("MLX_PARARNN_BACKEND")' in p.read_text()]
    assert sorted(reads) == ["choice.py", "doctor.py"]  # doctor only tells it


@pytest.mark.compiled
def test_what_mlx_allows():
    x, known = mx.ones(3), mx.ones(3)
    mx.eval(x, known)
    seen = []

    def note(x):
        seen.append((evaluation([x]), evaluation([known, x])))
        return (x * x).sum()

    note(x)
    mx.grad(note)(x)
    mx.compile(note)(x)
    mx.vmap(note)(mx.stack([x, x]))
    assert seen == [
        (e, e) for e in (Evaluation.FREE, Evaluation.GRADIENT, Evaluation.NEVER, Evaluation.NEVER)
    ]
    assert evaluation([]) == Evaluation.FREE


@pytest.mark.sampled("large", by=lambda tokens: [tokens])
@pytest.mark.parametrize("kind", ["gru", "lstm, 4 heads", "plain", "babylm"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_call_makes_one_choice_and_asks_once(kind, tokens, cpu_backend, asked):
    made = make(kind)
    cache = made.make_cache(2)
    mx.eval(made(TOKENS[:, :tokens], cache=cache))  # the first call tries the backend
    asked.clear()
    mx.eval(made(TOKENS[:, :tokens], cache=cache))
    assert asked.count("choice") == 1
    assert asked.count("evaluation") <= 1  # a token's is asked by cpu_token, for what it is handed


def test_a_gpu_is_never_asked(monkeypatch, asked):
    """Its kernels are recorded like any operation of MLX."""
    monkeypatch.setattr(gpu, "available_backend", lambda: "metal")
    for tokens, step in ((9, False), (1, True)):
        where = choice.choose(
            get_cell("gru"),
            lambda: pytest.fail("asked"),
            rows=2,
            tokens=tokens,
            width=8,
            trial=lambda *_: True,
        )
        assert where == Choice("metal", "metal", step=step)
        assert where.deferred() == where


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ({"tokens": 9, "width": 8}, Choice("cpu", "ops", head="cpu")),
        ({"tokens": 9, "width": 1 << 14}, Choice("cpu", "cpu", head="cpu")),
        ({"tokens": 1, "width": 8}, Choice("ops", "ops", head="cpu", one_call=True)),
        ({"tokens": 1, "width": 8, "divided": True}, Choice("ops", "ops", head="cpu")),
        ({"tokens": 1, "width": 8, "padded": True}, Choice("ops", "ops", head="cpu")),
        (
            {"tokens": 1, "width": 8, "method": "sequential"},
            Choice("ops", "ops", head="cpu", solver=Solver("sequential")),
        ),
        ({"tokens": 1, "width": 8, "rows": 17}, Choice("ops", "ops", head="cpu")),
        ({"tokens": 1, "width": 1 << 14}, Choice("cpu", "cpu", head="cpu", one_call=True)),
        ({"tokens": 9, "width": 8, "method": "newton"}, Choice("ops", "ops", solver=Solver("newton"))),
        ({"tokens": 9, "width": 8, "backend": "ops"}, Choice("ops", "ops")),
        ({"tokens": 9, "width": 8, "trial": lambda *_: False}, Choice("ops", "ops")),
    ],
)
def test_choices_on_a_cpu(call, wanted, cpu_backend):
    known = mx.ones(2)
    given = {"rows": 2, "trial": lambda *_: True, **call}
    assert choice.choose(get_cell("gru"), lambda: [known], **given) == wanted


def test_what_is_not_here_is_refused(cpu_backend):
    for backend, said in (("vulkan", "unknown backend"), ("metal", "is not available on")):
        with pytest.raises(PararnnError, match=said):
            choice.choose(get_cell("gru"), list, rows=1, tokens=1, width=8, trial=bool, backend=backend)


@pytest.mark.large
@pytest.mark.parametrize("kind", ["gru", "plain lstm", "ml-pararnn", "babylm"])
def test_prompts_under_transformations(kind, cpu_backend, monkeypatch):
    """However small, and whichever weight alone is traced."""
    monkeypatch.setattr(cpu, "_LARGE", 0)
    made = make(kind)
    mx.eval(made(TOKENS))

    def loss(weight, path, **options):
        kept = dict(tree_flatten(made.parameters()))[path]
        made.update(tree_unflatten([(path, weight)]))
        total = (made(TOKENS, **options) ** 2).sum()
        made.update(tree_unflatten([(path, kept)]))
        return total

    for path, weight in tree_flatten(made.parameters()):
        wanted = mx.grad(loss)(weight, path, backend="ops")
        size = mx.abs(wanted).max()
        assert size.item() > 0, path
        gradients = [mx.grad(loss)(weight, path)]
        if path.endswith(("recurrent_weight", "layers.1.mlp.down_proj.weight", "embed_tokens.weight")):
            gradients.append(mx.compile(mx.grad(lambda w, p=path: loss(w, p)))(weight))
        for given in gradients:
            assert (mx.abs(given - wanted).max() / size).item() < 1e-4, path
    embeddings = mx.random.normal((3, 2, 9, made.args.hidden_size), key=mx.random.key(0))
    one = lambda x: made(TOKENS, input_embeddings=x)  # noqa: E731
    wanted = mx.stack([one(x) for x in embeddings])
    assert mx.allclose(mx.vmap(one)(embeddings), wanted, rtol=1e-4, atol=1e-4)


def test_who_reads_a_prompt_for_its_state_does_not_pay_for_its_output(cpu_backend, monkeypatch):
    """As MLX-LM's generate_step reads all pieces of a prompt but the last."""
    monkeypatch.setattr(cpu, "_LARGE", 0)
    made = make("gru")
    mx.eval(made(TOKENS))
    calls = []
    for name in ("swiglu", "gated_norm", "conv_silu", "solve"):
        function = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    cache = made.make_cache(2)
    made(TOKENS, cache=cache)
    mx.eval([c.cache for c in cache])
    layers = len(made.layers)
    assert [calls.count(n) for n in ("conv_silu", "solve")] == [layers, layers]
    assert [calls.count(n) for n in ("swiglu", "gated_norm")] == [layers - 1, layers - 1]


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("float32", 0), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)]
)
def test_a_trial_allows_one_rounding_and_no_more(dtype, rounding, monkeypatch):
    monkeypatch.setattr(choice, "TRIALS", {})
    wanted = mx.linspace(1.0, 2.0, 64)

    def outcomes(factor):
        yield [(wanted * factor).astype(getattr(mx, dtype))], [wanted]

    allowed, faulty = 1 + max(0.4 * rounding, 5e-5), 1 + 3 * max(rounding, 1e-4)
    assert choice.works_here(f"a trial in {dtype}", "cpu", lambda: outcomes(allowed))
    with pytest.warns(RuntimeWarning, match="it gives other numbers than plain MLX ops"):
        assert not choice.works_here(f"a trial in {dtype}", "cpu", lambda: outcomes(faulty))
