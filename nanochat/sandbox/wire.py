"""Calls between two processes that do not trust each other: the check of an answer, and the answer.

Only plain values pass: None, numbers, text, bytes, ranges, lists, tuples, sets and dicts of them, and built-in types;
a value of a class below one of these passes as the plain one, so that no `__eq__` of the answer's is ever asked.
Functions and iterators stay where they are and are called from afar. Arguments are copies; only a function that returns
None, as `list.sort` does, changes its caller's lists, sets and dicts. No pickle or marshal: both trust what they read.
"""

import builtins
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # not at run time: collections.abc is a millisecond
    from collections.abc import Callable, Iterator
    from typing import Any

MAX_MESSAGE = 64 << 20  # bytes
SCALARS: "dict[type, tuple[bytes, Callable[[Any], bytes], Callable[[bytes], Any]]]" = {
    int: (b"i", lambda value: int.__format__(value, "x").encode(), lambda data: int(data, 16)),
    float: (b"f", lambda value: float.hex(value).encode(), lambda data: float.fromhex(data.decode())),
    str: (
        b"s",
        lambda value: str.encode(value, errors="surrogatepass"),
        lambda data: data.decode(errors="surrogatepass"),
    ),
    bytes: (b"b", bytes, bytes),
    bytearray: (b"a", bytes, bytearray),
}
GROUPS: "dict[type, tuple[bytes, Callable[[Any], Any], Callable[[list[Any]], Any]]]" = {
    list: (b"l", list.__iter__, list),
    tuple: (b"t", tuple.__iter__, tuple),
    set: (b"S", set.__iter__, set),
    frozenset: (b"Z", frozenset.__iter__, frozenset),
    dict: (
        b"d",
        lambda value: (part for pair in dict.items(value) for part in pair),
        lambda v: dict(zip(v[::2], v[1::2], strict=True)),
    ),
    complex: (b"c", lambda value: (value.real, value.imag), lambda v: complex(*v)),
    range: (b"r", lambda value: (value.start, value.stop, value.step), lambda v: range(*v)),
}
CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": ...}
READ_SCALAR = {tag: read for tag, _, read in SCALARS.values()}
READ_GROUP = {tag: read for tag, _, read in GROUPS.values()}


def send(descriptor: int, message: bytes) -> None:
    data = memoryview(len(message).to_bytes(8, "little") + message)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> bytes:
    """One message. EOFError when the other side has gone."""
    size = int.from_bytes(_read(descriptor, 8), "little")
    if size > MAX_MESSAGE:
        raise ValueError(f"a message of {size} bytes, at most {MAX_MESSAGE} pass")
    return _read(descriptor, size)


def _read(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the program has gone")
        data += chunk
    return bytes(data)


class Peer:
    """One end: what it exports can be called from the other end, and the other way round."""

    def __init__(self, inlet: int, outlet: int, *exported: "Callable[..., Any]") -> None:
        self.inlet, self.outlet, self.exported = inlet, outlet, list(exported)

    def serve(self) -> None:
        """Answer calls until the other side goes."""
        while True:
            try:
                message = receive(self.inlet)
            except EOFError:
                return
            self._answer(*self._load(message)[1:])

    def function(self, handle: int) -> "Callable[..., Any]":
        """What the other side exports under this number."""
        return lambda *args, **kwargs: self._call(handle, args, kwargs)

    def _call(self, handle: int, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> "Any":
        send(self.outlet, self._dump(("call", handle, args, kwargs)))
        while True:
            kind, *content = self._load(receive(self.inlet))
            if kind == "raise":
                raise _exception(*content)
            if kind == "value":
                value, changed = content
                if value is None:  # of another result it would be an answer that brings its own expectation along
                    for before, after in zip(args, changed, strict=False):
                        _change(before, after)
                return value
            self._answer(*content)

    def _answer(self, handle: int, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> None:
        try:
            value = self.exported[handle](*args, **kwargs)
            sys.stdout.flush()  # the process is killed when its last answer has been given
            reply = self._dump(("value", value, args if value is None else ()))
        except BaseException as error:
            known = next(kind for kind in type(error).__mro__ if _builtin(kind))
            details = error.args if all(type(part) in SCALARS for part in error.args) else (str(error),)
            reply = self._dump(("raise", known, details))
        send(self.outlet, reply)

    def _iterator(self, handle: int) -> "Iterator[Any]":
        while found := self._call(handle, (), {}):
            yield found[0]

    def _export(self, function: "Callable[..., Any]") -> bytes:
        self.exported.append(function)
        return str(len(self.exported) - 1).encode()

    def _dump(self, value: "Any") -> bytes:
        for tag, constant in CONSTANTS.items():
            if value is constant:
                return _packed(tag, b"")
        for kind in type(value).__mro__:
            if kind in SCALARS:
                tag, write, _ = SCALARS[kind]
                return _packed(tag, write(value))
            if kind in GROUPS:
                tag, parts, _ = GROUPS[kind]
                return _packed(tag, b"".join(map(self._dump, parts(value))))
        if _builtin(value):
            return _packed(b"K", value.__name__.encode())
        if hasattr(type(value), "__next__"):
            return _packed(b"n", self._export(lambda: [part] if (part := next(value, self)) is not self else []))
        if callable(value):
            return _packed(b"p", self._export(value))
        raise TypeError(
            f"{type(value).__name__}: only plain values, functions and iterators pass to and from the check"
        )

    def _load(self, message: bytes) -> "Any":
        (value,) = self._parts(message, 0, len(message))
        return value

    def _parts(self, data: bytes, at: int, end: int) -> "list[Any]":
        found: list[Any] = []
        while at < end:
            tag, start = data[at : at + 1], at + 9
            at = start + int.from_bytes(data[at + 1 : start], "little")
            if tag in READ_SCALAR:
                found.append(READ_SCALAR[tag](data[start:at]))
            elif tag in READ_GROUP:
                found.append(READ_GROUP[tag](self._parts(data, start, min(at, end))))
            elif tag == b"K":
                found.append(vars(builtins)[data[start:at].decode()])
                if not _builtin(found[-1]):
                    raise TypeError("no built-in type")
            elif tag == b"n":
                found.append(self._iterator(int(data[start:at])))
            elif tag == b"p":
                found.append(self.function(int(data[start:at])))
            else:
                found.append(CONSTANTS[tag])
        return found


def _packed(tag: bytes, content: bytes) -> bytes:
    return tag + len(content).to_bytes(8, "little") + content


def _builtin(value: object) -> bool:
    return isinstance(value, type) and vars(builtins).get(value.__name__) is value


def _exception(kind: type, details: "tuple[Any, ...]") -> BaseException:
    # an end of iteration that leaks out of a function would end `all(map(candidate, ...))` early, and well
    if not issubclass(kind, BaseException) or issubclass(kind, StopIteration | StopAsyncIteration):
        return RuntimeError(f"{kind.__name__}{details}")
    try:
        return kind(*details)
    except Exception:  # an exception that takes other arguments
        return RuntimeError(f"{kind.__name__}{details}")


def _change(before: object, after: object) -> None:
    """Make a list, set or dict what the called function has made of its copy."""
    if type(before) is list and type(after) is list:
        before[:] = after
    elif type(before) is type(after) and isinstance(before, set | dict) and isinstance(after, set | dict):
        before.clear()
        before.update(after)
