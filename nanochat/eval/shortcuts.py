"""What answers score that know nothing of the question: the same answer always, the shortest, the most frequent words.

The best of them, measured on all items of a task, is what its scores are centred by: always answering 1 had 46 % of a
counting task right while guessing counted as 0.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from nanochat.eval import bundle
from nanochat.tasks.common import Conversation, Task

DRAWS = 2000  # items x random models; the mean of one model over 100 items would be off by 4 %

Choice = tuple[Sequence[str], int]  # the options of an item, and which is right
Guess = tuple[float, str]  # accuracy between 0 and 1, and how it is reached


def best_of(shortcuts: dict[str, float]) -> Guess:
    """The accuracy of the best shortcut and its name; the first among equals, (0, "") of none."""
    name = max(shortcuts, key=lambda each: round(shortcuts[each], 6), default="")
    return (round(shortcuts[name], 6), name) if name else (0.0, "")


def of_choices(items: Sequence[Choice], text: Iterable[str] = ()) -> dict[str, float]:
    """Accuracy of each shortcut over items with options; `text`: more of the task's text to count words in.

    The untrained model is one that gives every word a loss at random, scored by the mean as models are.
    """
    counts = Counter(word for each in (*text, *(option for options, _ in items for option in options))
                     for word in each.split())  # fmt: skip
    draws = math.ceil(DRAWS / max(1, len(items)))
    scorers: dict[str, Callable[[str], float]] = {
        "the shortest": lambda option: -len(option),
        "the longest": len,
        "the most frequent words": lambda option: _mean(math.log(counts[word]) for word in option.split()),
        "the rarest words": lambda option: -_mean(math.log(counts[word]) for word in option.split()),
    }
    found = {f"always {place + 1} of {most}": _mean(right == place for _, right in items)
             for most in [max((len(options) for options, _ in items), default=0)] for place in range(most)}  # fmt: skip
    found |= {name: _mean(_credit([scorer(option) for option in options], right) for options, right in items)
              for name, scorer in scorers.items()}  # fmt: skip
    untrained = (
        _credit([_mean(_noise(draw, word) for word in option.split()) for option in options], right)
        for options, right in items
        for draw in range(draws)
    )
    return {**found, "an untrained model": _mean(untrained)}


def of_answers(answers: Sequence[str]) -> dict[str, float]:
    """Share of the most common answer; what is right once is not guessed."""
    ((answer, count),) = Counter(answers).most_common(1) or [("", 0)]
    return {f"always {answer}": count / len(answers)} if count > 1 else {}


def of_task(task: Task) -> dict[str, float]:
    """The shortcuts of a chat task over all its items, and `guessing`, what is said of it."""
    items = [task[index] for index in range(len(task))]
    found = of_answers([answer for answer in map(_answer, items) if answer])
    choices = [(item["choices"], (item["letters"] if "letters" in item else item["choices"]).index(_answer(item)))
               for item in items if "choices" in item]  # fmt: skip
    if choices:
        found |= of_choices(choices, (item["messages"][-2]["content"] for item in items))
    return {"guessing": task.baseline, **found}


def of_bundle_task(task: bundle.Task) -> dict[str, float]:
    """The shortcuts of a task of a bundle over all its items, and `guessing`, what the bundle says."""
    if task.kind == "language_modeling":
        found = of_answers([item["continuation"].strip() for item in task.items])
    else:
        choices = [(item[bundle.OPTIONS[task.kind]], item["gold"]) for item in task.items]
        found = of_choices(choices, (item.get("query", item.get("continuation", "")) for item in task.items))
    return {"guessing": 0.01 * task.baseline, **found}


def measure(found: bundle.Bundle) -> bundle.Bundle:
    """The bundle with its tasks centred by the best of their shortcuts. CORE on published tasks is defined by the
    baselines that are published with them: these stay, and what was measured is said beside them."""
    tasks = []
    for task in found.tasks:
        baseline, guess = best_of(of_bundle_task(task))
        if found.kind == "published":
            tasks.append(replace(task, guess=f"published; {guess}: {100 * baseline:.1f}"))
        else:
            tasks.append(replace(task, baseline=100 * baseline, guess=guess))
    return replace(found, tasks=tasks)


def _credit(values: list[float], right: int) -> float:
    """1 where the right option has the largest value, a part of it among equals."""
    rounded = [round(value, 9) for value in values]
    return (rounded[right] == max(rounded)) / rounded.count(max(rounded))


def _noise(draw: int, word: str) -> float:
    """Between 0 and 1, the same everywhere."""
    return zlib.crc32(f"{draw} {word}".encode("utf-8", "replace")) / 2**32


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else 0.0


def _answer(conversation: Conversation) -> str:
    """What a reference answer comes to: what stands behind its `####`, else all of it."""
    last: dict[str, Any] = conversation["messages"][-1]
    if last["role"] != "assistant":  # a puzzle with many right answers
        return ""
    text = last["content"] if isinstance(last["content"], str) else last["content"][-1]["text"]
    return text.rpartition("####")[2].strip().replace(",", "")
