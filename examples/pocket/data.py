"""Tasks for the pointer memory in the ways that people write them, and their answers by Python.

`python -m examples.pocket.data` prints some of each kind with their traces.
"""

import random
from collections.abc import Callable

from . import traces

Sample = tuple[str, str]  # message, answer

ASK = (
    "{}",
    "{}?",
    "{}=",
    "{} =",
    "what is {}?",
    "What is {}?",
    "what's {}",
    "calculate {}",
    "Please compute {}.",
    "how much is {}?",
)
LIST = (
    "sort {}",
    "Sort {}",
    "sort: {}",
    "please sort {}",
    "can you sort {}?",
    "Sort these: {}",
    "sort {} please",
)


def number(rng: random.Random, digits: int) -> str:
    """A number of so many digits, sometimes one with many equal ones, which carry far."""
    first = "123456789" if digits > 1 else "0123456789"
    if rng.random() < 0.15:
        few = rng.choice(("9", "0", "09", "19", "5"))
        return (rng.choice(first) + "".join(rng.choices(few, k=digits - 1)))[:digits]
    return rng.choice(first) + "".join(rng.choices("0123456789", k=digits - 1))


def pair(rng: random.Random, digits: int) -> tuple[str, str]:
    """Two numbers, the longer of `digits` digits: of any two lengths, of equal ones, alike or equal."""
    a, kind = number(rng, digits), rng.random()
    if kind < 0.4:
        b = number(rng, rng.randint(1, digits))
    elif kind < 0.8:
        b = number(rng, digits)
    elif kind < 0.9:
        at = rng.randrange(digits)
        b = a[:at] + rng.choice("123456789") + a[at + 1 :]
    else:
        b = a
    return (a, b) if rng.random() < 0.5 else (b, a)


def addition(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    asked = ask(rng, f"{a}{rng.choice(('+', ' + ', ' plus '))}{b}")
    told = rng.choice(
        (f"add {a} and {b}", f"Add {a} to {b}", f"sum of {a} and {b}", f"what is the sum of {a} and {b}?")
    )
    return asked if rng.random() < 0.7 else told, str(int(a) + int(b))


def subtraction(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    asked = ask(rng, f"{a}{rng.choice(('-', ' - ', ' minus '))}{b}")
    told = rng.choice((f"subtract {b} from {a}", f"Subtract {b} from {a}.", f"please subtract {b} from {a}"))
    return asked if rng.random() < 0.7 else told, str(int(a) - int(b))


def multiplication(rng: random.Random, digits: int) -> Sample:
    a, b = number(rng, digits), number(rng, 1 if rng.random() < 0.93 else rng.randint(2, max(2, digits)))
    asked = ask(rng, f"{a}{rng.choice(('*', ' * ', ' x ', 'x', ' times '))}{b}")
    told = rng.choice(
        (f"multiply {a} by {b}", f"Multiply {a} by {b}.", f"what is the product of {a} and {b}?")
    )
    return asked if rng.random() < 0.7 else told, str(int(a) * int(b)) if len(b) == 1 else traces.ONE_DIGIT


def comparison(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    sign = "=<>"[(int(a) < int(b)) + 2 * (int(a) > int(b))]
    kind = rng.randrange(3)
    if kind == 0:
        join = rng.choice((f"{a} and {b}", f"{a} with {b}", f"{a} to {b}", f"{a}, {b}"))
        return rng.choice(("compare {}", "Compare {}.", "please compare {}")).format(join), f"{a} {sign} {b}"
    large = rng.random() < 0.5
    word = rng.choice(("bigger", "larger", "greater") if large else ("smaller", "less"))
    if kind == 1:
        join = rng.choice((f", {a} or {b}?", f": {a} or {b}", f", {a} or {b}"))
        best = a if (sign == ">") == large else b
        return (
            f"{rng.choice(('which is', 'Which is', 'what is', 'which number is'))} {word}{join}",
            best if sign != "=" else traces.EQUAL,
        )
    middle = rng.choice((f" {word} than ", " > " if large else " < ", ">" if large else "<"))
    asked = rng.choice(("is {}?", "Is {}?", "is {}")).format(f"{a}{middle}{b}")
    return asked, "yes" if sign == ("> " if large else "< ")[0] else "no"


def reversal(rng: random.Random, digits: int) -> Sample:
    a = number(rng, digits)
    if rng.random() < 0.3:
        return rng.choice(
            (
                "what is {} reversed?",
                "{} reversed",
                "{} backwards",
                "say {} backwards",
                "What is {} backwards?",
            )
        ).format(a), a[::-1]
    what = "number"
    if rng.random() < 0.5:
        letters = rng.choice(
            (
                "abcdefghijklmnopqrstuvwxyz",
                "abcdefghijklmnopqrstuvwxyz",
                "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
                "aeioulnrst",
            )
        )
        a, what = "".join(rng.choices(letters, k=digits)), rng.choice(("word", "string"))
    form = rng.choice(
        (
            "reverse {}",
            "Reverse {}",
            "reverse {}",
            "please reverse {}.",
            "reverse the {what} {}",
            "reverse: {}",
            "can you reverse {}?",
        )
    )
    return form.format(a, what=what), a[::-1]


def sorting(rng: random.Random, digits: int) -> Sample:
    items = list(number(rng, digits))
    if rng.random() < 0.5:
        form = rng.choice(
            (
                "sort {}",
                "Sort {}.",
                "sort the digits of {}",
                "please sort the digits of {}",
                "sort the digits of {}?",
            )
        )
        row = "".join(items) if digits > 1 else "".join(items * 2)
        return form.format(row), "".join(sorted(row))
    join = rng.choice((" ", " ", ", ", ","))
    if rng.random() < 0.1:
        items[rng.randrange(len(items))] += rng.choice("0123456789")
        items.append(rng.choice("0123456789"))
    asked = rng.choice(LIST).format(join.join(items))
    return asked, " ".join(sorted(items)) if max(map(len, items)) == 1 else traces.SINGLE_DIGITS


def ask(rng: random.Random, expression: str) -> str:
    return rng.choice(ASK).format(expression)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "comparison": comparison,
    "reversal": reversal,
    "sorting": sorting,
}


if __name__ == "__main__":
    rng = random.Random(0)
    for name, task in TASKS.items():
        for digits in (1, 3, 10):
            message, answer = task(rng, digits)
            trace = traces.solve(message)
            print(f"{name}: {message!r} -> {answer!r}, {len(trace.tokens)} tokens")
            if digits == 3:
                print(" ".join(trace.tokens))
