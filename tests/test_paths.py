import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat import paths

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
