"""An export takes a chat template apart into texts that give what it renders, and Swift is held to them.

`python -m tests.convert.test_chat_format` writes tests/data/tools/chat_formats.json again.
"""

import json
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_pararnn.convert.package.chat_format import add_chat_format, chat_format, end_of_answer, written
from mlx_pararnn.generation import render
from mlx_pararnn.pocket.protocol import tokenizer_files

RECORD = Path(__file__).parents[1] / "data/tools/chat_formats.json"


def one_line(text):
    return "".join(line.strip() for line in text.splitlines())


# The forms of templates in use: where special tokens stand, who is trimmed, where a system prompt goes.
TEMPLATES = {
    "llama3": one_line(
        r"""
        {% for m in messages %}
        {% set said = '<|head|>' + m['role'] + '<|text|>\n\n' + m['content'] | trim + '<|end|>' %}
        {% if loop.index0 == 0 %}{% set said = bos_token + said %}{% endif %}{{ said }}{% endfor %}
        {% if add_generation_prompt %}{{ '<|head|>assistant<|text|>\n\n' }}{% endif %}
        """
    ),
    "gemma": one_line(
        r"""
        {{ bos_token }}{% if messages[0]['role'] == 'system' %}
        {{ raise_exception('no system prompts') }}{% endif %}{% for m in messages %}
        {{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
        {{ m['content'] | trim + '<|end|>\n' }}
        {% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}
        """
    ),
    "mistral": one_line(
        r"""
        {% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
        {% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}
        {% if m['role'] == 'user' %}
        {{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') }}
        {{ m['content'] + '[/INST]' }}
        {% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}
        """
    ),
    "zephyr": one_line(
        r"""
        {% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}
        {% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}
        """
    ),
    "phi": one_line(
        r"""
        {% for m in messages %}{% if m['role'] == 'user' %}
        {{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}{% elif m['role'] == 'system' %}
        {{ '<|system|>\n' + m['content'] + '<|end|>\n' }}{% else %}{{ m['content'] + '<|end|>\n' }}
        {% endif %}{% endfor %}
        """
    ),
    "system first": one_line(
        r"""
        {% if messages[0]['role'] == 'system' %}
        {% set system = messages[0]['content'] | trim + '\n\n' %}{% set messages = messages[1:] %}
        {% else %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in messages %}
        {% if m['role'] == 'user' %}
        {{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}{% else %}
        {{ m['content'] + eos_token }}{% endif %}{% endfor %}
        """
    ),
    "a system prompt of its own": one_line(
        r"""
        {% if messages[0]['role'] != 'system' %}{{ '<|s|>system\nBe kind.<|end|>\n' }}{% endif %}
        {% for m in messages %}{{ '<|s|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}
        {% if add_generation_prompt %}{{ '<|s|>assistant\n' }}{% endif %}
        """
    ),
}
WITHOUT_SYSTEM = {"gemma", "mistral"}
# Those that no fixed texts are.
OTHERS = {
    "numbered": "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}",
    "the last alone": "{{ 'Q: ' + messages[-1]['content'] + ' A: ' }}",
    "lower case": "{% for m in messages %}{{ m['role'] + ': ' + m['content'].lower() + ' ' }}{% endfor %}",
    "one side trimmed": "{% for m in messages %}{{ m['role'] + ':' + m['content'].lstrip() }}{% endfor %}",
    "fails": "{{ raise_exception('no') }}",
    "the day": TEMPLATES["phi"] + "{% if false %}{{ strftime_now('%d') }}{% endif %}",
    "nothing between": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "thoughts": TEMPLATES["zephyr"].replace(r"assistant|>\n' }}", r"assistant|>\n<think>\n' }}"),
}
SAID = ["Hi, <b>you</b>", "ünïcode", "{{ 1 }}", " a\nb \n", "user", "model", "\t<|e|>"]


def tokenizer(template):
    return TokenizerWrapper(
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_files()["tokenizer.json"]),
            bos_token="<|edge|>",
            eos_token="<|end|>",
            chat_template=template,
        )
    )


def conversations(takes_system):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(SAID)]
    systems = [[], [{"role": "system", "content": " Be brief.\n"}]] if takes_system else [[]]
    return [system + turns[:count] for system in systems for count in range(1, len(turns) + 1, 2)]


def record():
    cases = []
    for name, template in TEMPLATES.items():
        reads = tokenizer(template)
        found = chat_format(reads)
        held = [
            {
                "messages": [{"role": m["role"], "text": m["content"]} for m in messages],
                "text": render(reads, messages, tokenize=False),
            }
            for messages in conversations(found["before_system"] is not None)
        ]
        cases.append({"name": name, "chat_format": found, "conversations": held})
    return cases


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_texts_give_what_the_template_renders(name):
    reads = tokenizer(TEMPLATES[name])
    found = chat_format(reads)
    assert (found["before_system"] is None) == (found["after_system"] is None) == (name in WITHOUT_SYSTEM)
    for messages in conversations(name not in WITHOUT_SYSTEM):
        assert written(found, messages) == render(reads, messages, tokenize=False)
    assert end_of_answer(reads, found) == 257  # <|end|>


@pytest.mark.parametrize("name", OTHERS)
def test_templates_that_are_not_fixed_texts(name):
    assert chat_format(tokenizer(OTHERS[name])) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [("the day", "writes the date"), ("numbered", "is not made of fixed texts around messages")],
)
def test_an_export_says_what_it_does_not_take(name, said, tmp_path, caplog):
    for file, text in (tokenizer_files() | {"chat_template.jinja": OTHERS[name]}).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    settings = {"vocab_size": 300, "eos_token_id": []}
    add_chat_format(settings, tmp_path, {})
    assert settings == {"vocab_size": 300, "eos_token_id": [], "chat_format": None}
    (message,) = caplog.messages
    assert message.startswith(f"the chat template {said}: an app must say how chats are written")


def test_no_template_and_an_answer_that_plain_text_ends():
    assert chat_format(tokenizer(None)) is None
    lines = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    )
    found = chat_format(tokenizer(lines))
    assert (found["after_user"], found["after_answer"]) == ("\nassistant: ", "\nuser: ")
    assert end_of_answer(tokenizer(lines), found) is None


def test_what_swift_is_held_to_is_what_templates_render():
    assert json.loads(RECORD.read_text(encoding="utf-8")) == record()


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), ensure_ascii=False) + "\n", encoding="utf-8")
