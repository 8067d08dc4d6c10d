"""The task for Volcengine's machine learning platform, from volc/config, the environment and a command.

Called by volc_submit.sh; needs only pyyaml, and git for what is uploaded. Fields are those of the CLI's manual
(volcengine.com/docs/6459); others are marked as seen in use.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
HIDDEN = "***"
UPLOADED_TO = "/root/nanochat"
# Of this folder, what is not sent even where git does not ignore it: a link .venv is no folder .venv/ to git
LEFT_OUT = {".git", ".venv", ".venv-uv", "target"}

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
SECRET_FIELDS = re.compile("token|secret|password|accesskey", re.IGNORECASE)
# What pretrain.sh and speedrun.sh read, passed on where it is set here
PASSED_ON = (
    "MODEL_DEPTH", "DEPTH", "PROFILE", "SOURCE", "VOCAB_SIZE", "SHARDS", "DEVICE_BATCH_SIZE", "TOTAL_BATCH_SIZE",
    "PARALLEL", "MAX_RESTARTS", "WANDB_RUN", "RUN_ID", "EVAL_BUNDLE", "TASK_DATA", "WAIT_SECONDS", "RUN_RL",
    "POSTTRAIN", "FULLRUN", "HF_ENDPOINT", "NANOCHAT_DTYPE",
)  # fmt: skip
# Type of a store -> fields that name it, and the settings they come from
OBJECTS = ("Tos", "Sfcs")
NO_STORE = "object storage can be no store, because the ledger appends to files and locks them"
STORES = {
    "Vepfs": {"SubPath": "VOLC_STORAGE_PATH"},
    "VepfsAP": {"VepfsId": "VOLC_STORAGE_ID", "VepfsAccessPointId": "VOLC_ACCESS_POINT"},
    "Nas": {"NasId": "VOLC_STORAGE_ID", "NasAddr": "VOLC_NAS_ADDR"},
}
NAS_ACCESS_POINT = {  # its name is spelt so by the platform
    "NasId": "VOLC_STORAGE_ID", "NasAccessPonintId": "VOLC_ACCESS_POINT", "SubPath": "VOLC_STORAGE_PATH",
}  # fmt: skip

NEXT = """
state:          volc ml_task get --id {id}
log of node 0:  volc ml_task logs --task {id} --instance worker_0 -f
as accepted:    volc ml_task export --task {id} --config
end it:         volc ml_task cancel --id {id}"""


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
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise Mistake(f"{name}={text}: expected a whole number from {least} to {most}")
    return int(text)


def needed(known: Mapping[str, str], *names: str) -> str:
    """The first of these that is set, or a mark that names them."""
    return next(filter(None, map(known.get, names)), f"<missing {' or '.join(names)}>")


def missing(text: str) -> list[str]:
    """Names in the marks of `needed`, each once."""
    return list(dict.fromkeys(re.findall("<missing ([A-Z_]+(?: or [A-Z_]+)?)>", text)))


def store_fields(known: Mapping[str, str]) -> dict[str, str]:
    """Field -> setting that names the store. Raises Mistake for what can be none."""
    kind = needed(known, "VOLC_STORAGE_TYPE")
    if kind in OBJECTS:
        raise Mistake(
            f"VOLC_STORAGE_TYPE={kind}: {NO_STORE}; expected {', '.join(STORES)} (mount a bucket for data by "
            "VOLC_EXTRA_YAML)"
        )
    if known.get("VOLC_STORAGE_TYPE") and kind not in STORES:
        raise Mistake(f"VOLC_STORAGE_TYPE={kind}: expected {', '.join(STORES)}")
    return NAS_ACCESS_POINT if kind == "Nas" and known.get("VOLC_ACCESS_POINT") else STORES.get(kind, {})


def store(known: Mapping[str, str]) -> dict[str, Any]:
    """The storage that all nodes mount."""
    fields = {field: known.get(name) for field, name in store_fields(known).items()}
    if "NasAddr" in fields and not any(fields.values()):
        fields["NasId"] = needed(known, "VOLC_STORAGE_ID", "VOLC_NAS_ADDR")
    elif "NasAddr" not in fields:
        fields |= {f: needed(known, name) for f, name in store_fields(known).items() if f != "SubPath"}
    fields = {"Type": needed(known, "VOLC_STORAGE_TYPE"), **fields, "MountPath": needed(known, "VOLC_MOUNT_PATH")}
    return {field: value for field, value in fields.items() if value}


def not_sent(known: Mapping[str, str]) -> list[str]:
    """Settings of a store that one of this type does not take."""
    taken = store_fields(known).values()
    return [name for name in ("VOLC_STORAGE_ID", "VOLC_NAS_ADDR", "VOLC_ACCESS_POINT") if taken and name not in taken]


def variables(known: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the task gets in its environment. Raises Mistake for secrets that are named and not set."""
    absent = [name for name in known.get("VOLC_SECRETS", "").split() if not known.get(name)]
    if absent:
        raise Mistake(f"VOLC_SECRETS names {', '.join(absent)}: set {'it' if len(absent) == 1 else 'them'} here")
    # Where the mount cannot begin at the folder in the store, what we write does
    below = "" if "SubPath" in store_fields(known) else known.get("VOLC_STORAGE_PATH", "").strip("/")
    base = "/".join(filter(None, [needed(known, "VOLC_MOUNT_PATH").rstrip("/"), below, "nanochat"]))
    names = [*PASSED_ON, *known.get("VOLC_ENVS", "").split(), *SECRETS, *known.get("VOLC_SECRETS", "").split()]
    values = {"NANOCHAT_BASE_DIR": base}
    for name in filter(known.get, names):
        values.setdefault(name, known[name])
    return [{"Name": name, "Value": value} for name, value in values.items()]


def make_task(known: Mapping[str, str], command: Sequence[str]) -> dict[str, Any]:
    """The task as the platform takes it, with marks for what is missing. Raises Mistake for impossible values."""
    if not command:
        example = "NNODES=4 bash volc/volc_submit.sh bash pretrain.sh --depth=32"
        raise Mistake(f"no command: write it last, as in `{example}`")
    for name in ("VOLC_CODE_PATH", "VOLC_MOUNT_PATH"):
        path = known.get(name, "/folder")
        if not path.startswith("/") or (name == "VOLC_MOUNT_PATH" and not os.path.normpath(path).strip("/")):
            raise Mistake(f"{name}={path}: expected a folder in the task, from / on")
    code_path, line = known.get("VOLC_CODE_PATH"), shlex.join(command)
    nodes = integer(known, "NNODES", 1, 1, 10_000)
    registry = {"RegistryUsername": "VOLC_REGISTRY_USERNAME", "RegistryToken": "VOLC_REGISTRY_TOKEN"}
    private = any(map(known.get, registry.values()))
    by_name = known.get("VOLC_QUEUE_NAME") and not known.get("VOLC_QUEUE_ID")
    task = {
        "TaskName": known.get("VOLC_TASK_NAME") or "nanochat",
        "Description": line,
        "Framework": "PyTorchDDP",
        "Entrypoint": f"cd {shlex.quote(code_path or UPLOADED_TO)} && exec {line}",
        # With the slash it is what the folder holds that lands in the other one, without it the folder itself
        "UserCodePath": None if code_path else "./",
        "RemoteMountCodePath": None if code_path else f"{UPLOADED_TO}/",
        "ImageUrl": needed(known, "VOLC_IMAGE"),
        "ImageCredential": {field: needed(known, name) for field, name in registry.items()} if private else None,
        "ResourceQueueID": None if by_name else needed(known, "VOLC_QUEUE_ID", "VOLC_QUEUE_NAME"),
        "ResourceQueueName": known["VOLC_QUEUE_NAME"] if by_name else None,
        "TaskRoleSpecs": [{"RoleName": "worker", "RoleReplicas": nodes, "Flavor": needed(known, "VOLC_FLAVOR")}],
        "Storages": [store(known)],
        "Envs": variables(known),
        "ActiveDeadlineSeconds": integer(known, "VOLC_ACTIVE_DEADLINE_SECONDS", 0, 0, 10**9 - 1) or None,
        "RetryOptions": {  # the platform starts the task again, and it goes on from its last checkpoint
            "EnableRetry": True,
            "EnableReserveResourceOnRetry": bool(integer(known, "VOLC_RESERVE_RESOURCE_ON_RETRY", 0, 0, 1)),
            "MaxRetryTimes": integer(known, "VOLC_MAX_RETRIES", 5, 0, 100),
            "IntervalSeconds": 60,
            "PolicySets": ["Failed", "InstanceReclaimed", "MachineFailure"],  # the last one is seen in use
        },
        "Priority": integer(known, "VOLC_PRIORITY", 0, 0, 9) or None,
        "Preemptible": bool(integer(known, "VOLC_PREEMPTIBLE", 0, 0, 1)),
    }
    task = {name: value for name, value in task.items() if value is not None}
    task = merged(task, extra_fields(known.get("VOLC_EXTRA_YAML", "")))
    check_places(task)
    secrets = {*SECRETS, *known.get("VOLC_SECRETS", "").split()}
    for one in task["Envs"]:
        address = re.search("://[^/]*@|://.*:.*@", str(one.get("Value")))  # with a password in it
        one.setdefault("IsPrivate", bool(address) or one.get("Name") in secrets)
    return task


def check_places(task: Mapping[str, Any]) -> None:
    """Raises Mistake where what is mounted, whoever named it, cannot hold the artifacts, or hides the code sent."""
    mounted = {_folder(one.get("MountPath")): one for one in task["Storages"]}

    def holder(path: Any) -> dict[str, Any]:
        """The storage that `path` is in; empty if it is in none."""
        return mounted.get(max((f for f in mounted if _folder(path).startswith(f)), key=len, default=""), {})

    base = {one.get("Name"): one.get("Value") for one in task["Envs"]}["NANOCHAT_BASE_DIR"]
    if (kind := holder(base).get("Type")) in OBJECTS:
        raise Mistake(f"NANOCHAT_BASE_DIR={base} is in a storage of Type {kind}: {NO_STORE}; mount it elsewhere")
    if "UserCodePath" in task and (over := holder(UPLOADED_TO)):
        raise Mistake(f"MountPath {over['MountPath']} hides {UPLOADED_TO}, where the code is sent: mount it elsewhere")


def _folder(path: Any) -> str:
    return f"{str(path).rstrip('/')}/"


def extra_fields(text: str) -> dict[str, Any]:
    """What VOLC_EXTRA_YAML holds, itself or in the file that it names. Raises Mistake where these are no fields."""
    try:
        fields = yaml.safe_load(text)
        if isinstance(fields, str):
            fields = yaml.safe_load(Path(fields).read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise Mistake(f"VOLC_EXTRA_YAML={text!r}: {' '.join(str(error).split())}") from None
    lists = [fields.get(name, []) for name in ("Envs", "Storages")] if isinstance(fields, dict) else []
    known = all(isinstance(one, list) and all(isinstance(item, dict) for item in one) for one in lists)
    if not known or not isinstance(fields or {}, dict):
        raise Mistake(f"VOLC_EXTRA_YAML={text!r}: expected fields of a task, as in {{DelayExitTimeSeconds: 600}}")
    return fields or {}


def merged(ours: Any, extra: Any) -> Any:
    """`extra` goes before `ours`, field by field. Items of lists with the same RoleName, Name or MountPath are one, and
    others are added."""
    if isinstance(ours, dict) and isinstance(extra, dict):
        return ours | {name: merged(ours[name], value) if name in ours else value for name, value in extra.items()}
    if not (isinstance(ours, list) and isinstance(extra, list) and all(isinstance(one, dict) for one in ours + extra)):
        return extra
    items = list(ours)
    for one in extra:
        key = next((name for name in ("RoleName", "Name", "MountPath") if name in one), "")
        same = [place for place, item in enumerate(items) if key and item.get(key) == one[key]]
        if same:
            items[same[0]] = merged(items[same[0]], one)
        else:
            items.append(one)
    return items


def render(task: Mapping[str, Any], hide: bool = False) -> str:
    """The task as YAML; `hide` puts *** in the place of secrets."""
    return yaml.safe_dump(_hidden(task) if hide else task, sort_keys=False, width=10**9)


def _hidden(value: Any) -> Any:
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    if not isinstance(value, dict):
        return value

    def is_secret(name: Any, item: Any) -> bool:
        private = name == "Value" and value.get("IsPrivate")
        return private or bool(SECRET_FIELDS.search(str(name)) and not missing(str(item)))

    return {name: HIDDEN if is_secret(name, item) else _hidden(item) for name, item in value.items()}


def export(folder: Path) -> None:
    """Copy this repository into `folder`/code: what is tracked or not ignored, and nothing of LEFT_OUT. Raises Mistake
    without git."""
    root, environment = HERE.parent, {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    git = ["git", "-C", str(root)]
    try:
        if not (root / ".git").exists():  # an unpacked archive: git reads its .gitignore all the same
            subprocess.run(["git", "init", "-q", "--bare", folder / "git"], env=environment, check=True)
            git += [f"--git-dir={folder / 'git'}", f"--work-tree={root}"]
        words = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Mistake(f"git cannot list what to upload: {error}; mend that, or name a copy by VOLC_CODE_PATH") from None
    files, size = 0, 0
    for name in sorted(set(map(os.fsdecode, listed.split(b"\0"))) - {"", "volc/config"}):
        source, target = root / name, folder / "code" / name
        if LEFT_OUT & {*Path(name).parts} or folder.resolve() in source.resolve().parents:
            continue
        if source.is_file():  # one may be deleted here and still in git's index
            target.parent.mkdir(parents=True, exist_ok=True)
            size, files = size + Path(shutil.copy2(source, target)).stat().st_size, files + 1
        elif source.exists():
            print(f"# not sent: {name}, a link or a repository of its own")
    print(f"# ./ is a clean export of this repository: {files} files, {size / 1e6:.1f} MB")


def submit(task: Mapping[str, Any]) -> int:
    """Send it, from a folder that only we can look into, and say what to do next. The CLI's exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # the folder goes
    with tempfile.TemporaryDirectory() as folder:
        code, file = Path(folder, "code"), Path(folder, "task.yaml")
        code.mkdir()
        if "UserCodePath" in task:
            export(Path(folder))
        file.touch(mode=0o600)
        file.write_text(render(task), encoding="utf-8")
        command = ["volc", "ml_task", "submit", "--conf", str(file)]
        said = b""
        with subprocess.Popen(command, cwd=code, stdout=subprocess.PIPE) as process:  # UserCodePath is ./
            while chunk := os.read(process.stdout.fileno(), 4096):  # at once: it may ask something, or show progress
                os.write(1, chunk)
                said += chunk
    if process.returncode == 0:
        found = re.search("t-[0-9]{14}-[a-z0-9]+", said.decode(errors="replace"))
        print(NEXT.format(id=found[0] if found else "TASK_ID"))  # its list has it, too: volc ml_task list
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main(words: Sequence[str]) -> int:
    """Show the task and, but for a dry run, submit it. Raises Mistake where something is missing for that."""
    dry_run = words[:1] == ["--dry-run"]
    command = words[1:] if dry_run else words
    if command[:1] and command[0].startswith("-"):
        raise Mistake(f"{command[0]}: expected --dry-run or a command, as in: bash pretrain.sh --depth=32")
    if not dry_run and not shutil.which("volc"):
        raise Mistake("the volc CLI is not on PATH: install it and run `volc configure`, or use --dry-run")
    config = {name: value for name, value in read_config(HERE / "config").items() if value}
    known = {**config, **{name: value for name, value in os.environ.items() if value}}
    task = make_task(known, command)
    absent = missing(render(task))
    if absent and not dry_run:
        names = ", ".join(absent)
        raise Mistake(f"not set: {names}: fill them in in volc/config (from config.example) or export them")
    print(render(task, hide=True), end="")
    for name in filter(known.get, not_sent(known)):
        print(f"# not sent: {name}, which VOLC_STORAGE_TYPE={known['VOLC_STORAGE_TYPE']} does not take")
    if absent:
        meanings = dict(re.findall(r"^(\w+)= +# (.*)$", (HERE / "config.example").read_text(encoding="utf-8"), re.M))
        print("\n# Missing: fill these in in volc/config (from config.example) or export them")
        for name in absent:
            print(f"#   {name:<34} {meanings.get(name.split()[0], '')}")
    return 0 if dry_run else submit(task)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        sys.exit(main(sys.argv[1:]))
    except Mistake as mistake:
        sys.exit(f"error: {mistake}")
