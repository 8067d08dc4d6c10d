"""The models that one server can answer with: all of the store, each loaded when it is first asked for."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanochat.checkpoint import list_models, load_model
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.serve.scheduler import Scheduler
from nanochat.tokenizer import RustBPETokenizer


@dataclass(eq=False)
class Served:
    """One model, with a scheduler for each device."""

    name: str
    stage: str
    tokenizer: RustBPETokenizer
    schedulers: list[Scheduler]

    @property
    def context(self) -> int:
        return self.schedulers[0].engine.model.config.sequence_len

    def scheduler(self) -> Scheduler:
        """The one that has least to do."""
        return min(self.schedulers, key=lambda scheduler: scheduler.load)

    def close(self) -> None:
        for scheduler in self.schedulers:
            scheduler.close()


class Models:
    """At most `most` are in memory; one more takes the place of the one that was asked for longest ago."""

    def __init__(self, devices: Sequence[torch.device], rows: int, most_waiting: int, most: int = 2) -> None:
        self.devices, self.rows, self.most_waiting, self.most = devices, rows, most_waiting, most
        self.default = ""
        self._loaded: OrderedDict[str, Served] = OrderedDict()
        self._lock = asyncio.Lock()

    def names(self) -> list[str]:
        """`stage/tag` of all checkpoints in the store, the default first."""
        found = [f"{stage}/{tag}" for stage, tags in list_models().items() for tag in tags]
        return [self.default, *(name for name in found if name != self.default)]

    def add(self, stage: str, tag: str | None, step: int | None) -> Served:
        """Load a model, and answer with it where a request names none. Raises UserError."""
        served = self._load(stage, tag, step)
        self.default = served.name
        self._loaded[served.name] = served
        return served

    async def get(self, name: str | None) -> Served:
        """Raises UserError for a name that is not there."""
        name = name if name and "/" in name else self.default  # programs often insist on a name of their own
        async with self._lock:
            if name not in self._loaded:
                if name not in self.names():
                    raise UserError(f"no model {name!r:.100}; there are: {', '.join(self.names())}")
                while len(self._loaded) >= self.most:
                    oldest = next(iter(self._loaded))
                    await asyncio.to_thread(self._loaded.pop(oldest).close)
                stage, tag = name.split("/", 1)
                self._loaded[name] = await asyncio.to_thread(self._load, stage, tag, None)
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def loaded(self) -> list[Served]:
        return list(self._loaded.values())

    def close(self) -> None:
        for served in self.loaded():
            served.close()

    def _load(self, stage: str, tag: str | None, step: int | None) -> Served:
        schedulers = []
        for device in self.devices:
            model, tokenizer, meta = load_model(stage, device, tag=tag, step=step)
            schedulers.append(Scheduler(Engine(model, tokenizer), self.rows, self.most_waiting))
        return Served(f"{stage}/{meta['tag']}", stage, tokenizer, schedulers)
