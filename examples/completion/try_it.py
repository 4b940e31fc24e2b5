"""Type Python and see it completed: `python -m examples.completion.try_it [MODEL]`.

The suggestion stands in grey after the cursor. Tab takes it, where there is none it indents; Ctrl-D ends.
"""

import sys

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggest, Suggestion
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

import mlx_pararnn


class Completions(AutoSuggest):
    """What comes next after the text before the cursor, from a model folder or the bundled model."""

    def __init__(self, model: str | None) -> None:
        self.model = model

    def get_suggestion(self, buffer: Buffer, document: Document) -> Suggestion | None:
        return Suggestion(mlx_pararnn.complete(document.text, self.model))


def keys() -> KeyBindings:
    """Tab, and Ctrl-D which gives the text."""
    bindings = KeyBindings()

    @bindings.add("tab")
    def tab(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        shown = buffer.suggestion.text if buffer.suggestion and buffer.document.is_cursor_at_the_end else ""
        buffer.insert_text(shown or "    ")

    @bindings.add("c-d")
    def end(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    return bindings


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else None
    mlx_pararnn.complete("", model)  # loads it
    print(__doc__.splitlines()[2], file=sys.stderr)
    session: PromptSession[str] = PromptSession(
        auto_suggest=Completions(model), key_bindings=keys(), multiline=True
    )
    print(session.prompt())
