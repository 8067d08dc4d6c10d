"""The processes behind nanochat/sandbox: a supervisor that we trust, and below it the program that we do not.

The supervisor is a fresh interpreter. It forks the program and, where a function is checked, the check: a process of
its own that is locked in as well. The supervisor reads the check only when the program has been forked, so that
nothing of it was ever in the program's memory. It kills both when the time is up, when it is told to (SIGTERM) or when
its parent dies, makes sure that no descendant is left, and only then reports and ends. Each process locks itself in
before it looks at a line of the code, and fails closed: a layer that cannot be set up ends it.
"""

import _signal  # type: ignore[import-not-found]  # `import signal` builds enums for 4 ms; this is the part without them
import marshal
import os
import resource
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nanochat.sandbox import kernel, wire
else:
    import kernel  # beside this file; nanochat itself is not to be seen here
    import wire

SCRATCH_BYTES = 64 << 20
MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64
MAX_PROCESSES = 64  # and threads
MEMORY_RESERVE = 16 << 20  # on top of the limit, to report a MemoryError with
MAX_ERROR = 4000
WATCHED = (_signal.SIGCHLD, _signal.SIGTERM)


def main() -> None:
    """Read the job (see nanochat/sandbox) from stdin and write its outcome to the descriptor that it names."""
    job = marshal.loads(wire.receive(0))
    job["threads"] = kernel.leave_root()
    outcome = kernel.probe(job["scratch"]) if "probe" in job else supervise(job)
    os.write(job["report"], marshal.dumps(outcome))


def supervise(job: dict) -> dict:
    """Run job["code"]; returns what program and check reported and how they ended, once all processes are gone."""
    os.umask(0o077)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, WATCHED)  # they wait until _wait asks for them
    if job["namespaces"]:
        kernel.enter_namespaces()
    # after the namespaces: a change of credentials takes the parent's death signal back
    kernel.prctl(kernel.PR_SET_PDEATHSIG, _signal.SIGTERM)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # the program may look into no other process, whatever layers there are
    if os.getppid() != job["parent"]:
        raise SystemExit("the parent has died")
    deadline = time.monotonic() + job["timeout"]
    calls, answers = os.pipe(), os.pipe()
    started = [_begin(_program, job, calls[0], answers[1])]
    if job["check"]:
        job |= marshal.loads(wire.receive(0))  # read only now: the program has a copy of all that we knew before
        started.append(_begin(_check, job, answers[0], calls[1]))
    for descriptor in (*calls, *answers):
        os.close(descriptor)
    last = started[-1][0]
    ended = _wait(last, deadline)
    stopped = last not in ended
    ended |= _end({pid for pid, _ in started} - set(ended))
    if os.getppid() != job["parent"]:  # it died: nobody to report to, and nobody else to clear up
        os.execvp("rm", ["rm", "-rf", "--", job["scratch"]])
    ends = [(_message(report), *ended.get(pid, (None, 0.0))) for pid, report in started]
    return {"stopped": stopped, "ends": ends}


def _begin(work: "Callable[..., bytes]", job: dict, *descriptors: int) -> tuple[int, int]:
    """(process id, descriptor of its report) of a new process that is not trusted: it reports job["ready"] once it is
    locked in, and then what work() returns."""
    inlet, outlet = os.pipe()
    pid = os.fork()
    if pid == 0:
        write, leave = os.write, os._exit  # as they are now: the program may put others in their place
        try:
            _lock_in(job, work.__name__.strip("_"), {outlet, *descriptors})
        except BaseException as error:
            write(outlet, f"{type(error).__name__}: {error}".encode()[:MAX_ERROR])
            leave(1)
        write(outlet, job["ready"])
        write(outlet, work(job, *descriptors))
        leave(0)
    os.close(outlet)
    return pid, inlet


def _message(report: int) -> bytes:
    os.set_blocking(report, False)
    try:
        return os.read(report, MAX_ERROR + 100)
    except BlockingIOError:
        return b""


def _wait(last: int, deadline: float) -> dict[int, tuple[int, float]]:
    """{process: (wait status, CPU seconds)} of what ended by itself, once `last` did, or the time was up."""
    ended: dict[int, tuple[int, float]] = {}
    told = False
    while last not in ended and not told and (left := deadline - time.monotonic()) > 0:
        received = _signal.sigtimedwait(WATCHED, left)
        told = received is not None and received.si_signo == _signal.SIGTERM
        try:
            while found := os.wait4(-1, os.WNOHANG):
                pid, status, usage = found
                if pid == 0:
                    break
                ended[pid] = status, usage.ru_utime + usage.ru_stime
        except ChildProcessError:
            break
    return ended


def _end(left: set[int]) -> dict[int, tuple[int, float]]:
    """Kill these and what else is below us; as _wait, of those that had ended before it (the first process of a
    namespace can be waited for only when no other is left). As subreaper we are the parent of every orphan, so none can
    hide from this, whatever session it moved to; within a process namespace the kernel has done it already."""
    ended: dict[int, tuple[int, float]] = {}
    for pid in left:
        os.kill(pid, _signal.SIGKILL)
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0 if left else os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid in left and status != _signal.SIGKILL:
            ended[pid] = status, usage.ru_utime + usage.ru_stime
        left.discard(pid)
        if pid == 0:
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


def _lock_in(job: dict, name: str, kept: set[int]) -> None:
    os.setsid()
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    first = 3
    for descriptor in [*sorted(kept), max(1024, job["report"] + 1)]:
        os.closerange(first, descriptor)
        first = descriptor + 1
    scratch = f"{job['scratch']}/{name}"
    os.mkdir(scratch)
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
        kernel.apply_seccomp(job["threads"])
    os.system = os.kill = os.killpg = None  # type: ignore[assignment]  # else they may fail without a word


def _set_limits(job: dict) -> None:
    # processes and threads are counted over all those of the (real) user in this namespace
    limits = {"CPU": int(job["timeout"]) + 2, "FSIZE": MAX_FILE_BYTES, "NOFILE": MAX_OPEN_FILES}
    limits |= {"CORE": 0, "MEMLOCK": 0, "NPROC": MAX_PROCESSES}
    if not job["namespaces"] and os.getuid() == os.geteuid():  # a user who has others
        limits["NPROC"] = kernel.tasks_of(os.getuid()) + MAX_PROCESSES if job["seccomp"] else 1
    for name, value in limits.items():
        _lower(getattr(resource, f"RLIMIT_{name}"), value, value)
    if job["memory"] is not None:
        _lower(resource.RLIMIT_AS, job["memory"], job["memory"] + MEMORY_RESERVE)


def _lower(which: int, soft: int, hard: int) -> None:
    present = resource.getrlimit(which)[1]
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(which, (soft, hard))


def _program(job: dict, calls: int, answers: int) -> bytes:
    """Run the code as `__main__`; where it is checked, its function then answers calls until the check has ended."""
    names = sys.modules["__main__"] = type(sys)("__main__")
    sys.argv = ["program"]

    def run() -> None:
        exec(compile(job["code"], "<program>", "exec"), names.__dict__)
        if job["check"]:
            sys.stdout.flush()
            wire.Peer(calls, answers, vars(names)[job["check"]]).serve()

    return _outcome(run, job)


def _check(job: dict, answers: int, calls: int) -> bytes:
    """Run the check as a program of its own, in which `candidate` is the other program's function."""
    function = wire.Peer(answers, calls).function(0)
    function.__name__ = function.__qualname__ = job["check"]
    return _outcome(lambda: exec(compile(job["test"], "<check>", "exec"), {"candidate": function}), job)


def _outcome(run: "Callable[[], None]", job: dict) -> bytes:
    """How it ended: `ok` after the nonce, `memory`, or `error` and a line of text."""
    passed = job.pop("nonce", b"") + b"ok"
    try:
        try:
            run()
            sys.stdout.flush()
            return passed
        except MemoryError:
            if job["memory"] is not None:
                _lower(resource.RLIMIT_AS, sys.maxsize, sys.maxsize)  # up to the hard limit, the reserve
            return b"memory"
    except BaseException as error:
        return b"error" + _describe(error)


def _describe(error: BaseException) -> bytes:
    try:
        trace = error.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<"):
            trace = trace.tb_next  # without our own frames
        if not isinstance(error, SystemExit):
            error = error.with_traceback(trace)
            sys.__excepthook__(type(error), error, error.__traceback__)
        sys.stdout.flush()
        return f"{type(error).__name__}: {error}".encode(errors="replace")[:MAX_ERROR]
    except BaseException:  # an exception whose own text raises
        return type(error).__name__.encode(errors="replace")[:MAX_ERROR]
