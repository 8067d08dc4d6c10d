"""The one exception for a user's mistake, how every program ends on it, and text that no terminal chokes on."""

import contextlib
import ctypes
import errno
import io
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

LONGEST = 1000  # characters of a message: what a user gave may be megabytes
RANK_0_SECONDS = 3.0  # torchrun ends all ranks once one has: rank 0, which met the same, is to say so first
UNFINISHED = 75  # EX_TEMPFAIL: the state is saved, run it again to continue
CLOSED_PIPE = 128 + 13  # as a shell has it for a program that SIGPIPE ends
# Control characters but tab and newline, and those that turn the direction of what follows
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class UserError(Exception):
    """Something the user can put right. The message is one line: what was wrong, the value, what to do."""


class TooLittleText(UserError):
    """The run's own text has too little for a task that is made from it: training and grading go on with the others."""


def visible(text: str) -> str:
    """`text` with control characters as U+FFFD: what a model or a file says must not steer the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def masked(text: str) -> str:
    """`text` without what stands before the @ of addresses, with or without `http://`: passwords stay out of logs."""
    return re.sub(r"(?:(?<=://)(?:[^/\s]*:\S*|[^/\s]*)|\b(?!(?:local|bin):)[^\s/:=@]+:[^\s/]\S*)@", "***@", text)


def exit_on_user_error(program: Callable[[], object]) -> None:
    """Run `program`; end the process with one line on stderr for errors that are the user's to mend.

    Exit codes: 1 for a UserError, a file that cannot be used and JSON nested too deep, 130 for Ctrl-C, 141 without a
    word where nobody reads what is printed any more. Everything else is a defect of ours and keeps its stack trace.
    """
    _prepare_streams()
    try:
        with _ctrl_c_is_an_exception():
            try:
                program()
            finally:
                sys.stdout.flush()  # here rather than as the interpreter ends, where it could not be caught
    except UserError as error:
        end(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _drop_output()
            sys.exit(CLOSED_PIPE)
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            try:
                os.getcwd()
            except FileNotFoundError:
                end("the current folder has been removed: cd to one that is there")
            raise
        end(explained(error))
    except RecursionError as error:
        if "JSON" not in str(error):
            raise
        end("JSON that is nested too deep to be read: look for a damaged file among those that were brought along")
    except KeyboardInterrupt:
        end("interrupted", code=130)


@contextlib.contextmanager
def _ctrl_c_is_an_exception() -> Iterator[None]:
    """Within, where nanochat/__init__.py has made it end the program without a word; before and afterwards, while
    modules are loaded and as the interpreter ends, an exception would be a stack trace."""
    ours = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_other_rank() -> bool:
    """Whether torchrun has started this process beside a rank 0, which says what all of them meet."""
    return os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ


def end(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr; under torchrun rank 0's, and what only another rank met it says."""
    line = visible(masked(" ".join(message.split())))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 3 // 4]} … {line[-LONGEST // 4 :]}"
    if not is_other_rank():
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {line}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": f"error: {line}", "errorCode": code, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": about}, file)
    if is_other_rank():
        time.sleep(RANK_0_SECONDS)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        os._exit(code)  # other ranks may be in a collective: threads of gloo abort a Python that ends beside them
    sys.exit(code)


def explained(error: OSError) -> str:
    """What went wrong with which file, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"disk full{where}: free some space (or set NANOCHAT_BASE_DIR to a larger disk) and run again"
    name = os.fsdecode(error.filename2 or error.filename)
    store = os.path.expanduser(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
    hint = "NANOCHAT_BASE_DIR=DIR keeps everything in DIR"
    if not name.startswith(store) and os.path.exists(name):
        hint = "it is no part of the store: make it readable, or take another"
    return f"{name}: {error.strerror} ({hint})"


def end_with_parent(number: int) -> None:
    """On Linux: be sent this signal when the process that started us ends, even by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def _prepare_streams() -> None:
    """Printing never ends a program: a stream that is closed goes nowhere, a terminal shows ? for what its locale has
    no letter for, and files and pipes (logs) get UTF-8 whatever the locale."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream: Any = getattr(sys, name)
        if stream is None:  # else the next file that is opened would be the output of our children
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8" if number and not stream.isatty() else None, errors="replace")


def _nobody_reads() -> bool:
    """True where stdout or stderr is a pipe whose reader has gone; other pipes that break are defects."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # POLLERR and POLLHUP are always told
    return bool(poll.poll(0))


def _drop_output() -> None:
    """Send what is still to be flushed nowhere, so that the interpreter does not stumble over it as it ends."""
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
