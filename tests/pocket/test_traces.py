"""Traces of the pocket model's training data: run by the pointer memory, they give Python's answer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pocket import traces
from examples.pocket.data import TASKS
from tests.support.pocket_traces import follow

FEW = settings(max_examples=25, deadline=None)  # a trace has thousands of steps
NUMBERS = st.integers(0, 10**40)


def answer_to(message):
    trace = traces.solve(message)
    assert next(tokens := iter(trace.tokens)) == traces.USER
    assert "".join(token for token, _ in zip(tokens, message, strict=False)) == message
    return follow(trace)


@FEW
@given(NUMBERS, NUMBERS)
def test_two_numbers(a, b):
    assert answer_to(f"{a} + {b}") == str(a + b)
    assert answer_to(f"what is {a} minus {b}?") == str(a - b)
    assert answer_to(f"Subtract {a} from {b}.") == str(b - a)
    assert answer_to(f"compare {a} and {b}") == f"{a} {'<' if a < b else '>' if a > b else '='} {b}"
    assert answer_to(f"which is smaller, {a} or {b}?") == (str(min(a, b)) if a != b else traces.EQUAL)
    assert answer_to(f"is {a} > {b}?") == ("yes" if a > b else "no")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("a", "b"), [("1" + "0" * 40, "9" * 40), ("7" * 40, "7" * 39 + "6"), ("5" * 40, "5" * 40), ("100", "7")]
)
def test_no_zero_before_a_difference_is_read(a, b, sign):
    """However many there are: how far the answer is would have to be remembered."""
    a, b = (a, b)[::sign]
    trace = traces.solve(f"{a} - {b}")
    right = str(int(a) - int(b))
    assert follow(trace) == right
    written_out = trace.tokens[trace.tokens.index("<|answer|>") :]
    reads = sum(token.startswith("<|read") for token in written_out)
    assert reads == (len(right.lstrip("-")) + 1 if right != "0" else 0)


@FEW
@given(NUMBERS, st.integers(0, 9))
def test_multiplication_by_a_digit(a, b):
    assert answer_to(f"{a} * {b}") == answer_to(f"{b} x {a}") == str(a * b)
    assert answer_to(f"multiply {a} by {b}.") == str(a * b)


@FEW
@given(st.from_regex("[a-zA-Z0-9]{1,40}", fullmatch=True))
def test_reversal(word):
    assert answer_to(f"reverse {word}") == word[::-1]
    assert answer_to(f"Reverse the word x{word}.") == word[::-1] + "x"


@FEW
@given(NUMBERS)
def test_a_number_backwards(a):
    assert answer_to(f"what is {a} backwards?") == str(a)[::-1]


@FEW
@given(st.lists(st.integers(0, 9), min_size=2, max_size=20), st.sampled_from([" ", ", ", ","]))
def test_sorting(digits, between):
    items = list(map(str, digits))
    assert answer_to(f"sort {between.join(items)}") == " ".join(sorted(items))
    assert answer_to(f"sort the digits of {''.join(items)}") == "".join(sorted(items))


@FEW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(10, 99), st.randoms())
def test_sorting_longer_numbers_says_what_it_can(digits, long, rng):
    items = [*digits, long]
    rng.shuffle(items)
    message = f"sort {' '.join(map(str, items))}"
    assert answer_to(message) == traces.SINGLE_DIGITS


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        "",
        "12 7",
        "what is 12?",
        "add",
        # sums that are not of two whole numbers
        *(
            "1 2 + 3",
            "1 + 2 + 3",
            "1+2*3",
            "1.5 + 2",
            "1 + 2.5",
            "1,000 + 2",
            "1 + 2,000",
            "-1 + 2",
            "1 + -2",
        ),
        *("1 + 2%", "1 + 2 %", "1 + 2^3", "1 + 2!0", "(1 + 2)", "1 km + 2 km", "1 + 2 km", "1 / 2", "x + 1"),
        *("12 * 34", "123 x 45", "multiply 12 by 34", "1e5 + 2", "what is five + 3?", "add 1 and 2 and 3"),
        *("compare 1 and 2 apples", "which is bigger, 1, 2 or 3?", "is 3 > 2 > 1?"),
        # words that are used otherwise
        *(
            "add 5 eggs to the list",
            "set a timer for 5 minutes",
            "remind me 3 times",
            "2024-12-25",
            "3-4-2025",
        ),
        *("what sort of 3", "sort my list", "sort 3 apples", "reverse the polarity of it", "reverse a b"),
        *("reverse café", "sort 1 2 3 by size"),
    ],
)
def test_what_is_no_task(message):
    assert traces.solve(message) is None


@pytest.mark.parametrize("before", ["", "what is ", "Hey, can you please calculate ", "TELL ME "])
@pytest.mark.parametrize("after", ["", "?", " =", " please.", " equals?"])
def test_words_around_a_sum(before, after):
    assert answer_to(f"{before}12 + 34{after}") == "46"


@pytest.mark.parametrize("task", TASKS)
def test_the_generated_messages_have_pythons_answer(task):
    rng = random.Random(0)
    for digits in [1, 1, 2, 3, 5, 10, 30] * 30:
        message, answer = TASKS[task](rng, digits)
        assert answer_to(message) == answer, message


@pytest.mark.parametrize("task", TASKS)
def test_data_is_the_same_for_the_same_seed(task):
    def some(seed):
        rng = random.Random(seed)
        return [TASKS[task](rng, 5) for _ in range(20)]

    assert some(3) == some(3)
    assert some(3) != some(4)
