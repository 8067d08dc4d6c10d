"""nanochat/sandbox: a function is checked from another process. Answers that feign success, honest ones of every kind,
and the wire between the two."""

import contextlib
import copy
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import sandbox
from nanochat.sandbox import Isolation, check_function, execute_code, wire

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="model-written code runs only on Linux")

MARK = "a-mark-that-stands-in-the-check-alone"
CHECK = f"""
def check(f):
    assert f(3) == 10, "{MARK}"
    assert f(4) == 17 and list(map(f, [1, 2])) == [2, 5]
    assert all(map(lambda n: f(n) == n * n + 1, range(5, 9)))

check(candidate)
"""

# What a program may try where the check is in the same process, and what it may try against this design. All of them
# define f, which is never n * n + 1.
FEINTS = {
    "blind line at the start": "for fd in range(3, 9): {ok}\nos._exit(0)",
    "blind line in the function": "def f(n):\n    for fd in range(3, 9): {ok}\n    os._exit(0)",
    "all that a process says": "for fd in range(3, 64): {say}(b'ready\\nok')\nos._exit(0)\n",
    "in a thread": """
def shout():
    while True:
        for fd in range(3, 64): {say}(b'ok')
threading.Thread(target=shout, daemon=True).start()
def f(n): time.sleep(0.05)
""",
    "exit code 0": "def f(n): os._exit(0)",
    "exit code 0 by libc": "def f(n): ctypes.CDLL(None)._exit(0)",
    "SystemExit": "def f(n): raise SystemExit(0)",
    "SystemExit at the start": "def f(n): return 0\nsys.exit(0)",
    "at exit": "atexit.register(os._exit, 0)\ndef f(n): sys.exit()",
    "killed by itself": "def f(n): posix.kill(os.getpid(), 9)",
    "crash": "def f(n): ctypes.string_at(0)",
    "KeyboardInterrupt": "def f(n): raise KeyboardInterrupt",
    "GeneratorExit": "def f(n): raise GeneratorExit",
    "StopIteration ends all() early": "def f(n):\n    if n > 4: raise StopIteration\n    return n * n + 1",
    "StopIteration of its own": "class S(StopIteration): pass\ndef f(n):\n    if n > 4: raise S\n    return n * n + 1",
    "object that equals everything": "{equal}\nclass A(Equal): pass\ndef f(n): return A()",
    "int that equals everything": "{equal}\nclass A(Equal, int): pass\ndef f(n): return A(0)",
    "float that equals everything": "{equal}\nclass A(Equal, float): pass\ndef f(n): return A(0)",
    "str that equals everything": "{equal}\nclass A(Equal, str): pass\ndef f(n): return A('')",
    "list that equals everything": "{equal}\nclass A(Equal, list): pass\ndef f(n): return A()",
    "dict that equals everything": "{equal}\nclass A(Equal, dict): pass\ndef f(n): return A()",
    "tuple of such": "{equal}\nclass A(Equal, int): pass\ndef f(n): return (A(0),)",
    "claims to be an int": "{equal}\nclass A(Equal): __class__ = property(lambda self: int)\ndef f(n): return A()",
    "type that equals everything": "{equal}\nclass M(Equal, type): pass\ndef f(n): return M('A', (), {{}})",
    "function": "def f(n): return f",
    "iterator": "def f(n): yield n * n + 1",
    "NotImplemented": "def f(n): return NotImplemented",
    "nan": "def f(n): return float('nan')",
    "builtins replaced": "for name in ('AssertionError', 'all', 'map', 'range', 'list'):\n"
    "    setattr(builtins, name, lambda *a: True)\ndef f(n): return 0",
    "tracing": "sys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(n): return 0",
    "excepthook": "sys.excepthook = sys.__excepthook__ = lambda *a: os._exit(0)\ndef f(n): 1 / 0",
    "os.write and os._exit replaced": """
write, leave = os.write, os._exit
os.write = lambda fd, data: write(fd, bytes(data).partition(b'error')[0] + b'ok')
os._exit = lambda code: leave(0)
def f(n): raise ValueError
""",
    "own modules replaced": """
for module in list(sys.modules.values()):
    for name in ('_outcome', '_describe', '_failure', '_judge', '_exception'):
        if hasattr(module, name): setattr(module, name, lambda *a: b'ok')
def f(n): return 0
""",
    "frames": """
def f(n):
    frame, found = sys._getframe(), []
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for part in [*found, *gc.get_objects()]:
        if isinstance(part, dict): found += list(part.values())
    for part in found:
        if isinstance(part, bytes):
            for fd in range(3, 16): {say}(part + b'ok')
    return 0
""",
    "signals to all": """
def f(n):
    for pid in range(2, 300):
        try: posix.kill(pid, 9)
        except OSError: pass
""",
    "changes its argument": "def f(n): return n.clear() or n  # CHECK: x = [3, 1]; assert candidate(x) == sorted(x)",
    "claims a changed argument": """
def f(n):
    for fd in range(3, 64):
        try: wire.send(fd, wire.Peer(0, 1)._dump(('value', [], ([],))))
        except OSError: pass
# CHECK: x = [3, 1]; assert candidate(x) == sorted(x)
""",
    "no value": "{raw}(b'')",
    "no message": "{raw}(b'\\xff' * 99)",
    "an unknown exception": "{raw}(wire.Peer(0, 1)._dump(('raise', 'ok', ())))",
    "a type for an exception": "{raw}(wire.Peer(0, 1)._dump(('raise', int, ())))",
    "a call back to nowhere": "{raw}(wire.Peer(0, 1)._dump(('call', 0, (), {{}})))",
    "a message without end": "for fd in range(3, 64): {say}((2**62).to_bytes(8, 'little'))\ndef f(n): pass",
    "nested without end": "{raw}((b'l' + bytes(8)) * 9999)",
    "nested deeper than Python": "def f(n):\n    for _ in range(400): n = [n]\n    while True: n = [n]",
    "unhashable member": "{raw}(wire._packed(b'l', wire._packed(b'S', wire.Peer(0, 1)._dump([]))))",
    "a name for a type": "{raw}(wire.Peer(0, 1)._dump('value') + wire._packed(b'K', b'exec'))",
}
PREAMBLE = """
import atexit, builtins, ctypes, gc, os, posix, sys, threading, time
import wire
def shout_at(fd, data):
    try: os.write(fd, data)
    except OSError: pass
def answer(content):
    for fd in range(3, 64):
        try: wire.send(fd, content)
        except OSError: pass
"""
PARTS = {
    "ok": "shout_at(fd, b'ok')",
    "say": "(lambda data: shout_at(fd, data))",
    "raw": "def f(n): answer",
    "equal": "class Equal:\n    __eq__ = __ge__ = __le__ = lambda self, other: True\n"
    "    __ne__ = lambda self, other: False\n    __hash__ = lambda self: 0",
}


def program(feint: str) -> str:
    return PREAMBLE + feint.format(**PARTS) if "{" in feint else PREAMBLE + feint


def pieces(feint: str) -> tuple[str, str]:
    code, _, check = feint.partition("# CHECK: ")
    return code, check or CHECK


@pytest.mark.parametrize("layers", ["all", "none"])
def test_no_feint_passes_for_success(monkeypatch, layers):
    if layers == "none":  # what the design gives by itself
        monkeypatch.setattr(sandbox, "isolation_level", Isolation)
        monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "1")
    assert len(FEINTS) >= 40
    skipped = ("signals to all",) if layers == "none" else ()  # they would reach this process

    def feign(name: str) -> bool:
        code, check = pieces(FEINTS[name])
        result = check_function(program(code), "f", check, timeout=1.5)
        assert result.success is (result.error is None)
        return result.success

    names = [name for name in FEINTS if name not in skipped]
    with ThreadPoolExecutor(3) as pool:
        passed = dict(zip(names, pool.map(feign, names), strict=True))
    assert [name for name in names if passed[name]] == []


def test_the_checks_that_feints_are_to_pass_can_be_passed():
    for name, (_, check) in ((name, pieces(feint)) for name, feint in FEINTS.items()):
        right = "def f(n): return n * n + 1" if check is CHECK else "def f(n): return sorted(n)"
        if check is not CHECK or name == "exit code 0":
            assert check_function(program(right), "f", check, timeout=30).error is None, name


@pytest.mark.parametrize("name", ["blind line at the start", "all that a process says", "exit code 0", "at exit",
                                  "os.write and os._exit replaced", "excepthook", "SystemExit"])  # fmt: skip
def test_a_program_that_is_not_checked_does_not_feign_its_end_by_such_lines(name):
    code, _ = pieces(FEINTS[name])
    assert execute_code(f"{program(code)}\nf(3)\nassert False").success is False


SEARCH = """
import ctypes, gc, os, sys
def seen():
    mark, found = {reversed!r}, []  # reversed, so that the search does not find itself
    frame = sys._getframe()
    while frame:
        found += [repr(frame.f_locals), repr(frame.f_code.co_consts)]
        frame = frame.f_back
    found += map(repr, [part for part in gc.get_objects() if type(part) in (dict, list, tuple)])
    for name in ("/proc/self/environ", "/proc/self/cmdline", "/proc/1/environ", f"/proc/{{os.getppid()}}/environ"):
        try: found.append(repr(open(name, "rb").read()))
        except OSError: pass
    return sum(mark in text[::-1] for text in found)
def memory(start, stop):
    # all pages that write() can read; it says where there is none
    inlet, outlet = os.pipe()
    count = 0
    for page in range(start, stop, 4096):
        try: os.write(outlet, (ctypes.c_char * 4096).from_address(page))
        except OSError: continue
        count += {reversed!r}.encode() in os.read(inlet, 4096)[::-1]
    return count
here = id(object()) & ~4095
print(seen(), memory(here - (16 << 20), here + (16 << 20)), flush=True)
{extra}
def f(n): print(memory(here - (16 << 20), here + (16 << 20))); return n
"""


def test_the_check_is_nowhere_in_the_program_s_process():
    result = check_function(SEARCH.format(reversed=MARK[::-1], extra=""), "f", CHECK, timeout=30)
    assert (result.success, result.error) == (False, f"AssertionError: {MARK}")
    assert result.stdout == "0 0\n0\n"
    # the search finds what is there
    extra = f"kept = {MARK!r}\nprint(seen(), memory(here - (16 << 20), here + (16 << 20)), flush=True)"
    result = check_function(SEARCH.format(reversed=MARK[::-1], extra=extra), "f", CHECK, timeout=30)
    assert all(int(number) > 0 for number in result.stdout.split()), result


HONEST = {
    "numbers": ("def f(a, b=2, *, c): return [a / b, -(2**200), 1e308 * 10, 2j, True]",
                "assert candidate(1, c=3) == [0.5, -(2**200), float('inf'), 2j, True]"),
    "kinds": ("def f(x): return x", "for x in (None, True, 1, 1.5, 'é\\ud800', b'\\0', (1,), [1], {1}, {1: 2},\n"
              "          1j, ..., frozenset({1}), range(3), bytearray(b'x'), int, ValueError):\n"
              "    assert candidate(x) == x and type(candidate(x)) is type(x), x"),
    "empty": ("def f(x): return x", "for x in ('', b'', (), [], {}, set()): assert candidate(x) == x"),
    "order": ("def f(x): return {k: x[k] for k in sorted(x)}",
              "assert list(candidate({'b': 1, 'a': 2})) == ['a', 'b']"),
    "below a plain class": ("import collections\ndef f(x): return collections.Counter(x)",
                            "assert candidate('aab') == {'a': 2, 'b': 1}"),
    "named tuple": ("import collections\nP = collections.namedtuple('P', 'x y')\ndef f(): return [P(1, 2)]",
                    "assert candidate() == [(1, 2)]"),
    "enum": ("import enum\nclass E(enum.IntEnum): A = 1\ndef f(): return E.A", "assert candidate() == 1"),
    "in place": ("def f(x): x.sort()", "x = [2, 1]\nassert candidate(x) is None and x == [1, 2]"),
    "in place, dict and set": ("def f(x, y): x[1] = 2; y.add(3)", "x, y = {}, set()\ncandidate(x, y)\n"
                               "assert (x, y) == ({1: 2}, {3})"),
    "a copy": ("def f(x): x.append(1); return x", "x = []\nassert candidate(x) == [1] and x == []"),
    "raises": ("def f(x):\n    if x < 0: raise ValueError('negative', x)\n    return x", "try:\n    candidate(-1)\n"
               "except ValueError as error:\n    assert error.args == ('negative', -1)\nelse:\n    assert False"),
    "raises one of its own": ("class E(KeyError): pass\ndef f(): raise E(object())",
                              "try:\n    candidate()\nexcept KeyError:\n    pass\nelse:\n    assert False"),
    "given a function": ("def f(g, x): return [g(y) for y in x]", "assert candidate(lambda x: x + 1, [1]) == [2]"),
    "gives a function": ("def f(x): return lambda y: x + y", "assert candidate(1)(2) == 3"),
    "given what raises": ("def f(g):\n    try: g()\n    except ZeroDivisionError: return 'caught'",
                          "assert candidate(lambda: 1 / 0) == 'caught'"),
    "built-in function": ("def f(g): return g('abc')", "assert candidate(len) == 3"),
    "built-in type": ("def f(t, x): return [y for y in x if isinstance(y, t)]",
                      "assert candidate(int, [1, 'a']) == [1]"),
    "generator": ("def f(n):\n    for i in range(n): yield i", "assert list(candidate(3)) == [0, 1, 2]"),
    "endless generator": ("import itertools\ndef f(): return itertools.count()", "assert next(candidate()) == 0"),
    "map": ("def f(x): return map(str, x)", "assert sorted(candidate([2, 1])) == ['1', '2']"),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [candidate(), candidate()] == [1, 2]"),
    "recursion": ("def f(n): return n and n + f(n - 1)", "assert candidate(100) == 5050"),
    "lambda": ("f = lambda x: x", "assert candidate(1) == 1 and candidate.__name__ == 'f'"),
    "class as function": ("class f(list):\n    def __init__(self, n): super().__init__(range(n))",
                          "assert candidate(3) == [0, 1, 2]"),
    "large": ("def f(x): return x[::-1]", "x = list(range(200_000))\nassert candidate(x) == x[::-1]"),
    "prints": ("def f(): print('é')", "candidate()"),
    "main": ("def f(): return 1\nif __name__ == '__main__': print('main')", "assert candidate() == 1"),
    "main that reads": ("def f(): return 1\ntry: input()\nexcept EOFError: pass", "assert candidate() == 1"),
    "many calls": ("def f(x): return x", "assert all(candidate(n) == n for n in range(1000))"),
    "check with files": ("def f(): open('x', 'w').write('1')", "import os\ncandidate()\nassert os.listdir() == []"),
}  # fmt: skip


def test_honest_functions_pass_an_honest_check():
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda pair: check_function(pair[0], "f", pair[1], timeout=30), HONEST.values())
        results = dict(zip(HONEST, found, strict=True))
    assert {name: result.error for name, result in results.items() if not result.success} == {}
    assert results["prints"].stdout == "é\n" and results["main"].stdout == "main\n"


WRONG = {
    "AssertionError: no": ("def f(): return 1", "assert candidate() == 2, 'no'"),
    "ZeroDivisionError: division by zero": ("def f(): return 1 / 0", "candidate()"),
    "KeyError: 'f'": ("def g(): return 1", "candidate()"),
    "NameError: name 'x' is not defined": ("def f(): return 1\nx", "candidate()"),
    "SyntaxError: invalid syntax (<program>, line 1)": ("def f(: return 1", "candidate()"),
    "left with exit code 3 before its end": ("import os\ndef f(): os._exit(3)", "candidate()"),
    "ended by signal 11": ("import ctypes\ndef f(): ctypes.string_at(0)", "candidate()"),
    "MemoryError: the memory limit was reached": ("def f(): return bytearray(10**9)", "candidate()"),
    "stopped after 0.5 seconds": ("def f():\n    while True: pass", "candidate()"),
    "stopped after 0.50 seconds": ("while True: pass", "candidate()"),
    "TypeError: A: only plain values, functions and iterators pass to and from the check": (
        "class A: pass\ndef f(): return A()", "candidate()"),
    "ZeroDivisionError: integer division or modulo by zero": ("def f(): return 1", "candidate()\n1 // 0"),
    "SystemExit: 0": ("def f(): return 1", "raise SystemExit(0)"),
}  # fmt: skip


def test_why_a_check_failed_is_one_line():
    for error, (code, check) in WRONG.items():
        result = check_function(code, "f", check, timeout=0.5 if "stopped" in error else 30)
        assert result.error.replace("0.5 ", "0.50 ") == error.replace("0.5 ", "0.50 "), result
        assert (result.timeout, result.memory_exceeded) == ("stopped" in error, "MemoryError" in error)


def test_a_program_ends_with_its_check():
    code = "import atexit, time\nprint('begun', flush=True)\ndef f(): return 1"
    result = check_function(code, "f", "assert candidate() == 1")
    assert result.success and result.stdout == "begun\n"
    assert check_function("def f(): pass", "f", "while True: pass", timeout=0.5).timeout


# ---- the wire

KEYS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just("\ud800") | st.binary()
)
HASHABLE = st.deferred(lambda: _HASHABLE)
_HASHABLE = st.recursive(KEYS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3))
VALUES = st.deferred(lambda: _VALUES)
_VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
    ),
)


def kinds(value) -> str:
    """The value with the types of all its parts; sets have no order."""
    if isinstance(value, dict):
        return f"dict{[(kinds(key), kinds(part)) for key, part in value.items()]}"
    if isinstance(value, set | frozenset):
        return f"{type(value)}{sorted(map(kinds, value))}"
    return f"{type(value)}{list(map(kinds, value))}" if isinstance(value, list | tuple) else repr(value)


@settings(max_examples=50)
@given(VALUES)
def test_a_plain_value_comes_out_as_it_went_in(value):
    peer = wire.Peer(0, 1)
    assert kinds(peer._load(peer._dump(value))) == kinds(value)


@settings(max_examples=50)
@given(st.binary(max_size=60), st.lists(VALUES, max_size=2))
def test_whatever_bytes_come_in_give_a_value_or_an_exception(noise, values):
    peer = wire.Peer(0, 1)
    message = noise + b"".join(map(peer._dump, copy.deepcopy(values))) + noise
    for data in (message, message[: len(message) // 2]):
        with contextlib.suppress(Exception):
            peer._load(data)


def test_what_is_read_is_limited():
    inlet, outlet = os.pipe()
    os.write(outlet, (1 << 40).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="at most"):
        wire.receive(inlet)
    os.close(outlet)
    with pytest.raises(EOFError):
        wire.receive(inlet)
    os.close(inlet)
