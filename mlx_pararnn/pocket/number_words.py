"""Numbers, amounts and calculations as people write them, by fixed rules.

Every function takes the text of one such thing ("two and a half", "half a mile", "twelve plus seven") and
either understands all of it or raises `NotUnderstood`, whose sentence is for the user. Case does not
matter. In a word of five letters or more one letter may be wrong, missing, doubled, or swapped with the next.
"""

import re
from collections.abc import Collection
from fractions import Fraction

from ..errors import PararnnError

SMALL = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
}
TENS = {
    word: 20 + 10 * i
    for i, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "thirds": 3,
    "quarter": 4,
    "quarters": 4,
    "fifth": 5,
    "fifths": 5,
}
_COUNTS = {"hundred": 100, "dozen": 12, "couple": 2}
_NUMBER_WORDS = (*SMALL, *TENS, *_LARGE, *_PARTS, *_COUNTS)
ORDINALS = dict(
    zip(
        [
            "first",
            "second",
            "third",
            "fourth",
            "fifth",
            "sixth",
            "seventh",
            "eighth",
            "ninth",
            "tenth",
            "eleventh",
            "twelfth",
            "thirteenth",
            "fourteenth",
            "fifteenth",
            "sixteenth",
            "seventeenth",
            "eighteenth",
            "nineteenth",
            "twentieth",
        ],
        range(1, 21),
        strict=True,
    )
)
# Where no correction is tried: these are words of their own, however near they are to another.
_NEVER_CORRECTED = {*_NUMBER_WORDS, *ORDINALS}

_MOST_DIGITS = 1000  # Python itself refuses to print integers of more than 4,300

_TOKEN = re.compile(
    r"\d+:\d\d|\d+/\d+|\d+(?:st|nd|rd|th)\b|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+"
    r"|[^\W\d_°]+(?:['/][^\W\d_]+)*|\*\*|//|[^\s\w,?!.°]"
)
_NUMERAL = re.compile(r"[\d,]*\.?\d+|\d+/\d+")

# In a calculation: a word, and what it is in a formula.
_OPERATORS = {
    **{sign: sign for sign in ("+", "-", "*", "/", "//", "**", "(", ")")},
    "plus": "+",
    "minus": "-",
    "negative": "-",
    "times": "*",
    "x": "*",
    "of": "*",
    "over": "/",
    "squared": "**2",
    "cubed": "**3",
    "mod": "%",
    "percent": "/100",
    "%": "/100",
    "twice": "2*",
    "double": "2*",
    "triple": "3*",
}
# Of these, those that begin an operand, and those that may stand where one begins; the others come after one.
_BEGIN = ("(", "2*", "3*")
_SIGNS = ("+", "-")
_END = (")", "/100", "**2", "**3")  # an operand ends with them
_SHORTER = {
    r"\bdivided by\b": "over",
    r"\bmultiplied (by|with)\b": "times",
    r"\b(added to|and then add)\b": "plus",
    r"\b(raised )?to the power( of)?\b": "**",
    r"\bper cent\b": "percent",
    r"\bmodulo\b": "mod",
    r"\b(the )?square root of\b|\bsqrt\b( of\b)?": "sqrt",
}
_ORDERS = (
    (re.compile(r"(?:the )?sum of (.+)"), ("and", "plus"), "{0}+{1}"),
    (re.compile(r"add (.+)"), ("and", "to", "plus"), "{0}+{1}"),
    (re.compile(r"(?:the )?difference (?:between|of) (.+)"), ("and",), "{0}-{1}"),
    (re.compile(r"(?:the )?product of (.+)|multiply (.+)"), ("and", "by", "with"), "{0}*{1}"),
    (re.compile(r"divide (.+)"), ("by",), "{0}/{1}"),
    (re.compile(r"(?:the )?remainder of (.+)"), ("over", "/", "and", "by"), "{0}%{1}"),
    (re.compile(r"subtract (.+)|take (.+)"), ("from",), "{1}-{0}"),
)


class NotUnderstood(PararnnError):
    """The text is none of what the function reads."""


def number(text: str) -> Fraction:
    """A number: "12", "1,000", "3.5", "1/2", "twenty-one", "two and a half", "three point one"."""
    words = split_words(text)
    found = read_number(words, 0)
    if found is None or found[1] != len(words):
        raise NotUnderstood(f"I do not understand the number '{text}'.")
    return found[0]


def amounts(text: str) -> list[tuple[Fraction, str]]:
    """Numbers with what they count: "5 km", "six feet two inches", "a mile", "an hour and a half"."""
    words = split_words(text)
    found: list[tuple[Fraction, str]] = []
    at = 0
    while at < len(words):
        if found and words[at : at + 2] == ["and", "a"] and words[at + 2 :] in (["half"], ["quarter"]):
            value, unit = found[-1]
            found[-1] = value + Fraction(1, _PARTS[words[at + 2]]), unit
            return found
        if found and words[at] == "and":
            at += 1
        read = read_number(words, at, article=True)
        if read is None:
            break
        value, start = read
        while words[start : start + 1] and words[start] in ("of", "a", "an"):
            start += 1
        at = start
        while at < len(words) and words[at] != "and" and read_number(words, at) is None:
            at += 1
        found.append((value, " ".join(words[start:at])))
    if not found or at != len(words):
        raise NotUnderstood(f"I do not understand the amount '{text}'.")
    return found


def formula(text: str) -> str:
    """What a calculation means, in digits and + - * / // ** ( ) and sqrt.

    "twelve plus seven" gives "12+7", "half of ninety" "(1/2)*90", "15% of 80" "(15/100)*80". Two numbers
    without a sign between them are no calculation: neither "5 7 + 1" nor "3 000 + 1", where it is "3,000".
    """
    for sign, plain in {
        "²": " squared",
        "³": " cubed",
        "×": "*",
        "·": "*",
        "÷": "/",
        "−": "-",
        "^": "**",
        "√": "square root of ",
    }.items():
        text = text.replace(sign, plain)
    text = re.sub(r"\s%\s*(?=-?[\d(])|%(?=[\d(])", " mod ", text)  # "5% 7" is no remainder
    plain = " ".join(split_words(text))
    for pattern, word in _SHORTER.items():
        plain = re.sub(pattern, word, plain)
    found = _order(plain) or _expression(plain)
    if found is None:
        raise NotUnderstood(f"I cannot calculate '{text}'.")
    return found


def split_words(text: str) -> list[str]:
    """Words, numerals and signs in lower case; "5km" is two, "twenty-one" is too, "p.m." is "pm"."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    text = re.sub(r"(?<=[^\W_])-(?=[^\W\d_])", " ", text)
    return _TOKEN.findall(text)


def read_number(words: list[str], at: int, *, article: bool = False) -> tuple[Fraction, int] | None:
    """The number that begins at a word, and where it ends; None if none does.

    With `article`, "a" and "an" alone are 1.
    """
    whole = _whole_number(words, at)
    if whole is None:
        if words[at : at + 1] in (["a"], ["an"]):
            counted = read_number(words, at + 1) if _is_count(words, at + 1) else None
            return counted or ((Fraction(1), at + 1) if article else None)
        return None
    value, at = whole
    if words[at : at + 1] == ["point"]:
        digits = ""
        while (
            at + 1 < len(words) and (word := words[at + 1]) and (SMALL.get(word, 10) < 10 or word.isdigit())
        ):
            digits += word if word.isdigit() else str(SMALL[word])
            at += 1
        return (value + Fraction(f"0.{digits}"), at + 1) if digits else None
    if re.fullmatch(r"\d+/\d+", "".join(words[at : at + 1])) and value.denominator == 1:  # "3 1/2"
        part = _numeral(words[at])
        if part is not None and part < 1:
            return value + part, at + 1
    if words[at : at + 1] == ["and"]:
        first = at + 2 if words[at + 1 : at + 2] == ["a"] else at + 1
        part_of = _whole_number(words, first)
        if part_of is not None and part_of[0] < 1:
            return value + part_of[0], part_of[1]
    return value, at


def nearest(word: str, vocabulary: Collection[str]) -> str | None:
    """The word of a vocabulary that is meant: itself, or the only one that differs by one letter."""
    if word in vocabulary:
        return word
    if len(word) < 5 or word in _NEVER_CORRECTED:
        return None
    near = [known for known in vocabulary if len(known) >= 5 and _one_letter_apart(word, known)]
    return near[0] if len(near) == 1 else None


def _is_count(words: list[str], at: int) -> bool:
    return at < len(words) and words[at] in {*_PARTS, *_LARGE, *_COUNTS}


def _whole_number(words: list[str], at: int) -> tuple[Fraction, int] | None:
    """A numeral or number words, and a part after them: "three quarters"."""
    if at >= len(words):
        return None
    value = _numeral(words[at])
    if value is not None:
        at += 1
        while at < len(words) and (size := {**_LARGE, "hundred": 100}.get(words[at])):
            value, at = value * size, at + 1
        return value, at
    start, total, current, known = at, 0, 0, False
    while at < len(words):
        word = nearest(words[at], _NUMBER_WORDS) or words[at]
        if word in SMALL and (
            not current or current % 100 == 0 or (current % 10 == 0 and 0 < SMALL[word] < 10)
        ):
            if current % 100 == 10:
                break
            current += SMALL[word]
        elif word in TENS and current % 100 == 0:
            current += TENS[word]
        elif word == "hundred" and current < 100:
            current = (current or 1) * 100
        elif word in _LARGE and (not total or (current and total % (1000 * _LARGE[word]) == 0)):
            total, current = total + (current or 1) * _LARGE[word], 0
        elif word in _COUNTS and word != "hundred" and not total:
            return Fraction((current or 1) * _COUNTS[word]), at + 1
        elif word in _PARTS and not total:
            return Fraction(current if known else 1, _PARTS[word]), at + 1
        elif (
            word == "and" and known and (total or current) and current % 100 == 0 and _is_small(words, at + 1)
        ):
            pass
        else:
            break
        known, at = True, at + 1
    return (Fraction(total + current), at) if at > start else None


def _is_small(words: list[str], at: int) -> bool:
    return at < len(words) and (nearest(words[at], _NUMBER_WORDS) or "") in {*SMALL, *TENS}


def _numeral(word: str) -> Fraction | None:
    if not _NUMERAL.fullmatch(word):
        return None
    if len(word) > _MOST_DIGITS:
        raise NotUnderstood(f"I can use numbers of up to {_MOST_DIGITS} digits there.")
    try:
        return Fraction(word.replace(",", ""))
    except ZeroDivisionError:
        raise NotUnderstood(f"'{word}' divides by zero.") from None


def _one_letter_apart(a: str, b: str) -> bool:
    """One letter replaced, inserted, left out, or swapped with its neighbour."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    swapped = len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0] and a[2:] == b[2:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or swapped


def _order(text: str) -> str | None:
    """ "add twelve and seven": two operands around the first connecting word that leaves two."""
    for pattern, connecting, shape in _ORDERS:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        words = next(group for group in match.groups() if group is not None).split()
        for at, word in enumerate(words):
            if word not in connecting:
                continue
            sides = _expression(" ".join(words[:at])), _expression(" ".join(words[at + 1 :]))
            if sides[0] is not None and sides[1] is not None:
                return shape.format(*(f"({side})" if _is_sum(side) else side for side in sides))
    return None


def _is_sum(expression: str | None) -> bool:
    return expression is not None and not re.fullmatch(r"[\d.]+|\([^()]*\)", expression)


def _expression(text: str) -> str | None:
    """Numbers and operators from left to right; None if a word is neither or there is none where one must be.

    Raises:
        NotUnderstood: two numbers have no operator between them.
    """
    words = text.split()
    found: list[str] = []
    at, whole = 0, False  # whether an operand has just ended
    while at < len(words):
        root = words[at] == "sqrt"
        at += root
        if whole and words[at : at + 1] == ["negative"]:
            return None
        word = nearest(words[at], _OPERATORS) if at < len(words) else None
        operator = None if word is None or (root and word != "(") else _OPERATORS[word]
        if operator is None:
            read = read_number(words, at)
            if read is None:
                return None
            value, at = read
            piece = f"sqrt({_digits(value)})" if root else _digits(value)
        else:
            piece, at = "sqrt(" if root else operator, at + 1
        if operator is None or operator in _BEGIN:
            if whole:
                raise NotUnderstood(f"I cannot calculate '{text}': there is no sign between two numbers.")
            if found and found[-1] in ("/", "//", "**") and operator in ("2*", "3*"):
                return None  # "6 over twice 3" is not 6/2*3
        elif not whole and operator not in _SIGNS:
            return None
        if operator == "/100" and found[-1] not in _END:
            piece = f"({found.pop()}/100)"  # of "6 over 50%"
        found.append(piece)
        whole = operator is None or operator in _END
    return "".join(found) if whole else None


def _digits(value: Fraction) -> str:
    if value >= 10**_MOST_DIGITS:
        raise NotUnderstood(f"I can use numbers of up to {_MOST_DIGITS} digits there.")
    return str(value) if value.denominator == 1 else f"({value})"
