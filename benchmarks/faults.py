"""Kills a small chain again and again, fills its disk, damages its files, and compares what comes out with a chain that
nothing disturbed: every artifact, and every number of the report.

    python -m benchmarks.faults 300                        300 kills, 40 of each other fault: 90 minutes on two cores
    python -m benchmarks.faults 5000 --minutes=600         over night; ends with the chains that are running then

Each lane is a store of its own in which speedrun.sh runs to the end however often it is stopped; then the next chain
begins. A row a fault, a table at the end; the exit code is 1 where anything was lost, trained twice or wrong. Full and
read-only is a tmpfs of the lane's own: as root, or in a user namespace where the system allows one.
"""

import ctypes
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil

from benchmarks.chain import LONGEST_SECONDS, TRAINS, Lane, artifacts, differences, prepare, undisturbed
from nanochat import cli
from nanochat.cli import float_flag, int_flag
from nanochat.errors import UserError
from nanochat.files import atomic_write_text

GENTLE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # training saves
KILLS = [("SIGKILL", whom) for whom in ("tree", "group", "bash", "runner", "stage")]
KILLS += [(name, whom) for name in GENTLE for whom in ("bash", "group")]
OTHERS = ("full disk", "read-only store", "damaged file")
DAMAGES = ("cut in half", "one byte changed", "emptied", "gone", "bytes added")

# Not damaged: logs, what the next start or the report writes anew, and what the run has a copy of its own of
UNDAMAGED = re.compile(
    r"(tokenizer|eval_bundle|task_data)/.*|(.*/)?(metrics\.jsonl|lock|.*\.lock|logs/.*)|"
    r"(runs/[^/]+/)?report/.*\.(md|html|svg)|report/report\.json"
)
TROUBLE = re.compile(r"Traceback|Exception ignored|core dumped|terminate called|Segmentation fault")
SAID = re.compile(r"^(\s*\| )?error: ", re.MULTILINE)
END_SECONDS = 30.0  # that a chain may take to end after a signal
SILENT_SECONDS = 120.0  # in which one that cannot go on has ended, or begun a stage


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
    ended = lane.ends(limit)
    if not ended and fault.detail == "stage" and fault.stage in lane.finished():
        fault.detail = "tree"  # the signal met a process that was just ending well, and the chain went on
        lane.kill_all()
    elif not ended:
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
    runners, others = [], []
    for each in lane.processes():
        with suppress(psutil.Error):  # it has ended meanwhile
            (runners if "nanochat.pipeline" in each.cmdline() else others).append((each, each.ppid()))
    runners = [each for each, parent in runners if parent == bash]
    stages = [each for each, parent in others if parent in {runner.pid for runner in runners}]
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
        make_read_only(lane.store)
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


def make_read_only(store: Path) -> None:
    """Remount it, again while it is busy: files of a process stay open while the last of its threads ends, when it is a
    zombie already (seen once in 74 faults)."""
    deadline = time.monotonic() + END_SECONDS
    while subprocess.run(["mount", "-o", "remount,ro", store], capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{store} cannot be made read-only: a file in it is still open for writing")
        time.sleep(0.1)


def damage(lane: Lane, fault: Fault, rng: random.Random) -> None:
    """Spoil one of the newest files."""
    newest = set(lane.checkpoints().values())
    older = {folder for folder in lane.store.rglob("step_*") if folder.is_dir()} - newest
    files = {path: name for name, path in lane.files().items() if older.isdisjoint(path.parents)}
    names = {path: name for path, name in files.items() if path.stat().st_size and not UNDAMAGED.fullmatch(name)}
    if not names:
        return
    path = rng.choice(sorted(names, key=lambda path: path.stat().st_mtime_ns)[-15:])
    content, how = path.read_bytes(), rng.choice(DAMAGES)
    place = rng.randrange(len(content))
    changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    made = content[: len(content) // 2], changed, b"", None, content + b"?" * 99
    spoilt = made[DAMAGES.index(how)]
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
            elif lane.ends(LONGEST_SECONDS) and lane.process is not None and lane.process.returncode:
                plan.report(lane, ended_by_itself(lane))
        found = differences(expected, artifacts(lane))
        with plan.lock:
            plan.chains[name := f"{lane.number}.{lane.chain}"] = found
            print(f"       {name} at its end: {len(found)} differences", *found, sep="\n    ", flush=True)


def disturb_all(settings: Settings, lanes: list[Lane], kinds: tuple[str, ...]) -> Plan:
    """Raises UserError where two chains that nothing disturbed differ."""
    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            (expected, typical), *others = pool.map(undisturbed, lanes)
            for other, _ in others:
                if found := differences(expected, other):
                    raise UserError(f"two chains that nothing disturbed differ: {'; '.join(found)}")
            print(f"undisturbed: {len(expected)} files, {sum(typical.values()):.0f} s", flush=True)
            plan = Plan(settings, kinds)
            seeds = [random.Random(f"{settings.seed} {lane.number}") for lane in lanes]
            jobs = [pool.submit(disturb, *pair, expected, typical, plan) for pair in zip(lanes, seeds, strict=True)]
            for job in as_completed(jobs):  # one that failed ends all at once
                job.result()
        except BaseException:
            Lane.ending = True  # else the pool would wait for chains that go on and on
            for lane in lanes:
                lane.kill_all()
            raise
    return plan


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
        plan = disturb_all(settings, lanes, OTHERS if mounts else OTHERS[2:])
    finally:
        Lane.ending = True
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
