import json
from datetime import datetime

import pytest

from nanochat import runtime
from nanochat.errors import UserError
from nanochat.runtime import print0
from nanochat.train.run_log import RunLog, free_name, run_name
from nanochat.train.tracking import Tracker

NOW = datetime(2025, 8, 31, 14, 30, 22)


@pytest.mark.parametrize(
    ("arch", "width", "base", "name"),
    [("speedrun", 1024, 768, "speedrun_20250831_143022_mup_w1024_base768"),
     ("speedrun", 768, 0, "speedrun_20250831_143022_sp_w768"),
     ("nanochat", 1280, 0, "nanochat_20250831_143022_sp_w1280")],
)  # fmt: skip
def test_names(arch, width, base, name):
    assert run_name(arch, width, base, NOW) == name


def test_what_is_printed_and_measured_lands_in_the_folder(store, capsys):
    with RunLog("run", {"depth": 4, "rates": {"matrix_lr": 0.02}}) as log:
        print0("hello", 3, sep="-")
        tracker = Tracker("base", "dummy", {}, log=log)
        tracker.log(1, 100, {"Loss/train_loss": 2.5, "Model/spectral_norm/0.attn.c_q": 1.0})
        tracker.log(2, 200, {"Loss/train_loss": 2.25})
        tracker.log(2, 200, {"Model/spectral_norm/0.attn.c_q": 1.0})
        tracker.close()
        print0("nobody writes this down")
    assert capsys.readouterr().out == "hello-3\nnobody writes this down\n"
    folder = store / "logs" / "run"
    assert (folder / "console.log").read_text() == "hello-3\n"
    assert (folder / "training.log").read_text().splitlines() == [
        "step 000001 | tokens 100 | Loss/train_loss 2.5",
        "step 000002 | tokens 200 | Loss/train_loss 2.25",
    ]
    assert json.loads((folder / "config.json").read_text()) == {"depth": 4, "rates": {"matrix_lr": 0.02}}
    assert runtime.listeners == []


def test_a_resumed_run_goes_on_in_the_same_files(store):
    for resume_step, step in ((None, 1), (1, 2)):
        with RunLog("run", {"depth": 4}, resume_step) as log:
            print0(f"start {step}")
            log.step(step, step, {"Loss/train_loss": 1.0})
    folder = store / "logs" / "run"
    assert (folder / "console.log").read_text() == "start 1\nstart 2\n"
    lines = (folder / "training.log").read_text().splitlines()
    assert [line.split(" |")[0] for line in lines] == ["step 000001", "# goes on from step 1", "step 000002"]


def test_what_ended_the_run_is_written_down(store):
    with pytest.raises(UserError), RunLog("run", {}):
        print0("begins")
        raise UserError("--depth=0: too small")
    assert (store / "logs" / "run" / "console.log").read_text() == "begins\nUserError: --depth=0: too small\n"
    assert runtime.listeners == []


def test_other_ranks_write_nothing(store, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with RunLog("run", {}) as log:
        print0("x")
        log.step(1, 1, {"Loss/train_loss": 1.0})
    assert not (store / "logs").exists() and runtime.listeners == []


def test_a_name_is_given_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert free_name("mine") == "mine"
    with RunLog("mine", {}):
        assert free_name("mine") == "mine.2"
    with RunLog("mine.2", {}):
        assert free_name("mine") == "mine.3"
