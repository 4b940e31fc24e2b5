"""`mlx-pararnn serve`: OpenAI's protocol and a chat page, over HTTP."""

import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from . import options, sampling
from .progress import loading
from .report import Debug, reports_errors


@reports_errors
def serve(
    model: options.ModelPath = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Listen here; other machines can come in only with --api-key."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="MLX_PARARNN_API_KEY",
            help="What every request must carry: as a bearer token, or as the password a browser asks for.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="NAME",
            help="A page or desktop app that may use the server (app://obsidian.md), or a name under which "
            "it may be reached (host.docker.internal). Can be given several times.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="The most that one answer may have.")
    ] = 4096,
    temp: options.Temp = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    prompt_cache_mb: Annotated[
        int, typer.Option("--prompt-cache-mb", min=0, help="Memory for the states of earlier requests.")
    ] = 1024,
    prompt_cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache-dir",
            metavar="FOLDER",
            help="Save these states here too, so that they survive a restart. They hold what was said.",
        ),
    ] = None,
    functions: Annotated[
        bool | None,
        typer.Option(
            "--functions/--no-functions",
            help="Let a model that uses tools call the package's own functions here: sums, dates, units. "
            "The bundled model does.",
            show_default=False,
        ),
    ] = None,
    adapter_path: options.Adapters = None,
    state: options.InitialState = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the chat page in the browser.")] = False,
    modules: options.Import = None,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with a chat page.

    OpenAI's chat and completions are under /v1, the page is under /. Ctrl-C stops it.

    Example: mlx-pararnn serve my-model --port 8080
    """
    folder = options.find(model, modules)
    logging.getLogger("mlx_pararnn.chat.server").setLevel(logging.INFO)  # a log without a terminal too
    functions = model is None if functions is None else functions
    until_ready = ExitStack()

    def ready(url: str) -> None:
        until_ready.close()
        print(f"Serving at {url} (Ctrl-C stops)", file=sys.stderr)
        if open_page:
            import webbrowser

            # Not 0.0.0.0, which is every address of this machine and none to go to.
            page = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
            if not webbrowser.open(page):
                print(f"No browser could be opened here; open {page} in one.", file=sys.stderr)

    with until_ready:
        until_ready.enter_context(loading(model or "the bundled model"))
        from mlx_pararnn.chat.server import Settings
        from mlx_pararnn.chat.server import serve as run
        from mlx_pararnn.files.hub import BUNDLED
        from mlx_pararnn.pocket.protocol import declares_protocol

        chosen = sampling.choose_sampling(
            folder,
            sampling.CONVERSATION,
            options.given_sampling(temp, top_p, top_k, min_p, None),
            declares_protocol(folder),
        )
        settings = Settings(
            host=host,
            port=port,
            api_key=api_key,
            allowed_origins=tuple(allow_origin or ()),
            max_tokens=max_tokens,
            temperature=chosen.temp,
            top_p=chosen.top_p,
            top_k=chosen.top_k,
            min_p=chosen.min_p,
            repetition_penalty=chosen.repetition_penalty,
            prompt_cache_bytes=prompt_cache_mb * 2**20,
            prompt_cache_folder=prompt_cache_dir,
            functions=functions,
            adapter_path=adapter_path,
            initial_state=state,
            examples=tuple(sampling.suggested_questions(folder)) if functions else (),
        )
        run(model or BUNDLED, settings, ready=ready)
    print("Stopped.", file=sys.stderr)
