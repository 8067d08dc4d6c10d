"""Time and memory of training a tokenizer and of encoding with it, ours beside those that are published.

    pip install --target=PEERS rustbpe==0.1.0 gigatoken==0.10.0 fastokens==0.3.5
    python -m benchmarks.tokenizer --source=DIR --peers=PEERS --out=tokenizer.json
    python -m benchmarks.tokenizer --source=DIR --peers=PEERS --pattern=gpt4       or gpt2: gigatoken knows it, too
    python -m benchmarks.tokenizer --source=DIR --vocab-size=65536 --megabytes=150

DIR holds parquet files with a column `text`: the first ones are trained on, the last ones encoded. Everything is timed
in a process of its own, one tokenizer after the other in every round, and the fastest round counts. Before any time is
shown, outputs are compared: ranks with ours, token ids with ours on our ranks. Memory is the peak above what the
process held with the corpus loaded (Linux only). "First" is the first pass of a new tokenizer, "warm" the fastest of
those over the same text again. PEERS comes first on the path of the published tokenizers only, for one of them has the
name of ours.
"""

import base64
import gc
import hashlib
import importlib.metadata
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
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq

from nanochat import cli
from nanochat.cli import int_flag
from nanochat.errors import UserError

Ranks = list[tuple[bytes, int]]

PATTERNS = {
    "default": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
OURS, RUSTBPE, TOKENIZERS, TIKTOKEN = "ours", "rustbpe", "tokenizers", "tiktoken"
GIGATOKEN, FASTOKENS = "gigatoken", "fastokens"
TRAINERS = (OURS, RUSTBPE, TOKENIZERS)
ENCODERS = (OURS, RUSTBPE, TOKENIZERS, TIKTOKEN, GIGATOKEN, FASTOKENS)
WARM_PASSES = 3  # at least; more while they take less than a second together: each thread has a cache to warm
WORKER = "import sys; sys.path[:0] = {path}; from benchmarks.tokenizer import work; work()"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure tokenizers."""

    source: str
    """Folder of parquet files with a column `text`."""
    out: str | None = None
    """File for the results as JSON."""
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
class Job:
    """What one process measures."""

    tokenizer: str
    action: Literal["train", "encode"]
    threads: int
    source: str
    pattern: str
    vocab_size: int
    megabytes: int
    train_megabytes: int
    ranks: str
    """File of our ranks, written by the first training."""


# In the worker


def work() -> None:
    """Do the job on standard input; print its results as JSON."""
    job = Job(**json.load(sys.stdin))
    print(json.dumps(train(job) if job.action == "train" else encode(job)))


def documents(job: Job) -> list[str]:
    """The first texts of the folder for training, the last ones for encoding."""
    files = sorted(Path(job.source).glob("*.parquet"), reverse=job.action == "encode")
    texts, size = [], 0
    for text in (text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()):
        texts.append(text)
        size += len(text.encode())
        if size >= job.megabytes * 10**6:
            return texts
    raise UserError(f"{job.source} holds {size / 1e6:.0f} MB of text, {job.megabytes} MB are asked for")


def memory(reset: bool = False) -> int | None:
    """Peak resident bytes since the last reset; the bytes held now if `reset`. None where there is no way to ask."""
    try:
        if reset:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def train(job: Job) -> dict[str, Any]:
    texts = documents(job)
    call = trainer(job, texts)
    before = memory(reset=True)
    start = time.perf_counter()
    model = call()
    seconds = time.perf_counter() - start
    after = memory()
    ranks = ranks_of(model)
    if job.tokenizer == OURS:
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks]
        Path(job.ranks).write_text("\n".join(lines) + "\n")
    return {
        "seconds": seconds,
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "peak_bytes": None if before is None or after is None else after - before,
        "output": hashlib.sha256(repr(sorted(ranks, key=lambda rank: rank[1])).encode()).hexdigest(),
    }


def trainer(job: Job, texts: list[str]) -> Callable[[], Any]:
    """What trains, with all that comes before done."""
    if job.tokenizer == TOKENIZERS:
        from tokenizers import trainers

        # As special tokens, the bytes get the ids of their values, and ties fall as elsewhere.
        alphabet = list(byte_characters().values())
        learn = trainers.BpeTrainer(vocab_size=job.vocab_size, show_progress=False, special_tokens=alphabet)
        model = byte_level(job.pattern, {}, [])

        def train_tokenizers() -> Any:
            model.train_from_iterator(iter(texts), learn)
            return model

        return train_tokenizers
    import rustbpe

    tokenizer = rustbpe.Tokenizer()

    def train_rustbpe() -> Any:
        tokenizer.train_from_iterator(iter(texts), job.vocab_size, pattern=job.pattern)
        return tokenizer

    return train_rustbpe


def ranks_of(model: Any) -> Ranks:
    if hasattr(model, "get_mergeable_ranks"):
        return [(bytes(token), rank) for token, rank in model.get_mergeable_ranks()]
    byte = {character: value for value, character in byte_characters().items()}
    return [(bytes(byte[character] for character in token), rank) for token, rank in model.get_vocab().items()]


def byte_characters() -> dict[int, str]:
    """The characters that stand for bytes in a `tokenizers` vocabulary: visible ones for themselves, then from 256."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in set(visible)]
    spelled = {value: chr(value) for value in visible} | {value: chr(256 + at) for at, value in enumerate(hidden)}
    return dict(sorted(spelled.items()))


def byte_level(pattern: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Its engine reads `{1,3}+` as a group repeated, and `$` as the end of a line.
    plain = pattern.replace("3}+", "3}").replace("$", r"\z")
    split = pre_tokenizers.Split(Regex(plain), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return tokenizer


def with_merges(job: Job, ranks: Ranks) -> Any:
    """A `tokenizers` tokenizer of these ranks: its merges are the last step of each token's own encoding."""
    known = dict(ranks)
    spell = byte_characters()

    def text(token: bytes) -> str:
        return "".join(spell[value] for value in token)

    merges = []
    for token, rank in ranks[256:]:
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            pairs = [known.get(left + right, rank) for left, right in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((text(parts[0]), text(parts[1])))
    return byte_level(job.pattern, {text(token): rank for token, rank in ranks}, merges)


def encode(job: Job) -> dict[str, Any]:
    """Seconds of each way to encode, and what came out."""
    texts = documents(job)
    lines = Path(job.ranks).read_text().splitlines()
    pairs = [line.split() for line in lines]
    ranks = [(base64.b64decode(token), int(rank)) for token, rank in pairs]
    results: dict[str, Any] = {"megabytes": sum(len(text.encode()) for text in texts) / 1e6, "ways": {}}
    make = partial(encoder_ways, job, ranks)
    for way in make():
        call = make()[way]  # one that has seen no text
        before = memory(reset=True)
        first, output = timed(call, texts)
        after = memory()
        output = [list(map(int, ids)) for ids in output]
        passes: list[float] = []
        while len(passes) < WARM_PASSES or sum(passes) < 1:
            passes.append(timed(call, texts)[0])
        results["ways"][way] = {
            "first": first,
            "warm": min(passes),
            "peak_bytes": None if before is None or after is None else after - before,
            "tokens": sum(map(len, output)),
            "output": hashlib.sha256(json.dumps(output).encode()).hexdigest(),
        }
        del output
    return results


def timed(call: Callable[[list[str]], Any], texts: list[str]) -> tuple[float, Any]:
    start = time.perf_counter()
    output = call(texts)
    return time.perf_counter() - start, output


@cache
def trained(job: Job) -> Any:
    """A tokenizer that cannot load ranks, but learns the same ones; it remembers no words, so it may be shared."""
    return trainer(job, documents(job))()


def encoder_ways(job: Job, ranks: Ranks) -> dict[str, Callable[[list[str]], Any]]:
    """Name -> how to encode a list of texts with a new tokenizer. With several threads: batches only."""
    one_by_one, batch = encoder(job, ranks)
    ways = batch if job.threads > 1 else one_by_one | batch
    if not ways:
        raise UserError(f"{job.tokenizer} has no batches")
    return ways


Ways = dict[str, Callable[[list[str]], Any]]


def encoder(job: Job, ranks: Ranks) -> tuple[Ways, Ways]:
    """How to encode one by one, and as a batch."""
    if job.tokenizer == OURS:
        import rustbpe

        ours = rustbpe.Tokenizer.from_ranks(ranks, job.pattern)
        # As nanochat.tokenizer does.
        arrays, kind = (ours.batch_encode_u16, "H") if len(ranks) <= 1 << 16 else (ours.batch_encode_u32, "I")
        return {"one by one": lambda texts: [ours.encode(text) for text in texts]}, {
            "batch": lambda texts: ours.batch_encode(texts, num_threads=job.threads),
            "batch, arrays": lambda texts: Arrays(kind, *arrays(texts, num_threads=job.threads)),
        }
    if job.tokenizer == RUSTBPE:
        published = trained(replace(job, action="train", megabytes=job.train_megabytes))
        return {"one by one": lambda texts: [published.encode(text) for text in texts]}, {
            "batch": published.batch_encode
        }
    if job.tokenizer == TIKTOKEN:
        import tiktoken

        encoding = tiktoken.Encoding("same", pat_str=job.pattern, mergeable_ranks=dict(ranks), special_tokens={})
        return {"one by one": lambda texts: [encoding.encode_ordinary(text) for text in texts]}, {
            "batch": lambda texts: encoding.encode_ordinary_batch(texts, num_threads=job.threads)
        }
    if job.tokenizer == GIGATOKEN:
        import gigatoken

        name = next(name for name, pattern in PATTERNS.items() if pattern == job.pattern)
        if name == "default":
            raise UserError("gigatoken does not know this pattern; see --pattern=gpt4")
        giga = gigatoken.Tokenizer.from_tiktoken(job.ranks, pretokenizer=name)
        parallel = job.threads > 1
        return {"one by one": lambda texts: [giga.encode(text) for text in texts]}, {
            "batch": lambda texts: giga.encode_batch_list(texts, parallel=parallel),
            "batch, arrays": lambda texts: giga.encode_batch(texts, parallel=parallel),
        }
    hugging = with_merges(job, ranks)
    if job.tokenizer == FASTOKENS:
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(hugging.to_str())
        return {"one by one": lambda texts: [ids_of(fast.encode(text)) for text in texts]}, {
            "batch": lambda texts: [ids_of(encoded) for encoded in fast.encode_batch(texts)]
        }
    return {"one by one": lambda texts: [hugging.encode(text, add_special_tokens=False).ids for text in texts]}, {
        "batch": lambda texts: [done.ids for done in hugging.encode_batch_fast(texts, add_special_tokens=False)]
    }


def ids_of(encoded: Any) -> Any:
    return getattr(encoded, "ids", encoded)


@dataclass(frozen=True)
class Arrays:
    """Tokens and offsets as bytes; numpy arrays of them cost nothing."""

    kind: str
    """Of the tokens, as `struct` names it."""
    tokens: bytes
    offsets: bytes

    def __iter__(self) -> Iterator[Any]:
        tokens, offsets = memoryview(self.tokens).cast(self.kind), memoryview(self.offsets).cast("Q")
        return (tokens[start:end] for start, end in pairwise(offsets))


# In the process that asks


def run_job(settings: Settings, job: Job) -> dict[str, Any]:
    """The job's results, or {"error": one line}."""
    package = {OURS: "rustbpe"}.get(job.tokenizer, job.tokenizer)
    published = job.tokenizer != OURS
    if job.tokenizer == RUSTBPE and not settings.peers:
        return {"error": "not installed"}
    threads = str(job.threads)
    environment = os.environ | {
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "true" if job.threads > 1 else "false",
    }
    path = [os.path.abspath(settings.peers)] if published and settings.peers else []
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(path=repr(path))],
        input=json.dumps(asdict(job)),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    last = (done.stderr.strip().splitlines() or ["died"])[-1]
    missing = f"No module named '{package}'" in last
    return {"error": "not installed" if missing else last.split("UserError: ")[-1]}


def main(settings: Settings) -> None:
    if not list(Path(settings.source).glob("*.parquet")):
        raise UserError(f"{settings.source} holds no parquet files")
    counts = sorted({1, settings.threads})
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(settings.repeats):
            for action, names in (("train", TRAINERS), ("encode", ENCODERS)):
                for threads in counts:
                    for name in names:
                        measure(settings, rows, make_job(settings, name, action, threads, folder))
    compare(rows)
    print(table(settings, rows))
    report = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(settings, name) for name in (RUSTBPE, TOKENIZERS, TIKTOKEN, GIGATOKEN, FASTOKENS)},
        "settings": cli.as_dict(settings, without=["out"])
        | {"source": Path(settings.source).name, "peers": bool(settings.peers)},
        "rows": list(rows.values()),
    }
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=1) + "\n")
    wrong = [row for row in rows.values() if row.get("same") is False and row["tokenizer"] in (RUSTBPE, TIKTOKEN)]
    if wrong:
        raise UserError(f"{wrong[0]['tokenizer']} gives another output than ours: see the table")


def make_job(settings: Settings, name: str, action: Any, threads: int, folder: str) -> Job:
    return Job(
        tokenizer=name,
        action=action,
        threads=threads,
        source=settings.source,
        pattern=PATTERNS[settings.pattern],
        vocab_size=settings.vocab_size,
        megabytes=settings.megabytes if action == "train" else settings.held_out_megabytes,
        train_megabytes=settings.megabytes,
        ranks=os.path.join(folder, "ours.tiktoken"),
    )


def measure(settings: Settings, rows: dict[str, dict[str, Any]], job: Job) -> None:
    """Run the job, and keep the fastest of all rounds."""
    result = run_job(settings, job)
    if "error" in result and job.tokenizer == OURS:
        raise UserError(f"ours fails: {result['error']}")
    ways = result.get("ways", {"": result})
    for way, figures in ways.items():
        name = " ".join(filter(None, [job.action, way]))
        row = {"what": name, "tokenizer": job.tokenizer, "threads": job.threads}
        key = f"{name}, {job.tokenizer}, {job.threads}"
        row = rows.setdefault(key, row | figures | {"megabytes": result.get("megabytes")})
        for figure in ("seconds", "first", "warm", "peak_bytes"):
            if row.get(figure) is not None and figures.get(figure) is not None:
                row[figure] = min(row[figure], figures[figure])


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Mark every row by whether its output is ours: the ranks of training, the token ids of encoding."""
    ours = {row["what"].split()[0]: row["output"] for row in rows.values() if row["tokenizer"] == OURS}
    for row in rows.values():
        if "output" in row:
            row["same"] = row["output"] == ours[row["what"].split()[0]]


def table(settings: Settings, rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"{cpu_name()}: pattern {settings.pattern}, {settings.vocab_size:,} tokens from {settings.megabytes} MB, "
        f"{settings.held_out_megabytes} MB encoded",
        f"{'':<22} {'threads':>7} {'':<11} {'first':>17} {'ours is':>8} {'warm':>17} {'ours is':>8} {'peak':>8} output",
    ]
    for row in sorted(rows.values(), key=lambda row: (row["what"].split()[0] != "train", row["threads"], row["what"])):
        start = f"{row['what']:<22} {row['threads']:>7} {row['tokenizer']:<11}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        ours = rows[f"{row['what']}, {OURS}, {row['threads']}"]
        cells = []
        for figure in ("seconds", "warm") if "seconds" in row else ("first", "warm"):
            if figure in row:
                cells.append(f"{row[figure]:6.3f} s {row['megabytes'] / row[figure]:4.0f} MB/s")
                cells.append(f"{row[figure] / ours[figure]:7.1f}x")
            else:
                cells += [" " * 17, " " * 8]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:5.0f} MB"
        lines.append(f"{start} {' '.join(cells)} {peak:>8} {'same' if row['same'] else 'DIFFERS'}")
    return "\n".join(lines)


def version(settings: Settings, name: str) -> str | None:
    """The version that was measured, if any."""
    paths = [settings.peers] if settings.peers else []
    for found in importlib.metadata.distributions(name=name, path=paths + ([] if name == RUSTBPE else sys.path)):
        return found.version
    return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    cli.run(main, Settings)
