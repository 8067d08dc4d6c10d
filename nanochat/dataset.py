"""Where raw text comes from: the hub, a mirror of it, this machine's own documentation, or a local folder.

    python -m nanochat.dataset -n 8                      FineWeb-Edu, 8 train shards and the validation shard
    python -m nanochat.dataset -n 8 --source=climbmix    ClimbMix
    python -m nanochat.dataset --source=pydocs           documentation of the installed Python packages, no network
    python -m nanochat.dataset --source=local:DIR        parquet, jsonl, csv or txt files below DIR

Run it again to go on where it stopped; shards that are here are not fetched again. HF_ENDPOINT names a mirror.
"""

import pkgutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanochat.cli import alias, as_dict, int_flag, run, start
from nanochat.data import parquet
from nanochat.data.sources import SPLITS, HubSource, canonical, find_source, source_flag
from nanochat.errors import UserError
from nanochat.paths import data_dir
from nanochat.sections import keeps_results, write_section


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Get raw text as parquet shards; what is here already is kept."""

    num_files: Annotated[int, int_flag(gte=-1), alias("-n")] = -1
    """Train shards to have, -1 for all; the validation shard comes on top. pydocs and converted folders: always all."""

    num_workers: Annotated[int, int_flag(gte=1, lte=64), alias("-w")] = 4
    """Files fetched at the same time."""

    source: Annotated[str, source_flag("Where the text comes from")] = "fineweb-edu"


def check(settings: Settings) -> None:
    """Raises UserError where the source cannot be, without asking the network for it."""
    name, count, source = settings.source, settings.num_files, find_source(settings.source)
    if isinstance(source, HubSource):
        from nanochat.data import hub  # as below

        if count > source.last:
            raise UserError(
                f"-n {count}: {name} has {source.last} train shards; choose 0 to {source.last}, or -1 for all"
            )
        hub.check_connection()


if __name__ == "__main__":
    start(Settings, check)

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def main(settings: Settings) -> None:
    """Get what `settings` ask for. Raises UserError for an unknown source, and whatever the source raises."""
    check(settings)
    source = canonical(settings.source)
    known = find_source(source)
    if isinstance(known, HubSource):
        train = known.last if settings.num_files == -1 else settings.num_files
        fetch_files(
            {"source": source, "kind": "hub", "synthetic": False, "repo": known.repo, "revision": known.revision},
            data_dir(source),
            {parquet.shard_name(known.last): "val", **dict.fromkeys(map(parquet.shard_name, range(train)), "train")},
            describe=parquet.describe,
            otherwise="use --source=pydocs, which needs none",
            num_workers=settings.num_workers,
        )
    else:
        pkgutil.resolve_name(known)(source, settings.num_files)
    manifest = parquet.load_manifest(data_dir(source))
    rows = []
    for split in SPLITS:
        entries = [entry for entry in manifest["files"].values() if entry["split"] == split]
        documents, size = (sum(entry[key] for entry in entries) for key in ("documents", "utf8_bytes"))
        print(f"{source} {split}: {len(entries)} shards, {documents:,} documents, {size / 1e6:,.1f} MB of text")
        rows.append([split, len(entries), documents, size])
    print(f"in {data_dir(source)}")
    table = {"title": "Text", "columns": ["Split", "Shards", "Documents", "Bytes"], "rows": rows}
    about = {key: value for key, value in manifest.items() if key != "files"}
    if keeps_results():
        write_section("dataset", "Dataset", {"settings": as_dict(settings), "metrics": about, "tables": [table]})


# ---- Getting


def fetch_files(
    about: parquet.Manifest,
    folder: Path,
    wanted: Mapping[str, str],
    *,
    describe: Callable[[Path, str, str], parquet.Manifest],
    otherwise: str,
    num_workers: int,
) -> None:
    """Download those files of `wanted` (name -> split) that do not stand in `folder` as its manifest has them.

    about: facts for the manifest, of which `source`, `repo` and `revision` are used here; the last only where the
    manifest does not know a commit yet. describe(path, split, name) -> manifest entry; raises UserError where the file
    is not what it should be, and it is not kept. `otherwise` says what one can do without the hub. Raises UserError as
    hub.download does.
    """
    from nanochat.data import hub  # huggingface_hub takes 0.5 s to import: only for those who download

    manifest = parquet.load_manifest(folder)
    missing = [name for name in wanted if not parquet.is_here(folder / name, manifest["files"].get(name))]
    if len(wanted) > len(missing):
        print(f"{about['source']}: {len(wanted) - len(missing)} of {len(wanted)} files are here")
    if not missing:
        return
    stop = threading.Event()
    entries: parquet.Manifest = {}
    with progress_bar() as progress:

        def get(name: str, revision: str) -> str:
            task = progress.add_task(name, total=None)
            commit = hub.download(
                about["repo"],
                name,
                revision,
                folder / name,
                verify=lambda path: entries.update({name: describe(path, wanted[name], name)}),
                otherwise=otherwise,
                on_bytes=lambda done, total: progress.update(task, completed=done, total=total or None),
                stop=stop,
            )
            parquet.update_manifest(folder, {**about, "revision": commit}, {name: entries[name]})
            progress.remove_task(task)
            counted = parquet.counted(entries[name])
            print(f"{name}: {entries[name]['size'] / 1e6:,.1f} MB, {entries[name][counted]:,} {counted}", flush=True)
            return commit

        # the first one alone: it fixes the commit for all others, and where there is no network it says so once
        commit = get(missing[0], {**about, **manifest}["revision"])
        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(get, name, commit) for name in missing[1:]]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def progress_bar(in_bytes: bool = True) -> Progress:
    """Bars on a terminal; elsewhere nothing: what is done prints its line."""
    console = Console()
    sizes = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else []
    columns = [TextColumn("{task.description}"), BarColumn(), *sizes, TimeRemainingColumn()]
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


if __name__ == "__main__":
    run(main, Settings)
