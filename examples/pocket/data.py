"""Tasks for the pointer memory in the ways that people write them, and their answers by Python.

`python -m examples.pocket.data` prints some of each kind with their traces.
"""

import random
from collections.abc import Callable

from . import traces

Sample = tuple[str, str]  # message, answer

LETTERS = "abcdefghijklmnopqrstuvwxyz"

# How a question is asked about "12 + 34", and what may stand around it and around a request.
ASK = (
    "{}",
    "{}",
    "{}?",
    "{}=",
    "{} =",
    "what is {}?",
    "what's {}",
    "whats {}?",
    "what does {} equal?",
    "how much is {}?",
    "calculate {}",
    "compute {}.",
    "work out {}",
    "solve {}",
    "evaluate: {}",
    "tell me {}",
)
LIST = ("sort {}", "sort: {}", "sort these: {}", "sort the numbers {}", "sort {} please")
GREETINGS = ("hey, ", "hey ", "hello, ", "hi ", "ok, ", "so ", "ok ")
POLITE = ("please ", "can you ", "could you ", "pls ", "would you ", "can you please ")


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
        (f"add {a} and {b}", f"add {a} to {b}", f"sum of {a} and {b}", f"what is the sum of {a} and {b}?")
    )
    return polite(rng, asked if rng.random() < 0.7 else told), str(int(a) + int(b))


def subtraction(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    asked = ask(rng, f"{a}{rng.choice(('-', ' - ', ' minus '))}{b}")
    told = rng.choice((f"subtract {b} from {a}", f"take {b} from {a}"))
    return polite(rng, asked if rng.random() < 0.7 else told), str(int(a) - int(b))


def multiplication(rng: random.Random, digits: int) -> Sample:
    """Of a number and one digit, in either order."""
    a, b = number(rng, digits), number(rng, 1)
    if rng.random() < 0.3:
        a, b = b, a
    asked = ask(rng, f"{a}{rng.choice(('*', ' * ', ' x ', 'x', ' times '))}{b}")
    told = rng.choice((f"multiply {a} by {b}", f"what is the product of {a} and {b}?"))
    return polite(rng, asked if rng.random() < 0.7 else told), str(int(a) * int(b))


def sign_between(a: str, b: str) -> str:
    """ "<", "=" or ">"."""
    return "=<>"[(int(a) < int(b)) + 2 * (int(a) > int(b))]


def comparison(rng: random.Random, digits: int) -> Sample:
    a, b = pair(rng, digits)
    sign = sign_between(a, b)
    kind = rng.randrange(3)
    if kind == 0:
        join = rng.choice((f"{a} and {b}", f"{a} with {b}", f"{a} to {b}", f"{a}, {b}"))
        return polite(rng, f"compare {join}"), f"{a} {sign} {b}"
    large = rng.random() < 0.5
    word = rng.choice(("bigger", "larger", "greater") if large else ("smaller", "less"))
    if kind == 1:
        join = rng.choice((f", {a} or {b}?", f": {a} or {b}", f", {a} or {b}"))
        best = a if (sign == ">") == large else b
        start = rng.choice(("which is", "what is", "which number is", "which one is"))
        return polite(rng, f"{start} {word}{join}"), best if sign != "=" else traces.EQUAL
    middle = rng.choice((f" {word} than ", " > " if large else " < ", ">" if large else "<"))
    asked = rng.choice(("is {}?", "is {}")).format(f"{a}{middle}{b}")
    return polite(rng, asked), "yes" if sign == ("> " if large else "< ")[0] else "no"


def reversal(rng: random.Random, digits: int) -> Sample:
    a = number(rng, digits)
    if rng.random() < 0.3:
        asked = rng.choice(("what is {} reversed?", "{} reversed", "{} backwards", "say {} backwards"))
        return polite(rng, asked.format(a)), a[::-1]
    what = "number"
    if rng.random() < 0.6:
        letters = rng.choice((LETTERS, LETTERS, LETTERS.upper(), "aeioulnrst", LETTERS + "0123456789"))
        a, what = "".join(rng.choices(letters, k=digits)), rng.choice(("word", "string"))
    form = rng.choice(("reverse {}", "reverse {}", "reverse the {what} {}", "reverse: {}", "reverse {}?"))
    message, answer = polite(rng, form.format(a, what=what)), a[::-1]
    return message, answer.upper() if message.isupper() else answer


def sorting(rng: random.Random, digits: int) -> Sample:
    items = list(number(rng, digits))
    if rng.random() < 0.5:
        form = rng.choice(("sort {}", "sort the digits of {}", "sort the digits of {}?"))
        row = "".join(items) if digits > 1 else "".join(items * 2)
        return polite(rng, form.format(row)), "".join(sorted(row))
    join = rng.choice((" ", " ", ", ", ","))
    if rng.random() < 0.1:
        items[rng.randrange(len(items))] += rng.choice("0123456789")
        items.append(rng.choice("0123456789"))
    asked = polite(rng, rng.choice(LIST).format(join.join(items)))
    return asked, " ".join(sorted(items)) if max(map(len, items)) == 1 else traces.SINGLE_DIGITS


def logic(rng: random.Random, gates: int) -> Sample:
    """A logic graph: "1a0b1c1d;a&b>c;c^d>a", and what its last gate gives.

    Four wires begin with a value; each gate puts the "and" (&), "or" (|) or "exclusive or" (^) of two wires
    on one. A wire is set again and again: a graph of any size has four names in it, and a gate is fed the
    last value under a name.
    """
    values = {wire: rng.randrange(2) for wire in "abcd"}
    message, result = "".join(f"{value}{wire}" for wire, value in values.items()), 0
    for _ in range(gates):
        (first, second), gate, to = rng.sample("abcd", 2), rng.choice("&|^"), rng.choice("abcd")
        result = values[to] = traces.GATES[gate](values[first], values[second])
        message += f";{first}{gate}{second}>{to}"
    return message, str(result)


def polite(rng: random.Random, message: str) -> str:
    """A message with what people put around it, in their cases."""
    if rng.random() < 0.15 and message[0].isalpha() and not message.startswith(("wh", "how", "is")):
        message = rng.choice(POLITE) + message
    if rng.random() < 0.05:
        message = rng.choice(GREETINGS) + message
    if message[-1].isalnum() and rng.random() < 0.1:
        message += rng.choice(".?!")
    kind = rng.random()
    if kind < 0.03:
        return message.upper()
    return message[0].upper() + message[1:] if kind < 0.35 else message


def ask(rng: random.Random, expression: str) -> str:
    return rng.choice(ASK).format(expression)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    task.__name__: task
    for task in (addition, subtraction, multiplication, comparison, reversal, sorting, logic)
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
