"""nanochat/sandbox: a table of single lines that try to get out, all of them in one process at each level."""

import os
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import sandbox
from nanochat.sandbox import Isolation, execute_code, isolation_level
from tests.test_sandbox import LEAVES_ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="model-written code runs only on Linux")

# Each line has to end in an OSError that says that the system refuses. Names: OUT, a folder of the caller with the
# files secret, kept and planted.py and the folder empty; CALLER, its process; PORT, where it listens; c(), a function
# of libc whose -1 is raised. `mine` is a file of the program's own.
READING = """
open("/etc/passwd").read()
open("/etc/shadow").read()
open("/etc/hosts").read()
open(OUT + "/secret").read()
open(OUT + "/secret", "rb", buffering=0).read()
open("../../../../../../../../etc/passwd").read()
os.open(OUT + "/secret", os.O_RDWR)
os.open("secret", os.O_RDONLY, dir_fd=os.open(OUT, os.O_PATH))
os.open("/proc/self/fd/%d" % os.open(OUT + "/secret", os.O_PATH), os.O_RDONLY)
os.open(OUT + "/secret", os.O_RDONLY | os.O_DIRECT)
os.listdir(OUT)
os.listdir("/")
os.listdir("/home")
os.listdir("/tmp")
os.listdir("..")
os.listdir("/etc")
os.chdir(OUT) or os.listdir(".")
list(os.scandir(OUT))
list(Path(OUT).iterdir())
Path(OUT, "secret").read_bytes()
os.symlink(OUT + "/secret", "link") or open("link").read()
os.symlink("/", "root") or open("root/etc/passwd").read()
os.link(OUT + "/secret", "hard")
os.rename(OUT + "/secret", "moved")
os.listxattr(OUT + "/secret")
os.getxattr(OUT + "/secret", "user.x")
shutil.copy(OUT + "/secret", "copy")
shutil.copytree(OUT, "copied")
shutil.make_archive("archive", "tar", OUT)
tarfile.open("a.tar", "w").add(OUT + "/secret")
mmap.mmap(os.open(OUT + "/secret", os.O_RDONLY), 0)
os.sendfile(1, os.open(OUT + "/secret", os.O_RDONLY), 0, 9)
runpy.run_path(OUT + "/planted.py")
ctypes.CDLL(OUT + "/secret")
c("open", (OUT + "/secret").encode(), 0)
c("openat", -100, (OUT + "/secret").encode(), 0)
c("fopen", (OUT + "/secret").encode(), b"r")
c("inotify_add_watch", c("inotify_init1", 0), OUT.encode(), 0xFFF)
fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)
fcntl.fcntl(os.open(os.path.dirname(os.__file__), os.O_RDONLY), fcntl.F_NOTIFY, 63)
fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0xC020660B, bytes(32))
c("openat", os.open("/", os.O_PATH), b"etc/passwd", 0)
c("linkat", os.open(OUT + "/secret", os.O_PATH), b"", -100, b"got", 0x1000)
c("syscall", 458, mounts, buffer, 50, 0)
c("syscall", 457, mounts, buffer, 500, 0)
os.symlink("/proc/self/root", "r") or open("r/etc/hostname").read()
open("/proc/thread-self/root/etc/passwd").read()
open("/dev/mem", "rb")
open("/dev/kmsg", "rb")
open("/dev/tty", "rb")
open("/dev/ptmx", "rb")
open("/dev/fuse", "rb")
open("/dev/kvm", "rb")
open("/dev/nvidiactl", "rb")
open(sys.executable, "rb").read(4)
open("/sys/kernel/mm/transparent_hugepage/enabled").read()
open("/sys/class/dmi/id/product_name").read()
"""
CHANGING = """
open(OUT + "/new", "w")
open(OUT + "/kept", "w")
open(OUT + "/kept", "a")
open(OUT + "/kept", "r+")
open("/etc/passwd", "a")
open("/dev/shm/x", "w")
os.open(OUT + "/kept", os.O_RDONLY | os.O_TRUNC)
os.open(OUT, os.O_TMPFILE | os.O_WRONLY)
os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=os.open(OUT, os.O_PATH))
c("creat", (OUT + "/new").encode(), 0o600)
os.truncate(OUT + "/kept", 0)
os.mkdir(OUT + "/folder")
os.rmdir(OUT + "/empty")
os.unlink(OUT + "/kept")
os.rename(OUT + "/kept", OUT + "/other")
os.rename("mine", OUT + "/mine")
os.replace("mine", OUT + "/kept")
os.link("mine", OUT + "/mine")
os.symlink("/", OUT + "/link")
os.mkfifo(OUT + "/fifo")
os.mknod(OUT + "/node")
os.mknod("device", 0o20600, os.makedev(1, 1))
os.chmod(OUT + "/kept", 0)
os.chmod("mine", 0o4755)
os.fchmod(os.open("mine", os.O_RDONLY), 0o4755)
os.chown(OUT + "/kept", os.getuid(), os.getgid())
os.lchown(OUT + "/kept", os.getuid(), os.getgid())
os.utime(OUT + "/kept", (0, 0))
os.setxattr(OUT + "/kept", "user.x", b"1")
os.removexattr(OUT + "/kept", "user.x")
fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0x40086602, bytes(8))
fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0x401C5820, bytes(28))
fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), 0x40806685, bytes(128))
fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), 1036, bytes(8))
c("renameat2", -100, b"mine", -100, (OUT + "/kept").encode(), 2)
shutil.rmtree(OUT)
shutil.move(OUT + "/kept", "moved")
tempfile.mkstemp(dir=OUT)
tempfile.NamedTemporaryFile(dir="/tmp")
zipfile.ZipFile(OUT + "/z.zip", "w")
logging.FileHandler(OUT + "/log")
shelve.open(OUT + "/shelf")
"""
NETWORK = """
socket.socket()
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket.socket(socket.AF_INET6)
socket.socket(socket.AF_UNIX)
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
socket.socket(socket.AF_VSOCK)
socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
socket.socketpair(type=socket.SOCK_DGRAM)
socket.socketpair(type=socket.SOCK_SEQPACKET)
socket.create_connection(("127.0.0.1", PORT), 2)
socket.create_server(("127.0.0.1", 0))
urllib.request.urlopen(f"http://127.0.0.1:{PORT}", timeout=2)
http.client.HTTPConnection("127.0.0.1", PORT, timeout=2).request("GET", "/")
ftplib.FTP().connect("127.0.0.1", PORT, 2)
smtplib.SMTP("127.0.0.1", PORT, timeout=2)
multiprocessing.connection.Client(("127.0.0.1", PORT))
logging.handlers.SysLogHandler(("127.0.0.1", PORT))
asyncio.run(asyncio.open_connection("127.0.0.1", PORT))
c("socket", 2, 1, 0)
c("connect", 1, bytes(16), 16)
"""
PROCESSES = """
os.fork()
os.forkpty()
os.posix_spawn("/bin/true", ["true"], {})
os.execv("/bin/true", ["true"])
os.popen("true").read()
pty.fork()
subprocess.run(["true"])
multiprocessing.Process(target=print).start()
c("vfork")
c("fexecve", os.open("mine", os.O_RDONLY), vectors, vectors)
posix.kill(CALLER, 0)
posix.kill(CALLER, signal.SIGCONT)
posix.kill(os.getppid(), 0)
posix.kill(-1, 0)
posix.killpg(CALLER, 0)
signal.pidfd_send_signal(os.pidfd_open(CALLER), 0)
c("sigqueue", CALLER, 0, 0)
c("tgkill", CALLER, CALLER, 0)
fcntl.fcntl(1, fcntl.F_SETOWN, CALLER)
fcntl.ioctl(1, 0x8901, CALLER.to_bytes(4, "little"))
fcntl.ioctl(1, 0x8902, CALLER.to_bytes(4, "little"))
fcntl.fcntl(1, 15, bytes(8))
fcntl.fcntl(1, 10, signal.SIGKILL)
fcntl.ioctl(0, 0x5412, b"x")
os.posix_spawnp("true", ["true"], {})
subprocess.Popen(["/proc/self/exe"], start_new_session=True)
multiprocessing.Pool(1)
os.getpgid(CALLER)
os.getsid(CALLER)
os.getpriority(os.PRIO_PROCESS, CALLER)
os.setpriority(os.PRIO_PROCESS, CALLER, 5)
os.nice(1)
os.sched_getaffinity(CALLER)
os.sched_setaffinity(CALLER, [0])
os.sched_getscheduler(CALLER)
os.sched_getparam(CALLER)
os.sched_rr_get_interval(CALLER)
time.clock_gettime(~CALLER << 3 | 2)
resource.prlimit(CALLER, resource.RLIMIT_CPU)
resource.prlimit(CALLER, resource.RLIMIT_CPU, (1, 1))
c("ptrace", 16, CALLER, 0, 0)
c("process_vm_readv", CALLER, vectors, 1, vectors, 1, 0)
c("process_vm_writev", CALLER, vectors, 1, vectors, 1, 0)
c("prctl", 1, 0, 0, 0, 0)
open(f"/proc/{CALLER}/environ", "rb").read()
open(f"/proc/{CALLER}/mem", "rb+")
open(f"/proc/{CALLER}/cmdline").read()
open(f"/proc/{CALLER}/stat").read()
open(f"/proc/{CALLER}/fd/0")
open(f"/proc/{CALLER}/root/etc/passwd").read()
open(f"/proc/{CALLER}/cwd/nanochat/sandbox/child.py").read()
os.readlink(f"/proc/{CALLER}/exe")
os.readlink(f"/proc/{CALLER}/cwd")
os.listdir(f"/proc/{CALLER}/fd")
os.listdir("/proc")
open("/proc/self/mem", "rb+")
open("/proc/self/environ").read()
open("/proc/mounts").read()
open("/proc/sysrq-trigger", "w")
open("/proc/sys/kernel/hostname", "w")
"""
SYSTEM = """
os.setuid(0)
os.setgid(0)
os.seteuid(12345)
os.setresuid(0, 0, 0)
os.setgroups([0])
os.chroot(".")
os.memfd_create("x")
c("unshare", 0x10000000)
c("unshare", 0x20000)
c("setns", 0, 0)
c("mount", b"tmpfs", b".", b"tmpfs", 0, None)
c("umount2", b"/proc", 2)
c("pivot_root", b".", b".") if hasattr(libc, "pivot_root") else os.chroot(".")
c("personality", 0x40000)
c("add_key", b"user", b"x", b"x", 1, -3) if hasattr(libc, "add_key") else os.chroot(".")
c("shmget", 1, 4096, 0o1600)
c("semget", 1, 1, 0o1600)
c("msgget", 1, 0o1600)
c("shmat", 0, None, 0)
c("mq_open", b"/x", 0o102, 0o600, None)
c("klogctl", 3, buffer, 99)
c("acct", None)
c("swapoff", b"/none")
c("sethostname", b"x", 1)
c("setdomainname", b"x", 1)
c("vhangup")
c("fanotify_init", 0, 0)
c("quotactl", 0, None, 0, None)
c("adjtimex", buffer)
time.clock_settime(time.CLOCK_REALTIME, 0)
resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))
resource.setrlimit(resource.RLIMIT_NOFILE, (10**6, 10**6))
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))
resource.setrlimit(resource.RLIMIT_CORE, (10, 10))
"""
ESCAPES = [line for part in (READING, CHANGING, NETWORK, PROCESSES, SYSTEM) for line in part.strip().splitlines()]
PROGRAM = """
import asyncio, ctypes, errno, fcntl, ftplib, http.client, logging.handlers, mmap, multiprocessing.connection, os, posix
import pty, resource, runpy, shelve, shutil, signal, smtplib, socket, subprocess, sys, tarfile, tempfile, time
import urllib.request, zipfile
from pathlib import Path

OUT, CALLER, PORT, ESCAPES = {values!r}
HOME = os.getcwd()
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(500)
vectors = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
mounts = (ctypes.c_uint64 * 3)(24, 2**64 - 1, 0)  # the root's
REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EXDEV, None)  # None: an error made of another one
open("mine", "w").close()

def c(name, *arguments):
    ctypes.set_errno(0)
    result = getattr(libc, name)(*arguments)
    if result == -1 or name.startswith("fopen") and not result:
        raise OSError(ctypes.get_errno(), name)
    return result

for line in ESCAPES:
    os.chdir(HOME)
    try:
        exec(line)
        print("got out:", line)
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENXIO) and line.startswith('open("/')  # on this machine
        if not absent and error.errno not in REFUSALS:
            print("failed otherwise:", line, repr(error))
    except ValueError as error:
        if "limit" not in str(error):  # of setrlimit
            print("wrong:", line, repr(error))
    except Exception as error:
        if "PermissionError" not in repr(error) + repr(error.__context__) + repr(error.args):
            print("wrong:", line, repr(error))
print("done")
"""


@pytest.fixture
def outside(tmp_path):
    """A folder that no program may see or change: afterwards it must be what it was."""
    folder = tmp_path / "outside"
    (folder / "empty").mkdir(parents=True)
    for name in ("secret", "kept", "planted.py"):
        (folder / name).write_text("print('hunter2')")

    def state():
        return [(p.name, p.stat().st_mode, p.stat().st_mtime, p.is_dir() or p.read_text()) for p in folder.iterdir()]

    before = state()
    yield folder
    assert state() == before


def use(monkeypatch, layers: str) -> None:
    """`all`, or what a container grants, whose kernel is the same: Landlock and seccomp."""
    level = isolation_level()
    if not (level.landlock and level.seccomp):
        pytest.skip("needs Landlock and seccomp; this kernel does not grant both")
    if layers == "container":
        monkeypatch.setattr(sandbox, "isolation_level", lambda: Isolation(landlock=level.landlock, seccomp=True))


@pytest.mark.parametrize("layers", ["all", "container"])
def test_no_line_of_the_table_gets_out(monkeypatch, outside, layers):
    use(monkeypatch, layers)
    assert len(ESCAPES) >= 100 and len(set(ESCAPES)) == len(ESCAPES)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        values = (str(outside), os.getpid(), server.getsockname()[1], ESCAPES)
        result = execute_code(PROGRAM.format(values=values), timeout=60, maximum_memory_bytes=1 << 30)
        with pytest.raises(TimeoutError):
            server.accept()
    assert result.error is None and result.stdout.strip() == "done", (result.stdout, result.error, result.stderr[-500:])


DENIED = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {calls!r}.items():
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_ulong(0)] * 6)
    if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print(name, result, errno.errorcode.get(ctypes.get_errno()))
print("done")
"""


def test_every_system_call_of_the_list_is_refused(monkeypatch):
    use(monkeypatch, "container")
    column = {"x86_64": 1, "aarch64": 2}[os.uname().machine]
    lines = (Path(sandbox.__file__).parent / "denied_calls.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    calls = {row[0]: int(row[column]) for row in rows if row[column] != "-"}
    result = execute_code(DENIED.format(calls=calls))
    assert len(calls) > 100 and (result.error, result.stdout) == (None, "done\n"), result


def test_the_machine_s_processes_cannot_even_be_told_to_exist(monkeypatch):
    """Landlock does not watch over stat(), so this takes namespaces as well."""
    use(monkeypatch, "all")
    if not isolation_level().scratch_limit:
        pytest.skip("needs mounts")
    code = f"import os\nfor pid in ({os.getpid()}, 1, os.getppid()):\n    print(os.path.exists(f'/proc/{{pid}}'))"
    assert execute_code(code).stdout == "False\n" * 3


THREADS = """
import threading
threading.stack_size(32768)
stop, started = threading.Event(), 0
try:
    while started < 5000:
        threading.Thread(target=stop.wait).start()
        started += 1
except RuntimeError:
    print(started)
finally:
    stop.set()
"""


@pytest.mark.parametrize("layers", ["all", "container"])
def test_threads_are_few_for_root_too(monkeypatch, layers):
    use(monkeypatch, layers)
    result = execute_code(THREADS, timeout=20, maximum_memory_bytes=1 << 30)
    assert result.error is None and bool(LEAVES_ROOT) <= int(result.stdout) <= 64, result


def test_there_are_no_threads_where_they_could_not_be_counted(monkeypatch, tmp_path):
    use(monkeypatch, "all")
    copy = Path(shutil.copytree(Path(sandbox.__file__).parent, tmp_path / "sandbox"))
    with open(copy / "kernel.py", "a") as file:
        file.write("\n\ndef leave_root():\n    return False\n")  # root who may not become anybody else
    monkeypatch.setattr(sandbox, "__file__", str(copy / "__init__.py"))
    assert execute_code(THREADS, maximum_memory_bytes=1 << 30).stdout == "0\n"


@pytest.mark.skipif(os.getuid() != 0 or not LEAVES_ROOT, reason="an ordinary user's programs share it, by the kernel")
def test_two_programs_do_not_share_one_limit_on_processes(monkeypatch):
    use(monkeypatch, "container")
    hold = "import threading, time\nfor _ in range(40): threading.Thread(target=time.sleep, args=(1,)).start()"
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: execute_code(hold, maximum_memory_bytes=1 << 30), range(3)))
    assert [result.error for result in results] == [None] * 3


@pytest.mark.parametrize("make", ["os.mkdir('d'); os.chdir('d')", "os.mkdir(f'd{n}')", "open(f'f{n}', 'w').close()"])
def test_what_a_program_leaves_is_not_waited_for(monkeypatch, make):
    use(monkeypatch, "container")
    monkeypatch.setattr(sandbox, "REMOVAL", 0.2)
    start = time.monotonic()
    result = execute_code(f"import os\nprint(os.getcwd(), flush=True)\nn = 0\nwhile True: {make}; n += 1", timeout=0.2)
    assert result.timeout and time.monotonic() - start < 5
    deadline = time.monotonic() + 60
    while os.path.exists(result.stdout.strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(result.stdout.strip())
