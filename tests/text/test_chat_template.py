"""Chat templates: rendered as transformers does it, and none takes the machine."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import jinja2
import markupsafe
import pytest

import mlx_pararnn
from mlx_pararnn import PararnnError
from mlx_pararnn.mlx_lm_internals import plain_tokenizer
from mlx_pararnn.text import chat_template
from tests.support.demo import DEMO

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".\n'},
    {"role": "user", "content": "Größe? \U0001f600"},
    {"role": "assistant", "content": None, "reasoning": "why", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "json": "{{ bos_token }}{{ messages | tojson(indent=2) }}{{ tools | tojson }}{{ documents }}{{ lang }}",
    "blocks": "  {% for m in messages %}\n    {% if loop.index == 2 %}\n{% continue %}{% endif %}\n"
    "{% if loop.last %}{% break %}{% endif %}\n {{- loop.index0 ~ m.role | upper }}\n  {% endfor %}\n",
    "generation": "a{% generation %}{% set x = 1 %} {{ messages[1].content }}{% endgeneration %}\n{{ x }}b",
    "namespace": "{% set n = namespace(self=1, last='') %}{% for m in messages %}{% set n.last = m.role %}"
    "{% endfor %}{{ n.last }}{{ dict(a=1).items() | list }}{{ dict.fromkeys('ab') }}",
    "macros": "{% macro say(m, end='.') %}{{ caller() if caller else m }}{{ end }}{% endmacro %}"
    "{{ say('x') }}"
    "{% call say('x') %}y{% endcall %}{{ messages[2].reasoning_content }}{{ strftime_now('%Y') }}",
    "failing": "{{ raise_exception('only users may speak') }}",
    "wrong": "{% for %}",
    "undefined": "{{ messages[0].nothing.more }}",
    "unsafe": "{{ messages.append(1) }}",
}  # fmt: skip
FAILING = {
    "failing": "only users",
    "wrong": r"\S",
    "undefined": r"\S",
    "unsafe": "unsafe",
}
BOMBS = {
    "product": '{{ "a" * 10**10 }}',
    "number": "{{ 10 ** (10 ** 10) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for _ in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "nested": "{% set n = namespace(x=[1]) %}{% for _ in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "compared": "{% set n = namespace(x=[1], y=[1]) %}{% for _ in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format method": "{{ '{:10000000000}'.format(1) }}",
    "center": "{{ 'x' | center(10000000000) }}",
    "indent": "{{ ('x\n' * 1000) | indent(100000000) }}",
    "replace": "{{ ('x' * 100000) | replace('x', 'y' * 1000000) }}",
    "join": "{{ range(99999) | join('y' * 10000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "json": "{{ [1] | tojson(indent=10000000000) }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "text": "{% for _ in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
}  # fmt: skip


def with_template(folder, text):
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(text)
    return mlx_pararnn.load(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("template") / "model", "x")[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, tokenizer):
    options = {
        "tools": [{"type": "function", "function": {"name": "f", "description": "ü"}}],
        "lang": "de",
        "chat_template": TEMPLATES[name],
        "add_generation_prompt": True,
    }
    plain = plain_tokenizer(tokenizer)
    if name in FAILING:
        with pytest.raises(Exception, match=FAILING[name]) as expected:
            plain.apply_chat_template(MESSAGES, tokenize=False, **options)
        with pytest.raises(jinja2.TemplateError) as raised:
            tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert str(raised.value) == str(expected.value)
        return
    expected = plain.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options) == expected
    ids = plain.apply_chat_template(MESSAGES, return_dict=False, **options)
    assert tokenizer.apply_chat_template(MESSAGES, **options) == ids


def test_pythons_own_names_are_refused(tokenizer):
    """transformers 5.7 renders it, later ones do not."""
    template = "{% set n = namespace(__class__=1) %}"
    with pytest.raises(jinja2.TemplateError, match="__class__"):
        tokenizer.apply_chat_template(MESSAGES, tokenize=False, chat_template=template)


def test_options_of_transformers_that_change_more_than_the_text(tokenizer):
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once "}]
    template = TEMPLATES["chatml"]
    text = tokenizer.apply_chat_template(
        said, chat_template=template, continue_final_message=True, tokenize=False
    )
    assert text.endswith("assistant\nOnce ")


@pytest.mark.sampled("large", by=lambda: ["product"])
@pytest.mark.parametrize("name", BOMBS)
def test_none_takes_the_machine(name, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    message = [{"role": "user", "content": "x"}]
    with pytest.raises((PararnnError, jinja2.TemplateError)) as error:
        tokenizer.apply_chat_template(message, chat_template=BOMBS[name])
    if not isinstance(error.value, jinja2.TemplateError):
        assert "the chat template" in str(error.value)
    assert tokenizer.apply_chat_template(message, chat_template="x", tokenize=False) == "x"


def test_an_endless_one_is_ended_by_what_it_uses(tokenizer, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    monkeypatch.setattr(chat_template, "_idle", [])  # their limit is another
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(PararnnError, match="takes more than 1 seconds of a processor"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=loop)


@pytest.mark.parametrize(
    ("template", "role"),
    [("{{ messages[0]['role'] }}", "\ud800"), (r"{{ '\ud800' }}", "user")],
    ids=["from a message", "from the template"],
)
def test_a_text_that_is_not_utf_8_is_refused(template, role, tokenizer):
    with pytest.raises(PararnnError, match="is not UTF-8"):
        tokenizer.apply_chat_template([{"role": role, "content": "x"}], chat_template=template)


LEFT = """
import json, os, subprocess, sys
from multiprocessing import Pipe
ours, theirs = Pipe()
command = [sys.executable, "-I", "-S", sys.argv[1], str(theirs.fileno()), str(1 << 30), "600", *sys.argv[2:]]
process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True, stdout=sys.stderr)
ours.recv_bytes()
loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ours.send_bytes(json.dumps({"template": loop, "names": {}, "longest": 9}).encode())
print(process.pid, flush=True)
os._exit(0)
"""


@pytest.mark.large
def test_an_endless_template_does_not_outlive_whom_it_is_rendered_for():
    folders = {str(Path(module.__file__).parents[1]) for module in (jinja2, markupsafe)}
    script = Path(chat_template.__file__).with_name("template_process.py")
    command = [sys.executable, "-c", LEFT, script, *folders]
    pid = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    deadline = time.monotonic() + 60
    while (state := _state(pid)) and not state.startswith("Z"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _state(pid):
    command = ["ps", "-o", "stat=", "-p", pid]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
