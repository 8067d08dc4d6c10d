"""The one exception for a user's mistake, and how every program ends on it."""

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

    Exit codes: 1 for a UserError or a full disk, 130 for Ctrl-C. Everything else is a defect of ours and keeps
    its stack trace.
    """
    try:
        program()
    except UserError as error:
        _die(str(error), code=1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _die(f"disk full{where}: free some space (or set NANOCHAT_BASE_DIR to a larger disk) and run again", code=1)
    except KeyboardInterrupt:
        _die("interrupted", code=130)


def _die(message: str, code: int) -> None:
    print(f"error: {masked(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(code)
