"""The task for Volcengine's machine learning platform, from volc/config, the environment and a command.

    python volc/render.py --out=task.yaml bash pretrain.sh --depth=32

Prints the task with secrets as ***, and writes the real one to --out, readable by its owner alone. Needs only pyyaml.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
HIDDEN = "***"
UPLOADED_TO = "/root/nanochat"

REQUIRED = ("VOLC_FLAVOR", "VOLC_IMAGE", "VOLC_STORAGE_TYPE", "VOLC_STORAGE_ID", "VOLC_MOUNT_PATH")
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
# What pretrain.sh and speedrun.sh read, passed on where it is set here
PASSED_ON = (
    "MODEL_DEPTH", "DEPTH", "PROFILE", "SOURCE", "VOCAB_SIZE", "SHARDS", "DEVICE_BATCH_SIZE", "TOTAL_BATCH_SIZE",
    "PARALLEL", "MAX_RESTARTS", "WANDB_RUN", "RUN_ID", "EVAL_BUNDLE", "TASK_DATA", "WAIT_SECONDS", "RUN_RL",
    "POSTTRAIN", "FULLRUN", "HF_ENDPOINT", "NANOCHAT_DTYPE",
)  # fmt: skip
# Type of storage -> the names of its id and of a folder in it
STORAGES = {"Vepfs": ("VepfsId", "SubPath"), "Nas": ("NasId", "SubPath"), "Tos": ("Bucket", "Prefix")}


class Mistake(Exception):
    """The user's; one line."""


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


def integer(known: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    """A number of the configuration."""
    text = known.get(name, "") or str(default)
    if not re.fullmatch("[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise Mistake(f"{name}={text}: expected a whole number from {least} to {most}")
    return int(text)


def variables(known: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the task gets in its environment. Raises Mistake for secrets that are named and not set."""
    secrets = [*SECRETS, *known.get("VOLC_SECRETS", "").split()]
    absent = [name for name in secrets if not known.get(name) and name not in SECRETS]
    if absent:
        raise Mistake(f"VOLC_SECRETS names {', '.join(absent)}: set {'it' if len(absent) == 1 else 'them'} here")
    values = {"NANOCHAT_BASE_DIR": known["VOLC_MOUNT_PATH"].rstrip("/") + "/nanochat"}
    for name in [*PASSED_ON, *known.get("VOLC_ENVS", "").split(), *secrets]:
        if known.get(name):
            values.setdefault(name, known[name])
    secrets += [name for name, value in values.items() if re.search("://[^/]*@|://.*:.*@", value)]  # a password in it
    return [{"Name": name, "Value": value, "IsPrivate": name in secrets} for name, value in values.items()]


def make_task(known: Mapping[str, str], command: Sequence[str]) -> dict[str, Any]:
    """The task as the platform takes it. Raises Mistake naming everything that is missing."""
    missing = [name for name in REQUIRED if not known.get(name)]
    if not known.get("VOLC_QUEUE_ID") and not known.get("VOLC_QUEUE_NAME"):
        missing.insert(0, "VOLC_QUEUE_ID (or VOLC_QUEUE_NAME)")
    if missing:
        names = ", ".join(missing)
        raise Mistake(f"not set: {names}: fill them in in volc/config (from config.example) or export them")
    kind = known["VOLC_STORAGE_TYPE"]
    if kind not in STORAGES:
        raise Mistake(f"VOLC_STORAGE_TYPE={kind}: expected {', '.join(STORAGES)}")
    if not command:
        example = "NNODES=4 bash volc/volc_submit.sh bash pretrain.sh --depth=32"
        raise Mistake(f"no command: write it last, as in `{example}`")
    code_path, line = known.get("VOLC_CODE_PATH"), shlex.join(command)
    nodes = integer(known, "NNODES", 1, 1, 10_000)
    workers = {"RoleName": "worker", "RoleReplicas": nodes, "Flavor": known["VOLC_FLAVOR"]}
    id_name, folder_name = STORAGES[kind]
    storage = {"Type": kind, id_name: known["VOLC_STORAGE_ID"], folder_name: known.get("VOLC_STORAGE_PATH")}
    storage["MountPath"] = known["VOLC_MOUNT_PATH"]
    task = {
        "TaskName": known.get("VOLC_TASK_NAME") or "nanochat",
        "Description": line,
        "Framework": "PyTorchDDP",
        "Entrypoint": f"cd {shlex.quote(code_path or UPLOADED_TO)} && exec {line}",
        "UserCodePath": None if code_path else ".",
        "RemoteMountCodePath": None if code_path else UPLOADED_TO,
        "ImageUrl": known["VOLC_IMAGE"],
        "ResourceQueueID": known.get("VOLC_QUEUE_ID"),
        "ResourceQueueName": None if known.get("VOLC_QUEUE_ID") else known["VOLC_QUEUE_NAME"],
        "TaskRoleSpecs": [workers],
        "Storages": [storage],
        "Envs": variables(known),
        "RetryOptions": {  # the platform starts the task again, and it goes on from its last checkpoint
            "EnableRetry": True,
            "MaxRetryTimes": integer(known, "VOLC_MAX_RETRIES", 5, 0, 100),
            "IntervalSeconds": 60,
            "PolicySets": ["Failed", "InstanceReclaimed", "MachineFailure"],
        },
        "Priority": integer(known, "VOLC_PRIORITY", 0, 0, 9) or None,
        "Preemptible": bool(integer(known, "VOLC_PREEMPTIBLE", 0, 0, 1)),
    }
    return _without_empty(task)


def _without_empty(value: Any) -> Any:
    """Without the entries of dicts that are None or an empty string."""
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_empty(item) for name, item in value.items() if item is not None and item != ""}
    return value


def render(task: Mapping[str, Any], hide: bool = False) -> str:
    """The task as YAML; `hide` puts *** in the place of secrets."""
    if hide:
        shown = [{**one, "Value": HIDDEN if one["IsPrivate"] else one["Value"]} for one in task["Envs"]]
        task = {**task, "Envs": shown}
    return yaml.safe_dump(task, sort_keys=False, width=10**9)


def main(words: Sequence[str]) -> None:
    """Show the task, and write it where --out says."""
    out = next((word.removeprefix("--out=") for word in words[:1] if word.startswith("--out=")), None)
    command = words[1:] if out is not None else words
    config = {name: value for name, value in read_config(HERE / "config").items() if value}
    task = make_task({**config, **{name: value for name, value in os.environ.items() if value}}, command)
    print(render(task, hide=True), end="")
    if out:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(render(task))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Mistake as mistake:
        sys.exit(f"error: {mistake}")
