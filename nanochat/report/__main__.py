"""Reports of runs.

    python -m nanochat.report generate           report.html, .md, .json and plots; copied to the current directory
    python -m nanochat.report reset              forget the sections of the current run
    python -m nanochat.report compare RUN RUN…   compare.html, .md and .json of two runs or more
    python -m nanochat.report tensorboard RUN…   metrics.jsonl as event files, in runs/<run>/tensorboard

A RUN is the name of one in the store, or a folder `runs/NAME` of any store. Without one it is that of NANOCHAT_RUN_ID,
otherwise the one that was last at work.
"""

import dataclasses
import pkgutil
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat import cli, report
from nanochat.errors import UserError
from nanochat.paths import run_dir


@dataclasses.dataclass(frozen=True)
class Settings:
    """Put the report of a run together or forget its sections, compare runs, or export their metrics."""

    action: Literal["generate", "reset", "compare", "tensorboard"] = "generate"
    """What to do."""
    runs: tuple[str, ...] = ()
    """Runs to compare or to export: names of runs in the store, or their folders."""
    usd_per_hour: Annotated[float | None, cli.float_flag(gte=0)] = dataclasses.field(default=None, kw_only=True)
    """What the machine costs, for what the run has cost; default: that is left out."""


def main(settings: Settings) -> None:
    folders = [_folder(run) for run in settings.runs]
    if settings.action in ("generate", "reset") and folders:
        raise UserError(f"{settings.action} {settings.runs[0]}: expected no name; NANOCHAT_RUN_ID=NAME chooses the run")
    if settings.action == "generate":
        current = report.current_run()
        print(f"report of run {current.name}: {report.generate(current, Path.cwd(), settings.usd_per_hour)}")
    elif settings.action == "reset":
        report.reset(report.current_run())
    elif settings.action == "compare":
        print(f"wrote {_annex('compare:compare')(folders, Path.cwd())}")
    else:
        for folder in folders or [report.current_run()]:
            print(f"wrote {_annex('events:export')(folder)}")


def _annex(name: str) -> Any:
    return pkgutil.resolve_name(f"nanochat.report.{name}")


def _folder(run: str) -> Path:
    """Raises UserError where there is no such run."""
    folder = Path(run).expanduser() if "/" in run else run_dir(run)
    if not (folder / "metrics.jsonl").is_file() and not (folder / "stages.jsonl").is_file():
        known = sorted(path.parent.name for path in run_dir("x").parent.glob("*/*.jsonl"))
        raise UserError(f"no run {run} in {folder.parent}; there are {', '.join(dict.fromkeys(known)) or 'none'}")
    return folder.resolve()


if __name__ == "__main__":
    cli.run(main, Settings)
