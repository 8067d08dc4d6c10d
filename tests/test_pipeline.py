import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import ledger, paths, pipeline
from nanochat.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_store(store):
    return store


def run(stage, script, **settings):
    """Run a shell script as a stage."""
    return pipeline.main(pipeline.Settings("run", stage, **settings), ["bash", "-c", script])


def statuses(stage):
    return [record["status"] for record in ledger.read(paths.run_dir()) if record["stage"] == stage]


WRITE = 'echo run >> "$NANOCHAT_BASE_DIR/count"; echo data > "$NANOCHAT_BASE_DIR/out"'


def times_run(store):
    return len((store / "count").read_text().splitlines())


def test_a_finished_stage_is_skipped(store, capfd):
    for _ in range(3):
        assert run("a", WRITE, outputs=("out",)) == 0
    assert times_run(store) == 1
    assert "done on" in capfd.readouterr().out


def test_a_stage_runs_again_when_its_command_input_output_or_setting_changes(store, monkeypatch):
    (store / "in").write_text("1")
    again = {"inputs": ("in",), "outputs": ("out",)}
    run("a", WRITE, **again)
    run("a", WRITE + " # other command", **again)
    assert times_run(store) == 2
    (store / "in").write_text("2")
    run("a", WRITE + " # other command", **again)
    assert times_run(store) == 3
    (store / "out").unlink()
    run("a", WRITE + " # other command", **again)
    assert times_run(store) == 4
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    run("a", WRITE + " # other command", **again)
    assert times_run(store) == 5
    run("a", WRITE + " # other command", **again)
    assert times_run(store) == 5


def test_processes_and_tracking_do_not_make_it_other_work(monkeypatch):
    one = pipeline.describe(["python", "-m", "scripts.tok_train", "--run=a", "--x=1"], [])
    many = pipeline.describe(["torchrun", "--nproc_per_node=8", "-m", "scripts.tok_train", "--run=b", "--x=1"], [])
    other = pipeline.describe(["python", "-m", "scripts.tok_train", "--run=a", "--x=2"], [])
    assert one == many != other


def test_leave_to_run_model_written_code_does_not_make_it_other_work(store, monkeypatch):
    monkeypatch.delenv("NANOCHAT_ALLOW_UNSAFE_CODE", raising=False)
    run("a", WRITE, outputs=("out",))
    monkeypatch.setenv("NANOCHAT_ALLOW_UNSAFE_CODE", "1")
    run("a", WRITE, outputs=("out",))
    assert times_run(store) == 1


def test_output_goes_to_the_terminal_and_to_the_log(capfd):
    run("a", "echo to stdout; echo to stderr >&2; printf 'no newline'")
    log = (paths.run_dir() / "logs" / "a.log").read_text()
    shown = capfd.readouterr().out
    for line in ("to stdout", "to stderr", "no newline"):
        assert line in log and line in shown


def test_a_failed_stage_shows_its_last_lines_and_how_to_continue(capfd, monkeypatch):
    monkeypatch.setenv("NANOCHAT_CONTINUE", "DEPTH=3 bash speedrun.sh")
    assert run("a", "for i in $(seq 100); do echo line $i; done; exit 7") == 7
    error = capfd.readouterr().err
    assert "line 100" in error and "line 86" in error and "line 85\n" not in error
    assert "exit code 7" in error and "DEPTH=3 bash speedrun.sh" in error
    assert statuses("a") == ["started", "failed"]
    assert run("a", "exit 0") == 0


def test_a_stage_killed_by_a_signal_is_said_so(capfd):
    assert run("a", "kill -KILL $$") == 128 + signal.SIGKILL
    assert "SIGKILL" in capfd.readouterr().err


def test_a_stage_that_ends_well_without_its_outputs_is_unfinished_and_runs_again(capfd, store):
    assert run("a", "true", outputs=("model",)) == 75
    assert "did not write model yet" in capfd.readouterr().out
    assert statuses("a")[-1] == "unfinished"
    assert run("a", f"touch {store}/model", outputs=("model",)) == 0
    assert statuses("a")[-1] == "finished"


def test_a_missing_input_is_one_line_and_nothing_runs(store):
    with pytest.raises(UserError, match="needs tokenizer"):
        run("a", WRITE, inputs=("tokenizer",))
    assert not (store / "count").exists()


def test_a_command_that_is_not_there():
    with pytest.raises(UserError, match="cannot start no-such-program"):
        pipeline.main(pipeline.Settings("run", "a"), ["no-such-program"])


def test_stopping_early_is_neither_done_nor_failed(store, capfd):
    assert run("a", WRITE + "; exit 75", outputs=("out",)) == 75
    assert statuses("a") == ["started", "unfinished"]
    assert "to continue" in capfd.readouterr().err
    run("a", WRITE + "; exit 75", outputs=("out",))
    assert times_run(store) == 2


def test_a_runner_that_was_killed_itself_leaves_work_to_continue(store, capfd):
    run("a", WRITE, outputs=("out",))
    path = ledger.ledger_path(paths.run_dir())
    path.write_text(path.read_text().splitlines()[0] + "\n" + '{"stage": "a", "sta')
    run("a", WRITE, outputs=("out",))
    assert times_run(store) == 2
    assert "continues" in capfd.readouterr().out


def test_skip_is_recorded_with_its_reason_and_can_be_taken_back(store):
    pipeline.main(pipeline.Settings("run", "a", skip="no bundle"), [])
    assert ledger.read(paths.run_dir())[-1]["reason"] == "no bundle"
    run("a", WRITE, outputs=("out",))
    assert statuses("a") == ["skipped", "started", "finished"]


def skip(stage):
    pipeline.main(pipeline.Settings("run", stage, skip="not now"), [])


def row_of(stage):
    return next(row for row in ledger.summarize(ledger.read(paths.run_dir())) if row["stage"] == stage)


def test_a_stage_skipped_in_between_is_still_done(store, capfd):
    run("a", WRITE, outputs=("out",))
    before = row_of("a")
    for _ in range(2):
        skip("a")
        assert row_of("a")["status"] == "skipped"
        assert run("a", WRITE, outputs=("out",)) == 0
    assert times_run(store) == 1
    assert "done on" in capfd.readouterr().out
    after = row_of("a")
    assert after.pop("copy") and after == before  # finished, with the time that it took
    run("a", WRITE, outputs=("out",))
    assert statuses("a") == ["started", "finished", "skipped", "finished", "skipped", "finished"]


@pytest.mark.parametrize("change", ["command", "output"])
def test_a_stage_skipped_in_between_runs_again_when_something_changed(store, change):
    run("a", WRITE, outputs=("out",))
    skip("a")
    if change == "output":
        (store / "out").unlink()
    run("a", WRITE + (" # other" if change == "command" else ""), outputs=("out",))
    assert times_run(store) == 2


def test_work_stopped_half_way_and_skipped_goes_on(store, capfd):
    run("a", WRITE + "; exit 75", outputs=("out",))
    skip("a")
    run("a", WRITE + "; exit 75", outputs=("out",))
    assert times_run(store) == 2
    assert "continues" in capfd.readouterr().out


def test_a_stage_is_no_longer_stale_once_it_was_found_done(store):
    train = {"inputs": ("words",), "outputs": ("out",)}
    words = 'echo a > "$NANOCHAT_BASE_DIR/words"'
    run("chat_data", words, outputs=("words",))
    run("mid_train", WRITE, **train)
    run("chat_data", words + " # made anew, and the same", outputs=("words",))
    assert row_of("mid_train")["status"] == "stale"
    for _ in range(2):
        run("mid_train", WRITE, **train)
        assert row_of("mid_train")["status"] == "finished"
    assert times_run(store) == 1
    assert statuses("mid_train") == ["started", "finished", "finished"]


def test_a_process_left_behind_does_not_hold_the_stage_up(store):
    started = time.monotonic()
    run("a", 'sleep 60 & echo $! > "$NANOCHAT_BASE_DIR/pid"')
    assert time.monotonic() - started < 20
    pid = int((store / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_status_and_reset(store, capfd):
    run("a", WRITE, outputs=("out",))
    pipeline.main(pipeline.Settings("status"), [])
    shown = capfd.readouterr().out
    assert "a              finished" in shown and "base_train     pending" in shown
    pipeline.main(pipeline.Settings("reset"), [])
    run("a", WRITE, outputs=("out",))
    assert times_run(store) == 2


def start(*words):
    """The command line in a process of its own, run by a shell in the background as speedrun.sh does."""
    command = [sys.executable, "-m", "nanochat.pipeline", "run", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path):
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


SAVES_WHEN_TOLD = """
import os, pathlib, signal, sys, time
store = pathlib.Path(os.environ["NANOCHAT_BASE_DIR"])
def save(number, frame):
    (store / "saved").write_text(signal.Signals(number).name)
    sys.exit({code})
signal.signal(signal.SIGTERM, save)
(store / "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("code", "status", "exit_code"), [(75, "unfinished", 75), (0, "interrupted", 143)])
def test_sigterm_reaches_the_stage_which_saves(store, code, status, exit_code):
    runner = start("a", "--", "python", "-c", SAVES_WHEN_TOLD.format(code=code))
    wait_for(store / "ready")
    runner.send_signal(signal.SIGTERM)
    _, error = runner.communicate(timeout=30)
    assert (store / "saved").read_text() == "SIGTERM"
    assert runner.returncode == exit_code
    assert statuses("a") == ["started", status]
    assert "to continue" in error and "Traceback" not in error


COUNTS_SIGNALS = """
import os, pathlib, signal, time
store = pathlib.Path(os.environ["NANOCHAT_BASE_DIR"])
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
(store / "ready").touch()
while not received:
    time.sleep(0.05)
time.sleep(1)
(store / "received").write_text(str(len(received)))
raise SystemExit(75)
"""


def test_a_signal_that_comes_by_several_ways_counts_once(store):
    # a scheduler signals every process of a job; the shell above hands its own on as well
    runner = start("a", "--", "python", "-c", COUNTS_SIGNALS)
    wait_for(store / "ready")
    for _ in range(4):
        runner.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    runner.communicate(timeout=30)
    assert (store / "received").read_text() == "1"
    assert statuses("a") == ["started", "unfinished"]


SLEEPS = """
import os, pathlib, time
(pathlib.Path(os.environ["NANOCHAT_BASE_DIR"]) / "ready").touch()
time.sleep(60)
"""


def test_ctrl_c_reaches_the_stage_even_when_started_in_the_background(store):
    # an interactive shell's script runs `&` jobs with SIGINT ignored, which children inherit
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # not bash, which loses a SIGINT that comes between its fork and the exec of sleep
        runner = start("a", "--", "python", "-c", SLEEPS)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(store / "ready")
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=30)
    assert runner.returncode == 130
    assert statuses("a") == ["started", "interrupted"]


def test_two_pipelines_cannot_work_on_one_run(store):
    first = start("a", "--", "bash", "-c", 'touch "$NANOCHAT_BASE_DIR/ready"; sleep 60')
    wait_for(store / "ready")
    second = start("b", "--", "true")
    _, error = second.communicate(timeout=30)
    assert second.returncode == 1
    assert error.startswith("error: run adhoc is being worked on by process") and error.count("\n") == 1
    assert pipeline.is_locked(paths.run_dir())
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=30)
    assert not pipeline.is_locked(paths.run_dir())


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["a", "--inn", "x", "--", "true"], "--in"),
        (["a"], "no command"),
        (["--", "true"], "no stage named"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words, needle):
    runner = start(*words)
    _, error = runner.communicate(timeout=30)
    assert runner.returncode in (1, 2)
    assert needle in error and error.startswith("error: ") and error.count("\n") == 1


def test_records_tell_what_was_read_and_written(store, monkeypatch):
    monkeypatch.setenv("PROFILE", "tiny")
    (store / "in").write_text("1")
    run("a", WRITE, inputs=("in",), outputs=("out",))
    record = json.loads(ledger.ledger_path(paths.run_dir()).read_text().splitlines()[-1])
    assert list(record["basis"]["inputs"]) == ["in"] and list(record["outputs"]) == ["out"]
    assert record["exit_code"] == 0 and record["seconds"] > 0 and record["profile"] == "tiny"
    assert os.path.exists(record["log"])


IGNORES_SIGTERM = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(pathlib.Path(os.environ["NANOCHAT_BASE_DIR"]) / "ready").touch()
time.sleep(60)
"""


def test_a_stage_that_will_not_stop_is_killed_at_the_third_signal(store):
    runner = start("a", "--", "python", "-c", IGNORES_SIGTERM)
    wait_for(store / "ready")
    for _ in range(3):
        assert runner.poll() is None
        runner.send_signal(signal.SIGTERM)
        time.sleep(2 * pipeline.SAME_SIGNAL_SECONDS)
    assert runner.wait(timeout=30) == 128 + signal.SIGKILL
    runner.communicate()
