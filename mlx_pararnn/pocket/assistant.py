"""What the model that ships can do: timers, alarms, reminders, lists, dates, conversions and calculations.

Every argument is a piece of the user's message as it was written; the functions understand it by the rules
of `number_words` and `date_words`. Every result is a sentence for the user. Who wants timers to ring asks
`due` from time to time, as `chat` does; where nobody does, or nothing is remembered, they are refused.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from fractions import Fraction
from typing import Any

from . import date_words
from .date_words import Duration, calendar_date, count, date_in_words, join, moment, times_of_day
from .number_words import NotUnderstood, amounts, formula
from .standard import as_text, calculate, convert_units

_DEFAULT_LIST = "to-do"
FUNCTIONS = (
    "set_timer",
    "cancel_timer",
    "show_timers",
    "set_alarm",
    "cancel_alarm",
    "show_alarms",
    "set_reminder",
    "cancel_reminder",
    "show_reminders",
    "add_to_list",
    "remove_from_list",
    "show_list",
    "clear_list",
    "date_after",
    "date_before",
    "days_until",
    "days_since",
    "days_between",
    "weekday",
    "convert",
    "calculate",
    "time_now",
    "date_today",
)
_ENTRIES = "timers", "alarms", "reminders"
_BELOW_ZERO = re.compile(r"\s*(?:[-−]\s*|(?:minus|negative)\s+)", re.IGNORECASE)
_SQUARES = re.compile(r"(?<=[mti])[23]\b", re.IGNORECASE)  # of "km2"
_SEVERAL = re.compile(r"\b(?:all|both|every\w*|any|each|them|timers|alarms|reminders)\b")
_MOST = 100  # timers, alarms, reminders, and items of all lists


@dataclass(frozen=True)
class _Entry:
    """A timer, an alarm or a reminder."""

    name: str
    at: datetime | None


@dataclass
class Assistant:
    """The functions and what they remember.

    Args:
        now: the clock, in local time and without a time zone.
        rings: whether somebody asks `due`; if not, timers, alarms and reminders are refused.
        keeps: whether there may be a later message to which the lists matter; if not, nothing is put on them.
    """

    now: Callable[[], datetime] = datetime.now
    rings: bool = True
    keeps: bool = True
    told: datetime = field(default=datetime.min, compare=False)  # when `due` was asked last
    timers: list[_Entry] = field(default_factory=list)
    alarms: list[_Entry] = field(default_factory=list)
    reminders: list[_Entry] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def functions(self) -> list[Callable[..., str]]:
        """All functions, for registration."""
        return [getattr(self, name) for name in FUNCTIONS]

    def memory(self) -> str:
        """Timers, alarms, reminders and lists as JSON; "" where there are none."""
        entries = {name: getattr(self, name) for name in _ENTRIES}
        if not any((*entries.values(), self.lists)):
            return ""
        dated = {
            name: [(entry.name, entry.at and entry.at.isoformat()) for entry in kept]
            for name, kept in entries.items()
        }
        return json.dumps({**dated, "lists": self.lists})

    def recall(self, memory: str) -> None:
        """Remember what `memory` gave, and nothing else.

        Raises:
            ValueError: it is something else; nothing is changed then.
        """
        kept = json.loads(memory) if memory != "" else {}
        if not isinstance(kept, dict):
            raise ValueError("not an object")
        entries = {name: [_entry(pair) for pair in _items_of(kept.get(name, []))] for name in _ENTRIES}
        if any(len(found) > _MOST for found in entries.values()):
            raise ValueError("more than there may be")
        lists = kept.get("lists", {})
        if not isinstance(lists, dict) or not all(
            isinstance(item, str) for items in lists.values() for item in _items_of(items)
        ):
            raise ValueError("a list's item is not a text")
        self.lists = lists
        for name, found in entries.items():
            setattr(self, name, found)

    def hear(self, answers: Iterable[str]) -> None:
        """Do again with the lists what earlier answers say was done, where nothing else was kept.

        Args:
            answers: all of a conversation, in their order.
        """
        for answer in answers:
            if parts := _around(answer, "Added ", " to your ", " list."):
                with suppress(NotUnderstood):  # the lists are full: no answer of ours
                    self.add_to_list(*parts)
            elif parts := _around(answer, "Removed ", " from your ", " list."):
                self.remove_from_list(*parts)
            elif parts := _around(answer, "Removed ", " from your ", "lists."):
                self.remove_from_list(parts[0])
            elif parts := _around(answer, "", "Your ", " list is empty now."):
                self.clear_list(parts[1])

    def instead(self, message: str, function: str, arguments: str) -> str | None:
        """What to ask instead of cancelling several things of which a message names none; None to call it.

        Args:
            message: what the user wrote.
            function: its name.
            arguments: JSON.
        """
        kind = f"{function.removeprefix('cancel_')}s"
        if not function.startswith("cancel_") or kind not in _ENTRIES or len(getattr(self, kind)) < 2:
            return None
        with suppress(ValueError, AttributeError):
            if _SEVERAL.search(message.lower()) or any(json.loads(arguments).values()):
                return None
        shown = getattr(self, f"show_{kind}")()
        return f"{shown} Which one shall I cancel? Say all for all of them."

    def due(self) -> list[str]:
        """Sentences for the timers, alarms and reminders whose time has come since it was last asked for.

        They are told once: who recalls an earlier memory is not told of them again.
        """
        now, sentences = self.now(), []
        for kind in _ENTRIES:
            entries = getattr(self, kind)
            over = [(entry.name, entry.at) for entry in entries if entry.at and entry.at <= now]
            sentences += [_due_in_words(kind, name, at) for name, at in over if at > self.told]
            entries[:] = [entry for entry in entries if not (entry.at and entry.at <= now)]
        self.told = now
        return sentences

    def set_timer(self, duration: str, name: str = "") -> str:
        """Start a timer.

        Args:
            duration: how long, as in "5 minutes" or "an hour and a half".
            name: what it is for, as in "pasta".
        """
        length = date_words.duration(duration)
        self._add(self.timers, _Entry(name, self._in(length)), "timers")
        return f"{_named('Timer', name)} set for {length}."

    def cancel_timer(self, name: str = "") -> str:
        """Cancel the timer with a name, or all of them."""
        return self._cancel(self.timers, "timer", name.lower(), lambda entry: entry.name.lower())

    def show_timers(self) -> str:
        """Say how much time is left on the timers."""
        self.timers[:] = [entry for entry in self.timers if entry.at and entry.at > self.now()]
        return self._show(
            "timer", [f"{entry.name or 'timer'}: {self._left(entry)} left" for entry in self.timers]
        )

    def set_alarm(self, time: str, day: str = "") -> str:
        """Set an alarm.

        Args:
            time: time of day, as in "7:30" or "half past six".
            day: as in "tomorrow" or "monday morning"; without it the next such time.
        """
        at = moment(time, day, self.now())
        self._add(self.alarms, _Entry("", at), "alarms")
        return f"Alarm set for {_moment_in_words(at)}."

    def cancel_alarm(self, time: str = "") -> str:
        """Cancel the alarm at a time of day, or all of them."""
        meant = [f"{at:%H:%M}" for at in times_of_day(time, self.now())] if time else [""]
        kept = {f"{entry.at:%H:%M}" for entry in self.alarms}
        named = next((at for at in meant if at in kept), meant[0])
        return self._cancel(self.alarms, "alarm", named, lambda entry: f"{entry.at:%H:%M}")

    def show_alarms(self) -> str:
        """Say which alarms are set."""
        self.alarms[:] = [entry for entry in self.alarms if entry.at and entry.at > self.now()]
        return self._show("alarm", [_moment_in_words(entry.at) for entry in self.alarms if entry.at])

    def set_reminder(self, text: str, time: str = "", day: str = "") -> str:
        """Remember something.

        Args:
            text: what to be reminded of, as in "call mom".
            time: time of day, as in "7:30" or "in 20 minutes".
            day: as in "tomorrow".
        """
        at = moment(time, day, self.now()) if time or day else None
        self._add(self.reminders, _Entry(text, at), "reminders")
        return f"I will remind you: {text}" + (f", {_moment_in_words(at)}." if at else ".")

    def cancel_reminder(self, text: str = "") -> str:
        """Forget the reminder with a text, or all of them."""
        return self._cancel(self.reminders, "reminder", text.lower(), lambda entry: entry.name.lower())

    def show_reminders(self) -> str:
        """Say which reminders there are."""
        texts = [
            entry.name + (f" ({_moment_in_words(entry.at)})" if entry.at else "") for entry in self.reminders
        ]
        return self._show("reminder", texts)

    def add_to_list(self, items: str, list: str = "") -> str:
        """Put items on a list.

        Args:
            items: one or several, as in "milk, eggs and bread".
            list: its name, as in "shopping"; without it the to-do list.
        """
        name = list or _DEFAULT_LIST
        if not self.keeps:
            raise NotUnderstood(
                "I would not remember a list here: mlx-pararnn chat does. "
                "Sums, dates and units work here too."
            )
        new = _items(items)
        if sum(map(len, self.lists.values())) + len(new) > _MOST:
            raise NotUnderstood("The lists are full. Remove something first.")
        self.lists.setdefault(name.lower(), []).extend(new)
        return f"Added {join(new)} to your {name} list."

    def remove_from_list(self, items: str, list: str = "") -> str:
        """Take items off a list, or off all of them if none is named."""
        names = [list.lower()] if list else [*self.lists]
        removed = []
        for item in _items(items):
            for name in names:
                kept = [old for old in self.lists.get(name, []) if old.lower() != item.lower()]
                if len(kept) < len(self.lists.get(name, [])):
                    self.lists[name] = kept
                    removed.append(item)
                    break
        where = f"your {list} list" if list else "your lists"
        return f"Removed {join(removed)} from {where}." if removed else f"There is no {items} on {where}."

    def show_list(self, list: str = "") -> str:
        """Say what is on a list, or on all of them if none is named."""
        names = [list.lower()] if list else [name for name, items in self.lists.items() if items]
        shown = [
            f"{name.capitalize()} list: {', '.join(self.lists[name])}."
            for name in names
            if self.lists.get(name)
        ]
        return " ".join(shown) or f"Your {list or _DEFAULT_LIST} list is empty."

    def clear_list(self, list: str = "") -> str:
        """Empty a list."""
        name = list or _DEFAULT_LIST
        self.lists.pop(name.lower(), None)
        return f"Your {name} list is empty now."

    def date_after(self, duration: str, date: str = "") -> str:
        """The date some time after a date, or after today.

        Args:
            duration: how long, as in "90 days".
            date: as in "3 March".
        """
        start = self._date(date or "today")
        length = date_words.duration(duration)
        return f"{length} after {date_in_words(start)} is {date_in_words(length.from_date(start))}."

    def date_before(self, duration: str, date: str = "") -> str:
        """The date some time before a date, or before today.

        Args:
            duration: how long, as in "90 days".
            date: as in "3 March".
        """
        start = self._date(date or "today")
        length = date_words.duration(duration)
        found = length.from_date(start, -1)
        return f"{length} before {date_in_words(start)} is {date_in_words(found)}."

    def days_until(self, date: str) -> str:
        """How many days it is until a date."""
        return self._days_from_today(self._date(date))

    def days_since(self, date: str) -> str:
        """How many days it has been since a date."""
        return self._days_from_today(calendar_date(date, self.now().date(), past=True))

    def days_between(self, start: str, end: str) -> str:
        """How many days there are from one date to another."""
        first = self._date(start)
        last = calendar_date(end, first)
        days = count(abs((last - first).days), "day")
        return f"From {date_in_words(first)} to {date_in_words(last)} it is {days}."

    def weekday(self, date: str) -> str:
        """Which day of the week a date is."""
        return f"That is {date_in_words(self._date(date))}."

    def convert(self, amount: str, to: str) -> str:
        """Convert an amount to another unit.

        Args:
            amount: as in "5 km", "72 degrees fahrenheit" or "six feet two inches".
            to: the unit, as in "miles".
        """
        below_zero = _BELOW_ZERO.match(amount)
        plain = _BELOW_ZERO.sub("", _SQUARES.sub(lambda digit: "²³"[int(digit[0]) - 2], amount))
        parts = amounts(plain)
        if not all(unit for _, unit in parts):
            raise NotUnderstood(f"I do not understand the amount '{amount}'.")
        sign = -1 if below_zero else 1
        try:
            numbers = [
                Fraction(convert_units(float(sign * value), unit, to).split()[0]) for value, unit in parts
            ]
            total = sum(numbers, Fraction())
            short = Fraction(f"{float(total):.6g}")
        except ValueError as error:
            raise NotUnderstood(f"I cannot convert {amount} to {to}: {error}.") from None
        except OverflowError:
            raise NotUnderstood(f"I cannot convert {amount} to {to}: the number is too large.") from None
        return f"{amount} is {'' if short == total else 'about '}{as_text(short)} {to}."

    def calculate(self, expression: str) -> str:
        """Calculate something in words or digits, as in "twelve plus seven" or "15% of 80"."""
        try:
            return f"{expression} is {calculate(formula(expression))}."
        except NotUnderstood:
            raise
        except ValueError as error:
            raise NotUnderstood(f"I cannot calculate {expression}: {error}.") from None

    def time_now(self) -> str:
        """What time it is."""
        return f"It is {self.now():%H:%M}."

    def date_today(self) -> str:
        """What date it is."""
        return f"Today is {date_in_words(self.now().date())}."

    def _date(self, text: str) -> date:
        return calendar_date(text, self.now().date())

    def _in(self, length: Duration) -> datetime:
        try:
            return self.now() + timedelta(seconds=length.total_seconds())
        except OverflowError:
            raise NotUnderstood("That is too long for a timer.") from None

    def _left(self, entry: _Entry) -> Duration:
        return Duration(seconds=round((entry.at - self.now()).total_seconds()) if entry.at else 0)

    def _days_from_today(self, day: date) -> str:
        days = (day - self.now().date()).days
        if days == 0:
            return f"{date_in_words(day)} is today."
        number = abs(days)
        weeks = ""
        if number > 13:
            rest = [count(number % 7, "day")] if number % 7 else []
            weeks = f" ({join([count(number // 7, 'week'), *rest])})"
        return f"{count(number, 'day')}{weeks} {'until' if days > 0 else 'since'} {date_in_words(day)}."

    def _add(self, entries: list[_Entry], entry: _Entry, what: str) -> None:
        if not self.rings:
            raise NotUnderstood(
                f"I cannot set {what} here, as nothing would ring: mlx-pararnn chat in a terminal does. "
                "Sums, dates and units work here too."
            )
        if len(entries) >= _MOST:
            raise NotUnderstood(f"There are {_MOST} {what} already. Cancel one first.")
        entries.append(entry)

    @staticmethod
    def _cancel(entries: list[_Entry], what: str, named: str, key: Callable[[_Entry], str]) -> str:
        kept = [entry for entry in entries if named and key(entry) != named]
        cancelled = len(entries) - len(kept)
        entries[:] = kept
        return f"Cancelled {count(cancelled, what)}." if cancelled else f"There is no such {what}."

    @staticmethod
    def _show(what: str, texts: list[str]) -> str:
        return (
            f"You have {count(len(texts), what)}: {'; '.join(texts)}." if texts else f"You have no {what}s."
        )


def _due_in_words(kind: str, name: str, at: datetime) -> str:
    if kind == "timers":
        return f"{_named('The timer', name)} is over."
    return f"Reminder: {name}" if kind == "reminders" else f"Alarm of {_moment_in_words(at)}."


def _around(text: str, start: str, middle: str, end: str) -> tuple[str, str] | None:
    """What stands before and after the last `middle`, between this start and end; None if one is missing."""
    if not (text.startswith(start) and text.endswith(end)):
        return None
    before, found, after = text[len(start) : len(text) - len(end)].rpartition(middle)
    return (before, after) if found else None


def _items_of(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _entry(pair: object) -> _Entry:
    name, at = _items_of(pair)
    moment = at and datetime.fromisoformat(str(at))
    if not isinstance(name, str) or (moment and moment.tzinfo):
        raise ValueError("not a name and a local time")
    return _Entry(name, moment or None)


def _named(what: str, name: str) -> str:
    return f"{what} for {name}" if name else what


def _items(text: str) -> list[str]:
    """The items of "milk, eggs and bread"."""
    items = [item.strip() for item in re.split(r",(?:\s*and\s)?|\s(?:and|&)\s", text)]
    return [item for item in items if item]


def _moment_in_words(at: datetime) -> str:
    return f"{at:%H:%M} on {date_in_words(at.date())}"
