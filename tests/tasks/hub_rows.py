"""Hub data sets in miniature, written by hand, for tests of the tasks that read them."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.tasks import hub

Row = dict[str, Any]


def parquet_rows(rows: list[Row]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def put(folder: Path, task: str, **splits: list[Row]) -> None:
    """Put rows of a task into the store by way of a local directory."""
    for split, rows in splits.items():
        path = folder / task / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parquet_rows(rows))
    assert set(hub.take_local(task, folder)) >= set(splits)


def gsm8k_row(number: int) -> Row:
    answer = f"There are {number} + 1 = <<{number}+1={number + 1}>>{number + 1} bolts.\n#### {number + 1}"
    return {"question": f"A box holds {number} bolts; one is added. How many are there?", "answer": answer}


def arc_row(number: int, labels: str = "ABCD", answer: str = "B") -> Row:
    choices = {"text": [f"thing {number} {label}" for label in labels], "label": list(labels)}
    return {"id": f"item_{number}", "question": f"Which thing is {number}?", "choices": choices, "answerKey": answer}


def mmlu_row(number: int, subject: str = "bolts") -> Row:
    choices = [f"{number + offset}" for offset in range(4)]
    return {"question": f"What is {number} + 2?", "subject": subject, "choices": choices, "answer": 2}


def talk_row(number: int, *extra: Row) -> Row:
    messages = [
        *extra,
        {"role": "user", "content": f"Say {number}."},
        {"role": "assistant", "content": f"It is {number}."},
    ]
    return {"messages": messages, "source": "by hand"}
