import operator
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine.calculator import use_calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("5+7", "12"),
        (" 2*(3+4) ", "14"),
        ("12/60", "0.2"),
        ("0.1+0.2", "0.3"),
        ("1,234,567+1", "1234568"),
        ("10/4*2", "5"),
        ("1/3", "0.333333333333"),
        ("7//2", "3"),
        ("-7%3", "2"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        ("--3", "3"),
        (".5*.5", "0.25"),
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("x")', "0"),
        ("'1,000'.count(',')", "1"),
    ],
)
def test_what_it_computes(expression, value):
    assert use_calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "", "x", "1+", "1/0", "5 % 0", "2**0.5", "True", "1j", "'a'", "'a'+'b'", "'a'*9", "[1]", "(1,2)",
        "1 if 1 else 2", "print(1)", "__import__('os')", "'a'.upper()", "'a'.count('a', 0)", "'a'.count(x)", "abs(-1)",
        "1e999", "1\x002", "1;2", "lambda: 1", "9**9**9**9", "10**10**8", "99999999**99999999",
        "(" * 150 + "1" + ")" * 150, "1" * 201, "1<<3", "~1", "not 1", "f'{1}'", "(0).__class__",
    ],
)  # fmt: skip
def test_what_it_refuses(expression):
    assert use_calculator(expression) is None


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
expressions = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=6,
)


@given(expressions)
def test_agrees_with_exact_arithmetic(expression):
    try:
        value = _reference(expression)
    except ZeroDivisionError:
        assert use_calculator(expression) is None
        return
    found = use_calculator(expression)
    assert found is not None and abs(Fraction(found) - value) <= abs(value) * Fraction(1, 10**11)


def _reference(expression: str) -> Fraction:
    """Recursive descent over the fully bracketed form."""
    if not expression.startswith("("):
        return Fraction(int(expression))
    depth = 0
    for i, character in enumerate(expression[1:-1], start=1):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in OPERATIONS:
            return OPERATIONS[character](_reference(expression[1:i]), _reference(expression[i + 1 : -1]))
    raise AssertionError(expression)


@given(st.text(max_size=250))
def test_any_text_is_answered_at_once(text):
    started = time.perf_counter()
    assert use_calculator(text) is None or isinstance(use_calculator(text), str)
    assert time.perf_counter() - started < 0.5


def test_in_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(use_calculator("6*7")))
    thread.start()
    thread.join()
    assert results == ["42"]
