import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.cluster import nodes
from nanochat.cluster.nodes import SIGNALS, Follower
from nanochat.errors import UserError
from nanochat.pipeline import ForwardedSignals

ROOT = Path(__file__).parents[2]


@pytest.fixture
def node0(tmp_path, monkeypatch):
    """Node 0 as a follower sees it: what it writes by hand, in attempt `now`."""
    monkeypatch.chdir(ROOT)
    for name in ("NNODES", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    class Node0:
        folder = tmp_path
        count = 0

        def beat(self, attempt="now"):
            self.count += 1
            (tmp_path / "beat").write_text(f"{attempt} {self.count}\n")

        def order(self, *words, attempt="now"):
            nodes.announce({"NODES_FOLDER": str(tmp_path), "NODES_ATTEMPT": attempt}, ["--nproc-per-node=1", *words])

        def end(self, code, attempt="now"):
            (tmp_path / "end").write_text(f"{attempt} {code}\n")

    return Node0()


def script(tmp_path, text):
    path = tmp_path / "command.py"
    path.write_text(text)
    return "--", str(path)


def until(follower, done):
    """Look until `done()`; the exit code if there was one before."""
    for _ in range(600):
        code = follower.look()
        if code is not None or done():
            return code
        time.sleep(0.05)
    raise AssertionError("it never came")


def never():
    return False


def test_orders_are_run_once_each_and_the_end_is_handed_on(node0, tmp_path):
    command = script(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    follower = Follower(tmp_path, 3, 60, ForwardedSignals(SIGNALS, kill=False))
    assert follower.look() is None and not (tmp_path / "joined-now-3").exists()
    node0.beat()
    assert follower.look() is None and (tmp_path / "joined-now-3").exists()
    for times in (1, 2):
        node0.order(*command)
        assert until(follower, lambda times=times: follower.done == times and follower.child is None) is None
        assert (tmp_path / "ran").read_text() == "x" * times
    assert follower.look() is None
    node0.end(0)
    assert follower.look() == 0


def test_what_an_earlier_attempt_left_is_not_followed(node0, tmp_path):
    command = script(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    node0.beat("before")
    node0.order(*command, attempt="before")
    node0.end(1, "before")
    follower = Follower(tmp_path, 1, 60, ForwardedSignals(SIGNALS, kill=False))
    for _ in range(3):
        assert follower.look() is None
    node0.beat("now")
    for _ in range(3):
        assert follower.look() is None
    assert follower.child is None and follower.done == 0
    node0.order(*command)  # numbered from 1 again
    assert json.loads((tmp_path / "order").read_text())["number"] == 1
    assert until(follower, lambda: follower.done == 1 and follower.child is None) is None


def test_a_command_that_fails_ends_the_node_with_its_code(node0, tmp_path):
    follower = Follower(tmp_path, 1, 60, ForwardedSignals(SIGNALS, kill=False))
    node0.beat()
    node0.order(*script(tmp_path, "raise SystemExit(9)"))
    assert until(follower, never) == 9


SLEEPS = "open({ready!r}, 'w'); import time; time.sleep(60)"


def test_silence_ends_it_and_what_runs_here(node0, tmp_path):
    follower = Follower(tmp_path, 1, 60, ForwardedSignals(SIGNALS, kill=False))
    node0.beat()
    node0.order(*script(tmp_path, SLEEPS.format(ready=str(tmp_path / "ready"))))
    assert until(follower, (tmp_path / "ready").exists) is None
    child = follower.child
    follower.patience = 0.0
    with pytest.raises(UserError, match="no heartbeat of node 0"):
        follower.look()
    assert child.poll() is not None


def test_a_command_that_does_not_end_with_node_0_is_ended(node0, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "GRACE_SECONDS", 0.1)
    follower = Follower(tmp_path, 1, 60, ForwardedSignals(SIGNALS, kill=False))
    node0.beat()
    node0.order(*script(tmp_path, SLEEPS.format(ready=str(tmp_path / "ready"))))
    until(follower, (tmp_path / "ready").exists)
    node0.end(5)
    assert until(follower, never) == 5


def test_a_node_0_that_starts_anew_ends_what_the_old_one_ran(node0, tmp_path):
    follower = Follower(tmp_path, 1, 60, ForwardedSignals(SIGNALS, kill=False))
    node0.beat()
    node0.order(*script(tmp_path, SLEEPS.format(ready=str(tmp_path / "ready"))))
    until(follower, (tmp_path / "ready").exists)
    child = follower.child
    node0.beat("anew")
    assert follower.look() is None
    assert child.poll() is not None and (tmp_path / "joined-anew-1").exists()


def test_without_several_nodes_nothing_is_announced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes.announce({}, ["--", "-m", "x"])
    assert list(tmp_path.iterdir()) == []


SAVES = """
import signal, sys, time
def save(number, frame):
    open({saved!r}, "w").write("saved")
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
open({ready!r}, "w")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_the_command_save_and_node_0_say_the_end(node0, tmp_path, number):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    words = [sys.executable, "-m", "nanochat.cluster.nodes", str(tmp_path), "--poll=0.05", "--patience=60"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert "first heartbeat" in process.stdout.readline()
    node0.beat()
    node0.order(*script(tmp_path, SAVES.format(saved=str(saved), ready=str(ready))))
    wait_for(ready)
    process.send_signal(number)
    wait_for(saved)
    assert process.poll() is None
    node0.end(143)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_node_0_lets_its_script_save_and_tells_the_others_how_it_ended(node0, tmp_path, number):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    _, path = script(tmp_path, SAVES.format(saved=str(saved), ready=str(ready)))
    words = ["nanochat.cluster.nodes", str(tmp_path), "--node-rank=0", "--", sys.executable, path]
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT)
    wait_for(ready)
    process.send_signal(number)
    assert process.wait(timeout=30) == 1 and saved.exists()
    attempt, code = (tmp_path / "end").read_text().split()
    assert code == "1" and (tmp_path / "beat").read_text().split() == [attempt, "last"]


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")
