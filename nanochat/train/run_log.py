"""A folder per training run for people to look into: logs/<run>/ in the artifact store.

    training.log   a line for each record of metrics, appended as the run goes on
    config.json    everything the run was resolved to
    console.log    all that was printed from then on, and what ended the run, if something did

Where a run is resumed, it goes on in the same folder: keep its name with the checkpoint.
"""

import json
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from nanochat import runtime
from nanochat.files import atomic_write
from nanochat.paths import get_base_dir, slug


def run_name(arch: str, width: int, mup_base_width: int, now: datetime) -> str:
    """speedrun_20250831_143022_mup_w1024_base768, or speedrun_20250831_143022_sp_w768 where mup_base_width is 0."""
    kind = f"mup_w{width}_base{mup_base_width}" if mup_base_width else f"sp_w{width}"
    return f"{arch}_{now:%Y%m%d_%H%M%S}_{kind}"


def free_name(name: str) -> str:
    """`name`, or where an earlier run has a folder of that name, the first free `name.<n>`."""
    number, free = 1, name
    while log_dir(free).exists():
        number += 1
        free = f"{name}.{number}"
    return free


def log_dir(name: str) -> Path:
    return get_base_dir() / "logs" / slug(name)


class RunLog:
    """Writes logs/<name>/, on rank 0; elsewhere it does nothing. Listens to print0 until it is closed.

    resume_step: step of the checkpoint that the run goes on from; its lines are kept.
    """

    def __init__(self, name: str, config: dict[str, Any], resume_step: int | None = None) -> None:
        self.folder = log_dir(name)
        self.active = runtime.get_dist_info().rank == 0
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=1, default=str) + "\n")
        self.training = open(self.folder / "training.log", "a", buffering=1)  # noqa: SIM115 - for the whole run
        self.console = open(self.folder / "console.log", "a", buffering=1)  # noqa: SIM115
        if resume_step is not None:
            self.training.write(f"# goes on from step {resume_step}\n")
        runtime.listeners.append(self.console.write)

    def step(self, step: int, tokens: int, metrics: dict[str, Any]) -> None:
        """One line. Figures of single layers (`Group/name/part`) are left to metrics.jsonl: there are hundreds."""
        shown = {name: value for name, value in metrics.items() if name.count("/") == 1}
        if self.active and shown:
            parts = [f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in shown.items()]  # fmt: skip
            self.training.write(" | ".join([f"step {step:06d}", f"tokens {tokens}", *parts]) + "\n")

    def close(self) -> None:
        """Listen no more. May be called twice."""
        if self.active:
            self.active = False
            runtime.listeners.remove(self.console.write)
            self.training.close()
            self.console.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """What ended the run is the last line of its console.log."""
        if self.active and error is not None:
            self.console.write(f"{type(error).__name__}: {error}\n")
        self.close()
