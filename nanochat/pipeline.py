"""The stage runner: skips what is done, logs, stops and explains on failure, continues on the next call.

    python -m nanochat.pipeline run tok_train --in base_data/pydocs --out tokenizer -- python -m scripts.tok_train
    printf '%s\\0' tok_train --in base_data/pydocs -- … "" | python -m nanochat.pipeline check -- VOCAB_SIZE=512 --mup
    python -m nanochat.pipeline status

The run is the one named by NANOCHAT_RUN_ID. A stage is done when it has finished with the same command, NANOCHAT_
settings, code and input artifacts, and all that it wrote is unchanged. How many processes ran it (torchrun), `--run`
(W&B) and calls in between that skipped it make no difference.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pkgutil
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any, Literal

from cyclopts import CycloptsError, Parameter

from nanochat import cli, hardware, ledger, paths
from nanochat.errors import UNFINISHED, UserError, end_with_parent
from nanochat.files import link_files, replaced_folder, sweep
from nanochat.flags import NO_WANDB
from nanochat.sections import duration, sections_dir

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TAIL_LINES = 15
SECONDS_TO_SAVE = 30.0  # that a stage is left when its runner was killed
CHAIN_VARIABLES = ("RUN_LOCK", "TEXT_LOCK", "CHAIN_PID")  # in which dev/stages.sh says what it has open, and who it is
SAME_SIGNAL_SECONDS = 0.5

# Where a run is kept or what it may do, not what it computes. A model's code that may not be run fails the stage, so
# permission given later changes nothing that a finished one wrote.
NEUTRAL_VARIABLES = frozenset(
    {"NANOCHAT_BASE_DIR", "NANOCHAT_RUN_ID", "NANOCHAT_CONTINUE", "NANOCHAT_ALLOW_UNSAFE_CODE"}
)


# Settings of dev/settings.sh whose flag has another name, and those that are all that a stage is about.
FLAGS = {"SHARDS": "-n", "WANDB_RUN": "--run", "RUN_ID": "--model-tag", "MODEL_DEPTH": "--depth"}
STAGES = {"EVAL_BUNDLE": "eval_bundle", "TASK_DATA": "chat_data"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Run one stage of the pipeline (its command after `--`), show where the run stands, or forget what ran."""

    action: Literal["run", "check", "status", "reset"] = "status"
    """run one stage; check the flags of those on stdin; status of all; reset: the next run starts every stage again"""
    stage: str = ""
    """name of the stage to run"""
    _: dataclasses.KW_ONLY
    inputs: Annotated[tuple[str, ...], Parameter(name="--in", negative="")] = ()
    """path that the stage reads: file, folder or glob in the artifact store; may be repeated"""
    outputs: Annotated[tuple[str, ...], Parameter(name="--out", negative="")] = ()
    """path that the stage writes; may be repeated"""
    skip: str = ""
    """do not run the stage, and show this reason in the report"""


def main(settings: Settings, command: Sequence[str]) -> int:
    """Do what the settings say; returns the exit code."""
    if settings.action == "check":
        check(command, os.fsdecode(sys.stdin.buffer.read()))
        sweep(paths.get_base_dir().rglob("*.tmp"))
        return 0
    run_dir, stage = paths.run_dir(), settings.stage
    if settings.action == "status":
        return show_status(run_dir)
    if settings.action == "reset":
        return reset(run_dir)
    if not stage:
        raise UserError("run: no stage named; usage: nanochat.pipeline run STAGE [--in P] [--out P] -- COMMAND")
    if not command and not settings.skip:
        raise UserError(f"run {stage}: no command; write it after `--`")
    # TERM in place of all: Python that is just starting answers an INT with a stack trace, and bash may lose it
    with ForwardedSignals(SIGNALS, kill=True, instead=signal.SIGTERM) as signals, locked(run_dir):
        if settings.skip:
            ledger.append(run_dir, {"stage": stage, "status": "skipped", "reason": settings.skip})
            _say(f"{stage}: skipped, {settings.skip}")
        code = 0 if settings.skip else run_stage(stage, list(command), settings.inputs, settings.outputs, signals)
    if code == 0 and signals.received:  # it came before the stage began, or after its end: what follows must not start
        print(f"\nstopped by {signal.Signals(signals.received[0]).name}\n{_continue()}", file=sys.stderr, flush=True)
        return 128 + signals.received[0]
    return code


def check(written: Sequence[str], stages: str) -> None:
    """Raises UserError for the first mistake in the flags of `stages` (the words of `run`, an empty one after each),
    named as the user wrote it, and for folders that are files or another run's."""
    [paths.checkpoint_dir(kind, paths.run_dir().name) for kind in ("base", "mid", "sft", "rl")]
    paths.check_folders({folder for folder in re.findall(r"\0--out\0([^\0/]+)", stages)})
    if strange := [words for words in written if not words.isprintable()]:
        raise UserError(f"{strange[0]!a}: these are no letters in the encoding of this locale")
    for listed in filter(None, stages.split("\0\0")):
        stage, *words = listed.strip("\0").split("\0")
        if "--" not in words or (name := ledger.stage_module(words)) is None:
            continue
        try:
            cli.check(name, words[words.index(name) + 1 :])
        except (CycloptsError, UserError) as error:
            raise UserError(as_written(stage, " ".join(str(error).split()), written)) from None
    if re.search(rf"\0--run=(?!{NO_WANDB}\0)", stages):
        pkgutil.resolve_name("nanochat.train.tracking:warn")()  # an annex, which takes 1 s to import


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


def run_stage(stage: str, command: list[str], inputs: Sequence[str], outputs: Sequence[str], heard: Any = None) -> int:
    """Run `command` as `stage` of the current run unless it is done, or a signal came. Returns its exit code (128 + n
    for signal n). heard: the signals, where they are heard already.

    Raises UserError when an input is missing or the command cannot be started.
    """
    run_dir, signals = paths.run_dir(), heard or ForwardedSignals((), kill=False)
    for absent in ledger.missing(inputs):
        raise UserError(f"{stage} needs {absent}, which is not in {paths.get_base_dir()}: run the stage that writes it")
    basis = describe(command, inputs)
    key = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]
    records = ledger.read(run_dir)
    before = ledger.last_run(records, stage)
    reason = _why_again(before, basis, key)
    if before is not None and reason is None:
        if ledger.status_of(records, stage) != "finished":  # skipped since, or stale until it was looked at here
            ledger.append(run_dir, {**before, "copy": True})
        done = time.strftime("%Y-%m-%d %H:%M", time.localtime(before["time"]))
        _say(f"{stage}: done on {done} in {duration(before.get('seconds'))}")
        return 0

    own = [name for name in outputs if name in paths.OWN and os.environ.get("NANOCHAT_RUN_ID")]
    for name in own:
        exchange(name, into_run=True)
    if signals.received:
        return 0
    log = run_dir / "logs" / f"{stage}.log"
    _say(f"{stage}: {reason}; {shlex.join(command)}")
    record = {
        "stage": stage,
        "command": command,
        "key": key,
        "basis": basis,
        "commit": hardware.short_commit(),
        "log": str(log),
        "profile": os.environ.get("PROFILE"),
        "continue": os.environ.get("NANOCHAT_CONTINUE"),
    }
    ledger.append(run_dir, {**record, "status": "started"})
    started = time.perf_counter()
    code, tail, stopped_by = _execute(command, log, signals)
    status, code = _status(code, stopped_by)
    if status == "finished" and (not_written := ledger.missing(outputs)):
        # it was told to stop and did so in good order: training saves and exits with 0
        status, code = "unfinished", UNFINISHED
        _say(f"{stage}: ended well but did not write {', '.join(not_written)} yet")
    for name in own if status == "finished" else []:
        exchange(name, into_run=False)
    # a number in the report is what the stage wrote, or it runs again
    also = [str(sections_dir(run_dir) / f"{stage}.json"), *filter(None, [ledger.results(stage, run_dir.name)])]
    written = ledger.fingerprint([*outputs, *also]) if status == "finished" else {}
    seconds = time.perf_counter() - started
    ledger.append(run_dir, {**record, "status": status, "exit_code": code, "seconds": seconds, "outputs": written})
    _say_end(stage, status, code, seconds, tail, log)
    return code


def exchange(name: str, into_run: bool) -> None:
    """Give this run its own copy of a folder of the store, or the store what the run has made of it, whole, while no
    other run does; a store that has none takes none from the run (it had been killed between the two). Of task_data,
    which holds data of many sources, each keeps what it has and the other lacks."""
    store, own = paths.get_base_dir() / name, paths.run_dir() / name
    source, target = (store, own) if into_run else (own, store)
    with (paths.get_base_dir() / "lock").open("a") as file:
        _lock(file, fcntl.LOCK_EX)
        if name == "task_data":
            link_files(source, target, replace=not into_run)
        elif source.is_dir() and any(source.iterdir()):
            with replaced_folder(target) as folder:
                link_files(source, folder)
        own.mkdir(parents=True, exist_ok=True)  # from now on the run reads and writes there: paths.artifact


def describe(command: Sequence[str], inputs: Sequence[str]) -> dict[str, Any]:
    """Everything that decides what a stage writes."""
    module = ledger.stage_module(command)
    words = command[command.index(module) :] if module else command
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("NANOCHAT_")}
    return {
        "command": [word for word in words if not word.startswith("--run=")],
        "environment": {name: value for name, value in settings.items() if name not in NEUTRAL_VARIABLES},
        "code": ledger.code_version(module) if module else None,
        "inputs": ledger.fingerprint(inputs),
    }


def _why_again(before: ledger.Record | None, basis: dict[str, Any], key: str) -> str | None:
    """Why a stage has to run, in words; None when it is done."""
    if before is None:
        return "first run"
    if before.get("key") != key:
        known = before["basis"] if isinstance(before.get("basis"), dict) else {}
        changed = [part for part in basis if known.get(part) != basis[part]]
        return f"{' and '.join(changed)} changed since it ran"
    if before["status"] != "finished":
        return "continues" if before["status"] in ("unfinished", "interrupted", "started") else "failed before"
    return None if ledger.unchanged(before.get("outputs")) else "what it wrote is gone or changed"


class ForwardedSignals:
    """While open, notes signals that are sent to this process and hands them on to a child's process group.

    A scheduler tells all processes of a job at once, and those that started us hand it on: what comes within half a
    second is one signal. From the third on the user means it: the group is killed, where `kill` says so. instead: what
    the group gets in place of each of them, once.
    """

    def __init__(self, numbers: Iterable[int], kill: bool, instead: int | None = None) -> None:
        self.numbers, self.kill, self.instead = numbers, kill, instead
        self.received: list[int] = []
        self.group: int | None = None
        self._early: list[int] = []  # came before there was a group
        self._came = -math.inf  # when one came last

    def __enter__(self) -> "ForwardedSignals":
        # SIGINT and SIGQUIT count again, also in the child, where a shell has started us in the background with them
        # ignored; SIGHUP does not, which nohup has ignored
        heard = (n for n in self.numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)
        self._before = {number: signal.signal(number, self._hand_on) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def attach(self, child: int) -> None:
        """Hand on to the process group `child`, also what came while it was starting: that once, for a signal that
        comes again while a process is ending would kill it."""
        self.group = child
        while self._early:
            kill_group(child, self._early.pop(0))

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        before, self._came = self._came, time.monotonic()
        if self._came - before < SAME_SIGNAL_SECONDS:
            return
        self.received.append(number)
        sent = self.instead or number
        if self.kill and len(self.received) > 2:
            sent = signal.SIGKILL
        elif self.instead and len(self.received) > 1:
            return  # it has been told: what comes again while a process is ending would kill it
        if self.group is None:
            self._early.append(sent)
        else:
            kill_group(self.group, sent)


def exit_code(returncode: int) -> int:
    """As a shell has it: 128 + n after signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def wait(child: subprocess.Popen[bytes]) -> int:
    """Its return code. Looked for every 0.05 s: a wait without limit is not interrupted where another thread of ours
    gets the signal, so that it would be handled only after the child's end."""
    return child.wait(timeout=threading.TIMEOUT_MAX)


def kill_group(group: int, number: int) -> None:
    """Send a signal to all processes of a group, if any are left."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _execute(command: list[str], log: Path, signals: ForwardedSignals) -> tuple[int, deque[str], int | None]:
    """Run `command` in a process group of its own, its output to stdout and `log`; signals to us are handed on to it.

    Returns the exit code as a shell has it, the last lines of output, and the first signal we were sent.
    """
    environment = {**os.environ, "NANOCHAT_RUN_ID": paths.run_id(), "PYTHONUNBUFFERED": "1"}
    for name in ("FORCE_COLOR", *CHAIN_VARIABLES):  # logs stay plain text; the files are ours
        environment.pop(name, None)
    arguments = [sys.executable, *command[1:]] if command[0] == "python" else command
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
        file.flush()
        try:
            child = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"cannot start {command[0]}: {error.strerror}") from error
        assert child.stdout is not None
        with _ended_with_us(child.pid, child.stdout.fileno(), file.fileno()):
            signals.attach(child.pid)
            reader = threading.Thread(target=_tee, args=(child.stdout, file, tail), daemon=True)
            reader.start()
            code = wait(child)
            stopped_by = signals.received[0] if signals.received else None
            signals.group = None
            kill_group(child.pid, signal.SIGKILL)  # a stage leaves no process behind that would hold the pipe open
            reader.join()
    return exit_code(code), tail, stopped_by


@contextmanager
def _ended_with_us(group: int, output: int, log: int) -> Iterator[None]:
    """While open, a second process waits for our end. Where it comes by SIGKILL, that process ends the group, which may
    save its state before, holds our locks until then, and brings its last output to the log."""
    alive, end = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            os.setsid()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            os.close(end)
            os.read(alive, 1)  # returns once nobody has `end` open
            kill_group(group, signal.SIGTERM)
            deadline = time.monotonic() + SECONDS_TO_SAVE
            while (left := deadline - time.monotonic()) > 0:
                if select.select([output], [], [], left)[0]:
                    if not (line := os.read(output, 65536)):
                        break
                    os.write(log, line)
        finally:
            kill_group(group, signal.SIGKILL)
            os._exit(0)
    try:
        yield
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
        os.close(alive)
        os.close(end)


def _tee(source: IO[bytes], log: IO[bytes], tail: deque[str]) -> None:
    """Copy lines to stdout and `log` as they come. A full disk or a closed terminal ends that copy, not the stage."""
    sinks: list[IO[bytes]] = [sys.stdout.buffer, log]
    for line in source:
        tail.append(line.decode(errors="replace").rstrip())
        for sink in list(sinks):
            try:
                sink.write(line)
                sink.flush()
            except OSError as error:
                sinks.remove(sink)
                tail.append(f"[output no longer copied to {'the log' if sink is log else 'stdout'}: {error.strerror}]")


def _status(code: int, stopped_by: int | None) -> tuple[str, int]:
    """(status of a stage, exit code of its runner) from the exit code of its command and the first signal to us."""
    if code == UNFINISHED:
        return "unfinished", code
    if stopped_by is not None:  # even at exit code 0 it may have left early, and what comes after must not start
        return "interrupted", 128 + stopped_by if code in (0, 128 + signal.SIGTERM) else code
    return ("failed" if code else "finished"), code


def _say_end(stage: str, status: str, code: int, seconds: float, tail: Sequence[str], log: Path) -> None:
    if status == "finished":
        _say(f"{stage}: finished in {duration(seconds)}")
        return
    lines = [f"\n{stage}: stopped early after {duration(seconds)} ({status})"]
    if status == "failed":
        killed = f" (killed by {signal.Signals(code - 128).name})" if code - 128 in signal.valid_signals() else ""
        lines = [f"\nerror: {stage} failed with exit code {code}{killed} after {duration(seconds)}"]
        lines += [*(f"  | {line}" for line in tail), f"log: {log}"]
    print("\n".join([*lines, _continue()]), file=sys.stderr, flush=True)


def _continue() -> str:
    return f"to continue: {os.environ.get('NANOCHAT_CONTINUE') or shlex.join(sys.orig_argv)}"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run, so that two pipelines cannot write the same artifacts. Freed by the system if we are killed.

    The chain of stages opens the file (dev/stages.sh) and hands it to each of us: it holds the run from its first stage
    to its end, and we end with it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    inherited, holder = _inherited("RUN_LOCK", path), os.getpid()
    if inherited is not None:
        end_with_parent(signal.SIGTERM)
        if os.getppid() != int(os.environ.get("CHAIN_PID", os.getppid())):  # it ended before we asked to be told
            raise UserError("the script that walks the stages has ended; run it again")
        with suppress(OSError, ValueError):
            fcntl.flock(int(os.environ.get("TEXT_LOCK", "")), fcntl.LOCK_SH)  # see nanochat.files.hold
        holder = os.getppid()
    with open(inherited if inherited is not None else path, "a+", closefd=inherited is None) as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, host = path.read_text(encoding="utf-8", errors="replace").strip().partition(" on ")
            where = "" if host in ("", socket.gethostname()) else f" on {host}, which shares this store"
            raise UserError(
                f"run {run_dir.name} is being worked on by process {pid}{where}: wait for it, or set another RUN_ID"
            ) from None
        file.truncate(0)
        file.write(f"{holder} on {socket.gethostname()}")
        file.flush()
        yield


def _inherited(name: str, path: Path) -> int | None:
    """The file descriptor in the variable `name`, if it is that of `path`."""
    with suppress(OSError, ValueError):
        descriptor = int(os.environ.get(name, ""))
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    return None


def _lock(file: IO[str] | int, how: int) -> None:
    """flock. Raises BlockingIOError where another holds it; says so where the file system has no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        _say(f"warning: this file system has no locks ({error.strerror}): let no other pipeline work on the same run")


def is_locked(run_dir: Path) -> bool:
    """True while a pipeline works on this run."""
    try:
        with suppress(FileNotFoundError), (run_dir / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def show_status(run_dir: Path) -> int:
    """Print one line a stage."""
    print(f"run {run_dir.name} ({run_dir})")
    busy = is_locked(run_dir)
    for row in ledger.summarize(ledger.read(run_dir)):
        status = row["status"]
        if status == "started":
            status = "running" if busy else "interrupted"
        took = duration(row["seconds"]) if "seconds" in row else ""
        print(f"  {row['stage']:<14} {status:<12} {took:>10}  {row.get('reason', '')}".rstrip())
    return 0


def reset(run_dir: Path) -> int:
    """Set the ledger aside, so that every stage of the run starts again. Artifacts stay where they are."""
    with locked(run_dir):
        if ledger.ledger_path(run_dir).exists():
            os.replace(ledger.ledger_path(run_dir), run_dir / "stages.jsonl.old")
    print(f"run {run_dir.name}: the next call runs every stage again")
    return 0


def _say(line: str) -> None:
    print(f"\n=== {line}", flush=True)


if __name__ == "__main__":
    cli.run_with_command(main, Settings)
