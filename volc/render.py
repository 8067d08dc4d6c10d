"""Fill in volc/task.yaml.j2 from volc/config, the environment and a command; volc_submit.sh calls it.

    python volc/render.py --out=task.yaml bash pretrain.sh --depth=32

Prints the task with secrets as ***, and writes the real one to --out, readable by its owner alone. Needs only jinja2.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).resolve().parent
HIDDEN = "***"
UPLOADED_TO = "/root/nanochat"

REQUIRED = ("VOLC_FLAVOR", "VOLC_IMAGE", "VOLC_STORAGE_TYPE", "VOLC_STORAGE_ID", "VOLC_MOUNT_PATH")
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
# What pretrain.sh and speedrun.sh read, passed on where it is set here
PASSED_ON = (
    *(
        "MODEL_DEPTH",
        "SOURCE",
        "VOCAB_SIZE",
        "SHARDS",
        "PARALLEL",
        "MAX_RESTARTS",
        "WANDB_RUN",
        "RUN_ID",
        "EVAL_BUNDLE",
    ),
    *("TASK_DATA", "WAIT_SECONDS", "RUN_RL", "HF_ENDPOINT", "NANOCHAT_DTYPE"),
)
# Type of storage -> the names of its id and of a folder in it
STORAGES = {"Vepfs": ("VepfsId", "SubPath"), "Nas": ("NasId", "SubPath"), "Tos": ("Bucket", "Prefix")}


class Mistake(Exception):
    """The user's; one line."""


def quoted(value: object) -> str:
    """`value` as a double-quoted YAML string, on one line whatever is in it."""
    text = json.dumps(str(value), ensure_ascii=False)  # YAML knows all escapes of JSON
    return "".join(char if char.isprintable() else _escaped(ord(char)) for char in text)


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def read_config(path: Path) -> dict[str, str]:
    """NAME=value lines, quoted as in a shell; `#` begins a comment. No such file: nothing."""
    values = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise Mistake(f"{path}, line {number}: {error}; write NAME=value, with quotes in pairs") from None
        if not words:
            continue
        name, equals, value = words[0].partition("=")
        if not equals or len(words) > 1:
            raise Mistake(f"{path}, line {number}: {line.strip()!r}: write NAME=value, in quotes where it has spaces")
        values[name] = value
    return values


def whole(known: Mapping[str, str], name: str, otherwise: int, least: int, most: int) -> int:
    """A number of the configuration."""
    text = known.get(name, "") or str(otherwise)
    if not re.fullmatch("[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise Mistake(f"{name}={text}: expected a whole number from {least} to {most}")
    return int(text)


def variables(known: Mapping[str, str], store: str) -> list[dict[str, Any]]:
    """What the task gets in its environment. Raises Mistake for secrets that are named and not set."""
    secrets = [*SECRETS, *known.get("VOLC_SECRETS", "").split()]
    absent = [name for name in secrets if not known.get(name) and name not in SECRETS]
    if absent:
        raise Mistake(f"VOLC_SECRETS names {', '.join(absent)}: set {'it' if len(absent) == 1 else 'them'} here")
    open_names = [*PASSED_ON, *known.get("VOLC_ENVS", "").split()]
    names = dict.fromkeys(name for name in [*open_names, *secrets] if known.get(name))
    store_first = [{"name": "NANOCHAT_BASE_DIR", "value": store, "private": False}]
    return store_first + [{"name": name, "value": known[name], "private": name in secrets} for name in names]


def fields(known: Mapping[str, str], command: Sequence[str]) -> dict[str, Any]:
    """All that the template shows. Raises Mistake naming everything that is missing."""
    missing = [name for name in REQUIRED if not known.get(name)]
    if not known.get("VOLC_QUEUE_ID") and not known.get("VOLC_QUEUE_NAME"):
        missing.insert(0, "VOLC_QUEUE_ID (or VOLC_QUEUE_NAME)")
    if missing:
        raise Mistake(
            f"not set: {', '.join(missing)}: fill them in in volc/config (from config.example) or export them"
        )
    kind = known["VOLC_STORAGE_TYPE"]
    if kind not in STORAGES:
        raise Mistake(f"VOLC_STORAGE_TYPE={kind}: expected {', '.join(STORAGES)}")
    if not command:
        raise Mistake(
            "no command: write it last, as in `NNODES=4 bash volc/volc_submit.sh bash pretrain.sh --depth=32`"
        )
    code_path = known.get("VOLC_CODE_PATH") or UPLOADED_TO
    return {
        "name": known.get("VOLC_TASK_NAME") or "nanochat",
        "command": shlex.join(command),
        "entrypoint": f"cd {shlex.quote(code_path)} && exec {shlex.join(command)}",
        "upload": "" if known.get("VOLC_CODE_PATH") else ".",
        "code_path": code_path,
        "image": known["VOLC_IMAGE"],
        "queue_id": known.get("VOLC_QUEUE_ID", ""),
        "queue_name": known.get("VOLC_QUEUE_NAME", ""),
        "flavor": known["VOLC_FLAVOR"],
        "nodes": whole(known, "NNODES", 1, 1, 10_000),
        "storage_type": kind,
        "storage_key": STORAGES[kind][0],
        "storage_id": known["VOLC_STORAGE_ID"],
        "storage_path_key": STORAGES[kind][1],
        "storage_path": known.get("VOLC_STORAGE_PATH", ""),
        "mount_path": known["VOLC_MOUNT_PATH"],
        "variables": variables(known, known["VOLC_MOUNT_PATH"].rstrip("/") + "/nanochat"),
        "max_retries": whole(known, "VOLC_MAX_RETRIES", 5, 0, 100),
        "priority": whole(known, "VOLC_PRIORITY", 0, 0, 9),
        "preemptible": bool(whole(known, "VOLC_PREEMPTIBLE", 0, 0, 1)),
    }


def render(filled: Mapping[str, Any], hide: bool = False) -> str:
    """The task as YAML; `hide` puts *** in the place of secrets."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["q"] = quoted
    if hide:
        shown = [{**one, "value": HIDDEN if one["private"] else one["value"]} for one in filled["variables"]]
        filled = {**filled, "variables": shown}
    return environment.get_template("task.yaml.j2").render(**filled)


def main(words: Sequence[str]) -> None:
    """Show the task, and write it where --out says."""
    out = next((word.removeprefix("--out=") for word in words[:1] if word.startswith("--out=")), None)
    command = words[1:] if out is not None else words
    config = {name: value for name, value in read_config(HERE / "config").items() if value}
    filled = fields({**config, **{name: value for name, value in os.environ.items() if value}}, command)
    print(render(filled, hide=True), end="")
    if out:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(render(filled))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Mistake as mistake:
        sys.exit(f"error: {mistake}")
