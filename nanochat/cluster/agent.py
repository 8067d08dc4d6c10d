"""torchrun as nanochat.launch starts it: without a stack trace of its own, and ending as its processes did.

    python -m nanochat.cluster.agent -- /path/to/torchrun --standalone --nproc_per_node=2 -m -- scripts.base_train

A process that ends on a mistake has said why, or left it to us. Processes that saved after a signal and ended with 0
did as they were told; torchrun would end with 1 all the same. A wrapper of torchrun is run as it is.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.errors import UserError
from nanochat.launch import SIGNALS
from nanochat.pipeline import exit_code


@dataclass(frozen=True)
class Settings:
    """Run torchrun; its line goes after `--`."""


def main(settings: Settings, command: Sequence[str]) -> int:
    """Run the command; returns its exit code. Raises UserError where the nodes do not meet."""
    if not command:
        raise UserError("no command; write `-- torchrun …`, or use nanochat.launch")
    program, *arguments = command
    if b"torch.distributed.run" not in Path(program).read_bytes():
        os.execv(program, [program, *arguments])
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import api

    codes: list[int] = []  # of the processes here, after a signal

    class Agent(api.LocalElasticAgent):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().run(*args, **kwargs)
            except SignalException:
                context: Any = self._pcontext
                if context is not None:
                    codes.extend(handler.proc.returncode for handler in context.subprocess_handlers.values())
                raise

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    # Of each process that it ends or sees end it says so, whatever the reason
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(lambda one: "forcefully" in one.msg)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    try:
        run.run(run.parse_args(arguments))
    except SignalException as stopped:
        for number in SIGNALS.split(","):  # another would be raised anywhere, as this one was
            signal.signal(signal.Signals[number], signal.SIG_IGN)
        return exit_code(next(filter(None, codes), 0 if codes else -stopped.sigval))
    except ChildFailedError as error:
        # Ranks that left word of the same mistake are ended by torchrun while rank 0 says it: they are not the cause
        causes = {rank: one for rank, one in error.failures.items() if one.exitcode != -signal.SIGTERM}
        rank, failure = min((causes or error.failures).items(), key=lambda item: (item[1].timestamp, item[0]))
        if failure.exitcode < 0:
            print(f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        elif rank > 0 and isinstance(failure.message, dict):  # nanochat.errors.end leaves that to us
            print(f"{failure.message['message']} (rank {rank})", file=sys.stderr)
        return exit_code(failure.exitcode)
    except (DistError, RendezvousError) as error:
        raise UserError(f"the nodes did not meet: {str(error).splitlines()[0]}") from None
    return 0


if __name__ == "__main__":
    cli.run_with_command(main, Settings)
