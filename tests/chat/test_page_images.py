"""The chat page with a model that sees and draws, in a real browser; and with one that does not."""

import base64
import io
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

import mlx_pararnn
from tests.support.browser import ANSWER, IDLE, VIOLATIONS, Browser, find_chromium, set_field
from tests.support.image_models import image_model, write_image_model
from tests.support.serving import running

pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium or Chrome here"),
]

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
SHOWN = "[...document.querySelectorAll('.picture')].map((image) => [image.alt, image.naturalWidth])"


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    return write_image_model(image_model(), tmp_path_factory.mktemp("page") / "model")


@pytest.fixture(scope="module")
def seeing(seeing_folder):
    with running(seeing_folder, "--temp", 0) as server:
        yield server


def hidden(page, name):
    return page.run(f"document.getElementById({name!r}).hidden")


def give(page, event):
    """A file that is chosen, pasted or dropped."""
    data = io.BytesIO()
    PICTURE.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    page.run(
        f"globalThis.file = new File([Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0))], 'a.png', "
        "{type: 'image/png'}); globalThis.transfer = new DataTransfer(); transfer.items.add(file); "
        f"{event}; 0"
    )
    page.wait_for("attached !== null && document.querySelector('#attached img').naturalWidth === 8")


def test_images_by_paste_drop_and_choice(seeing, seeing_folder):
    model, tokenizer = mlx_pararnn.load_image_model(seeing_folder)
    axe = (files("axe_core_python") / "axe.min.js").read_text()
    with Browser() as page:
        page.send("Page.navigate", url=seeing.url)
        page.wait_for(IDLE)
        page.run(axe + "; 0")
        assert not hidden(page, "attach")
        assert not hidden(page, "draw")
        give(page, "$('input').dispatchEvent(new ClipboardEvent('paste', {clipboardData: transfer}))")
        page.run("$('detach').click()")
        assert hidden(page, "attached")
        give(page, "dispatchEvent(new DragEvent('drop', {dataTransfer: transfer}))")
        page.run("$('detach').click()")
        give(page, "$('image').files = transfer.files; $('image').dispatchEvent(new Event('change'))")
        set_field(page, "max_tokens", "6")
        assert page.run("document.activeElement.id") == "input"
        page.type("what is it?")
        page.press("Enter")
        page.wait_for(f"conversation.length === 2 && {IDLE}")
        assert page.run(ANSWER) == model.see(tokenizer, PICTURE, "what is it?", max_tokens=6)
        assert page.run(SHOWN) == [["Attached image", 8]]
        assert page.run(VIOLATIONS) == []

        page.press("KeyZ", alt=True)  # undone: text and image are there to be sent again
        assert page.run("attached !== null && $('input').value") == "what is it?"
        page.press("Enter")
        page.wait_for(f"conversation.length === 2 && {IDLE}")

        page.type("a dog")
        page.run("$('seed').value = '3'; $('draw').focus(); $('draw').click()")
        page.wait_for(f"conversation.length === 4 && {IDLE}")
        page.wait_for("[...document.querySelectorAll('.picture')].every((image) => image.naturalWidth === 8)")
        assert page.run(SHOWN)[1] == ["Drawing: a dog", 8]
        drawn = Image.open(io.BytesIO(base64.b64decode(page.run("conversation[3].image").partition(",")[2])))
        expected = np.array(model.draw(tokenizer, "a dog", seed=3)).astype(int)
        assert np.abs(np.array(drawn) - expected).max() <= 1
        assert page.run(VIOLATIONS) == []

        page.type("and now?")  # a drawing is no part of what is read
        page.press("Enter")
        page.wait_for(f"conversation.length === 6 && {IDLE}")
        sent = [body for url, body in page.requests if url.endswith("chat/completions")][-1]
        assert sent.count("image_url") == 2
        assert "a dog" not in sent
        page.run("location.reload()")
        page.wait_for(f"{IDLE} && conversation.length === 6 && {SHOWN}.length === 2")  # kept in the browser
        assert not page.errors


def test_a_model_without_images_has_no_such_buttons(server):
    with Browser() as page:
        page.send("Page.navigate", url=server.url)
        page.wait_for(IDLE)
        assert hidden(page, "attach")
        assert hidden(page, "draw")
        assert hidden(page, "attached")
