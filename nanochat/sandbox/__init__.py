"""Runs Python that a model wrote, where it can do no harm. Linux; no root and no other software needed.

Every program gets a process of its own below a fresh interpreter (child.py), with limits and, as far as the kernel
grants them, namespaces, a scratch folder of limited size, Landlock and seccomp; isolation_level() says which are in
force. docs/guide.md says what each refuses, and what the sandbox does NOT protect from.
"""

import contextlib
import functools
import marshal
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.errors import UserError

OUTPUT_LIMIT = 256 << 10  # bytes kept of stdout, and of stderr
ALLOW_UNSAFE = "NANOCHAT_ALLOW_UNSAFE_CODE"
MAX_TIMEOUT = 3600
READY = b"ready\n"  # what a program's process says once it is locked in
GRACE = 30.0  # seconds that the supervisor gets on top of the program's time before it is killed itself
LOST = {"lost": True, "message": READY, "status": 0}  # outcome where the supervisor was killed


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended."""

    success: bool  # it ran to its last line; sys.exit() is not that: a grader must not take leaving early for passing
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


@functools.cache
def isolation_level() -> Isolation:
    """The layers in force here. Each is tried once, in a process that is thrown away. Raises UserError off Linux."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"model-written code runs only on Linux, this is {sys.platform}: evaluate on a Linux machine")
    return Isolation(**_supervised({"probe": True}, GRACE)[0])


def require_isolation() -> Isolation:
    """The layers in force, for those who run code; to be asked before long work that ends with running some.

    Raises UserError off Linux, and where no layer keeps a program from harm unless NANOCHAT_ALLOW_UNSAFE_CODE=1 is set.
    """
    level = isolation_level()
    if not (level.namespaces or level.landlock or level.seccomp) and os.environ.get(ALLOW_UNSAFE) != "1":
        raise UserError(
            "this kernel grants no namespaces, Landlock or seccomp, so model-written code could reach your files and "
            f"network: use another machine, or set {ALLOW_UNSAFE}=1 to run it all the same"
        )
    return level


def execute_code(
    code: str, timeout: float = 5.0, maximum_memory_bytes: int | None = 256 * 1024 * 1024
) -> ExecutionResult:
    """Run `code` as a main program of its own; from any thread, several at once.

    `timeout` is wall-clock seconds. `maximum_memory_bytes` is address space, of which the interpreter takes 20 MB.
    The standard library is there, other packages are not. Raises UserError like require_isolation, RuntimeError
    where a layer that was there is refused now.
    """
    if not 0 < timeout <= MAX_TIMEOUT:
        raise UserError(f"timeout={timeout}: expected more than 0 and at most {MAX_TIMEOUT} seconds")
    level = require_isolation()
    # lone surrogates, which model output can hold, become a SyntaxError or a replaced character, not a crash here
    text = code.encode("utf-8", errors="replace")
    job = {"code": text, "timeout": timeout, "memory": maximum_memory_bytes, "ready": READY, **level._asdict()}
    outcome, stdout, stderr = _supervised(job, timeout + GRACE)
    error, timed_out, memory = _judge(outcome, timeout)
    shown, complaints = (stream.decode("utf-8", errors="replace") for stream in (stdout, stderr))
    return ExecutionResult(error is None, shown, complaints, error, timed_out, memory)


def _judge(outcome: dict[str, Any], timeout: float) -> tuple[str | None, bool, bool]:
    """(error, timeout, memory_exceeded) from what the supervisor saw and the program reported."""
    message, status = outcome["message"], outcome["status"]
    if not message.startswith(READY) and os.WIFEXITED(status):
        raise RuntimeError(f"the sandbox could not be set up: {message.decode(errors='replace')}")
    if outcome.get("lost"):  # by the program, where no layer forbids it, or by the system when memory ran out
        return "its supervisor was killed", False, False
    message = message.removeprefix(READY)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    out_of_cpu = killed in (signal.SIGKILL, signal.SIGXCPU) and outcome["cpu_seconds"] >= timeout
    if outcome["stopped"] or out_of_cpu:
        return f"stopped after {timeout:g} seconds", True, False
    if message == b"memory" or killed == signal.SIGKILL:  # nobody else kills it: the kernel, out of memory
        return "MemoryError: the memory limit was reached", False, True
    if killed:
        return f"ended by signal {killed}", False, False
    if message == b"ok":
        return None, False, False
    if message.startswith(b"error"):
        return " ".join(message.removeprefix(b"error").decode(errors="replace").split()), False, False
    return f"left with exit code {os.WEXITSTATUS(status)} before its end", False, False


def _supervised(job: dict[str, Any], patience: float) -> tuple[Any, bytes, bytes]:
    """(outcome, stdout, stderr) of a job for sandbox.child.main. RuntimeError when the supervisor itself fails."""
    scratch = tempfile.mkdtemp(prefix="nanochat-sandbox-", dir=os.path.realpath(tempfile.gettempdir()))
    try:
        inlet, outlet = os.pipe()
        with open(inlet, "rb", buffering=0) as report:
            try:
                job = {**job, "scratch": scratch, "parent": os.getpid(), "report": outlet}
                process = _start(outlet)
            finally:
                os.close(outlet)
            with process:
                assert process.stdin is not None
                try:
                    with contextlib.suppress(BrokenPipeError), process.stdin:  # it died at once; _collect finds out
                        process.stdin.write(marshal.dumps(job))
                    outcome, stdout, stderr = _collect(process, report, patience)
                finally:
                    _end(process)
        if not outcome and process.returncode == -signal.SIGKILL:
            return LOST, stdout, stderr
        if not outcome:
            last = stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise RuntimeError(f"the sandbox's supervisor ended with code {process.returncode}: {last[0]}")
        return marshal.loads(outcome), stdout, stderr
    finally:
        _remove(scratch)


def _remove(folder: str) -> None:
    """Delete it, also when the program locked folders below it, or nested them deeper than Python's stack."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


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
