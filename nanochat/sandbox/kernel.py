"""What the kernel can refuse to a process that cannot be trusted: namespaces, Landlock, seccomp. Linux, by ctypes.

Runs in the sandbox's own interpreter (see child.py), single-threaded, and imports as little as it can: its
start is paid for every program. Nothing here needs root. Each function raises OSError where the kernel says no.
"""

import ctypes
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # not at run time: collections.abc is a millisecond
    from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
WORD = ctypes.c_ulong

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38


def prctl(option: int, value: int, *more: int) -> None:
    _checked(LIBC.prctl(option, *map(WORD, (value, *more, 0, 0, 0)[:4])), "prctl")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: "int | ctypes.Array[ctypes.c_char] | None") -> int:
    words = [WORD(value) if isinstance(value, int) else value for value in arguments]
    return _checked(LIBC.syscall(ctypes.c_long(number), *words), f"system call {number}")


# Users ----------------------------------------------------------------------------------------------------------------

FIRST_USER = 2_000_000_000  # beyond what systems give to anybody


def leave_root() -> bool:
    """Whether the limit on processes binds from here on. It never does for a real user who is root, so that becomes
    a user whom nobody else is; the effective user, who opens files, stays."""
    if os.getuid() != 0:
        return True
    try:
        os.setresuid(FIRST_USER + os.getpid(), -1, -1)
        return True
    except OSError:  # no right to, or no such number in this container
        with open("/proc/self/uid_map") as file:
            return file.read().split()[:2] != ["0", "0"]  # a container's root is somebody else outside


def tasks_of(user: int) -> int:
    """Processes and threads of this user, as far as /proc shows them."""
    found = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                status = os.stat(f"/proc/{name}/task")
            except OSError:
                continue  # it has ended meanwhile
            found += status.st_nlink - 2 if status.st_uid == user else 0
    return found


# Namespaces -----------------------------------------------------------------------------------------------------------

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8


def enter_namespaces() -> None:
    """A network without interfaces and IPC of its own; children see only each other's processes. When the first child
    ends, the kernel kills every other process of its namespace."""
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    _checked(LIBC.unshare(flags), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def mount_scratch(folder: str, size: int) -> None:
    """An empty file system of `size` bytes in memory over `folder`, and one that nobody may enter over /proc, which
    lists the processes of the whole machine; only this process and its children see them."""
    _checked(LIBC.unshare(CLONE_NEWNS), "unshare")
    options = f"size={size},nr_inodes=10000,mode=0700".encode()
    flags = WORD(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _checked(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options), "mount")
    _checked(LIBC.mount(b"tmpfs", b"/proc", b"tmpfs", flags, b"size=4k,nr_inodes=2,mode=0000"), "mount")


def drop_privileges() -> None:
    """No capabilities, and no program started from here gets any. For root this is what makes it an ordinary user."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x2008_0522, 0))
    _checked(LIBC.capset(header, ctypes.create_string_buffer(24)), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


# Landlock: which files may be opened ----------------------------------------------------------------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
# everything but running files and making devices or sockets: remove, make folders, files, FIFOs and links, rename
CHANGE = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 12 | 1 << 13
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of rights that each ABI knows; 16 since ABI 5
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/zero", "/dev/urandom", "/dev/random")


def landlock_abi() -> int:
    """Version of Landlock in this kernel, 0 for none."""
    try:
        return _syscall(CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def apply_landlock(scratch: str) -> None:
    """Files: read the system's and Python's libraries, write below `scratch`. Also, as far as this kernel's Landlock
    goes: no TCP (ABI 4), no signals to processes outside (ABI 6). Needs no_new_privs."""
    abi = landlock_abi()
    files = (1 << FILE_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall(CREATE_RULESET, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    libraries = [*SYSTEM, *sys.path, f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib"]
    allowed = {path: READ_FILE | READ_DIR for path in [*libraries, *DEVICES]}
    allowed["/dev/null"] = READ_FILE | WRITE_FILE
    allowed[scratch] = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | CHANGE
    for path, rights in allowed.items():
        _allow_below(ruleset, path, rights & files)
    _syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow_below(ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this system
    if not os.path.isdir(path):
        rights &= WRITE_FILE | READ_FILE | TRUNCATE  # the others have no meaning for a file and are refused
    try:
        _syscall(ADD_RULE, ruleset, 1, ctypes.create_string_buffer(struct.pack("=Qi", rights, handle), 12), 0)
    finally:
        os.close(handle)


# seccomp: which system calls may be made ------------------------------------------------------------------------------

AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
with open(os.path.join(os.path.dirname(__file__), "denied_calls.txt"), encoding="ascii") as _file:  # before Landlock
    _rows = [line.split() for line in _file if line.strip() and not line.startswith("#")]
# name: numbers by machine; refused with EPERM
DENIED = {name: tuple(None if number == "-" else int(number) for number in numbers) for name, *numbers in _rows}
UNSEEN = {"clone3": (435, 435), "openat2": (437, 437)}  # ENOSYS: libc takes the older calls, whose arguments show
FIRST_UNKNOWN = 457  # calls newer than this list, from statmount on: also "not implemented"
CLONE_THREAD, OPEN_MODE_AND_TRUNCATE = 0x1_0000, 0o1003
# with a process as this argument, where 0 is oneself: prlimit64, getpgid, getsid, getpriority, sched_getaffinity
ASKING = ((302, 261, 0), (121, 155, 0), (124, 156, 0), (140, 141, 1), (204, 123, 0))
# An owner may set flags, leases and watches even on files opened to read, so what may be asked of them is listed
IOCTL = (0x5401, 0x5413, 0x5421, 0x541B, 0x5451, 0x5450)  # TCGETS, TIOCGWINSZ, FIONBIO, FIONREAD, FIOCLEX, FIONCLEX
FCNTL = (*range(8), 1030, 1031, 1032, 36, 37, 38)  # up to F_SETLKW, F_DUPFD_CLOEXEC, the size of a pipe, F_OFD_...
ALL_BITS = 0xFFFF_FFFF


def _conditional(threads: bool) -> list[tuple[tuple[int | None, int | None], int, int, tuple[int, ...], bool]]:
    """Calls refused by one argument: (numbers, index of the argument, mask, values, whether these are refused)."""
    me = os.getpid()
    clocks = [(pair, 0, 1 << 31, (1 << 31,), True) for pair in ((228, 113), (229, 114), (230, 115), (222, 107))]
    return [
        *(((number, twin), index, ALL_BITS, (0,), False) for number, twin, index in ASKING),
        *clocks,  # negative: those of another process
        ((62, 129), 0, ALL_BITS, (me,), False),  # kill, tgkill: only oneself
        ((234, 131), 0, ALL_BITS, (me,), False),
        ((56, 220), 0, CLONE_THREAD if threads else 0, (CLONE_THREAD,), False),  # clone: threads at most
        ((53, 199), 1, 0xF, (1,), False),  # socketpair: only streams, whose other end cannot be chosen later
        ((157, 167), 0, ALL_BITS, (PR_SET_PDEATHSIG,), True),
        ((16, 29), 1, ALL_BITS, IOCTL, False),
        ((72, 25), 1, ALL_BITS, FCNTL, False),
        # opening to read and truncating all the same, which Landlock before ABI 3 lets pass
        ((2, None), 1, OPEN_MODE_AND_TRUNCATE, (os.O_TRUNC,), True),
        ((257, 56), 2, OPEN_MODE_AND_TRUNCATE, (os.O_TRUNC,), True),
    ]


LOAD, AND, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
EPERM, ENOSYS = 1, 38


def seccomp_filter(machine: str, threads: bool = True) -> bytes:
    """The filter as the kernel takes it: instructions (operation, jump if true, jump if false, constant)."""
    column = list(AUDIT_ARCH).index(machine)
    code = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, 0)]
    code += [(JUMP_AT_LEAST, 0, 1, FIRST_UNKNOWN), (RETURN, 0, 0, ERRNO | ENOSYS)]
    for calls, error in ((DENIED, EPERM), (UNSEEN, ENOSYS)):
        for numbers in calls.values():
            if (number := numbers[column]) is not None:
                code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | error)]
    for pair, index, mask, values, equal in _conditional(threads):
        if (number := pair[column]) is not None:
            code += [(JUMP_EQUAL, 0, 4 + len(values), number), (LOAD, 0, 0, 16 + 8 * index), (AND, 0, 0, mask)]
            for left, value in zip(reversed(range(len(values))), values, strict=True):  # to the refusal or past it
                code += [(JUMP_EQUAL, left + (not equal), equal and not left, value)]
            code += [(RETURN, 0, 0, ERRNO | EPERM), (LOAD, 0, 0, 0)]  # the number again, for the rules that follow
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def apply_seccomp(threads: bool = True) -> None:
    """Refuse the calls above to this process from now on, and new threads where they could not be counted. Needs
    no_new_privs; OSError on machines without a table."""
    machine = os.uname().machine
    if machine not in AUDIT_ARCH:
        raise OSError(EPERM, f"no list of system calls for {machine}")
    instructions = seccomp_filter(machine, threads)
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


# Are they there? ------------------------------------------------------------------------------------------------------


def probe(scratch: str) -> dict[str, int]:
    """Which layers this kernel grants, each one tried in a process of its own. Landlock: its ABI, 0 for none."""
    return {
        "namespaces": _holds(_try_namespaces),
        "scratch_limit": _holds(lambda: _try_mount(scratch)),
        "landlock": landlock_abi() * _holds(lambda: _try_landlock(scratch)),
        "seccomp": _holds(_try_seccomp),
    }


def _holds(attempt: "Callable[[], bool]") -> bool:
    """Whether attempt() in a forked child returns True."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if attempt() else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def _refused(action: "Callable[..., object]", *arguments: object) -> bool:
    try:
        action(*arguments)
    except PermissionError:
        return True
    return False


def _try_namespaces() -> bool:
    enter_namespaces()
    with open("/proc/self/net/dev") as file:  # two lines of heading, then the interfaces; a new network has only lo
        interfaces = [line.split(":")[0].strip() for line in file.readlines()[2:]]
    return interfaces in ([], ["lo"]) and _holds(lambda: os.getpid() == 1)


def _try_mount(scratch: str) -> bool:
    enter_namespaces()
    mount_scratch(scratch, 1 << 16)
    try:
        with open(f"{scratch}/full", "wb") as file:
            file.write(bytes(1 << 17))
    except OSError:  # 128 KB do not fit into 64
        return True
    return False


def _try_landlock(scratch: str) -> bool:
    inside, outside = f"{scratch}/inside", f"{scratch}/outside"
    os.mkdir(inside)
    with open(outside, "w"):
        pass
    drop_privileges()
    apply_landlock(inside)
    with open(f"{inside}/file", "w"):
        pass
    return _refused(open, outside) and _refused(open, f"{outside}-2", "w")


def _try_seccomp() -> bool:
    drop_privileges()
    apply_seccomp()
    return _refused(_checked, LIBC.socket(2, 1, 0), "socket") and _refused(os.fork)
