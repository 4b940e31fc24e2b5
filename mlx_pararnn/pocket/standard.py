"""An exact calculator and units, for functions that models call."""

import ast
import math
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

MAX_BITS = 50_000  # of a number that is computed: some 15,000 digits
MAX_EXPRESSION = 10_000  # characters
_DIGITS = Context(prec=15)  # of a number that has no end


def calculate(expression: str) -> str:
    """Compute + - * / // % ** ( ) and sqrt, cbrt, abs, round, min, max exactly, of numbers of any length."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression may have {MAX_EXPRESSION} characters")
    text = expression.translate(_SIGNS)
    text = re.sub(r"%\s*of\b", "/100*", text)
    text = re.sub(r"%(?=\s*(?:[)*/]|$))", "/100", text)
    # Numbers as strings: Python's parser takes no long ones, and rounds those with a point.
    try:
        tree = ast.parse(_NUMBER.sub(r"'\g<0>'", text).strip(), mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{expression[:100]!r} is no expression") from None
    return as_text(_value(tree.body))


def convert_units(value: float, from_unit: str, to_unit: str) -> str:
    """Convert lengths, areas, volumes, masses, speeds, times, temperatures, amounts of data and energy."""
    (kind, factor, zero), (to_kind, to_factor, to_zero) = _unit(from_unit), _unit(to_unit)
    if kind != to_kind:
        raise ValueError(f"{from_unit} is a unit of {kind} and {to_unit} one of {to_kind}")
    number = ((Fraction(str(value)) + zero) * factor) / to_factor - to_zero
    return f"{as_text(number)} {to_unit}"


def as_text(number: Fraction) -> str:
    """A number in digits: exact where it ends within 20 decimals, else to 15 digits."""
    if number.denominator == 1:
        return str(Decimal(number.numerator)) if number.numerator.bit_length() < MAX_BITS else _too_large()
    rest, twos, fives = number.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest == 1 and places <= 20:
        scaled = abs(number.numerator) * 10**places // number.denominator
        whole, part = divmod(scaled, 10**places)
        return f"{'-' if number < 0 else ''}{Decimal(whole)}.{part:0{places}d}"
    found = _DIGITS.divide(Decimal(number.numerator), Decimal(number.denominator))
    return f"{found.normalize(_DIGITS)}"


_SIGNS = {ord(sign): text for sign, text in (*zip("×·÷−", "**/-", strict=True), ("^", "**"))}
_NUMBER = re.compile(r"(?<![\w.'])(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?!\w))?")
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "round": round, "min": min, "max": max, "sqrt": lambda number: _root(number),
    "cbrt": lambda number: _cube_root(number)
}  # fmt: skip
_ARGUMENTS: dict[str, tuple[float, float]] = {"min": (2, math.inf), "max": (2, math.inf)}  # else one
_CONSTANTS = {"pi": Fraction("3.14159265358979323846"), "e": Fraction("2.71828182845904523536")}


def _value(node: ast.expr) -> Fraction:
    """The number that an expression stands for; nothing but arithmetic is looked at."""
    match node:
        case ast.Constant(value=str(text)) if _NUMBER.fullmatch(text):
            if (node.lineno, node.col_offset + len(text) + 2) != (node.end_lineno, node.end_col_offset):
                raise ValueError("there is no sign between two numbers")  # which Python's parser joins
            number = Fraction(Decimal(text.replace("_", "")))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            number = _value(operand) if isinstance(op, ast.UAdd) else -_value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            number = _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left), _value(right)
            if b == 0 and not isinstance(op, ast.Add | ast.Sub | ast.Mult):
                raise ValueError("division by zero")
            number = Fraction(_OPERATORS[type(op)](a, b))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
            least, most = _ARGUMENTS.get(name, (1, 1))
            if not least <= len(args) <= most:
                raise ValueError(f"{name} of {len(args)} numbers is not arithmetic")
            number = Fraction(_FUNCTIONS[name](*map(_value, args)))
        case ast.Name(id=name) if name in _CONSTANTS:
            number = _CONSTANTS[name]
        case _:
            raise ValueError(f"{ast.unparse(node)[:60]} is not arithmetic")
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        _too_large()
    return number


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if exponent == Fraction(1, 2):
            return _root(base)
        raise ValueError("exponents must be whole numbers, or 0.5")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length(), 1) > MAX_BITS:
        if abs(base) not in (0, 1):
            _too_large()
        exponent %= 2
        return base**2 if exponent == 0 else base
    return base ** int(exponent)


def _root(number: Fraction) -> Fraction:
    """The square root: exact where it is a fraction, else to 30 digits."""
    if number < 0:
        raise ValueError("the square root of a negative number")
    top, bottom = math.isqrt(number.numerator), math.isqrt(number.denominator)
    if (top**2, bottom**2) == (number.numerator, number.denominator):
        return Fraction(top, bottom)
    precise = Context(prec=30)
    return Fraction(precise.sqrt(precise.divide(Decimal(number.numerator), Decimal(number.denominator))))


def _cube_root(number: Fraction) -> Fraction:
    """Exact where it is a fraction, else to some 16 digits."""
    guess = Fraction(math.cbrt(number)) if number else Fraction(0)
    near = Fraction(round(guess)), guess.limit_denominator(1000)
    return next((root for root in near if root**3 == number), guess)


def _too_large() -> Any:
    raise ValueError("the number is too large")


# Of each kind: names of a unit, and how many of the first unit it is.
UNITS: dict[str, dict[str, str]] = {
    "length": {
        "m meter metre": "1", "km kilometer kilometre": "1000", "cm centimeter centimetre": "0.01",
        "mm millimeter millimetre": "0.001", "mi mile": "1609.344", "yd yard": "0.9144",
        "ft foot feet": "0.3048", "in inch inches": "0.0254", "nmi nautical_mile": "1852",
    },
    "area": {
        "m2 square_meter square_metre": "1", "km2 square_kilometer square_kilometre": "1000000",
        "ha hectare": "10000", "acre": "4046.8564224", "ft2 square_foot square_feet": "0.09290304",
        "mi2 square_mile": "2589988.110336",
    },
    "volume": {
        "l liter litre": "1", "ml milliliter millilitre": "0.001", "cl centiliter centilitre": "0.01",
        "m3 cubic_meter cubic_metre": "1000", "gal gallon": "3.785411784", "qt quart": "0.946352946",
        "pt pint": "0.473176473", "cup": "0.2365882365", "fl_oz fluid_ounce": "0.0295735295625",
        "tbsp tablespoon": "0.01478676478125", "tsp teaspoon": "0.00492892159375",
    },
    "mass": {
        "g gram gramme": "1", "kg kilogram kilo": "1000", "mg milligram": "0.001", "t ton tonne": "1000000",
        "lb lbs pound": "453.59237", "oz ounce": "28.349523125", "st stone": "6350.29318",
    },
    "speed": {
        "m/s meters_per_second": "1", "km/h kmh kph kilometers_per_hour": "5/18",
        "mph miles_per_hour": "0.44704", "kn knot": "463/900",
    },
    "time": {
        "s sec second": "1", "ms millisecond": "0.001", "min minute": "60", "h hr hour": "3600",
        "d day": "86400", "week": "604800", "year": "31557600",
    },
    "temperature": {
        "c celsius °c": "1", "k kelvin": "1", "f fahrenheit °f": "5/9",
    },
    "data": {
        "byte b": "1", "bit": "0.125", "kb kilobyte": "1000", "mb megabyte": "1000000",
        "gb gigabyte": "1000000000", "tb terabyte": "1000000000000", "kib kibibyte": "1024",
        "mib mebibyte": "1048576", "gib gibibyte": "1073741824",
    },
    "energy": {
        "j joule": "1", "kj kilojoule": "1000", "cal calorie": "4.184", "kcal kilocalorie": "4184",
        "wh watt_hour": "3600", "kwh kilowatt_hour": "3600000",
    },
}  # fmt: skip
# What is added to a temperature before it is multiplied to kelvin.
_ZEROS = {"celsius": Fraction("273.15"), "fahrenheit": Fraction("459.67")}


def _unit(name: str) -> tuple[str, Fraction, Fraction]:
    """A unit's kind, its factor, and what is added before."""
    wanted = "_".join(
        name.strip().lower().replace("degrees ", "").replace("²", "2").replace("³", "3").split()
    )
    for spelled in (wanted, wanted.removesuffix("s"), wanted.removesuffix("es")):
        for kind, units in UNITS.items():
            for names, factor in units.items():
                if spelled in names.split():
                    zero = next((_ZEROS[n] for n in names.split() if n in _ZEROS), Fraction(0))
                    return kind, Fraction(factor), zero
    raise ValueError(f"there is no unit {name[:60]!r} here")
