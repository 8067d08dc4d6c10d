"""What benchmarks/faults.py does to the whole chain, done to a chain of three small programs; and that it would see a
difference."""

import ctypes
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import faults

ROOT = Path(__file__).resolve().parent.parent
CHAIN = """
set -euo pipefail
source dev/stages.sh
TAG=faults
export NANOCHAT_RUN_ID=faults NANOCHAT_CONTINUE="bash speedrun.sh"
stage dataset --out text -- python work.py text
stage base_train --in text --out checkpoints/base/faults/COMPLETE -- python work.py train
stage base_loss --in checkpoints -- python work.py loss
echo "talk to it:"
"""
# What trains leaves a checkpoint every fourth step, and when it is told to stop
WORK = """
import json, os, signal, sys, time
from pathlib import Path
from nanochat import sections
from nanochat.files import atomic_write_text
store, folder = Path(os.environ["NANOCHAT_BASE_DIR"]), Path(os.environ["NANOCHAT_BASE_DIR"], "checkpoints/base/faults")
told = []
if sys.argv[1] == "text":
    time.sleep(0.3)
    atomic_write_text(store / "text", "text")
elif sys.argv[1] == "train":
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    done = max((int(path.parent.name[5:]) for path in folder.glob("step_*/COMMITTED")), default=0)
    for step in range(done + 1, 13):
        time.sleep(0.05)
        print(f"step {step:05d}/00012", flush=True)
        if step % 4 == 0 or told:
            atomic_write_text(folder / f"step_{step:06d}" / "weights", str(step))
            atomic_write_text(folder / f"step_{step:06d}" / "COMMITTED", "")
        if told:
            sys.exit(75)
    sections.write_section("base_train", "Training", {"metrics": {"loss": 1.0, "training minutes": time.time()}})
    atomic_write_text(folder / "COMPLETE", "")
else:
    time.sleep(0.3)
    sections.write_section("base_loss", "Loss", {"metrics": {"val_bpb": len((store / "text").read_text())}})
"""


@pytest.fixture
def lane(tmp_path):
    for name in ("nanochat", "dev"):
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).symlink_to(ROOT / name)
    (tmp_path / "tree" / "speedrun.sh").write_text(CHAIN)
    (tmp_path / "tree" / "work.py").write_text(WORK)
    found = faults.Lane(tmp_path, 1, mounts=False)
    found.environment["PATH"] = f"{Path(sys.executable).parent}:{found.environment['PATH']}"
    ctypes.CDLL(None).prctl(36, 1)  # orphans of this chain become children of this process
    yield found
    found.kill_all()
    ctypes.CDLL(None).prctl(36, 0)


def steps_aside(found):
    """Without checkpoints: at which steps there are some depends on when training was stopped."""
    return {name: content for name, content in found.items() if "/step_" not in name or "/step_000012/" in name}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_chain_that_is_killed_in_every_way_ends_as_one_that_is_not(lane, monkeypatch):
    whole = faults.artifacts
    monkeypatch.setattr(faults, "artifacts", lambda lane: steps_aside(whole(lane)))
    left, typical = faults.undisturbed(lane)
    expected = steps_aside(left)
    assert {"text", "runs/faults/report/base_loss.json"} <= expected.keys() and set(typical) >= {"dataset", "base_loss"}
    kills = [*faults.KILLS[:5], *faults.KILLS[5::3]]  # tests/test_pipeline.py has all gentle signals, to all
    plan = faults.Plan(faults.Settings(0), ())
    plan.left = [faults.Fault(*kill) for kill in kills]
    faults.disturb(lane, random.Random(0), expected, typical, plan)
    assert len(plan.made) == len(kills) and not any(fault.problems for fault in plan.made), plan.made
    assert plan.chains and not any(plan.chains.values()), plan.chains
    assert sum(row["faults"] for row in plan.table().values()) == len(kills)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_is_lost_swallowed_left_or_wrong_is_a_problem(lane):
    (lane.tree / "work.py").write_text(
        WORK.replace("% 4 == 0 or told", "% 12 == 0").replace(
            "if told:", "if step == 6: Path('ready').touch()\n        if told:"
        )
    )
    lane.fresh()
    lane.start()
    while not (lane.tree / "ready").exists():
        time.sleep(0.02)
    fault = faults.Fault("SIGINT", "bash")
    faults.inject(lane, fault, random.Random(0))
    assert fault.lost and any("steps of base_train not saved" in problem for problem in fault.problems)
    one = faults.artifacts(lane)
    (lane.store / "runs/faults/report").mkdir(parents=True, exist_ok=True)
    (lane.store / "runs/faults/report/a.json").write_text(json.dumps({"time": 1, "loss": 2}))
    two = faults.artifacts(lane)
    assert faults.differences(one, two) == ["runs/faults/report/a.json: not to be there"]
    three = {**two, "runs/faults/report/a.json": json.dumps({"loss": 3})}
    assert "became" in faults.differences(two, three)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_signal_that_came_too_late_for_its_stage_goes_to_the_chain(lane, monkeypatch):
    monkeypatch.setattr(faults, "END_SECONDS", 2)
    monkeypatch.setattr(faults, "send", lambda lane, fault: None)  # as to a process that is ending
    (lane.tree / "work.py").write_text(WORK.replace("range(done + 1, 13)", "range(done + 1, 1000)"))
    lane.fresh()
    lane.start()
    while lane.at_work() != "dataset":
        time.sleep(0.02)
    fault = faults.Fault("SIGKILL", "stage")
    faults.inject(lane, fault, random.Random(0))
    assert (fault.stage, fault.detail, fault.code, fault.problems) == ("dataset", "tree", -9, [])


@pytest.mark.slow
def test_the_whole_chain_a_few_times():
    words = ["-m", "benchmarks.faults", "13", "--others=1", "--lanes=1"]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
