"""Messages that ask for two things at once.

A model that makes one call does one of them without a word about the other, or a mixture of both.
"""

import re

SENTENCE = "I do one thing at a time: please ask for one after the other."
LONGEST = 1000  # characters of a message that are looked at

_POLITE = r"(?:(?:please|pls|can you|could you|would you|hey|ok|hi|hello|so)\W+)*"
# What a message begins with that asks for something, and what a second request begins with.
_FIRST = re.compile(
    rf"\W*{_POLITE}(?:set|start|cancel|stop|show|make|add|put|remove|take|clear|delete|remind|wake|convert|calculate"
    r"|what|what's|whats|how|when|which|tell|give)\b"
)
_NEXT = r"\b(?:and|then)\s+(?:(?:then|also|please)\s+)*"
_ENTRY = (
    r"(?:set|start|cancel|stop|show|make)\b(?:\s+\S+){0,4}?\s+(?:timers?|alarms?|reminders?)\b"
    r"|(?:remind|wake)\s+me\b"
)
_LIST = r"(?:put|take|clear|delete|show)\b.*\blists?\b"
_OTHER = r"how\s+(?:many|much|long)\b|(?:convert|calculate|tell me|what|what's|whats|when|which)\b"
_ITEM = r"(?:add|remove)\s+[^\W\d]"
# "add salt and take out the trash to my list" names one list, which is the first request's
_OF_LISTS = re.compile(f"{_NEXT}(?:{_ENTRY}|{_OTHER}|{_ITEM})|\\blists?\\b.*{_NEXT}{_LIST}")
_AFTER = {
    "set_reminder": re.compile(f"{_NEXT}(?:{_ENTRY})"),  # of what people want to be reminded the rest may be
    "calculate": re.compile(f"{_NEXT}(?:{_ENTRY}|{_LIST}|{_OTHER})"),  # "ten plus five and then add three"
    "add_to_list": _OF_LISTS,
    "remove_from_list": _OF_LISTS,
}
_AFTER_ANY = re.compile(f"{_NEXT}(?:{_ENTRY}|{_LIST}|{_OTHER}|{_ITEM})")


def instead(message: str, function: str) -> str | None:
    """What to say instead of calling a function of `assistant.FUNCTIONS` for a message; None to call it.

    It is a sentence where after "and" or "then" another request begins.
    """
    text = message[:LONGEST].lower()
    if _FIRST.match(text) and _AFTER.get(function, _AFTER_ANY).search(text):
        return SENTENCE
    return None
