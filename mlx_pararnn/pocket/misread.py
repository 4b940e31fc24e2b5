"""Messages that a small model is known to misread, told by rules from what it makes of them.

It copies what it calls a function with from the message: what does not stand there was not read right. And
what looks much like one of its six tasks with numbers ("10 mod 3", "average of 3 and 5") it takes for one.
"""

import json
import re
from typing import Any

from .assistant import FUNCTIONS
from .date_words import MONTHS, WEEKDAYS
from .number_words import NotUnderstood, formula, nearest, split_words
from .standard import calculate
from .two_requests import LONGEST
from .two_requests import instead as instead_of_two

NOT_SURE = (
    "I did not understand that: please say it in other words. "
    "I can do sums, timers, alarms, reminders, lists, dates and units."
)
OTHER_SUMS = (
    "I cannot do that with numbers. I add, subtract, multiply, divide, compare, sort and reverse them."
)

# What is none of the six tasks for certain, and what is none where the calculator can read it.
_NO_TASK = re.compile(
    r"\d\s*(?:\^|\*\*|//|[<>!=]=|=\s*-?\d)|√|^\W*\d+ (?:and|or) \d+\W*$"
    r"|\b(?:average|mean|median|gcd|lcm|hcf|remainder|root|factorial|log|logarithm) (?:of|for)\b|\bsqrt\b"
    r"|\d\s*(?:mod|modulo|xor|nand|squared|cubed|to the power|prime|in binary|in hex)\b"
)
_SIGN = r" *(?:[+-]|plus|minus) *"
_A_SUM = re.compile(rf"\d\s*(?:[%²³×·÷]|percent\b)|(?<![\d./-])(?:0\d+{_SIGN}\d+|\d+{_SIGN}0\d+)(?![\d./-])")
_ASKED = re.compile(
    r"[\s,:]*(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so|thanks)\b[\s,:]*)*"
    r"(?:(?:what is|what's|whats|how much is|calculate|compute|work out|solve|evaluate|figure out|tell me)\b"
    r"[\s:]*)?(.*?)(?:[\s,]*\b(?:please|pls|thanks|thx))?[\s?.!=]*"
)

# Words with which people speak of numbers and of times, or how these begin.
_NUMBER = (
    r"\d|\b(?:(?:an?|half|halves|thirds?|one|two|ten|once|zero|dozen|couple)\b|quarter|three|four|five|fif|six|seven"
    r"|eig|nin|eleven|twel|\w+teen|twent|thirt|fort|hundred|thousand|\w+illion|twice|double|triple)"
)
_TIME = (
    rf"{_NUMBER}|\b(?:(?:now|may|sun|mon|tues?|weds?|thu|thurs?|thur|fri|sat|\w+tieth|first|second|tenth|h|m|s|d"
    r"|wk)\b|\w*day|\w*night|sec|min|ho?u?r|we+k|fortn|mont|year|yr|decad|centur|tom+or|tmr|yest|noon|midd|morn"
    r"|after|even|o'?clo|past|dawn|dusk|sunris|sunset|lunch|dinner|breakf|bedt|chris|xmas|hallow|valen"
    r"|new year|patrick|easter|jan|feb|mar|apr|jun|jul|aug|sep|oct|nov|dec|date|time)"
)
# Where one letter of these is wrong, they are meant.
_MISSPELT = (
    *MONTHS, *WEEKDAYS, "today", "tonight", "tomorrow", "yesterday", "seconds", "minutes", "morning",
    "afternoon", "evening", "midnight", "christmas", "halloween", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "hundred", "thousand",
    "million", "billion",
)  # fmt: skip
_SPOKEN_OF = {
    **dict.fromkeys(("duration", "time", "day"), re.compile(_TIME)),
    **dict.fromkeys(("amount", "expression"), re.compile(_NUMBER)),
}
_DATES = "date", "start", "end"


def instead(message: str, function: str, arguments: str) -> str | None:
    """What to say instead of calling a function for a message; None to call it.

    Args:
        message: what the user wrote.
        function: its name.
        arguments: JSON.
    """
    try:
        read: Any = json.loads(arguments)
    except (ValueError, RecursionError):
        read = None
    given = (
        {name: text for name, text in read.items() if isinstance(text, str)} if isinstance(read, dict) else {}
    )
    is_beside = function in FUNCTIONS and _is_beside(message, given)
    if is_beside or not all(text in message for text in given.values()):
        return instead_of_answer(message) or NOT_SURE
    return instead_of_two(message, function)


def _is_beside(message: str, given: dict[str, str]) -> bool:
    """Whether a time, an amount or a calculation is none, or a date comes from a message that has no time."""
    for name, text in given.items():
        if text and name in _SPOKEN_OF and not _speaks(text, _SPOKEN_OF[name]):
            return True
        if name in _DATES and not _speaks(message, _SPOKEN_OF["time"]):
            return True
    return False


def _speaks(text: str, of: re.Pattern[str]) -> bool:
    """Whether a text has such a word, or one that is misspelt."""
    if of.search(text.lower()):
        return True
    words = split_words(text[:LONGEST])
    return any(nearest(word, (meant,)) for word in words for meant in _MISSPELT)


def instead_of_answer(message: str) -> str | None:
    """What to say where a model answers with no function; None where nothing is known against that.

    A sum that the calculator reads is calculated.
    """
    text = " ".join(message.lower().split())
    no_task = bool(_NO_TASK.search(text))
    if len(message) > LONGEST or not re.search(r"\d", text) or not (no_task or _A_SUM.search(text)):
        return None
    asked = _ASKED.fullmatch(text)
    try:
        return f"{asked[1]} is {calculate(formula(asked[1]))}." if asked else None
    except (NotUnderstood, ValueError, RecursionError) as error:
        if str(error) == "division by zero":
            return "That divides by zero."
        return OTHER_SUMS if no_task else None
