"""Tasks by name: what the chat stages train on and are graded by.

`parse_tasks("SmolTalk:10000,GSM8K*2,mine.jsonl", "train", source)` gives the tasks of a spec: items joined by `,` or
`|`, each `Name[:count][*repeats]`. The modules of the tasks are imported when one is made, so this one costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.tasks.common import Split, Task

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")
"""The published data sets whose mean centred accuracy is the ChatCORE metric."""

TASK_NAMES = (
    "SmolTalk",
    *("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"),
    *("SimpleSpelling", "SpellingBee", "Arithmetic", "TextChoice", "Identity"),
)
GYM = "reasoning-gym/"


@dataclass(frozen=True)
class TaskSpec:
    """One item of a spec: a task, the number of its first items that are taken (None: all), how often it is given."""

    name: str
    count: int | None = None
    repeats: int = 1


def parse_spec(spec: str) -> list[TaskSpec]:
    """The items of a spec, names as TASK_NAMES spells them. Raises UserError for what is not of the form above."""
    if not spec.strip():
        raise UserError(f"no tasks given: expected some of {_choices()}, joined by commas")
    return [_parse_item(item.strip(), spec) for item in spec.replace("|", ",").split(",")]


def parse_tasks(spec: str, split: Split, source: str | None = None) -> list[Task]:
    """The tasks of a spec, each as often as it says. `count` beyond the end of a task takes all of it.

    `source` is the run's text source, for tasks made from text. Raises UserError for a malformed spec, an unknown
    name and data that is absent.
    """
    tasks: list[Task] = []
    for item in parse_spec(spec):
        tasks += [make_task(item.name, split, source, item.count)] * item.repeats
    return tasks


def canonical_name(name: str) -> str:
    """`name` as TASK_NAMES spells it; JSONL files and reasoning-gym generators as they are. Raises UserError."""
    if name.endswith(".jsonl"):
        return name
    if name.casefold().startswith(GYM) and len(name) > len(GYM):
        return GYM + name[len(GYM) :]
    known = {task.casefold(): task for task in TASK_NAMES}
    if name.casefold() not in known:
        raise UserError(f"unknown task {name!r}: expected {_choices()}")
    return known[name.casefold()]


def make_task(name: str, split: Split, source: str | None = None, count: int | None = None) -> Task:
    """The task `name`, in any case, or the JSONL file of that name; `count` is the number of items wanted (None: all).

    `source` is the run's text source, for tasks made from text. Raises UserError for an unknown name and absent data.
    """
    name = canonical_name(name)
    if name.endswith(".jsonl"):
        from nanochat.tasks.customjson import CustomJSON

        return CustomJSON(Path(name), split, stop=count)
    if name.startswith(GYM) or name in ("SimpleSpelling", "SpellingBee", "Arithmetic"):
        return _generated(name, split, source, {} if count is None else {"size": count})
    return _stored(name, split, source, count)


def _stored(name: str, split: Split, source: str | None, count: int | None) -> Task:
    """A task whose items lie in the store or in a list: the first `count` of them."""
    if name in ("ARC-Easy", "ARC-Challenge"):
        from nanochat.tasks.arc import ARC

        return ARC(name, split, stop=count)  # type: ignore[arg-type]  # the two names it takes
    if name == "MMLU":
        from nanochat.tasks.mmlu import MMLU

        return MMLU(split, stop=count)
    if name == "GSM8K":
        from nanochat.tasks.gsm8k import GSM8K

        return GSM8K(split, stop=count)
    if name == "HumanEval":
        from nanochat.tasks.humaneval import HumanEval

        return HumanEval(split, stop=count)
    if name == "SmolTalk":
        from nanochat.tasks.smoltalk import SmolTalk

        return SmolTalk(split, stop=count)
    if name == "TextChoice":
        from nanochat.tasks.text_choice import TextChoice

        return TextChoice(split, _text_source(name, source), stop=count)
    from nanochat.tasks.identity import Identity

    return Identity(split, stop=count)


def _generated(name: str, split: Split, source: str | None, size: dict[str, Any]) -> Task:
    """A task that makes as many items as it is asked for."""
    if name == "SimpleSpelling":
        from nanochat.tasks.spelling import SimpleSpelling

        return SimpleSpelling(split, _text_source(name, source), **size)
    if name == "SpellingBee":
        from nanochat.tasks.spelling import SpellingBee

        return SpellingBee(split, _text_source(name, source), **size)
    if name == "Arithmetic":
        from nanochat.tasks.arithmetic import Arithmetic

        return Arithmetic(split, **size)
    from nanochat.tasks.reasoning_gym import ReasoningGym

    return ReasoningGym(name.removeprefix(GYM), split, **size)


def _text_source(name: str, source: str | None) -> str:
    from nanochat.dataset import canonical

    if source is None:
        raise UserError(f"{name} is made from text: name the run's text source with --source")
    return canonical(source)


def _parse_item(item: str, spec: str) -> TaskSpec:
    rest, repeats = _number_after("*", item, spec)
    name, count = _number_after(":", rest, spec)
    if not name:
        raise UserError(f"tasks {spec!r}: an item without a name; expected Name[:count][*repeats], joined by commas")
    return TaskSpec(canonical_name(name), count, 1 if repeats is None else repeats)


def _number_after(sign: str, item: str, spec: str) -> tuple[str, int | None]:
    """`item` without its last `sign` and the number that follows it, None where there is no sign."""
    before, found, text = item.rpartition(sign)
    if not found or text.endswith(".jsonl"):  # a sign inside a file name
        return item, None
    number = int(text) if text.strip().replace("_", "").isdecimal() else 0
    if number < 1:
        what = {":": "count", "*": "repeats"}[sign]
        raise UserError(f"tasks {spec!r}: {what} {text.strip()!r} of {before.strip()}, expected a whole number from 1")
    return before.strip(), number


def _choices() -> str:
    names: Sequence[str] = (*TASK_NAMES, f"{GYM}<generator>")
    return f"{', '.join(names)}, or a .jsonl file"
