"""A stuck rank is found, named with its stack, and ended: waiting for it would only cost the hours of all others.

The training loop says where it is by `mark`, long work that it goes on by `runtime.heartbeat`. A thread of each rank
puts its status into the process group's store every two seconds and, while its marks move on, counts up a number there
that all ranks watch. A rank whose marks have not moved for its limit, while nobody counted either (one may well wait
for a rank that works), raises the alarm. All answer with their stacks; rank 0 prints which rank is behind the others;
all leave with exit code 1, so that torchrun can start them again. A dead or stopped rank is found by those that wait.
"""

import datetime
import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from nanochat.runtime import barrier, get_dist_info, on_heartbeat, synchronize

FIRST_SECONDS = 30 * 60.0  # until the first step is done: it compiles, which takes minutes and not equally many
LIMIT_SECONDS = 10 * 60.0  # afterwards; a step takes seconds, a stall of a shared disk a minute or two
GROUP_SECONDS = 15 * 60.0  # for lower_timeout: above the limit, so that the watchdog speaks first and names the rank
SLOW_PHASES = ("evaluate", "save")  # have the first limit always: one of them may well take longer than ten minutes
POLL_SECONDS = 2.0  # between two looks; each costs the store three requests a rank, 20 µs each or so
ANSWER_SECONDS = 10.0  # for the stacks of all ranks to arrive after an alarm
STACK_LETTERS = 20_000  # per rank in the store
NAMED = 8  # ranks, at most, that a diagnosis tells of one by one: a host full of them


@dataclass
class RankStatus:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    step: int = -1
    phase: str = "start"
    number: int = 0  # of the mark within its step; all ranks make the same marks, so (step, number) says who is behind
    seconds: float = 0.0  # without a new mark
    stack: str = ""  # empty: this rank gave no answer

    def progress(self) -> tuple[int, int]:
        return self.step, self.number

    def where(self) -> str:
        return f"step {self.step}, phase {self.phase}" if self.step >= 0 else "the time before the first step"


class Watchdog:
    """Watches this process from its own thread until `close`. Needs the process group, where there is one."""

    def __init__(self, first: float = FIRST_SECONDS, limit: float = LIMIT_SECONDS) -> None:
        """Collective. `first`: seconds without a mark that are too many until the first step is done, and in
        SLOW_PHASES. `limit`: the same at all other times."""
        _, self.rank, _, self.world = get_dist_info()
        self.first, self.limit = first, limit
        self.first_step: int | None = None
        self.status = RankStatus(self.rank, socket.gethostname(), os.getpid())
        self.marks = 0  # moves on with each mark and heartbeat
        self.interval = min(limit / 20, POLL_SECONDS)
        self.answer = min(limit, ANSWER_SECONDS)
        self.store = _own_store() if dist.is_initialized() and self.world > 1 else None
        self._publish("status")  # now, so that every rank is known by host and process
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()
        self._unhook = on_heartbeat(self._count)

    def _count(self) -> None:
        self.marks += 1

    def mark(self, step: int, phase: str) -> None:
        """The loop has come to `phase` of `step`. Costs a microsecond; call it often.

        A phase that is already the current one shows life but no progress; ranks may repeat it unequally often.
        """
        self.marks += 1  # first: the thread, which reads them the other way round, then never sees a new status as old
        now = self.status
        if (step, phase) != (now.step, now.phase):
            if self.first_step is None:
                self.first_step = step
            number = now.number + 1 if step == now.step else 0
            self.status = RankStatus(now.rank, now.host, now.pid, step, phase, number)

    def close(self) -> None:
        """Stop watching. Returns at once."""
        if not self.closed.is_set():
            self._unhook()
        self.closed.set()
        self.thread.join(timeout=5)  # it may hang in the store of a rank 0 that has gone
        faulthandler.cancel_dump_traceback_later()

    def _allowed(self, status: RankStatus) -> float:
        """Seconds that this rank may go without a mark."""
        started = self.first_step is not None and status.step > self.first_step
        return self.limit if started and status.phase not in SLOW_PHASES else self.first

    def _run(self) -> None:
        try:
            self._watch()
        finally:  # an armed timer would end a healthy process
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Times are counted in looks, so that a process which was itself stopped (Ctrl-Z) has not been stuck."""
        marks, count, age, quiet = -1, 0, 0.0, 0.0
        margin = self.limit / 4  # a rank counts until so long before its limit; so long must nobody have counted
        while not self.closed.wait(self.interval):
            status, alarm = self.status, False
            allowed = self._allowed(status)
            age = age + self.interval if self.marks == marks else 0.0
            marks, status.seconds = self.marks, age
            if self.store is not None:
                # The last resort, a thread in C: should this thread stop moving (a main thread that keeps Python's
                # lock, a store that hangs), it prints all stacks and ends the process.
                faulthandler.dump_traceback_later(allowed + 4 * self.answer, exit=True, file=2)
                try:
                    self._publish("status")
                    alarm = self.store.check(["alarm"])
                    before, count = count, self.store.add("working", int(age < allowed - margin))
                    quiet = quiet + self.interval if count == before else 0.0
                except RuntimeError:  # the store is in rank 0 or its agent, which may have ended before this rank
                    self.store = None
                    faulthandler.cancel_dump_traceback_later()
            if alarm or (age > allowed and (self.store is None or quiet >= margin)):
                self._give_up(raised_here=not alarm)

    def _publish(self, key: str) -> None:
        if self.store is not None:
            self.store.set(f"{key}/{self.rank}", json.dumps(asdict(self.status)))

    def _give_up(self, raised_here: bool) -> None:
        """Say where this rank is, find the culprit together with the others, and end the process."""
        if self.closed.is_set():
            return
        try:
            status, stack = self.status, stacks()
            waited = f"no progress for {status.seconds:.0f} s" if raised_here else "another rank raised the alarm"
            _say(f"watchdog: rank {self.rank} on {status.host} ends: {waited}, in {status.where()}\n{stack}")
            status.stack = stack[:STACK_LETTERS]
            if self.store is not None:
                self._compare(self.store)
        except RuntimeError as error:
            _say(f"watchdog: rank {self.rank}: the store does not answer, so the ranks cannot be compared: {error}")
        finally:
            os._exit(1)  # the main thread is stuck: no exception would reach it

    def _compare(self, store: dist.Store) -> None:
        """Rank 0 compares and prints, for its log is the one that people read first; should it give no answer, the
        first to raise the alarm does. Then all leave together: the end of one breaks the collectives of the others."""
        self._publish("answer")
        first = store.add("alarm", 1) == 1
        if self.rank == 0:
            self._await([f"answer/{rank}" for rank in range(self.world)], self.answer)
        elif self._await(["done"], 2 * self.answer):
            return
        if self.rank == 0 or first:
            _say(diagnosis([_read(store, rank) for rank in range(self.world)]))
            store.set("done", "1")
            time.sleep(self.interval)  # the others go first: the store may be in this process
        else:
            self._await(["done"], self.answer)

    def _await(self, keys: list[str], seconds: float) -> bool:
        """Whether the store has these keys after at most so many seconds. It asks again and
        again: with store.wait, in one of two trials a process did not end with exit code 1 when the others left."""
        assert self.store is not None
        deadline = time.monotonic() + seconds
        while not (there := self.store.check(keys)) and time.monotonic() < deadline:
            time.sleep(self.interval / 4)
        return there


def _own_store() -> dist.Store:
    """A connection of our own to the store of the process group: on a shared one we would wait behind the main thread.

    Collective: the keys begin with a token that the ranks agree on, since torchrun lets the store, and an alarm in it,
    outlive a restart of the processes (and counts restarts differently on different hosts).
    """
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    store = distributed_c10d._get_default_store().clone()
    store.set_timeout(datetime.timedelta(seconds=10))
    return dist.PrefixStore(f"watchdog/{token[0]}", store)


def _read(store: dist.Store, rank: int) -> RankStatus:
    """The answer of a rank; without one the last status it was heard in."""
    answered = store.check([f"answer/{rank}"])
    return RankStatus(**json.loads(store.get(f"{'answer' if answered else 'status'}/{rank}")))


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def stacks() -> str:
    """The stacks of all threads of this process but the calling one, the main thread first."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    threads.sort(key=lambda thread: thread is not threading.main_thread())
    return "\n".join(
        f"  thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident])).rstrip()
        for thread in threads
        if thread.ident in frames
    )


def diagnosis(everyone: list[RankStatus]) -> str:
    """Names the rank that the others wait for: one that gives no answer, else one that is behind all others; where all
    are at the same place, says that."""
    silent = [status for status in everyone if not status.stack]
    answered = [status for status in everyone if status.stack]
    last = min((status.progress() for status in answered), default=None)
    late = [status for status in answered if status.progress() == last]
    if len(late) == len(answered):
        late = []
    lines = [f"a rank is stuck; all {len(everyone)} end here"]
    for status in silent[:NAMED]:
        about = f"(stopped, dead or cut off; process {status.pid}); last heard of in {status.where()}"
        lines.append(f"rank {status.rank} on {status.host} gives no answer {about}")
    for status in late[:NAMED]:
        about = f"in {status.where()} for {status.seconds:.0f} s\n{status.stack}"
        lines.append(f"rank {status.rank} on {status.host} is behind the others: {about}")
    if more := len(silent[NAMED:]) + len(late[NAMED:]):
        lines.append(f"and {more} more ranks that give no answer or are behind")
    if not silent and not late:
        lines.append("all ranks are at the same place: a collective or a device hangs (network, GPU)")
    groups: dict[str, list[int]] = {}
    for status in answered:
        groups.setdefault(status.where(), []).append(status.rank)
    for where, ranks in groups.items():
        others = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        lines.append(f"in {where}: rank {', '.join(map(str, ranks[:NAMED]))}{others}")
    return "\n".join(f"watchdog: {line}" for line in lines)


def lower_timeout(
    seconds: float = GROUP_SECONDS, device: torch.device | None = None, leave: dist.ProcessGroup | None = None
) -> None:
    """Let collectives of all present process groups but `leave` fail after this time (gloo: an exception in the waiting
    rank; NCCL: its own watchdog ends the process). Collective; the ranks meet first, for one that is still compiling
    must not be timed out by one that is not."""
    if not dist.is_initialized():
        return
    barrier()
    if device is not None:
        synchronize(device)
    # torch 2.11 has only the private name, 2.15 has both and warns at the private one.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        if group is not leave:
            set_timeout(datetime.timedelta(seconds=seconds), group)
