"""How a message is answered with the pointer memory: the traces that the model learns to write.

`solve` writes the trace of one message. It works as the model must: it sees what it reads, one entry at a
time, and every step follows from the last few tokens and from what it reads next. Where a step needs more,
the trace writes it down and reads it again: pointer 4 stands on the tag that says which task this is.

    1. Pointer 1 goes right through the message until the task is known and the first number has been passed.
    2. Pointer 2 comes from the end of the message to the last digit of the second number.
    3. The task's own loop, which thinks one digit at a time.
    4. Pointer 3 goes back over the thoughts and the digits of the answer are written out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mlx_pararnn.pocket.pointer import PointerMemory

USER, END, ANSWER, EDGE = "<|user|>", "<|end|>", "<|answer|>", "<|edge|>"

# What a message is about, by the words that say so; a tag is what the trace notes down.
ADD, SUBTRACT, SUBTRACT_FROM, MULTIPLY = "+", "-", "~", "*"
COMPARE, LARGER, SMALLER, IS_GREATER, IS_LESS = "?", "M", "m", "G", "L"
REVERSE, REVERSED, SORT = "r", "R", "o"
BEFORE_NUMBERS = {
    "add": ADD,
    "sum": ADD,
    "subtract": SUBTRACT_FROM,
    "multiply": MULTIPLY,
    "product": MULTIPLY,
    "compare": COMPARE,
    "bigger": LARGER,
    "larger": LARGER,
    "greater": LARGER,
    "smaller": SMALLER,
    "less": SMALLER,
    "reverse": REVERSE,
    "sort": SORT,
}
AFTER_A_NUMBER = {
    "+": ADD,
    "plus": ADD,
    "-": SUBTRACT,
    "minus": SUBTRACT,
    "*": MULTIPLY,
    "x": MULTIPLY,
    "times": MULTIPLY,
    "bigger": IS_GREATER,
    "larger": IS_GREATER,
    "greater": IS_GREATER,
    ">": IS_GREATER,
    "smaller": IS_LESS,
    "less": IS_LESS,
    "<": IS_LESS,
    "reversed": REVERSED,
    "backwards": REVERSED,
}
ONE_DIGIT = "I can only multiply by one digit, as in 12345 * 7."
SEPARATORS = (" ", ",")
SINGLE_DIGITS = "I can only sort single digits, as in sort 3 1 2."
EQUAL = "they are equal"


@dataclass
class Trace:
    """What stands in the model's text: the message, then what it writes and observes.

    Attributes:
        tokens: bytes as one-character strings, other tokens by their names.
        learned: of each token, whether the model writes it itself (message and observations it does not).
        answered: the answer so far, None before <|answer|>.
    """

    message: str
    tokens: list[str] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    answered: str | None = None

    def __post_init__(self) -> None:
        self.tokens = [USER, *self.message, END]
        self.learned = [False] * len(self.tokens)
        # The entries are names here, which the memory does not mind.
        self.memory: PointerMemory = PointerMemory(self.tokens, EDGE)  # type: ignore[arg-type]

    def read(self, pointer: int) -> str:
        self._write(f"<|read{pointer}|>")
        seen = str(self.memory.read(pointer))
        self.tokens.append(seen)
        self.learned.append(False)
        return seen

    def right(self, pointer: int) -> None:
        self._write(f"<|right{pointer}|>")
        self.memory.move(pointer, 1)

    def left(self, pointer: int, times: int = 1) -> None:
        for _ in range(times):
            self._write(f"<|left{pointer}|>")
            self.memory.move(pointer, -1)

    def last(self, pointer: int) -> None:
        self._write(f"<|last{pointer}|>")
        self.memory.jump_to_last(pointer)

    def think(self, text: str) -> None:
        for character in text:
            self._write(character)
            self.memory.append(character)  # type: ignore[arg-type]
            if self.answered is not None:
                self.answered += character

    def answer(self, text: str = "") -> None:
        """<|answer|>: what is thought from here on is the answer."""
        self._write(ANSWER)
        self.memory.append(ANSWER)  # type: ignore[arg-type]
        self.answered = ""
        self.think(text)

    def end(self) -> None:
        self._write(END)

    def _write(self, token: str) -> None:
        self.tokens.append(token)
        self.learned.append(True)


def solve(message: str) -> Trace | None:
    """The trace that answers a message, or None for one that is no task of the pointer memory."""
    trace = Trace(message)
    tag = _find_task(trace)
    if tag is None:
        return None
    _PROCEDURES[tag](trace)
    trace.end()
    return trace


def _find_task(trace: Trace) -> str | None:
    """Read on until task and first number are known; pointer 1 ends where the task wants it."""
    seen, number, noted = " ", False, False
    while True:
        trace.right(1)
        character = trace.read(1)
        if character == END and not (number and noted):
            return None
        if character.isdigit():
            if number and not noted and not seen[-1].isdigit():
                return None  # a second number, and the task still unknown
            seen, number = seen + character, True
            continue
        if number and seen[-1].isdigit():  # behind the number
            tag = trace.read(4)
            if tag != USER:
                trace.left(1)
                return tag
        seen += character.lower()
        tag = _keyword(seen, AFTER_A_NUMBER if number else BEFORE_NUMBERS)
        if tag is None or noted:
            continue
        noted = True
        trace.think(tag)
        trace.last(4)
        if number:
            _back_to_a_digit(trace, 1)
            return tag
        if tag in (REVERSE, SORT):
            return tag


def _keyword(seen: str, keywords: dict[str, str]) -> str | None:
    for word, tag in keywords.items():
        if seen.endswith(word) and not (word[0].isalpha() and seen[-len(word) - 1].isalpha()):
            return tag
    return None


def _back_to_a_digit(trace: Trace, pointer: int) -> None:
    trace.left(pointer)
    while not trace.read(pointer).isdigit():
        trace.left(pointer)


def _right_to_a_digit(trace: Trace, pointer: int) -> None:
    trace.right(pointer)
    while not trace.read(pointer).isdigit():
        trace.right(pointer)


def _two_numbers(trace: Trace) -> None:
    """Pointer 2 to the last digit of the second number; pointer 1 stands on that of the first."""
    trace.last(2)  # on the tag
    trace.left(2)
    _back_to_a_digit(trace, 2)


def _add(trace: Trace) -> None:
    _two_numbers(trace)
    trace.read(4)
    trace.think("o")  # no carry; "c" is one
    carry = 0
    for a, b in _digits_from_the_right(trace):
        carry, digit = divmod(_value(a) + _value(b) + carry, 10)
        trace.think(str(digit) + "oc"[carry])
    if carry:
        trace.think("1o")
    trace.last(3)
    trace.answer()
    _write_out(trace, first=1, stride=2)


def _subtract(trace: Trace) -> None:
    """a - b and b - a at once: which of the lower parts is larger says who borrows, at the end the sign."""
    if trace.read(4) == SUBTRACT_FROM:
        trace.last(1)
        trace.left(1)
        _back_to_a_digit(trace, 1)
        _right_to_a_digit(trace, 2)
        trace.right(2)
        while trace.read(2).isdigit():
            trace.right(2)
        trace.left(2)
    else:
        _two_numbers(trace)
    trace.read(4)
    mark = "="
    trace.think(mark)
    for a, b in _digits_from_the_right(trace):
        difference = _value(a) - _value(b)
        digits = (difference - (mark == "<")) % 10, (-difference - (mark == ">")) % 10
        mark = "<" if difference < 0 else ">" if difference else mark
        trace.think(f"{digits[0]}{digits[1]}{mark}")
    trace.last(3)
    trace.answer("-" if mark == "<" else "")
    _write_out(trace, first=1 if mark == "<" else 2, stride=3)


def _multiply(trace: Trace) -> None:
    _two_numbers(trace)
    trace.left(2)
    if trace.read(2).isdigit():
        return trace.answer(ONE_DIGIT)
    trace.right(2)
    trace.read(4)
    trace.think("A")  # carry 0; "B" is 1, up to "I"
    carry = 0
    while (a := trace.read(1)).isdigit():
        carry, digit = divmod(int(a) * int(trace.read(2)) + carry, 10)
        trace.think(str(digit) + "ABCDEFGHI"[carry])
        trace.left(1)
    if carry:
        trace.think(f"{carry}A")
    trace.last(3)
    trace.answer()
    return _write_out(trace, first=1, stride=2)


def _compare(trace: Trace) -> None:
    _two_numbers(trace)
    trace.read(4)
    mark = "e"
    trace.think(mark)
    for a, b in _digits_from_the_right(trace):
        difference = _value(a) - _value(b)
        mark = "l" if difference < 0 else "g" if difference else mark
        trace.think(mark)
    trace.last(3)
    task = trace.read(4)
    mark = trace.read(3)
    if task in (IS_GREATER, IS_LESS):
        return trace.answer("yes" if mark == {IS_GREATER: "g", IS_LESS: "l"}[task] else "no")
    if task in (LARGER, SMALLER):
        if mark == "e":
            return trace.answer(EQUAL)
        trace.answer()
        return _copy(trace, 1 if (task == LARGER) == (mark == "g") else 2)
    trace.answer()
    _copy(trace, 1)
    trace.think({"l": " < ", "e": " = ", "g": " > "}[trace.read(3)])
    return _copy(trace, 2)


def _copy(trace: Trace, pointer: int) -> None:
    """Write out the number to the right of a pointer."""
    trace.right(pointer)
    while (character := trace.read(pointer)).isdigit():
        trace.think(character)
        trace.right(pointer)
    if pointer == 1:  # the second number follows, or not
        trace.read(4)


def _reverse(trace: Trace) -> None:
    """A word or number at the end of the message."""
    trace.last(2)
    trace.left(2, 2)
    while not (character := trace.read(2)).isalnum():
        trace.left(2)
    trace.answer()
    while character.isalnum():
        trace.think(character)
        trace.left(2)
        character = trace.read(2)


def _reversed(trace: Trace) -> None:
    """A number that the word follows; pointer 1 stands on its last digit."""
    trace.answer()
    while (character := trace.read(1)).isdigit():
        trace.think(character)
        trace.left(1)


def _sort(trace: Trace) -> None:
    """Once through the digits for each value from 0 to 9, there and back.

    Pointer 2 stands on the value. Pointer 3 stands on "d" for digits in one row, else on "s" before the first
    digit of the answer and then on "t".
    """
    _right_to_a_digit(trace, 1)
    trace.right(1)
    row = trace.read(1).isdigit()
    trace.think("d" if row else "st")
    trace.last(3)
    if not row:
        trace.left(3)
    if not (_ends_as_row(trace) if row else _all_single(trace)):
        return trace.answer(SINGLE_DIGITS)
    trace.think("9876543210")
    trace.last(2)
    trace.answer()
    step = trace.left
    while True:
        step(1)
        character = trace.read(1)
        if character.isdigit():
            if trace.read(2) == character:
                mark = trace.read(3)
                if mark == "s":
                    trace.right(3)
                trace.think(" " + character if mark == "t" else character)
        elif character not in SEPARATORS:
            trace.left(2)
            if not trace.read(2).isdigit():
                return None
            step = trace.right if step == trace.left else trace.left


def _ends_as_row(trace: Trace) -> bool:
    """Past the row's digits; whether no other digits follow."""
    character = "0"
    while character.isdigit():
        trace.right(1)
        character = trace.read(1)
    while character in SEPARATORS:
        trace.right(1)
        character = trace.read(1)
    return not character.isdigit()


def _all_single(trace: Trace) -> bool:
    """Past the list; whether no digit follows another. Reading "s" after each tells this from a row."""
    character, digit = trace.read(1), False
    while character.isdigit() or character in SEPARATORS:
        if character.isdigit():
            if digit:
                return False
            trace.read(3)
        digit = character.isdigit()
        trace.right(1)
        character = trace.read(1)
    return True


def _write_out(trace: Trace, first: int, stride: int) -> None:
    """The answer's digits from pointer 3 leftwards: `first` entries on, then every `stride` entries."""
    trace.left(3, first)
    written = False
    while (digit := trace.read(3)).isdigit():
        if digit != "0" or written:
            trace.think(digit)
            written = True
        trace.left(3, stride)
    if not written:
        trace.think("0")


def _digits_from_the_right(trace: Trace) -> Iterator[tuple[str, str]]:
    """What pointers 1 and 2 read, from the last digits of two numbers on, until neither is a digit."""
    while True:
        a, b = trace.read(1), trace.read(2)
        if not a.isdigit() and not b.isdigit():
            return
        yield a, b
        if a.isdigit():
            trace.left(1)
        if b.isdigit():
            trace.left(2)


def _value(character: str) -> int:
    return int(character) if character.isdigit() else 0


_PROCEDURES = {
    ADD: _add,
    SUBTRACT: _subtract,
    SUBTRACT_FROM: _subtract,
    MULTIPLY: _multiply,
    **dict.fromkeys((COMPARE, LARGER, SMALLER, IS_GREATER, IS_LESS), _compare),
    REVERSE: _reverse,
    REVERSED: _reversed,
    SORT: _sort,
}
