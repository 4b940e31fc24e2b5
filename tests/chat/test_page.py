"""The chat page in a real browser against the running server."""

import json
import os
import re
from importlib.resources import files

import pytest

from mlx_pararnn.cli.options import stop_strings
from tests.support.browser import ANSWER, IDLE, Browser, find_chromium, set_field
from tests.support.demo import DEMO
from tests.support.serving import TEMPLATE, demo_in_float32, running

pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium or Chrome here"),
]

CONVERSATION = "conversation.map((m) => m.content)"
TEXTS = "[...document.querySelectorAll('.message > .text')].map((e) => e.textContent)"
FOCUS = "document.activeElement.id"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = demo_in_float32(tmp_path_factory.mktemp("page") / "my-model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running(folder) as server:
        yield server


@pytest.fixture
def page(server):
    with Browser() as browser:
        browser.send("Page.navigate", url=server.url)
        browser.wait_for(IDLE)
        yield browser
        assert not browser.errors
        assert all(url.startswith((server.url, "data:")) for url, _ in browser.requests)


def status(page):
    return page.run("document.getElementById('status').textContent")


def ask(page, text):
    page.type(text)
    page.press("Enter")
    page.wait_for(f"{CONVERSATION}.length > 1 && {IDLE}")
    return page.run(ANSWER)


def test_a_conversation_by_keyboard(page):
    assert page.run(FOCUS) == "input"
    set_field(page, "max_tokens", "40")
    first = ask(page, "import os")
    assert len(first) == 40
    said = status(page)
    assert "40 tokens · " in said
    assert "tokens a second · read 16 of 16 prompt tokens · memory of the conversation 6.1 KB" in said
    second = ask(page, "def main(")
    assert page.run(CONVERSATION) == ["import os", first, "def main(", second]
    asked = 16 + 41 + 16
    assert f"read {asked - 16 - 40} of {asked} prompt tokens" in status(page)

    page.press("KeyR", alt=True)
    page.wait_for("document.getElementById('send').disabled")
    page.wait_for(IDLE)
    assert page.run(CONVERSATION) == ["import os", first, "def main(", second]
    assert f"read 1 of {asked} prompt tokens" in status(page)

    page.press("KeyZ", alt=True)
    assert page.run(CONVERSATION) == ["import os", first]
    assert page.run("document.getElementById('input').value") == "def main("
    assert page.run(FOCUS) == "input"
    page.press("Enter")
    page.wait_for(f"{CONVERSATION}.length === 4 && {IDLE}")
    assert page.run(ANSWER) == second


def test_streaming_and_stop(page):
    set_field(page, "max_tokens", "4000")
    set_field(page, "temperature", "1")
    page.type("x")
    page.press("Enter")
    length = 0
    for _ in range(5):  # it grows while it is made
        length = page.wait_for(f"({ANSWER} ?? '').length > {length} && {ANSWER}.length")
        assert not page.run(IDLE)
    assert "tokens a second" in status(page)
    assert page.run("document.getElementById('halt').disabled") is False
    page.press("Escape")
    page.wait_for(IDLE)
    stopped = page.run(ANSWER)
    assert 0 < len(stopped) < 4000
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert page.run(ANSWER) == stopped
    set_field(page, "max_tokens", "3")
    page.run("document.getElementById('again').click()")
    page.wait_for(IDLE)
    assert len(page.run(ANSWER)) <= 3


def test_system_prompt_and_settings_are_sent(page):
    page.run("document.getElementById('toggle').focus()")
    page.press("Enter")
    assert page.run("document.getElementById('toggle').getAttribute('aria-expanded')") == "true"
    page.press("Tab")
    assert page.run(FOCUS) == "system"
    page.type("Be brief.")
    values = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "seed": 3,
    }
    for name, value in values.items():
        set_field(page, name, str(value))
    set_field(page, "max_tokens", "5")
    set_field(page, "stop", r"\n\t\\n\x")
    page.run("document.getElementById('input').focus()")
    ask(page, "hi")
    bodies = [json.loads(body) for url, body in page.requests if body]
    assert bodies[-1] == {
        **values,
        "max_tokens": 5,
        "stop": stop_strings([r"\n\t\\n\x"])[0],  # as the command line reads it
        "model": "my-model",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    }
    set_field(page, "top_p", "7")
    page.run("document.getElementById('again').click()")
    assert "Top p: " in page.wait_for("document.getElementById('error').textContent")
    assert len(page.run(CONVERSATION)) == 2


def test_what_was_not_answered_can_be_sent_again(page):
    """It comes back before what has been typed in the meantime, and no question stays without an answer."""
    set_field(page, "top_p", "7")
    page.run("const typed = document.getElementById('input'); typed.value = 'a'; send(); typed.value = 'b'")
    page.wait_for("document.getElementById('input').value === 'a\\nb'")
    assert page.run(CONVERSATION) == []


def test_text_is_text(page):
    set_field(page, "max_tokens", "1")
    ask(page, "<img src=x onerror=alert(1)><b>")
    assert page.run(TEXTS)[0] == page.run(CONVERSATION)[0] == "<img src=x onerror=alert(1)><b>"
    assert page.run("document.querySelectorAll('#conversation img, #conversation b').length") == 0


def luminance(color):
    values = [int(v) / 255 for v in color.removeprefix("rgb(").removesuffix(")").split(", ")]
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_light_and_dark(page, dark):
    page.show_as(360, 640, dark=dark, phone=True)
    set_field(page, "max_tokens", "300")
    ask(page, "def a_very_long_name_that_does_not_break_anywhere(" + "x" * 100)
    page.run("document.getElementById('toggle').click()")
    for settings in (True, False):
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), settings
        assert page.run("document.getElementById('send').getBoundingClientRect().bottom <= innerHeight")
        page.run("document.getElementById('toggle').click()")
    shown = "[...document.querySelectorAll('button')].filter((b) => b.checkVisibility())"
    heights = page.run(f"{shown}.map((b) => b.offsetHeight)")
    assert min(heights) >= 44
    assert page.run("[...document.querySelectorAll('input, textarea')].every((e) => e.labels.length)")
    # Below 16 pixels a phone zooms in on what is typed.
    assert page.run("parseFloat(getComputedStyle(document.getElementById('input')).fontSize)") >= 16
    style = "getComputedStyle(document.querySelector('{}')).{}"
    back = luminance(page.run(style.format("body", "backgroundColor")))
    assert (back < 0.1) == dark
    for part in ("body", "#status", ".message h2"):
        light, shade = sorted((luminance(page.run(style.format(part, "color"))), back), reverse=True)
        assert (light + 0.05) / (shade + 0.05) >= 4.5, part  # WCAG AA


def test_without_a_template_and_with_a_key():
    """The text goes on as it stands; the browser asks for the key once and sends it with every request."""
    with running(DEMO, "--api-key", "secret") as server, Browser(("any", "secret")) as page:
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        assert "no chat template: it continues what you write" in page.run("document.body.innerText")
        set_field(page, "max_tokens", "5")
        assert ask(page, "def main(") == "self,"
        assert ask(page, " other)") == ":\n   "
        assert "read 7 of 21 prompt tokens" in status(page)
        assert page.run("document.getElementById('messages').className") == "document"
        assert "".join(page.run(TEXTS)) == "def main(self, other):\n   "
        styles = "[...document.querySelectorAll('.message')].map((e) => getComputedStyle(e).display)"
        assert page.run(styles) == ["inline"] * 4
        page.press("Enter")  # nothing typed: it goes on
        page.wait_for(f"{CONVERSATION}.length === 5 && {IDLE}")
        page.run("navigator.clipboard.writeText = async (text) => { globalThis.clip = text; }; 0")
        page.run("document.querySelector('#actions .copy-text').click()")
        assert page.run("clip").startswith("def main(self, other):\n   ")
        page.run("document.getElementById('rewrite').click()")
        assert page.run("document.getElementById('input').value").startswith("def main(self, other):\n   ")
        assert page.run(CONVERSATION) == []


@pytest.mark.parametrize("way", ["Enter", "send"])
def test_the_focus_stays_in_the_field(page, way):
    set_field(page, "max_tokens", "4000")
    page.type("x")
    if way == "Enter":
        page.press("Enter")
    else:
        page.click("send")
    page.wait_for(f"({ANSWER} ?? '').length > 3")
    assert page.run(FOCUS) == "input"
    assert page.run("[document.getElementById('send').hidden, document.getElementById('halt').hidden]") == [
        True,
        False,
    ]
    send = page.run("JSON.stringify(document.getElementById('halt').getBoundingClientRect().x)")
    page.click("halt")
    page.wait_for(IDLE)
    assert page.run(FOCUS) == "input"
    assert page.run("JSON.stringify(document.getElementById('send').getBoundingClientRect().x)") == send


def test_conversations_outlast_the_page(page, server):
    set_field(page, "max_tokens", "5")
    first = ask(page, "import os")
    page.send("Page.reload")
    page.wait_for(f"typeof conversation !== 'undefined' && {IDLE} && {CONVERSATION}.length === 2")
    assert page.run(TEXTS)[0] == "import os"
    set_field(page, "max_tokens", "5")

    page.click("branch")
    page.wait_for("document.getElementById('status').textContent.includes('copy')")
    ask(page, "more")
    page.click("reset")
    assert page.wait_for("document.getElementById('question').open")
    page.click("no")
    assert len(page.run(CONVERSATION)) == 4
    page.click("reset")
    page.click("yes")
    page.wait_for(f"{CONVERSATION}.length === 0")
    assert page.run(FOCUS) == "input"

    page.click("list-toggle")
    titles = "[...document.querySelectorAll('.open')].map((e) => e.textContent.split(' · ')[0])"
    page.wait_for(f"{titles}.length === 2")
    assert page.run(titles) == ["import os (branch)", "import os"]
    page.run("document.querySelectorAll('.open')[1].click()")
    assert page.run(CONVERSATION) == ["import os", first]
    page.click("list-toggle")
    page.wait_for(f"{titles}.length === 2")
    page.run("document.querySelector('[aria-label^=\"Delete import os (branch)\"]').click()")
    page.click("yes")
    page.wait_for(f"{titles}.length === 1")


def test_save_and_load(page):
    set_field(page, "max_tokens", "5")
    page.run("document.getElementById('system').value = 'Be brief.'")
    ask(page, "import os")
    before = page.run(CONVERSATION)
    page.run(
        "globalThis.saved = []; URL.createObjectURL = (blob) => { saved.push(blob); return 'data:,'; };"
        "document.getElementById('save').click()"
    )
    text = page.run("saved[0].text()")
    assert json.loads(text) == {
        "format": "mlx-pararnn-conversation",
        "version": 1,
        "title": "import os",
        "model": "my-model",
        "system": "Be brief.",
        "messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), before, strict=True)],
    }
    page.run("undo()")
    page.run("document.getElementById('system').value = ''")
    page.run(f"load(new File([{json.dumps(text)}], 'a.json'))")
    assert page.run(CONVERSATION) == before
    assert page.run("document.getElementById('system').value") == "Be brief."
    for wrong in ("[1]", "{}", "no", '{"messages": [{"role": "tool", "content": "x"}]}'):
        page.run(f"load(new File([{json.dumps(wrong)}], 'b.json'))")
        said = page.run("document.getElementById('error').textContent")
        assert said == "b.json is not a conversation that this page has saved."
        assert page.run(CONVERSATION) == before


def test_an_earlier_message_is_edited(page):
    set_field(page, "max_tokens", "5")
    ask(page, "one")
    ask(page, "two")
    page.run("document.querySelector('.edit').click()")
    page.run("document.activeElement.value = 'other'")
    page.press("Escape")
    assert page.run(CONVERSATION)[0] == "one"
    page.run("document.querySelector('.edit').click()")
    page.run("document.activeElement.value = 'other'")
    page.press("Enter")
    page.wait_for(f"{CONVERSATION}.length === 2 && {IDLE}")
    assert page.run(TEXTS)[0] == page.run(CONVERSATION)[0] == "other"


MARKDOWN = """# Title

A **strong** word, `code`, [a link](https://example.com) and [a bad one](javascript:alert(1)).

```python
print("<b>")
```

| a | b |
|---|---|
| 1 | 2 |

<img src=x onerror=alert(1)><script>alert(2)</script><form><input></form>
<b onclick=x style="position:fixed">raw</b>
<a href="https://example.com" onclick="alert(3)">x</a> <svg><a xlink:href="javascript:alert(4)"></a></svg>
![picture](https://example.com/x.png)
"""


def test_markdown_is_shown_and_does_nothing(page):
    """The model's text is not trusted: no element that loads, runs, or takes input."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": MARKDOWN}]
    page.run(f"conversation = {json.dumps(messages)}; show()")
    inside = "[...document.querySelectorAll('.markdown *')]"
    names = set(page.run(f"{inside}.map((e) => e.localName)"))
    assert {"h1", "strong", "code", "pre", "a", "table", "th", "td"} <= names
    assert not names & {"img", "script", "form", "input", "svg", "style", "b", "iframe"}
    attributes = set(page.run(f"{inside}.flatMap((e) => e.getAttributeNames())"))
    assert attributes <= {"href", "target", "rel", "tabindex", "role", "aria-label", "type", "class"}
    assert set(page.run(f"{inside}.map((e) => e.getAttribute('href')).filter(Boolean)")) == {
        "https://example.com"
    }
    assert page.run("document.querySelector('.markdown pre').textContent") == 'print("<b>")\n'
    family = page.run("getComputedStyle(document.querySelector('.markdown pre')).fontFamily")
    assert "monospace" in family
    page.run("navigator.clipboard.writeText = async (text) => { globalThis.taken = text; }")
    page.run("document.querySelector('.copy-code').click()")
    assert page.wait_for("globalThis.taken") == 'print("<b>")\n'
    page.run("document.querySelectorAll('.copy')[1].click()")
    page.wait_for("document.querySelectorAll('.copy')[1].textContent === 'Copied'")
    assert page.run("taken") == MARKDOWN
    # The browser says that the page's policy kept the sanitizer's own parser from running a handler.
    assert all("Content Security Policy" in error for error in page.errors)
    page.errors.clear()


def offline(page, value):
    page.send(
        "Network.emulateNetworkConditions",
        offline=value,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )


def test_an_error_says_what_to_do_and_can_be_retried(page):
    set_field(page, "max_tokens", "5")
    offline(page, True)
    page.type("import os")
    page.press("Enter")
    page.wait_for("!document.getElementById('problem').hidden")
    said = page.run("document.getElementById('error').textContent")
    assert said == "The server does not answer. It may have been stopped, or the connection is gone."
    page.wait_for("document.getElementById('input').value === 'import os'")  # once the conversation is kept
    offline(page, False)
    page.click("retry")
    page.wait_for(f"{CONVERSATION}.length === 2 && {IDLE}")
    assert page.run("document.getElementById('problem').hidden")
    page.errors.clear()  # the browser's own line about the connection


def test_on_a_touch_screen(server):
    """Enter starts a line, as every phone's keyboard expects; the hint names no keys."""
    with Browser() as page:
        page.send("Emulation.setTouchEmulationEnabled", enabled=True)
        page.show_as(390, 844, phone=True)
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        assert "Tap Send" in page.run("document.getElementById('empty').innerText")
        assert "Enter" not in page.run("document.body.innerText")
        page.run("document.getElementById('input').focus()")
        page.type("a")
        page.press("Enter")
        assert page.run(CONVERSATION) == []
        composer = page.run("document.getElementById('composer').getBoundingClientRect().height")
        page.run("document.getElementById('input').value = ''; grow()")
        assert page.run("document.getElementById('composer').getBoundingClientRect().height") <= min(
            48, composer
        )


def test_defaults_stand_in_the_fields(tmp_path):
    folder = demo_in_float32(tmp_path / "my-model")
    (folder / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.05}')
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
    with running(folder) as server, Browser() as page:
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        shown = page.run(f"{json.dumps(fields)}.map((name) => Number(document.getElementById(name).value))")
        assert "takes 6.1 KB, however long" in page.run("document.getElementById('empty').innerText")
    assert shown == [0, 1, 0, 0, 1.05, 512]


def test_an_example_is_put_into_the_field():
    """Of the bundled model, as the terminal shows them."""
    with running() as server, Browser() as page:
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        first = "document.querySelector('#empty .example')"
        numbers = re.findall(r"\d+", page.run(f"{first}.textContent"))
        page.run(f"{first}.click()")
        assert page.run(FOCUS) == "input"
        page.press("Enter")
        page.wait_for(f"{CONVERSATION}.length > 1 && {IDLE}")
        assert page.run(ANSWER) == str(sum(map(int, numbers)))
        assert page.run("document.getElementById('empty').hidden")


LONG = [
    {"role": role, "content": content}
    for part in range(1, 7)
    for role, content in (
        ("user", f"How do I read a file, part {part}?"),
        (
            "assistant",
            MARKDOWN.split(" and [a bad one]")[0] + ".\n" + MARKDOWN.split("(1)).")[1].split("<img")[0],
        ),
    )
]
GONE = "The server does not answer. It may have been stopped, or the connection is gone."
STATES = {
    "empty": "",
    "streaming": "set('max_tokens', 4000); $('input').value = 'import os'; send()",
    "long": f"conversation = {json.dumps(LONG)}; $('status').textContent = ''; show(); scrollDown()",
    "error": f"conversation = []; show(); $('input').value = 'import os'; complain({GONE!r}, send)",
    "examples": "model.examples = ['12 + 34', 'what day is it?']; hint(); conversation = []; show()",
    "settings": "togglePanel('settings', 'toggle')",
    "chats": "togglePanel('list', 'list-toggle')",
    "question": "ask('Start a new conversation? This one stays under Chats.', 'Start'); 0",
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_what_a_screen_reader_needs(server, width, height, dark):
    """axe-core finds nothing to mend in any state. MLX_PARARNN_SCREENSHOTS=docs/page writes pictures."""
    axe = (files("axe_core_python") / "axe.min.js").read_text()
    pictures = os.environ.get("MLX_PARARNN_SCREENSHOTS")
    with Browser() as page:
        page.show_as(width, height, dark=dark, phone=width < 500)
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        page.run(axe + "; globalThis.set = (name, value) => { $(name).value = value; }; 0")
        for state, script in STATES.items():
            page.run(f"if (running) running.abort(); closePanels(); complain(''); {script}; 0")
            if state == "streaming":
                page.wait_for(f"({ANSWER} ?? '').length > 200")
            found = page.run(
                "axe.run().then((found) => found.violations.map((v) => [v.id, v.nodes.map((n) => n.html)]))"
            )
            assert found == [], (state, found)
            if pictures and state in ("empty", "streaming", "long", "error"):
                name = f"page-{width}x{height}-{'dark' if dark else 'light'}-{state}.png"
                with open(os.path.join(pictures, name), "wb") as file:
                    file.write(page.screenshot())
            if state == "streaming":
                page.run("running && running.abort()")
                page.wait_for(IDLE)
        assert not page.errors
