"""The report of a run: every stage leaves a section, `generate` puts them together. __main__.py has the commands."""

import json
import os
import pkgutil
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat import hardware, ledger, paths
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, fields, parse_json
from nanochat.sections import STDERR_SUFFIXES, duration, metric_text, number, plain, sections_dir

TEMPLATES = paths.REPO / "report"
CURVE = "report_loss.svg"
# What Markdown gives a meaning: anywhere, at the end of a word, and at the beginning of a line
_MARKUP = re.compile(r"[\\`*~\[\]]|(?<![^\W_])_|_(?![^\W_])")
_BEGINS = re.compile(r"^(?!-$)( ?\d*)([-+#.)])(?=[ #]|$)")  # "-" alone is how nothing is written
_ENTITY = re.compile(r"&(?=#?\w+;)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
COLUMNS = tuple(dict.fromkeys(stage.column for stage in ledger.STAGES.values() if stage.column))
BPB_METRICS = ("val_bpb", "train_bpb")
EMPTY: dict[str, Any] = {"settings": {}, "metrics": {}, "facts": {}, "tables": [], "samples": [], "notes": []}
OFFLINE_SOURCES = frozenset({"pydocs"})


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
    draw = pkgutil.resolve_name("nanochat.report.plots:plots")  # an annex, which takes 0.5 s to import
    plots = draw(run_dir, report)
    report["curve"] = CURVE if any(plot.file == CURVE for plot in plots) else None
    report["plots"] = [{"file": plot.file, "about": plot.about} for plot in plots]

    environment = templates(escape)
    for section in sections if paths.is_writable(sections_dir(run_dir)) else []:
        text = environment.get_template("section.md.j2").render(section=section)
        atomic_write_text(sections_dir(run_dir) / f"{section['stage']}.md", text)
    files = {
        "report.md": environment.get_template("report.md.j2").render(report),
        "report.html": page("report.html.j2", {**report, "plots": plots, "highlights": highlights(report)}),
        "report.json": json.dumps(plain(report), indent=1) + "\n",
        **{plot.file: plot.svg for plot in plots},
    }
    return write_files(files, copy_to) / "report.md"


def write_files(files: Mapping[str, str], copy_to: Path) -> Path:
    """Write files to the store's report folder and to `copy_to`, and return the last of them that can be written.
    Raises UserError where neither can."""
    folders = [folder for folder in (paths.report_dir(), copy_to) if paths.is_writable(folder)]
    if not folders:
        raise UserError(f"neither {paths.report_dir()} nor {copy_to} can be written: call this from another folder")
    for folder in folders:
        for name, text in files.items():
            atomic_write_text(folder / name, text)
    return folders[-1]


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
        text = templates(finalize=None).select_template(names).render(section)  # escaped where they are shown
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


def highlights(report: Mapping[str, Any]) -> dict[str, str]:
    """What the page shows first: the scores of the last stage that has them, size and time."""
    found = {}
    for name, *cells in report["summary"]["rows"]:
        if name == "val bpb" or name.startswith(("CORE", "ChatCORE")):
            found[name.replace("val bpb", "bits per byte, held-out text")] = next(
                c for c in reversed(cells) if c != "-"
            )
    metrics = {section["stage"]: section["metrics"] for section in report["sections"]}.get("base_train", {})
    if isinstance(metrics.get("parameters"), int):
        found["parameters"] = f"{metrics['parameters'] / 1e6:,.1f}M"
    return found | ({"in all stages": duration(report["stage_seconds"])} if report["stages"] else {})


def _rank(name: str) -> tuple[int, str]:
    """CORE first, then bits per byte, then single tasks by name, ChatCORE last."""
    if name in BPB_METRICS:
        return 1, str(BPB_METRICS.index(name))
    lower = name.lower()
    return 3 if "chatcore" in lower else 0 if "core" in lower else 2, name


def page(template: str, values: Mapping[str, Any]) -> str:
    """A page of HTML that needs no other file; whatever the values say is text in it."""
    from markupsafe import Markup

    def text(value: Any) -> Any:
        return _CONTROL.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = templates(text, html=True)
    return str(environment.get_template(template).render(values))


def templates(finalize: Callable[[Any], Any] | None, html: bool = False) -> Any:
    """finalize: what is done with each value that a template shows."""
    import jinja2
    from markupsafe import Markup

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
        autoescape=html,  # for Markdown `finalize` is there
        finalize=finalize,
    )
    environment.filters.update(
        number=number,
        duration=duration,
        cell=cell,
        table=table,
        code=code,
        fence=fence,
        gib=lambda size: f"{size / 2**30:.1f} GiB",
        date=lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)),
        metric=metric_text,
        shown=shown_metrics,
        svg=Markup,
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


def table(rows: Sequence[Sequence[Any]], columns: Sequence[Any]) -> Markdown:
    """A Markdown table, all of whose columns but the first are numbers."""
    return Markdown("\n".join([cells(columns), f"|---|{'---:|' * (len(columns) - 1)}", *map(cells, rows)]))


def code(text: str) -> Markdown:
    """`text` as Markdown code within a line."""
    return Markdown(f"`{_CONTROL.sub('', text).replace('`', chr(39))}`")


def fence(text: str) -> Markdown:
    """`text` as a Markdown code block that nothing inside can close."""
    marks = "```"
    while marks in text:
        marks += "`"
    return Markdown(f"{marks}text\n{_CONTROL.sub(chr(0xFFFD), text)}\n{marks}")


def current_run() -> Path:
    """The named run; when none is named and nothing was started by hand, the run that was last at work."""
    if "NANOCHAT_RUN_ID" in os.environ:
        return paths.run_dir()
    ledgers = paths.run_dir().parent.glob("*/stages.jsonl")
    newest = max(ledgers, key=lambda path: path.stat().st_mtime, default=None)
    return paths.run_dir() if newest is None else newest.parent
