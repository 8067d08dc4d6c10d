"""Word problems of one or two steps over small whole numbers, each step worked out with the calculator tool.

What identifies a problem is its template with its numbers: that decides between train and test, and the names, objects
and wordings in it do not matter. Answers have one form, in few tokens: each calculation once as text, which the call
that follows repeats (a small model copies more safely than it writes two forms of the same thing), then `#### result`.
There are no spaces in a calculation: they would be tokens of their own, and the call has none either. The templates,
names and things stand in arithmetic.jsonl beside this module; `[gets|buys|finds]` is any of these words.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from nanochat.files import read_jsonl
from nanochat.tasks.common import (
    Conversation,
    GeneratedTask,
    answered,
    call_calculator,
    item_rng,
    split_of,
    worded,
)

LIMIT = 1000  # numbers and results are below it
LARGEST_FACTOR = 12  # factors and divisors, mostly
LARGE_SHARE = 0.3  # of the problems have numbers up to LIMIT, the others up to SMALL
SMALL = 99
TRIES = 300  # draws of numbers before another template is taken


class Template(NamedTuple):
    """A problem: `text` names the numbers {a} {b} {c}; each step is `operand operator operand`, r the last result."""

    text: str
    steps: list[str]


_LINES = read_jsonl(Path(__file__).with_suffix(".jsonl"))
TEMPLATES = [Template(**line) for line in _LINES if "text" in line]
NAMES, THINGS = (next(line[kind] for line in _LINES if kind in line) for kind in ("names", "things"))
_OPERATIONS: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right if right and left % right == 0 else None,
}


class Arithmetic(GeneratedTask):
    """Generated word problems; answers call the calculator and end in `#### n`."""

    name = "Arithmetic"
    source = "generated word problems"

    def get_example(self, index: int) -> Conversation:
        rng = item_rng("arithmetic", self.split, index, 2, LIMIT - 1)  # two steps at most, and the largest number
        template, numbers, results = self._problem(rng)
        first, second = rng.sample(NAMES, 2)
        question = worded(template.text, rng).format(x=first, y=second, things=rng.choice(THINGS), **numbers)
        return answered(question, _answer(results))

    def _problem(self, rng: random.Random) -> tuple[Template, dict[str, int], list[tuple[str, int]]]:
        """A template, numbers that put it into this split, and (expression, result) of each step."""
        while True:
            # the template first and for good: else those that most numbers fit would be drawn far more often
            template = rng.choice(TEMPLATES)
            for _ in range(TRIES):
                numbers = _draw_numbers(template, rng)
                results = _work_out(template, numbers)
                its = split_of("arithmetic", template.text, sorted(numbers.items()))
                if results is not None and its == self.split:
                    return template, numbers, results


def _draw_numbers(template: Template, rng: random.Random) -> dict[str, int]:
    """Numbers from 2 up, so that plurals are right; most are small, factors and divisors above all."""
    most, most_factor = (LIMIT - 1, SMALL) if rng.random() < LARGE_SHARE else (SMALL, LARGEST_FACTOR)
    factors = {name for step in template.steps for name in _factors(step)}
    names = sorted({name for step in template.steps for name in step if name in "abc"})
    return {name: rng.randint(2, most_factor if name in factors else most) for name in names}


def _factors(step: str) -> list[str]:
    left, operator, right = step.split()
    return {"*": [left, right], "/": [right]}.get(operator, [])


def _work_out(template: Template, numbers: Mapping[str, int]) -> list[tuple[str, int]] | None:
    """(expression, result) of each step; None where a result is no whole number from 0 to LIMIT - 1. A result that is
    used further is at least 1; nothing left halfway would read oddly."""
    values = dict(numbers)
    results: list[tuple[str, int]] = []
    for step in template.steps:
        left, operator, right = step.split()
        result = _OPERATIONS[operator](values[left], values[right])
        lowest = 0 if step == template.steps[-1] else 1
        if result is None or not lowest <= result < LIMIT:
            return None
        results.append((f"{values[left]}{operator}{values[right]}", result))
        values["r"] = result
    return results


def _answer(results: list[tuple[str, int]]) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for expression, result in results:
        line_break = "\n" if parts else ""
        parts.append({"type": "text", "text": f"{line_break}{expression}="})
        parts += call_calculator(expression, result)
    return [*parts, {"type": "text", "text": f"\n#### {results[-1][1]}"}]
