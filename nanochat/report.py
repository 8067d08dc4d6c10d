"""The report of a run: every stage leaves a section, `generate` puts them together.

    python -m nanochat.report generate     report.md, report.json, report_loss.svg; copied to the current directory
    python -m nanochat.report reset        forget the sections of the current run

The run is the one named by NANOCHAT_RUN_ID, otherwise the one that was last at work.
"""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat import cli, hardware, ledger, paths
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, fields, parse_json, read_jsonl
from nanochat.sections import STDERR_SUFFIXES, duration, metric_text, number, plain, sections_dir

TEMPLATES = paths.REPO / "report"
CURVE = "report_loss.svg"
CURVES = {
    "Loss/train_loss": "Training loss (nats per token)",
    "Loss/val_bpb": "Validation bits per byte",
    "Loss/val_loss": "Validation loss (nats per token)",
}
MOST_POINTS = 800  # of a curve
# What Markdown gives a meaning: anywhere, at the end of a word, and at the beginning of a line
_MARKUP = re.compile(r"[\\`*~\[\]]|(?<![^\W_])_|_(?![^\W_])")
_BEGINS = re.compile(r"^(?!-$)( ?\d*)([-+#.)])(?=[ #]|$)")  # "-" alone is how nothing is written
_ENTITY = re.compile(r"&(?=#?\w+;)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
DARK_PAGE = "<style>@media (prefers-color-scheme: dark) { svg { filter: invert(0.9) hue-rotate(180deg) } }</style>"

COLUMNS = tuple(dict.fromkeys(stage.column for stage in ledger.STAGES.values() if stage.column))
BPB_METRICS = ("val_bpb", "train_bpb")
EMPTY: dict[str, Any] = {"settings": {}, "metrics": {}, "facts": {}, "tables": [], "samples": [], "notes": []}
OFFLINE_SOURCES = frozenset({"pydocs"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Put the report of a run together, or forget its sections."""

    action: Literal["generate", "reset"] = "generate"
    """generate or reset"""
    usd_per_hour: Annotated[float | None, cli.float_flag(gte=0)] = None
    """What the machine costs, for what the run has cost; default: that is left out."""


def reset(run_dir: Path) -> None:
    """Remove the sections of a run. Its ledger, logs and metrics stay."""
    shutil.rmtree(sections_dir(run_dir), ignore_errors=True)
    print(f"run {run_dir.name}: no sections left")


def generate(run_dir: Path, copy_to: Path, usd_per_hour: float | None = None) -> Path:
    """Write the report of a run to the store and copy it to `copy_to`. Returns the path of report.md there.

    Raises UserError when the run has left nothing to report.
    """
    records = ledger.read(run_dir)
    status = {row["stage"]: row["status"] for row in ledger.summarize(records)}
    # what a stage left in an earlier call may not belong to the models of this one; one that is pending or has no
    # record was started by hand
    shown = {"finished", "pending"}
    sections = [section for section in read_sections(run_dir) if status.get(section["stage"], "pending") in shown]
    sections = [{**section, "notes": notes(section)} for section in sections]
    if not sections and not records:
        raise UserError(f"nothing to report in {run_dir}: run a stage first (bash speedrun.sh), or set NANOCHAT_RUN_ID")
    report = collect(run_dir.name, sections, records, usd_per_hour)
    curve = loss_curve(run_dir)
    report["curve"] = CURVE if curve else None

    environment = _templates(escape)
    for section in sections if paths.is_writable(sections_dir(run_dir)) else []:
        text = environment.get_template("section.md.j2").render(section=section)
        atomic_write_text(sections_dir(run_dir) / f"{section['stage']}.md", text)
    files = {
        "report.md": environment.get_template("report.md.j2").render(report),
        "report.json": json.dumps(plain(report), indent=1) + "\n",
        **({CURVE: curve} if curve else {}),
    }
    folders = [folder for folder in (paths.report_dir(), copy_to) if paths.is_writable(folder)]
    if not folders:
        raise UserError(f"neither {paths.report_dir()} nor {copy_to} can be written: call this from another folder")
    for folder in folders:
        for name, text in files.items():
            atomic_write_text(folder / name, text)
    return folders[-1] / "report.md"


def read_sections(run_dir: Path) -> list[dict[str, Any]]:
    """All sections of a run in the order of the pipeline; stages it does not know come last."""
    sections = []
    for path in sorted(sections_dir(run_dir).glob("*.json")):
        try:
            section = {**EMPTY, "synthetic": False, **parse_json(path.read_bytes())}
            _check(section, path.stem)
            sections.append(section)
        except (ValueError, TypeError, UserError) as error:
            what = "is damaged" if isinstance(error, UserError) else "is not valid JSON"
            raise UserError(f"{path} {what} ({error}): remove it and run that stage again") from None
    order = {name: place for place, name in enumerate(ledger.STAGES)}
    return sorted(sections, key=lambda section: (order.get(section["stage"], len(order)), section["time"]))


def _check(section: dict[str, Any], stage: str) -> None:
    """Raises UserError where a section is not as write_section leaves it."""
    fields(section, stage=str, title=str, settings=dict, metrics=dict, facts=dict, tables=list, samples=list)
    fields(section, notes=list[str])
    if section["stage"] != stage:  # a file of that name is written
        raise UserError(f"stage {section['stage']!r} in the file of {stage}")
    if not isinstance(section.get("time"), int | float) or not 0 <= section["time"] < 1e11:
        raise UserError(f"time is {section.get('time')!r}, expected seconds")
    for table in section["tables"]:
        _, columns, rows = fields(table, title=str, columns=list[str], rows=list)
        if not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
            raise UserError(f"table {table['title']!r} has a row that is not one of {len(columns)} values")
    for sample in section["samples"]:
        fields({"prompt": "", **sample} if isinstance(sample, dict) else sample, prompt=str, text=str)


def notes(section: Mapping[str, Any]) -> list[str]:
    """The sentences below a section: one for each paragraph of report/notes/<stage>.md.j2 (chat_eval_mid, _sft and _rl
    share chat_eval.md.j2), which sees the section's settings, metrics and facts. No report fails for a sentence: where
    the section lacks a value that the template shows, the note says so."""
    import jinja2

    stage = section["stage"]
    names = [f"notes/{name}.md.j2" for name in (stage, stage.rpartition("_")[0])]
    try:
        text = _templates(finalize=None).select_template(names).render(section)  # escaped where they are shown
    except jinja2.TemplatesNotFound:
        text = ""
    except (jinja2.UndefinedError, TypeError, ValueError) as error:
        text = f"No notes: another version of the code left this section ({error}); run the stage again."
    return [*section["notes"], *(" ".join(part.split()) for part in text.split("\n\n") if part.strip())]


def collect(
    run: str, sections: list[dict[str, Any]], records: list[ledger.Record], usd_per_hour: float | None
) -> dict[str, Any]:
    """Everything that the report shows, as plain data; this is report.json."""
    newest: ledger.Record = next((record for record in reversed(records) if record.get("profile")), {})
    stages = [
        {
            "stage": row["stage"],
            "status": "running or killed" if row["status"] == "started" else row["status"],
            "seconds": row.get("seconds"),
            "commit": row.get("commit"),
            "note": row.get("reason") or (f"exit code {row['exit_code']}" if row.get("exit_code") else ""),
        }
        for row in (ledger.summarize(records) if records else [])
    ]
    stage_seconds = sum(row["seconds"] or 0.0 for row in stages)
    return {
        "title": f"nanochat report: {run}{data_label(sections)}",
        "run": run,
        "profile": newest.get("profile"),
        "command": newest.get("continue"),
        "generated": time.time(),
        "git": hardware.git(),
        "hardware": hardware.hardware(),
        "software": hardware.software(),
        "cost": {
            "usd_per_hour": usd_per_hour,
            "usd": None if usd_per_hour is None else usd_per_hour * stage_seconds / 3600,
        },
        "stages": stages,
        "stage_seconds": stage_seconds,
        "wall_clock_seconds": ledger.span_seconds(records),
        "summary": summary(sections),
        "sections": sections,
    }


def data_label(sections: list[dict[str, Any]]) -> str:
    """What the title has to say about the data, e.g. ` (offline text; synthetic data in base_eval)`."""
    offline = sorted({section["settings"].get("source") for section in sections} & OFFLINE_SOURCES)
    synthetic = [section["stage"] for section in sections if section["synthetic"]]
    words = [f"offline text: {', '.join(offline)}"] if offline else []
    words += [f"synthetic data in {', '.join(synthetic)}"] if synthetic else []
    return f" ({'; '.join(words)})" if words else ""


def summary(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """The table Metric x BASE/MID/SFT/RL: {columns, rows}, only with columns that some stage has filled.

    Where two stages of a column give the same metric, the later stage counts: it measures on more.
    """
    cells: dict[str, dict[str, str]] = {}
    for stage, metrics in ((section["stage"], section["metrics"]) for section in sections):
        column = ledger.STAGES[stage].column if stage in ledger.STAGES else None
        for name in shown_metrics(metrics) if column else ():
            bare = name.rsplit("/", 1)[-1]  # Loss/val_bpb -> val_bpb
            counts = name != "step" and ("_eval" in stage or bare in BPB_METRICS)
            if column and counts and isinstance(metrics[name], int | float):
                cells.setdefault(bare, {})[column] = metric_text(metrics, name)
    columns = [column for column in COLUMNS if any(column in row for row in cells.values())]
    rows = [
        [name.replace("_", " "), *(cells[name].get(column, "-") for column in columns)]
        for name in sorted(cells, key=_rank)
    ]
    return {"columns": ["Metric", *columns], "rows": rows}


def _rank(name: str) -> tuple[int, str]:
    """CORE first, then bits per byte, then single tasks by name, ChatCORE last."""
    if name in BPB_METRICS:
        return 1, str(BPB_METRICS.index(name))
    lower = name.lower()
    return 3 if "chatcore" in lower else 0 if "core" in lower else 2, name


def loss_curve(run_dir: Path) -> str | None:
    """Training loss and validation bpb of base training over tokens as SVG, readable on light and dark pages; None
    when there are no points. The same points always give the same text."""
    records = [record for record in read_jsonl(run_dir / "metrics.jsonl") if record.get("stage") == "base"]
    curves = {}
    for name, title in CURVES.items():
        points = [(record["tokens"], record[name]) for record in records if isinstance(record.get(name), int | float)]
        if points:
            stride = math.ceil(len(points) / MOST_POINTS)
            curves[title] = [*points[:-1:stride], points[-1]]
    return _draw(curves) if curves else None


def _draw(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    import matplotlib  # half a second, which only the report pays
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "nanochat", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.5 * len(curves), 3), layout="constrained")
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        for axis, (title, points) in zip(axes, curves.items(), strict=True):
            axis.plot(*zip(*points, strict=True), marker="." if len(points) <= 32 else "")
            axis.set(title=title, xlabel="tokens")
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
            axis.grid(alpha=0.3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().replace("<defs>", f"<defs>{DARK_PAGE}", 1)


def _templates(finalize: Callable[[Any], Any] | None) -> Any:
    """finalize: what is done with each value that a template shows."""
    import jinja2

    class Environment(jinja2.Environment):
        """`facts.items` is the fact of that name, and only without one the method of dict."""

        def getattr(self, obj: Any, attribute: str) -> Any:
            return obj[attribute] if isinstance(obj, dict) and attribute in obj else super().getattr(obj, attribute)

    environment = Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # this is Markdown, for which `finalize` is
        finalize=finalize,
    )
    environment.filters.update(
        number=number,
        duration=duration,
        cell=cell,
        cells=cells,
        header=header,
        code=code,
        fence=fence,
        gib=lambda size: f"{size / 2**30:.1f} GiB",
        date=lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)),
        metric=metric_text,
        shown=shown_metrics,
    )
    return environment


def shown_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Names of metrics that get a line of their own; a standard error is shown beside its metric."""
    return [name for name in metrics if not name.endswith(STDERR_SUFFIXES)]


class Markdown(str):
    """Text that stays as it is in a template; any other is escaped."""


def escape(value: Any) -> Any:
    """What a template shows, as text within a line of Markdown: prompts, names and notes from elsewhere can be neither
    HTML nor links nor headings, nor commands to a terminal."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    text = _MARKUP.sub(r"\\\g<0>", _CONTROL.sub("\ufffd", re.sub(r"\s+", " ", value)))
    text = _ENTITY.sub("&amp;", _BEGINS.sub(r"\1\\\2", text))
    return Markdown(text.replace("<", "&lt;").replace(">", "&gt;"))


def cell(value: Any) -> Markdown:
    """A value as one cell of a Markdown table."""
    return Markdown(escape(number(value)).replace("|", "\\|"))


def cells(row: Sequence[Any]) -> Markdown:
    """A line of a Markdown table."""
    return Markdown(f"| {' | '.join(map(cell, row))} |")


def header(columns: Sequence[Any]) -> Markdown:
    """The first two lines of a table, all of whose columns but the first are numbers."""
    return Markdown(f"{cells(columns)}\n|---|{'---:|' * (len(columns) - 1)}")


def code(text: str) -> Markdown:
    """`text` as Markdown code within a line."""
    return Markdown(f"`{_CONTROL.sub('', text).replace('`', chr(39))}`")


def fence(text: str) -> Markdown:
    """`text` as a Markdown code block that nothing inside can close."""
    marks = "```"
    while marks in text:
        marks += "`"
    return Markdown(f"{marks}text\n{_CONTROL.sub(chr(0xFFFD), text)}\n{marks}")


def _current_run() -> Path:
    """The named run; when none is named and nothing was started by hand, the run that was last at work."""
    if "NANOCHAT_RUN_ID" in os.environ:
        return paths.run_dir()
    ledgers = paths.run_dir().parent.glob("*/stages.jsonl")
    newest = max(ledgers, key=lambda path: path.stat().st_mtime, default=None)
    return paths.run_dir() if newest is None else newest.parent


def main(settings: Settings) -> None:
    run_dir = _current_run()
    if settings.action == "reset":
        reset(run_dir)
    else:
        print(f"report of run {run_dir.name}: {generate(run_dir, Path.cwd(), settings.usd_per_hour)}")


if __name__ == "__main__":
    cli.run(main, Settings)
