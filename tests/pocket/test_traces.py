"""Traces of the pocket model's training data: run by the pointer memory, they give Python's answer."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.pocket import traces
from examples.pocket.data import TASKS
from mlx_pararnn.pocket.pointer import PointerMemory

FEW = settings(max_examples=25, deadline=None)  # a trace has thousands of steps
NUMBERS = st.integers(0, 10**40)


def run(trace):
    """The answer that the trace's own tokens give, each observation compared with what the memory shows."""
    start = trace.learned.index(True)
    memory, answer, tokens = (
        PointerMemory(trace.tokens[:start], traces.EDGE),
        None,
        iter(trace.tokens[start:]),
    )
    for token in tokens:
        command = re.fullmatch(r"<\|(read|right|left|last)([1-4])\|>", token)
        if command is None:
            if token == traces.END:
                return answer
            memory.append(token)
            answer = "" if token == traces.ANSWER else answer if answer is None else answer + token
        elif command[1] == "read":
            assert next(tokens) == memory.read(int(command[2]))
        elif command[1] == "last":
            memory.jump_to_last(int(command[2]))
        else:
            memory.move(int(command[2]), 1 if command[1] == "right" else -1)
    raise AssertionError("the trace has no end")


def answer_to(message):
    trace = traces.solve(message)
    assert next(tokens := iter(trace.tokens)) == traces.USER
    assert "".join(token for token, _ in zip(tokens, message, strict=False)) == message
    return run(trace)


@FEW
@given(NUMBERS, NUMBERS)
def test_two_numbers(a, b):
    assert answer_to(f"{a} + {b}") == str(a + b)
    assert answer_to(f"what is {a} minus {b}?") == str(a - b)
    assert answer_to(f"Subtract {a} from {b}.") == str(b - a)
    assert answer_to(f"compare {a} and {b}") == f"{a} {'<' if a < b else '>' if a > b else '='} {b}"
    assert answer_to(f"which is smaller, {a} or {b}?") == (str(min(a, b)) if a != b else traces.EQUAL)
    assert answer_to(f"is {a} > {b}?") == ("yes" if a > b else "no")


@FEW
@given(NUMBERS, st.integers(0, 9))
def test_multiplication_by_a_digit(a, b):
    assert answer_to(f"{a} * {b}") == str(a * b)
    assert answer_to(f"multiply {a} by {b}.") == str(a * b)


@FEW
@given(NUMBERS, st.integers(10, 10**20))
def test_multiplication_by_more_says_what_it_can(a, b):
    assert answer_to(f"{a} * {b}") == traces.ONE_DIGIT


@FEW
@given(st.from_regex("[a-zA-Z0-9]{1,40}", fullmatch=True))
def test_reversal(word):
    assert answer_to(f"reverse {word}") == word[::-1]
    assert answer_to(f"Reverse the word {word}.") == word[::-1]


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


@pytest.mark.parametrize("message", ["hello", "", "12 7", "what is 12?", "1 2 + 3", "add"])
def test_what_is_no_task(message):
    assert traces.solve(message) is None


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
