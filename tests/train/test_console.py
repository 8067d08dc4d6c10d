import errno
import io
import json
import sys
import threading
import time
from datetime import datetime
from typing import ClassVar

import pytest

from nanochat.files import read_jsonl
from nanochat.flags import NO_WANDB
from nanochat.paths import run_dir
from nanochat.train import tracking
from nanochat.train.console import GROUPS, Tracker, check_names, wandb_name, wandb_project


@pytest.fixture(autouse=True)
def here(store, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")


def records():
    return [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]


def test_records_are_there_at_once():
    tracker = Tracker({"stage": "base"}, "dummy")
    tracker.log(1, 100, {"Loss/train_loss": 2.5})
    assert records() == [{"stage": "base", "step": 1, "tokens": 100, "Loss/train_loss": 2.5}]
    tracker.close()


def test_resuming_drops_what_will_be_repeated_and_only_that():
    for stage in ("base", "mid"):
        tracker = Tracker({"stage": stage}, "dummy")
        for step in range(1, 6):
            tracker.log(step, step, {"Loss/train_loss": 1.0})
        tracker.close()
    with open(run_dir() / "metrics.jsonl", "a") as file:
        file.write('{"stage": "base", "st')  # a kill in the middle of a line
    Tracker({"stage": "base"}, "dummy", {"step": 3}).close()
    assert [(r["stage"], r["step"]) for r in records()] == [("base", s) for s in (1, 2, 3)] + [
        ("mid", s) for s in range(1, 6)
    ]
    Tracker({"stage": "base"}, "dummy").close()
    assert {r["stage"] for r in records()} == {"mid"}


def test_other_ranks_write_nothing(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker({"stage": "base"}, "dummy")
    tracker.log(1, 1, {"Loss/train_loss": 1.0})
    tracker.close()
    assert not (run_dir() / "metrics.jsonl").exists()


def test_wandb_gets_the_same_records_when_asked(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(run_dir().parent))
    logged = []
    tracker = Tracker({"stage": "base"}, "name-of-run")
    monkeypatch.setattr(tracker.wandb, "log", logged.append)
    tracker.log(2, 50, {"Loss/train_loss": 1.0})
    tracker.close()
    assert logged == [{"step": 2, "tokens": 50, "Loss/train_loss": 1.0}]
    resumed = Tracker({"stage": "base"}, "name-of-run", {"step": 2, "wandb_id": tracker.wandb_id})
    resumed.close()
    assert tracker.wandb_id is not None and resumed.wandb_id == tracker.wandb_id


@pytest.mark.parametrize("rank", ["0", "1"])
def test_names_outside_the_groups_are_refused_on_every_rank(monkeypatch, rank):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker({"stage": "base"}, "dummy")
    with pytest.raises(ValueError, match="'Norms/x': expected Group/name"):
        tracker.log(1, 1, {"Loss/train_loss": 1.0, "Norms/x": 1.0})
    tracker.close()


@pytest.mark.parametrize(
    ("arch", "mup", "project"),
    [("nanochat", False, "nanochat"), ("nanochat", True, "nanochat"), ("speedrun", False, "speedrun-basic"),
     ("speedrun", True, "speedrun-mup")],
)  # fmt: skip
def test_wandb_projects(arch, mup, project, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert wandb_project(arch, mup) == project
    monkeypatch.setenv("WANDB_PROJECT", "speedrun-mup-group")
    assert wandb_project(arch, mup) == "speedrun-mup-group"


def test_wandb_gets_the_project_and_a_step_axis_for_each_group(monkeypatch):
    import wandb

    class Run:
        id = "x"
        axes: ClassVar[dict[str, str]] = {}

        def define_metric(self, name, step_metric):
            self.axes[name] = step_metric

    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Run())
    Tracker({"stage": "base"}, "name", project="speedrun-mup")
    assert asked["project"] == "speedrun-mup" and asked["name"] == "name"
    assert Run.axes == {f"{group}/*": "step" for group in GROUPS}


@pytest.mark.parametrize(
    ("run", "arch", "width", "base", "name"),
    [("auto", "speedrun", 1024, 768, "speedrun_20250831_143022_mup_w1024_base768"),
     ("auto", "speedrun", 768, 0, "speedrun_20250831_143022_sp_w768"),
     ("auto", "nanochat", 1280, 0, "nanochat_20250831_143022_sp_w1280"), ("mine", "nanochat", 1280, 0, "mine")],
)  # fmt: skip
def test_wandb_names(run, arch, width, base, name):
    assert wandb_name(run, arch, width, base, datetime(2025, 8, 31, 14, 30, 22)) == name


def test_names_without_a_known_group_are_refused():
    check_names(["Loss/train_loss", "Model/spectral_norm/3.attn.c_q"])
    for name in ("loss", "Losses/train_loss", "Loss/", "/x", "loss/x"):
        with pytest.raises(ValueError, match="expected Group/name"):
            check_names([name])


class BrokenRun:
    id, dir = "x", "/somewhere/offline-run/files"

    def define_metric(self, name, step_metric):
        pass

    def log(self, record):
        raise OSError("the service has died")

    finish = log


@pytest.fixture
def wandb_of_a_terminal(monkeypatch):
    """W&B as it is on a terminal, where it would ask; what was asked of it."""
    import wandb
    from wandb.errors import term

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # or it goes on with the settings of another test
    monkeypatch.setattr(term, "can_use_terminput", lambda: True)
    monkeypatch.setattr(term, "terminput", lambda *_, **__: pytest.fail("waits for an answer"))
    opened = []
    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(options) or BrokenRun())
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    return opened


def refuse(**_):
    raise ValueError("no\nsuch key")


@pytest.mark.parametrize(
    ("login", "needle"),
    [
        (lambda **_: False, "wandb login"),
        (refuse, "no such key"),
        (lambda **_: time.sleep(5), "no answer"),
    ],
    ids=["no key", "bad key", "no network"],
)
def test_without_wandb_a_run_says_so_once_and_goes_on(login, needle, wandb_of_a_terminal, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.train.tracking.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("wandb.login", login)
    tracker = Tracker({"stage": "base"}, "name")
    (line,) = capsys.readouterr().out.splitlines()
    assert needle in line and "wandb sync /somewhere/offline-run" in line and "Training goes on" in line
    assert [options.get("mode") for options in wandb_of_a_terminal] == ["offline"]
    tracker.log(1, 10, {"Loss/train_loss": 1.0})
    tracker.log(2, 20, {"Loss/train_loss": 1.0})
    tracker.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "the service has died" in line
    assert len(read_jsonl(run_dir() / "metrics.jsonl")) == 2


def test_no_key_is_found_out_without_asking(monkeypatch, tmp_path):
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)
    monkeypatch.setattr("wandb.errors.term.terminput", lambda *_, **__: pytest.fail("waits for an answer"))
    from nanochat.train.tracking import _refusal

    assert "no API key" in _refusal()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "cannot log in" in _refusal()


def test_a_service_that_has_died_leaves_no_trace_at_the_end(wandb_of_a_terminal, monkeypatch, capfd):
    """W&B's own handler at the end of the interpreter would raise there; tearing it down takes that handler away."""
    ended = threading.Event()

    def teardown():
        ended.set()
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr("wandb.teardown", teardown)
    tracker = Tracker({"stage": "base"}, "name")
    tracker.log(1, 10, {"Loss/train_loss": 1.0})
    assert ended.wait(5)
    tracker.close()
    assert capfd.readouterr().out.count("the service has died") == 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WANDB_MODE", "foo", "WANDB_MODE: Input should be 'online', 'offline'"),
        ("WANDB_BASE_URL", "http://me:secret@ho st", "WANDB_BASE_URL: Input should be a valid URL"),
        ("WANDB_HTTP_TIMEOUT", "soon", "WANDB_HTTP_TIMEOUT: Input should be a valid number"),
    ],
)
def test_a_setting_that_wandb_refuses_is_named(name, value, expected, wandb_of_a_terminal, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    tracking.warn()
    Tracker({"stage": "base"}, "name").close()
    before, line = capsys.readouterr().out.splitlines()
    assert f"W&B is not reached: {expected}" in before and f"no W&B: {expected}" in line
    assert "secret" not in before + line and "pydantic" not in before + line


@pytest.mark.parametrize("failures", [1, 9], ids=["online", "everywhere"])
def test_a_tracker_that_does_not_start_ends_no_run(failures, wandb_of_a_terminal, monkeypatch, capsys):
    modes = []

    def init(**options):
        modes.append(options.get("mode"))
        if len(modes) <= failures:
            raise RuntimeError("cannot start")
        return BrokenRun()

    monkeypatch.setattr("wandb.init", init)
    tracker = Tracker({"stage": "base"}, "name")
    tracker.log(1, 10, {"Loss/train_loss": 1.0})
    tracker.close()
    assert modes == [None, "offline"]
    assert "cannot start" in capsys.readouterr().out


def test_a_package_that_is_broken_ends_no_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    tracker = Tracker({"stage": "base"}, "name")
    tracker.log(1, 10, {"Loss/train_loss": 1.0})
    tracker.close()
    assert "warning: no W&B: " in capsys.readouterr().out
    assert len(read_jsonl(run_dir() / "metrics.jsonl")) == 1


def test_a_full_disk_ends_no_run_and_what_was_not_written_comes_later(monkeypatch, capsys):
    tracker = Tracker({"stage": "base"}, NO_WANDB)
    raw = tracker.file.buffer.raw

    class Full(io.FileIO):
        full = True

        def write(self, data):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    disk = Full(raw.name, "a")
    tracker.file = io.TextIOWrapper(io.BufferedWriter(disk), line_buffering=True)
    for step in range(3):
        tracker.log(step, step, {"Loss/train_loss": 1.0})
    assert capsys.readouterr().out.count("No space left on device") == 1
    disk.full = False
    tracker.log(3, 3, {"Loss/train_loss": 1.0})
    tracker.close()
    assert [record["step"] for record in read_jsonl(run_dir() / "metrics.jsonl")] == [0, 1, 2, 3]
