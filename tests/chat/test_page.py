"""The chat page in a real browser against the running server."""

import json
import os

import pytest

from tests.support.browser import Browser, find_chromium
from tests.support.serving import TEMPLATE, demo_in_float32, running

pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium or Chrome here"),
]

IDLE = "document.getElementById('send')?.disabled === false"
ANSWER = "[...document.querySelectorAll('.assistant > div')].at(-1)?.textContent"
CONVERSATION = "[...document.querySelectorAll('.message > div')].map((e) => e.textContent)"
FOCUS = "document.activeElement.id"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = demo_in_float32(tmp_path_factory.mktemp("page") / "templated")
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


def set_field(page, name, value):
    page.run(f"document.getElementById({name!r}).value = {json.dumps(value)}")


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
    assert "tokens/s · read 16 of 16 prompt tokens · state 6.1 KB" in said
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
    assert "tokens/s" in status(page)
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
    set_field(page, "stop", "\\n\\n")
    page.run("document.getElementById('input').focus()")
    ask(page, "hi")
    bodies = [json.loads(body) for url, body in page.requests if body]
    assert bodies[-1] == {
        **values,
        "max_tokens": 5,
        "stop": "\n\n",
        "model": "templated",
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
    assert page.run(CONVERSATION)[0] == "<img src=x onerror=alert(1)><b>"
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
    heights = page.run("[...document.querySelectorAll('button')].map((b) => b.offsetHeight)")
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
    with running("--api-key", "secret") as server, Browser(("any", "secret")) as page:
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        assert "no chat template: it continues what you write" in page.run("document.body.innerText")
        set_field(page, "max_tokens", "5")
        assert ask(page, "def main(") == "self,"
        assert ask(page, " other)") == ":\n   "
        assert "read 7 of 21 prompt tokens" in status(page)
        if path := os.environ.get("MLX_PARARNN_SCREENSHOT"):
            take_screenshot(page, path)


def take_screenshot(page, path):
    """docs/page.png: MLX_PARARNN_SCREENSHOT=docs/page.png pytest tests/chat/test_page.py -k with_a_key"""
    page.show_as(900, 640)
    page.run("document.getElementById('reset').click()")
    for name, value in (("max_tokens", "90"), ("temperature", "0.7"), ("seed", "4")):
        set_field(page, name, value)
    ask(page, "class Reader:\n    def __init__(self, ")
    ask(page, "\n\n    def read(self, ")
    with open(path, "wb") as file:
        file.write(page.screenshot())
