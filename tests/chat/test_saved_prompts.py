"""States in a folder: found again by the next server of the same model, dropped where they are damaged."""

import hashlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_pararnn import Model, ModelArgs, PararnnError
from mlx_pararnn.chat.model_fingerprint import fingerprint
from mlx_pararnn.chat.saved_prompts import SavedPromptCache
from tests.support.serving import client_of, running

TEXT = [1, 2, 3] * 70


@dataclass
class Later(ModelArgs):
    said_by_later_versions: int | None = None


def make_model(seed=0, **changes):
    mx.random.seed(seed)
    model = Model(ModelArgs(16, 2, 8, 16, **{"cell": "lstm", **changes}))
    model.snapshot_spacing = 64
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def state_of(model, tokens):
    cache = model.make_cache()
    model(mx.array([tokens]), cache=cache)
    return cache


def opened(folder, model, max_bytes=10**9):
    prompts = SavedPromptCache(folder, 100, max_bytes)
    prompts.open(model)
    return prompts


def saved(folder, model, *texts, **options):
    prompts = opened(folder, model, **options)
    for text in texts:
        prompts.insert_cache("", text, state_of(model, text))
        while prompts.save_some():
            pass
    return prompts


def read(prompts, prompt):
    return len(prompt) - len(prompts.fetch_nearest_cache("", prompt)[1])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("mixer", ["gated_conv", "plain"])
def test_a_state_and_its_snapshots_are_there_again(tmp_path, dtype, mixer):
    model = make_model(mixer=mixer)
    model.set_dtype(dtype)
    saved(tmp_path, model, TEXT)
    again = opened(tmp_path, model)
    assert read(again, [*TEXT, 5]) == len(TEXT)
    edited = [*TEXT[:150], 7, 7]
    states, rest = again.fetch_nearest_cache("", edited)
    assert len(edited) - len(rest) == 128  # at most one interval of snapshots before the edit
    expected = state_of(model, edited[:128])
    for layer, computed in zip(states, expected, strict=True):
        for a, b in zip(layer.cache, computed.cache, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (
                a.dtype == b.dtype and mx.allclose(a, b, atol=1e-2 if dtype != mx.float32 else 1e-6)
            )
    # It goes on as if it had never been away.
    after = model(mx.array([[5, 6]]), cache=again.fetch_nearest_cache("", [*TEXT, 5])[0])
    plain = model(mx.array([[*TEXT, 5, 6]]))[:, -2:]
    assert mx.allclose(after, plain, atol=1e-4 if dtype == mx.float32 else 0.2)


def test_another_models_states_are_left_alone(tmp_path, model):
    saved(tmp_path, model, TEXT)
    for other in (make_model(seed=1), make_model(cell="gru")):
        assert read(opened(tmp_path, other), [*TEXT, 5]) == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert fingerprint(make_model()) == fingerprint(model)
    changed = make_model()
    changed.model.norm.weight = changed.model.norm.weight.at[3].add(1e-3)
    assert fingerprint(changed) != fingerprint(model)
    changed = make_model()
    changed.args.norm_eps *= 2
    assert fingerprint(changed) != fingerprint(model)


def test_a_saved_state_outlives_what_later_versions_add_to_configurations(model):
    later = make_model()
    later.args = Later(**vars(later.args))
    assert fingerprint(later) == fingerprint(model)
    later.args.said_by_later_versions = 1
    assert fingerprint(later) != fingerprint(model)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_dropped_with_a_warning(tmp_path, model, caplog, damage):
    saved(tmp_path, model, TEXT, [4] * 100)
    path = min(tmp_path.iterdir(), key=lambda path: path.stat().st_size)  # [4] * 100
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes({"flipped": data, "cut": data[: len(data) // 2], "empty": b""}[damage])
    again = opened(tmp_path, model)
    assert "cannot be used and is dropped" in caplog.text
    assert not path.exists()
    assert (read(again, [4] * 200), read(again, [*TEXT, 5])) == (0, len(TEXT))


def wider(name, array):
    return name, mx.concatenate([array, array], axis=-1)


HOSTILE = {
    "no states": lambda arrays: {"tokens": arrays["tokens"], "a": mx.zeros(3)},
    "no tokens": lambda arrays: {name: a for name, a in arrays.items() if name != "tokens"},
    "none at all": lambda arrays: {**arrays, "tokens": arrays["tokens"][:0]},
    "other tokens": lambda arrays: {**arrays, "tokens": arrays["tokens"].astype(mx.float32)},
    "a table of tokens": lambda arrays: {**arrays, "tokens": arrays["tokens"][None]},
    "fewer tokens": lambda arrays: {**arrays, "tokens": arrays["tokens"][:-1]},
    "wider": lambda arrays: dict(wider(*pair) if pair[0] != "tokens" else pair for pair in arrays.items()),
    "of two rows": lambda arrays: {
        name: a if name == "tokens" else mx.concatenate([a, a]) for name, a in arrays.items()
    },
    "of another type": lambda arrays: {
        name: a if name == "tokens" else a.astype(mx.float16) for name, a in arrays.items()
    },
    "no numbers": lambda arrays: {name: a if name == "tokens" else a * mx.nan for name, a in arrays.items()},
    "a snapshot without numbers": lambda arrays: {**arrays, "1.64.state": arrays["1.64.state"] * mx.inf},
    "a layer more": lambda arrays: {**arrays, "2.210.state": arrays["1.210.state"]},
    "a layer less": lambda arrays: {name: a for name, a in arrays.items() if not name.startswith("1.")},
    "no window": lambda arrays: {name: a for name, a in arrays.items() if name != "0.210.window"},
    "a snapshot of one layer": lambda arrays: {name: a for name, a in arrays.items() if "1.64." not in name},
    "before the beginning": lambda arrays: {
        **arrays,
        **{f"{n}.-5.{part}": arrays[f"{n}.210.{part}"] for n in "01" for part in ("state", "window")},
    },
    "a number of any length": lambda arrays: {**arrays, f"{'9' * 5000}.210.state": arrays["1.210.state"]},
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_whole_file_that_holds_something_else_is_dropped(tmp_path, model, caplog, change):
    """Its name is right for its contents, which are no states of the model; the server goes on without it."""
    saved(tmp_path, model, TEXT)
    (path,) = tmp_path.iterdir()
    arrays = mx.load(str(path))
    mx.eval(arrays)
    path.unlink()
    rest = tmp_path / "x.safetensors"
    mx.save_safetensors(str(rest), HOSTILE[change](arrays))
    contents = hashlib.sha256(rest.read_bytes()).hexdigest()[:32]
    path = rest.rename(tmp_path / f"{fingerprint(model)}-{contents}.safetensors")
    again = opened(tmp_path, model)
    assert "cannot be used and is dropped" in caplog.text
    assert (len(again), path.exists()) == (0, False)


def test_what_is_no_file_is_left_alone(tmp_path, model):
    """A pipe, which nobody would ever write to, a folder, a link to nothing."""
    saved(tmp_path, model, TEXT)
    names = [f"{fingerprint(model)}-{n}{'0' * 31}.safetensors" for n in range(3)]
    os.mkfifo(tmp_path / names[0])
    (tmp_path / names[1]).mkdir()
    (tmp_path / names[2]).symlink_to("nowhere")
    assert read(opened(tmp_path, model, max_bytes=10), [*TEXT, 5]) == 0  # too little: all files are evicted
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_was_used_last_stays_within_the_bytes(tmp_path, model):
    saved(tmp_path / "one", model, [1] * 50)
    one = next((tmp_path / "one").iterdir()).stat().st_size
    folder = tmp_path / "all"
    prompts = saved(folder, model, *[[letter] * 50 for letter in range(1, 5)])
    for n, path in enumerate(sorted(folder.iterdir(), key=os.path.getmtime)):
        os.utime(path, (n + 1, n + 1))
    assert read(prompts, [1] * 60) == 50  # and so it is the one that was used last
    again = opened(folder, model, max_bytes=int(2.5 * one))
    assert [read(again, [letter] * 60) for letter in range(1, 5)] == [50, 0, 0, 50]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2.5 * one
    # Those of a model that is not served any more go too.
    saved(folder, make_model(seed=1), [5] * 50, [6] * 50, max_bytes=int(2.5 * one))
    assert len(list(folder.iterdir())) == 2
    again.trim_to(n_bytes=0)
    assert read(opened(folder, make_model(seed=1)), [6] * 60) == 50


def test_two_files_of_one_text_count_once(tmp_path, model):
    """As two servers write them, the second with fewer snapshots."""
    sparing = make_model()
    sparing.snapshot_spacing = 128
    first, second = opened(tmp_path, model), opened(tmp_path, model)
    first.insert_cache("", TEXT, state_of(model, TEXT))
    second.insert_cache("", TEXT, state_of(sparing, TEXT))
    assert first.save_some()
    (older,) = tmp_path.iterdir()
    os.utime(older, (1, 1))
    assert second.save_some()
    assert len(list(tmp_path.iterdir())) == 2
    again = opened(tmp_path, model)
    (path,) = tmp_path.iterdir()
    assert path != older
    assert (len(again), read(again, [*TEXT, 5])) == (1, len(TEXT))
    again.trim_to(n_sequences=0)
    assert (again.nbytes, list(tmp_path.iterdir())) == (0, [])


def test_a_write_that_was_cut_short_leaves_nothing(tmp_path, model, monkeypatch, caplog):
    def cut(path, arrays):
        Path(path).write_bytes(b"half")
        raise RuntimeError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", cut)
        prompts = saved(tmp_path, model, TEXT)
    assert "cannot be saved" in caplog.text
    assert read(prompts, [*TEXT, 5]) == len(TEXT)  # in memory it is
    assert len(opened(tmp_path, model)) == 0
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_can_read_it(tmp_path, model):
    saved(tmp_path / "states", model, TEXT)
    assert (tmp_path / "states").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "states").iterdir()} == {0o600}
    (tmp_path / "file").touch()
    with pytest.raises(PararnnError, match="folder for states cannot be made"):
        SavedPromptCache(tmp_path / "file" / "x", 1, 1)


@pytest.mark.large
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_server_goes_on_where_another_stopped(tmp_path, folder, number):
    def ask(server, prompt):
        client = client_of(server)
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=8)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    story = "def f(self):\n    return 1\n\n" * 20
    with running(folder, "--prompt-cache-dir", tmp_path / "states") as server:
        text, cached = ask(server, story)
        assert cached == 0
        if number == signal.SIGKILL:  # what is idle saves at once
            while not list((tmp_path / "states").glob("[!.]*")):
                ask(server, "x")
        server.stop(number)
    with running(folder, "--prompt-cache-dir", tmp_path / "states") as server:
        assert ask(server, story) == (text, len(story) - 1)
        assert ask(server, story[:400] + "#")[1] == 384
        assert ask(server, story + text + "\n")[1] >= len(story) + 7
