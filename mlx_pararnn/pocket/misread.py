"""Messages that a small model is known to misread, told by rules from what it makes of them.

It copies what it calls a function with from the message: what does not stand there was not read right. And
what looks much like one of its six tasks with numbers ("10 mod 3", "average of 3 and 5") it takes for one.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from .assistant import FUNCTIONS, Assistant
from .date_words import MONTHS, WEEKDAYS
from .known import Known, asked_in, known
from .loop import LOST
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
NOTHING_DONE = 'I did nothing: say what I shall do as a request, as in "set a timer for 5 minutes".'
OTHER_ACTIONS = "I cannot do that with timers, alarms, reminders and lists. I set, show and cancel them."

# What is none of the six tasks for certain, and what is none where the calculator can read it.
_NO_TASK = re.compile(
    r"\d\s*(?:\^|\*\*|//|[<>!=]=|=\s*-?\d)|√|^\W*\d+ (?:and|or) \d+\W*$"
    r"|\b(?:average|mean|median|gcd|lcm|hcf|remainder|root|factorial|log|logarithm) (?:of|for)\b|\bsqrt\b"
    r"|\d\s*(?:mod|modulo|xor|nand|squared|cubed|to the power|prime|in binary|in hex)\b"
)
_SIGN = r" *(?:[+-]|plus|minus) *"
_A_SUM = re.compile(rf"\d\s*(?:[%²³×·÷]|percent\b)|(?<![\d./-])(?:0\d+{_SIGN}\d+|\d+{_SIGN}0\d+)(?![\d./-])")
# Numbers and signs alone, which are no sum if they are not read as one.
_SIGNS_ALONE = re.compile(r"(?!.*\d{1001})(?=.*\d)(?=.*[+*/^-])[\d\s.,()$€£+*/^-]+")
# The pointers' tasks that are not read whole by rules.
_TASK = re.compile(r"\b(?:sort\w*|arrange|order)\b|^\W*(?:[01][a-d])+;")
# Answers that are no number, by their first word; of a reversal that is the model's own sentences alone.
_SHORT = "y", "ye", "yes", "n", "no"
_WORDS = re.compile(r"[^\W\d_][^\d ]*(?: |$)")
_SENTENCE = re.compile(r"[A-Z][a-z']*(?: |$)")
_REVERSE = "reverse", "reversed", "backwards", "backward"
# What stands beside a calculation and belongs to one.
_OF_A_SUM = re.compile(
    r"\d|[+*/^×·÷−√<>]|(?<![^\W_])-|\b(?:minus|negative|plus|times|over|half|thirds?|quarters?|twice|double|triple"
    r"|squared?|cubed?|roots?|power|percent|mod|modulo|remainder|max\w*|min|minimum|larger|largest|bigger|biggest"
    r"|smaller|smallest|average|mean|median|product|difference|factorial|log\w*|sqrt|day|date)\b"
)
_SIGN_BEFORE = re.compile(r"(?:\b(?:minus|negative)|(?<![^\W_])[-−])\s*$")
_NUMERAL = re.compile(r"(?<![^\W_])\d+")

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

# Of timers, alarms, reminders and lists.
_SETS = re.compile(r"(?:set|add)_")
_CHANGES = re.compile(r"(?:set|add|cancel|remove|clear)_")
_KEEPS = re.compile(r"(?:set|cancel|show)_")
_NOT = re.compile(r"^\W*no\b|\b(?:do not|don'?t|not|never|already)\b(?! (?:let|f\w+t)\b)")
_NOT_CHANGED = re.compile(
    r"\b(?:do not|don'?t|never) (?:\w+ )?(?:cancel|stop|remove|delete|clear|empty|turn off|drop|erase)\b"
)
_WAS_DONE = re.compile(r"^\W*(?:i|we)(?:'ve| have)? (?:just )?(?:added|put|set|started|made)\b")
_WHETHER = re.compile(
    r"^\W*(?:(?:please|pls|hey|ok|hi|hello|so|um)\W+)*(?:should|shall|did|does|do (?:i|we)|is|are|was|were"
    r"|have (?:i|we)|why|who|which|how(?! about)|what(?! about)|what's|when (?:should|shall|did|do|will))\b"
)
_OTHER = re.compile(
    r"\b(?:pause|resume|unpause|snooze|extend|rename|postpone|reschedule)\b(?=.*\b(?:timer|alarm|reminder|list))"
)


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
    is_own = function in FUNCTIONS
    if is_own and (found := known(message)):
        return None if _comes_to(function, given, found) else found.sentence
    if (is_own and _is_beside(message, given)) or not all(text in message for text in given.values()):
        return instead_of_answer(message) or NOT_SURE
    twice = instead_of_two(message, function)
    return twice or (_instead_of_part(message, function, given) if is_own else None)


def _comes_to(function: str, given: dict[str, str], found: Known) -> bool:
    """Whether a call gives what the message comes to."""
    try:
        if function == "convert":
            return Assistant().convert(**given).lower() == found.sentence
        return function == "calculate" and calculate(formula(given["expression"])) == found.value
    except (NotUnderstood, ValueError, RecursionError, LookupError, TypeError):
        return False


def _is_beside(message: str, given: dict[str, str]) -> bool:
    """Whether a time, an amount or a calculation is none, or a date comes from a message that has no time."""
    for name, text in given.items():
        if text and name in _SPOKEN_OF and not _speaks(text, _SPOKEN_OF[name]):
            return True
        if name in _DATES and not _speaks(message, _SPOKEN_OF["time"]):
            return True
    return False


def _instead_of_part(message: str, function: str, given: dict[str, str]) -> str | None:
    """What to say where the message has more to it than the call."""
    rest = message[:LONGEST].lower().replace("’", "'")
    for name, text in sorted(given.items(), key=lambda item: (-len(item[1]), item[0])):
        before, found, after = rest.partition(text.lower().replace("’", "'")) if text else ("", "", "")
        if found:
            if name in _SPOKEN_OF and function != "date_before" and _SIGN_BEFORE.search(before):
                return NOT_SURE
            rest = f"{before} _ {after}"
    if function == "convert" and _NUMERAL.search(given.get("to", "")):
        return NOT_SURE
    if function == "calculate" and _OF_A_SUM.search(rest):
        return instead_of_answer(message) or OTHER_SUMS
    if not function.endswith("_list") and _NUMERAL.search(rest):
        return NOT_SURE
    if function in ("days_until", "days_since") and re.search(r"\bin +_", rest):
        return NOT_SURE  # "how many days in february"
    if _KEEPS.match(function) and _OTHER.search(rest):
        return OTHER_ACTIONS
    undone = _NOT if _SETS.match(function) else _NOT_CHANGED
    if _CHANGES.match(function) and any(p.search(rest) for p in (undone, _WAS_DONE, _WHETHER)):
        return NOTHING_DONE
    return None


def _speaks(text: str, of: re.Pattern[str]) -> bool:
    """Whether a text has such a word, or one that is misspelt."""
    if of.search(text.lower()):
        return True
    words = split_words(text[:LONGEST])
    return any(nearest(word, (meant,)) for word in words for meant in _MISSPELT)


def instead_of_answer(message: str) -> str | None:
    """What to say where a model answers with no function; None where nothing is known against that.

    What rules read whole is said by them, as the model would where it is one of its tasks.
    """
    text = " ".join(message.lower().split())
    no_task = len(text) <= LONGEST and bool(re.search(r"\d", text) and _NO_TASK.search(text))
    if found := known(message):
        return found.sentence if no_task or _A_SUM.search(text) else found.value
    asked = asked_in(message)
    if asked is None or not (no_task or _A_SUM.search(text) or _SIGNS_ALONE.fullmatch(asked)):
        return None
    try:
        calculate(formula(asked))
    except (NotUnderstood, ValueError, RecursionError) as error:
        if re.search("(?:division|divides) by zero", str(error)):
            return "That divides by zero."
        return OTHER_SUMS if no_task or _SIGNS_ALONE.fullmatch(asked) else None
    return None


def check_answer(message: str) -> Callable[[str, bool], str | None]:
    """A check of what a model answers to a message with no function.

    Returns:
        a function of what has been said and of whether that is all; it gives what has to be said instead, or
        None. Where that begins with what has been said, the rest of it is to follow.
    """
    right = instead_of_answer(message)
    text = message.lower()
    reversed_text = text[::-1]
    is_reversal = any(nearest(word, _REVERSE) for word in split_words(text[:LONGEST]))
    is_task = is_reversal or len(message) > LONGEST or bool(_TASK.search(text))
    words = _SENTENCE if is_reversal else _WORDS

    def check(said: str, ended: bool) -> str | None:
        if right is not None:
            return None if right == said or (not ended and right.startswith(said)) else right
        if re.fullmatch(r"[-+\d., <>=]*", said) or said in _SHORT:
            return None if is_task or not said else NOT_SURE
        return None if words.match(said) or said.lower() in reversed_text else LOST

    return check
