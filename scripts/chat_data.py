"""Put the data of the chat tasks into the artifact store, where mid_train, chat_sft, chat_rl and chat_eval look for it.

    python -m scripts.chat_data                                   # the full set; text from FineWeb-Edu
    python -m scripts.chat_data --tasks=GSM8K,SpellingBee --source=pydocs
    python -m scripts.chat_data --tasks=GSM8K --from-dir=/data    # from /data/gsm8k/, no network needed
    python -m scripts.chat_data --tasks=GSM8K --print-inputs      # what these tasks read; nothing is fetched

Data sets of the hub are fetched at a fixed commit; HF_ENDPOINT names a mirror. What is here already is kept, but for
files copied from a folder: without --from-dir, or where DIR has them no more, they give way to the published ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from nanochat import cli
from nanochat.data.sources import canonical, source_flag
from nanochat.errors import TooLittleText
from nanochat.sections import write_section
from nanochat.tasks.common import Task
from nanochat.tasks.registry import SPLITS, TASKS, make_task, parse_spec, task_inputs, task_row

FULL_SET = ",".join(name for name, row in TASKS.items() if row.full_set)
COLUMNS = ["Task", "Train items", "Test items", "Source", "Published"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Get the data of chat tasks; what is here already is kept."""

    tasks: str = FULL_SET
    """Tasks joined by commas, as for the training scripts; their counts and repeats change nothing here."""
    source: Annotated[str, source_flag("Text that spelling and text tasks are made from")] = "fineweb-edu"
    from_dir: Path | None = None
    """Take hub data sets from here where they lie here, as DIR/gsm8k/train-*.parquet; the others are fetched."""
    print_inputs: bool = False
    """Only print the files, folders and globs that the tasks read, relative to the store, one a line."""


def check(settings: Settings) -> None:
    """Raises UserError for unknown tasks, a folder that holds nothing for them, and settings of the network."""
    from nanochat.tasks.hub import HUB_TASKS, not_in  # which brings pyarrow

    wanted = [item.name for item in parse_spec(settings.tasks) if item.name in HUB_TASKS]
    if settings.from_dir is not None:
        wanted = not_in(settings.from_dir.expanduser(), wanted)
    if wanted:
        from nanochat.data.hub import check_connection  # huggingface_hub takes 0.5 s to import

        check_connection()


if __name__ == "__main__" and cli.checking:
    cli.start(Settings, check)


def main(settings: Settings) -> None:
    if settings.print_inputs:
        for path in task_inputs(settings.tasks, settings.source):
            print(path)
        return
    source = canonical(settings.source)
    from_dir = None if settings.from_dir is None else settings.from_dir.expanduser()
    rows, left_out = [], []
    for name in dict.fromkeys(item.name for item in parse_spec(settings.tasks)):
        provide(name, source, from_dir)
        try:
            row = describe(name, source)
        except TooLittleText as error:
            left_out.append(f"Left out: {name}: {error}")
            print(left_out[-1], flush=True)
            continue
        rows.append(row)
        counts = [f"{count:,} {split}" for split, count in zip(SPLITS, row[1:3], strict=True) if count]
        print(f"{row[0]}: {', '.join(counts)} items; {row[3]}", flush=True)
    table = {"title": "Tasks", "columns": COLUMNS, "rows": rows}
    recorded = cli.as_dict(settings, without=["print_inputs"])
    write_section("chat_data", "Chat data", {"settings": recorded, "tables": [table], "notes": left_out})


def provide(name: str, source: str, from_dir: Path | None) -> None:
    """Put what a task reads into the store. Raises UserError where it cannot be had."""
    task_row(name).load().prepare(name, source, from_dir)


def describe(name: str, source: str) -> list[Any]:
    """A task's row in the report: name, train items, test items (None: no such split), source, published or not.
    Raises TooLittleText where the text has too little for all of its splits."""
    tasks: dict[str, Task] = {}
    lacks: list[TooLittleText] = []
    for split in task_row(name).splits:
        try:
            tasks[split] = make_task(name, split, source)
        except TooLittleText as error:
            lacks.append(error)
    if not tasks:
        raise lacks[0]
    task = next(iter(tasks.values()))
    counts = [len(tasks[split]) if split in tasks else None for split in SPLITS]
    origins = dict.fromkeys([*(each.source for each in tasks.values()), *map(str, lacks)])
    return [task.name, *counts, "; ".join(origins), task.published]


if __name__ == "__main__":
    cli.run(main, Settings)
