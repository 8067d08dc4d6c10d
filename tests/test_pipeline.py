import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
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


def test_an_evaluation_whose_section_or_results_were_damaged_runs_again(store):
    results, section = store / "base_eval" / "adhoc_000003.csv", paths.run_dir() / "report" / "base_eval.json"
    writes = f"{WRITE}; mkdir -p {results.parent} {section.parent}; echo 1 > {results}; echo 2 > {section}"
    run("base_eval", writes)
    run("base_eval", writes)
    assert times_run(store) == 1
    for count, path in enumerate((results, section), start=2):
        path.write_text("3")
        run("base_eval", writes)
        run("base_eval", writes)
        assert times_run(store) == count
    (store / "base_eval" / "another_000003.csv").write_text("1")
    run("base_eval", writes)
    assert times_run(store) == 3


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


def test_a_signal_that_another_thread_gets_is_handed_on_at_once():
    started = time.monotonic()
    with pipeline.ForwardedSignals([signal.SIGTERM], kill=False) as signals:
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        signals.attach(child.pid)
        killer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
        killer.start()
        assert pipeline.wait(child) == -signal.SIGTERM
        killer.join()
    assert time.monotonic() - started < 30


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


WALK = """
cd {root}
source dev/stages.sh
NANOCHAT_BASE_DIR={store} TAG=adhoc NANOCHAT_CONTINUE="bash walk.sh"
export NANOCHAT_BASE_DIR NANOCHAT_CONTINUE
{command}
touch {store}/after
"""


def walk(store, command):
    """The chain's shell in a session of its own, as a terminal starts a script."""
    script = WALK.format(root=ROOT, store=store, command=command)
    return subprocess.Popen(["bash", "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("whom", ["bash", "group"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_whichever_signal_comes_to_whomever_the_stage_saves_and_no_other_begins(store, name, whom):
    (store / "stage.py").write_text(SAVES_WHEN_TOLD.format(code=75))
    chain = walk(store, f"stage a -- python {store}/stage.py")
    wait_for(store / "ready")
    (os.kill if whom == "bash" else os.killpg)(chain.pid, signal.Signals[name])
    _, error = chain.communicate(timeout=30)
    assert chain.returncode == 75 and "to continue: bash walk.sh" in error and "Traceback" not in error
    assert (store / "saved").exists() and not (store / "after").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [("SIGINT", "sleep 1"), ("SIGUSR1", "x=$(sleep 1)"), ("SIGQUIT", "attend sleep 60")]
    + [(name, "stage a -- sleep 60") for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1")],
)
def test_a_signal_to_the_shell_alone_ends_it_at_any_moment(store, name, command):
    chain = walk(store, f"touch {store}/ready; {command}")
    wait_for(store / "ready")
    time.sleep(0.1)  # in the last case before the runner, which Python has to load, hears signals
    chain.send_signal(signal.Signals[name])
    _, error = chain.communicate(timeout=30)
    assert chain.returncode in (128 + signal.Signals[name], 143) and not (store / "after").exists(), error
    assert "Traceback" not in error


@pytest.mark.parametrize(("command", "code"), [("attend false", 1), ("attend sh -c 'exit 7'", 7), ("stage ''", 1)])
def test_what_fails_at_once_ends_the_chain_with_its_code(store, command, code):
    for _ in range(3):  # it may have ended before the shell looks
        chain = walk(store, command)
        chain.communicate(timeout=30)
        assert chain.returncode == code and not (store / "after").exists()


def test_a_signal_after_the_last_work_of_a_stage_starts_no_other(store):
    # hashing what was written: the stage is done, and found done by the next call
    (store / "hashing.py").write_text(
        "import os, signal\nfrom nanochat import ledger, pipeline\nfind = ledger.fingerprint\n"
        "ledger.fingerprint = lambda p: [os.kill(os.getpid(), signal.SIGINT) for _ in p if p] and find(p)\n"
        "pipeline.cli.run_with_command(pipeline.main, pipeline.Settings)\n"
    )
    words = ["run", "a", "--out", "out", "--", "bash", "-c", WRITE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, store / "hashing.py", *words]
    runner = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert runner.returncode == 130 and "stopped by SIGINT\nto continue: " in runner.stderr, runner.stderr
    assert statuses("a") == ["started", "finished"]


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


def test_the_holder_of_a_run_may_be_another_host(store, monkeypatch, tmp_path):
    run_dir = paths.run_dir()
    with pipeline.locked(run_dir):
        assert (run_dir / "lock").read_text() == f"{os.getpid()} on {socket.gethostname()}"
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(UserError, match=f"process {os.getpid()} on .*, which shares this store: wait for it"):
            pipeline.reset(run_dir)


CHAIN = """
cd {root}
source dev/stages.sh
NANOCHAT_BASE_DIR={store} TAG=adhoc
export NANOCHAT_BASE_DIR
stage a -- true
touch {store}/between
until [ -e {store}/go ]; do sleep 0.05; done
stage b -- true
"""


def test_the_run_is_held_between_stages_and_to_the_end_of_the_script(store):
    script = CHAIN.format(root=ROOT, store=store)
    chain = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(store / "between")
    assert pipeline.is_locked(paths.run_dir())
    assert (paths.run_dir() / "lock").read_text().split()[0] == str(chain.pid)
    second = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: run adhoc is being worked on by process {chain.pid}: wait for it")
    assert second.stderr.count("\n") == 1
    (store / "go").touch()
    _, error = chain.communicate(timeout=30)
    assert chain.returncode == 0, error
    assert statuses("b") == ["started", "finished"]
    assert not pipeline.is_locked(paths.run_dir())


def ended(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


LEAVES_A_WORD = """
import os, pathlib, signal, subprocess, sys, time
store = pathlib.Path(os.environ["NANOCHAT_BASE_DIR"])
child = subprocess.Popen(["sleep", "60"])
def save(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(store / "pids").write_text(f"{os.getpid()} {child.pid}")
(store / "ready").touch()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_stage_ends_with_its_runner_even_by_sigkill_and_saves_before(store):
    runner = start("a", "--", "python", "-c", LEAVES_A_WORD)
    wait_for(store / "ready")
    pids = (store / "pids").read_text().split()
    runner.kill()
    runner.communicate()
    wait_until(lambda: all(map(ended, pids)))
    wait_until(lambda: not pipeline.is_locked(paths.run_dir()))
    assert "saved\n" in (paths.run_dir() / "logs" / "a.log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of a parent's end")
def test_a_stage_ends_with_the_script_that_walks_the_chain(store):
    script = f"cd {ROOT}; source dev/stages.sh; NANOCHAT_BASE_DIR={store} TAG=adhoc; stage a -- python {store}/stage.py"
    (store / "stage.py").write_text(LEAVES_A_WORD)
    chain = subprocess.Popen(["bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(store / "ready")
    pids = (store / "pids").read_text().split()
    chain.kill()
    chain.wait()
    wait_until(lambda: all(map(ended, pids)))
    wait_until(lambda: not pipeline.is_locked(paths.run_dir()))
    assert statuses("a")[-1] == "unfinished"


def write_words(name, word):
    """A stage that writes `word` where the program of today finds the folder `name`, and no other file."""
    code = f"from nanochat import paths; d = paths.artifact({name!r}); d.mkdir(exist_ok=True); "
    return ["python", "-c", code + f"[f.unlink() for f in d.iterdir()]; (d / {word!r}).write_text({word!r})"]


def as_run(monkeypatch, name):
    monkeypatch.setenv("NANOCHAT_RUN_ID", name)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["tokenizer", "eval_bundle"])
def test_what_a_run_reads_is_its_own_and_the_store_has_the_newest(store, monkeypatch, name):
    for run_id in ("a", "b"):
        as_run(monkeypatch, run_id)
        pipeline.main(pipeline.Settings("run", "make", outputs=(name,)), write_words(name, run_id))
    assert content(store / name) == {"b": "b"}
    for run_id in ("a", "b"):
        as_run(monkeypatch, run_id)
        assert content(paths.artifact(name)) == {run_id: run_id}
        assert list(ledger.fingerprint([name])) == [f"runs/{run_id}/{name}/{run_id}"]
        pipeline.main(pipeline.Settings("run", "make", outputs=(name,)), write_words(name, run_id))
        assert statuses("make") == ["started", "finished"]  # the other run has not made it stale
    as_run(monkeypatch, "new")
    assert paths.artifact(name) == store / name
    monkeypatch.delenv("NANOCHAT_RUN_ID")
    assert paths.artifact(name) == store / name


class Killed(BaseException):
    pass


def test_a_run_killed_while_folders_change_hands_keeps_a_whole_one(store, monkeypatch):
    """Killed before its bundle was in the store, the next start emptied the run's copy as well."""
    as_run(monkeypatch, "a")
    words = ["python", "-c", "from nanochat.paths import artifact as a; d = a('eval_bundle'); d.mkdir(exist_ok=True); "
             "[(d / n).write_text('1') for n in 'abc']"]  # fmt: skip
    settings = pipeline.Settings("run", "make", outputs=("eval_bundle",))
    whole, replace = {name: "1" for name in "abc"}, os.replace
    for calls in range(12):  # of os.replace, after which it is killed
        left = calls

        def killed(source, target):
            nonlocal left
            if (left := left - 1) < 0:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "replace", killed)
            pipeline.main(settings, words)
        pipeline.exchange("eval_bundle", into_run=True)
        assert content(paths.run_dir() / "eval_bundle") in ({}, whole)
        assert content(store / "eval_bundle") in ({}, whole)
    assert content(store / "eval_bundle") == whole


def test_data_of_tasks_are_handed_from_run_to_run_but_not_replaced(store, monkeypatch):
    for run_id, folder in (("a", "one"), ("b", "two")):
        as_run(monkeypatch, run_id)
        write = f'd="$NANOCHAT_BASE_DIR/runs/{run_id}/task_data/hub"; mkdir -p "$d/{folder}" "$d/both"; '
        write += f'for f in {folder} both; do echo {run_id} >"$d/$f/x.new"; mv "$d/$f/x.new" "$d/$f/x"; done'
        assert run("chat_data", write, outputs=("task_data",)) == 0
    assert content(store / "task_data") == {"hub/one/x": "a\n", "hub/two/x": "b\n", "hub/both/x": "b\n"}
    assert content(store / "runs/a/task_data") == {"hub/one/x": "a\n", "hub/both/x": "a\n"}
    assert content(store / "runs/b/task_data") == {"hub/one/x": "a\n", "hub/two/x": "b\n", "hub/both/x": "b\n"}
    as_run(monkeypatch, "a")
    run("chat_data", "true", outputs=("task_data",))
    assert (paths.artifact("task_data") / "hub/both/x").read_text() == "a\n"


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
