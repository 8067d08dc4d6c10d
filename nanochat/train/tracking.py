"""Weights & Biases beside metrics.jsonl, for runs with --run. It may be absent, slow or broken: training goes on."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanochat.errors import masked
from nanochat.paths import run_dir

ANSWER_SECONDS = 20.0  # that W&B has to say whether it takes our key
START_SECONDS, END_SECONDS = 30.0, 120.0  # that opening a run, and sending what is left of it, may take


class Mirror:
    """A run in W&B, or nothing once W&B has failed."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.id: str | None = run.id if run is not None else None

    def log(self, record: dict[str, Any]) -> None:
        if self._run is not None:
            self._try("takes no records any more", lambda: self._run.log(record))

    def finish(self) -> None:
        if self._run is not None:
            self._try("did not end the run", self._run.finish)

    def _try(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever goes wrong in there, it is no reason to lose a run
            self._run = None
            threading.Thread(target=_leave, daemon=True).start()  # which may wait for the network
            print(f"warning: W&B {what} ({_line(error)}); metrics.jsonl has them all", flush=True)


def connect(project: str, name: str, group: str, config: dict[str, Any], known: str | None, axes: Iterable[str]) -> Any:
    """Open the run, or go on with the one of id `known`; where W&B cannot be had, record it on this machine. axes:
    names of metrics that are drawn over `step`."""
    asked: dict[str, Any] = {"project": project, "group": group, "config": config, "id": known}
    asked["name"] = None if known else name
    try:
        import wandb  # within: one that is broken, or not there, is no reason either

        settings = wandb.Settings(init_timeout=START_SECONDS, finish_timeout=END_SECONDS)
        if why := _refusal():
            run = _offline(why, asked)
        else:
            try:
                run = wandb.init(**asked, resume="allow" if known else None, settings=settings)
            except Exception as error:  # as above
                run = _offline(f"{_line(error)}; see `wandb status`", asked)
        for axis in axes:
            run.define_metric(axis, step_metric="step")
    except Exception as error:  # not even on this machine
        print(f"warning: no W&B: {_line(error)}; mend it, or drop --run; metrics.jsonl has all records", flush=True)
        run = None
    return Mirror(run)


def warn() -> None:
    """Say what `connect` would say, hours before."""
    try:
        why = _refusal()
    except Exception as error:  # as above
        why = _line(error)
    if why:
        print(f"warning: W&B is not reached: {why}; training would record only here", flush=True)


def _refusal() -> str | None:
    """Why W&B would not take a run, and what to do; None where it would, or is not asked. Never waits for an answer of
    the user, and never for long for one of the network."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled", "shared", "dryrun"):
        return None
    outcome: list[str | None] = [f"no answer from {settings.base_url} in {ANSWER_SECONDS:.0f} s; mend the network"]

    def ask() -> None:
        try:
            known = wandb.login(prompt=False, verify=True)
            outcome[0] = None if known else "there is no API key; set WANDB_API_KEY, or run `wandb login`"
        except Exception as error:  # as above
            outcome[0] = f"cannot log in ({_line(error)}); mend the network, or the key by `wandb login --relogin`"

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return outcome[0]


def _offline(why: str, asked: dict[str, Any]) -> Any:
    import wandb

    run = wandb.init(**asked, mode="offline", dir=os.environ.get("WANDB_DIR") or run_dir())
    folder = Path(run.dir).parent
    later = f"`wandb sync {folder}` sends its records later"
    print(f"warning: W&B is not reached: {why}. Training goes on; {later}", flush=True)
    return run


def _leave() -> None:
    """End the service of W&B: one that has died would be a stack trace at the end of the interpreter."""
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _variable(refused: dict[str, Any]) -> str:
    """What the user has to change for a setting that W&B refuses: the variable, or its name in the settings file."""
    named = (name for name, value in os.environ.items() if name.startswith("WANDB_") and value == refused["input"])
    return next(named, f"setting {'.'.join(map(str, refused['loc']))}")


def _line(error: Exception) -> str:
    text = str(error)
    if callable(refused := getattr(error, "errors", None)):  # pydantic's, which does not name the variable
        text = "; ".join(f"{_variable(each)}: {each['msg']}" for each in refused())
    return masked(" ".join(text.split()))[:300] or type(error).__name__
