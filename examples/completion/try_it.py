"""Type Python and see it completed: `python -m examples.completion.try_it [MODEL]`.

Ctrl-D ends and prints the text again, which `> FILE` keeps; Ctrl-C ends without.
The suggestion stands in grey after the cursor. Tab takes it, where there is none it indents.
"""

import argparse
import sys
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggest, Suggestion
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

import mlx_pararnn


class Completions(AutoSuggest):
    """What comes next after the text before the cursor, from a model folder or the bundled model."""

    def __init__(self, model: Path | None) -> None:
        self.model = model

    def get_suggestion(self, buffer: Buffer, document: Document) -> Suggestion | None:
        try:
            return Suggestion(mlx_pararnn.complete(document.text, self.model))
        except mlx_pararnn.PararnnError:  # bytes that are not UTF-8 were typed or pasted
            return None


def indented(text: str) -> str:
    """What begins the line after `text`: the last line's indentation, and more after a colon."""
    line = text[text.rfind("\n") + 1 :]
    return line[: len(line) - len(line.lstrip())] + "    " * line.rstrip().endswith(":")


def keys() -> KeyBindings:
    """Tab, Enter, and Ctrl-D which gives the text."""
    bindings = KeyBindings()

    @bindings.add("tab")
    def tab(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        shown = buffer.suggestion.text if buffer.suggestion and buffer.document.is_cursor_at_the_end else ""
        buffer.insert_text(shown or "    ")

    @bindings.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        buffer.insert_text("\n" + indented(buffer.document.text_before_cursor))

    @bindings.add("c-d")
    def end(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return bindings


def main() -> str | None:
    """The command line; gives what went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="a model folder; without it the bundled model")
    model = parser.parse_args().model
    if not sys.stdin.isatty():
        return "error: this is an editor and needs a terminal; in a program call mlx_pararnn.complete(text)"
    try:
        mlx_pararnn.complete("", model)  # loads it
        print(*__doc__.splitlines()[2:], sep="\n", file=sys.stderr)
        session: PromptSession[str] = PromptSession(
            auto_suggest=Completions(model),
            key_bindings=keys(),
            multiline=True,
            output=create_output(stdout=sys.stderr),
        )
        text = session.prompt() + "\n"
        sys.stdout.buffer.write(text.encode(errors="surrogateescape"))
    except mlx_pararnn.PararnnError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return "interrupted"
    return None


if __name__ == "__main__":
    sys.exit(main())
