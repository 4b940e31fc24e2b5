"""Whole models in the loop: the tokens are those of the model, and what cannot be answered is refused."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_pararnn
from mlx_pararnn import Functions, PararnnError, answer, load, stream_answer
from mlx_pararnn.pocket.answers import ModelTokens
from mlx_pararnn.pocket.events import Call, CommandGiven, Finish, Text, Thought
from mlx_pararnn.pocket.loop import Limits
from tests.support.demo import DEMO
from tests.support.scripted import Script, tools_folder, tools_protocol


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load(tools_folder(tmp_path_factory.mktemp("model")))


class Recorder(ModelTokens):
    """Notes what is read, and what might have been chosen."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.taken, self.choices = [], []

    def read(self, tokens):
        super().read(tokens)
        self.taken += tokens

    def choose(self, allowed):
        token = super().choose(allowed)
        self.choices.append((len(self.taken) - 1, allowed, token))
        return token


def test_every_token_is_the_likeliest_of_those_allowed(pair, monkeypatch):
    """Judged by one pass over the whole turn, as training and evaluation see it."""
    model, tokenizer = pair
    recorders = []

    def recorder(*args):
        recorders.append(Recorder(*args))
        return recorders[-1]

    monkeypatch.setattr("mlx_pararnn.pocket.answers.ModelTokens", recorder)
    events = list(stream_answer(model, tokenizer, "12 + 34 é" * 60, limits=Limits(steps=300)))
    assert isinstance(events[-1], Finish)
    (recorder,) = recorders
    logits = np.array(model(mx.array([recorder.taken]))[0])
    assert len(recorder.choices) == events[-1].made > 50
    for position, allowed, token in recorder.choices:
        row = np.where(allowed, logits[position], -np.inf)
        assert row.max() - row[token] < 1e-3
    protocol = tools_protocol()
    assert recorder.taken[: len(protocol.render_message("12 + 34 é" * 60))] == protocol.render_message(
        "12 + 34 é" * 60
    )
    made = [token for _, _, token in recorder.choices]
    learned = protocol.loss_mask(recorder.taken)
    assert [token for token, own in zip(recorder.taken, learned, strict=True) if own] == made[: sum(learned)]


def test_sampling_keeps_to_the_protocol_and_to_its_seed(pair):
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = pair
    runs = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        events = list(
            stream_answer(
                model, tokenizer, "hi", sampler=make_sampler(3.0), limits=Limits(steps=200, answer=50)
            )
        )
        runs.append(
            [
                type(event)(**{**vars(event), "seconds": 0}) if isinstance(event, Finish) else event
                for event in events
            ]
        )
    assert runs[0] == runs[1] != runs[2]
    assert {type(event) for event in runs[2]} & {Thought, CommandGiven, Call, Text}


@pytest.fixture
def says(monkeypatch):
    """Lets a script stand in for the model."""

    def say(script):
        def source(model, *given):
            made = Script(script)
            made.cache = model.make_cache()
            return made

        monkeypatch.setattr("mlx_pararnn.pocket.answers.ModelTokens", source)

    return say


def test_answer_is_the_text_of_the_events(pair, says):
    says("<|answer|>It is é.<|end|>")
    assert answer(*pair, "x", functions=Functions()) == "It is é."


@pytest.mark.parametrize(
    ("script", "limits"),
    [("<|answer|>It", Limits(answer=50)), ("<|right1|>a", Limits(steps=50)), ("a", Limits(seconds=-1))],
)
def test_an_answer_that_is_not_whole_is_none(pair, says, script, limits):
    says(script)
    with pytest.raises(PararnnError, match="the answer is not whole"):
        answer(*pair, "x", limits=limits, functions=[])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", "the message is empty"),
        ("\udcff", "not UTF-8"),
        (5, "must be a text .str., and this is of type int"),
        (b"1 + 2", "of type bytes"),
        (None, "of type NoneType"),
    ],
)
def test_messages_that_are_none_are_refused(pair, message, said):
    with pytest.raises(PararnnError, match=said):
        answer(*pair, message)


def test_another_model_is_refused_and_told_what_to_use():
    model, tokenizer = load(DEMO)
    with pytest.raises(PararnnError, match="lacks the tokens for them"):
        answer(model, tokenizer, "x")


def test_learned_positions_end_the_turn(tmp_path):
    model, tokenizer = load(tools_folder(tmp_path, max_position_embeddings=40))
    events = list(stream_answer(model, tokenizer, "x"))
    assert events[-1].reason == "steps"
    assert events[-1].tokens <= 40
    with pytest.raises(PararnnError, match="no room to generate"):
        answer(model, tokenizer, "x" * 50)


def test_the_names_are_the_packages():
    assert {"answer", "stream_answer", "Functions"} <= set(dir(mlx_pararnn))
