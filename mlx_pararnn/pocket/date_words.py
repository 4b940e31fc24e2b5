"""Durations, dates and times of day as people write them, by fixed rules; see `number_words`."""

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from fractions import Fraction
from typing import TypeVar

from .number_words import ORDINALS, NotUnderstood, amounts, nearest, read_number, split_words

MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_SHORT_WEEKDAYS = {"tues": "tuesday", "thur": "thursday", "thurs": "thursday", "weds": "wednesday"}
HOLIDAYS = {
    "christmas": (12, 25),
    "christmas day": (12, 25),
    "xmas": (12, 25),
    "christmas eve": (12, 24),
    "new year": (1, 1),
    "new year's": (1, 1),
    "new year's day": (1, 1),
    "new year's eve": (12, 31),
    "halloween": (10, 31),
    "valentine's day": (2, 14),
    "valentine's": (2, 14),
    "st patrick's day": (3, 17),
}
_RELATIVE_DAYS = {
    "today": 0, "now": 0, "tonight": 0, "tomorrow": 1, "tmrw": 1, "yesterday": -1, "day after tomorrow": 2,
    "day before yesterday": -2,
}  # fmt: skip
# Of each unit of time: what it is counted in, and how many of that.
UNITS = {
    "second": ("seconds", 1), "sec": ("seconds", 1), "s": ("seconds", 1), "minute": ("seconds", 60),
    "min": ("seconds", 60), "m": ("seconds", 60), "hour": ("seconds", 3600), "hr": ("seconds", 3600),
    "h": ("seconds", 3600), "day": ("days", 1), "d": ("days", 1), "week": ("days", 7), "wk": ("days", 7),
    "fortnight": ("days", 14), "month": ("months", 1), "year": ("months", 12), "yr": ("months", 12),
    "decade": ("months", 120), "century": ("months", 1200),
}  # fmt: skip
# Parts of the day: which half they are in, and when they begin if no time is given.
_PARTS = {"morning": ("am", 9), "afternoon": ("pm", 15), "evening": ("pm", 19), "night": ("pm", 20)}
_At = TypeVar("_At", date, datetime)
_OUTSIDE = "That is outside the years 1 to 9999."


@dataclass(frozen=True)
class Duration:
    """A length of time in whole months, days and seconds, which are not converted into each other."""

    months: int = 0
    days: int = 0
    seconds: int = 0

    def total_seconds(self) -> int:
        """All of it in seconds.

        Raises:
            NotUnderstood: it has months, which are not all equally long.
        """
        if self.months:
            raise NotUnderstood("I can count days, hours, minutes and seconds, but not months or years.")
        return self.days * 86400 + self.seconds

    def from_date(self, start: date, sign: int = 1) -> date:
        """The date this long after `start`, or before it with `sign` -1.

        Where the month is too short for the day, it is the month's last.
        """
        if self.seconds % 86400:
            raise NotUnderstood("I can add days, weeks, months and years to a date, but not hours.")
        year, month = divmod(start.year * 12 + start.month - 1 + sign * self.months, 12)
        try:
            day = min(start.day, monthrange(year, month + 1)[1])
            days = timedelta(days=self.days + self.seconds // 86400)
            return date(year, month + 1, day) + sign * days
        except (ValueError, OverflowError):
            raise NotUnderstood(_OUTSIDE) from None

    def __str__(self) -> str:
        years, months = divmod(self.months, 12)
        minutes, seconds = divmod(self.seconds, 60)
        hours, minutes = divmod(minutes, 60)
        weeks, days = divmod(self.days, 7) if self.days % 7 == 0 else (0, self.days)
        units = {"year": years, "month": months, "week": weeks, "day": days}
        units |= {"hour": hours, "minute": minutes, "second": seconds}
        return join([count(value, unit) for unit, value in units.items() if value]) or "0 seconds"


def duration(text: str) -> Duration:
    """A length of time: "5 minutes", "1h30", "an hour and a half", "2 weeks", "ten-minute"."""
    sentence = f"I do not understand the duration '{text}'."
    totals = {"months": Fraction(), "days": Fraction(), "seconds": Fraction()}
    previous = None
    try:
        for value, word in amounts(text):
            unit = _unit(word) or ("minute" if not word and previous in ("hour", "hr", "h") else None)
            if unit is None:
                raise NotUnderstood(sentence)
            counted_in, size = UNITS[unit]
            totals[counted_in] += value * size
            previous = unit
    except NotUnderstood:
        raise NotUnderstood(sentence) from None
    whole_days = Fraction(totals["days"].__floor__())
    totals["seconds"] += (totals["days"] - whole_days) * 86400
    totals["days"] = whole_days
    if any(value.denominator != 1 for value in totals.values()) or not any(totals.values()):
        raise NotUnderstood(sentence)
    return Duration(**{counted_in: int(value) for counted_in, value in totals.items()})


def moment(text: str, day: str, now: datetime) -> datetime:
    """The next moment that a time of day and a day mean.

    Args:
        text: "7", "7:30 pm", "half past six", "noon", "9 in the morning", "in 20 minutes"; empty for the
            beginning of the part of the day in `day`, or nine in the morning.
        day: "tomorrow", "tonight", "monday morning", "3 March"; empty for the next such time.
        now: the clock.

    An hour from 1 to 12 with neither am nor pm is the next of the two; on a given day it is am from 6 to 11,
    else pm.
    """
    words = split_words(text)
    length = _length_from_now(words)
    if length is not None and not day:
        return _shifted(now, seconds=length.total_seconds())
    half, begins, words = _part_of_day(words)
    day_half, day_begins, day_words = _part_of_day(split_words(day))
    if day_half and not day_words:
        day_words = ["today"]
    half = half or day_half
    if words:
        hour, minute, sure = _clock_time(words, half, text)
    else:
        hour, minute, sure = begins or day_begins or 9, 0, True
    if day_words:
        on = calendar_date(" ".join(day_words), now.date())
        if not sure and not 6 <= hour <= 11:
            hour = hour % 12 + 12
        return datetime.combine(on, time(hour, minute))
    hours = [hour] if sure else [hour % 12, hour % 12 + 12]
    today = [datetime.combine(now.date(), time(hour, minute)) for hour in hours]
    return next(at for at in [*today, _shifted(today[0], days=1)] if at > now)


def times_of_day(text: str, now: datetime) -> list[time]:
    """The times that a text may mean: "7:30" 07:30 and then 19:30, "7:30 pm" 19:30 alone."""
    words = split_words(text)
    if (length := _length_from_now(words)) is not None:
        at = _shifted(now, seconds=length.total_seconds())
        return [time(at.hour, at.minute)]
    half, begins, words = _part_of_day(words)
    hour, minute, sure = _clock_time(words, half, text) if words else (begins or 9, 0, True)
    return [time(hour, minute)] if sure else [time(hour, minute), time((hour + 12) % 24, minute)]


def calendar_date(text: str, today: date, *, past: bool = False) -> date:
    """A date: "3 March", "march 3rd 2027", "2027-03-03", "christmas", "tomorrow", "next friday", "in 3 days".

    Without a year it is the next such date, today included; with `past`, the last one.
    """
    sentence = f"I do not understand the date '{text}'."
    if iso := re.fullmatch(r"\s*(\d{4})-(\d{1,2})-(\d{1,2})\s*", text):
        return _date(int(iso[1]), int(iso[2]), int(iso[3]), sentence)
    if slashed := re.fullmatch(r"\s*(\d{1,2})/(\d{1,2})(?:/(\d{4}))?\s*", text):
        return _slashed_date([int(part) for part in slashed.groups() if part], today, past, sentence)
    words = [word for word in split_words(text) if word not in ("on", "the", "of")]
    plain = " ".join(words)
    if found := nearest(plain, _RELATIVE_DAYS):
        return _shifted(today, days=_RELATIVE_DAYS[found])
    if found := nearest(re.sub(r"\b(new year|valentine|patrick)s\b", r"\1's", plain), HOLIDAYS):
        return _without_year(*HOLIDAYS[found], today, past)
    if (length := _length_from_now(words)) is not None:
        return length.from_date(today)
    if words[-1:] == ["ago"]:
        return duration(" ".join(words[:-1])).from_date(today, -1)
    if (
        words
        and (weekday := _weekday(words[-1])) is not None
        and words[:-1] in ([], ["next"], ["this"], ["last"])
    ):
        back = past or words[0] == "last"
        days = (today.weekday() - weekday - 1) % 7 + 1 if back else (weekday - today.weekday() - 1) % 7 + 1
        return _shifted(today, days=-days if back else days)
    return _day_and_month(words, today, past, sentence)


def date_in_words(day: date) -> str:
    """ "Monday, 1 June 2026"."""
    return f"{WEEKDAYS[day.weekday()].title()}, {day.day} {MONTHS[day.month - 1].title()} {day.year}"


def count(value: int, unit: str) -> str:
    """ "1 day", "2 days"."""
    return f"{value} {unit}" + ("" if value == 1 else "s")


def join(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _unit(word: str) -> str | None:
    if word in UNITS:
        return word
    if word == "centuries":
        return "century"
    if word.endswith("s") and word[:-1] in UNITS:
        return word[:-1]
    return nearest(word.removesuffix("s"), UNITS) or nearest(word, UNITS)


def _length_from_now(words: list[str]) -> Duration | None:
    """ "in 20 minutes", "20 minutes from now"."""
    if words[:1] == ["in"]:
        return duration(" ".join(words[1:]))
    if words[-2:] in (["from", "now"], ["from", "today"]):
        return duration(" ".join(words[:-2]))
    return None


def _part_of_day(words: list[str]) -> tuple[str | None, int | None, list[str]]:
    """The half of the day, the hour at which its named part begins, and the words without it."""
    if words[-1:] in (["am"], ["pm"]):
        return words[-1], None, words[:-1]
    if words[-1:] == ["tonight"]:
        return *_PARTS["night"], words[:-1]
    if words and words[-1] in _PARTS:
        rest = words[:-1]
        for filler in (["in", "the"], ["at"], ["this"]):
            if rest[-len(filler) :] == filler:
                rest = rest[: -len(filler)]
        return *_PARTS[words[-1]], rest
    return None, None, words


def _clock_time(words: list[str], half: str | None, text: str) -> tuple[int, int, bool]:
    """Hour, minute, and whether it is sure which half of the day is meant."""
    words = [
        word for word in words if word not in ("at", "around", "about", "by", "o'clock", "oclock", "sharp")
    ]
    if words in (["noon"], ["midday"]):
        return 12, 0, True
    if words == ["midnight"]:
        return 0, 0, True
    found = _hour_and_minute(words)
    if found is None or found[0] > 23 or found[1] > 59:
        raise NotUnderstood(f"I do not understand the time '{text}'.")
    hour, minute = found
    if half and 1 <= hour <= 12:
        return hour % 12 + (12 if half == "pm" else 0), minute, True
    return hour, minute, half is not None or not 1 <= hour <= 12 or bool(re.match("0", words[0]))


def _hour_and_minute(words: list[str]) -> tuple[int, int] | None:
    if len(words) == 1 and (digits := re.fullmatch(r"(\d{1,2})[:.](\d\d)|(\d{1,2})(\d\d)", words[0])):
        hour, minute = (group for group in digits.groups() if group is not None)
        return int(hour), int(minute)
    for sign, sides in ((1, ("past", "after")), (-1, ("to", "till", "before"))):
        for at, word in enumerate(words):
            if word in sides:
                return _minutes_from_hour(sign, words[:at], words[at + 1 :])
    if words[:1] == ["half"]:  # British: half seven is 7:30
        return _minutes_from_hour(1, ["half"], words[1:])
    first = _small_number(words, 0)
    if first is None:
        return None
    hour, at = first
    if at < len(words) and words[at] in ("oh", "o"):
        at += 1
    second = _small_number(words, at)
    if at == len(words):
        return hour, 0
    return (hour, second[0]) if second is not None and second[1] == len(words) else None


def _minutes_from_hour(sign: int, minutes: list[str], hour: list[str]) -> tuple[int, int] | None:
    """ "quarter to eight": 7, 45."""
    minutes = [word for word in minutes if word not in ("a", "minute", "minutes")]
    named = {"half": 30, "quarter": 15}
    if len(minutes) == 1 and minutes[0] in named:
        length = named[minutes[0]]
    elif (read := _small_number(minutes, 0)) is not None and read[1] == len(minutes):
        length = read[0]
    else:
        return None
    whole = _small_number(hour, 0)
    if whole is None or whole[1] != len(hour) or not 1 <= length <= 59:
        return None
    return (whole[0], length) if sign > 0 else ((whole[0] - 1) % 12 or 12, 60 - length)


def _small_number(words: list[str], at: int) -> tuple[int, int] | None:
    read = read_number(words, at)
    return (int(read[0]), read[1]) if read is not None and read[0].denominator == 1 else None


def _weekday(word: str) -> int | None:
    word = _SHORT_WEEKDAYS.get(word, word)
    found = nearest(word, WEEKDAYS) or next((day for day in WEEKDAYS if day[:3] == word), None)
    return None if found is None else WEEKDAYS.index(found)


def _month(word: str) -> int | None:
    found = nearest(word, MONTHS) or next((month for month in MONTHS if word in (month[:3], month[:4])), None)
    return None if found is None else MONTHS.index(found) + 1


def _day_and_month(words: list[str], today: date, past: bool, sentence: str) -> date:
    """ "3 march 2027", "march 3rd", "twenty first march", "the 5th", "march"."""
    if len(words) > 1 and re.fullmatch(r"\d{4}", words[-1]):
        year, words = int(words[-1]), words[:-1]
    else:
        year = None
    at = next((at for at, word in enumerate(words) if _month(word) is not None), None)
    days = words if at is None else words[:at] + words[at + 1 :]
    if at not in (None, 0, len(words) - 1):
        raise NotUnderstood(sentence)
    day = _day_of_month(days)
    if day is None and (days or at is None):
        raise NotUnderstood(sentence)
    if at is None:
        return _next_day_of_month(day or 1, today, past, sentence)
    month = _month(words[at]) or 1
    if year is not None:
        return _date(year, month, day or 1, sentence)
    return _without_year(month, day or 1, today, past, sentence)


def _day_of_month(words: list[str]) -> int | None:
    if len(words) == 1 and (numeral := re.fullmatch(r"(\d{1,2})(?:st|nd|rd|th)?", words[0])):
        return int(numeral[1])
    tens = {"twenty": 20, "thirty": 30}
    if len(words) == 2 and words[0] in tens and ORDINALS.get(words[1], 10) < 10:
        return tens[words[0]] + ORDINALS[words[1]]
    if words == ["thirtieth"]:
        return 30
    if len(words) == 1 and words[0] in ORDINALS:
        return ORDINALS[words[0]]
    read = _small_number(words, 0)
    return read[0] if read is not None and read[1] == len(words) else None


def _slashed_date(parts: list[int], today: date, past: bool, sentence: str) -> date:
    first, second = parts[:2]
    if first <= 12 and second <= 12 and first != second:
        raise NotUnderstood(f"{sentence[:-1]}: which is the month? Write it as a word, as in 3 March.")
    day, month = (second, first) if second > 12 else (first, second)
    if len(parts) == 3:
        return _date(parts[2], month, day, sentence)
    return _without_year(month, day, today, past, sentence)


def _without_year(month: int, day: int, today: date, past: bool, sentence: str = _OUTSIDE) -> date:
    if not 1 <= month <= 12:
        raise NotUnderstood(sentence)
    for years in range(9):  # 29 February may take eight
        year = today.year + (-years if past else years)
        if not 1 <= year <= 9999 or day > monthrange(year, month)[1]:
            continue
        found = _date(year, month, day, sentence)
        if found <= today if past else found >= today:
            return found
    raise NotUnderstood(sentence)


def _next_day_of_month(day: int, today: date, past: bool, sentence: str) -> date:
    for months in range(3):
        year, month = divmod(today.year * 12 + today.month - 1 + (-months if past else months), 12)
        if 1 <= day <= monthrange(year, month + 1)[1]:
            found = date(year, month + 1, day)
            if found <= today if past else found >= today:
                return found
    raise NotUnderstood(sentence)


def _date(year: int, month: int, day: int, sentence: str) -> date:
    try:
        return date(year, month, day)
    except ValueError:
        raise NotUnderstood(sentence) from None


def _shifted(start: _At, **length: int) -> _At:
    try:
        return start + timedelta(**length)
    except OverflowError:
        raise NotUnderstood(_OUTSIDE) from None
