"""Word problems of one or two steps over small whole numbers, each step worked out with the calculator tool.

What identifies a problem is its template with its numbers: that decides between train and test, and the names and
objects in it do not matter. Answers have one form, in few tokens: each calculation once as text, which the call that
follows repeats (a small model copies more safely than it writes two forms of the same thing), then `#### result`.
There are no spaces in a calculation: they would be tokens of their own, and the call has none either. The templates
stand in arithmetic.jsonl beside this module.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.errors import UserError
from nanochat.files import read_jsonl
from nanochat.tasks.common import Conversation, GeneratedTask, Split, answered, call_calculator, item_rng, split_of

LIMIT = 1000  # results are below it
LIMIT_BETWEEN = 100  # and those that a second step uses below this: one token each, and a short answer
LARGEST_FACTOR = 12  # factors and divisors; products of larger numbers are beyond what the problems should need
TRIES = 300  # draws of numbers before another template is taken


class Template(NamedTuple):
    """A problem: `text` names the numbers {a} {b} {c}; each step is `operand operator operand`, r the last result."""

    text: str
    steps: list[str]


TEMPLATES = [Template(**line) for line in read_jsonl(Path(__file__).with_suffix(".jsonl"))]
NAMES = (
    "Ada", "Ben", "Cara", "Dan", "Ella", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kate", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tess", "Will",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "cups", "eggs", "flowers", "keys", "marbles", "nuts", "oranges", "pears", "pencils",
    "plates", "shells", "stamps", "stones",
)  # fmt: skip
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

    def __init__(self, split: Split, size: int | None = None, steps: int = 2, largest: int = 99, **kwargs: Any) -> None:
        """`size` problems of up to `steps` steps, numbers up to `largest`.

        Raises UserError for steps other than 1 and 2, and for a `largest` outside 9 … 99.
        """
        super().__init__(split, size, **kwargs)
        if steps not in (1, 2):
            raise UserError(f"Arithmetic steps={steps}: choose 1 or 2")
        if not 9 <= largest <= 99:
            raise UserError(f"Arithmetic largest={largest}: choose 9 to 99")
        self.steps, self.largest = steps, largest

    def get_example(self, index: int) -> Conversation:
        rng = item_rng("arithmetic", self.split, index, self.steps, self.largest)
        template, numbers, results = self._problem(rng)
        first, second = rng.sample(NAMES, 2)
        question = template.text.format(x=first, y=second, things=rng.choice(THINGS), **numbers)
        return answered(question, _answer(results))

    def _problem(self, rng: random.Random) -> tuple[Template, dict[str, int], list[tuple[str, int]]]:
        """A template, numbers that put it into this split, and (expression, result) of each step."""
        usable = [template for template in TEMPLATES if len(template.steps) <= self.steps]
        while True:
            # the template first and for good: else those that most numbers fit would be drawn far more often
            template = rng.choice(usable)
            for _ in range(TRIES):
                numbers = _draw_numbers(template, self.largest, rng)
                results = _work_out(template, numbers)
                if results is not None and problem_split(template, numbers) == self.split:
                    return template, numbers, results


def problem_split(template: Template, numbers: Mapping[str, int]) -> Split:
    """Where a problem belongs: by its template and its numbers."""
    return split_of("arithmetic", template.text, sorted(numbers.items()))


def _draw_numbers(template: Template, largest: int, rng: random.Random) -> dict[str, int]:
    """Numbers from 2 up, so that plurals are right; factors and divisors stay small."""
    factors = {name for step in template.steps for name in _factors(step)}
    names = sorted({name for step in template.steps for name in step if name in "abc"})
    return {name: rng.randint(2, min(LARGEST_FACTOR, largest) if name in factors else largest) for name in names}


def _factors(step: str) -> list[str]:
    left, operator, right = step.split()
    return {"*": [left, right], "/": [right]}.get(operator, [])


def _work_out(template: Template, numbers: Mapping[str, int]) -> list[tuple[str, int]] | None:
    """(expression, result) of each step; None where a result is no whole number from 0 to LIMIT - 1.

    A result that is used further is from 1 to LIMIT_BETWEEN - 1; nothing left halfway would read oddly.
    """
    values = dict(numbers)
    results: list[tuple[str, int]] = []
    for step in template.steps:
        left, operator, right = step.split()
        result = _OPERATIONS[operator](values[left], values[right])
        lowest, limit = (0, LIMIT) if step == template.steps[-1] else (1, LIMIT_BETWEEN)
        if result is None or not lowest <= result < limit:
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
