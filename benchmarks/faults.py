"""Kills a small chain again and again, fills its disk, damages its files, and compares what comes out with a chain that
nothing disturbed: every artifact, and every number of the report.

    python -m benchmarks.faults 300                        300 kills, 40 of each other fault: 90 minutes on two cores
    python -m benchmarks.faults 5000 --minutes=600         over night; ends with the chains that are running then

Each lane is a store of its own in which speedrun.sh runs to the end however often it is stopped; then the next chain
begins. A row a fault, a table at the end; the exit code is 1 where anything was lost, trained twice or wrong. Full and
read-only is a tmpfs of the lane's own: as root, or in a user namespace where the system allows one.
"""

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import psutil

from nanochat import cli, ledger
from nanochat.cli import float_flag, int_flag
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, read_jsonl
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
GENTLE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # training saves
KILLS = [("SIGKILL", whom) for whom in ("tree", "group", "bash", "runner", "stage")]
KILLS += [(name, whom) for name in GENTLE for whom in ("bash", "group")]
OTHERS = ("full disk", "read-only store", "damaged file")
DAMAGES = ("cut in half", "one byte changed", "emptied", "gone", "bytes added")

# What may differ between two runs that nothing disturbed: times, speeds, memory, hashes of files with these, and the
# state of two generators that nothing seeds or draws from
VOLATILE = re.compile(
    r"(.*_)?(time|seconds|minutes|identity|usd)|generated|git|hardware|software|cost|commit|stages|command|numpy|python|"
    r"steady_steps|steps averaged|(Time|Hardware)/.*|.*(per second|minutes|memory GiB)"
)
# Logs and locks; the ledger, which is read otherwise; indices with times; text that is made of the JSON beside it
IGNORED = re.compile(
    r"(.*/)?(lock|.*\.lock|logs/.*|stages\.jsonl|hashes\.jsonl|state/\.metadata)|(runs/[^/]+/)?report/.*\.(md|html)"
)
# Not damaged: logs, what the next start or the report writes anew, and what the run has a copy of its own of
UNDAMAGED = re.compile(
    r"(tokenizer|eval_bundle|task_data)/.*|(.*/)?(metrics\.jsonl|lock|.*\.lock|logs/.*)|(runs/[^/]+/)?report/.*\.(md|html|svg)|report/report\.json"
)
SET_ASIDE = re.compile(r"(^|/)[^/]+?(\.damaged)?\.\d+/")  # folders that are kept beside those that took their place
TROUBLE = re.compile(r"Traceback|Exception ignored|core dumped|terminate called|Segmentation fault")
SAID = re.compile(r"^(\s*\| )?error: ", re.MULTILINE)
END_SECONDS = 30.0  # that a chain may take to end after a signal
SILENT_SECONDS = 120.0  # in which one that cannot go on has ended, or begun a stage
STORE_MIB = 400


@dataclass(frozen=True)
class Settings:
    """Disturb small chains, and compare them with one that was left alone."""

    kills: Annotated[int, int_flag(gte=0)] = 300
    """kills, spread over all stages, signals and processes"""
    _: KW_ONLY
    others: Annotated[int, int_flag(gte=-1)] = -1
    """full disks, read-only stores, damaged files, of each; -1: two for every fifteen kills"""
    lanes: Annotated[int, int_flag(gte=1)] = 2
    """chains at a time"""
    minutes: Annotated[float, float_flag(gte=0)] = 90.0
    """after which no new fault is made"""
    seed: Annotated[int, int_flag(gte=0)] = 0
    """of the moments and the faults"""
    work: Path | None = None
    """folder for the stores and outputs, to be kept; by default one that is removed where all is well"""
    out: Path | None = None
    """file for the results as JSON"""


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    detail: str = ""
    stage: str = ""
    seconds: float = 0.0  # until all processes had ended
    code: int | None = None
    lost: int = 0  # training steps that were made and are in no checkpoint
    problems: list[str] = field(default_factory=list)


class Lane:
    """A store, and the chain that runs in it."""

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
            subprocess.run(["umount", self.store], check=True)
        shutil.rmtree(self.store, ignore_errors=True)

    def start(self) -> None:
        self.finished_before = {row["stage"] for row in self.summary() if row["status"] == "finished"}
        with self.log.open("ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(["bash", "speedrun.sh"], cwd=self.tree, env=self.environment, stdout=log,
                                            stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)  # fmt: skip

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def summary(self) -> list[dict[str, Any]]:
        return ledger.summarize(ledger.read(self.run))

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
                elif process.ppid() == os.getpid() and (self.process is None or process.pid != self.process.pid):
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


# ---- faults


def strike(lane: Lane, typical: dict[str, float], rng: random.Random) -> bool:
    """Wait for a random moment: soon after the start, when the chain looks at what is done, or within one of the next
    stages. False where the chain ends before."""
    moment = time.monotonic() + rng.uniform(0, 8) if rng.random() < 0.2 else None
    stages, skipped = [lane.at_work()], rng.choice([0, 0, 1, 2])
    while lane.runs():
        if moment is None and (stage := lane.at_work()) and stage != stages[-1]:
            stages.append(stage)
            if len(stages) > skipped + 1:
                moment = time.monotonic() + rng.uniform(0, typical.get(stage, 5.0) + 0.5)
        if moment is not None and time.monotonic() >= moment:
            return True
        time.sleep(0.02)
    return False


def inject(lane: Lane, fault: Fault, rng: random.Random) -> None:
    """Make a fault in the running chain and wait for its end."""
    assert lane.process is not None
    fault.stage, begun, limit = lane.at_work() or "between", time.monotonic(), END_SECONDS
    ballast = lane.store / ".ballast"
    if fault.kind == "full disk":
        limit = SILENT_SECONDS
        left = rng.choice([0, 4096, 65536])  # some files can still be written
        with ballast.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(lane.store).free - left))
    else:
        send(lane, fault)
    if not lane.ends(limit):
        still = {" ".join(process.cmdline()[1:4]) for process in lane.processes()}
        fault.problems.append(f"still running after {limit:.0f} s: {' '.join(sorted(still))[:150] or 'bash'}")
        lane.kill_all()
    fault.seconds, fault.code = time.monotonic() - begun, lane.process.returncode
    ballast.unlink(missing_ok=True)
    text = lane.output()
    if fault.code == 0 and ("talk to it:" not in text or (fault.kind in GENTLE and fault.seconds > 0.5)):
        fault.problems.append("ended with 0")
    if fault.kind == "full disk" and fault.code and not re.search("disk full|No space left", text):
        fault.problems.append("does not say that the disk is full")
    judge(lane, fault, text)


def send(lane: Lane, fault: Fault) -> None:
    """The signal, to those that it is for."""
    assert lane.process is not None
    number, bash = signal.Signals[fault.kind], lane.process.pid
    runners = [each for each in lane.processes() if each.ppid() == bash and "nanochat.pipeline" in each.cmdline()]
    stages = [each for runner in runners for each in runner.children() if "nanochat.pipeline" not in each.cmdline()]
    chosen = {"runner": runners, "stage": stages}.get(fault.detail, [])
    for process in chosen:
        process.send_signal(number)
    if fault.detail == "group":
        os.killpg(bash, number)
    elif fault.detail == "bash":
        os.kill(bash, number)
    elif not chosen:
        fault.detail = "tree"
        lane.kill_all()


def disturb_store(lane: Lane, fault: Fault, rng: random.Random) -> None:
    """A fault of a store in which nothing runs. The chain is started on it, and runs on where it can."""
    rows, begun = lane.summary(), time.monotonic()
    fault.stage = next((row["stage"] for row in rows if row["status"] not in ("finished", "skipped")), "report")
    if fault.kind == "read-only store":
        subprocess.run(["mount", "-o", "remount,ro", lane.store], check=True)
    else:
        damage(lane, fault, rng)
    lane.start()
    assert lane.process is not None
    if fault.kind == "damaged file":  # it may show at once or hours later, or be made good: the chain goes on
        return
    if not lane.ends(SILENT_SECONDS):
        fault.problems.append(f"still running after {SILENT_SECONDS:.0f} s")
        lane.kill_all()
    subprocess.run(["mount", "-o", "remount,rw", lane.store], check=True)
    fault.seconds, fault.code = time.monotonic() - begun, lane.process.returncode
    judge(lane, fault, lane.output())
    if fault.code == 0 or not SAID.search(lane.output()):
        fault.problems.append("not refused in a line")


def damage(lane: Lane, fault: Fault, rng: random.Random) -> None:
    """Spoil one of the newest files."""
    newest = set(lane.checkpoints().values())
    names = {
        path: name for name, path in lane.files().items()
        if path.stat().st_size and not UNDAMAGED.fullmatch(name)
        and not any(folder.name.startswith("step_") and folder not in newest for folder in path.parents)
    }  # fmt: skip
    if not names:
        return
    path = rng.choice(sorted(names, key=lambda path: path.stat().st_mtime_ns)[-15:])
    content, how = path.read_bytes(), rng.choice(DAMAGES)
    place = rng.randrange(len(content))
    changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    spoilt = dict(zip(DAMAGES, (content[: len(content) // 2], changed, b"", None, content + b"?" * 99), strict=True))[
        how
    ]
    fault.detail = f"{how}: {names[path]}"
    path.unlink()  # it may be a link to another that is not to be spoilt
    if spoilt is not None:
        path.write_bytes(spoilt)
    lane.damaged[path] = content, spoilt


def ended_by_itself(lane: Lane) -> Fault:
    """Right where a damaged file is why, and the last line says so. That is put back then."""
    assert lane.process is not None
    fault, text = Fault("by itself", "", lane.at_work() or "between", code=lane.process.returncode), lane.output()
    judge(lane, fault, text)
    for path, (content, spoilt) in lane.damaged.items():
        if (path.read_bytes() if path.exists() else None) == spoilt != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            lane.damaged[path] = content, content
            fault.detail += f"put back {path.relative_to(lane.store)} "
    if not fault.detail or not SAID.search(text):
        fault.problems.append(f"ended by itself: {text[-300:]!r}")
    return fault


def judge(lane: Lane, fault: Fault, text: str) -> None:
    """What must be true of every end, whatever caused it."""
    if trouble := TROUBLE.search(text):
        fault.problems.append(f"{trouble[0]}: {' '.join(text[trouble.end() :].split())[-200:]}")
    stage, last = "", 0
    for name, step in re.findall(r"^=== (\w+): |^step (\d+)/", text, re.MULTILINE):
        stage, last = (name, 0) if name else (stage, int(step))
    if stage in TRAINS and last:
        saved = lane.checkpoints().get(stage)
        fault.lost = max(0, last - (int(saved.name[5:]) if saved else 0))
        if fault.lost and fault.kind in GENTLE:
            fault.problems.append(f"{fault.lost} steps of {stage} not saved")
    began = re.findall(r"^=== (\w+): ((?!done|finished|skipped|ended)[^;\n]*); ", text, re.MULTILINE)
    if twice := [f"{name} ({why})" for name, why in began if name in lane.finished_before and not lane.damaged]:
        fault.problems.append(f"finished, and ran again: {', '.join(twice)}")


# ---- what came out


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
        if path.suffix == ".json":
            found[name] = json.dumps(settled(json.loads(path.read_bytes())), sort_keys=True)
        elif path.name == "metrics.jsonl":
            records = [settled(record) for record in read_jsonl(path)]
            records = [record for record in records if record.keys() > {"stage", "step", "tokens"}]
            found[name] = "\n".join(json.dumps(record, sort_keys=True) for record in records)
        elif path.name in ("COMMITTED", "COMPLETE"):  # hashes of files with times are left out
            lines = [line for line in path.read_text().splitlines() if not line.endswith((".json", "/.metadata"))]
            found[name] = "\n".join(lines)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
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


# ---- the run


class Plan:
    """Which fault comes next, for all lanes, and what has come of them."""

    def __init__(self, settings: Settings, kinds: tuple[str, ...]) -> None:
        others = settings.others if settings.others >= 0 else settings.kills * 2 // 15
        kills = (KILLS * (settings.kills // len(KILLS) + 1))[: settings.kills]
        self.left = [Fault(*kill) for kill in kills] + [Fault(kind) for kind in kinds for _ in range(others)]
        random.Random(settings.seed).shuffle(self.left)
        self.deadline = time.monotonic() + 60 * settings.minutes
        self.made: list[Fault] = []
        self.chains: dict[str, list[str]] = {}  # what differed in each that came to its end
        self.lock = threading.Lock()

    def next(self) -> Fault | None:
        with self.lock:
            return self.left.pop() if self.left and time.monotonic() < self.deadline else None

    def report(self, lane: Lane, fault: Fault) -> None:
        with self.lock:
            self.made.append(fault)
            where = f"{len(self.made):5d}  {lane.number}.{lane.chain:<3d} {fault.stage:<14} {fault.kind:<15} "
            came = f"{fault.seconds:6.1f} s  exit {fault.code!s:>4}  lost {fault.lost:>2}  "
            print(f"{where}{fault.detail[:60]:<8} {came}{'; '.join(fault.problems) or 'ok'}", flush=True)

    def table(self) -> dict[str, Any]:
        """Kind -> what came of its faults."""
        rows: dict[str, Any] = {}
        for fault in self.made:
            kind = f"{fault.kind} {fault.detail}" if (fault.kind, fault.detail) in KILLS else fault.kind
            row = rows.setdefault(kind, {"faults": 0, "stages": Counter(), "slowest": 0.0, "lost": 0, "problems": []})
            row["faults"] += 1
            row["stages"][fault.stage] += 1
            row["slowest"], row["lost"] = max(row["slowest"], fault.seconds), max(row["lost"], fault.lost)
            row["problems"] += fault.problems
        return dict(sorted(rows.items()))


def disturb(lane: Lane, rng: random.Random, expected: dict[str, str], typical: dict[str, float], plan: Plan) -> None:
    """Chains one after the other until no fault is left; the last one goes on to its end."""
    fault = plan.next()
    while fault is not None:
        lane.fresh()
        while lane.process is None or lane.process.poll() != 0:
            if not lane.runs():
                lane.start()
            if fault is not None and strike(lane, typical, rng):
                if fault.kind in OTHERS[1:]:
                    lane.kill_all()
                    disturb_store(lane, fault, rng)
                else:
                    inject(lane, fault, rng)
                plan.report(lane, fault)
                fault = plan.next()
            elif lane.ends(10 * SILENT_SECONDS) and lane.process is not None and lane.process.returncode:
                plan.report(lane, ended_by_itself(lane))
        found = differences(expected, artifacts(lane))
        with plan.lock:
            plan.chains[name := f"{lane.number}.{lane.chain}"] = found
            print(f"       {name} at its end: {len(found)} differences", *found, sep="\n    ", flush=True)


def undisturbed(lane: Lane) -> tuple[dict[str, str], dict[str, float]]:
    """(artifacts, seconds of each stage)"""
    lane.fresh()
    lane.start()
    assert lane.process is not None
    if not lane.ends(60 * SILENT_SECONDS) or lane.process.returncode:
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


def main(settings: Settings) -> None:
    if os.geteuid() != 0 and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]])
    for name in GENTLE:  # none ignored, for our children too
        signal.signal(signal.Signals[name], signal.default_int_handler)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what is left behind becomes a child of ours
    started, load = time.monotonic(), os.getloadavg()
    folder = settings.work or Path(tempfile.mkdtemp(prefix="nanochat-faults-"))
    mounts = prepare(folder)
    if not mounts:
        print("no tmpfs can be mounted here: full disks and read-only stores are left out", flush=True)
    lanes = [Lane(folder, number, mounts) for number in range(1, settings.lanes + 1)]
    try:
        with ThreadPoolExecutor(len(lanes)) as pool:
            (expected, typical), *others = pool.map(undisturbed, lanes)
            for other, _ in others:
                if found := differences(expected, other):
                    raise UserError(f"two chains that nothing disturbed differ: {'; '.join(found)}")
            print(f"undisturbed: {len(expected)} files, {sum(typical.values()):.0f} s", flush=True)
            plan = Plan(settings, OTHERS if mounts else OTHERS[2:])
            seeds = [random.Random(f"{settings.seed} {lane.number}") for lane in lanes]
            jobs = [pool.submit(disturb, *pair, expected, typical, plan) for pair in zip(lanes, seeds, strict=True)]
            for job in jobs:
                job.result()
    finally:
        for lane in lanes:
            lane.kill_all()
            lane.close()
    rows = plan.table()
    for kind, row in rows.items():
        print(f"{kind:<16} {row['faults']:4d} faults in {len(row['stages']):2d} stages, ended in {row['slowest']:5.1f} "
              f"s at most, {row['lost']:2d} steps to repeat at most, {len(row['problems'])} problems")  # fmt: skip
    wrong, minutes = sum(map(bool, plan.chains.values())), (time.monotonic() - started) / 60
    print(f"{len(plan.made)} faults, {len(plan.chains)} chains to their end, {wrong} of them with differences; "
          f"{minutes:.0f} minutes, load {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after")  # fmt: skip
    about = {"date": datetime.now().isoformat(timespec="minutes"), "torch": version("torch"), "cores": os.cpu_count(),
             "load": [*load, *os.getloadavg()], "settings": cli.as_dict(settings, ["out", "work"])}  # fmt: skip
    result = {**about, "kinds": rows, "chains": plan.chains, "faults": [asdict(fault) for fault in plan.made]}
    if settings.out:
        atomic_write_text(settings.out, json.dumps(result, indent=1) + "\n")
    if wrong or any(fault.problems for fault in plan.made):
        raise UserError(f"something was lost, trained twice or wrong: see above, and {folder}")
    if settings.work is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(main, Settings)
