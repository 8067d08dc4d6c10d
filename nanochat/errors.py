"""The one exception for a user's mistake, and how every program ends on it."""

import contextlib
import ctypes
import errno
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message is one line: what was wrong, the value, what to do."""


def masked(text: str) -> str:
    """`text` without what stands before the @ of addresses, so that no password gets into a log."""
    return re.sub(r"://([^/\s]*:\S*|[^/\s]*)@", "://***@", text)


def exit_on_user_error(program: Callable[[], object]) -> None:
    """Run `program`; end the process with one line on stderr for errors that are the user's to mend.

    Exit codes: 1 for a UserError or a file that cannot be read or written, 130 for Ctrl-C. Everything else is a defect
    of ours and keeps its stack trace.
    """
    try:
        program()
    except UserError as error:
        _die(str(error), code=1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and (error.filename is None or isinstance(error, FileNotFoundError)):
            raise
        _die(explained(error), code=1)
    except KeyboardInterrupt:
        _die("interrupted", code=130)


def explained(error: OSError) -> str:
    """What went wrong with which file, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"disk full{where}: free some space (or set NANOCHAT_BASE_DIR to a larger disk) and run again"
    return f"{error.filename2 or error.filename}: {error.strerror} (NANOCHAT_BASE_DIR=DIR keeps everything in DIR)"


def end_with_parent(number: int) -> None:
    """On Linux: be sent this signal when the process that started us ends, even by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def _die(message: str, code: int) -> None:
    print(f"error: {masked(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(code)
