"""Runs Python that a model wrote, where it can do no harm. Linux; no root and no other software needed.

Every program gets a process of its own below a fresh interpreter (child.py), with limits and, as far as the kernel
grants them, namespaces, a scratch folder of limited size, Landlock and seccomp; isolation_level() says which are in
force. A function is graded by a check that runs in another process and calls it from there (wire.py). docs/guide.md
says what each layer refuses, and what the sandbox does NOT protect from.
"""

import contextlib
import functools
import marshal
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.errors import UserError

OUTPUT_LIMIT = 256 << 10  # bytes kept of stdout, and of stderr
ALLOW_UNSAFE = "NANOCHAT_ALLOW_UNSAFE_CODE"
MAX_TIMEOUT = 3600
MEMORY = 256 << 20  # bytes of address space
READY = b"ready\n"  # what a program's process says once it is locked in
GRACE = 30.0  # seconds that the supervisor gets on top of the program's time before it is killed itself
REMOVAL = 2.0  # seconds that a caller waits for the removal of what a program left


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended."""

    # It ran to its last line; sys.exit() is not that: a grader must not take leaving early for passing. Of execute_code
    # this is the program's own word; that of check_function no program can give.
    success: bool
    stdout: str  # the first 256 KiB of it, undecodable bytes replaced
    stderr: str  # as stdout; ends with the traceback of an exception
    error: str | None  # one line, mostly `Type: message` of the exception; None on success
    timeout: bool  # its time was up
    memory_exceeded: bool  # it ended on a MemoryError, or the system killed it for its memory


class Isolation(NamedTuple):
    """The layers that this kernel grants."""

    namespaces: bool = False
    scratch_limit: bool = False
    landlock: int = 0  # its version (ABI), 0 for none; from 4 on it refuses TCP, from 6 on signals to other processes
    seccomp: bool = False

    def describe(self) -> str:
        """For reports: `process limits, namespaces, scratch limit, Landlock (ABI 7), seccomp`."""
        layers = {"process limits": True, "namespaces": self.namespaces, "scratch limit": self.scratch_limit}
        layers |= {f"Landlock (ABI {self.landlock})": self.landlock > 0, "seccomp": self.seccomp}
        return ", ".join(name for name, granted in layers.items() if granted)

    def danger(self) -> str:
        """What is missing of the minimum, which is Landlock (for files) and seccomp or namespaces (for the rest); empty
        where nothing is."""
        code = "so model-written code could reach your"
        if not (self.landlock or self.seccomp or self.namespaces):
            return f"no namespaces, Landlock or seccomp, {code} files and network"
        if not self.landlock:
            return f"no Landlock, {code} files"
        return "" if self.seccomp or self.namespaces else f"no namespaces or seccomp, {code} network and processes"


@functools.cache
def isolation_level() -> Isolation:
    """The layers in force here. Each is tried once, in a process that is thrown away. Raises UserError off Linux."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"model-written code runs only on Linux, this is {sys.platform}: evaluate on a Linux machine")
    return Isolation(**_supervised([{"probe": True}], GRACE)[0])


def require_isolation() -> Isolation:
    """The layers in force, for those who run code; to be asked before long work that ends with running some. Raises
    UserError off Linux, and below the minimum (Isolation.danger) unless allow_unsafe has been called."""
    level = isolation_level()
    if (danger := level.danger()) and os.environ.get(ALLOW_UNSAFE) != "1":
        raise UserError(
            f"this kernel grants {danger}: use another machine or container, or add --unsafe-exec (or set "
            f"{ALLOW_UNSAFE}=1) to run it all the same"
        )
    return level


def allow_unsafe(allowed: bool) -> None:
    """--unsafe-exec: this process and those it starts may run code below the minimum."""
    if allowed:
        os.environ[ALLOW_UNSAFE] = "1"


def execute_code(code: str, timeout: float = 5.0, maximum_memory_bytes: int | None = MEMORY) -> ExecutionResult:
    """Run `code` as a main program of its own; from any thread, several at once. `timeout` is wall-clock seconds.
    `maximum_memory_bytes` is address space, of which the interpreter takes 20 MB. The standard library is there, other
    packages are not. Raises UserError like require_isolation, RuntimeError where a layer that was there is refused
    now."""
    return _execute(code, timeout, maximum_memory_bytes)


def check_function(code: str, name: str, check: str, timeout: float = 5.0) -> ExecutionResult:
    """Whether the function `name` that `code` defines passes `check`: a program that calls it as `candidate`, and that
    fails by raising. Otherwise as execute_code, the limits for each of the two. The check has a process and a memory of
    its own, so that `code` can neither read it nor answer in its place; what passes between them is in wire.py."""
    return _execute(code, timeout, MEMORY, name, check)


def _execute(code: str, timeout: float, memory: int | None, name: str = "", check: str = "") -> ExecutionResult:
    if not 0 < timeout <= MAX_TIMEOUT:
        raise UserError(f"timeout={timeout}: expected more than 0 and at most {MAX_TIMEOUT} seconds")
    level = require_isolation()
    # lone surrogates, which model output can hold, become a SyntaxError or a replaced character, not a crash here
    text, test = (program.encode("utf-8", errors="replace") for program in (code, check))
    job = {"code": text, "check": name, "timeout": timeout, "memory": memory, "ready": READY, **level._asdict()}
    secret = {"nonce": (nonce := secrets.token_bytes(16))}
    jobs = [job, {**secret, "test": test}] if name else [{**job, **secret}]
    outcome, stdout, stderr = _supervised(jobs, timeout + GRACE)
    error, timed_out, memory_out = _judge(outcome, nonce, timeout)
    shown, complaints = (stream.decode("utf-8", errors="replace") for stream in (stdout, stderr))
    return ExecutionResult(error is None, shown, complaints, error, timed_out, memory_out)


def _judge(outcome: dict[str, Any] | None, nonce: bytes, timeout: float) -> tuple[str | None, bool, bool]:
    """(error, timeout, memory_exceeded) from what the supervisor saw and its processes reported: the program and, if
    there is one, its check, whose word alone counts as success."""
    if outcome is None:  # by the program, where no layer forbids it, or by the system when memory ran out
        return "its supervisor was killed", False, False
    for message, status, _ in outcome["ends"]:
        if not message.startswith(READY) and status is not None and os.WIFEXITED(status):
            raise RuntimeError(f"the sandbox could not be set up: {message.decode(errors='replace')}")
    if outcome["stopped"]:
        return f"stopped after {timeout:g} seconds", True, False
    *program, last = outcome["ends"]
    if last[0] == READY + nonce + b"ok" and last[1] == 0:
        return None, False, False
    # where the program ended before its check, that is why the check failed
    early = [end for end in program if end[1] is not None and end[0] != READY + b"ok"]
    message, status, cpu_seconds = (early or [last])[0]
    return _failure(message, status, cpu_seconds, timeout)


def _failure(message: bytes, status: int, cpu_seconds: float, timeout: float) -> tuple[str, bool, bool]:
    """(error, timeout, memory_exceeded) of a process that did not succeed."""
    message = message.removeprefix(READY)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if killed in (signal.SIGKILL, signal.SIGXCPU) and cpu_seconds >= timeout:
        return f"stopped after {timeout:g} seconds", True, False
    if message == b"memory" or killed == signal.SIGKILL:  # nobody else kills it: the kernel, out of memory
        return "MemoryError: the memory limit was reached", False, True
    if killed:
        return f"ended by signal {killed}", False, False
    if message.startswith(b"error"):
        return " ".join(message.removeprefix(b"error").decode(errors="replace").split()), False, False
    return f"left with exit code {os.WEXITSTATUS(status)} before its end", False, False


def _supervised(jobs: list[dict[str, Any]], patience: float) -> tuple[Any, bytes, bytes]:
    """(outcome, stdout, stderr) of a job for sandbox.child.main; a second job is what only the check may know. No
    outcome where the supervisor was killed, RuntimeError when it fails itself."""
    scratch = tempfile.mkdtemp(prefix="nanochat-sandbox-", dir=os.path.realpath(tempfile.gettempdir()))
    try:
        inlet, outlet = os.pipe()
        with open(inlet, "rb", buffering=0) as report:
            try:
                jobs[0] |= {"scratch": scratch, "parent": os.getpid(), "report": outlet}
                process = _start(outlet)
            finally:
                os.close(outlet)
            with process:
                assert process.stdin is not None
                try:
                    with contextlib.suppress(BrokenPipeError), process.stdin:  # it died at once; _collect finds out
                        for part in map(marshal.dumps, jobs):
                            process.stdin.write(len(part).to_bytes(8, "little") + part)
                    outcome, stdout, stderr = _collect(process, report, patience)
                finally:
                    _end(process)
        if not outcome and process.returncode == -signal.SIGKILL:
            return None, stdout, stderr
        if not outcome:
            last = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise RuntimeError(f"the sandbox's supervisor ended with code {process.returncode}: {last[0]}")
        return marshal.loads(outcome), stdout, stderr
    finally:
        _remove(scratch)


def _remove(folder: str) -> None:
    """Delete it, also when the program locked folders below it. What a program made in its time can take ten times as
    long to remove (folders nested for 3 s: 18 to 42 s), so after REMOVAL seconds that goes on by itself."""
    with contextlib.suppress(OSError):  # something is in it
        for name in os.listdir(folder):
            os.rmdir(f"{folder}/{name}")
        os.rmdir(folder)
        return
    command = 'rm -rf -- "$0" || { chmod -R u+rwx -- "$0"; rm -rf -- "$0"; }'
    removal = subprocess.Popen(
        ["sh", "-c", command, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        removal.wait(REMOVAL)
    except subprocess.TimeoutExpired:
        threading.Thread(target=removal.wait, daemon=True).start()  # it is to be waited for, lest it stay as a zombie


def _start(report: int) -> subprocess.Popen[bytes]:
    # A fresh interpreter rather than a fork: this process may hold torch's threads and a CUDA context. Without `site`
    # it sees no installed packages and starts faster; child.py is imported by itself, as the package would cost 40 ms.
    folder = str(Path(__file__).resolve().parent)
    source = f"import sys; sys.path.append({folder!r}); import child; sys.path.pop(); child.main()"
    environment = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "LANG": "C.UTF-8"}  # the same program, the same end
    if libraries := os.environ.get("LD_LIBRARY_PATH"):
        environment["LD_LIBRARY_PATH"] = libraries  # some builds of Python do not start without
    return subprocess.Popen(
        [sys.executable, "-S", "-s", "-P", "-X", "utf8", "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        pass_fds=(report,),
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """It has ended mostly; otherwise (Ctrl-C here, or no report) it is told to, so that it clears its program away."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()


def _collect(process: subprocess.Popen[bytes], report: Any, patience: float) -> tuple[bytes, bytes, bytes]:
    """What comes out of (report, stdout, stderr) until the supervisor closes its report; read on but not kept beyond
    the limit, so that a program that prints without end neither fills memory nor blocks."""
    streams: tuple[Any, ...] = (report, process.stdout, process.stderr)
    kept: dict[Any, bytearray] = {stream: bytearray() for stream in streams}
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                room = OUTPUT_LIMIT - len(kept[key.fileobj])
                kept[key.fileobj] += chunk[:room]
            if time.monotonic() > deadline:
                break
    return bytes(kept[report]), bytes(kept[process.stdout]), bytes(kept[process.stderr])
