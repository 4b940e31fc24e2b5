"""Numbers, times and dates in words, and the functions of the model that ships."""

import json
import re
from datetime import date, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pararnn.pocket.assistant import FUNCTIONS, Assistant
from mlx_pararnn.pocket.date_words import Duration, calendar_date, date_in_words, duration, moment
from mlx_pararnn.pocket.functions import Functions
from mlx_pararnn.pocket.number_words import NotUnderstood, amounts, formula, number

NOW = datetime(2026, 11, 29, 4, 12)  # a Sunday
TODAY = NOW.date()


@pytest.fixture
def assistant():
    return Assistant(lambda: NOW)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("1,000", 1000),
        ("3.5", Fraction(7, 2)),
        ("1/2", Fraction(1, 2)),
        ("Twenty-One", 21),
        ("two and a half", Fraction(5, 2)),
        ("three point one four", Fraction(157, 50)),
        ("a hundred", 100),
        ("one hundred and five", 105),
        ("two thousand and five", 2005),
        ("2.5 million", 2_500_000),
        ("three quarters", Fraction(3, 4)),
        ("one and three quarters", Fraction(7, 4)),
        ("3 1/2", Fraction(7, 2)),
        ("a couple", 2),
        ("two dozen", 24),
        ("fourty two", 42),
        ("sevnty", 70),
    ],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "banana", "twenty ten", "seventh", "1/0", "five apples", "9" * 5000, "and", "point"),
        *("5 7", "3 000", "3 7/2", "two thousand five thousand", "a million thousand"),
    ],
)
def test_no_number(text):
    with pytest.raises(NotUnderstood):
        number(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5km", [(5, "km")]),
        ("six feet two inches", [(6, "feet"), (2, "inches")]),
        ("a mile", [(1, "mile")]),
        ("half a mile", [(Fraction(1, 2), "mile")]),
        ("three quarters of a mile", [(Fraction(3, 4), "mile")]),
        ("an hour and a half", [(Fraction(3, 2), "hour")]),
        ("72°F", [(72, "f")]),
        ("100 km/h", [(100, "km/h")]),
        ("a hundred and five pounds", [(105, "pounds")]),
    ],
)
def test_amounts(text, found):
    assert amounts(text) == found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5 minutes", 300),
        ("5 min", 300),
        ("5-minute", 300),
        ("ten-minute", 600),
        ("1h30", 5400),
        ("1h 30m", 5400),
        ("90 sec", 90),
        ("45s", 45),
        ("an hour and a half", 5400),
        ("half an hour", 1800),
        ("a quarter of an hour", 900),
        ("two and a half hours", 9000),
        ("1 hour 20", 4800),
        ("1 hour and 20 minutes", 4800),
        ("5 minuts", 300),
        ("a couple of minutes", 120),
        ("1.5 days", 129600),
        ("2 weeks", 1209600),
    ],
)
def test_duration(text, seconds):
    assert duration(text).total_seconds() == seconds


@pytest.mark.parametrize(
    "text", ["", "banana", "0 minutes", "half a second", "5", "minutes", "5 bananas", "5 minutes banana"]
)
def test_no_duration(text):
    with pytest.raises(NotUnderstood, match="I do not understand the duration"):
        duration(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 400), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_duration_in_words_is_read_again(months, days, seconds):
    length = Duration(months, days, seconds)
    if any((months, days, seconds)):
        assert duration(str(length)) == length


@pytest.mark.parametrize(
    ("text", "day", "found"),
    [
        ("7", "", "2026-11-29 07:00"),
        ("4", "", "2026-11-29 16:00"),
        ("4:12", "", "2026-11-29 16:12"),
        ("7:30 pm", "", "2026-11-29 19:30"),
        ("7 p.m.", "", "2026-11-29 19:00"),
        ("4 am", "", "2026-11-30 04:00"),
        ("half past six", "", "2026-11-29 06:30"),
        ("quarter to 8", "", "2026-11-29 07:45"),
        ("ten past nine", "", "2026-11-29 09:10"),
        ("seven thirty", "", "2026-11-29 07:30"),
        ("six oh five", "", "2026-11-29 06:05"),
        ("8 o'clock", "", "2026-11-29 08:00"),
        ("0730", "", "2026-11-29 07:30"),
        ("19:00", "", "2026-11-29 19:00"),
        ("noon", "", "2026-11-29 12:00"),
        ("midnight", "", "2026-11-30 00:00"),
        ("12 am", "", "2026-11-30 00:00"),
        ("9 in the morning", "", "2026-11-29 09:00"),
        ("in 20 minutes", "", "2026-11-29 04:32"),
        ("7", "tomorrow", "2026-11-30 07:00"),
        ("5", "tomorrow", "2026-11-30 17:00"),
        ("5", "tomorrow morning", "2026-11-30 05:00"),
        ("8", "monday evening", "2026-11-30 20:00"),
        ("7pm", "Friday", "2026-12-04 19:00"),
        ("8", "tonight", "2026-11-29 20:00"),
        ("", "tonight", "2026-11-29 20:00"),
        ("", "tomorrow", "2026-11-30 09:00"),
        ("5:30am", "3 March", "2027-03-03 05:30"),
    ],
)
def test_moment(text, day, found):
    assert moment(text, day, NOW) == datetime.fromisoformat(found)


@pytest.mark.parametrize(
    "text", ["25:00", "7:75", "banana", "half past", "quarter to banana", "7 8 9", "in banana"]
)
def test_no_moment(text):
    with pytest.raises(NotUnderstood):
        moment(text, "", NOW)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 March", "2027-03-03"),
        ("march 3rd 2027", "2027-03-03"),
        ("May 5, 2030", "2030-05-05"),
        ("2027-03-03", "2027-03-03"),
        ("the third of march", "2027-03-03"),
        ("twenty first of may", "2027-05-21"),
        ("4th of july", "2027-07-04"),
        ("sept 1", "2027-09-01"),
        ("febuary 2", "2027-02-02"),
        ("the 5th", "2026-12-05"),
        ("christmas", "2026-12-25"),
        ("new years eve", "2026-12-31"),
        ("Valentine's day", "2027-02-14"),
        ("today", "2026-11-29"),
        ("29 november", "2026-11-29"),
        ("tomorrow", "2026-11-30"),
        ("the day after tomorrow", "2026-12-01"),
        ("sunday", "2026-12-06"),
        ("next friday", "2026-12-04"),
        ("last monday", "2026-11-23"),
        ("in 3 days", "2026-12-02"),
        ("two weeks from now", "2026-12-13"),
        ("3 days ago", "2026-11-26"),
        ("12/25", "2026-12-25"),
        ("feb 29", "2028-02-29"),
    ],
)
def test_calendar_date(text, found):
    assert calendar_date(text, TODAY) == date.fromisoformat(found)


@pytest.mark.parametrize(
    "text", ["", "banana", "feb 30", "3/4", "32 march", "2027-13-01", "next banana", "99999 years ago"]
)
def test_no_date(text):
    with pytest.raises(NotUnderstood):
        calendar_date(text, TODAY)


@settings(max_examples=100, deadline=None)
@given(st.dates())
def test_a_date_in_words_is_read_again(day):
    weekday, words = date_in_words(day).split(", ")
    assert f"{day:%A}" == weekday
    if day.year >= 1000:
        assert calendar_date(words, TODAY) == day


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("twelve plus seven", "12+7"),
        ("add twelve and seven", "12+7"),
        ("the sum of one hundred and five and seven", "105+7"),
        ("subtract nine from thirty", "30-9"),
        ("the product of six and nine", "6*9"),
        ("divide ninety by four", "90/4"),
        ("half of ninety", "(1/2)*90"),
        ("15% of 80", "(15/100)*80"),
        ("twenty percent of fifty", "(20/100)*50"),
        ("the square root of 81", "sqrt(81)"),
        ("two plus the square root of nine", "2+sqrt(9)"),
        ("two to the power of ten", "2**10"),
        ("7 squared", "7**2"),
        ("12.5 + 3.75", "(25/2)+(15/4)"),
        ("twice eleven", "2*11"),
        ("2^10", "2**10"),
        ("(2+3)×4", "(2+3)*4"),
        ("twenty five plus one hundred and five", "25+105"),
        ("3,000 - -1", "3000--1"),
        ("5 minus twice 3", "5-2*3"),
        ("100 over 50%", "100/(50/100)"),
        ("multiply 12.5 + 3.75 by 2", "((25/2)+(15/4))*2"),
        ("7 // 2", "7//2"),
        ("17 mod 5", "17%5"),
        ("12 % 5", "12%5"),
        ("12%5", "12%5"),
        ("20 % of 50", "(20/100)*50"),
        ("the remainder of seventeen divided by 5", "17%5"),
        ("ten modulo (2+1)", "10%(2+1)"),
        ("7 · 8", "7*8"),
    ],
)
def test_formula(text, found):
    assert formula(text) == found


@pytest.mark.parametrize("text", ["", "banana", "a plus b", "__import__('os')", "sqrt", "add twelve", "12 +"])
def test_no_formula(text):
    with pytest.raises(NotUnderstood):
        formula(text)


OPERANDS = [
    "7",
    "12.5",
    "seven",
    "twenty one",
    "half",
    "3 1/2",
    "5%",
    "2 squared",
    "(2 + 3)",
    "twice 2",
    "sqrt 4",
]


@pytest.mark.parametrize("first", OPERANDS)
@pytest.mark.parametrize("second", ["7", "007", ".5", "thirty", "7/2", "(1)", "twice 2", "sqrt 4"])
def test_two_operands_want_an_operator_between_them(first, second):
    with pytest.raises(NotUnderstood, match="no sign between two numbers"):
        formula(f"1 + {first} {second}")
    assert formula(f"1 + {first} + {second}")


@pytest.mark.parametrize(
    "text",
    [
        *("5 7 + 1", "3 1 2 10", "3 000 + 5", "1,5 + 2", "1.2.3", "7% 3", "2 thousand 5"),
        *("a thousand thousand", "two thousand five thousand", "add 5 7 and 1"),
    ],
)
def test_numbers_beside_each_other_are_no_calculation(text):
    with pytest.raises(NotUnderstood, match="no sign between two numbers"):
        formula(text)


@pytest.mark.parametrize("first", ["*", "/", "//", "**", "times", "over", "x"])
@pytest.mark.parametrize("second", ["*", "/", "//", "**", "times", "over", "x"])
def test_two_operators_are_not_joined_to_another(first, second):
    with pytest.raises(NotUnderstood, match="I cannot calculate"):
        formula(f"7 {first} {second} 2")


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=30)
    | st.lists(
        st.sampled_from(
            [
                "5",
                "a",
                "and",
                "half",
                "of",
                "hour",
                "to",
                "in",
                "the",
                "1/0",
                "march",
                "-",
                "9999999",
                "years",
            ]
        )
    ).map(" ".join)
)
def test_any_text_is_understood_or_not_understood(text):
    for function in FUNCTIONS:
        method = getattr(Assistant(lambda: NOW), function)
        try:
            said = method(*([text] * min(method.__func__.__code__.co_argcount - 1, 3)))
        except NotUnderstood:
            continue
        assert isinstance(said, str)


@pytest.mark.parametrize("text", ["0/0", "13/13", "0/13", "99/99", "0/0/2027", "13/13/2027"])
def test_a_month_that_is_none(text):
    with pytest.raises(NotUnderstood, match=re.escape(text)):
        calendar_date(text, NOW.date())


def test_timers(assistant):
    assert assistant.show_timers() == "You have no timers."
    assert assistant.set_timer("5 minutes", "pasta") == "Timer for pasta set for 5 minutes."
    assert assistant.set_timer("an hour and a half") == "Timer set for 1 hour and 30 minutes."
    assistant.now = lambda: NOW + timedelta(minutes=2)
    assert (
        assistant.show_timers()
        == "You have 2 timers: pasta: 3 minutes left; timer: 1 hour and 28 minutes left."
    )
    assert assistant.cancel_timer("Pasta") == "Cancelled 1 timer."
    assert assistant.cancel_timer("pasta") == "There is no such timer."
    assistant.now = lambda: NOW + timedelta(hours=2)
    assert assistant.show_timers() == "You have no timers."


def test_alarms(assistant):
    assert assistant.set_alarm("7", "tomorrow morning") == "Alarm set for 07:00 on Monday, 30 November 2026."
    assert assistant.set_alarm("half past six") == "Alarm set for 06:30 on Sunday, 29 November 2026."
    assert "2 alarms" in assistant.show_alarms()
    assert assistant.cancel_alarm("7am") == "Cancelled 1 alarm."
    assert assistant.cancel_alarm("9") == "There is no such alarm."
    assert assistant.cancel_alarm() == "Cancelled 1 alarm."
    assert assistant.show_alarms() == "You have no alarms."


@pytest.mark.parametrize(
    ("time", "left"),
    [("7:30", ["19:30"]), ("7:30 pm", ["07:30"]), ("7:30 am", ["19:30"]), ("8", ["07:30", "19:30"])],
)
def test_of_two_alarms_the_one_that_is_named_is_cancelled(assistant, time, left):
    for at in ("7:30 am", "7:30 pm"):
        assistant.set_alarm(at)
    assistant.cancel_alarm(time)
    assert [f"{alarm.at:%H:%M}" for alarm in sorted(assistant.alarms, key=lambda a: a.at.time())] == left
    if len(left) == 1:  # the other half of the day, where there is no other
        assert assistant.cancel_alarm("7:30") == "Cancelled 1 alarm."


def test_of_several_things_none_is_cancelled_by_a_message_that_names_none(assistant):
    what = ("timer", "5 minutes"), ("alarm", "7 pm"), ("reminder", "buy milk")
    for kind, argument in what:
        set_one, asked = getattr(assistant, f"set_{kind}"), f"cancel_{kind}"
        set_one(argument)
        assert assistant.instead(f"cancel the {kind}", asked, "{}") is None
        set_one(argument)
        for message in (f"cancel {kind}", f"Turn off my {kind}", f"cancel my first {kind}"):
            said = assistant.instead(message, asked, '{"name":""}')
            assert said.startswith(f"You have 2 {kind}s: ")
            assert said.endswith("Which one shall I cancel? Say all for all of them.")
        for message in (
            f"cancel all {kind}s",
            f"stop both {kind}s",
            f"cancel my {kind.upper()}S",
            f"all my {kind}",
        ):
            assert assistant.instead(message, asked, "{}") is None
        assert assistant.instead(f"cancel the tea {kind}", asked, '{"name":"tea"}') is None
        assert assistant.instead(f"show the {kind}", f"show_{kind}s", "{}") is None


def test_reminders(assistant):
    said = assistant.set_reminder("call mom", "5pm", "tomorrow")
    assert said == "I will remind you: call mom, 17:00 on Monday, 30 November 2026."
    assert assistant.set_reminder("buy milk") == "I will remind you: buy milk."
    assert assistant.show_reminders().startswith("You have 2 reminders: call mom (17:00 on Monday")
    assert assistant.cancel_reminder("Buy milk") == "Cancelled 1 reminder."
    assert assistant.cancel_reminder() == "Cancelled 1 reminder."


def test_lists(assistant):
    assert assistant.show_list() == "Your to-do list is empty."
    said = assistant.add_to_list("milk, eggs and bread", "shopping")
    assert said == "Added milk, eggs and bread to your shopping list."
    assert assistant.add_to_list("paint the fence") == "Added paint the fence to your to-do list."
    assert assistant.show_list("Shopping") == "Shopping list: milk, eggs, bread."
    assert assistant.remove_from_list("Milk", "shopping") == "Removed Milk from your shopping list."
    assert assistant.remove_from_list("eggs") == "Removed eggs from your lists."
    assert assistant.remove_from_list("tea") == "There is no tea on your lists."
    assert assistant.show_list() == "Shopping list: bread. To-do list: paint the fence."
    assert assistant.clear_list("shopping") == "Your shopping list is empty now."
    assert assistant.show_list("shopping") == "Your shopping list is empty."


def test_dates(assistant):
    said = assistant.date_after("90 days", "3 March")
    assert said == "90 days after Wednesday, 3 March 2027 is Tuesday, 1 June 2027."
    said = assistant.date_before("2 weeks", "christmas")
    assert said == "2 weeks before Friday, 25 December 2026 is Friday, 11 December 2026."
    assert assistant.date_after("3 weeks").endswith("is Sunday, 20 December 2026.")
    assert assistant.date_after("1 month", "31 january 2027").endswith("is Sunday, 28 February 2027.")
    assert assistant.days_until("christmas") == "26 days (3 weeks and 5 days) until Friday, 25 December 2026."
    assert assistant.days_since("1 january").startswith("332 days")
    assert assistant.days_until("1 jan 2020").startswith("2524 days")
    assert assistant.days_until("today") == "Sunday, 29 November 2026 is today."
    assert assistant.days_between("march 1", "july 4").endswith("it is 125 days.")
    assert assistant.weekday("4 july 2027") == "That is Sunday, 4 July 2027."
    assert assistant.time_now() == "It is 04:12."
    assert assistant.date_today() == "Today is Sunday, 29 November 2026."
    with pytest.raises(NotUnderstood, match="but not hours"):
        assistant.date_after("5 hours", "today")


def test_units_and_sums(assistant):
    assert assistant.convert("six feet two inches", "cm") == "six feet two inches is 187.96 cm."
    assert assistant.convert("72°F", "celsius") == "72°F is about 22.2222 celsius."
    assert assistant.calculate("twelve plus seven") == "twelve plus seven is 19."
    with pytest.raises(NotUnderstood, match="cannot convert 5 km to kg"):
        assistant.convert("5 km", "kg")
    with pytest.raises(NotUnderstood, match="division by zero"):
        assistant.calculate("five over zero")


def test_what_is_remembered_is_limited(assistant):
    for _ in range(100):
        assistant.set_timer("5 minutes")
        assistant.add_to_list("milk")
    with pytest.raises(NotUnderstood, match="100 timers already"):
        assistant.set_timer("5 minutes")
    with pytest.raises(NotUnderstood, match="lists are full"):
        assistant.add_to_list("milk")


def test_all_functions_can_be_registered():
    functions = Functions(Assistant(lambda: NOW).functions())
    assert [function.name for function in functions] == list(FUNCTIONS)
    outcome = functions.call("set_timer", '{"duration":"five minutes"}')
    assert (outcome.text, outcome.failed) == ("Timer set for 5 minutes.", False)
    assert functions.call("set_timer", '{"duration":"soon"}').failed


WORD = st.text("abcz é.'", min_size=1, max_size=6).filter(lambda text: text == text.strip())
ITEMS = st.lists(
    WORD | st.sampled_from(["bob to your list", "a note from your aunt", "this list."]),
    min_size=1,
    max_size=4,
).map(", ".join)
LIST_CALLS = st.one_of(
    st.tuples(st.just("add_to_list"), ITEMS, st.sampled_from(["", "Shopping", "weekly shopping"])),
    st.tuples(st.just("remove_from_list"), ITEMS, st.sampled_from(["", "shopping"])),
    st.tuples(st.sampled_from(["show_list", "clear_list"]), st.sampled_from(["", "Shopping"])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(LIST_CALLS, max_size=12))
def test_what_the_answers_say_of_the_lists_is_done_again(calls):
    """Whatever was called, between answers that are about something else."""
    assistant, answers = Assistant(lambda: NOW), []
    for name, *arguments in calls:
        answers += [getattr(assistant, name)(*arguments), "7 + 5 is 12."]
    other = Assistant(lambda: NOW)
    other.hear(answers)
    for name in ("", "shopping", "weekly shopping"):
        assert other.show_list(name) == assistant.show_list(name)


@pytest.mark.parametrize(
    "answer", ["", "Added", "Added milk to my list", "Your list is empty.", "Removed a."]
)
def test_other_answers_change_no_list(assistant, answer):
    assistant.add_to_list("milk")
    assistant.hear([answer] * 200 + ["Added milk to your to-do list."] * 200)
    assert assistant.show_list() == f"To-do list: {', '.join(['milk'] * 100)}."


def test_nothing_is_said_to_be_set_or_kept_where_it_is_not():
    """Every function whose sentence would promise something."""
    assistant = Assistant(lambda: NOW, rings=False, keeps=False)
    asked = {
        "set_timer": ("5 minutes",),
        "set_alarm": ("7:30",),
        "set_reminder": ("call mom",),
        "add_to_list": ("milk",),
    }
    assert asked.keys() == {name for name in FUNCTIONS if name.startswith(("set_", "add_"))}
    for name, arguments in asked.items():
        with pytest.raises(NotUnderstood, match=r"here.*mlx-pararnn chat.* work here too"):
            getattr(assistant, name)(*arguments)
    assert assistant.memory() == ""
    keeping = Assistant(lambda: NOW, rings=False)
    assert keeping.add_to_list("milk") == "Added milk to your to-do list."


def test_what_it_remembers_is_a_text_that_another_recalls(assistant):
    assert assistant.memory() == ""
    assistant.set_timer("5 minutes", "pasta")
    assistant.set_alarm("7:30")
    assistant.set_reminder("call mom")
    assistant.add_to_list("milk, eggs and bread", "shopping")
    other = Assistant(assistant.now)
    other.recall(assistant.memory())
    assert other == assistant
    other.recall("")
    assert other == Assistant(assistant.now)


@pytest.mark.parametrize(
    "memory",
    [
        *("[", "[]", "5", "null", '{"timers": 5}', '{"timers": [5]}', '{"timers": [["a"]]}'),
        *('{"timers": [["a", "soon"]]}', '{"timers": [[5, null]]}', '{"alarms": [["", 5]]}'),
        '{"reminders": [["a", "2026-11-29T04:12:00+01:00"]]}',
        *('{"lists": [1]}', '{"lists": {"a": "milk"}}', '{"lists": {"a": [1]}}'),
        json.dumps({"timers": [["", "2026-11-29T04:12:00"]] * 101}),
    ],
)
def test_what_is_no_memory_changes_nothing(assistant, memory):
    assistant.add_to_list("milk")
    before = assistant.memory()
    with pytest.raises(ValueError, match=r"."):
        assistant.recall(memory)
    assert assistant.memory() == before


def test_what_is_due_is_told_once():
    now = NOW
    assistant = Assistant(lambda: now)
    assistant.set_timer("5 minutes", "pasta")
    assistant.set_timer("3 hours")
    assistant.set_alarm("4:30")
    assistant.set_reminder("call mom", "in 10 minutes")
    assistant.set_reminder("buy milk")
    assert assistant.due() == []
    now += timedelta(minutes=20)
    before = assistant.memory()
    assert assistant.due() == [
        "The timer for pasta is over.",
        "Alarm of 04:30 on Sunday, 29 November 2026.",
        "Reminder: call mom",
    ]
    assistant.recall(before)  # as /undo does
    assert assistant.due() == []
    now += timedelta(hours=3)
    assert assistant.due() == ["The timer is over."]
    assert assistant.due() == []
    assert assistant.show_reminders() == "You have 1 reminder: buy milk."
