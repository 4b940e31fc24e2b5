"""Learned initial states and adapters: what changes, what is written, and that it loads everywhere."""

import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from typer.testing import CliRunner

from mlx_pararnn.cache import RecurrentCache
from mlx_pararnn.cli.app import app
from mlx_pararnn.errors import PararnnError
from mlx_pararnn.loading import STATES, load, load_states
from mlx_pararnn.tools import benchmark
from mlx_pararnn.training import run as runs
from mlx_pararnn.training.reporting import read_log
from mlx_pararnn.training.settings import Plan, Settings
from tests.support.serving import request, running
from tests.support.training_runs import SMALL, TEXT, losses, same, small_model

QUICK = {
    "steps": 6,
    "batch_size": 4,
    "length": 16,
    "warmup": 1,
    "eval_every": 3,
    "save_every": 2,
    "report_every": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder, and the text that it was trained on."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT)
    settings = Settings(**QUICK, learning_rate=1e-2)
    plan = Plan(folder / "text.txt", cell="lstm", model=SMALL, settings=settings)
    runs.start(folder / "model", plan).run()
    return folder / "model", folder / "text.txt"


def run_plan(base, tune, **changes):
    settings = Settings(**QUICK | {"learning_rate": 0.05} | changes)
    return Plan(base[1], init=str(base[0]), tune=tune, settings=settings)


def tuned(base, out, tune, lines=None, stop=None, **changes):
    report = (lambda line: None) if lines is None else lines.append
    run = runs.start(out, run_plan(base, tune, **changes), report)
    if stop:
        run._targets = []
        make_step = run.trainer._make_step

        def stepping(batch):
            make_step(batch)
            if run.trainer.step == stop:
                run.trainer.stop()

        run.trainer._make_step = stepping
    run.run()
    return out


def weights(path):
    return dict(tree_flatten(load(path)[0].parameters()))


TOKENS = mx.array(np.frombuffer(TEXT.encode(), np.uint8)[:80].astype(np.int32).reshape(2, 40))


UP, DOWN = "abcdefg" * 8, "gfedcba" * 8


@pytest.fixture(scope="module")
def two_styles(tmp_path_factory):
    """A model of texts that go up and texts that go down the alphabet, and a text that goes up alone."""
    folder = tmp_path_factory.mktemp("styles")
    lines = [json.dumps({"text": UP if i % 2 else DOWN}) for i in range(64)]
    (folder / "both.jsonl").write_text("\n".join(lines))
    (folder / "up.txt").write_text(UP * 32)
    settings = Settings(
        **QUICK | {"steps": 200, "length": 8, "batch_size": 16, "save_every": 0}, learning_rate=5e-2
    )
    plan = Plan(folder / "both.jsonl", cell="lstm", model=SMALL, settings=replace(settings, states="reset"))
    runs.start(folder / "model", plan).run()
    return folder / "model", folder / "up.txt"


@pytest.mark.large
def test_a_state_chooses_the_style_and_is_all_that_changes(two_styles, tmp_path):
    """Which way a text goes is one bit, which its second letter tells: log 2 nats in 8 letters."""
    base, lines = two_styles, []
    out = tuned(base, tmp_path / "out", "state", lines, steps=60, length=8, batch_size=16, weight_decay=0.0)
    after, before = weights(out), weights(base[0])
    learned = {name for name in after if name.endswith("initial_state")}
    assert len(learned) == 2
    assert all(mx.abs(after[name]).max() > 1e-3 for name in learned)
    assert same({name: after[name] for name in before}, before)
    assert set(after) - set(before) == learned
    assert (out / STATES).stat().st_size < 1000
    trainer = runs.start(tmp_path / "again", run_plan(base, "state", length=8, batch_size=16)).trainer
    first, _ = trainer.evaluate(trainer.held_out)
    held = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert held[-1] < first - math.log(2) / 8

    by_file, _ = load(base[0], state=out / STATES)
    by_folder, _ = load(out)
    assert mx.array_equal(by_file(TOKENS), by_folder(TOKENS))
    assert not mx.allclose(by_file(TOKENS), load(base[0])[0](TOKENS), atol=1e-3)
    for prompt in (["-p", "d"], ["--tokens", str(ord("d"))]):
        texts = []
        for where in ([str(out)], [str(base[0]), "--state", str(out / STATES)]):
            done = CliRunner().invoke(app, ["generate", *where, *prompt, "--max-tokens", "4", "--json"])
            assert done.exit_code == 0, done.stderr
            texts.append(bytes(json.loads(done.stdout)["tokens"]).decode())
        assert texts == ["efga"] * 2


def test_tuned_states_resume_to_the_bit(base, tmp_path):
    whole = tuned(base, tmp_path / "whole", "state")
    parts = tuned(base, tmp_path / "parts", "state", stop=3)
    runs.resume(parts).run()
    assert (whole / STATES).read_bytes() == (parts / STATES).read_bytes()
    assert losses(read_log(whole)) == losses(read_log(parts))


@pytest.mark.sampled("large", by=lambda: ["one"])
@pytest.mark.parametrize("tune", ["lora", "dora"])
def test_adapters_are_fused_and_load_in_mlx_lm(tune, base, tmp_path):
    out = tuned(base, tmp_path / "out", tune, learning_rate=1e-2)
    after, before = weights(out), weights(base[0])
    assert after.keys() == before.keys()
    changed = {name for name in after if not mx.array_equal(after[name], before[name])}
    assert changed == {name for name in after if name.endswith("proj.weight")}
    assert "model.layers.0.mixer.cell.input_proj.weight" in changed
    model, _ = load(base[0])
    load_adapters(model, str(out))
    fused, _ = load(base[0], adapter_path=out)
    assert "lora_a" not in fused.layers[0].mixer.cell.input_proj
    wanted = load(out)[0](TOKENS)
    assert mx.allclose(model(TOKENS), wanted, atol=1e-4)
    assert mx.allclose(fused(TOKENS), wanted, atol=1e-4)
    assert not mx.allclose(wanted, load(base[0])[0](TOKENS), atol=1e-2)
    options = ["-p", "import", "--max-tokens", "8", "--json"]
    texts = []
    for where in ([str(out)], [str(base[0]), "--adapter-path", str(out)]):
        done = CliRunner().invoke(app, ["generate", *where, *options])
        assert done.exit_code == 0, done.stderr
        texts.append(json.loads(done.stdout)["tokens"])
    assert texts[0] == texts[1]


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapted(request, tmp_path_factory):
    """A model of ml-pararnn's shape, a folder of its adapters and of the tuned model, and logits of that."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "text.txt").write_text(TEXT)
    shape = SMALL | {"mlp_residual": False, "residual_scale": True}
    plan = Plan(folder / "text.txt", model=shape, settings=Settings(**QUICK))
    runs.start(folder / "model", plan).run()
    base = folder / "model", folder / "text.txt"
    out = tuned(base, folder / "out", request.param, learning_rate=3e-2)
    logits = {"input_ids": TOKENS, "logits": load(out)[0](TOKENS)}
    mx.save_safetensors(str(folder / "logits.safetensors"), logits)
    return str(base[0]), str(out), str(folder / "logits.safetensors")


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_verify_takes_adapters(adapted):
    model, adapters, logits = adapted
    assert command("verify", model, "--logits", logits).exit_code == 1
    done = command("verify", model, "--logits", logits, "--adapter-path", adapters)
    assert done.exit_code == 0, done.output
    done = command("verify", model, "--against", model, "--adapter-path", adapters)
    assert (done.exit_code, "leave out --adapter-path" in done.stderr) == (2, True)


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_bench_takes_adapters(adapted, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, "fitting", lambda model, sizes: seen.append(model) or sizes)
    options = ("--only", "memory", "--adapter-path")
    done = command("bench", adapted[0], *options, adapted[1])
    assert done.exit_code == 0, done.output
    assert same(dict(tree_flatten(seen[0].parameters())), weights(adapted[1]))
    done = command("bench", adapted[0], *options, tmp_path)
    assert (done.exit_code, "holds no adapters" in done.stderr) == (1, True)
    done = command("bench", "--preset", "400m", *options, adapted[1])
    assert (done.exit_code, "needs the MODEL" in done.stderr) == (1, True)


@pytest.mark.sampled("large", by=lambda: ["one"])
def test_adapters_go_to_pytorch(adapted, tmp_path):
    model, adapters, _ = adapted
    for name, *arguments in (("wanted", adapters), ("given", model, "--adapter-path", adapters)):
        done = command("convert", *arguments, "--to", "torch", "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
    wanted, given = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("wanted", "given"))
    assert same(wanted, given)
    names = sorted(path.name for path in (tmp_path / "wanted").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "given").iterdir())
    done = command("convert", model, "--to", "torch", "-o", tmp_path / "no", "--adapter-path", tmp_path)
    assert (done.exit_code, "holds no adapters" in done.stderr) == (1, True)
    assert not (tmp_path / "no").exists()
    done = command("convert", model, "-o", tmp_path / "no", "--adapter-path", adapters)
    assert (done.exit_code, "needs --to coreml, coreai or torch" in done.stderr) == (2, True)


@pytest.mark.large
@pytest.mark.parametrize(("to", "needs"), [("coreml", "coremltools"), ("coreai", "coreai")])
def test_packages_take_adapters(to, needs, adapted, tmp_path):
    pytest.importorskip(needs)
    model, adapters, _ = adapted
    digests = []
    for name, *arguments in (
        ("wanted", adapters),
        ("given", model, "--adapter-path", adapters),
        ("without", model),
    ):
        done = command("convert", *arguments, "--to", to, "-o", tmp_path / name, "--chunk", 4)
        assert done.exit_code == 0, done.output
        digests.append(json.loads((tmp_path / name / "pararnn.json").read_text())["weights_digest"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.large
def test_serve_answers_with_adapters(adapted):
    model, adapters, _ = adapted
    body = {"prompt": "import", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    said = []
    for arguments in ([adapters], [model, "--adapter-path", adapters], [model]):
        with running(*arguments) as server:
            status, _, answer = request(server, "POST", "/v1/completions", body)
            assert status == 200, answer
            said.append(json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"])
    assert said[0] == pytest.approx(said[1], abs=1e-4)
    assert said[0] != pytest.approx(said[2], abs=1e-2)


def test_adapters_that_do_not_fit(base, tmp_path):
    with pytest.raises(PararnnError, match="holds no adapters"):
        load(base[0], adapter_path=tmp_path)
    lora = {"rank": 4, "scale": 1.0, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    name = "model.layers.0.mixer.cell.input_proj.lora_a"
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: mx.zeros((2, 9, 4))})
    with pytest.raises(PararnnError, match="do not fit this model"):
        load(base[0], adapter_path=tmp_path)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_learned_state_is_where_every_row_begins(cell):
    model = small_model(cell=cell)
    slots = len(model.layers[0].mixer.cell.cell.slots)
    for layer in model.layers:
        layer.mixer.cell.initial_state = mx.random.normal((slots, 16))
    cache = model.make_cache()
    for c, layer in zip(cache, model.layers, strict=True):
        c.cache[0] = mx.broadcast_to(layer.mixer.cell.initial_state, (2, slots, 16))
        c.offsets, c.kept = [0, 0], [{}, {}]
    given = model(TOKENS, cache=cache)
    assert mx.allclose(model(TOKENS), given, atol=1e-5)
    one_by_one = model.make_cache(2)
    pieces = [model(TOKENS[:, t : t + 1], cache=one_by_one) for t in range(40)]
    assert mx.allclose(mx.concatenate(pieces, axis=1), given, atol=1e-4)
    # rows that join before their first token, and one that has read some
    merged = [
        RecurrentCache.merge(layers) for layers in zip(model.make_cache(), model.make_cache(), strict=True)
    ]
    assert mx.allclose(model(TOKENS, cache=merged), given, atol=1e-5)
    begun = model.make_cache()
    model(TOKENS[:1], cache=begun)
    joined = [RecurrentCache.merge(layers) for layers in zip(begun, model.make_cache(), strict=True)]
    assert mx.allclose(model(TOKENS, cache=joined)[1], given[1], atol=1e-5)


def test_states_that_do_not_fit(base, tmp_path):
    model, _ = load(base[0])
    with pytest.raises(PararnnError, match="no such file"):
        load_states(model, tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"no safetensors")
    with pytest.raises(PararnnError, match="cannot be read"):
        load_states(model, tmp_path / "bad")
    mx.save_safetensors(str(tmp_path / "s.safetensors"), {"layers.0": mx.zeros((1, 16))})
    with pytest.raises(PararnnError, match="2 layers with states of 2 x 16"):
        load_states(model, tmp_path / "s.safetensors")


def test_the_server_begins_from_a_state(base, tmp_path):
    from mlx_pararnn.chat.prompt_cache import PromptCache
    from mlx_pararnn.chat.server.engine import Engine
    from mlx_pararnn.chat.server.metrics import Metrics

    states = {f"layers.{n}": mx.full((2, 16), 0.25) for n in range(2)}
    mx.save_safetensors(str(tmp_path / "s.safetensors"), states)
    engine = Engine(base[0], PromptCache(), Metrics(), state=tmp_path / "s.safetensors")
    engine.wait()
    try:
        assert engine.model.layers[1].mixer.cell.initial_state.tolist() == [[0.25] * 16] * 2
    finally:
        engine.stop()


def test_tuning_needs_a_model(base):
    with pytest.raises(PararnnError, match="give it with --init MODEL"):
        Plan(base[1], tune="lora")
    with pytest.raises(PararnnError, match="tune is 'all'; it must be one of full, lora"):
        Plan(base[1], init=str(base[0]), tune="all")


def test_carried_states_are_not_asked_for_with_states_that_are_learned(base, tmp_path):
    command = ["train", str(base[1]), "-o", str(tmp_path / "out"), "--init", str(base[0]), "--tune", "state"]
    result = CliRunner().invoke(app, [*command, "--states", "carried"])
    assert result.exit_code == 1
    assert "with tune state each piece begins from the state that is learned" in result.stderr
    assert not (tmp_path / "out").exists()
