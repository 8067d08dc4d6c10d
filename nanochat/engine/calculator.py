"""The tool that a model calls between <|python_start|> and <|python_end|>: arithmetic, and counting in a string.

The expression is parsed, never evaluated by Python: only the nodes listed here mean anything. Numbers are exact
fractions of bounded size, so no expression takes more than a moment, in any thread.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context
from fractions import Fraction

MAX_LENGTH = 200  # characters of an expression
MAX_BITS = 128  # of numerator and of denominator, after every operation
DIGITS = 12  # significant digits of a result that is no whole number

# What comes near: Python's parser prints warnings about odd literals (`1if`), and models write many.
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/%()]+", re.ASCII)
_COUNTING = re.compile(r"[^\\\0]*\.\s*count\s*\([^\\\0]*\)\s*")

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


class _NotComputable(Exception):
    """Nothing the calculator knows, or beyond its bounds."""


def use_calculator(expression: str) -> str | None:
    """The value of an arithmetic expression (+ - * / // % ** and brackets; `1,000` is a thousand), or of
    'text'.count('part'), as the tool prints it. None for anything else, and for what is too long or too large."""
    text = expression.strip()
    if len(expression) > MAX_LENGTH or not (_ARITHMETIC.fullmatch(text) or _COUNTING.fullmatch(text)):
        return None
    if _ARITHMETIC.fullmatch(text):
        text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    try:
        node = ast.parse(text, mode="eval").body
        return str(_count(node)) if isinstance(node, ast.Call) else _shown(_value(node))
    except (_NotComputable, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # the parser answers deep nesting with MemoryError or RecursionError, a null byte with ValueError


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(repr(node.value)))  # 0.1 is a tenth, not the float nearest to it
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if operation := _OPERATORS.get(type(node.op)):
            return _bounded(operation(left, right))
    raise _NotComputable


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent.numerator) > 2 * MAX_BITS:  # checked before it is computed
        raise _NotComputable
    return _bounded(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotComputable
    return value


def _count(call: ast.Call) -> int:
    match call:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise _NotComputable


def _shown(value: Fraction) -> str:
    """Whole numbers as such, others as a decimal number without exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=DIGITS)
    number = context.divide(context.create_decimal(value.numerator), context.create_decimal(value.denominator))
    return format(number.normalize(context), "f")
