"""One thread that decodes for all requests to one copy of a model."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nanochat.engine import PROMPTS_AT_ONCE, Batch, Engine
from nanochat.engine.sampling import Row, Sampling
from nanochat.runtime import print0


class Busy(Exception):
    """More requests wait than the server lets wait."""


class Score(NamedTuple):
    """Log-probability of a token, and of the likeliest in its place by their ids."""

    chosen: float
    likeliest: dict[int, float]


class Event(NamedTuple):
    """One more token of one sample."""

    sample: int
    token: int
    is_last: bool
    score: Score | None


@dataclass(eq=False)
class Ticket:
    """A request that was taken in. `events` ends with None when the model failed."""

    loop: asyncio.AbstractEventLoop
    rows: list[Row]
    events: "asyncio.Queue[Event | None]" = field(default_factory=asyncio.Queue)


class Scheduler:
    """Decodes in a thread of its own, so that the event loop only moves bytes.

    Requests are taken in the order in which they come; as many rows as the batch has are decoded at once, and a request
    that leaves makes room at the next token. A client that reads slowly fills nothing but its own queue, which holds no
    more than it asked for.
    """

    def __init__(self, engine: Engine, rows: int, most_waiting: int) -> None:
        self.engine, self.most_waiting = engine, most_waiting
        self.batch = self._new_batch(rows)
        self._changed = threading.Condition()
        self._joining: list[Ticket] = []
        self._leaving: list[Ticket] = []
        self._tickets: dict[Row, Ticket] = {}
        self._is_closing = False
        self._on_device(self._warm_up)
        self._thread = threading.Thread(target=self._on_device, args=[self._run], name="scheduler", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Rows that are decoded or wait."""
        return len(self.batch) + sum(len(ticket.rows) for ticket in list(self._joining))

    def submit(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Ticket:
        """Called in the event loop. Raises Busy."""
        rows = self.engine.samples(0, prompt, sampling, seed)
        with self._changed:
            if self.load + len(rows) > self.batch.size + self.most_waiting:
                raise Busy
            ticket = Ticket(asyncio.get_running_loop(), rows)
            self._joining.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this any more."""
        with self._changed:
            self._leaving.append(ticket)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; what is not finished is lost."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _on_device(self, work: Callable[[], None]) -> None:
        """Kernels and graphs go to a thread's current GPU, which is the first one wherever the weights are."""
        with torch.cuda.device_of(self.batch.sampled):
            work()

    def _warm_up(self) -> None:
        """An answer that nobody asked for: the first one that a GPU gives compiles for about ten seconds."""
        self.batch.join(self.engine.samples(0, [0], Sampling(max_new_tokens=3, top_k=50), 0))
        while len(self.batch):
            self.batch.step()
        self.batch.past.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._joining or self._leaving or self._is_closing or len(self.batch)):
                    self._changed.wait()
                if self._is_closing:
                    return
                joining, leaving, self._joining, self._leaving = self._joining, self._leaving, [], []
                for ticket in joining:
                    self._tickets |= dict.fromkeys(ticket.rows, ticket)
                    self.batch.join(ticket.rows)
            self.batch.leave([row for ticket in leaving for row in ticket.rows])
            for ticket in leaving:
                for row in ticket.rows:
                    self._tickets.pop(row, None)
            try:
                self._deliver(self.batch.step())
            except Exception as error:  # a failure of one step must not leave all clients waiting for ever
                print0(f"decoding failed: {error!r}")
                self._fail()

    def _deliver(self, tokens: list[tuple[Row, int, int]]) -> None:
        events: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = {}
        for row, token, _ in tokens:
            if (ticket := self._tickets.get(row)) is None:
                continue
            score = row.score and Score(
                float(row.score.chosen), dict(zip(row.score.tokens.tolist(), row.score.top.tolist(), strict=True))
            )
            events.setdefault(ticket.loop, []).append((ticket, Event(row.sample, token, row.ended, score)))
            if row.ended:
                del self._tickets[row]
        for loop, some in events.items():
            _call(loop, _hand_over, some)

    def _fail(self) -> None:
        """Tell all clients, and begin anew."""
        for ticket in set(self._tickets.values()):
            _call(ticket.loop, ticket.events.put_nowait, None)
        self._tickets.clear()
        self.batch = self._new_batch(self.batch.size)

    def _new_batch(self, rows: int) -> Batch:
        model = self.engine.model
        prefills, length = min(rows, PROMPTS_AT_ONCE), model.config.sequence_len
        return Batch(model, self.engine.ready(), rows, prefills, length, remember=True)


def _hand_over(events: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)


def _call(loop: asyncio.AbstractEventLoop, function: Any, argument: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)
