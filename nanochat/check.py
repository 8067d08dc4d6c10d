"""What the user set, checked before the first stage runs: the flags of every stage, and what their values name.

    printf '%s\\0' STAGE --in P -- COMMAND "" | python -m nanochat.check -- DEPTH=8 --width=1024

stdin: the words of each `nanochat.pipeline run`, an empty one after each. Behind `--`: the user's own words, by which a
mistake is named. A stage's module may have `check(settings)`, which raises UserError for what can be known beforehand.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cyclopts import CycloptsError

from nanochat import cli, ledger
from nanochat.errors import UserError

# Settings of dev/settings.sh whose flag has another name, and those that are all that a stage is about.
FLAGS = {"SHARDS": "-n", "WANDB_RUN": "--run", "RUN_ID": "--model-tag", "MODEL_DEPTH": "--depth"}
STAGES = {"EVAL_BUNDLE": "eval_bundle", "TASK_DATA": "chat_data"}


def as_written(stage: str, message: str, written: Sequence[str]) -> str:
    """`message` with what the user wrote in the place of the flag that it is about."""
    for words in reversed(written):
        name = words.partition("=")[0].lstrip("-").upper().replace("-", "_")
        flag = FLAGS.get(name, "--" + re.escape(name.lower()).replace("_", "[_-]"))
        about = re.search(rf"(?<![\w-]){flag}(?![\w-])", message) is not None
        if name in STAGES:  # what such a stage says is about it, and no flag of another stage
            about, flag = STAGES[name] == stage, "--from-dir=.*?"
        if about:
            rest = re.sub(rf"^{flag}([= ]\S*)?: ", "", message)
            return message if message.startswith(words) else f"{words}: {rest}"
    return message


@dataclass(frozen=True)
class Settings:
    """Check the stages that stdin lists; what the user wrote goes after `--`."""


def main(settings: Settings, written: Sequence[str]) -> None:
    check(written, os.fsdecode(sys.stdin.buffer.read()))


def check(written: Sequence[str], stages: str) -> None:
    """Raises UserError for the first mistake."""
    if strange := [words for words in written if not words.isprintable()]:
        raise UserError(f"{strange[0]!a}: these are no letters in the encoding of this locale")
    for one in filter(None, stages.split("\0\0")):
        stage, *words = one.strip("\0").split("\0")
        if "--" not in words or (name := ledger.stage_module(words)) is None:
            continue
        module = importlib.import_module(name)
        try:
            settings = cli.read(module.Settings, words[words.index(name) + 1 :])
            if settings is not None and hasattr(module, "check"):
                module.check(settings)
        except (CycloptsError, UserError) as error:
            raise UserError(as_written(stage, " ".join(str(error).split()), written)) from None


if __name__ == "__main__":
    cli.run_with_command(main, Settings)
