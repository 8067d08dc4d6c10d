"""Chat data sets of the Hugging Face hub: which files they are, how they get into the store, how tasks read them.

    task_data/hub/<task>/train-00000-of-00001.parquet ...   task_data/hub/<task>/manifest.json

Revisions are commits, so that everyone has the same items and scores can be compared. A file counts only once the
manifest names it; a split is read only when all of its files are there. Repositories and files: hub.jsonl beside this.
"""

import contextlib
import functools
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.files import atomic_write, read_jsonl, sha256_file, walk
from nanochat.paths import task_data_dir
from nanochat.tasks.common import Conversation, Split, Task

LOCAL = "local directory"
ORDER_SEED = 42

Check = Callable[[dict[str, Any]], object]  # raises UserError for a row that cannot be used


@dataclass(frozen=True)
class HubTask:
    """A dataset repository, the commit that is used, the parquet files of each split, the columns they must have."""

    repo: str
    revision: str
    files: dict[str, Sequence[str]]
    columns: Sequence[str]


_ROWS = read_jsonl(Path(__file__).with_suffix(".jsonl"))
HUB_TASKS = {row.pop("name"): HubTask(**row) for row in _ROWS}


class PublishedTask(Task):
    """Items of a hub data set in a fixed random order, read with the first of them (SmolTalk has 2 GB). Raises
    UserError where the data is absent."""

    published = True

    def __init__(self, split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split = split
        self.source = source_text(self.name)
        self._total = sum(entry["rows"] for entry in _present(self.name, split).values())

    @functools.cached_property
    def _tables(self) -> list[pa.Table]:
        return load_tables(self.name, self.split)

    def num_examples(self) -> int:
        return self._total

    def get_example(self, index: int) -> Conversation:
        number = fixed_order(self._total)[index]
        try:
            return self.conversation(_row(self._tables, number))
        except UserError as error:
            raise UserError(f"{self.name} {self.split}, row {number}: {error}") from None

    @classmethod
    def prepare(cls, name: str, source: str, from_dir: Path | None) -> None:
        provide(name, from_dir, cls.conversation)

    @staticmethod
    def conversation(row: dict[str, Any]) -> Conversation:
        """An item of the task from a row of the data set. Raises UserError for a row that cannot be used: every row is
        tried before its file counts, so that none ends a run hours later."""
        raise NotImplementedError


# ---- reading: what tasks use


def load_tables(task: str, split: str) -> list[pa.Table]:
    """The files of one split as Arrow tables with the columns of HUB_TASKS, read once a process. Raises UserError
    naming the command that gets the data when it is absent or damaged."""
    # what decides the content: the files with their sha256, and the columns
    files = tuple((folder(task) / name, entry["sha256"]) for name, entry in _present(task, split).items())
    return _read(files, tuple(HUB_TASKS[task].columns))


def load_rows(task: str, split: str) -> list[dict[str, Any]]:
    """All items of one split as dicts; for small data sets. Raises UserError like load_tables."""
    return [row for table in load_tables(task, split) for row in table.to_pylist()]


def _row(tables: Sequence[pa.Table], number: int) -> dict[str, Any]:
    for table in tables:
        if number < len(table):
            break
        number -= len(table)
    return dict(table.slice(number, 1).to_pylist()[0])


@functools.lru_cache(maxsize=16)
def fixed_order(count: int) -> Sequence[int]:
    """0 … count-1 in a random order that is always the same: that of `shuffle(seed=42)` of the datasets library, in
    which others take parts of these data sets, so that scores on the first n items compare. They lie sorted by subject
    or origin, and in this order the first n are a fair sample of all."""
    return tuple(np.random.default_rng(ORDER_SEED).permutation(count).tolist())


def source_text(task: str) -> str:
    """Where the items in the store come from, for reports: `openai/gsm8k at e53f048`; of the user's own files
    `local directory` with the beginnings of their sha256."""
    entries = parquet.load_manifest(folder(task))["files"].values()
    local = ", ".join(entry["sha256"][:8] for entry in entries if entry["origin"] == LOCAL)
    served = dict.fromkeys(f"{entry['origin']} at {str(entry.get('served'))[:7]}" for entry in entries)
    texts = [f"{LOCAL} (sha256 {local})" if text.startswith(f"{LOCAL} at ") else text for text in served]
    return " and ".join(texts) or f"{HUB_TASKS[task].repo} at {HUB_TASKS[task].revision[:7]}"


def folder(task: str) -> Path:
    return task_data_dir() / "hub" / task


def is_local(task: str, split: str) -> bool:
    """Whether a split in the store was copied from a folder."""
    return any(entry["origin"] == LOCAL for entry in _entries(task, split).values())


def _present(task: str, split: str) -> parquet.Manifest:
    """Manifest entries of a split, by file name. Raises UserError unless it is complete."""
    if split not in HUB_TASKS[task].files:
        raise UserError(f"{task} has no {split} split: it has {', '.join(HUB_TASKS[task].files)}")
    if not _is_complete(task, split):
        command = f"python -m scripts.chat_data --tasks={task}"
        raise UserError(f"no {split} items of {task} in {folder(task)}, or not all of them: run `{command}`")
    return _entries(task, split)


def _is_complete(task: str, split: str) -> bool:
    """Whether all files of a split are here as they came, those of the hub in the revision of HUB_TASKS."""
    found, usable = _entries(task, split), _usable(task, split)
    return usable.keys() == (found.keys() if is_local(task, split) else _names(task, split).keys())


def _names(task: str, split: str) -> dict[str, str]:
    """File name in the store -> path in the repository."""
    return {Path(path).name: path for path in HUB_TASKS[task].files[split]}


def _entries(task: str, split: str) -> parquet.Manifest:
    files = parquet.load_manifest(folder(task))["files"]
    return {name: files[name] for name in sorted(files) if files[name]["split"] == split}


def _usable(task: str, split: str) -> parquet.Manifest:
    """The entries of a split whose file is as it came, and is local or of the revision of HUB_TASKS."""
    revision = (HUB_TASKS[task].repo, HUB_TASKS[task].revision)
    return {
        name: entry
        for name, entry in _entries(task, split).items()
        if (entry["origin"] == LOCAL or (entry["origin"], entry.get("asked")) == revision)
        and parquet.is_here(folder(task) / name, entry)
    }


@functools.lru_cache(maxsize=16)
def _read(files: tuple[tuple[Path, str], ...], columns: tuple[str, ...]) -> list[pa.Table]:
    # not joined: what several writers have made, strings of three kinds and dictionaries of them, is no one table
    return [_read_file(path).select(list(columns)) for path, _ in files]


def _read_file(path: Path) -> pa.Table:
    """All of one parquet file. MMLU's train file holds a single column `train` of structs: its fields are taken."""
    try:
        file = pq.ParquetFile(path)
        rows = [batch for group in range(file.num_row_groups) for batch in parquet.batches(file, group)]
        table = pa.Table.from_batches(rows, file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): delete it and get it again") from None
    if table.column_names == ["train"] and pa.types.is_struct(table.schema.field(0).type):
        return pa.Table.from_struct_array(table.column(0))
    return table


# ---- getting


def provide(task: str, from_dir: Path | None, check: Check, elsewhere: bool = False) -> None:
    """Copy the train and test split from the folder `from_dir`, and fetch what is not there. check: tries every row.
    elsewhere: there are other items where the store has none, so nothing need be fetched."""
    taken = [] if from_dir is None else take_local(task, from_dir, check)
    if from_dir is not None and not taken:
        print(f"{task}: not in {from_dir}", flush=True)
    if not elsewhere or folder(task).exists():
        splits = [split for split in ("train", "test") if split in HUB_TASKS[task].files and split not in taken]
        fetch(task, splits, check)


def fetch(task: str, splits: Iterable[str], check: Check = bool) -> None:
    """Download what is not here of `splits`; local files in their place are replaced. Raises UserError like
    hub.download, and for files of another form; where the hub cannot be reached, local ones stay."""
    for split in splits:
        local = is_local(task, split)
        entries = {} if local else _usable(task, split)
        for name, path in _names(task, split).items():
            if name not in entries:
                otherwise = f"have {task}/{name} in a folder and give --from-dir=FOLDER"
                if local:
                    otherwise = "give --from-dir=FOLDER again to go on with the local files that are in use"
                entries[name] = _download(task, split, path, otherwise, check)
                _record(task, split, entries)


def _download(task: str, split: str, path: str, otherwise: str, check: Check) -> parquet.Manifest:
    from nanochat.data import hub  # huggingface_hub takes 0.5 s to import: only for those who download

    data, target = HUB_TASKS[task], folder(task) / Path(path).name
    entry: parquet.Manifest = {}
    try:
        commit = hub.download(
            data.repo,
            path,
            data.revision,
            target,
            verify=lambda temporary: entry.update(_describe(task, split, temporary, path, check)),
            otherwise=otherwise,
        )
    except UserError as error:
        with contextlib.suppress(OSError):
            folder(task).rmdir()  # where nothing came, nothing stays
        raise UserError(f"{task}: {error}") from None
    print(f"{task} {target.name}: {target.stat().st_size / 1e6:,.1f} MB, {entry['rows']:,} items", flush=True)
    return {**entry, "origin": data.repo, "asked": data.revision, "served": commit}


def take_local(task: str, origin: Path, check: Check = bool) -> list[str]:
    """Copy the splits of a task that lie in the folder `origin`; returns them. Equal files copied before are kept.
    Raises UserError as _find does, and for files that cannot be used."""
    found = _find(task, origin)
    for split, paths in found.items():
        _copy(task, split, paths, check)
    return list(found)


def not_in(origin: Path, tasks: Sequence[str]) -> list[str]:
    """Those of `tasks` that take_local would not find in the folder `origin`. Raises UserError as it does, and where it
    would find none of them: then another folder was meant."""
    absent = [task for task in tasks if not _find(task, origin)]
    if tasks and absent == list(tasks):
        example = f"{tasks[0].lower()}/train-*.parquet"
        raise UserError(f"--from-dir={origin}: none of {', '.join(tasks)} is there; expected folders as in {example}")
    return absent


def _find(task: str, origin: Path) -> dict[str, list[Path]]:
    """The files of each split that lies in `origin`, in folders named after the task or its repository, in any case:
    at the paths of the hub, else by file names that begin with the split, anywhere below. Raises UserError when files
    are missing, or could be meant in several ways."""
    if not origin.is_dir():
        raise UserError(f"--from-dir={origin}: no such folder")
    names = {task.casefold(), HUB_TASKS[task].repo.rpartition("/")[2].casefold()}
    roots = [path for path in sorted(origin.iterdir()) if path.is_dir() and path.name.casefold() in names]
    found = {split: _find_split(task, split, origin, roots) for split in HUB_TASKS[task].files}
    return {split: paths for split, paths in found.items() if paths}


def _find_split(task: str, split: str, origin: Path, roots: list[Path]) -> list[Path]:
    data = HUB_TASKS[task]
    for root in roots:
        exact = [root / path for path in data.files[split]]
        if all(path.is_file() for path in exact):
            return exact
    begins = re.compile(rf"{split}(?![A-Za-z])")
    files = (path for root in roots for path in walk(root) if path.suffix == ".parquet" and path.is_file())
    found = sorted(path for path in files if begins.match(path.name))
    if sum(other.repo == data.repo for other in HUB_TASKS.values()) > 1:  # the others' files may lie there as well
        found = [path for path in found if task.casefold() in str(path.relative_to(origin)).casefold().split("/")]
    folders = sorted({str(path.parent) for path in found})
    if len(folders) > 1:
        raise UserError(f"{task}: {split} files in {len(folders)} folders, {', '.join(folders[:3])}: keep one of them")
    if found and (count := re.search(r"-of-(\d+)\.parquet$", found[0].name)) and int(count[1]) != len(found):
        raise UserError(f"{task}: {len(found)} of {int(count[1])} {split} files are in {folders[0]}")
    return found


def _copy(task: str, split: str, found: list[Path], check: Check) -> None:
    old, usable, entries = _entries(task, split), _usable(task, split), {}
    for index, path in enumerate(found):
        name = f"{split}-{index:05d}-of-{len(found):05d}.parquet"
        target, entry = folder(task) / name, usable.get(name, {})
        if entry.get("origin") != LOCAL or entry["sha256"] != sha256_file(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as temporary:
                shutil.copyfile(path, temporary)
                entry = {**_describe(task, split, temporary, str(path), check), "origin": LOCAL}
        entries[name] = entry
    if entries != old:
        _record(task, split, entries)


def _record(task: str, split: str, entries: parquet.Manifest) -> None:
    """Make `entries` all there is of a split, and remove its other files."""
    target = folder(task)
    others = {name: entry for name, entry in parquet.load_manifest(target)["files"].items() if entry["split"] != split}
    about = {"repo": HUB_TASKS[task].repo, "revision": HUB_TASKS[task].revision}
    parquet.replace_shards(target, about, {**others, **entries}, f"{split}-*.parquet")


def _describe(task: str, split: str, path: Path, name: str, check: Check) -> parquet.Manifest:
    """Manifest entry of a file, every row of which is read and checked on the way. Raises UserError (under `name`) when
    it is not parquet, is empty, lacks columns, or has a row that cannot be used."""
    try:
        table = _read_file(path)
    except UserError as error:
        reason = str(error.__context__).splitlines()[0]
        raise UserError(f"{name}: expected a parquet file, found something else or half of one ({reason})") from None
    missing = [column for column in HUB_TASKS[task].columns if table.column_names.count(column) != 1]
    if missing:
        raise UserError(f"{name}: no column {', '.join(missing)}, found {', '.join(table.column_names)}")
    if not table.num_rows:
        raise UserError(f"{name}: no rows")
    number = 0
    try:
        for batch in table.select(list(HUB_TASKS[task].columns)).to_batches(max_chunksize=1):
            check(batch.to_pylist()[0])
            number += 1
    except (UserError, ValueError, pa.ArrowException) as error:  # ValueError: bytes that are no text
        raise UserError(f"{name}: row {number}: {' '.join(str(error).split())}") from None
    return {"split": split, "size": path.stat().st_size, "sha256": sha256_file(path), "rows": table.num_rows}
