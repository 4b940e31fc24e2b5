"""Messages that rules read whole: calculations, comparisons of two numbers, and conversions.

What a model makes of such a message is held to what it comes to (`misread`).
"""

import re
from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

from .assistant import Assistant
from .number_words import NotUnderstood, formula, number
from .standard import calculate

# Characters of a message: two numbers of as many digits as are read, and what is asked of them.
LONGEST = 2100

_ASKED = re.compile(
    r"[\s,:]*(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so|thanks)\b[\s,:]*)*"
    r"(?:(?:what is|what's|whats|what does|how much is|calculate|compute|work out|solve|evaluate|figure out"
    r"|tell me)\b[\s:]*)?(.*?)(?: equals?)?(?:[\s,]*\b(?:please|pls|thanks|thx))?[\s?.!=]*"
)
_PAIR = r"(\S+?)(?:,? (?:and|or|with|to)|,) (\S+)"
_COMPARE = re.compile(rf"compare:? {_PAIR}")
_LARGER = "bigger|larger|greater|higher|more|max|maximum"
_SMALLER = "smaller|less|lower|min|minimum"
_EITHER = re.compile(
    rf"(?:which )?(?:(?:number|one) )?(?:is )?(?:the )?(?:({_LARGER})|{_SMALLER})"
    r"(?: of| between|[,:])? (\S+?)(?:,? (?:and|or)|,) (\S+)"
)
_WHETHER = re.compile(rf"is (\S+?)(?: (?:({_LARGER})|{_SMALLER}) than | ?([<>]) ?)(\S+)")
_CONVERT = re.compile(r"(?:convert |turn )?(.+) (?:in|into|to) (\S+(?: \S+)?)")
_CURRENCY = re.compile(r"[$€£](?= ?\.?\d)")
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?")
_ORDER = re.compile(r"(?:add|subtract|take|multiply|divide) ")


class Known(NamedTuple):
    """What a message comes to.

    Attributes:
        value: as the model answers it.
        sentence: as a function does.
    """

    value: str
    sentence: str


def known(message: str) -> Known | None:
    """What a message comes to, if nothing of it is left over."""
    asked = asked_in(message)
    if asked is None:
        return None
    with suppress(NotUnderstood, ValueError, RecursionError):
        return _comparison(asked) or _conversion(asked) or _calculation(asked)
    return None


def asked_in(message: str) -> str | None:
    """The message in lower case, without polite words and "what is"; None if it is too long."""
    match = _ASKED.fullmatch(" ".join(message.lower().split())) if len(message) <= LONGEST else None
    return match and match[1]


def _comparison(asked: str) -> Known | None:
    if match := _COMPARE.fullmatch(asked):
        a, b = match.groups()
        difference = _number(a) - _number(b)
        found = f"{a} {'=<>'[(difference < 0) + 2 * (difference > 0)]} {b}"
    elif match := _EITHER.fullmatch(asked):
        a, b = match[2], match[3]
        difference = _number(a) - _number(b)
        found = (a if (difference > 0) == bool(match[1]) else b) if difference else "they are equal"
    elif match := _WHETHER.fullmatch(asked):
        difference = _number(match[1]) - _number(match[4])
        found = "yes" if (difference > 0 if match[2] or match[3] == ">" else difference < 0) else "no"
    else:
        return None
    return Known(found, found)


def _number(text: str) -> Fraction:
    return -number(text[1:]) if text.startswith("-") else number(text)


def _conversion(asked: str) -> Known | None:
    match = _CONVERT.fullmatch(asked)
    if match is None:
        return None
    try:
        found = Assistant().convert(match[1], match[2])
    except NotUnderstood:
        return None
    return Known(found, found)


def _calculation(asked: str) -> Known | None:
    if len({*_CURRENCY.findall(asked)}) < 2:
        asked = _CURRENCY.sub("", asked)
    meant = formula(asked)
    if meant.isdigit() or _DATE.fullmatch(asked):
        return None
    value = calculate(meant)
    return Known(value, f"{'That' if _ORDER.match(asked) else asked} is {value}.")
