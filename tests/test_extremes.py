"""Long prompts, large batches, long conversations, extreme sampling: finite, flat, as the oracle has it."""

import math
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

from mlx_pararnn.chat.session import Chat
from mlx_pararnn.cli.sampling import Sampling, sampler
from mlx_pararnn.compute.recurrence import recurrence
from mlx_pararnn.generation import stream_generate
from mlx_pararnn.loading import load
from tests.support import oracle
from tests.support.demo import DEMO
from tests.support.greedy_tokens import same_until_a_near_tie
from tests.support.memory import active_memory, anonymous_memory, peak_anonymous_memory
from tests.support.problems import problem
from tests.support.serving import folder_of
from tests.support.training_runs import small_model

LOGPROBS = mx.array([[-3.0, -0.2, -2.0, -9.0]])


@pytest.mark.parametrize("temp", [1e-30, 1e-45, 5e-324, 0.0])
def test_a_temperature_that_float32_cannot_divide_by_takes_the_likeliest(temp):
    choose = sampler(Sampling(temp=temp, seed=1), 4)["sampler"]
    assert [choose(LOGPROBS).item() for _ in range(20)] == [1] * 20


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"temp": 100.0}, {0, 1, 2, 3}),
        ({"temp": 1.0, "top_p": 1e-30}, {1}),
        ({"temp": 1.0, "min_p": 1.0}, {1}),
    ],
)
def test_other_extremes_are_defined(given, wanted):
    choose = sampler(Sampling(seed=2**64 - 1, **given), 4)["sampler"]
    assert {choose(LOGPROBS).item() for _ in range(50)} == wanted


@pytest.mark.parametrize("penalty", [1e-30, 100.0])
def test_a_penalty_leaves_numbers(penalty):
    (process,) = sampler(Sampling(repetition_penalty=penalty), 4)["logits_processors"]
    assert not mx.isnan(process(mx.array([0, 1, 2]), LOGPROBS)).any()


def test_a_seed_draws_the_same_again():
    def drawn():
        choose = sampler(Sampling(temp=1.0, seed=7), 4)["sampler"]
        return [choose(LOGPROBS).item() for _ in range(50)]

    assert drawn() == drawn()


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "cpu"},
        {"backend": "ops", "method": "sequential"},
        {"backend": "ops", "method": "newton", "chunk": 3},
    ],
    ids=["cpu", "sequential", "newton"],
)
@pytest.mark.parametrize("name", ["gru", "lstm", "nlru", "slstm"])
def test_inputs_that_overflow_the_activations_are_the_oracles(name, options):
    """Gates up to the largest float32, all of them and every other one: sigmoid, tanh and exp end at 0 and 1.

    Powers of two, whose sums float32 has as float64 does. sLSTM's m adds gates: 12 of the largest would be
    infinite; and of 2**14 it rounds away what R h adds, which an exponential makes large. Float32 then
    has a number, and not the right one.
    """
    cell, params, u, _ = problem(name, T=12, D=6)
    every_other = np.indices(u.shape).sum(axis=0) % 2 == 0
    for power in (14, 60, 100, 123 if name == "slstm" else 127):
        large = (np.sign(u) * 2.0**power).astype(np.float32)
        for given in (large, np.where(every_other, large, u)):
            wanted = oracle_of(cell, params, given)
            hidden, last = recurrence(cell, mx.array(params), mx.array(given), **options)
            assert mx.isfinite(hidden).all(), power
            assert mx.isfinite(last).all(), power
            if name == "slstm" and power == 14:
                continue
            for mine, theirs in zip((hidden, *mx.split(last, last.shape[1], 1)), wanted, strict=True):
                difference = np.abs(np.array(mine).reshape(theirs.shape) - theirs).max()
                assert difference < 2e-5 * max(1, np.abs(theirs).max()), power


def oracle_of(cell, params, u):
    """The output (B, 1, T, D) and each slot's last state (B, 1, D), in float64."""
    plain = u[:, 0].astype(np.float64)
    states = oracle.sequential(cell, params.astype(np.float64), plain)
    return [states[cell.output_slot], *(state[:, -1] for state in states)]


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_logits_that_float16_does_not_hold(cell):
    """The likeliest of those that are infinite is not known any more: one of them is taken, at every step."""
    model, tokenizer = small_model(num_hidden_layers=1, cell=cell), load(DEMO)[1]
    norm = model.model.norm
    norm.weight = norm.weight * 2_000
    model.lm_head.weight = model.lm_head.weight * 30
    model.set_dtype(mx.float16)
    prompt = list(b"def main(")
    tokens = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=20)]
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array([[*prompt, *tokens]]))[0])[len(prompt) - 1 : -1]
    largest = float(np.finfo(np.float16).max)
    assert (logits.max(axis=-1) > 1.1 * largest).all()
    assert (logits[np.arange(len(tokens)), tokens] > 0.9 * largest).all()


@pytest.mark.large
@pytest.mark.parametrize("name", ["gru", "lstm", "nlru", "slstm"])
def test_a_batch_of_64_with_lengths_of_1_to_4096_is_the_oracles(name):
    cell, params, u, _ = problem(name, T=4096, D=2, B=64)
    lengths = np.unique(np.geomspace(1, 4096, 64).round().astype(int))
    lengths = np.sort(np.concatenate([lengths, np.arange(2, 2 + 64 - len(lengths))]))
    mask = np.arange(4096) >= 4096 - lengths[:, None]  # padded on the left, as a batch is
    hidden, last = recurrence(cell, mx.array(params), mx.array(u), mask=mx.array(mask))
    plain = u.transpose(0, 2, 3, 1, 4).reshape(64, 4096, len(cell.gates), 2).astype(np.float64)
    states = oracle.sequential(cell, params.astype(np.float64), plain, None, mask)
    wanted = np.where(mask[..., None], states[cell.output_slot], 0)
    scale = max(1, np.abs(wanted).max())
    assert np.abs(np.array(hidden) - wanted).max() < 2e-5 * scale
    ends = np.stack([state[:, -1] for state in states], axis=1)
    assert np.abs(np.array(last) - ends).max() < 2e-5 * max(1, np.abs(ends).max())


@pytest.mark.large
def test_a_batch_of_64_prompts_says_what_each_says_alone():
    """The whole model, in MLX-LM's batch: every row's log probabilities and tokens are those of it alone.

    The yardstick is plain MLX with one row at a time, without padding, mask or the compiled kernels.
    """
    model = small_model()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in np.linspace(1, 4096, 64, dtype=int)]
    batch, said = BatchGenerator(model), {}
    for number, uid in enumerate(batch.insert(prompts, [3] * 64)):
        said[uid] = (number, [])
    while responses := batch.next_generated():
        for response in responses:
            said[response.uid][1].append((response.token, response.logprobs))
    assert len(said) == 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_PARARNN_BACKEND", "ops")
        for number, answer in said.values():
            alone = list(generate_step(mx.array(prompts[number]), model, max_tokens=3))
            assert mx.abs(answer[0][1] - alone[0][1]).max() < 2e-5, number
            tokens, wanted = ([token for token, _ in said] for said in (answer, alone))
            assert same_until_a_near_tie(model, prompts[number], wanted, tokens), number


@pytest.mark.large
def test_ten_thousand_turns_are_flat_and_the_oracles(monkeypatch):
    """In the end the state is the one that plain MLX has after the same tokens, read afresh.

    In its second half the process itself grows by less than 3 kB a turn: two messages, and their places in
    the lists that the 64 turns which can be taken back hold, are 1.6.
    """
    model, tokenizer = small_model(num_hidden_layers=1), load(DEMO)[1]
    conversation, sizes, whole, tokens = Chat(model, tokenizer), [], [], []
    for turn in range(10_000):
        tokens += tokenizer.encode(f"{turn:4}?", add_special_tokens=False)
        for response in conversation.respond(f"{turn:4}?", max_tokens=1):
            tokens.append(response.token)
            assert math.isfinite(response.logprobs.sum().item())  # of finite numbers, all of them negative
        states = [array.sum() for layer in conversation.cache for array in layer.cache]
        assert all(math.isfinite(total.item()) for total in states), turn
        if turn % 100 == 99:
            sizes.append(active_memory())
            if sys.platform == "linux":
                whole.append(anonymous_memory())
    assert len(conversation.messages) == 20_000
    assert conversation.undoable == 64
    assert sizes[0] > 0
    assert max(sizes) - min(sizes) < 10_000, sizes  # bytes: one a turn would be 9,900
    assert not whole or whole[-1] - whole[49] < 5_000 * 3_000, whole
    tokens = tokens[: conversation.tokens]
    assert len(tokens) >= 59_999
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    cache = model.make_cache()
    for begin in range(0, len(tokens), 500):
        logits = model(mx.array([tokens[begin : begin + 500]]), cache=cache)
        mx.eval(logits, [layer.cache for layer in cache])
    following = [model(mx.array([[10]]), cache=held) for held in (conversation.cache, cache)]
    pairs = [pair for ours, afresh in zip(conversation.cache, cache, strict=True)
             for pair in zip(ours.cache, afresh.cache, strict=True)]  # fmt: skip
    for mine, theirs in [following, *pairs]:
        assert mx.abs(mine - theirs).max() < 2e-5 * max(1, mx.abs(theirs).max().item())


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    """A model that remembers a thousand tokens, its folder, a million tokens, the oracle's states of them."""
    model = small_model(num_hidden_layers=1, hidden_size=2, num_heads=1)
    cell = model.model.layers[0].mixer.cell
    cell.bias = mx.array([[-7.0, -7.0, *[0.1] * 4]])  # the update gate is first
    cell.recurrent_weight = cell.recurrent_weight * 2
    folder = folder_of(tmp_path_factory.mktemp("of") / "two", model, eos_token_id=None)
    tokens = np.random.default_rng(0).integers(32, 127, 1_000_000)
    return model, folder, tokens, in_floats(model, tokens, {*range(102_400, 1_000_000, 102_400), 999_999})


def in_floats(model, tokens, places):
    """By so many tokens the state (1, 1, D) and window (1, taps - 1, D) of a model of one layer and head.

    In float64, straight through, with nothing of the model but its weights and the text of the cell's step.
    """
    layer = model.model.layers[0]
    mixer, D = layer.mixer, model.args.hidden_size

    def weights(array):
        return np.array(array).astype(np.float64)

    vectors = weights(model.model.embed_tokens.weight)
    vectors /= np.sqrt((vectors**2).mean(axis=-1, keepdims=True) + layer.norm.eps)
    inputs = ((vectors * weights(layer.norm.weight)) @ weights(mixer.in_proj.weight)[:D].T)[tokens]
    taps = weights(mixer.conv1d.weight)[..., 0].T
    inputs = np.concatenate([np.zeros((len(taps) - 1, D)), inputs])
    x = sum(tap * inputs[k : k + len(tokens)] for k, tap in enumerate(taps)) + weights(mixer.conv1d.bias)
    x /= 1 + np.exp(-x)
    u = x @ weights(mixer.cell.input_proj.weight)[0].T + weights(mixer.cell.bias)
    cell, params, states = mixer.cell.cell, weights(mixer.cell.recurrent_weight), {}
    functions = SimpleNamespace(sigmoid=lambda x: 1 / (1 + math.exp(-x)), tanh=math.tanh)
    for d in range(D):  # channels do not know of each other
        own = dict(zip(cell.params, params[:, d].tolist(), strict=True))
        state = (0.0,)
        for t, gates in enumerate(u.reshape(len(tokens), -1, D)[:, :, d].tolist(), 1):
            state = cell.step(state, dict(zip(cell.gates, gates, strict=True)), own, functions)
            if t in places:
                states.setdefault(t, []).append(state[0])
    return {t: (np.array(h).reshape(1, 1, D), inputs[None, t : t + len(taps) - 1]) for t, h in states.items()}


@pytest.mark.large
def test_a_prompt_of_a_million_tokens_has_the_oracles_states(million):
    """Read in pieces of 2,048 tokens: at places on the way and at the end."""
    model, folder, tokens, wanted = million
    cache, found = model.make_cache(), {}

    def look(read, _):
        if read in wanted:
            found[read] = [np.array(array) for array in cache[0].cache]

    tokenizer = load(folder)[1]
    next(stream_generate(model, tokenizer, tokens, 1, prompt_cache=cache, prompt_progress_callback=look))
    assert found.keys() == wanted.keys()
    for read, arrays in wanted.items():
        for mine, theirs in zip(found[read], arrays, strict=True):
            assert np.abs(mine - theirs).max() < 5e-6, (read, mine, theirs)


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_prompt_of_a_million_tokens_from_stdin_takes_constant_memory(million, tmp_path, monkeypatch):
    """4 MB for what differs from run to run; token ids alone would be 7. The text is the oracle's state's."""
    model, folder, tokens, wanted = million
    most = {}
    for count in (100_000, 1_000_000):
        text, answer, said = (tmp_path / name for name in ("text", "answer", "said"))
        text.write_bytes(bytes(tokens[:count].tolist()))
        with text.open() as stdin, answer.open("w") as stdout, said.open("w") as stderr:
            command = [sys.executable, "-m", "mlx_pararnn", "generate", folder, "-m", "8"]
            process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr)
            most[count] = peak_anonymous_memory(process)
        assert process.returncode == 0, said.read_text()
        assert said.read_text().startswith(f"prompt: {count} tokens, ")
    assert most[1_000_000] - most[100_000] < 4_000_000, most
    monkeypatch.setenv("MLX_PARARNN_BACKEND", "ops")
    cache, token, following = model.make_cache(), int(tokens[-1]), []
    cache[0].cache = [mx.array(array.astype(np.float32)) for array in wanted[999_999]]
    for _ in range(8):
        token = mx.argmax(model(mx.array([[token]]), cache=cache)[0, -1]).item()
        following.append(token)
    assert answer.read_bytes() == bytes(following).decode(errors="replace").encode() + b"\n"
