"""Names out of a file, made fit for a one-line message: a file may hold any name at all."""

from collections.abc import Iterable, Sequence


def shown(name: str, limit: int = 120) -> str:
    """`name` on one line, unprintable characters escaped, cut at `limit` characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def listed(names: Sequence[str], first: int = 10) -> str:
    """The first ten names, and how many more there are."""
    text = ", ".join(shown(name) for name in names[:first])
    return f"{text} and {len(names) - first} more" if len(names) > first else text


def shape_text(shape: Iterable[int]) -> str:
    """A shape as messages show it."""
    return "(" + ", ".join(str(n) for n in shape) + ")"
