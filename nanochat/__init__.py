"""nanochat: raw text to a chatting language model, one module a job."""

import signal
import sys

# `python -m` of a program of ours, or `-c` in a script: until it is ready (nanochat.errors), Ctrl-C ends it as it ends
# any program. Loading takes seconds, and an exception from within an import is a stack trace, or torch half loaded.
if sys.argv[:1] in (["-m"], ["-c"]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
