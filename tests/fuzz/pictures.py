"""Targets of pictures: image files, requests with them, folders of models that see and draw."""

import base64
import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jinja2
import numpy as np

from mlx_pararnn import PararnnError
from mlx_pararnn.chat.server.drawings import Drawings
from mlx_pararnn.chat.server.messages import read_messages
from mlx_pararnn.chat.server.prompts import Prompts
from mlx_pararnn.chat.server.responses import StoredResponses, read_responses
from mlx_pararnn.chat.server.schema import ChatRequest, ImageRequest, Refused, read_request
from mlx_pararnn.convert.inspection import inspect
from mlx_pararnn.images.image_model import load_image_model
from mlx_pararnn.images.picture import read_picture
from tests.fuzz.inputs import JSON_WORDS, TEMPLATE, checked_chunks, header_in_named
from tests.fuzz.target import Target, forget_first_weights, named, put
from tests.support.image_models import image_model, write_image_model


def picture(_: Path) -> Target:
    """Image files."""
    import PIL.Image

    image = PIL.Image.effect_noise((24, 18), 60).convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    saved: list[tuple[str, str, dict[str, Any]]] = [
        ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "1", {}), ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("GIF", "P", {"transparency": 3}),
        ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}), ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
    ]  # fmt: skip
    seeds = []
    for kind, mode, options in saved:
        file = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(file, kind, **options)
        seeds.append(file.getvalue())
    frames = io.BytesIO()
    image.save(frames, "GIF", save_all=True, append_images=[image.rotate(90)])
    seeds.append(frames.getvalue())
    words = (b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"eXIf",
             b"iCCP", b"RIFF", b"VP8 ", b"VP8L", b"VP8X", b"ANMF", b"II*\0", b"MM\0*",
             b"\xff\xff\xff\x7f")  # fmt: skip

    def run(data: bytes) -> None:
        # of a small size, so that the whole is made of what a small file says
        with contextlib.suppress(PararnnError):
            found = read_picture(data, 16, 1 << 20)
            assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)

    return Target(run, seeds, words, inside=checked_chunks)


def image_bodies(folder: Path) -> Target:
    """Bodies of requests with pictures and for pictures; where a line stands before it, a file in a URL."""
    import PIL.Image

    model, tokenizer = load_image_model(write_image_model(image_model(), folder / "model"))
    tokenizer.chat_template = TEMPLATE
    prompts = Prompts(model.language_model, tokenizer, model.args)
    drawings = Drawings(model, cast(Any, SimpleNamespace(tokenizer=tokenizer)))
    files = {}
    for kind in ("PNG", "JPEG", "GIF"):
        PIL.Image.effect_noise((6, 4), 60).convert("RGB").save(file := io.BytesIO(), kind)
        files[kind.lower()] = file.getvalue()

    def message(url: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
        return {"messages": [{"role": "user", "content": parts}]}

    def url_of(prefix: str, file: bytes) -> str:
        return prefix + base64.b64encode(file).decode()

    def chat(body: Any) -> None:
        prompts.of_chat(read_request(ChatRequest, body))

    def responses(body: Any) -> None:
        prompts.of_chat(read_responses(body, StoredResponses())[1])

    kinds: list[Callable[[Any], Any]] = [
        chat,
        lambda body: prompts.of_chat(read_messages(body)),
        responses,
        lambda body: drawings.begin(read_request(ImageRequest, body)),
    ]

    def run(data: bytes) -> None:
        try:
            if data[:1] == b"{":
                body = json.loads(data)
            else:
                prefix, _, file = data.partition(b"\n")
                body = message(url_of(prefix.decode(errors="replace"), file))
        except (ValueError, RecursionError):
            return  # what the server answers before it reads one
        for kind in kinds:
            with contextlib.suppress(PararnnError, Refused, jinja2.TemplateError):
                kind(body)

    png = url_of("data:image/png;base64,", files["png"])
    source = {"type": "base64", "media_type": "image/png", "data": png.partition(",")[2]}
    other = [{"type": "text", "text": "x"}, {"type": "image", "source": source}]
    bodies = [
        message(png),
        {"messages": [{"role": "user", "content": other}], "max_tokens": 3},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": png}]}]},
        {"prompt": "an apple", "n": 2, "size": "8x8", "response_format": "b64_json", "seed": 1},
    ]
    seeds = [json.dumps(body).encode() for body in bodies]
    seeds += [f"data:image/{kind};base64,\n".encode() + file for kind, file in files.items()]
    words = (
        *JSON_WORDS,
        b"data:image/png;base64,",
        b"http://127.0.0.1/x.png",
        b"file:///dev/zero",
        b"===",
        b"%41",
    )
    return Target(run, seeds, words, processes=True)


def image_model_folder(folder: Path) -> Target:
    """Folders of models that see and draw: what config.json says of images, and their weights."""
    write_image_model(image_model(), folder / "model")
    model = folder / "model"
    kept = {name: (model / name).read_bytes() for name in ("config.json", "images.safetensors")}
    config = json.loads(kept["config.json"])

    def run(data: bytes) -> None:
        # What it says of images is most of what there is to read.
        kind, _, said = data.partition(b"\n")
        if kind == b"images":
            with contextlib.suppress(ValueError, RecursionError):
                data = named("config.json", json.dumps({**config, "images": json.loads(said)}).encode())
        if not (name := put(model, list(kept), data)):
            return
        try:
            with contextlib.suppress(PararnnError):
                json.dumps(asdict(inspect(model)))
            with contextlib.suppress(PararnnError):
                load_image_model(model)
        finally:
            (model / name).write_bytes(kept[name])
            forget_first_weights()

    quantized = {**config["images"], "quantization": {"group_size": 32, "bits": 4}}
    seeds = [named(name, content) for name, content in kept.items()]
    seeds += [named("images", json.dumps(said).encode()) for said in (config["images"], quantized)]
    return Target(run, seeds, JSON_WORDS, inside=header_in_named)
