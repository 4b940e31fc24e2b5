"""What a message may be about that wants no function."""

import random
import re
from functools import cache

from .fillers import FILLERS, conversion, made_up, sections


def topic(kind: str, rng: random.Random) -> str:
    """A text of a kind: one of those below, what stands in other braces, or a section of vocabulary.txt."""
    words = sections("vocabulary.txt")
    if kind == "salad":
        every = [*words["item"], *words["chore"], *words["thing"], *words["name"], *words["place"]]
        some = " ".join(rng.choice(every) for _ in range(3)).split()
        rng.shuffle(some)
        return " ".join(some[: rng.randint(2, 7)])
    if kind == "prose":
        return rng.choice(_prose())
    if kind == "gibberish":
        return " ".join(made_up(rng) for _ in range(rng.randint(1, 4)))
    if kind == "number":
        return _lone_number(rng)
    if kind == "script":
        return " ".join(_in_a_script(rng) for _ in range(rng.randint(1, 5)))
    if kind == "emoji":
        return "".join(
            chr(rng.choice((rng.randint(0x1F300, 0x1F64F), rng.randint(0x2600, 0x26FF))))
            for _ in range(rng.randint(1, 3))
        )
    if kind == "digits":
        return " ".join(str(rng.randint(0, 10 ** rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))
    if kind in FILLERS or kind == "amount":
        return (FILLERS | conversion(rng))[kind](rng)[0]
    if kind == "thing" and rng.random() < 0.1:
        return made_up(rng)
    text = rng.choice(words[kind])
    return text.title() if kind in ("place", "person") and rng.random() < 0.5 else text


def _lone_number(rng: random.Random) -> str:
    """A number in any form, which asks for nothing."""
    n = rng.randint(0, 10 ** rng.randint(1, 8))
    forms = ("{}", "{}", "0{}", "{:,}", "-{}", "+{}", "#{}", "{}%", f"{{}}.{rng.randint(0, 99999)}")
    return rng.choice(forms).format(n)


# From the first to the last character of the letters of some scripts.
_SCRIPTS = (
    *((0xDF, 0x17E), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939)),
    *((0xE01, 0xE2E), (0x10D0, 0x10F0), (0x3041, 0x30F6), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3)),
)


def _in_a_script(rng: random.Random) -> str:
    """Letters of another script, or such Latin ones as English lacks among others; no word of a language."""
    first, last = rng.choice(_SCRIPTS)
    letters = [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 7))]
    if first == 0xDF:
        letters = [rng.choice((letter, *"aeinorstzk")) for letter in letters] + letters[:1]
    return "".join(letters)


@cache
def _prose() -> list[str]:
    """Short sentences of English: what Python's own help says."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    sentences = re.findall(r"(?<=[.!?] )[A-Z][a-z]+(?: [a-z]+,?){2,12}[.?]", text)
    return sorted({sentence for sentence in sentences if len(sentence) < 80})
