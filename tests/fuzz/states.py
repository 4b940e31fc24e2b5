"""Targets of what a conversation or the server leaves in files and reads again."""

import hashlib
from pathlib import Path

import mlx.core as mx

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.chat.model_fingerprint import fingerprint
from mlx_pararnn.chat.saved_prompts import SavedPromptCache
from mlx_pararnn.chat.session import Chat
from tests.fuzz.inputs import JSON_WORDS, header_in, small_model
from tests.fuzz.target import Target


def state(folder: Path) -> Target:
    """Saved conversations."""
    chat = Chat(*mlx_pararnn.load(small_model(folder / "model")))
    seeds = []
    for text in ("", "ab", "c"):
        if text:
            list(chat.respond(text, max_tokens=2))
        seeds.append(chat.save(folder / "x").read_bytes())
    before = chat.tokens, chat.messages

    def run(data: bytes) -> None:
        (folder / "x.safetensors").write_bytes(data)
        try:
            chat.branch().load(folder / "x")
        except PararnnError:
            assert (chat.tokens, chat.messages) == before

    return Target(run, seeds, JSON_WORDS, inside=header_in)


def saved_prompts(folder: Path) -> Target:
    """States that the server keeps in a folder; each file has the name that is right for its contents."""
    model = mlx_pararnn.load(small_model(folder / "model"))[0]
    model.snapshot_spacing = 64
    states = folder / "states"
    prompts = SavedPromptCache(states, 10, 1 << 30)
    prompts.open(model)
    tokens = [1, 2, 3] * 50
    seeds = []
    for length in (3, 70, 150):  # without a snapshot, with one, with two
        read = model.make_cache()
        model(mx.array([tokens[:length]]), cache=read)
        prompts.insert_cache("", tokens[:length], read)
        assert prompts.save_some()
        (file,) = states.iterdir()
        seeds.append(file.read_bytes())
        prompts.trim_to(n_sequences=0)
    mine = fingerprint(model)

    def run(data: bytes) -> None:
        file = states / f"{mine}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        file.write_bytes(data)
        try:
            prompts.open(model)
            assert file.exists() == (len(prompts) == 1)
            if len(prompts):  # what is taken for a state can be gone on from
                found, rest = prompts.fetch_nearest_cache("", [*tokens, 4])
                assert mx.isfinite(model(mx.array([rest]), cache=found)).all()
        finally:
            prompts.trim_to(n_sequences=0)
        assert not file.exists()

    return Target(run, seeds, JSON_WORDS, inside=header_in, deletes=True)
