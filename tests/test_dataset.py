import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat import files, ledger, paths, pipeline
from nanochat.data import hub, local, overlap, parquet, pydocs, sources
from nanochat.data.sources import HubSource, dataset_bytes, iter_documents, list_shards
from nanochat.dataset import Settings, main
from nanochat.errors import UserError
from nanochat.paths import data_dir
from nanochat.tokenizer import RustBPETokenizer
from scripts import tok_train
from tests.standin_hub import COMMIT, StandInHub, parquet_bytes, serving

LAST = 5
VAL = f"shard_{LAST:05d}.parquet"
DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shard_texts(index: int) -> list[str]:
    return [f"shard {index}, document {i}: naïve café" for i in range(10)]


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def server(monkeypatch):
    """FineWeb-Edu with six small shards."""
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.001)
    monkeypatch.setitem(sources.SOURCES, "fineweb-edu", HubSource("someone/texts", last=LAST))
    files = {f"shard_{i:05d}.parquet": parquet_bytes(shard_texts(i)) for i in range(LAST + 1)}
    with serving(StandInHub("someone/texts", files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def get(source="fineweb-edu", **options):
    main(Settings(source=str(source), **options))


def names(source, split):
    return [path.name for path in list_shards(source, split)]


def manifest(source):
    return json.loads((data_dir(sources.canonical(source)) / "manifest.json").read_text())


def assert_tidy(source="fineweb-edu"):
    assert not [path for path in data_dir(sources.canonical(source)).rglob("*") if ".tmp" in path.name]


# ----------------------------------------------------------------------------------------------------------------------
# Hub


@pytest.mark.parametrize("workers", [1, 4])
def test_train_shards_and_the_validation_shard_arrive(server, workers, capsys):
    get(num_files=3, num_workers=workers)
    assert names("fineweb-edu", "train") == [f"shard_{i:05d}.parquet" for i in range(3)]
    assert names("fineweb-edu", "val") == [VAL]
    assert list(iter_documents("fineweb-edu", "train")) == [text for i in range(3) for text in shard_texts(i)]
    assert list(iter_documents("fineweb-edu", "val")) == shard_texts(LAST)
    assert "fineweb-edu train: 3 shards, 30 documents" in capsys.readouterr().out
    assert_tidy()


def test_manifest_says_what_is_there(server):
    get(num_files=1)
    about = manifest("fineweb-edu")
    assert (about["repo"], about["revision"], about["synthetic"]) == ("someone/texts", COMMIT, False)
    text = "".join(shard_texts(0))
    entry = about["files"]["shard_00000.parquet"]
    assert entry["size"] == len(server.files["shard_00000.parquet"])
    assert (entry["split"], entry["documents"]) == ("train", 10)
    assert (entry["characters"], entry["utf8_bytes"]) == (len(text), len(text.encode()))
    assert dataset_bytes("fineweb-edu", "train") == len(text.encode())


def test_all_shards(server):
    get()
    assert len(names("fineweb-edu", "train")) == LAST


def test_validation_never_depends_on_n(server, monkeypatch, tmp_path):
    seen = []
    for n in (1, 3):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / str(n)))
        get(num_files=n)
        seen.append((names("fineweb-edu", "val"), list(iter_documents("fineweb-edu", "val"))))
    assert seen[0] == seen[1] == ([VAL], shard_texts(LAST))


def test_what_stands_is_not_fetched_again(server):
    get(num_files=2)
    before = list(server.requests)
    get(num_files=2)
    assert server.requests == before
    get(num_files=4)
    assert all(server.gets(f"shard_{i:05d}.parquet") == 1 for i in range(4)) and server.gets(VAL) == 1
    get(num_files=1)
    assert len(names("fineweb-edu", "train")) == 4  # asking for less takes nothing away


def test_truncated_shard_is_named_and_mended(server):
    get(num_files=2)
    damaged = list_shards("fineweb-edu", "train")[1]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(
        UserError, match=rf"{damaged.name} has .* bytes instead of .*: run `python -m nanochat\.dataset"
    ):
        list_shards("fineweb-edu", "train")
    get(num_files=2)
    assert list(iter_documents("fineweb-edu", "train")) == shard_texts(0) + shard_texts(1)
    assert server.gets("shard_00000.parquet") == 1 and server.gets("shard_00001.parquet") == 2
    damaged.unlink()
    with pytest.raises(UserError, match=rf"{damaged.name} is missing"):
        list_shards("fineweb-edu", "train")


def test_bytes_damaged_inside_a_shard_are_named(server):
    get(num_files=1)
    path = list_shards("fineweb-edu", "train")[0]
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}: row group 0 is damaged"):
        list(parquet.read_documents(path))
    with pytest.raises(UserError, match=rf"{path.name} has changed since it was written"):
        list(iter_documents("fineweb-edu", "train"))


def test_a_file_without_its_manifest_entry_does_not_count(server):
    get(num_files=1)
    (data_dir("fineweb-edu") / "shard_00001.parquet").write_bytes(server.files["shard_00001.parquet"])
    assert names("fineweb-edu", "train") == ["shard_00000.parquet"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html><title>Log in</title>" * 10, r"shard_00001\.parquet: expected a parquet file, found an HTML"),
        (b"", r"shard_00001\.parquet: expected a parquet file, found an empty file"),
        (parquet_bytes(["x"] * 50)[:-20], r"shard_00001\.parquet: expected a parquet file, found a truncated one"),
        (parquet_bytes(["x"], column="content"), r"shard_00001\.parquet: expected a column `text`, found content"),
    ],
)
def test_wrong_content_is_named_and_deleted(server, content, message):
    server.files["shard_00001.parquet"] = content
    with pytest.raises(UserError, match=message):
        get(num_files=2, num_workers=1)
    assert not (data_dir("fineweb-edu") / "shard_00001.parquet").exists()
    assert names("fineweb-edu", "train") == ["shard_00000.parquet"]  # what had arrived stays
    assert_tidy()


def test_numbers_must_hold_strings(server):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [1, 2]}), sink)
    server.files[VAL] = sink.getvalue().to_pybytes()
    with pytest.raises(UserError, match="expected strings in column `text`, found int64"):
        get(num_files=1)


def test_one_missing_file_ends_the_download_and_keeps_the_rest(server):
    del server.files["shard_00002.parquet"]
    with pytest.raises(UserError, match=r"someone/texts on .* has no file shard_00002\.parquet"):
        get(num_files=4, num_workers=2)
    assert names("fineweb-edu", "val") == [VAL]
    assert_tidy()


def test_too_many_shards_are_refused(server):
    with pytest.raises(UserError, match=f"-n 6: fineweb-edu has {LAST} train shards"):
        get(num_files=6)
    assert not server.requests


def test_two_downloads_into_one_folder_keep_both_entries(server):
    get(num_files=1)
    stale = parquet.load_manifest(data_dir("fineweb-edu"))
    get(num_files=2)
    about = {key: value for key, value in stale.items() if key != "files"}
    parquet.update_manifest(data_dir("fineweb-edu"), about, {VAL: stale["files"][VAL]})
    assert len(names("fineweb-edu", "train")) == 2


def run_cli(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_command_line_mistakes_are_one_line(server, tmp_path):
    for source in ("nowhere", "local:"):
        with pytest.raises(UserError, match=f"--source={source}: expected fineweb-edu, climbmix, pydocs or local:DIR"):
            get(source)
    for arguments, message in [
        ([f"--source=local:{tmp_path}/no"], "no such folder"),
        (["-n", "1", "--source=climbmix"], "has no dataset karpathy/climbmix-400b-shuffle"),
    ]:
        done = run_cli(*arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr


def test_absent_data_names_the_command():
    with pytest.raises(UserError, match=r"run `python -m nanochat\.dataset -n 8 --source=climbmix`"):
        list_shards("climbmix", "train")
    with pytest.raises(UserError, match=r"run `python -m nanochat\.dataset --source=pydocs`"):
        dataset_bytes("pydocs", "val")


def test_damaged_manifest_is_said():
    folder = data_dir("pydocs")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged: delete"):
        list_shards("pydocs", "train")


# ----------------------------------------------------------------------------------------------------------------------
# Local folders


@pytest.mark.parametrize("field", ["split", "size", "sha256", "documents", "utf8_bytes"])
@pytest.mark.parametrize("value", [None, "x", [], {}, True, ...], ids=repr)
def test_an_entry_of_the_manifest_that_has_other_types_is_damage(folder, field, value):
    (folder / "a.jsonl").write_text(jsonl(shard_texts(0)))
    source = f"local:{folder}"
    get(source)
    about = manifest(source)
    entry = about["files"]["shard_00000.parquet"]
    if value is ...:
        del entry[field]
    elif isinstance(value, str) and isinstance(entry[field], str):
        return
    else:
        entry[field] = value
    (data_dir(source) / "manifest.json").write_text(json.dumps(about))
    for use in (lambda: dataset_bytes(source, "train"), lambda: get(source), lambda: list_shards(source, "train")):
        with pytest.raises(UserError, match=r"manifest\.json is damaged: delete .* and get the data again"):
            use()


def everything(source):
    train, val = (list(iter_documents(source, split)) for split in ("train", "val"))
    assert not set(train) & set(val)
    return train, val


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    return path


def jsonl(texts):
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


def test_every_kind_of_file_is_read(folder):
    texts = [f"document {i} — été" for i in range(70)]
    (folder / "a.parquet").write_bytes(parquet_bytes(texts[:10]))
    (folder / "b.jsonl").write_text(jsonl(texts[10:20]) + "\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(jsonl(texts[20:30]))
    with pa.output_stream(str(folder / "d.jsonl.zst"), compression="zstd") as file:
        file.write(jsonl(texts[30:40]).encode())
    (folder / "sub").mkdir()
    for i in range(40, 70):
        (folder / "sub" / f"{i}.txt").write_text(f"\ufeff{texts[i]}\n\n" if i == 50 else texts[i])
    (folder / "notes.md").write_text("not read")
    get(f"local:{folder}")
    train, val = everything(f"local:{folder}")
    assert sorted(train + val) == sorted(texts)
    assert len(val) == 7
    about = manifest(f"local:{folder}")
    assert (about["kind"], about["synthetic"]) == ("local files", False)


@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=40, unique=True), st.randoms())
def test_shards_do_not_depend_on_how_text_is_spread_over_files(tmp_path, texts, chance):
    results = []
    for attempt in range(2):
        origin = Path(tempfile.mkdtemp(dir=tmp_path))
        shuffled = texts * (attempt + 1)  # the second time each text stands twice
        chance.shuffle(shuffled)
        cut = chance.randrange(len(shuffled) + 1)
        (origin / "a.jsonl").write_text(jsonl(shuffled[:cut]))
        (origin / "b.jsonl").write_text(jsonl(shuffled[cut:]))
        target = origin / "out"
        files = local.convert(local.all_files(origin), target)
        results.append([entry["sha256"] for entry in files.values()])
        read = [text for path in sorted(target.iterdir()) for text in pq.read_table(path)["text"].to_pylist()]
        assert sorted(read) == sorted(text.encode("utf-8", "replace").decode() for text in texts)
    assert results[0] == results[1]


def test_repeated_documents_do_not_move_the_validation_split(tmp_path):
    """At 150 documents of two bytes, ten per cent are 15 documents; counted twice it would be 30."""
    found = []
    for times in (1, 2):
        origin = tmp_path / f"{times} times"
        origin.mkdir()
        (origin / "a.jsonl").write_text(jsonl([chr(0x100 + i) for i in range(150)] * times))
        found.append(local.convert(local.all_files(origin), origin / "out"))
    assert found[0] == found[1] and found[0]["shard_00001.parquet"]["documents"] == 15


def test_validation_is_one_per_cent(folder, monkeypatch):
    monkeypatch.setattr(local, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(local, "MIN_VAL_BYTES", 0)  # as of much text
    chance = random.Random(0)
    texts = [" ".join(str(chance.random()) for _ in range(10)) for _ in range(3000)]
    (folder / "a.jsonl").write_text(jsonl(texts))
    get(f"local:{folder}")
    train, val = everything(f"local:{folder}")
    assert sorted(train + val) == sorted(texts)
    assert 0.008 < sum(map(len, val)) / sum(map(len, texts)) <= 0.01
    assert len(names(f"local:{folder}", "train")) == 6
    assert names(f"local:{folder}", "val") == ["shard_00006.parquet"]
    assert train + val != texts and val + train == sorted(texts, key=parquet.text_hash)
    assert pq.ParquetFile(list_shards(f"local:{folder}", "train")[0]).num_row_groups == 1


def test_long_txt_is_cut_at_blank_lines(folder):
    paragraphs = [f"Paragraph {i}.\n" + "word\n" * 400 for i in range(60)]
    (folder / "book.txt").write_text("\n\n\n".join(paragraphs))
    documents = list(local.read_documents(folder / "book.txt"))
    assert 5 < len(documents) < 12
    assert "\n".join(documents).split() == "\n".join(paragraphs).split()
    assert all(text.startswith("Paragraph") for text in documents)
    (folder / "dense.txt").write_text("a line without end\n" * 20_000)
    sizes = [len(text) for text in local.read_documents(folder / "dense.txt")]
    assert max(sizes) <= 4 * local.TXT_DOCUMENT_BYTES + 100 and sum(sizes) > 19 * 19_990


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', r"a\.jsonl, line 3: expected an object with a string"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: expected an object with a string field `text`"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: expected an object"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.txt", b"caf\xe9", r"a\.txt, line 1: not UTF-8"),
        ("a.jsonl.gz", b"not gzip at all", r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"PAR1 and then nothing", r"a\.parquet: expected a parquet file, found a truncated one"),
        ("a.parquet", parquet_bytes(["x"], column="body"), r"a\.parquet: expected a column `text`, found body"),
        ("a.txt", b"only one", r"1 documents are too few"),
        ("a.md", b"wrong kind", r"no \.parquet, \.jsonl"),
        ("a.csv", b"id;text\n1;x\n", r"a\.csv: expected a column `text` in its first line, found id;text"),
        ("a.csv", b"text,text\n1,x\n", r"expected a column `text` in its first line, found text, text"),
        ("a.csv", b"", r"expected a column `text` in its first line, found $"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv, line 3: 1 columns instead of 2"),
        ("a.csv", b'text\n"never closed\n', r"a\.csv, line 2: not CSV"),
        ("a.csv", b"text\nx\xff\n", r"a\.csv, line 2: not UTF-8"),
        (
            "a.txt.gz",
            gzip.compress(random.Random(0).randbytes(9).hex().encode() * 999, mtime=0)[:-9],
            r"cannot be read",
        ),
        ("a.jsonl", b'{"text":' + b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', r"no text in .*a\.jsonl: nothing to train on"),
        ("a.txt", b" \n\t", r"no text in .*a\.txt"),
        ("a.csv", b"id,text\n", r"no text in .*a\.csv"),
        ("a.parquet", parquet_bytes(["", " "]), r"no text in .*a\.parquet"),
    ],
)
def test_local_mistakes_name_file_and_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        get(f"local:{folder}")
    assert "\n" not in str(caught.value)
    target = data_dir(f"local:{folder}")
    assert not target.exists() or not list(target.iterdir())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv", "a.parquet", "shard_00001.parquet"])
def test_a_git_lfs_pointer_is_named_and_not_trained_on(folder, name):
    (folder / "shard_00000.parquet").write_bytes(parquet_bytes(["one", "two"]))
    if not name.startswith("shard"):
        (folder / "shard_00000.parquet").rename(folder / "b.parquet")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456789\n")
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, .* `git lfs pull`"):
        get(f"local:{folder}")


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".zst", ".lz4"])
def test_a_line_of_any_length_takes_bounded_memory(folder, monkeypatch, packed):
    monkeypatch.setattr(local, "LONGEST_PART", 1001)  # so that letters of three bytes are cut
    monkeypatch.setattr(local, "LONGEST_LINE", 50_000)
    text = "一二三四五六七八九十" * 20_000
    content = {
        "a.txt": text,
        "b.jsonl": json.dumps({"text": text}),
        "c.csv": f"text\n{text}\n",
        "d.csv": f'text\n"{text}',
    }
    content["e.csv"] = 'text\n"never closed' + "\nand so on" * 10_000
    for name, written in content.items():
        with pa.output_stream(str(folder / f"{name}{packed}"), compression="detect") as stream:
            stream.write(written.encode())
    documents = list(local.read_documents(folder / f"a.txt{packed}"))
    assert "".join(documents) == text and max(map(len, documents)) < local.WHOLE_TXT_BYTES + 1001
    for name in ("b.jsonl", "c.csv", "d.csv", "e.csv"):
        with pytest.raises(UserError, match=r"line \d+: (longer than 50,000 bytes; cut it|not CSV .field larger)"):
            list(local.read_documents(folder / f"{name}{packed}"))


def test_half_a_surrogate_pair_becomes_a_mark(folder):
    (folder / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert list(local.read_documents(folder / "a.jsonl")) == ["a?b", "😀"]


def test_changed_folder_is_converted_again_unchanged_is_not(folder, capsys):
    source = f"local:{folder}"
    (folder / "a.jsonl").write_text(jsonl(["one", "two"]))
    get(source)
    stamp = list_shards(source, "train")[0].stat().st_mtime_ns
    get(source)
    assert list_shards(source, "train")[0].stat().st_mtime_ns == stamp
    assert "shards are here" in capsys.readouterr().out
    (folder / "b.txt").write_text("three")
    get(source)
    assert sorted(itertools.chain(*everything(source))) == ["one", "three", "two"]
    list_shards(source, "train")[0].write_bytes(b"broken")
    get(source)
    assert sorted(itertools.chain(*everything(source))) == ["one", "three", "two"]


def test_a_touched_folder_is_as_it_was_and_text_of_the_same_size_and_date_is_not(folder, capsys):
    source, path = f"local:{folder}", folder / "a.jsonl"
    for name in ("a.jsonl", "caf\udce9.jsonl"):  # as Latin-1 had it
        (folder / name).write_text(jsonl([f"{name!a} one", "two"]))
    (folder / "\udce9.txt.gz").write_bytes(gzip.compress(b"three"))
    with (folder / "\udce9.parquet").open("wb") as file:
        file.write(parquet_bytes(["four"]))
    get(source)
    assert sum(map(len, everything(source))) == 5
    kept = (data_dir(source) / "manifest.json").read_bytes()
    os.utime(path, (1, 1))
    get(source)
    assert (data_dir(source) / "manifest.json").read_bytes() == kept
    assert "shards are here" in capsys.readouterr().out
    path.write_text(path.read_text().replace("two", "six"))
    os.utime(path, (1, 1))
    get(source)
    assert "six" in list(itertools.chain(*everything(source)))


def edits(folder, shards):
    """What is done to a folder, and whether its text is another then."""
    for path in (folder / "a.txt", folder / "sub" / "b.txt") if not shards else ():
        yield lambda path=path: path.write_text(path.read_text()[::-1]), True
        yield lambda path=path: os.utime(path, (2, 2)), False
    new = parquet_bytes(["x", "y"])
    yield lambda: (folder / "shard_00002.parquet").write_bytes(new), True
    yield lambda: [(folder / "shard_00002.parquet").write_bytes(new)], False
    yield lambda: (folder / "shard_00002.parquet").rename(folder / "shard_00003.parquet"), True
    yield lambda: (folder / "notes.pdf").write_text("not read"), False
    yield lambda: (folder / "shard_00003.parquet").unlink(), True


@pytest.mark.parametrize("shards", [False, True])
def test_the_dataset_stage_is_done_until_the_folder_has_another_text(folder, tmp_path, shards):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("text that is linked")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (folder / "a.txt").write_text("text of our own")
    for number in range(2 if shards else 0):
        (folder / f"shard_{number:05d}.parquet").write_bytes(parquet_bytes(shard_texts(number)))
    source = f"local:{folder}"
    program = "import sys; from nanochat.data.local import take_folder; take_folder(sys.argv[1], -1)"
    command = ["python", "-c", program, source]

    def stage():
        assert pipeline.run_stage("dataset", command, [source], [f"base_data/{data_dir(source).name}"]) == 0
        return sum(record["status"] == "started" for record in ledger.read(paths.run_dir()))

    runs = stage()
    assert stage() == runs == 1
    for edit, is_other in edits(folder, shards):
        before = ledger.fingerprint([source])
        edit()
        assert (ledger.fingerprint([source]) != before) == is_other
    assert stage() == runs + (not shards)  # of the shards there are those of before
    assert len(list(itertools.chain(*everything(source)))) == (20 if shards else 2)


def test_a_folder_is_read_again_only_when_something_was_done_to_it(folder, monkeypatch):
    for number in range(3):
        (folder / f"{number}.txt").write_text("abc")
    (folder / "link.txt").symlink_to("0.txt")
    now, read, hash_file = time.time(), [], files.sha256_file
    monkeypatch.setattr(time, "time", lambda: now + 60)
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or hash_file(path))
    for _ in range(3):
        files._hashes.clear()  # as another process
        first = ledger.fingerprint([f"local:{folder}"])
    assert len(read) == 4
    os.utime(folder / "0.txt", (3, 3))
    assert ledger.fingerprint([f"local:{folder}"]) == first and len(read) == 8


def test_relative_and_absolute_paths_are_one_source(folder, monkeypatch):
    (folder / "a.jsonl").write_text(jsonl(["one", "two"]))
    monkeypatch.chdir(folder.parent)
    get("local:texts")
    assert list_shards("local:texts", "train") == list_shards(f"local:{folder}/", "train")


def test_folders_with_one_slug_are_told_apart(tmp_path):
    for name, text in (("a-b", "dash"), ("a/b", "slash")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jsonl").write_text(jsonl([text, text + "2"]))
    get(f"local:{tmp_path}/a-b")
    with pytest.raises(UserError, match="no train shards of"):
        list_shards(f"local:{tmp_path}/a/b", "train")
    get(f"local:{tmp_path}/a/b")
    assert sorted(itertools.chain(*everything(f"local:{tmp_path}/a/b"))) == ["slash", "slash2"]


def test_ready_shards_are_taken_over_the_last_for_validation(folder):
    for i in range(4):
        (folder / f"shard_{i:05d}.parquet").write_bytes(parquet_bytes(shard_texts(i)))
    source = f"local:{folder}"
    for n in (1, 3, 2):
        get(source, num_files=n)
        assert list(iter_documents(source, "val")) == shard_texts(3)
    assert len(names(source, "train")) == 3
    assert list_shards(source, "train")[0].samefile(folder / "shard_00000.parquet")
    (folder / "shard_00004.parquet").write_bytes(parquet_bytes(shard_texts(4)))
    get(source)
    assert len(names(source, "train")) == 4 and list(iter_documents(source, "val")) == shard_texts(4)


def test_a_lone_ready_shard_is_not_enough(folder):
    (folder / "shard_00000.parquet").write_bytes(parquet_bytes(["x", "y"]))
    with pytest.raises(UserError, match=r"shard_00000\.parquet stands alone"):
        get(f"local:{folder}")


# ---- whatever a folder holds


def shares(source):
    sizes = {split: dataset_bytes(source, split) for split in ("train", "val")}
    return sizes["val"] / sum(sizes.values())


@pytest.mark.parametrize(
    "total, held_out",
    [(0, 0), (1_000, 100), (1_100_000, 110_000), (7_000_000, 500_000), (200_000_000, 2_000_000), (10**12, 10_000_000)],
)
def test_what_is_held_out_suffices_and_is_a_share(total, held_out):
    assert local.held_out_bytes(total) == held_out


ALPHABET = st.sampled_from("ab é\u0301中。.!?\n \u200d👩🏽")


@given(st.text(ALPHABET, max_size=300), st.integers(4, 60))
def test_pieces_are_the_whole_text_and_short(text, limit):
    found = list(local.pieces(text, limit))
    assert ("".join(found) == text and all(0 < len(piece) <= limit for piece in found)) or not text


@pytest.mark.parametrize(
    "text, limit, expected",
    [
        ("One two. Three four. Five", 22, ["One two. Three four. ", "Five"]),
        ("Said he, a b c d!\n\nNext. More text", 26, ["Said he, a b c d!\n\n", "Next. More text"]),
        ("первое. второе предложение", 12, ["первое. ", "второе ", "предложение"]),
        ("第一句话很长。第二句话也长。第三句", 16, ["第一句话很长。第二句话也长。", "第三句"]),
        ("name: a\nname: b\nname: c", 18, ["name: a\nname: b\n", "name: c"]),
        ("aaaaaaaaaa", 4, ["aaaa", "aaaa", "aa"]),
        ("aaae\u0301aaa", 4, ["aaa", "e\u0301aa", "a"]),
    ],
)
def test_text_is_cut_where_it_pauses(text, limit, expected):
    assert list(local.pieces(text, limit)) == expected


def test_a_long_text_of_one_line_is_all_trained_on(folder):
    """5.8 MB in one line were "1 document, too few", and a tokenizer saw 10,000 characters of it."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefgh", k=6)) for _ in range(500)]
    text = " ".join(chance.choices(words, k=830_000))
    (folder / "a.txt").write_text(text)
    source = f"local:{folder}"
    get(source)
    train, val = everything(source)
    assert sum(map(len, train + val)) == len(text) and 0.07 < shares(source) <= 500_000 / len(text)
    assert max(map(len, train)) <= local.PIECE == tok_train.Settings().doc_cap


@pytest.mark.parametrize("long", ["one sentence that repeats. " * 18_000, "中文没有空格" * 40_000, "x" * 480_000])
@pytest.mark.parametrize("name", ["a.jsonl", "shard.parquet"])
def test_a_long_document_among_short_ones_never_becomes_the_validation_split(folder, long, name):
    texts = [f"short document {i}" for i in range(20)] + [long]
    (folder / name).write_bytes(jsonl(texts).encode() if name == "a.jsonl" else parquet_bytes(texts))
    get(f"local:{folder}")
    assert 0.01 < shares(f"local:{folder}") <= local.MAX_VAL_SHARE
    assert dataset_bytes(f"local:{folder}", "train") > 0.9 * len(long.encode())


def test_one_short_document_is_shared_out_too(folder):
    (folder / "a.txt").write_text("Some words of it. " * 200)
    get(f"local:{folder}")
    assert 0.08 < shares(f"local:{folder}") <= 0.1


def prose(seed, sentences=40):
    """Lines of words, no two alike, different for each seed."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghiklmnoprstu", k=chance.randint(2, 9))) for _ in range(100)]
    return "\n".join(" ".join(chance.choices(words, k=9)).capitalize() + "." for _ in range(sentences))


def lines_on_both_sides(source):
    train, val = everything(source)
    assert val
    long, shared = overlap.shared_lines(val, train).sum(axis=0)
    return shared / long


@pytest.mark.parametrize("kind", ["edited copies", "many versions", "long documents", "long txt", "forms"])
def test_what_is_nearly_alike_is_on_one_side(folder, kind):
    chance = random.Random(0)
    if kind == "edited copies":
        texts = [prose(i) for i in range(300)]
        for i, text in enumerate(list(texts)):
            texts.append(f"New words. {text.upper().replace('.', '!', 5)}{prose(f'more {i}', 4)}")
    elif kind == "many versions":  # of a few texts, a line of each left out
        bodies = [prose(i, 60).split("\n") for i in range(40)]
        texts = ["\n".join(line for line in body if line != chance.choice(body)) for body in bodies for _ in range(10)]
    elif kind == "long documents":  # the same phrases in all pieces of one
        texts = ["\n".join([f"{prose(i, 3)}\n{prose(f'{i} {j}', 40)}" for j in range(20)]) for i in range(40)]
    elif kind == "forms":  # what is filled in differs
        texts = [f"{prose(i // 4)}\n{prose(f'name {i}', 3)}" for i in range(400)]
    if kind == "long txt":
        for i in range(40):
            parts = "\n\n".join(f"{prose(i, 3)}\n{prose(f'{i} {j}', 40)}" for j in range(40))
            (folder / f"{i}.txt").write_text(parts)
    else:
        chance.shuffle(texts)
        (folder / "a.jsonl").write_text(jsonl(texts))
    source = f"local:{folder}"
    get(source)
    assert lines_on_both_sides(source) == 0 and 0.02 < shares(source) <= 0.1


def test_text_that_is_all_alike_is_split_all_the_same(folder, capsys):
    body = prose(0, 60)
    (folder / "a.jsonl").write_text(jsonl([f"{body}\n{prose(f'more {i}', 2)}" for i in range(200)]))
    source = f"local:{folder}"
    get(source)
    assert "parts of the same are on both sides" in capsys.readouterr().out
    assert 0.05 < shares(source) <= 0.1 and lines_on_both_sides(source) > 0.9


def test_text_of_which_nothing_is_alike_is_split_by_its_hash(folder):
    texts = [prose(i, 3) for i in range(2000)]
    (folder / "a.jsonl").write_text(jsonl(texts))
    get(f"local:{folder}")
    train, val = everything(f"local:{folder}")
    assert val + train == sorted(texts, key=parquet.text_hash)


def test_ready_shards_of_books_are_cut_for_the_tokenizer(folder):
    for i in range(2):
        (folder / f"shard_{i:05d}.parquet").write_bytes(parquet_bytes([f"Book {i} {j}. " * 10_000 for j in range(3)]))
    get(f"local:{folder}")
    train, val = (list(iter_documents(f"local:{folder}", split)) for split in ("train", "val"))
    assert "".join(train) == "".join(f"Book 0 {j}. " * 10_000 for j in range(3)) and max(map(len, train)) <= local.PIECE
    assert all(text.startswith("Book 1") for text in val)


def test_more_text_held_out_than_trained_on_is_said(folder, capsys):
    (folder / "shard_00000.parquet").write_bytes(parquet_bytes(["little"]))
    (folder / "shard_00001.parquet").write_bytes(parquet_bytes(["much more"] * 9))
    get(f"local:{folder}")
    assert "has more text than all others" in capsys.readouterr().out


def write_table(path, column, **options):
    pq.write_table(pa.table({"text": column}), path, **options)


COLUMNS = {
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "string_view": lambda texts: pa.array(texts, pa.string_view()),
    "large_string": lambda texts: pa.array(texts, pa.large_string()),
    "binary": lambda texts: pa.array([text and text.encode() for text in texts], pa.binary()),
    "nulls": lambda texts: pa.array([*texts, None, None]),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("name", ["shard_{:05d}.parquet", "part-{}.parquet"])
def test_every_parquet_that_comes_in_is_read_by_every_reader(folder, kind, codec, name):
    texts = [shard_texts(i) for i in range(2)]
    for i in range(2):
        write_table(folder / name.format(i), COLUMNS[kind](texts[i]), compression=codec)
    source = f"local:{folder}"
    get(source)
    train, val = everything(source)
    assert sorted(train + val) == sorted(texts[0] + texts[1])
    _, documents, characters = RustBPETokenizer.train_from_parquet(list_shards(source, "train"), 270, 10**9, 10**4)
    assert (documents, characters) == (len(train), sum(map(len, train)))


def test_a_folder_named_like_a_shard_is_read(folder):
    (folder / "shard_00000.parquet").mkdir()
    (folder / "shard_00000.parquet" / "_SUCCESS").touch()
    (folder / "shard_00000.parquet" / ".part-0.parquet.crc").write_bytes(b"crc")
    (folder / "shard_00000.parquet" / "part-0.snappy.parquet").write_bytes(parquet_bytes(shard_texts(0)))
    (folder / "shard_00001.parquet").write_bytes(parquet_bytes(shard_texts(1)))
    get(f"local:{folder}")
    assert sorted(itertools.chain(*everything(f"local:{folder}"))) == sorted(shard_texts(0) + shard_texts(1))


def table_bytes(columns, names):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, names=names), sink)
    return sink.getvalue().to_pybytes()


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
)


@pytest.mark.parametrize(
    "content, message",
    [
        (table_bytes([["a"], ["b"]], ["text", "text"]), "expected a column `text`, found text, text"),
        (table_bytes([["a"]], ["content"]), "expected a column `text`, found content"),
        (table_bytes([[["a"]]], ["text"]), "expected strings in column `text`, found list"),
        (table_bytes([[{"text": "a"}]], ["text"]), "expected strings in column `text`, found struct"),
        (table_bytes([NOT_UTF8], ["text"]), "row group 0 is damaged .*UTF8"),
        (table_bytes([pa.array([b"\xff"])], ["text"]), "row group 0 is damaged .*UTF8"),
        (table_bytes([pa.array([None], pa.string())], ["text"]), "no text in"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_shard_without_text_is_refused_at_the_door(folder, content, message, number):
    (folder / f"shard_{number:05d}.parquet").write_bytes(content)
    (folder / f"shard_{1 - number:05d}.parquet").write_bytes(parquet_bytes(["fine"]))
    with pytest.raises(UserError, match=message) as caught:
        get(f"local:{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shard_00001.parquet", "part.parquet"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), "dictionary", "null"])
def test_a_row_group_that_takes_far_more_memory_than_its_file_is_refused(folder, monkeypatch, kind, name):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 10**6)
    column = pa.array(["long " * 1000], pa.string()).take(pa.array([0] * 1000))
    if kind == "null":
        column = pa.nulls(10**6, pa.string())
    else:
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    pq.write_table(pa.table({"text": column}), folder / name, row_group_size=10**6)
    (folder / name.replace("1", "0").replace("part", "other")).write_bytes(parquet_bytes(shard_texts(0)))
    with pytest.raises(UserError, match=rf"{name}: row group 0 is damaged .its rows take more than 1,000,000 bytes"):
        get(f"local:{folder}")
    monkeypatch.setattr(parquet, "GROUP_BYTES", 10**8)
    if kind != "null":
        get(f"local:{folder}")


def test_a_hub_shard_that_rustbpe_cannot_decompress_is_refused(server):
    sink = pa.BufferOutputStream()
    write_table(sink, pa.array(["x"]), compression="gzip")
    server.files[VAL] = sink.getvalue().to_pybytes()
    with pytest.raises(UserError, match=rf"{VAL}: compressed by GZIP; expected SNAPPY, UNCOMPRESSED, ZSTD"):
        get(num_files=1)


def test_compressed_text_tables_and_nulls_are_read_and_the_rest_is_said(folder, capsys):
    packed = gzip.compress(b'{"text": "packed"}\n{"text": null}\n')
    (folder / "a.NDJSON.gz").write_bytes(packed)
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"plain"))
    (folder / "c.csv").write_bytes(b'\xef\xbb\xbfid,text\r\n1,"said ""yes"", and\nleft"\r\n2,\r\n\r\n3,last\r\n')
    (folder / "d.TSV").write_text("text\tid\ntab, and comma\t4\n")
    (folder / "long.csv").write_text("text\n" + " ".join(map(str, range(60_000))) + "\n")
    (folder / "e.docx").write_bytes(b"PK")
    (folder / "._b.txt").write_bytes(b"\xff")
    get(f"local:{folder}")
    texts = list(itertools.chain(*everything(f"local:{folder}")))
    assert {"packed", "plain", 'said "yes", and\nleft', "last", "tab, and comma"} <= set(texts)
    assert sum(map(len, texts)) > 300_000
    assert "left out 1 .docx, 1 .txt" in capsys.readouterr().out
    assert manifest(f"local:{folder}")["left_out"] == "1 .docx, 1 .txt"


# ---- links


def cache_of_links(folder):
    """As huggingface_hub keeps a dataset: links to files named by their content."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i in range(3):
        (blobs / f"{i:064d}").write_bytes(parquet_bytes(shard_texts(i)))
        (snapshot / f"shard_{i:05d}.parquet").symlink_to(f"../../blobs/{i:064d}")
    return snapshot


def test_links_to_shards_are_followed(folder, capsys):
    source = f"local:{cache_of_links(folder)}"
    get(source)
    path = list_shards(source, "train")[0]
    assert not path.is_symlink() and path.samefile(folder / "blobs" / f"{0:064d}")
    assert list(iter_documents(source, "val")) == shard_texts(2)
    stamp = (data_dir(source) / "shard_00000.parquet").stat().st_ino
    get(source)
    assert (data_dir(source) / "shard_00000.parquet").stat().st_ino == stamp


def test_linked_folders_are_read_once(folder, tmp_path):
    cache_of_links(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked").symlink_to(folder)
    (folder / "circle").symlink_to(folder)
    get(f"local:{tmp_path}/other")
    texts = list(itertools.chain(*everything(f"local:{tmp_path}/other")))
    assert sorted(texts) == sorted(text for i in range(3) for text in shard_texts(i))


@pytest.mark.parametrize("name", ["shard_00001.parquet", "b.txt", "c.csv.gz"])
def test_a_link_to_nothing_is_named(folder, name):
    (folder / "shard_00000.parquet").write_bytes(parquet_bytes(["x"]))
    (folder / name).symlink_to("../../blobs/gone")
    with pytest.raises(UserError, match=rf"{name} is a link to \.\./\.\./blobs/gone, which is not there"):
        get(f"local:{folder}")


# ---- damage that changes no size


def flip(path, keep_time=False):
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_a_flipped_byte_is_mended_from_where_the_text_came(server, folder, monkeypatch, keep_time, large, capsys):
    if large:  # remembered by size and times; a file is read again only when they change
        monkeypatch.setattr(files, "LARGE_BYTES", 0)
    (folder / "a.jsonl").write_text(jsonl(shard_texts(7)))
    for source in ("fineweb-edu", f"local:{folder}"):
        get(source, num_files=1)
        for split in sources.SPLITS:
            path = list_shards(source, split)[0]
            before = path.read_bytes()
            flip(path, keep_time)
            get(source, num_files=1)
            assert path.read_bytes() == before
            assert f"{path} has changed" in capsys.readouterr().out


def test_readers_refuse_changed_content_and_hash_a_shard_once(folder, monkeypatch):
    monkeypatch.setattr(files, "LARGE_BYTES", 0)
    (folder / "a.jsonl").write_text(jsonl(shard_texts(7)))
    source, read = f"local:{folder}", []
    get(source)
    path = list_shards(source, "train")[0]
    os.utime(path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)  # a file that was changed just now is not remembered
    hash_file = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or hash_file(path))
    for _ in range(3):
        files._hashes.clear()  # as another process
        list_shards(source, "train")
    assert read == [path]
    flip(path, keep_time=True)
    for use in (lambda: list_shards(source, "train"), lambda: list(iter_documents(source, "train"))):
        with pytest.raises(
            UserError, match=f"{path} has changed since it was written: run `.*dataset --source={source}`"
        ):
            use()
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first rank of each node looks
    assert list_shards(source, "train") == [path]


def test_a_damaged_ready_shard_is_refused_and_a_damaged_copy_is_mended(folder, capsys):
    for i in range(3):
        write_table(folder / f"shard_{i:05d}.parquet", pa.array(shard_texts(i)), compression="none")
    source = f"local:{folder}"
    get(source)
    path = list_shards(source, "train")[1]
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(before)  # a copy, as between two disks
    flip(path)
    get(source)
    assert path.read_bytes() == before
    path = folder / path.name
    content = path.read_bytes()
    stat = path.stat()
    path.write_bytes(content.replace(b"document 3", b"document 8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=rf"{path} has other content than when it was taken over") as caught:
        get(source)
    assert "\n" not in str(caught.value)
    path.touch()
    get(source)
    said = f"{source}: of other content and date than when taken over, trained on as it is: {path.name}"
    assert said in capsys.readouterr().out and manifest(source)["changed"] == path.name
    assert "shard 1, document 8: naïve café" in list(iter_documents(source, "train"))


@pytest.mark.skipif(not (DATA / "corpus").is_dir(), reason=f"no real data at {DATA}/corpus")
def test_real_corpus():
    get(f"local:{DATA}/corpus", num_files=1)
    assert dataset_bytes(f"local:{DATA}/corpus", "val") > 1_000_000
    assert names(f"local:{DATA}/corpus", "val") == ["shard_00011.parquet"]


# ----------------------------------------------------------------------------------------------------------------------
# pydocs


def test_pydocs_shards(monkeypatch, capsys):
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefgh \n", k=3000)) for _ in range(1000)]
    packages = {text: f"package {i // 5}" for i, text in enumerate(texts)}
    monkeypatch.setattr(pydocs, "harvest", lambda: packages)
    get("pydocs")
    train, val = everything("pydocs")
    assert sorted(train + val) == sorted(texts)
    assert not {packages[text] for text in train} & {packages[text] for text in val}
    assert 500_000 <= dataset_bytes("pydocs", "val") <= 600_000
    assert names("pydocs", "train") == [f"shard_{i:05d}.parquet" for i in range(6)]
    assert manifest("pydocs")["kind"] == "offline documentation" and not manifest("pydocs")["synthetic"]
    hashes = {name: entry["sha256"] for name, entry in manifest("pydocs")["files"].items()}
    monkeypatch.setattr(pydocs, "harvest", lambda: dict(reversed(packages.items())))
    get("pydocs")
    assert "shards are here" in capsys.readouterr().out
    monkeypatch.setattr(pydocs, "fingerprint", lambda: "other packages")
    get("pydocs")
    assert hashes == {name: entry["sha256"] for name, entry in manifest("pydocs")["files"].items()}


@pytest.mark.slow
def test_pydocs_of_this_machine():
    get("pydocs")
    assert dataset_bytes("pydocs", "train") > 15e6 and dataset_bytes("pydocs", "val") > 500_000
    train, val = everything("pydocs")
    assert len(train) > 3000 and len(val) > 100
    words = [word for text in train for word in text.lower().split()]
    assert sum(word in pydocs.STOP_WORDS for word in words) > 0.12 * len(words)  # prose, not tables
    assert all(pq.ParquetFile(path).num_row_groups > 1 for path in list_shards("pydocs", "train"))


READS = """
import sys, time
from nanochat.data.sources import list_shards
list_shards(sys.argv[1], "train")
print("reads", flush=True)
time.sleep(60)
"""


def test_text_that_a_run_reads_is_not_replaced_under_it(folder):
    (folder / "a.jsonl").write_text(jsonl(["one", "two", "three"]))
    source = f"local:{folder}"
    get(source)
    reader = subprocess.Popen([sys.executable, "-c", READS, source], stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "reads\n"
    get(source)  # unchanged
    before = everything(source)
    (folder / "a.jsonl").write_text(jsonl(["other", "words", "here"]))
    with pytest.raises(UserError, match="is being read by a run and would be replaced"):
        get(source)
    assert everything(source) == before
    reader.kill()
    reader.communicate()
    get(source)
    assert sorted(itertools.chain(*everything(source))) == ["here", "other", "words"]


def test_a_shard_with_a_flipped_byte_is_made_anew(folder):
    (folder / "a.jsonl").write_text(jsonl([f"document {i}" for i in range(50)]))
    source = f"local:{folder}"
    get(source)
    (shard,) = list_shards(source, "train")
    before = shard.read_bytes()
    damaged = bytearray(before)
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    get(source)
    assert shard.read_bytes() == before


@given(documents=st.lists(st.text(alphabet="aé", max_size=9)), limit=st.integers(1, 40))
def test_documents_up_to_a_size_are_just_enough_whole_ones(documents, limit):
    chosen = list(parquet.up_to(documents, limit, parquet.utf8_bytes))
    assert chosen == documents[: len(chosen)]
    size = len("".join(chosen).encode())
    assert size >= limit or chosen == documents
    assert not chosen or size - len(chosen[-1].encode()) < limit
    found = [list(part) for part in parquet.parts(iter(documents), limit, parquet.utf8_bytes)]
    assert list(itertools.chain(*found)) == documents and found[:1] == [chosen] * bool(documents)
