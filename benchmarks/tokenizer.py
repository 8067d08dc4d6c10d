"""Time and memory of training a tokenizer and of encoding with it, ours beside those that are published.

    pip install --target=PEERS rustbpe==0.1.0 gigatoken==0.10.0
    python -m benchmarks.tokenizer --source=DIR --peers=PEERS --out=tokenizer.json
    python -m benchmarks.tokenizer --source=DIR --peers=PEERS --pattern=gpt4       or gpt2: gigatoken knows it, too
    python -m benchmarks.tokenizer --source=DIR --vocab-size=65536 --megabytes=150

Everything is timed in a process of its own, one tokenizer after the other in every round, and the fastest round counts.
Outputs are compared: ranks with ours, token ids with ours on our ranks. Memory is the peak above what the process held
with the corpus loaded (Linux only). "First" is the first pass of a new tokenizer, "warm" the fastest over the same text
again. PEERS comes first on the path of the published tokenizers only, for one of them has the name of ours.
"""

import gc
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.output import Output, write_json
from nanochat import cli
from nanochat.cli import int_flag
from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.tokenizer import byte_letters, huggingface_json, parse_ranks, rank_lines

Ranks = list[tuple[bytes, int]]
Ways = dict[str, Callable[[list[str]], Any]]  # name -> how to encode a list of texts
Row = dict[str, Any]
Rows = dict[tuple[str, str, int], Row]  # what, by which tokenizer, on how many threads

PATTERNS = {
    "default": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
OURS, RUSTBPE, TOKENIZERS, TIKTOKEN = "ours", "rustbpe", "tokenizers", "tiktoken"
GIGATOKEN = "gigatoken"
TRAINERS = (OURS, RUSTBPE, TOKENIZERS)
ENCODERS = (OURS, RUSTBPE, TOKENIZERS, TIKTOKEN, GIGATOKEN)
WARM_PASSES = 3  # at least; more while they take less than a second together: each thread has a cache to warm
WORKER = "import sys; sys.path[:0] = {path}; from benchmarks.tokenizer import work; work()"


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """Measure tokenizers."""

    source: str
    """Folder of parquet files with a column `text`."""
    peers: str | None = None
    """Folder of published tokenizers, as `pip install --target` makes it."""
    pattern: Literal["default", "gpt4", "gpt2"] = "default"
    """Split pattern: ours, GPT-4's, or GPT-2's."""
    vocab_size: Annotated[int, int_flag(gte=256)] = 32_768
    """Tokens to learn: 32,768 or 65,536, say."""
    megabytes: Annotated[int, int_flag(gte=1)] = 100
    """Text to train on, in MB of 10^6 bytes."""
    held_out_megabytes: Annotated[int, int_flag(gte=1)] = 20
    """Text to encode, from the other end of the folder."""
    threads: Annotated[int, int_flag(gte=1)] = os.cpu_count() or 1
    """Threads of the runs on all threads."""
    repeats: Annotated[int, int_flag(gte=1)] = 3
    """Rounds."""


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """What one process measures."""

    tokenizer: str
    action: Literal["train", "encode"]
    ranks: str
    """File of our ranks, written by the first training."""


# ---- in the worker


def work() -> None:
    """Do the job on standard input; print a result for each way as JSON."""
    job = Job(**json.load(sys.stdin))
    print(json.dumps(list(train(job) if job.action == "train" else encode(job))))


def documents(job: Job) -> list[str]:
    """The first texts of the folder for training, the last ones for encoding."""
    files = sorted(Path(job.source).glob("*.parquet"), reverse=job.action == "encode")
    megabytes = job.megabytes if job.action == "train" else job.held_out_megabytes
    found = itertools.chain.from_iterable(map(parquet.read_documents, files))
    texts = list(parquet.up_to(found, megabytes * 10**6, parquet.utf8_bytes))
    if (size := megabytes_of(texts)) < megabytes:
        raise UserError(f"{job.source} holds {size:.0f} MB of text, {megabytes} MB are asked for")
    return texts


def megabytes_of(texts: list[str]) -> float:
    return sum(map(parquet.utf8_bytes, texts)) / 1e6


def timed(call: Callable[[], Any]) -> tuple[float, int | None, Any]:
    """(seconds, peak bytes beyond those held before, what came out). No bytes where Linux's /proc is not there."""
    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
        before = _peak_bytes()
    except OSError:
        before = None
    start = time.perf_counter()
    output = call()
    seconds = time.perf_counter() - start
    return seconds, None if before is None else _peak_bytes() - before, output


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def digest(output: Any) -> str:
    return hashlib.sha256(json.dumps(output).encode()).hexdigest()


def train(job: Job) -> Iterator[Row]:
    texts = documents(job)
    model, learn = trainer(job, texts)
    seconds, peak, _ = timed(learn)
    byte = {letter: value for value, letter in enumerate(byte_letters())}
    pairs = model.get_vocab().items() if job.tokenizer == TOKENIZERS else model.get_mergeable_ranks()
    ranked = sorted((rank, bytes(map(byte.get, token) if isinstance(token, str) else token)) for token, rank in pairs)
    lines = rank_lines([token for _, token in ranked])
    if job.tokenizer == OURS:
        Path(job.ranks).write_bytes(lines)
    yield {"what": "train", "seconds": seconds, "megabytes": megabytes_of(texts), "peak_bytes": peak,
           "output": digest([lines.decode(), [rank for rank, _ in ranked]])}  # fmt: skip


def trainer(job: Job, texts: list[str]) -> tuple[Any, Callable[[], Any]]:
    """A model, and what trains it; all that comes before is done."""
    if job.tokenizer == TOKENIZERS:
        from tokenizers import trainers

        # As special tokens, the bytes get the ids of their values, and ties fall as elsewhere.
        how = trainers.BpeTrainer(vocab_size=job.vocab_size, show_progress=False, special_tokens=byte_letters())
        model = hugging_face(job, [])
        return model, lambda: model.train_from_iterator(iter(texts), trainer=how)
    import rustbpe

    model = rustbpe.Tokenizer()
    return model, lambda: model.train_from_iterator(iter(texts), job.vocab_size, pattern=PATTERNS[job.pattern])


def hugging_face(job: Job, ranks: Ranks) -> Any:
    """A tokenizer of the `tokenizers` library with these ranks."""
    import tokenizers

    # its engine reads `{1,3}+` as a group repeated, and `$` as the end of a line
    pattern = PATTERNS[job.pattern].replace("3}+", "3}").replace("$", r"\z")
    return tokenizers.Tokenizer.from_str(huggingface_json(dict(ranks), pattern, ()))


def encode(job: Job) -> Iterator[Row]:
    """Seconds of each way to encode, and what came out."""
    texts = documents(job)
    ranks = parse_ranks(Path(job.ranks).read_bytes())
    for way in encoders(job, ranks):
        call = partial(encoders(job, ranks)[way], texts)  # one that has seen no text
        first, peak, output = timed(call)
        output = [list(map(int, ids)) for ids in output]
        passes: list[float] = []
        while len(passes) < WARM_PASSES or sum(passes) < 1:
            passes.append(timed(call)[0])
        yield {"what": f"encode {way}", "first": first, "warm": min(passes), "megabytes": megabytes_of(texts),
               "peak_bytes": peak, "tokens": sum(map(len, output)), "output": digest(output)}  # fmt: skip
        del output


def encoders(job: Job, ranks: Ranks) -> Ways:
    """A new tokenizer's ways to encode: one text after the other and in batches; with several threads batches only."""
    one, batches = encoder(job, ranks)
    return batches if job.threads > 1 else {"one by one": lambda texts: list(map(one, texts))} | batches


def encoder(job: Job, ranks: Ranks) -> tuple[Callable[[str], Any], Ways]:
    pattern, threads = PATTERNS[job.pattern], job.threads
    if job.tokenizer == OURS:
        import rustbpe

        ours = rustbpe.Tokenizer.from_ranks(ranks, pattern)
        # As nanochat.tokenizer does.
        arrays, kind = (ours.batch_encode_u16, "H") if len(ranks) <= 1 << 16 else (ours.batch_encode_u32, "I")

        def as_arrays(texts: list[str]) -> Any:  # offsets into one array of tokens: cutting it up costs nothing
            tokens, offsets = (memoryview(part) for part in arrays(texts, num_threads=threads))
            return (tokens.cast(kind)[start:end] for start, end in itertools.pairwise(offsets.cast("Q")))

        return ours.encode, {"batch": partial(ours.batch_encode, num_threads=threads), "batch, arrays": as_arrays}
    if job.tokenizer == RUSTBPE:
        published = trained(replace(job, action="train"))
        return published.encode, {"batch": published.batch_encode}
    if job.tokenizer == TIKTOKEN:
        import tiktoken

        encoding = tiktoken.Encoding("same", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
        return encoding.encode_ordinary, {"batch": partial(encoding.encode_ordinary_batch, num_threads=threads)}
    if job.tokenizer == GIGATOKEN:
        import gigatoken

        if job.pattern == "default":
            raise UserError("gigatoken does not know this pattern; see --pattern=gpt4")
        giga, parallel = gigatoken.Tokenizer.from_tiktoken(job.ranks, pretokenizer=job.pattern), threads > 1
        return giga.encode, {
            "batch": partial(giga.encode_batch_list, parallel=parallel),
            "batch, arrays": partial(giga.encode_batch, parallel=parallel),
        }
    hugging = hugging_face(job, ranks)
    return lambda text: hugging.encode(text, add_special_tokens=False).ids, {
        "batch": lambda texts: [done.ids for done in hugging.encode_batch_fast(texts, add_special_tokens=False)]
    }


@cache
def trained(job: Job) -> Any:
    """A tokenizer that cannot load ranks, but learns the same ones; it remembers no words, so it may be shared."""
    model, learn = trainer(job, documents(job))
    learn()
    return model


# ---- in the process that asks


def run_job(job: Job) -> list[Row]:
    """The job's results, or one with an `error` of one line."""
    rayon = {"RAYON_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": str(job.threads > 1).lower()}
    path = [os.path.abspath(job.peers)] if job.tokenizer != OURS and job.peers else []
    if job.tokenizer == RUSTBPE and not path:
        return [{"what": job.action, "error": "not installed"}]
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(path=path)],
        input=json.dumps(asdict(job)),
        env=os.environ | rayon,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    last = (done.stderr.strip().splitlines() or ["died"])[-1]
    missing = f"No module named '{job.tokenizer}'" in last
    return [{"what": job.action, "error": "not installed" if missing else last.split("UserError: ")[-1]}]


def main(settings: Settings) -> None:
    from nanochat.hardware import hardware  # with torch, which the workers do without

    if not list(Path(settings.source).glob("*.parquet")):
        raise UserError(f"{settings.source} holds no parquet files")
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(settings.repeats):
            for action, names in (("train", TRAINERS), ("encode", ENCODERS)):
                for threads, name in itertools.product(sorted({1, settings.threads}), names):
                    given = asdict(settings) | {"threads": threads, "tokenizer": name, "action": action}
                    keep_fastest(rows, Job(**given, ranks=os.path.join(folder, "ours.tiktoken")))
    compare(rows)
    cpu = hardware()["processor"]
    print(f"{cpu}: pattern {settings.pattern}, {settings.vocab_size:,} tokens from {settings.megabytes} MB, "
          f"{settings.held_out_megabytes} MB encoded")  # fmt: skip
    print(table(rows))
    report = {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(settings, name) for name in ENCODERS[1:]},
        "settings": cli.as_dict(settings, without=["out"])
        | {"source": Path(settings.source).name, "peers": bool(settings.peers)},
        "rows": list(rows.values()),
    }
    write_json(settings, report)
    wrong = [row for row in rows.values() if row.get("same") is False and row["tokenizer"] in (RUSTBPE, TIKTOKEN)]
    if wrong:
        raise UserError(f"{wrong[0]['tokenizer']} gives another output than ours: see the table")


def keep_fastest(rows: Rows, job: Job) -> None:
    """Do the job, and keep the least of each of its numbers over all rounds."""
    for found in run_job(job):
        if "error" in found and job.tokenizer == OURS:
            raise UserError(f"ours fails: {found['error']}")
        row = rows.setdefault(
            (found["what"], job.tokenizer, job.threads), {"tokenizer": job.tokenizer, "threads": job.threads} | found
        )
        for figure in ("seconds", "first", "warm", "peak_bytes"):
            if row.get(figure) is not None and found.get(figure) is not None:
                row[figure] = min(row[figure], found[figure])


def compare(rows: Rows) -> None:
    """Mark every row by whether its output is ours: the ranks of training, the token ids of encoding."""
    ours = {what.split()[0]: row["output"] for (what, name, _), row in rows.items() if name == OURS}
    for (what, _, _), row in rows.items():
        if "output" in row:
            row["same"] = row["output"] == ours[what.split()[0]]


def table(rows: Rows) -> str:
    head = f"{'first':>17} {'ours is':>8} {'warm':>17} {'ours is':>8} {'peak':>8} output"
    lines = [f"{'':<22} {'threads':>7} {'':<11} {head}"]
    for what, name, threads in sorted(rows, key=lambda key: (not key[0].startswith("train"), key[2], key[0])):
        row, start = rows[what, name, threads], f"{what:<22} {threads:>7} {name:<11}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        ours = rows[what, OURS, threads]
        cells = [
            f"{row[time]:6.3f} s {row['megabytes'] / row[time]:4.0f} MB/s {row[time] / ours[time]:7.1f}x"
            for time in ("seconds", "first", "warm")
            if time in row
        ]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:5.0f} MB"
        lines.append(f"{start} {' '.join(cells):<53} {peak:>8} {'same' if row['same'] else 'DIFFERS'}")
    return "\n".join(lines)


def version(settings: Settings, name: str) -> str | None:
    """The version that was measured, if any."""
    paths = [settings.peers] if settings.peers else []
    for found in importlib.metadata.distributions(name=name, path=paths + ([] if name == RUSTBPE else sys.path)):
        return found.version
    return None


if __name__ == "__main__":
    cli.run(main, Settings)
