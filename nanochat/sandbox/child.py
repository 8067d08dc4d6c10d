"""The two processes behind nanochat/sandbox: a supervisor that we trust, and below it the program that we do not.

The supervisor is a fresh interpreter. It forks the program, kills it when the time is up, when it is told to (SIGTERM)
or when its parent dies, makes sure that no descendant is left, and only then reports and ends. The program's process
locks itself in before it looks at a line of the code, and fails closed: a layer that cannot be set up ends it.
"""

import _signal  # type: ignore[import-not-found]  # `import signal` builds enums for 4 ms; this is the part without them
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nanochat.sandbox import kernel
else:
    import kernel  # beside this file; nanochat itself is not to be seen here

SCRATCH_BYTES = 64 << 20
MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64
MAX_PROCESSES = 64
MEMORY_RESERVE = 16 << 20  # on top of the limit, to report a MemoryError with
MAX_ERROR = 4000


class Stop(BaseException):
    """Raised by the signals that end a program's time."""


def main() -> None:
    """Read the job (see nanochat/sandbox) from stdin and write its outcome to the descriptor that it names."""
    job = marshal.loads(sys.stdin.buffer.read())
    outcome = kernel.probe(job["scratch"]) if "probe" in job else supervise(job)
    os.write(job["report"], marshal.dumps(outcome))


def supervise(job: dict) -> dict:
    """Run job["code"]; returns what the program reported and how it ended, once all of its processes are gone."""
    os.umask(0o077)
    _listen_for_signals()
    if job["namespaces"]:
        kernel.enter_namespaces()
    # after the namespaces: a change of credentials takes the parent's death signal back
    kernel.prctl(kernel.PR_SET_PDEATHSIG, _signal.SIGTERM)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != job["parent"]:
        raise SystemExit("the parent has died")
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        _program(job, outlet)
    os.close(outlet)
    status, cpu_seconds, stopped = _wait(pid, job["timeout"])
    _reap_all()
    if os.getppid() != job["parent"]:  # it died: nobody to report to, and nobody else to clear up
        os.execvp("rm", ["rm", "-rf", "--", job["scratch"]])
    os.set_blocking(inlet, False)
    try:
        message = os.read(inlet, MAX_ERROR + 100)
    except BlockingIOError:
        message = b""
    return {"message": message, "status": status, "cpu_seconds": cpu_seconds, "stopped": stopped}


def _listen_for_signals() -> None:
    def stop(_number: int, _frame: object) -> None:
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        raise Stop

    _signal.signal(_signal.SIGALRM, stop)
    _signal.signal(_signal.SIGTERM, stop)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGALRM, _signal.SIGTERM))


def _wait(pid: int, timeout: float) -> tuple[int, float, bool]:
    """(wait status, CPU seconds, whether it had to be stopped) of the program."""
    stopped = False
    try:
        _signal.setitimer(_signal.ITIMER_REAL, timeout)
        _, status, usage = os.wait4(pid, 0)
        _signal.setitimer(_signal.ITIMER_REAL, 0)
    except Stop:
        stopped = True
        try:
            os.kill(pid, _signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        except (ProcessLookupError, ChildProcessError):  # it ended by itself just when the time was up
            return _signal.SIGKILL, 0.0, True
    _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)  # the rest is clean-up and must not be cut short
    return status, usage.ru_utime + usage.ru_stime, stopped


def _reap_all() -> None:
    """Kill what is left. As subreaper we are the parent of every orphan, so none can hide from this, whatever session
    it moved to; within a process namespace the kernel has done it already."""
    while True:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended == 0:
            for pid in _descendants():
                try:  # noqa: SIM105 (contextlib takes 3 ms to import)
                    os.kill(pid, _signal.SIGKILL)
                except ProcessLookupError:
                    pass


def _descendants() -> list[int]:
    """Processes below this one, by /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended meanwhile
            children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def _program(job: dict, outlet: int) -> None:
    """The untrusted process; never returns."""
    try:
        _lock_in(job, outlet)
    except BaseException as error:
        os.write(outlet, f"{type(error).__name__}: {error}".encode()[:MAX_ERROR])
        os._exit(1)
    os.write(outlet, job["ready"])
    os.write(outlet, _run(job["code"], job["memory"]))
    os._exit(0)


def _lock_in(job: dict, outlet: int) -> None:
    os.setsid()
    for number in (_signal.SIGALRM, _signal.SIGTERM):
        _signal.signal(number, _signal.SIG_DFL)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, outlet)
    os.closerange(outlet + 1, max(1024, job["report"] + 1))
    scratch = job["scratch"]
    if job["scratch_limit"]:
        kernel.mount_scratch(scratch, SCRATCH_BYTES)
    os.chdir(scratch)
    os.environ.clear()
    os.environ.update({"HOME": scratch, "TMPDIR": scratch, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    _set_limits(job)
    kernel.drop_privileges()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, _signal.SIGKILL)
    if job["landlock"]:
        kernel.apply_landlock(scratch)
    if job["seccomp"]:
        kernel.apply_seccomp()


def _set_limits(job: dict) -> None:
    seconds = int(job["timeout"]) + 2
    limits = {"CPU": seconds, "FSIZE": MAX_FILE_BYTES, "NOFILE": MAX_OPEN_FILES, "CORE": 0, "MEMLOCK": 0}
    if job["namespaces"]:
        limits["NPROC"] = MAX_PROCESSES
    elif not job["seccomp"]:
        # counted over all processes (and threads) of the user, however many they are: none may be added
        limits["NPROC"] = 1
    for name, value in limits.items():
        _lower(getattr(resource, f"RLIMIT_{name}"), value, value)
    if job["memory"] is not None:
        _lower(resource.RLIMIT_AS, job["memory"], job["memory"] + MEMORY_RESERVE)


def _lower(which: int, soft: int, hard: int) -> None:
    present = resource.getrlimit(which)[1]
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(which, (soft, hard))


def _run(code: str, memory: int | None) -> bytes:
    """Run the program as `__main__`: what it says of its end is `ok`, `memory`, or `error` and a line of text."""
    main_module = type(sys)("__main__")
    sys.modules["__main__"] = main_module
    sys.argv = ["program"]
    try:
        try:
            exec(compile(code, "<program>", "exec"), main_module.__dict__)
            sys.stdout.flush()
            return b"ok"
        except MemoryError:
            if memory is not None:
                _lower(resource.RLIMIT_AS, sys.maxsize, sys.maxsize)  # up to the hard limit, the reserve
            return b"memory"
    except BaseException as error:
        return b"error" + _describe(error)


def _describe(error: BaseException) -> bytes:
    try:
        if error.__traceback__ is not None and not isinstance(error, SystemExit):
            error = error.with_traceback(error.__traceback__.tb_next)  # without our own frame
            sys.__excepthook__(type(error), error, error.__traceback__)
        sys.stdout.flush()
        return f"{type(error).__name__}: {error}".encode(errors="replace")[:MAX_ERROR]
    except BaseException:  # an exception whose own text raises
        return type(error).__name__.encode(errors="replace")[:MAX_ERROR]
