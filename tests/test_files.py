import contextlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import files
from nanochat.errors import UserError
from nanochat.files import DEEPEST, fields, inside, parse_json


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=9))
def test_json_comes_back_with_and_without_bom(value):
    data = json.dumps(value).encode()
    assert parse_json(data) == parse_json(b"\xef\xbb\xbf" + data) == value


@pytest.mark.parametrize("depth", [1, DEEPEST])
def test_what_is_nested_less_deeply_is_read(depth):
    assert json.dumps(parse_json(b"[" * depth + b"]" * depth)).count("[") == depth


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
@pytest.mark.parametrize("depth", [DEEPEST + 1, 900, 1_000_000])
def test_deep_nesting_is_refused(opening, closing, depth):
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        parse_json(opening * depth + b"1" + closing * depth)


@given(st.binary())
def test_any_bytes_are_json_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        parse_json(data)


@pytest.mark.parametrize(
    "value, message",
    [
        ([1], r"\[1\], expected an object with text, number, texts"),
        ({"text": "a", "number": 1}, "lacks texts"),
        ({"text": 5, "number": 1, "texts": []}, "text is 5, expected text"),
        ({"text": "a", "number": True, "texts": []}, "number is True, expected a whole number"),
        ({"text": "a", "number": 1.0, "texts": []}, "number is 1.0, expected a whole number"),
        ({"text": "a", "number": 1, "texts": "ab"}, "texts is 'ab', expected a list of texts"),
        ({"text": "a", "number": 1, "texts": ["a", None]}, r"texts is \['a', None\], expected a list of texts"),
        ({"text": "a", "number": 1, "texts": [["x" * 10**6] * 10**4] * 10**4}, r"texts is \[\['xxxx.{,120}$"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_value(value, message):
    with pytest.raises(UserError, match=message):
        fields(value, text=str, number=int, texts=list[str])
    assert fields({"texts": [], "number": 0, "text": ""}, text=str, number=int, texts=list[str]) == ["", 0, []]


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "a/../x", "/etc/passwd", "out/x", "a/out", "loop/x", "a\0b", "..", "\ud800/../x"]
)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "bundle"
    (folder / "a").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "a" / "out").symlink_to("../../x")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="leads out of"):
        inside(folder, name)


def test_names_within_the_folder_and_links_within_it_are_followed(tmp_path):
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "folder").symlink_to("real")
    os.symlink("a", tmp_path / "real" / "link")
    for name in ("a/b.jsonl", "link/b.jsonl", "..b", "a/...", "模型.jsonl"):
        assert inside(tmp_path / "folder", name) == tmp_path / "folder" / name


def test_what_killed_processes_left_goes_and_what_living_ones_write_stays(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    ours = files.temporary_path(tmp_path / "ours")
    space = ours.name.split(".")[1].partition("-")[0]
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = tmp_path / f"shard.parquet.{space}-{ended.pid}.tmp"
    folder = tmp_path / "below" / f"eval_bundle.{space}-{ended.pid}.tmp"
    foreign = tmp_path / f"a.00000000-{ended.pid}.tmp"
    others = [tmp_path / "notes.tmp", tmp_path / f"a.{space}-1.tmp", foreign, ours]
    folder.mkdir()
    for path in (dead, folder / "x", *others):
        path.touch()
    files.sweep(tmp_path.rglob("*.tmp"))
    assert not dead.exists() and not folder.exists() and all(path.exists() for path in others)
    monkeypatch.setattr(files, "STRANGER_SECONDS", -1.0)
    files.sweep(tmp_path.rglob("*.tmp"))
    assert [path for path in others if not path.exists()] == [foreign]


def test_what_was_left_by_a_process_of_our_own_number_is_in_nobodys_way(tmp_path, monkeypatch):
    """In a container that is started again, processes get the numbers they had."""
    for name in ("file", "folder", "other", "bundle"):
        files.temporary_path(tmp_path / name).mkdir()
    (files.temporary_path(tmp_path / "folder") / "old").touch()
    monkeypatch.setattr(files, "_ours", set())  # as the next process would know it
    with files.temporary_folder(tmp_path / "folder") as folder:
        assert list(folder.iterdir()) == []
        files.atomic_write_text(tmp_path / "file", "text")  # the first write here: what is in use stays
        assert folder.exists()
    with files.replaced_folder(tmp_path / "bundle") as folder:
        assert list(folder.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"file", "bundle"}


def test_the_first_write_into_a_folder_clears_what_was_left_there(tmp_path):
    script = "import os, signal, sys; from pathlib import Path; from nanochat.files import atomic_write\n"
    script += "with atomic_write(Path(sys.argv[1])) as t:\n    t.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "a"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    files.atomic_write_text(tmp_path / "b", "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
