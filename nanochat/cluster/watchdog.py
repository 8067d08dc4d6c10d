"""A stuck rank is found, named with its stack, and ended: waiting for it would only cost the hours of all others.

The training loop says where it is by `mark`. A thread of each rank watches that these marks move on, and puts them into
the process group's key-value store. Where they have not moved for the limit, and no other rank is known to be at work
(which one may well wait for), the rank raises an alarm; all ranks put their stacks into the store; the one that raised
the alarm finds out which rank is behind the others, prints that, and all leave with exit code 1, so that torchrun can
start them again. In a synchronous program one stuck rank stops all, so a rank that is dead or stopped is found by the
others, which wait for it.
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
POLL_SECONDS = 2.0  # between two looks; each costs the store two requests a rank, 20 µs each or so
ANSWER_SECONDS = 10.0  # for the stacks of all ranks to arrive after an alarm
STACK_LETTERS = 20_000  # per rank in the store
NAMED = 8  # ranks, at most, that a verdict tells of one by one: a host full of them


@dataclass
class Place:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    step: int = -1
    phase: str = "start"
    number: int = 0
    """Of the mark within its step. All ranks make the same marks, so (step, number) says who is behind."""
    seconds: float = 0.0
    """Without a new mark."""
    allowed: float = 0.0
    """How many of these are not too many."""
    beat: int = 0
    """Counts the looks of this rank's watchdog: moves on as long as the process lives."""
    stack: str = ""
    """Empty: this rank gave no answer."""

    def progress(self) -> tuple[int, int]:
        return self.step, self.number


class Watchdog:
    """Watches this process from its own thread until `close`. Needs the process group, where there is one."""

    def __init__(self, first: float = FIRST_SECONDS, limit: float = LIMIT_SECONDS) -> None:
        """Collective. `first`: seconds without a mark that are too many until the first step is done, and in
        SLOW_PHASES. `limit`: the same at all other times."""
        info = get_dist_info()
        self.rank, self.world = info.rank, info.world_size
        self.first, self.limit = first, limit
        self.first_step: int | None = None
        self.place = Place(self.rank, socket.gethostname(), os.getpid())
        self.marks = 0  # moves on with each call of mark, so that repeated equal marks count as life
        self.beats: dict[int, int] = {}  # of the other ranks, when last looked at
        self.interval = min(limit / 20, POLL_SECONDS)
        self.answer = min(limit, ANSWER_SECONDS)
        self.store = _own_store(self.interval) if dist.is_initialized() and self.world > 1 else None
        self._beat(self.place)  # now, so that every rank is known by host and process
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()
        self._unhook = on_heartbeat(self._alive)

    def _alive(self) -> None:
        self.marks += 1

    def mark(self, step: int, phase: str) -> None:
        """The loop has come to `phase` of `step`. Costs a microsecond; call it often, within long work too.

        A phase that is already the current one shows life but no progress; ranks may repeat it unequally often.
        """
        self.marks += 1  # first: the thread, which reads them the other way round, then never sees a new place as old
        place = self.place
        if step != place.step or phase != place.phase:
            if self.first_step is None:
                self.first_step = step
            number = place.number + 1 if step == place.step else 0
            self.place = Place(place.rank, place.host, place.pid, step, phase, number)

    def close(self) -> None:
        """Stop watching. Returns at once."""
        if not self.closed.is_set():
            self._unhook()
        self.closed.set()
        self.thread.join(timeout=5)  # it may hang in the store of a rank 0 that has gone
        faulthandler.cancel_dump_traceback_later()

    def _allowed(self, place: Place) -> float:
        started = self.first_step is not None and place.step > self.first_step
        return self.limit if started and place.phase not in SLOW_PHASES else self.first

    def _run(self) -> None:
        try:
            self._watch()
        finally:  # an armed timer would end a healthy process
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, age, look, clock, beat = -1, 0.0, 0.0, time.monotonic(), 0
        working = True
        while not self.closed.wait(self.interval):
            now, beat = time.monotonic(), beat + 1
            # A process that was itself stopped (Ctrl-Z) has not been stuck for that time.
            age, clock = age + min(now - clock, 2 * self.interval), now
            place = self.place
            allowed = self._allowed(place)
            if self.marks != seen:
                seen, age, look = self.marks, 0.0, 0.75 * allowed
            place.seconds, place.allowed, place.beat = age, allowed, beat
            if self.store is not None:
                # The last resort, a thread in C: should this thread stop moving (a main thread that keeps Python's
                # lock, a store that hangs), it prints all stacks and ends the process.
                faulthandler.dump_traceback_later(allowed + 4 * self.answer, exit=True, file=2)
            try:
                alarm = self._beat(place)
                if age > look:  # seldom, as it reads the places of all ranks; the second look comes at the limit
                    working, look = self._others_work(), age + allowed / 4
            except RuntimeError:  # the store is in rank 0 or its agent, which may have ended before this rank closes
                self.store, alarm, working = None, False, False
                faulthandler.cancel_dump_traceback_later()
            if alarm or (age > allowed and not working):
                self._give_up(raised_here=not alarm)

    def _beat(self, place: Place) -> bool:
        """Put this rank's place into the store; True when some rank has raised the alarm."""
        if self.store is None:
            return False
        self.store.set(f"place/{self.rank}", json.dumps(asdict(place)))
        return self.store.check(["alarm"])

    def _others_work(self) -> bool:
        """Whether another rank has lived since the last look and is within its own limit."""
        keys = [f"place/{rank}" for rank in range(self.world)]
        if self.store is None or not self.store.check(keys):
            return False
        others = [Place(**json.loads(text)) for text in self.store.multi_get(keys)]
        before, self.beats = self.beats, {other.rank: other.beat for other in others}
        return any(
            other.beat != before.get(other.rank) and other.seconds <= other.allowed
            for other in others
            if other.rank != self.rank
        )

    def _give_up(self, raised_here: bool) -> None:
        """Say where this rank is, find the culprit together with the others, and end the process."""
        if self.closed.is_set():
            return
        place = self.place
        try:
            place.stack = stacks()
            waited = f"no progress for {place.seconds:.0f} s" if raised_here else "another rank raised the alarm"
            _say(f"watchdog: rank {self.rank} on {place.host} ends: {waited}, in {_where(place)}\n{place.stack}")
            if self.store is not None:
                self._compare(place)
        except RuntimeError as error:
            _say(f"watchdog: rank {self.rank}: the store does not answer, so the ranks cannot be compared: {error}")
        finally:
            os._exit(1)  # the main thread is stuck: no exception would reach it

    def _compare(self, place: Place) -> None:
        store = self.store
        assert store is not None
        place.stack = place.stack[:STACK_LETTERS]
        store.set(f"answer/{self.rank}", json.dumps(asdict(place)))
        if store.add("alarm", 1) == 1:  # the first one compares: one reader, not a thousand
            self._await([f"answer/{rank}" for rank in range(self.world)], self.answer)
            places = [_read(store, rank) for rank in range(self.world)]
            report = verdict(places)
            _say(report)
            store.set("report", report)
            if self.rank == 0 or not places[0].stack:
                store.set("done", "1")
        elif self.rank == 0 and self._await(["report"], 1.5 * self.answer):
            _say(store.get("report").decode())  # the log that people read first
            store.set("done", "1")
        # All leave together: the end of one breaks the collectives of the others, and torchrun then ends those.
        self._await(["done"], 1.5 * self.answer)

    def _await(self, keys: list[str], seconds: float) -> bool:
        """Whether the store has these keys after at most so many seconds."""
        assert self.store is not None
        deadline = time.monotonic() + seconds
        while not (there := self.store.check(keys)) and time.monotonic() < deadline:
            time.sleep(self.interval / 4)
        return there


def _own_store(seconds: float) -> dist.Store:
    """A connection of our own to the store of the process group: on a shared one we would wait behind the main thread.

    Collective: the keys begin with a token that the ranks agree on, since torchrun lets the store, and an alarm in it,
    outlive a restart of the processes (and counts restarts differently on different hosts).
    """
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    store = distributed_c10d._get_default_store().clone()
    store.set_timeout(datetime.timedelta(seconds=max(seconds, 10.0)))
    return dist.PrefixStore(f"watchdog/{token[0]}", store)


def _read(store: dist.Store, rank: int) -> Place:
    """The answer of a rank; without one the last place it was heard from."""
    for key in (f"answer/{rank}", f"place/{rank}"):
        if store.check([key]):
            return Place(**json.loads(store.get(key)))
    return Place(rank, "an unknown host", 0)


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)


def _where(place: Place) -> str:
    return f"step {place.step}, phase {place.phase}" if place.step >= 0 else "the time before the first step"


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


def verdict(places: list[Place]) -> str:
    """Names the rank that the others wait for, from the place of each rank: one that gives no answer, else one that is
    behind all others; where all are at the same place, says that."""
    silent = [place for place in places if not place.stack]
    answered = [place for place in places if place.stack]
    behind = min((place.progress() for place in answered), default=None)
    late = [place for place in answered if place.progress() == behind]
    if len(late) == len(answered):
        late = []
    lines = [f"watchdog: a rank is stuck; all {len(places)} end here"]
    lines += [
        f"watchdog: rank {place.rank} on {place.host} gives no answer (stopped, dead or cut off; process {place.pid}); "
        f"last heard of in {_where(place)}"
        for place in silent[:NAMED]
    ]
    lines += [
        f"watchdog: rank {place.rank} on {place.host} is behind the others: in {_where(place)} for "
        f"{place.seconds:.0f} s\n{place.stack}"
        for place in late[:NAMED]
    ]
    if more := len(silent[NAMED:]) + len(late[NAMED:]):
        lines.append(f"watchdog: and {more} more ranks that give no answer or are behind")
    if not silent and not late:
        lines.append("watchdog: all ranks are at the same place: a collective or a device hangs (network, GPU)")
    groups: dict[str, list[int]] = {}
    for place in answered:
        groups.setdefault(_where(place), []).append(place.rank)
    lines += [f"watchdog: in {where}: {_ranks(ranks)}" for where, ranks in groups.items()]
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:NAMED]))
    return f"rank {shown}" if len(ranks) <= NAMED else f"rank {shown} and {len(ranks) - NAMED} more"


def lower_timeout(
    seconds: float = GROUP_SECONDS, device: torch.device | None = None, leave: dist.ProcessGroup | None = None
) -> None:
    """Let collectives of all process groups but `leave` fail after this time, from now on. Collective; call it after
    step 1.

    The ranks meet first: one that is still compiling must not be timed out by one that is not. Groups made later have
    the timeout they are made with. gloo and NCCL both honour it (gloo: an exception in the waiting rank; NCCL: its own
    watchdog ends the process).
    """
    if not dist.is_initialized():
        return
    barrier()
    if device is not None:
        synchronize(device)
    # torch 2.11 has only the private name, 2.15 has both and warns at the private one.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        if group is leave:
            continue
        set_timeout(datetime.timedelta(seconds=seconds), group)
