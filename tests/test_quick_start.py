"""MLX-LM without transformers: the same tokens, and only for tokenizers of which that is known."""

import json
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlx_pararnn.files.hub import BUNDLED
from mlx_pararnn.files.model_files import has_plain_tokenizer, plain_tokenizer_parts
from mlx_pararnn.loading import load_tokenizer
from mlx_pararnn.mlx_lm_internals import plain_tokenizer
from mlx_pararnn.text.chat_template import ChatTemplate
from mlx_pararnn.text.detokenizer import Detokenizer
from mlx_pararnn.text.plain_tokenizer import PlainTokenizer
from mlx_pararnn.training.tokenizers import write_tokenizer
from tests.support.demo import DEMO

# Runs a command; the exit code is 99 if it imports what it should do without.
WATCHED = """
import os, sys
def hook(event, arguments):
    if event == "import" and arguments[0] in ("transformers", "huggingface_hub"):
        os._exit(99)
sys.addaudithook(hook)
from mlx_pararnn.__main__ import main
main()
"""
# The same, where MLX-LM asks transformers for something else.
ANOTHER_NAME = """
import sys
def hook(event, arguments):
    if event == "import" and arguments[0] == "mlx_lm.utils":
        from transformers import PreTrainedConfig
        assert PreTrainedConfig.__module__.startswith("transformers.")
sys.addaudithook(hook)
from mlx_pararnn.__main__ import main
main()
"""
AFTERWARDS = """
import sys
from mlx_pararnn.quick_start import start_quickly, started_quickly
start_quickly()
assert started_quickly()
assert not {"transformers", "huggingface_hub"} & sys.modules.keys()
import mlx_lm.generate, mlx_lm.tokenizer_utils, mlx_lm.utils
assert all(hasattr(mlx_lm, name) for name in mlx_lm.__all__)
import huggingface_hub, transformers
assert callable(transformers.AutoTokenizer.from_pretrained) and transformers.__file__
assert huggingface_hub.snapshot_download.__module__.startswith("huggingface_hub")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tokenizer of each kind that this package writes."""
    trained = tmp_path_factory.mktemp("trained")
    write_tokenizer("bpe:400", ["the quick brown fox, the lazy dog\n" * 9, "straße 東京 😀"], trained)
    others = {name: trained / name for name in ("saved", "neox", "padded")}
    AutoTokenizer.from_pretrained(trained).save_pretrained(others["saved"])
    as_neox(trained, others["neox"])
    as_neox(trained, others["padded"])
    config = json.loads((others["neox"] / "tokenizer_config.json").read_text())
    del config["pad_token"]  # the class has its own
    (others["padded"] / "tokenizer_config.json").write_text(json.dumps(config))
    return {"bytes": DEMO, "pocket": BUNDLED, "trained": trained, **others}


def as_neox(trained, folder):
    """A tokenizer with the parts and the configuration that EleutherAI/gpt-neox-20b has."""
    folder.mkdir()
    tokenizer = json.loads((trained / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    special = flags | {"normalized": False, "special": True}
    tokenizer |= {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "added_tokens": [
            {"id": vocabulary["<|endoftext|>"], "content": "<|endoftext|>", **special},
            {"id": len(vocabulary), "content": "<|padding|>", **special},
            {"id": len(vocabulary) + 1, "content": "   ", **flags, "normalized": True, "special": False},
        ],
    }
    config = {
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), False),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "pad_token": None,
        "clean_up_tokenization_spaces": True,
        "trim_offsets": True,
        "tokenizer_class": "GPTNeoXTokenizer",
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in tokenizer["added_tokens"]
        },
    }
    uses = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(uses))


def both(folder):
    return load_tokenizer(folder, {}), PlainTokenizer(folder, *plain_tokenizer_parts(folder))


@pytest.mark.parametrize("kind", ["bytes", "pocket", "trained", "saved", "neox", "padded"])
@settings(max_examples=60, deadline=None)
@given(
    text=st.text()
    | st.sampled_from(
        ["<|end|>a", "x<|endoftext|> y", " a  b , .", "<|user|>", "e\u0301    x", "<|padding|>"]
    ),
    data=st.data(),
)
def test_a_plain_tokenizer_answers_as_transformers_does(kind, text, data, folders):
    assert has_plain_tokenizer(folders[kind])
    theirs, ours = both(folders[kind])
    assert len(ours) == len(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    for special in (True, False):
        assert ours.encode(text, add_special_tokens=special) == theirs.encode(
            text, add_special_tokens=special
        )
        with mock.patch("mlx_pararnn.text.pieces.PIECE", 3):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(
                text, add_special_tokens=special
            )
    ids = data.draw(st.lists(st.integers(0, len(ours) - 1), max_size=20))
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    texts = []
    for tokenizer in (ours, theirs):
        detokenizer = Detokenizer(tokenizer)
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        texts.append(detokenizer.text)
    assert texts[0] == texts[1]


def added(**flags):
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False), **flags}
    return {"added_tokens": [{"id": 256, "content": "ab", **flags}]}


def of_bytes(**changes):
    return lambda tokenizer: {"model": {**tokenizer["model"], **changes}}


@pytest.mark.parametrize(
    "change",
    [
        {},
        added(),
        added(lstrip=True),
        added(rstrip=True),
        added(single_word=True),
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"post_processor": {"type": "BertProcessing", "sep": ["a", 64], "cls": ["b", 65]}},
        of_bytes(end_of_word_suffix="Ġ"),
        lambda tokenizer: of_bytes(vocab={**tokenizer["model"]["vocab"], "ab": 256}, merges=["a b"])(
            tokenizer
        ),
    ],
)
def test_a_long_text_has_the_tokens_that_it_has_in_one_piece(change, folders, tmp_path):
    tokenizer = json.loads((folders["bytes"] / "tokenizer.json").read_text())
    tokenizer |= change(tokenizer) if callable(change) else change
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours = PlainTokenizer(tmp_path, {})
    for text in ("aab  ab ba abab e\u0301 \U0001f600\n" * 9, "ab" * 30, " " * 30):
        with mock.patch("mlx_pararnn.text.pieces.PIECE", 2):
            assert ours.encode(text) == ours.backend_tokenizer.encode(text).ids


def changed(file, **fields):
    def change(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **fields}))

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
        changed("tokenizer_config.json", tokenizer_class=None),
        changed("tokenizer_config.json", clean_up_tokenization_spaces=True),
        changed("tokenizer_config.json", add_bos_token=True),
        changed("tokenizer_config.json", chat_template=[{"name": "default", "template": "a"}]),
        changed("tokenizer_config.json", added_tokens_decoder={"3": {"content": "a", "special": True}}),
        changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
        changed("tokenizer_config.json", eos_token="a"),
        changed("tokenizer_config.json", eos_token={"content": "<|end|>"}),
        changed("tokenizer_config.json", bos_token=["<|end|>"]),
        changed("tokenizer.json", truncation={"max_length": 4}),
        changed("tokenizer.json", padding={"strategy": "BatchLongest"}),
        changed("tokenizer.json", added_tokens=7),
        lambda folder: (folder / "chat_template.jinja").write_text("{#" + "-" * 2**20 + "#}"),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: (folder / "special_tokens_map.json").write_text('{"eos_token": "a"}'),
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
        lambda folder: (folder / "additional_chat_templates").mkdir(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    ],
)
def test_what_says_more_is_left_to_transformers(change, tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "model")
    assert has_plain_tokenizer(tmp_path / "model")
    change(tmp_path / "model")
    assert not has_plain_tokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    "change",
    [
        changed("tokenizer_config.json", add_bos_token=True),
        changed("tokenizer_config.json", add_prefix_space=True),
        changed("tokenizer_config.json", errors="strict"),
        changed("tokenizer_config.json", bos_token={"content": "<|endoftext|>"}),
        changed("tokenizer_config.json", pad_token="none such"),
        changed("tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        changed("tokenizer_config.json", backend="sentencepiece"),
        changed("tokenizer.json", normalizer=None),
        changed("tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
        changed("tokenizer.json", pre_tokenizer={"type": "ByteLevel", "use_regex": False}),
        changed("tokenizer.json", pre_tokenizer=None),
        changed("tokenizer.json", decoder={"type": "Metaspace"}),
        changed("tokenizer.json", post_processor={"type": "TemplateProcessing", "special_tokens": {"a": 1}}),
        changed("tokenizer.json", model={"type": "Unigram"}),
        changed("tokenizer.json", model={"type": "BPE", "ignore_merges": True}),
        changed("tokenizer.json", added_tokens=[]),
        changed("special_tokens_map.json", pad_token="<|endoftext|>"),
    ],
)
def test_what_another_class_would_make_otherwise_is_left_to_transformers(change, folders, tmp_path):
    folder = shutil.copytree(folders["neox"], tmp_path / "model")
    change(folder)
    assert not has_plain_tokenizer(folder)


def run(script, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.large
def test_who_imports_them_later_gets_them_whole():
    done = run(AFTERWARDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.large
@pytest.mark.sampled("large", by=lambda: [0])
@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["generate", "-p", "how many miles are in 26 km?"], ""),
        (["generate", DEMO, "-p", "import", "-m", "9"], ""),
        (["generate", DEMO, "-p", "import", "--json-schema", '{"enum": [12345]}'], ""),
        (["generate", DEMO, "--tokens", "1 2 3", "-m", "9"], ""),
        (["chat", DEMO, "-m", "9"], "import\n/undo\nimport\n"),
        (["chat"], "12 + 34\n/stats\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_needs_neither_imports_neither(arguments, typed):
    quick = run(WATCHED, *arguments, input=typed)
    assert quick.returncode == 0, quick.stderr
    usual = run(WATCHED.replace("os._exit(99)", "pass"), *arguments, "--import", "mlx_lm", input=typed)
    assert usual.returncode == 0, usual.stderr
    assert quick.stdout == usual.stdout != ""


FIRST_TOKEN = """
import sys
from mlx_pararnn.quick_start import start_quickly
start_quickly()
from mlx_pararnn import load
from mlx_pararnn.pocket.answers import stream_answer
next(iter(stream_answer(*load(), "what is 12 + 34?")))
print(sorted({"pydantic", "rich", "jinja2", "uvicorn", "yaml"} & sys.modules.keys()))
"""


@pytest.mark.large
def test_the_first_token_waits_for_nothing_that_it_does_not_need():
    done = run(FIRST_TOKEN)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.large
def test_another_name_brings_the_real_package():
    done = run(ANOTHER_NAME, "generate", DEMO, "-p", "import", "-m", "9")
    usual = run(WATCHED.replace("os._exit(99)", "pass"), "generate", DEMO, "-p", "import", "-m", "9")
    assert (done.returncode, done.stdout) == (0, usual.stdout), done.stderr


def with_template(folder, to, **more):
    """A model folder as others write them: tokens told three times, and a template that uses them."""
    shutil.copytree(folder, to)
    tokenizer = json.loads((to / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        {
            "id": 300 + i,
            "content": text,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for i, text in enumerate(("<|bos|>", "<|eos|>"))
    ]
    (to / "tokenizer.json").write_text(json.dumps(tokenizer))
    decoder = {str(token.pop("id")): token for token in tokenizer["added_tokens"]}
    config = json.loads((to / "tokenizer_config.json").read_text())
    tokens = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    config |= tokens | {"added_tokens_decoder": decoder, "chat_template": "not this one"} | more
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    as_objects = {name: {"content": text, "lstrip": False} for name, text in tokens.items()}
    (to / "special_tokens_map.json").write_text(json.dumps(as_objects))
    (to / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}\n{{ m.role[0] }}: {{ m['content'] | trim }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}\na: {% endif %}{{ tools }}{{ enable_thinking }}"
    )
    return to


def test_a_template_is_rendered_as_by_transformers(tmp_path):
    folder = with_template(DEMO, tmp_path / "model")
    assert has_plain_tokenizer(folder)
    theirs, ours = both(folder)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert len(ours) == len(theirs)
    told = [{"role": "system", "content": " Be <|eos|> brief."}, {"role": "user", "content": "ä?\n"}]
    plain = ChatTemplate(ours)
    for more in ({}, {"enable_thinking": False}, {"tools": [{"name": "f"}]}, {"documents": [], "other": 1}):
        for messages in (told, [{**told[0], "name": None}], [{"role": "user", "content": [{"text": "x"}]}]):
            wanted = plain_tokenizer(theirs).apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **more
            )
            assert plain(messages, add_generation_prompt=True, **more) == wanted
    text = plain(told, continue_final_message=True)
    assert text == plain_tokenizer(theirs).apply_chat_template(
        told, tokenize=False, continue_final_message=True
    )
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.large
@pytest.mark.parametrize("arguments", [["generate", "-p", "import", "-m", "9"], ["chat", "-m", "9"]])
def test_a_model_with_a_template_needs_neither(arguments, tmp_path):
    """Nor to go on with a conversation, for which the template is rendered again."""
    command, *rest = arguments
    model = with_template(DEMO, tmp_path / "model", chat_template=None)
    (model / "chat_template.jinja").write_text(  # without the tokens that the model has not
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    quick = run(WATCHED, command, model, *rest, input="import\n/undo\nimport\nand\n")
    assert quick.returncode == 0, quick.stderr
    slow = [command, model, *rest, "--import", "mlx_lm"]
    usual = run(WATCHED.replace("os._exit(99)", "pass"), *slow, input="import\n/undo\nimport\nand\n")
    assert usual.returncode == 0, usual.stderr
    assert quick.stdout == usual.stdout != ""


def test_a_tokenizer_of_another_class_is_read_by_transformers(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    changed("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")(tmp_path / "model")
    done = run(WATCHED, "generate", tmp_path / "model", "-p", "import", "-m", "9")
    assert done.returncode == 99
