"""The chat page: its parts, put into one file that loads nothing.

page.js is the page; kept.js keeps conversations in the browser; pictures.js is for models with images;
markdown.js shows a model's Markdown by two vendored libraries, marked.js (18.2.1, MIT) and purify.js
(DOMPurify 3.5.0, Apache 2.0), unchanged but for the line that names a source map.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def chat_page() -> tuple[str, str]:
    """The page as HTML, and its Content-Security-Policy: its own scripts and style, by hash; this server."""
    text = _part("index.html")
    hashes: dict[str, list[str]] = {"script": [], "style": []}

    def inlined(kind: str, name: str) -> str:
        part = _part(name)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
        return f"<{kind}>{part}</{kind}>"

    text = re.sub(r'<script src="page/([\w.]+)"></script>', lambda found: inlined("script", found[1]), text)
    text = re.sub(
        r'<link rel="stylesheet" href="page/([\w.]+)">', lambda found: inlined("style", found[1]), text
    )
    return text, (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; "
        f"style-src {' '.join(hashes['style'])}; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
