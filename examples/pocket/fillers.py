"""What stands in the braces of phrasings.txt: a text, and the plainest text that means the same."""

import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from mlx_pararnn.pocket.date_words import MONTHS, WEEKDAYS
from mlx_pararnn.pocket.number_words import ORDINALS, SMALL, TENS

FOLDER = Path(__file__).parent
RELATIVE_DAYS = (
    "tomorrow",
    "tonight",
    "today",
    "tomorrow morning",
    "tomorrow evening",
    "this evening",
    "this afternoon",
    "the day after tomorrow",
)
Filler = Callable[[random.Random], tuple[str, str]]

_SMALL = [*SMALL]
_TENS = ["zero", "ten", *TENS]
_MONTHS = [month.capitalize() for month in MONTHS]
_WEEKDAYS = [day.capitalize() for day in WEEKDAYS]
_ORDINALS = [*ORDINALS][:12]
# Of a quantity, its units as people write them, and the plain name of each.
_MEASURES = (
    {"km": "kilometer", "kilometers": "kilometer", "kilometres": "kilometer", "miles": "mile", "mi": "mile",
     "meters": "meter", "metres": "meter", "feet": "foot", "ft": "foot", "inches": "inch", "yards": "yard",
     "cm": "centimeter", "centimeters": "centimeter", "mm": "millimeter"},
    {"kg": "kilogram", "kilos": "kilogram", "kilograms": "kilogram", "pounds": "pound", "lbs": "pound",
     "ounces": "ounce", "oz": "ounce", "grams": "gram", "g": "gram", "stone": "stone", "tons": "ton"},
    {"liters": "liter", "litres": "liter", "gallons": "gallon", "cups": "cup", "pints": "pint",
     "ml": "milliliter",
     "tablespoons": "tablespoon", "teaspoons": "teaspoon", "quarts": "quart",
     "milliliters": "milliliter"},
    {"celsius": "celsius", "fahrenheit": "fahrenheit", "degrees celsius": "celsius",
     "degrees fahrenheit": "fahrenheit", "f": "fahrenheit", "c": "celsius", "kelvin": "kelvin"},
    {"minutes": "minute", "hours": "hour", "seconds": "second", "days": "day", "weeks": "week"},
    {"km/h": "km/h", "mph": "mph", "kmh": "km/h", "miles per hour": "mph",
     "knots": "knot", "m/s": "m/s", "kilometers per hour": "km/h"},
    {"acres": "acre", "hectares": "hectare", "square feet": "square foot",
     "square meters": "square meter"},
    {"mb": "megabyte", "gb": "gigabyte", "megabytes": "megabyte", "gigabytes": "gigabyte",
     "kilobytes": "kilobyte"},
)  # fmt: skip


@cache
def sections(file: str | Path) -> dict[str, list[str]]:
    """The lines under each heading of a file, of one in this folder by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (FOLDER / file).read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            lines = found.setdefault(heading[1], [])
        elif line.strip() and not line.startswith("#"):
            lines.append(line.strip())
    return found


def in_words(n: int) -> str:
    """A whole number below a million in words."""
    if n >= 1000:
        rest = n % 1000
        return f"{in_words(n // 1000)} thousand" + (
            f" {'and ' * (rest < 100)}{in_words(rest)}" if rest else ""
        )
    if n >= 100:
        return f"{_SMALL[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    if n < 20:
        return _SMALL[n]
    return _TENS[n // 10] + (f"-{_SMALL[n % 10]}" if n % 10 else "")


def _number(rng: random.Random, n: int) -> str:
    """In digits or in words."""
    words = in_words(n)
    return rng.choice((words, words.replace("-", " "))) if n < 100 and rng.random() < 0.4 else str(n)


def _duration(rng: random.Random) -> tuple[str, str]:
    """How long a timer runs."""
    kind = rng.random()
    if kind < 0.1:
        text, seconds = rng.choice(
            (("an hour", 3600), ("half an hour", 1800), ("a minute", 60), ("an hour and a half", 5400),
             ("a quarter of an hour", 900), ("a half hour", 1800), ("one and a half hours", 5400),
             ("two and a half minutes", 150), ("half a minute", 30), ("1.5 hours", 5400),
             ("a couple of minutes", 120))
        )  # fmt: skip
        return text, f"{seconds} seconds"
    n = rng.choice((rng.randint(1, 12), 5 * rng.randint(1, 12), rng.randint(1, 99)))
    units = {
        60: ("minute", "min", "minutes", "minutes", "mins", "m"),
        1: ("second", "sec", "seconds", "secs", "s"),
        3600: ("hour", "hr", "hours", "hrs", "h"),
    }
    size = rng.choice((60, 60, 60, 1, 3600))
    unit = units[size][0] if n == 1 else rng.choice(units[size][1:])
    number = _number(rng, n)
    space = " " if not number[-1].isdigit() or rng.random() < 0.85 or len(unit) > 3 else ""
    if kind < 0.2 and size != 1:
        more = rng.choice((15, 30, 45, 20, rng.randint(1, 59)))
        smaller = rng.choice(units[size // 60][2:])
        joined = rng.choice((" ", " and ", " and ", ", "))
        return (
            f"{number} {unit}{joined}{_number(rng, more)} {smaller}",
            f"{n * size + more * size // 60} seconds",
        )
    if kind < 0.3:
        return f"{number}{rng.choice('- ')}{units[size][0]}", f"{n * size} seconds"
    return f"{number}{space}{unit}", f"{n * size} seconds"


def _days(rng: random.Random) -> tuple[str, str]:
    """How long before or after a date."""
    unit = rng.choice(("day", "day", "day", "week", "week", "month", "year"))
    n = (
        rng.randint(1, 12)
        if unit in ("month", "year")
        else rng.choice((rng.randint(1, 20), rng.randint(10, 999)))
    )
    if n == 1:
        return f"{rng.choice(('a', 'one', '1'))} {unit}", f"1 {unit}"
    return f"{_number(rng, n)} {unit}s", f"{n} {unit}s"


def _time(rng: random.Random) -> tuple[str, str]:
    """A time of day. The plain form keeps what is said of its half of the day."""
    kind = rng.random()
    hour = rng.randint(1, 12)
    if kind < 0.08:
        return rng.choice((("noon", "12:00 pm"), ("midnight", "12:00 am"), ("midday", "12:00 pm")))
    if kind < 0.2:
        said, minute, back = rng.choice(
            (("half past", 30, 0), ("quarter past", 15, 0), ("a quarter to", 45, 1), ("ten to", 50, 1),
             ("quarter to", 45, 1), ("ten past", 10, 0), ("twenty past", 20, 0), ("5 past", 5, 0))
        )  # fmt: skip
        return f"{said} {_number(rng, hour)}", f"{(hour - 1 - back) % 12 + 1}:{minute:02}"
    if kind < 0.28:
        hour, minute = rng.choice((0, *range(13, 24))), rng.randint(0, 59)
        return f"{hour}:{minute:02}", f"{hour}:{minute:02}"
    minute = rng.choice((0, 0, 0, 15, 30, 45, rng.randint(1, 59)))
    half = rng.choice(("", "am", "pm"))
    said = {"": "", "am": rng.choice(("am", " am", " a.m.", "AM", " in the morning")),
            "pm": rng.choice(("pm", " pm", " p.m.", " PM", " in the evening"))}[half]  # fmt: skip
    if minute:
        clock = (
            f"{hour}:{minute:02}" if kind < 0.75 else f"{in_words(hour)} {in_words(minute).replace('-', ' ')}"
        )
        if minute < 10 and kind >= 0.75:
            clock = f"{hour}:{minute:02}"
    else:
        clock = _number(rng, hour)
        said = said or rng.choice(("", "", " o'clock"))
    if said and not clock[-1].isdigit() and said[0] != " ":
        said = f" {said}"
    return f"{clock}{said}", f"{hour}:{minute:02} {half}".strip()


def _in(rng: random.Random) -> tuple[str, str]:
    text, plain = _duration(rng)
    return f"in {text}", f"in {plain}"


def _day(rng: random.Random) -> tuple[str, str]:
    """The day of an alarm or reminder."""
    if rng.random() < 0.6:
        text = rng.choice(("tomorrow", *RELATIVE_DAYS))
        return text, text
    return _weekday(rng)


def _weekday(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.7:
        day = rng.choice(_WEEKDAYS)
        text = rng.choice((day, day.lower(), day, f"next {day}", f"{day} morning", f"{day} evening"))
        return text, text
    return _month_and_day(rng)


def _month_and_day(rng: random.Random) -> tuple[str, str]:
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    name = rng.choice((_MONTHS[month - 1], _MONTHS[month - 1].lower(), _MONTHS[month - 1][:3]))
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    shapes = [
        f"{day} {name}",
        f"{name} {day}",
        f"{name} {day}{ending}",
        f"{day}{ending} of {name}",
        f"{day}{ending} {name}",
    ]
    if day <= 12:
        shapes.append(f"the {_ORDINALS[day - 1]} of {name}")
    return rng.choice(shapes), f"{_MONTHS[month - 1]} {day}"


def _date(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.2:
        named = rng.choice(
            (("christmas", "December 25"), ("Christmas", "December 25"), ("new year", "January 1"),
             ("halloween", "October 31"), ("christmas eve", "December 24"), ("new year's eve", "December 31"),
             ("valentine's day", "February 14"), ("new years day", "January 1"))
        )  # fmt: skip
        return named
    if kind < 0.27:
        day = rng.choice(_WEEKDAYS)
        return rng.choice((day, day.lower(), f"next {day}")), day
    if kind < 0.3:
        return ("tomorrow", "tomorrow")
    text, plain = _month_and_day(rng)
    if kind < 0.5:
        year = rng.randint(1950, 2060)
        return f"{text}{rng.choice((' ', ', '))}{year}", f"{plain} {year}"
    if kind < 0.55:
        year, month, day = rng.randint(1950, 2060), rng.randint(1, 12), rng.randint(1, 28)
        return f"{year}-{month:02}-{day:02}", f"{_MONTHS[month - 1]} {day} {year}"
    return text, plain


def _as_it_is(section: str) -> Filler:
    def filler(rng: random.Random) -> tuple[str, str]:
        text = made_up(rng) if rng.random() < 0.1 else rng.choice(sections("vocabulary.txt")[section])
        return text, text

    return filler


def made_up(rng: random.Random) -> str:
    """A word of no language: what is copied is not to be known by heart."""
    syllables = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", *"nrstl"))
        for _ in range(3)
    )
    return "".join(list(syllables)[: rng.randint(1, 3)])


def _items(rng: random.Random) -> tuple[str, str]:
    item = _as_it_is("item")
    found = [item(rng)[0] for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3)))]
    text = found[0]
    if len(found) > 1:
        text = f"{', '.join(found[:-1])}{rng.choice((' and ', ' and ', ', '))}{found[-1]}"
    return text, text


def _text(rng: random.Random) -> tuple[str, str]:
    words = sections("vocabulary.txt")
    kind = rng.random()
    if kind < 0.4:
        text = f"{rng.choice(words['verb'])} {rng.choice(words['somebody'])}"
        if rng.random() < 0.3:
            text += f" about {_as_it_is('item')(rng)[0]}"
    elif kind < 0.5:
        text = f"{rng.choice(('buy', 'get', 'find', 'order', 'bring', 'make'))} {_items(rng)[0]}"
    elif kind < 0.6:
        text = f"{rng.choice(words['verb'])} {made_up(rng)}"
    else:
        text = rng.choice(words["chore"])
    return text, text


def _about(rng: random.Random) -> tuple[str, str]:
    """What a reminder is about that is no deed."""
    event = rng.choice(
        ("meeting", "dentist", "appointment", "interview", "party", "deadline", "lesson", "match", "concert",
         "rent", "exam", "vet", "delivery", "homework", "laundry", "bins", "medicine", "bill", "visit")
    )  # fmt: skip
    text = f"{rng.choice(('the', 'my', 'our'))} {event}"
    if rng.random() < 0.3:
        text += f" {rng.choice(('with', 'for', 'at'))} {_as_it_is('name')(rng)[0]}"
    return text, text


def conversion(rng: random.Random) -> dict[str, Filler]:
    """An amount, and a unit into which it can be converted."""
    units = rng.choice(_MEASURES)
    unit = rng.choice(list(units))
    to = rng.choice([name for name, plain in units.items() if plain != units[unit]])

    def amount(rng: random.Random) -> tuple[str, str]:
        plain = units[unit]
        if rng.random() < 0.12 and unit == f"{plain}s":
            return f"{'an' if plain[0] in 'aeiou' or plain == 'hour' else 'a'} {plain}", f"1 {plain}"
        n = rng.choice((rng.randint(1, 12), rng.randint(1, 100), rng.randint(100, 5000)))
        if rng.random() < 0.2:
            decimal = f"{n}.{rng.randint(1, 9)}"
            return f"{decimal} {unit}", f"{decimal} {plain}"
        number = _number(rng, n)
        space = "" if number.isdigit() and rng.random() < 0.15 and len(unit) < 4 else " "
        return f"{number}{space}{unit}", f"{n} {plain}"

    return {"amount": amount, "to": lambda rng: (to, to)}


def _expression(rng: random.Random) -> tuple[str, str]:
    return signs(rng) if rng.random() < 0.4 else _arithmetic(rng)


def signs(rng: random.Random) -> tuple[str, str]:
    """Numbers of any length with signs between them."""
    a, b, c = (rng.randint(1, 10 ** rng.choice((1, 2, 3, 3, 4, 6, rng.randint(1, 12)))) for _ in range(3))
    d, e = f"{a}.{b}", f"{c % 100}.{a % 1000}"
    if rng.random() < 0.45:
        return rng.choice(
            ((f"{a:,} + {b:,}", f"{a}+{b}"), (f"{a:,} - {b}", f"{a}-{b}"), (f"{a:,}+{b}", f"{a}+{b}"),
             (f"-{a} + {b}", f"-{a}+{b}"), (f"-{a} - {b}", f"-{a}-{b}"), (f"-{a} + -{b}", f"-{a}-{b}"),
             (f"{a} + -{b}", f"{a}-{b}"), (f"{a} - -{b}", f"{a}+{b}"), (f"-{a} * {b}", f"-{a}*{b}"),
             (f"{a} * -{b}", f"-{a}*{b}"), (f"-{a}+{b}", f"-{a}+{b}"), (f"-{a}-{b}", f"-{a}-{b}"),
             (f"{a} + (-{b})", f"{a}-{b}"), (f"-{a} / {b}", f"-{a}/{b}"),
             (f"{d} + {e}", f"{d}+{e}"), (f"{d} - {e}", f"{d}-{e}"), (f"{d}+{c}", f"{d}+{c}"),
             (f"{a} - {e}", f"{a}-{e}"), (f"{d} * {b % 10}", f"{d}*{b % 10}"), (f"{a} + .{b}", f"{a}+0.{b}"),
             (f"{a}^{b % 9}", f"{a}**{b % 9}"), (f"({a} - {b}) / {c}", f"({a}-{b})/{c}"),
             (f"({a} + {b}) * {c}", f"({a}+{b})*{c}"), (f"{a} + {b} + {c} + {b}", f"{a}+{b}+{c}+{b}"))
        )  # fmt: skip
    signs = (("*", "*"), ("x", "*"), ("times", "*"), ("multiplied by", "*"), ("+", "+"), ("plus", "+"),
             ("-", "-"), ("minus", "-"), ("/", "/"), ("divided by", "/"), ("over", "/"))  # fmt: skip
    (sign, plain), (other, other_plain) = rng.choice(signs[:8] + signs), rng.choice(signs)
    space = " " if len(sign) > 1 or rng.random() < 0.7 else ""
    text, meant = f"{a}{space}{sign}{space}{b}", f"{a}{plain}{b}"
    if rng.random() < 0.25:
        space = " " if len(other) > 1 or space else ""
        return f"{text}{space}{other}{space}{c}", f"{meant}{other_plain}{c}"
    return text, meant


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 20), rng.randint(1, 20)
    if rng.random() < 0.3:
        a, b = rng.choice((rng.randint(20, 999), 10 * rng.randint(2, 99))), rng.randint(2, 200)
    x, y = in_words(a), in_words(b)
    if rng.random() < 0.3:
        x, y = x.replace("-", " "), y.replace("-", " ")
    d, e = rng.randint(1, 999), rng.randint(1, 99)
    f, g = f"{rng.randint(0, 99)}.{rng.randint(1, 99)}", f"{rng.randint(0, 99)}.{rng.randint(1, 99)}"
    return rng.choice(
        (
            (f"{x} plus {y}", f"{a}+{b}"), (f"{x} plus {y}", f"{a}+{b}"), (f"{x} minus {y}", f"{a}-{b}"),
            (f"{x} times {y}", f"{a}*{b}"), (f"{x} multiplied by {y}", f"{a}*{b}"),
            (f"{x} divided by {y}", f"{a}/{b}"), (f"{x} over {y}", f"{a}/{b}"),
            (f"the sum of {x} and {y}", f"{a}+{b}"), (f"the product of {x} and {y}", f"{a}*{b}"),
            (f"half of {y}", f"{b}/2"), (f"twice {x}", f"2*{a}"), (f"a third of {y}", f"{b}/3"),
            (f"{d} divided by {e}", f"{d}/{e}"), (f"{d} / {e}", f"{d}/{e}"), (f"{d}/{e}", f"{d}/{e}"),
            (f"{e}% of {d}", f"{e}*{d}/100"), (f"{e} percent of {d}", f"{e}*{d}/100"),
            (f"{y} percent of {d}", f"{b}*{d}/100"), (f"the square root of {d}", f"sqrt({d})"),
            (f"the square root of {y}", f"sqrt({b})"), (f"{e} squared", f"{e}*{e}"),
            (f"{y} squared", f"{b}*{b}"),
            (f"{b} to the power of {e % 7}", f"{b}**{e % 7}"), (f"{b}^{e % 7}", f"{b}**{e % 7}"),
            (f"{f} + {g}", f"{f}+{g}"), (f"{f} - {g}", f"{f}-{g}"), (f"{f} times {e}", f"{f}*{e}"),
            (f"({e} + {b}) * {d}", f"({e}+{b})*{d}"), (f"{x} plus {y} plus {in_words(e)}", f"{a}+{b}+{e}"),
        )
    )  # fmt: skip


FILLERS: dict[str, Filler] = {
    "duration": _duration,
    "date_after duration": _days,
    "date_before duration": _days,
    "name": _as_it_is("name"),
    "time": _time,
    "in": _in,
    "day": _day,
    "weekday": _weekday,
    "date": _date,
    "start": _date,
    "end": _date,
    "text": _text,
    "about": _about,
    "items": _items,
    "list": _as_it_is("list"),
    "expression": _expression,
}
