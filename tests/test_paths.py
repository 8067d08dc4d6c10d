import os
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat import paths
from nanochat.errors import UserError
from nanochat.sections import keeps_results

anything = st.text(max_size=400) | st.text(st.characters(codec=None), max_size=40)


@given(name=anything)
@example("")
@example("..")
@example("-e\u0301")
@example("a" * 199 + "模")
@example("\udcff")
def test_any_name_is_one_folder_and_that_folder_is_its_own_name(name):
    folder = paths.slug(name)
    assert (
        folder and folder[0] not in ".-" and "/" not in folder and folder.isprintable() and folder.split() == [folder]
    )
    assert len(folder.encode()) <= paths.LONGEST_NAME
    assert paths.slug(folder) == folder


@given(one=anything, other=anything)
@example("a/b", "a-b b")
@example("local:/data/甲", "local:/data/乙")
@example("local:/a/b", "local:/a-b")
@example("x" * 300, "x" * 301)
@example(".x", "..x")
def test_two_names_never_share_a_folder(one, other):
    same = unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
    assert (paths.slug(one) == paths.slug(other)) == same


@pytest.mark.parametrize(
    "name",
    ["pydocs", "d12_x.1", "tiny-d4-pydocs", "模型", "实验一", "модель", "मॉडल", "نموذج", "e\u0301te\u0301", "a--b-"],
)
def test_names_of_any_script_are_kept(name):
    assert paths.slug(name) == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize("name", ["", "..", ".", "/", "../../x", "a/b", "😀"])
def test_folders_of_runs_and_models_lie_within_theirs(store, monkeypatch, name):
    assert paths.checkpoint_dir("base", name).resolve().parent == store / "checkpoints" / "base"
    monkeypatch.setenv("NANOCHAT_RUN_ID", name)
    assert paths.run_dir().resolve().parent == store / "runs"


@pytest.mark.parametrize(
    ("here", "asked"), [("run", "Run"), ("RUN.1", "run.1"), ("Модель", "модель"), ("e\u0301T", "\u00e9t")]
)
def test_names_that_differ_in_case_never_meet_where_the_file_system_takes_them_for_one(store, monkeypatch, here, asked):
    paths.checkpoint_dir("base", here).mkdir(parents=True)
    assert paths.checkpoint_dir("base", asked).name != here  # here they are two
    list_all = os.listdir
    paths._own.cache_clear()
    for folder in (store / "checkpoints" / "base", store / "runs"):
        (folder / paths.slug(asked)).mkdir(parents=True)  # this is what such a file system says of `asked`
    monkeypatch.setattr(os, "listdir", lambda folder: [unicodedata.normalize("NFD", here)] if list_all(folder) else [])
    for find in (lambda name: paths.checkpoint_dir("base", name), paths.run_dir):
        with pytest.raises(
            UserError, match=f"{paths.slug(asked)} is the folder of {paths.slug(here)}: .*choose another"
        ):
            find(asked)
        assert find(here)


@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
def test_a_store_that_is_a_file_is_one_line(tmp_path, monkeypatch, below):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", f"{tmp_path}/file{below}")
    with pytest.raises(UserError, match=f"NANOCHAT_BASE_DIR={tmp_path}/file{below} is no folder"):
        paths.get_base_dir()


def test_no_store_without_a_home_is_one_line(monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~nobody-of-that-name/store")
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR=~nobody-of-that-name/store cannot be made"):
        paths.get_base_dir()


def test_a_store_that_cannot_be_written_can_be_read(store, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(store)))
    assert paths.get_base_dir() == store
    assert not paths.is_writable(store / "runs" / "new")
    with pytest.raises(UserError, match="tokenizer cannot be written"):
        paths.check_writable(paths.tokenizer_dir())
    assert not keeps_results("chat_eval")
    assert capsys.readouterr().out == f"note: {store}/runs/adhoc cannot be written: results are printed and not kept\n"


def test_a_folder_below_a_file_cannot_be_written(store):
    (store / "chat_eval").touch()
    assert paths.is_writable(store / "base_eval") and not paths.is_writable(store / "chat_eval")
    assert keeps_results("base_eval") and not keeps_results("chat_eval")
