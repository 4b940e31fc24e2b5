"""The calculator and the units."""

import json

import pytest

from mlx_pararnn.pocket import standard
from mlx_pararnn.pocket.functions import Functions


def call(name, **arguments):
    functions = Functions([standard.calculate, standard.convert_units])
    return functions.call(name, json.dumps(arguments))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", "7"),
        ("(1+2)*3", "9"),
        ("-7 // 2", "-4"),
        ("7 % 3", "1"),
        ("2^10", "1024"),
        ("2**-2", "0.25"),
        ("0.1 + 0.2", "0.3"),
        (".5*4", "2"),
        ("1/3", "0.333333333333333"),
        ("-1/8", "-0.125"),
        ("10/4", "2.5"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("15% of 80", "12"),
        ("200 * 5%", "10"),
        ("1_000 + 1", "1001"),
        ("1.5e3", "1500"),
        ("sqrt(144)", "12"),
        ("sqrt(2)", "1.4142135623731"),
        ("2**0.5", "1.4142135623731"),
        ("cbrt(27)", "3"),
        ("cbrt(-0.125)", "-0.5"),
        ("cbrt(0)", "0"),
        ("cbrt(2)", "1.25992104989487"),
        ("max(1, 2.5, 2)", "2.5"),
        ("round(2.6)", "3"),
        ("pi", "3.14159265358979323846"),
        ("1**1000000000", "1"),
        ("(-1)**1000000001", "-1"),
        ("9" * 5000 + "+1", "1" + "0" * 5000),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert standard.calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("1 % 0", "division by zero"),
        ("9**9**9", "too large"),
        ("2**100000000", "too large"),
        ("1e9999*1e9999", "too large"),
        ("sqrt(-1)", "negative"),
        ("cbrt(10**400)", "too large"),
        ("2**0.3", "whole numbers"),
        ("1+", "no expression"),
        ("", "no expression"),
        ("()", "not arithmetic"),
        ("import os", "no expression"),
        ("__import__('os')", "not arithmetic"),
        ("sqrt.__class__", "not arithmetic"),
        ("(1).real", "not arithmetic"),
        ("[1]*9", "not arithmetic"),
        ("'a'*9", "not arithmetic"),
        ("sqrt(number=2)", "not arithmetic"),
        ("max()", "not arithmetic"),
        ("min(1)", "not arithmetic"),
        ("sqrt(1, 2)", "not arithmetic"),
        ("round(2.6, 1)", "not arithmetic"),
        ("1 2", "no sign between two numbers"),
        ("(1\n  2)", "no sign between two numbers"),
        ("2 * '1' '2'", "no sign between two numbers"),
        ("(" * 9000, "no expression"),
        ("-" * 9000 + "1", "expression"),
        ("1+" * 6000 + "1", "10000 characters"),
    ],
)
def test_what_is_no_arithmetic_is_an_error_at_once(expression, said):
    text, failed = call("calculate", expression=expression)
    assert failed
    assert said in text


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("convert_units", {"value": 5, "from_unit": "miles", "to_unit": "km"}, "8.04672 km"),
        ("convert_units", {"value": 100, "from_unit": "degrees Celsius", "to_unit": "f"}, "212 f"),
        ("convert_units", {"value": -40, "from_unit": "F", "to_unit": "C"}, "-40 C"),
        ("convert_units", {"value": 0, "from_unit": "C", "to_unit": "K"}, "273.15 K"),
        ("convert_units", {"value": 6, "from_unit": "feet", "to_unit": "inches"}, "72 inches"),
        ("convert_units", {"value": 36, "from_unit": "km/h", "to_unit": "m/s"}, "10 m/s"),
        ("convert_units", {"value": 1, "from_unit": "m²", "to_unit": "cm"}, "error"),
        ("convert_units", {"value": 1, "from_unit": "parsec", "to_unit": "m"}, "error"),
    ],
)
def test_units(name, arguments, text):
    found, failed = call(name, **arguments)
    assert found.startswith(text)
    assert failed == (text == "error")


def test_every_unit_is_its_own_and_converts_there_and_back():
    names = [names.split() for units in standard.UNITS.values() for names in units]
    assert len({name for group in names for name in group}) == sum(map(len, names))
    for kind, units in standard.UNITS.items():
        first = next(iter(units)).split()[0]
        for group in units:
            for name in group.split():
                there = standard.convert_units(7, name, first).split()[0]
                back = standard.convert_units(float(there), first, name).split()[0]
                assert float(back) == pytest.approx(7, rel=1e-12), (kind, name)
