"""nanochat/sandbox: programs that try to do harm, under all layers together and under each one alone."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import sandbox
from nanochat.errors import UserError
from nanochat.execution import execute_code
from nanochat.sandbox import Isolation, isolation_level, kernel

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="model-written code runs only on Linux")
# root of a container that has no other users may start no threads at all
LEAVES_ROOT = os.getuid() != 0 or int(Path("/proc/self/uid_map").read_text().split()[2]) > kernel.FIRST_USER
ALONE = {
    "namespaces": Isolation(namespaces=True),
    "landlock": Isolation(landlock=1),
    "seccomp": Isolation(seccomp=True),
    "limits": Isolation(),
}


def run(code: str, **options) -> sandbox.ExecutionResult:
    return execute_code(textwrap.dedent(code), **options)


@pytest.fixture
def only(monkeypatch):
    """only("seccomp"): leave every other layer out from here on; only("all", "landlock", "seccomp"): leave none out,
    but one of these must be there. Skips where this kernel lacks it."""
    granted = isolation_level()

    def select(layer: str, *any_of: str) -> None:
        if layer == "all":
            if any_of and not any(getattr(granted, name) for name in any_of):
                pytest.skip(f"this kernel grants no {' or '.join(any_of)}")
            return
        if layer != "limits" and not getattr(granted, layer):
            pytest.skip(f"this kernel grants no {layer}")
        level = ALONE[layer]
        monkeypatch.setattr(sandbox, "isolation_level", lambda: level)
        monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "1")

    return select


def processes_named(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
        except OSError:
            pass  # it ended while we looked
    return found


def eventually(condition) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


# What every caller relies on


def test_output_of_a_program_that_runs_to_its_end():
    result = run("""
        import sys
        print("to stdout: é")
        print("to stderr", file=sys.stderr)
        assert __name__ == "__main__"
    """)
    assert result == sandbox.ExecutionResult(True, "to stdout: é\n", "to stderr\n", None, False, False)


def test_an_exception_is_one_line_of_error_and_a_traceback_of_the_program():
    result = run("def f(x):\n    return 1 / x\nprint('before')\nf(0)")
    assert (result.success, result.error, result.stdout) == (False, "ZeroDivisionError: division by zero", "before\n")
    assert 'File "<program>", line 2, in f' in result.stderr and "sandbox/child" not in result.stderr
    assert run("def f(:").error.startswith("SyntaxError: ")
    assert run("assert False, 'a\\nb'").error == "AssertionError: a b"
    bad = "class E(Exception):\n    def __str__(self): raise E\nraise E"
    assert run(bad).error == "E"
    assert run("x = '\ud800'").error is None or "Syntax" in run("x = '\ud800'").error  # no crash on our side


def test_leaving_before_the_last_line_is_no_success():
    assert run("import sys; sys.exit(0)").error == "SystemExit: 0"
    assert run("import sys; sys.exit('bad')").error == "SystemExit: bad"
    result = run("import os; os._exit(0)")
    assert (result.success, result.error) == (False, "left with exit code 0 before its end")
    assert run("import os; os._exit(3)").error == "left with exit code 3 before its end"
    assert "signal 11" in run("import ctypes; ctypes.string_at(0)").error


def test_an_endless_loop_ends_with_its_time():
    start = time.monotonic()
    result = run("print('begun', flush=True)\nwhile True: pass", timeout=0.5)
    assert (result.success, result.timeout, result.stdout) == (False, True, "begun\n")
    assert "0.5 seconds" in result.error and time.monotonic() - start < 4
    assert run("import time; time.sleep(60)", timeout=0.3).timeout
    with pytest.raises(UserError, match="timeout=0"):
        run("pass", timeout=0)


@pytest.mark.parametrize("code", ["x = bytearray(10**9)", "x = []\nwhile True: x.append(bytes(10**6))"])
def test_a_memory_bomb(code):
    result = run(code, maximum_memory_bytes=128 << 20)
    assert (result.success, result.memory_exceeded, result.timeout) == (False, True, False)
    assert result.error.startswith("MemoryError")


def test_memory_below_the_limit_and_without_one():
    assert run("x = bytearray(100 << 20)").success
    assert run("x = bytearray(400 << 20)", maximum_memory_bytes=None).success
    assert run("try: x = bytearray(10**9)\nexcept MemoryError: print('caught')").stdout == "caught\n"


def test_endless_output_is_cut_and_does_not_block():
    result = run("while True: print('x' * 1000)", timeout=0.7)
    assert result.timeout and len(result.stdout) == sandbox.OUTPUT_LIMIT
    finite = run("import sys\nfor _ in range(2000): print('y' * 1000)\nprint('z' * 10**6, file=sys.stderr)")
    assert finite.success and len(finite.stdout) == len(finite.stderr) == sandbox.OUTPUT_LIMIT
    assert run("import sys; sys.stdout.buffer.write(b'\\xff')").stdout == "�"


def test_no_input_and_a_large_program():
    assert run("try: input()\nexcept EOFError: print('none')").stdout == "none\n"
    assert run(f"x = {'y' * 300_000!r}\nprint(len(x))").stdout == "300000\n"


def test_the_standard_library_works():
    result = run("""
        import asyncio, collections, datetime, heapq, itertools, json, math, random, re, string
        async def nap():
            await asyncio.sleep(0.001)
        asyncio.run(nap())
    """)
    assert result.error is None


def test_threads_work(only):
    only("all", "namespaces", "seccomp")  # otherwise the limit against fork bombs counts threads, too
    if not LEAVES_ROOT and not isolation_level().namespaces:
        pytest.skip("root of a container that has no other users")
    code = "import threading\nt = threading.Thread(target=print, args=('in a thread',))\nt.start()\nt.join()"
    assert run(code).stdout == "in a thread\n"


def test_programs_do_not_see_each_other_nor_how_strings_hash():
    assert run("x = 1; open('left', 'w').close()").success
    assert run("print('x' in globals())\nimport os; print(os.listdir())").stdout == "False\n[]\n"
    assert run("print(hash('a'))").stdout == run("print(hash('a'))").stdout


def test_several_at_once_from_threads():
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: run(f"print({n} ** 2)"), range(12)))
    assert [result.stdout for result in results] == [f"{n * n}\n" for n in range(12)]
    assert threading.active_count() <= before  # none of its own stay behind


# What it keeps programs from, all layers together


@pytest.mark.parametrize("layer", ["all", "limits"])
def test_the_scratch_folder_is_removed_whatever_is_in_it(only, layer):
    only(layer)
    code = """
        import os
        print(os.getcwd(), flush=True)
        os.makedirs('a/b/c')
        open('a/b/file', 'w').write('x')
        os.symlink('/', 'a/link')
        for _ in range(900):  # a path of more than 4,096 bytes
            os.mkdir('deep')
            os.chdir('deep')
        os.mkdir('locked', 0)
    """

    def is_removed(folder: str) -> bool:
        # on a disk it goes on behind the caller's back, if it takes long
        at_once = layer == "all" and isolation_level().scratch_limit
        return not os.path.lexists(folder) if at_once else eventually(lambda: not os.path.lexists(folder))

    result = run(code)
    assert result.error is None and os.path.isabs(result.stdout.strip())
    assert is_removed(result.stdout.strip())
    start = time.monotonic()
    result = run(code.replace("900", "90") + "\n        while True: pass", timeout=0.5)
    assert result.timeout and time.monotonic() - start < 0.5 + sandbox.REMOVAL + 5
    assert is_removed(result.stdout.strip())


def test_a_program_cannot_fill_the_disk():
    assert "File too large" in run("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))").error
    if not isolation_level().scratch_limit:
        pytest.skip("this kernel grants no file system of its own for the scratch folder")
    assert "No space left" in run("for i in range(1000): open(str(i), 'wb').write(bytes(1 << 20))").error


def test_the_environment_is_not_the_callers(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    seen = run("import os\nprint(dict(os.environ))").stdout
    assert "hunter2" not in seen and "HOME" in seen and str(Path.home()) not in seen


@pytest.mark.parametrize("layer", ["all", "landlock", "namespaces"])
def test_another_process_s_environment_and_memory_are_closed(only, layer):
    only(layer, "landlock", "namespaces")
    secret = "hunter" + "2" * 20
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={"SECRET": secret}, **pipes) as other:
        other.stdout.readline()
        result = run(f"""
            for pid in ({other.pid}, {os.getpid()}):
                for name in ("environ", "mem", "maps"):
                    try:
                        open(f"/proc/{{pid}}/{{name}}", "rb").read(100)
                        print("read", name)
                    except OSError as error:
                        print(type(error).__name__)
        """)
        other.stdin.close()
    assert result.stdout == "PermissionError\n" * 6, result


@pytest.mark.parametrize("layer", ["all", "landlock"])
def test_reading_outside_is_refused(only, layer, tmp_path):
    only(layer, "landlock")
    (tmp_path / "private").write_text("hunter2")
    paths = [str(tmp_path / "private"), "/etc/passwd", __file__, sandbox.__file__, str(Path.home())]
    code = """
        import os
        for path in {}:
            try:
                os.listdir(path) if os.path.isdir(path) else open(path).read()
                print("read", path)
            except PermissionError:
                pass
        os.symlink("/etc/passwd", "link")
        try:
            print(open("link").read())
        except PermissionError:
            print("done")
    """
    assert run(code.format(paths)).stdout == "done\n"


CHANGES = """
    import os
    inside, outside = os.getcwd(), {outside!r}
    kept = outside + "/kept"
    open("mine", "w").write("mine")
    tricks = dict(
        write=lambda: open(outside + "/new", "w"), append=lambda: open(kept, "a"),
        folder=lambda: os.mkdir(outside + "/new"), delete=lambda: os.remove(kept),
        move_in=lambda: os.rename(kept, inside + "/x"), move_out=lambda: os.rename("mine", outside + "/x"),
        link=lambda: os.link(kept, inside + "/y"), symlink=lambda: os.symlink("/", outside + "/z"),
        device=lambda: os.mkfifo(outside + "/fifo"), tree=lambda: os.rmdir(outside + "/empty"),
    )
    attributes = dict(
        length=lambda: os.truncate(kept, 0), mode=lambda: os.chmod(kept, 0),
        owner=lambda: os.chown(kept, os.getuid(), os.getgid()), time=lambda: os.utime(kept, (0, 0)),
        attribute=lambda: os.setxattr(kept, "user.x", b"1"),
    )
    for name, trick in {{**tricks, **(attributes if {attributes} else {{}})}}.items():
        try:
            trick()
            print("succeeded:", name)
        except OSError as error:
            pass
    print("done")
"""


@pytest.mark.parametrize("layer", ["all", "landlock"])
def test_changing_anything_outside_is_refused(only, layer, tmp_path):
    if layer == "all" and not (isolation_level().landlock and isolation_level().seccomp):
        pytest.skip("needs Landlock and seccomp; this kernel does not grant both")
    only(layer)
    outside = tmp_path / "outside"
    (outside / "empty").mkdir(parents=True)
    kept = outside / "kept"
    kept.write_text("content")
    before = kept.stat()
    # owner, mode and times of a file (and, before ABI 3, its length) Landlock does not watch over
    result = run(CHANGES.format(outside=str(outside), attributes=layer == "all"))
    assert result.stdout == "done\n", result
    assert sorted(path.name for path in outside.iterdir()) == ["empty", "kept"] and kept.read_text() == "content"
    assert (kept.stat().st_mode, kept.stat().st_mtime) == (before.st_mode, before.st_mtime)


@pytest.mark.parametrize("layer", ["all", "namespaces", "seccomp", "landlock"])
def test_the_network_is_out_of_reach(only, layer):
    kinds = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
    if layer == "landlock":
        if isolation_level().landlock < 4:
            pytest.skip(f"Landlock refuses TCP from ABI 4 on, this kernel has {isolation_level().landlock}")
        kinds.pop("UDP")  # which Landlock lets pass
    only(layer, "namespaces", "seccomp")
    for name, kind in kinds.items():
        with socket.socket(socket.AF_INET, kind) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(0.2)
            if name == "TCP":
                server.listen()
            result = run(f"""
                import socket
                with socket.socket(socket.AF_INET, socket.{kind.name}) as s:
                    s.settimeout(2)
                    s.connect(("127.0.0.1", {server.getsockname()[1]}))
                    s.send(b"hello")
            """)
            assert not result.success and not result.timeout, (name, result)
            with pytest.raises(TimeoutError):
                server.accept() if name == "TCP" else server.recv(10)


@pytest.mark.parametrize("layer", ["all", "namespaces", "seccomp"])
def test_the_parent_and_the_caller_cannot_be_killed(only, layer):
    only(layer, "namespaces", "seccomp")
    result = run(f"""
        import os, posix, signal
        for pid in (os.getppid(), {os.getpid()}, 0):
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    posix.kill(pid, number)
                except (ProcessLookupError, PermissionError):
                    pass
        print("still here")
    """)
    assert result.success and result.stdout == "still here\n", result


def test_killing_the_parent_helps_nothing_even_without_layers(only):
    only("limits")
    name = f"kp{os.getpid()}"
    code = f"ctypes.CDLL(None).prctl(15, b'{name}')\nposix.kill(os.getppid(), 9)\nwhile True: pass"
    result = run(f"import ctypes, os, posix\n{code}", timeout=20)
    assert (result.success, result.timeout) == (False, False) and "supervisor" in result.error
    assert eventually(lambda: not processes_named(name))


def test_a_caller_that_dies_takes_its_program_along(tmp_path):
    name = f"cd{os.getpid()}"
    code = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{name}')\nwhile True: pass"
    caller = f"from nanochat.sandbox import execute_code; execute_code({code!r}, timeout=60)"
    root = Path(sandbox.__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", caller], cwd=root, env={"TMPDIR": str(tmp_path)}) as process:
        assert eventually(lambda: processes_named(name)) and list(tmp_path.iterdir())
        process.kill()
    assert eventually(lambda: not processes_named(name))
    assert eventually(lambda: not list(tmp_path.iterdir()))


DAEMON = """
    import ctypes, os, signal, time
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(15, b"{name}")
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3):
                os.close(fd)
            while True:
                time.sleep(1)
        os._exit(0)
    os.wait()
    print("left a daemon", flush=True)
    {end}
"""


@pytest.mark.parametrize("layer", ["namespaces", "landlock", "limits"])
@pytest.mark.parametrize("end", ["", "while True: pass", "os._exit(0)"])
def test_a_daemon_that_ignores_signals_is_gone_afterwards(only, layer, end):
    only(layer)
    if layer != "namespaces" and os.getuid() != 0:
        pytest.skip("an ordinary user's program may not even fork without namespaces")
    name = f"dm{os.getpid()}"
    result = run(DAEMON.format(name=name, end=end), timeout=1)
    assert result.stdout == "left a daemon\n" and result.timeout == end.startswith("while"), result
    assert processes_named(name) == []


def test_seccomp_lets_no_process_begin(only):
    only("seccomp")
    result = run("""
        import ctypes, os, subprocess
        libc = ctypes.CDLL(None)
        assert libc.fork() == -1 and libc.vfork() == -1 and libc.system(b"true") != 0
        assert libc.execv(b"/bin/true", None) == -1
        for start in (os.fork, lambda: subprocess.run(["true"]), lambda: os.posix_spawn("/bin/true", ["true"], {})):
            try:
                start()
                raise SystemExit("started")
            except PermissionError:
                pass
    """)
    assert result.error is None, result


def test_what_programs_ask_of_their_own_files_is_answered(only):
    only("seccomp")
    result = run("""
        import array, asyncio, fcntl, os, socket, struct, termios
        assert not os.isatty(1) and struct.unpack("i", fcntl.ioctl(os.pipe()[0], termios.FIONREAD, bytes(4))) == (0,)
        try:
            os.get_terminal_size(1)
        except OSError as error:
            assert error.errno == 25, error  # no terminal, which shutil falls back from
        inlet, outlet = os.pipe()
        assert fcntl.fcntl(outlet, 1031, 8192) == 8192
        for change in (os.set_inheritable, os.set_blocking):
            change(inlet, True), change(inlet, False)
        with open("file", "w+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX), fcntl.flock(file, fcntl.LOCK_SH)
            os.dup(file.fileno()), fcntl.fcntl(file, fcntl.F_GETLK, bytes(32))
        one, other = socket.socketpair()
        one.settimeout(1), other.send(b"x")
        assert one.recv(1) == b"x" and asyncio.run(asyncio.sleep(0, 3)) == 3
    """)
    assert result.error is None, result


def filtered(code: bytes, machine: int, call: int, arguments: list[int]) -> int:
    """What the kernel's interpreter makes of a filter."""
    data, steps = struct.pack("=iIQ6Q", call, machine, 0, *arguments), list(struct.iter_unpack("=HBBI", code))
    at = value = 0
    while True:
        operation, yes, no, constant = steps[at]
        at += 1
        if operation == kernel.RETURN:
            return constant
        if operation == kernel.LOAD:
            value = struct.unpack_from("=I", data, constant)[0]
        elif operation == kernel.AND:
            value &= constant
        else:
            at += yes if (value == constant if operation == kernel.JUMP_EQUAL else value >= constant) else no


def by_the_tables(column: int, call: int, arguments: list[int], threads: bool) -> int:
    """The same by looking it up."""
    for calls, error in ((kernel.DENIED, kernel.EPERM), (kernel.UNSEEN, kernel.ENOSYS)):
        if call in [numbers[column] for numbers in calls.values()]:
            return kernel.ERRNO | error
    for numbers, index, mask, values, equal in kernel._conditional(threads):
        if numbers[column] == call and (arguments[index] & 0xFFFF_FFFF & mask in values) is equal:
            return kernel.ERRNO | kernel.EPERM
    return kernel.ALLOW if call < kernel.FIRST_UNKNOWN else kernel.ERRNO | kernel.ENOSYS


WORDS = [0, 1, 7, 8, 9, 1024, 1030, 0x5401, 0x8901, os.getpid(), os.O_TRUNC, 1 << 31, 0x1_0000, 2**64 - 1]
NUMBERS = st.sampled_from(WORDS) | st.integers(0, 2**64 - 1)
CALLS = {call for pair, *_ in kernel._conditional(True) for call in pair if call is not None}


@settings(max_examples=30)
@given(st.lists(NUMBERS, min_size=6, max_size=6), st.booleans(), st.sets(st.integers(0, 470), max_size=9))
def test_the_filter_is_what_its_tables_say_on_both_machines(arguments, threads, calls):
    for column, (machine, number) in enumerate(kernel.AUDIT_ARCH.items()):
        code = kernel.seccomp_filter(machine, threads)
        assert filtered(code, number ^ 1, 0, arguments) == kernel.KILL_PROCESS
        for call in CALLS | calls:
            assert filtered(code, number, call, arguments) == by_the_tables(column, call, arguments, threads), call


@pytest.mark.parametrize("layer", ["all", "namespaces", "limits"])
def test_a_fork_bomb_leaves_nothing(only, layer):
    only(layer)
    name = f"fb{os.getpid()}"
    result = run(
        f"""
        import ctypes, os, time
        ctypes.CDLL(None).prctl(15, b"{name}")
        for _ in range(6):  # 64 of them, if they are let
            os.fork()
        while True:
            time.sleep(1)
        """,
        timeout=0.7,
    )
    assert not result.success
    assert processes_named(name) == []


def test_ctypes_opens_no_door():
    if not isolation_level().seccomp:
        pytest.skip("this kernel grants no seccomp")
    result = run(f"""
        import ctypes, os, resource
        libc = ctypes.CDLL(None, use_errno=True)
        machine = os.uname().machine
        assert libc.socket(2, 1, 0) == -1 and libc.socket(1, 1, 0) == -1
        assert libc.syscall({{"x86_64": 41, "aarch64": 198}}[machine], 2, 1, 0) == -1
        assert machine != "x86_64" or libc.syscall(0x40000000 + 41, 2, 1, 0) == -1  # the same by the x32 table
        assert libc.syscall(425, 8, ctypes.create_string_buffer(200)) == -1  # io_uring
        assert libc.ptrace(16, {os.getpid()}, 0, 0) == -1
        assert libc.unshare(0x10000000) == -1
        assert libc.mount(b"tmpfs", b".", b"tmpfs", 0, None) == -1
        assert libc.prctl(1, 0, 0, 0, 0) == -1  # outliving the supervisor
        assert libc.kill({os.getpid()}, 9) == -1 and libc.kill(-1, 0) == -1
        assert libc.setuid(0) == -1 or os.getuid() == 0
        for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
            soft, hard = resource.getrlimit(which)
            try:
                resource.setrlimit(which, (soft, hard + 1))
                raise SystemExit("raised a limit")
            except (ValueError, PermissionError):
                pass
    """)
    assert result.error is None, result


# Which layers are there


def test_the_level_is_named_and_probed_once(monkeypatch):
    level = isolation_level()
    assert isolation_level() is level
    assert Isolation().describe() == "process limits"
    full = Isolation(namespaces=True, scratch_limit=True, landlock=7, seccomp=True)
    assert full.describe() == "process limits, namespaces, scratch limit, Landlock (ABI 7), seccomp"


def test_without_any_layer_it_refuses_unless_told_to(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation_level", Isolation)
    monkeypatch.delenv(sandbox.ALLOW_UNSAFE, raising=False)
    with pytest.raises(UserError, match="NANOCHAT_ALLOW_UNSAFE_CODE=1"):
        execute_code("print(1)")
    monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "1")
    assert execute_code("print(1)").stdout == "1\n"


LEVELS = {
    Isolation(): "no namespaces, Landlock or seccomp, so model-written code could reach your files and network",
    Isolation(seccomp=True): "no Landlock, so model-written code could reach your files",
    Isolation(namespaces=True, scratch_limit=True): "no Landlock, so model-written code could reach your files",
    Isolation(namespaces=True, seccomp=True): "no Landlock, so model-written code could reach your files",
    Isolation(landlock=7): "no namespaces or seccomp, so model-written code could reach your network and processes",
    Isolation(landlock=1, seccomp=True): "",
    Isolation(landlock=1, namespaces=True): "",
}


@pytest.mark.parametrize("level", LEVELS, ids=Isolation.describe)
def test_below_the_minimum_code_is_refused_in_one_line_unless_told(monkeypatch, level):
    monkeypatch.setattr(sandbox, "isolation_level", lambda: level)
    monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "0")
    assert level.danger() == LEVELS[level]
    if LEVELS[level]:
        for ask in (sandbox.require_isolation, lambda: execute_code("1"), lambda: sandbox.check_function("", "f", "")):
            with pytest.raises(
                UserError, match=f"^this kernel grants {LEVELS[level]}: use another .*--unsafe-exec"
            ) as e:
                ask()
            assert "\n" not in str(e.value)
        sandbox.allow_unsafe(False)
        with pytest.raises(UserError):
            sandbox.require_isolation()
    sandbox.allow_unsafe(True)
    assert sandbox.require_isolation() == level


def test_a_layer_that_fails_to_come_up_stops_the_program(monkeypatch, tmp_path):
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("needs a machine that seccomp has a table for")
    copy = Path(shutil.copytree(Path(sandbox.__file__).parent, tmp_path / "sandbox"))
    broken = (copy / "kernel.py").read_text().replace("def apply_seccomp(", "def _unused(")
    (copy / "kernel.py").write_text(broken + "\n\ndef apply_seccomp(threads):\n    raise OSError(1, 'not today')\n")
    monkeypatch.setattr(sandbox, "isolation_level", lambda: Isolation(seccomp=True))
    monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "1")
    monkeypatch.setattr(sandbox, "__file__", str(copy / "__init__.py"))
    with pytest.raises(RuntimeError, match=r"could not be set up.*not today"):
        execute_code("print(1)")


def test_elsewhere_than_on_linux_it_refuses(monkeypatch):
    isolation_level.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="only on Linux, this is darwin"):
        execute_code("print(1)")
    monkeypatch.undo()
    assert execute_code("print(1)").success


@pytest.mark.parametrize("call", ["os.system('true')", "os.kill(1, 9)", "os.killpg(1, 9)"])
def test_calls_that_would_fail_in_silence_are_heard(call):
    assert "not callable" in run(f"import os\n{call}").error
