"""All generated tasks: train and test share nothing, items never change, and every conversation is well formed."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest

from nanochat.chat_format import conversation_pieces
from nanochat.paths import task_data_dir
from nanochat.tasks.arithmetic import TEMPLATES, Arithmetic
from nanochat.tasks.common import Task
from nanochat.tasks.customjson import CustomJSON
from nanochat.tasks.identity import Identity
from nanochat.tasks.reasoning_gym import ReasoningGym
from nanochat.tasks.spelling import SimpleSpelling, SpellingBee
from nanochat.tasks.text_choice import TextChoice
from tests.tasks.test_arithmetic import question_pattern
from tests.tasks.test_identity import plain
from tests.tasks.test_reasoning_gym import install_stand_in
from tests.tasks.test_words import documents, other_process, put_text

SIZE = 3000


@pytest.fixture(scope="module", autouse=True)
def ready(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("store")))
        install_stand_in(patch)
        put_text("pydocs", documents(150), documents(40, seed=1))
        SpellingBee.prepare("SpellingBee", "pydocs")
        yield


def question_of(conversation: dict[str, Any]) -> str:
    return next(message["content"] for message in conversation["messages"] if message["role"] == "user")


def spelled_words(conversation: dict[str, Any]) -> list[Hashable]:
    content = conversation["messages"][-1]["content"]
    spelled = content if isinstance(content, str) else content[0]["text"].split("\n")[0]
    return re.findall(r"(\w+):", spelled)


PATTERNS = {template.text: question_pattern(template.text) for template in TEMPLATES}


def template_and_numbers(conversation: dict[str, Any]) -> list[Hashable]:
    """Read back from the question, whatever names, objects and wordings it has."""
    question = question_of(conversation)
    for text, pattern in PATTERNS.items():
        if found := pattern.fullmatch(question):
            return [(text, *sorted((name[0], number) for name, number in found.groupdict().items() if number))]
    raise AssertionError(f"no template fits {question}")


def choices(conversation: dict[str, Any]) -> list[Hashable]:
    """The words that are asked about."""
    return list(conversation["choices"])


def all_questions(conversation: dict[str, Any]) -> list[Hashable]:
    return [plain(message["content"]) for message in conversation["messages"] if message["role"] == "user"]


def own_words(conversation: dict[str, Any]) -> list[Hashable]:
    return [question_of(conversation)]


def custom_file() -> Path:
    """A user's file in which each conversation stands twice."""
    path = task_data_dir() / "mine.jsonl"
    turns = [[f"Say {number % 1000}.", f"It is {number % 1000}."] for number in range(2000)]
    roles = ("user", "assistant")
    lines = [[{"role": role, "content": text} for role, text in zip(roles, turn, strict=True)] for turn in turns]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# name -> (the task of a split, what identifies an item of it)
TASKS: dict[str, tuple[Callable[..., Task], Callable[[dict[str, Any]], list[Hashable]]]] = {
    "SimpleSpelling": (lambda split: SimpleSpelling(split, "pydocs", SIZE), spelled_words),
    "SpellingBee": (lambda split: SpellingBee(split, "pydocs", SIZE), spelled_words),
    "Arithmetic": (lambda split: Arithmetic(split, SIZE), template_and_numbers),
    "TextChoice": (lambda split: TextChoice(split, "pydocs"), choices),
    "Identity": (Identity, all_questions),
    "FILE.jsonl": (lambda split: CustomJSON(custom_file(), split), own_words),
    "reasoning-gym": (lambda split: ReasoningGym("few_sums", split, SIZE), own_words),
    "reasoning-gym, many": (lambda split: ReasoningGym("chain_sum", split, SIZE), own_words),
}


@pytest.mark.parametrize("name", TASKS)
def test_train_and_test_share_nothing(name):
    make, identities = TASKS[name]
    seen = {}
    for split in ("train", "test"):
        task = make(split)
        seen[split] = {identity for index in range(len(task)) for identity in identities(task[index])}
        assert len(seen[split]) >= (5 if name == "reasoning-gym" else 40)
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize("name", TASKS)
def test_conversations_are_well_formed_and_answers_right(name):
    from nanochat.engine.calculator import use_calculator  # with torch, which the other process does without

    make, _ = TASKS[name]
    for split in ("train", "test"):
        task = make(split)
        assert not task.published and task.source and task.name
        for index in range(min(len(task), 1000)):
            conversation = task[index]
            assert conversation_pieces(conversation)
            answer = conversation["messages"][-1]["content"]
            parts = answer if isinstance(answer, list) else [{"type": "text", "text": answer}]
            calls = [part["text"] for part in parts if part["type"] == "python"]
            outputs = [part["text"] for part in parts if part["type"] == "python_output"]
            assert [use_calculator(call) for call in calls] == outputs
            if task.eval_type is not None:
                assert task.evaluate(conversation, "".join(part["text"] for part in parts))


def digest_of_all_items() -> str:
    """Of some items of each task of this store, in any order of asking."""
    digest = hashlib.sha256()
    for make, _ in TASKS.values():
        for split in ("train", "test"):
            task = make(split)
            for index in range(0, len(task), 97):
                digest.update(json.dumps(task[index]["messages"]).encode())
    return digest.hexdigest()


CODE = """
import pytest
from tests.tasks import test_no_overlap
from tests.tasks.test_reasoning_gym import install_stand_in
with pytest.MonkeyPatch.context() as patch:
    install_stand_in(patch)
    print(test_no_overlap.digest_of_all_items())
"""


def test_same_items_in_every_process_and_under_any_random_state():
    random.seed(1)
    state = random.getstate()
    before = digest_of_all_items()
    assert random.getstate() == state  # the tasks do not disturb it either
    random.seed(2)
    assert digest_of_all_items() == before
    assert other_process(CODE, "1").strip() == before  # strings hash otherwise there
