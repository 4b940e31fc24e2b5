"""How a message is answered with the pointer memory: the traces that the model learns to write.

First it is noted down what kind of message it is, by what is remembered of it; `scan` then reads it again.
From there on traces are written as the model must: it sees what it reads, one entry at a time, and every step
follows from the last few words and from what is read next, whatever the length of the numbers. What has to be
known for longer is noted down, and read again.

    1. Under pointer 3 stands the kind of message. A long number may have blurred it: it is looked at again
       only where there is no task with numbers. Pointer 1 goes through the message. Pointer 4 stands on the
       last note, and is read where a word or a number ends.
    2. Pointer 1 comes back from the end to the last digit of the second number, pointer 2 goes from the
       beginning to the last digit of the first.
    3. The task's own loop, which thinks one digit at a time.
    4. A pointer goes back over the thoughts, and the digits of the answer are written out. Where they lie
       further apart it is another one; where the answer may begin with zeros, it already stands after them.

A logic graph ("1a0b1c1d;a&b>c;c^d>a", see `data.logic`) is not read before it is worked out: pointer 1 goes
through it once, from gate to gate.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from mlx_pararnn.pocket.pointer import PointerMemory

USER, END, ANSWER, EDGE = "<|user|>", "<|end|>", "<|answer|>", "<|edge|>"

# Notes that say which task it is, taken where the second number begins.
ADD, SUBTRACT, SUBTRACT_FROM, MULTIPLY, MULTIPLY_DIGIT = "+", "-", "~", "*", "x"
COMPARE, LARGER, SMALLER, IS_GREATER, IS_LESS = "?", "M", "m", "G", "L"
TWO_NUMBERS = (
    *(ADD, SUBTRACT, SUBTRACT_FROM, MULTIPLY, MULTIPLY_DIGIT),
    *(COMPARE, LARGER, SMALLER, IS_GREATER, IS_LESS),
)
# Notes of tasks with one piece, taken where it ends: a word, a number, digits in a list or in a row.
REVERSED_WORD, REVERSED_NUMBER, SORTED_LIST, SORTED_ROW = "R", "B", "O", "d"
TOO_LONG = "s"  # a list to sort, of longer numbers
NOTHING = "n"  # no such task
NUMBERS, LOGIC = "#", "&"  # the kinds of messages that have a task with numbers, and a logic graph
# Notes that a word has begun a task, and what the second number makes of them.
BEGUN = {"a": ADD, "f": SUBTRACT_FROM, "p": MULTIPLY, "c": COMPARE, "b": LARGER, "l": SMALLER}
REVERSE, SORT = "r", "o"

# Before the first number.
_KEYWORD = re.compile(
    r".*?(?:\b(?P<a>add|sum of)|\b(?P<f>subtract|take)|\b(?P<p>multiply|product of)|\b(?P<c>compare)"
    r"|\b(?P<b>bigger|larger|greater)|\b(?P<l>smaller|less))(?: the numbers)?[:,]? "
)
_POLITE = r"(?:(?:hey|hi|hello|ok|so)?,? ?(?:please|pls|(?:can|could|would) you(?: please)?)? ?)"
_VERB = re.compile(_POLITE)
_QUESTION = re.compile(
    _POLITE + r"(?:what is|what's|whats|what does|how much is|how much does|calculate|compute|work out"
    r"|evaluate|solve|figure out|tell me|say|is)?:? ?"
)
# Between the numbers.
_OPERATORS = {
    **dict.fromkeys(("+", "plus"), ADD),
    **dict.fromkeys(("-", "minus"), SUBTRACT),
    **dict.fromkeys(("*", "x", "times", "multiplied by"), MULTIPLY),
    **dict.fromkeys((">", "bigger than", "larger than", "greater than", "more than"), IS_GREATER),
    **dict.fromkeys(("<", "smaller than", "less than"), IS_LESS),
}
_JOINED_BY = {
    "a": ("and", "to", ",", "plus"),
    "f": ("from",),
    "p": ("by", "and", "with", "times"),
    "c": ("and", "with", "to", "or", ","),
    "b": ("or", "and", ","),
    "l": ("or", "and", ","),
}
_REVERSED = re.compile(r".*\d (?:reversed|backwards)")
_GRAPH = re.compile(r"(?:[01][a-z])+(?:;[a-z][&|^][a-z]>[a-z])+")
GATES: dict[str, Callable[[int, int], int]] = {"&": int.__and__, "|": int.__or__, "^": int.__xor__}
# After a task's word, and after its end.
_OF = ("the", "these", "digits", "digit", "numbers", "number", "of", "word", "string", "letters", "list")
_COURTESY = ("please", "pls", "thanks", "thx", "equal", "equals", "make", "is")
_HARMLESS = " ?!.,;:="
_SEPARATORS = (" ", ", ", ",")

SINGLE_DIGITS = "I can only sort single digits, as in sort 3 1 2."
EQUAL = "they are equal"


@dataclass
class Trace:
    """What stands in the model's text: the message, then what it writes and observes.

    Attributes:
        tokens: bytes as characters of the same number, other tokens by their names.
        learned: of each token, whether the model writes it itself (message and observations it does not).
        answered: the answer so far, None before <|answer|>.
    """

    message: str
    tokens: list[str] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    answered: str | None = None

    def __post_init__(self) -> None:
        self.tokens = [USER, *as_bytes(self.message), END]
        self.learned = [False] * len(self.tokens)
        # The entries are names here, which the memory does not mind.
        self.memory: PointerMemory = PointerMemory(self.tokens, EDGE)  # type: ignore[arg-type]

    def read(self, pointer: int) -> str:
        self.write(f"<|read{pointer}|>")
        seen = str(self.memory.read(pointer))
        self.observe(seen)
        return seen

    def right(self, pointer: int) -> None:
        self.write(f"<|right{pointer}|>")
        self.memory.move(pointer, 1)

    def left(self, pointer: int, times: int = 1) -> None:
        for _ in range(times):
            self.write(f"<|left{pointer}|>")
            self.memory.move(pointer, -1)

    def last(self, pointer: int) -> None:
        self.write(f"<|last{pointer}|>")
        self.memory.jump_to_last(pointer)

    def think(self, text: str) -> None:
        for character in as_bytes(text):
            self.keep(character)
        if self.answered is not None:
            self.answered += text

    def answer(self, text: str = "") -> None:
        """<|answer|>: what is thought from here on is the answer."""
        self.keep(ANSWER)
        self.answered = ""
        self.think(text)

    def end(self) -> None:
        self.write(END)

    def keep(self, token: str) -> None:
        """A token that the model writes, and that can be read again."""
        self.write(token)
        self.memory.append(token)  # type: ignore[arg-type]

    def write(self, token: str) -> None:
        """A token that the model writes and the memory does not keep."""
        self.tokens.append(token)
        self.learned.append(True)

    def observe(self, token: str) -> None:
        """A token that is fed to the model."""
        self.tokens.append(token)
        self.learned.append(False)


def solve(message: str, mistaken: str = "") -> Trace | None:
    """The trace that answers a message, or None for one that is no task of the pointer memory.

    Args:
        message: what the user writes.
        mistaken: a kind that the message is taken for in error; the trace goes on from there.
    """
    trace = Trace(message)
    kind = kind_of(message)
    note_kind(trace, kind, mistaken)
    note = LOGIC if kind == LOGIC else scan(trace)
    if note not in _PROCEDURES:
        return None
    _PROCEDURES[note](trace)
    trace.end()
    return trace


def kind_of(message: str) -> str:
    """The kind of a message with a task: LOGIC or NUMBERS."""
    return LOGIC if _GRAPH.fullmatch(message) else NUMBERS


def note_kind(trace: Trace, kind: str, mistaken: str = "") -> None:
    """Note down what kind of message it is, under pointer 3; a mistaken kind instead is not learned."""
    trace.think(mistaken or kind)
    trace.learned[-1] = not mistaken
    trace.last(3)


def as_bytes(text: str) -> list[str]:
    """The UTF-8 bytes of a text, as characters of the same number."""
    return list(text.encode().decode("latin-1"))


# The message.


@dataclass
class _Scan:
    """What is known on the way through a message. The note is what pointer 4 showed or was put on last."""

    trace: Trace
    note: str = USER
    before: str = ""  # the message so far, in small letters
    run: str = ""  # the word or the digits that end `before`
    numbers: int = 0
    first: str = ""  # the first number
    between: str = ""  # what came after the last number

    def take(self, character: str) -> None:
        """Go on by one byte of the message, which has been read."""
        kind, before = _kind(character), _kind(self.before[-1:])
        if before and kind != before:
            self.note = self.trace.read(4)
            self.write(self.run_ends(character))
        if kind == "digit" != before:
            self.write(self.number_begins())
            self.numbers, self.between = self.numbers + 1, ""
        elif self.contradicts(character, kind, before):
            self.write(NOTHING)
        small = character.lower() if character.isascii() else character
        if kind != "digit":
            self.between += small
        elif self.numbers == 1:
            self.first += character
        self.before += small
        self.run = (self.run if kind == before else "") + small if kind else ""

    def contradicts(self, character: str, kind: str, before: str) -> bool:
        """Whether no task has such a byte here."""
        if kind == "digit":
            return self.note == MULTIPLY and len(self.run) == 1  # a second digit
        if kind == "letter":
            return character >= "\xc0" or (self.note == REVERSED_WORD and not before)
        return self.note in TWO_NUMBERS and character not in (END, *_HARMLESS)

    def write(self, note: str | None) -> None:
        if note is not None:
            self.trace.think(note)
            self.trace.last(4)
            self.note = note

    def number_begins(self) -> str | None:
        note, between = self.note, self.between.strip()
        if note == USER and not self.numbers:
            if found := _KEYWORD.fullmatch(self.before):
                return found.lastgroup
            return None if _QUESTION.fullmatch(self.before) else NOTHING
        if note == USER:
            return self.task(_OPERATORS.get(between))
        if note in BEGUN:
            return self.task(BEGUN[note] if between in _JOINED_BY[note] else None)
        if note == SORTED_LIST:
            return None if self.between in _SEPARATORS else TOO_LONG
        if note == SORTED_ROW:
            return TOO_LONG
        another = note in (REVERSED_WORD, REVERSED_NUMBER) and not self.run
        return NOTHING if another or note in TWO_NUMBERS else None

    def task(self, found: str | None) -> str:
        """Products are of a number and a digit; which of the two comes first is told apart here."""
        if found == MULTIPLY and len(self.first) == 1:
            return MULTIPLY_DIGIT
        return found or NOTHING

    def run_ends(self, character: str) -> str | None:
        """A word or the digits of a number end; `character` follows."""
        run, note = self.run, self.note
        if run.isdigit():
            if note == REVERSE:
                return REVERSED_WORD if _kind(character) else REVERSED_NUMBER
            if note == SORT:
                return SORTED_ROW if len(run) > 1 else SORTED_LIST
            return TOO_LONG if note == SORTED_LIST and len(run) > 1 else None
        if note == USER:
            if run in ("reverse", "sort") and _VERB.fullmatch(self.before.removesuffix(run)):
                return REVERSE if run == "reverse" else SORT
            return REVERSED_NUMBER if _REVERSED.fullmatch(self.before) else None
        if note in (REVERSE, SORT):
            return None if run in _OF else REVERSED_WORD if note == REVERSE else NOTHING
        ended = note in (*TWO_NUMBERS, REVERSED_NUMBER, SORTED_LIST, SORTED_ROW)
        return NOTHING if ended and run not in _COURTESY else None


def scan(trace: Trace) -> str:
    """Pointer 1 through the message, to its end; the last note, <|user|> where none was taken."""
    state = _Scan(trace)
    while True:
        trace.right(1)
        character = trace.read(1)
        state.take(character)
        if character == END:
            return trace.read(4)


def _kind(character: str) -> str:
    """Of which kind of run a byte is part; "" for none."""
    if len(character) != 1:
        return ""
    if "0" <= character <= "9":
        return "digit"
    return "letter" if character.isalpha() or character == "'" or character >= "\x80" else ""


# The tasks. Pointer 1 stands on the end of the message, pointers 2 and 3 at its beginning.


def _to_two_numbers(trace: Trace) -> None:
    """Pointer 1 to the last digit of the second number, pointer 2 to that of the first."""
    _left_to_a_digit(trace, 1)
    trace.right(2)
    while not trace.read(2).isdigit():
        trace.right(2)
    trace.right(2)
    while trace.read(2).isdigit():
        trace.right(2)
    trace.left(2)
    _TWO_NUMBERS[trace.read(4)](trace)


def _left_to_a_digit(trace: Trace, pointer: int) -> None:
    trace.left(pointer)
    while not trace.read(pointer).isdigit():
        trace.left(pointer)


def _add(trace: Trace) -> None:
    trace.think("o")  # no carry; "c" is one
    carry = 0
    for a, b in _digits_from_the_right(trace, 2, 1):
        carry, digit = divmod(_value(a) + _value(b) + carry, 10)
        trace.think(str(digit) + "oc"[carry])
    if carry:
        trace.think("1o")
    trace.last(3)
    trace.answer()
    _write_out(trace, 3, first=1, stride=2)


def _subtract(trace: Trace, minuend: int = 2) -> None:
    """a - b and b - a at once, a digit of each in turn; which of the lower parts is larger says who borrows.

    Pointer 3 stands on the first digit of a - b that is not 0, pointer 4 on that of b - a: so the answer
    begins with its first digit, however many zeros precede it.
    """
    mark = "="
    trace.think(mark)
    for a, b in _digits_from_the_right(trace, minuend, 3 - minuend):
        difference = _value(a) - _value(b)
        digits = (difference - (mark == "<")) % 10, (-difference - (mark == ">")) % 10
        mark = "<" if difference < 0 else ">" if difference else mark
        trace.think(str(digits[0]))
        if digits[0]:
            trace.last(3)
        trace.think(_DIGITS_OF_B_LESS_A[mark][digits[1]])
        if digits[1]:
            trace.last(4)
    if mark == "=":
        trace.answer("0")
    elif mark == ">":
        trace.answer()
        _write_out(trace, 3, first=0, stride=2)
    else:
        trace.answer("-")
        _write_out(trace, 4, first=0, stride=2)


def _multiply(trace: Trace, number: int = 2) -> None:
    """The product of two digits first, then with the carry."""
    trace.think("A")  # carry 0; "B" is 1, up to "I"
    carry = 0
    while (a := trace.read(number)).isdigit():
        product = int(a) * int(trace.read(3 - number))
        carry, digit = divmod(product + carry, 10)
        trace.think(f"{product:02}{digit}{'ABCDEFGHI'[carry]}")
        trace.left(number)
    if carry:
        trace.think(f"00{carry}A")
    trace.last(2)
    trace.answer()
    _write_out(trace, 2, first=1, stride=4)


def _compare(trace: Trace) -> None:
    mark = "e"
    trace.think(mark)
    for a, b in _digits_from_the_right(trace, 2, 1):
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
        return _copy(trace, 2 if (task == LARGER) == (mark == "g") else 1)
    trace.answer()
    _copy(trace, 2)
    trace.think({"l": " < ", "e": " = ", "g": " > "}[trace.read(3)])
    return _copy(trace, 1)


def _copy(trace: Trace, pointer: int) -> None:
    """Write out the number to the right of a pointer."""
    trace.right(pointer)
    while (character := trace.read(pointer)).isdigit():
        trace.think(character)
        trace.right(pointer)
    if pointer == 2:  # the second number follows, or not
        trace.read(4)


def _reverse_word(trace: Trace) -> None:
    trace.left(1)
    while not (character := trace.read(1)).isalnum():
        trace.left(1)
    trace.answer()
    while character.isalnum():
        trace.think(character)
        trace.left(1)
        character = trace.read(1)


def _reverse_number(trace: Trace) -> None:
    _left_to_a_digit(trace, 1)
    trace.answer()
    while (character := trace.read(1)).isdigit():
        trace.think(character)
        trace.left(1)


def _sort(trace: Trace, row: bool) -> None:
    """Once through the digits for each value from 0 to 9, there and back.

    Pointer 2 stands on the value. Pointer 3 stands on "d" for digits in one row, else on "s" before the first
    digit of the answer and then on "t".
    """
    _left_to_a_digit(trace, 1)
    trace.think("d" if row else "st")
    trace.last(3)
    if not row:
        trace.left(3)
    trace.think("9876543210")
    trace.last(2)
    trace.answer()
    step = trace.left
    while True:
        character = trace.read(1)
        if character.isdigit():
            if trace.read(2) == character:
                mark = trace.read(3)
                if mark == "s":
                    trace.right(3)
                trace.think(" " + character if mark == "t" else character)
        elif character not in (" ", ","):
            trace.left(2)
            if not trace.read(2).isdigit():
                return
            step = trace.right if step == trace.left else trace.left
        step(1)


def _logic(trace: Trace) -> None:
    """What is on a wire is thought as its value and its name, first of those that begin with one.

    A gate's wire is looked for from the last thought backwards with pointer 2. The value of the first one is
    thought and stays under pointer 3; ">" tells that it was the second.
    """
    while (read := _next(trace)) != ";":
        trace.think(read)
    while read != END:
        _next(trace)
        first = _value_on_wire(trace)
        _next(trace)
        trace.think(first)
        trace.last(3)
        _next(trace)
        _value_on_wire(trace)
        _next(trace)
        trace.left(1, 2)
        gate, first, second = trace.read(1), trace.read(3), trace.read(2)
        trace.think(str(GATES[gate](int(first), int(second))))
        trace.right(1)
        trace.right(1)
        trace.think(_next(trace))
        read = _next(trace)
    trace.last(2)
    trace.left(2)
    trace.answer(trace.read(2))


def _next(trace: Trace) -> str:
    trace.right(1)
    return trace.read(1)


def _value_on_wire(trace: Trace) -> str:
    """The last value on the wire under pointer 1; pointer 2 stands on it."""
    trace.last(2)
    while trace.read(1) != trace.read(2):
        trace.left(2)
    trace.left(2)
    return trace.read(2)


def _write_out(trace: Trace, pointer: int, first: int, stride: int) -> None:
    """The answer's digits from a pointer leftwards: `first` entries on, then every `stride` entries."""
    trace.left(pointer, first)
    written = False
    while (digit := _DIGITS.get(trace.read(pointer))) is not None:
        if digit != "0" or written:
            trace.think(digit)
            written = True
        trace.left(pointer, stride)
    if not written:
        trace.think("0")


def _digits_from_the_right(trace: Trace, first: int, second: int) -> Iterator[tuple[str, str]]:
    """What two pointers read, from the last digits of two numbers on, until neither is a digit."""
    while True:
        a, b = trace.read(first), trace.read(second)
        if not a.isdigit() and not b.isdigit():
            return
        yield a, b
        if a.isdigit():
            trace.left(first)
        if b.isdigit():
            trace.left(second)


def _value(character: str) -> int:
    return int(character) if character.isdigit() else 0


# A digit of b - a, by which of the lower parts is larger so far: a (">"), b ("<") or neither.
_DIGITS_OF_B_LESS_A = {"=": "0", ">": "ABCDEFGHIJ", "<": "abcdefghij"}
_DIGITS = {
    character: str(digit)
    for characters in ("0123456789", *_DIGITS_OF_B_LESS_A.values())
    for digit, character in enumerate(characters)
}
_TWO_NUMBERS = {
    ADD: _add,
    SUBTRACT: _subtract,
    SUBTRACT_FROM: partial(_subtract, minuend=1),
    MULTIPLY: _multiply,
    MULTIPLY_DIGIT: partial(_multiply, number=1),
    **dict.fromkeys((COMPARE, LARGER, SMALLER, IS_GREATER, IS_LESS), _compare),
}
_PROCEDURES = {
    **dict.fromkeys(_TWO_NUMBERS, _to_two_numbers),
    REVERSED_WORD: _reverse_word,
    REVERSED_NUMBER: _reverse_number,
    SORTED_LIST: partial(_sort, row=False),
    SORTED_ROW: partial(_sort, row=True),
    TOO_LONG: partial(Trace.answer, text=SINGLE_DIGITS),
    LOGIC: _logic,
}
