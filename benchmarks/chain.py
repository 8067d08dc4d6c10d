"""A small chain in a store of its own, speedrun.sh with a profile that takes a minute, and all that it leaves but what
may differ between two of them that nothing disturbed."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, ClassVar

import psutil

from nanochat import ledger
from nanochat.errors import UserError
from nanochat.files import read_jsonl
from nanochat.paths import REPO

RUN = "faults"
PROFILE = """
: "${DEPTH:=2}" "${VOCAB_SIZE:=1024}" "${NPROC_PER_NODE:=1}" "${DEVICE_BATCH_SIZE:=8}" "${TOTAL_BATCH_SIZE:=1024}"
: "${SOURCE:=pydocs}" "${SHARDS:=1}"
TOK_TRAIN=(--max-chars=1e6)
BASE_TRAIN=(--head-dim=32 --max-seq-len=128 --num-iterations=30
  --eval-every=10 --eval-tokens=4096 --core-metric-every=-1 --sample-every=1000 --save-every=5)
BASE_LOSS=(--split-tokens=8192)
BASE_EVAL=(--max-per-task=20)
TASK_DATA=
TASKS=SimpleSpelling,Arithmetic,TextChoice,Identity
MID=(--tasks="Arithmetic:300,SimpleSpelling:400,TextChoice:100,Identity*2"
  --num-iterations=20 --eval-every=10 --eval-tokens=4096 --save-every=5)
SFT=(--tasks="Arithmetic:300,SimpleSpelling:400,TextChoice:100,Identity"
  --num-iterations=20 --init-lr-frac=1 --eval-every=10 --eval-tokens=4096 --save-every=5)
CHAT_EVAL=(-a "Arithmetic,SimpleSpelling,TextChoice" -m 8 -b 32 -x 32)
RL=(--task=Arithmetic --num-iterations=10 --num-samples=4 --questions-per-step=4 --device-batch-size=16
  --max-new-tokens=8 --init-lr-frac=0.15 --eval-every=5 --eval-questions=16 --eval-samples=2 --save-every=3)
"""

TRAINS = {"base_train": "base", "mid_train": "mid", "chat_sft": "sft", "chat_rl": "rl"}  # stage -> its checkpoints
# What may differ between two runs that nothing disturbed: times, speeds, memory, hashes of files with these, and the
# state of two generators that nothing seeds or draws from
VOLATILE = re.compile(
    r"(.*_)?(time|seconds|minutes|identity|usd)|generated|git|hardware|software|cost|commit|stages|command|numpy|python|"
    r"steady_steps|steps averaged|(Time|Hardware)/.*|.*(per second|minutes|memory GiB)"
)
# Logs and locks; the ledger, which is read otherwise; indices with times; text that is made of the JSON beside it
IGNORED = re.compile(
    r"(.*/)?(lock|.*\.lock|logs/.*|stages\.jsonl|hashes\.jsonl|state/\.metadata)|(runs/[^/]+/)?report/.*\.(md|html|svg)"
)
SET_ASIDE = re.compile(r"(^|/)[^/]+?(\.damaged)?\.\d+/")  # folders that are kept beside those that took their place
LONGEST_SECONDS = 2 * 3600.0
STORE_MIB = 400


class Lane:
    """A store, and the chain that runs in it."""

    ending = False  # of all: no chain is started any more
    shells: ClassVar[set[int]] = set()  # process numbers of those that were started, whose exit codes are wanted

    def __init__(self, work: Path, number: int, mounts: bool) -> None:
        self.number, self.tree, self.mounts, self.chain = number, work / "tree", mounts, 0
        self.store, self.log = work / f"lane{number}" / "store", work / f"lane{number}" / "output.log"
        self.run = self.store / "runs" / RUN
        self.process: subprocess.Popen[bytes] | None = None
        self.damaged: dict[Path, tuple[bytes, bytes | None]] = {}  # file -> what it was, what was made of it
        ours = {"NANOCHAT_BASE_DIR": str(self.store), "RUN_ID": RUN, "PROFILE": "tiny", "RUN_RL": "1",
                "SOURCE": f"local:{work / 'text'}", "UV_PROJECT_ENVIRONMENT": str(work / "venv"),
                "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("NANOCHAT_")} | ours

    def fresh(self) -> None:
        """An empty store."""
        self.close()
        self.store.mkdir(parents=True)
        if self.mounts:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORE_MIB}m", "tmpfs", self.store], check=True)
        self.chain, self.process = self.chain + 1, None
        self.damaged.clear()

    def close(self) -> None:
        if self.mounts and self.store.is_mount():
            subprocess.run(["umount", "-l", self.store], check=True)
        shutil.rmtree(self.store, ignore_errors=True)

    def start(self) -> None:
        if Lane.ending:
            raise UserError("interrupted")
        self.finished_before = self.finished()
        with self.log.open("ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(["bash", "speedrun.sh"], cwd=self.tree, env=self.environment, stdout=log,
                                            stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)  # fmt: skip
        Lane.shells.add(self.process.pid)

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def summary(self) -> list[dict[str, Any]]:
        return ledger.summarize(ledger.read(self.run))

    def finished(self) -> set[str]:
        return {row["stage"] for row in self.summary() if row["status"] == "finished"}

    def at_work(self) -> str:
        """The stage that is running, or was when the runner was killed."""
        records = ledger.read(self.run)
        return records[-1]["stage"] if records and records[-1]["status"] == "started" else ""

    def processes(self) -> list[psutil.Process]:
        """What is alive of this chain, also what has lost its parent: that is a child of ours then (see main)."""
        alive = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, ChildProcessError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    if process.environ().get("NANOCHAT_BASE_DIR") == str(self.store):
                        alive.append(process)
                elif process.ppid() == os.getpid() and process.pid not in Lane.shells:
                    os.waitpid(process.pid, os.WNOHANG)
        return alive

    def output(self) -> str:
        """Of this start."""
        with self.log.open("rb") as log:
            log.seek(self.begin)
            return log.read().decode(errors="replace")

    def ends(self, seconds: float) -> bool:
        """Whether the chain and all of its processes end in time."""
        deadline = time.monotonic() + seconds
        while self.runs() or self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        return True

    def kill_all(self) -> None:
        while (found := self.processes()) or self.runs():
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)

    def checkpoints(self) -> dict[str, Path]:
        """Training stage -> its newest checkpoint, where it has one."""
        folders = {stage: self.store / "checkpoints" / kind / RUN for stage, kind in TRAINS.items()}
        found = {stage: sorted(folder.glob("step_??????/COMMITTED")) for stage, folder in folders.items()}
        return {stage: paths[-1].parent for stage, paths in found.items() if paths}

    def files(self) -> dict[str, Path]:
        """Name in the store -> file."""
        paths = (path for path in sorted(self.store.rglob("*")) if path.is_file())
        return {path.relative_to(self.store).as_posix(): path for path in paths}


def settled(value: Any) -> Any:
    """JSON without what may differ."""
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items() if not VOLATILE.fullmatch(key)}
    return [settled(item) for item in value] if isinstance(value, list) else value


def artifacts(lane: Lane) -> dict[str, str]:
    """Name -> content, or hash of it, of all that a chain has left."""
    found = {}
    for name, path in lane.files().items():
        if IGNORED.fullmatch(name) or (lane.damaged and SET_ASIDE.search(name)):
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".json":
            with suppress(ValueError):  # what was damaged and stayed so has its hash
                found[name] = json.dumps(settled(json.loads(path.read_bytes())), sort_keys=True)
        elif path.name == "metrics.jsonl":
            records = [settled(record) for record in read_jsonl(path)]
            records = [record for record in records if record.keys() > {"stage", "step", "tokens"}]
            found[name] = "\n".join(json.dumps(record, sort_keys=True) for record in records)
        elif path.name in ("COMMITTED", "COMPLETE"):  # hashes of files with times are left out
            lines = path.read_text(errors="replace").splitlines()
            found[name] = "\n".join(line for line in lines if not line.endswith((".json", "/.metadata")))
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Files that differ, and the first place in them."""
    out = [f"{name}: {'missing' if name in expected else 'not to be there'}" for name in expected.keys() ^ found.keys()]
    for name in sorted(expected.keys() & found.keys()):
        one, other = expected[name], found[name]
        if one != other:
            place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), 0)
            begin = max(0, place - 60)
            out.append(f"{name}: {one[begin : place + 30]!r} became {other[begin : place + 30]!r}")
    return out


def undisturbed(lane: Lane) -> tuple[dict[str, str], dict[str, float]]:
    """(artifacts, seconds of each stage)"""
    lane.fresh()
    lane.start()
    assert lane.process is not None
    if not lane.ends(LONGEST_SECONDS) or lane.process.returncode:
        raise UserError(f"a chain that nothing disturbed failed: {lane.output()[-500:]}")
    return artifacts(lane), {row["stage"]: row.get("seconds", 0.0) for row in lane.summary()}


def prepare(folder: Path) -> bool:
    """The program as it is now with a profile of its own, text to train on, an environment that is this one. Whether a
    disk of a lane's own can be had."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True, text=True).stdout
    for name in files.split("\0")[:-1]:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / "tree" / name)
    python = folder / "venv" / "bin" / "python"
    for place in (python.parent, folder / "text", folder / "mount"):
        place.mkdir(parents=True)
    (folder / "tree" / "profiles" / "tiny.sh").write_text(PROFILE)
    for name, text in topics.items():
        (folder / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    setup = (folder / "tree" / "dev" / "setup.sh").read_text()
    stamp = re.search(r"^fingerprint\(\) \{\n.*?^\}$", setup, re.MULTILINE | re.DOTALL)
    assert stamp is not None
    script = f"set -e; VENV={folder}/venv; {stamp[0]}\nfingerprint >$VENV/.setup-stamp"  # nothing is to be installed
    subprocess.run(["bash", "-c", script], cwd=folder / "tree", check=True)
    mounts = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder / "mount"], capture_output=True).returncode == 0
    if mounts:
        subprocess.run(["umount", folder / "mount"], check=True)
    return mounts
