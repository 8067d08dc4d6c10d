"""Who may write into a checkpoint folder, seen from several ranks and after a restart by torchrun."""

import json
import os

import pytest
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.train import run
from tests.processes import run_processes

NOW = {"stage": "base", "settings": {"depth": 4, "eval_every": 10}, "tokenizer_hash": "x"}


def put(folder, step, complete=False, **changes):
    path = checkpoint.step_dir(folder, step)
    path.mkdir(parents=True)
    meta = {"format": checkpoint.FORMAT, "step": step, **NOW, **changes}
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "COMMITTED").touch()
    if complete:
        (folder / checkpoint.COMPLETE).touch()


def test_a_restart_by_torchrun_goes_on_whatever_resume_says(tmp_path, monkeypatch):
    put(tmp_path / "a", 10)
    with pytest.raises(UserError, match="holds a run already"):
        run.earlier_run(tmp_path / "a", "never", NOW)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run.earlier_run(tmp_path / "a", "never", NOW)["step"] == 10
    # also when the run was done and only its process group ended badly: it must not be trained again
    put(tmp_path / "b", 20, complete=True)
    assert run.earlier_run(tmp_path / "b", "auto", NOW)["step"] == 20


def test_an_identical_run_that_is_complete_is_left_as_it_is(tmp_path, capsys):
    put(tmp_path / "a", 20, complete=True)
    observed = {**NOW, "settings": {**NOW["settings"], "eval_every": 5}}
    for now in (NOW, observed):
        assert run.earlier_run(tmp_path / "a", "auto", now) is None
        assert f"the run in {tmp_path / 'a'} is complete: nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a run already .*, complete.: --model-tag=NAME"):
        run.earlier_run(tmp_path / "a", "never", NOW)
    assert os.listdir(tmp_path) == ["a"]


def test_another_run_is_set_aside(tmp_path, capsys):
    put(tmp_path / "a", 20, complete=True)
    assert run.earlier_run(tmp_path / "a", "auto", {**NOW, "settings": {"depth": 6}}) == {}
    assert "differs in depth: kept as a.1, starting anew" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["a.1"]
    assert run.earlier_run(tmp_path / "a", "auto", NOW) == {}


def look_from_two_hosts(base):
    """Rank 1 has a folder of its own, which lacks what rank 0 sees; then one that rank 0 refuses."""
    run.VISIBLE_SECONDS = 0.2
    said = []
    for name, resume in (("shared", "auto"), ("mine", "auto"), ("shared", "never")):
        folder = base / (name if name == "shared" else f"{name}{dist.get_rank()}")
        try:
            said.append(run.earlier_run(folder, resume, NOW)["step"])
        except UserError as error:
            said.append(str(error))
    return said


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_sees(tmp_path):
    put(tmp_path / "shared", 10)
    put(tmp_path / "mine0", 20)
    put(tmp_path / "mine1", 10)
    results = run_processes(2, look_from_two_hosts, tmp_path)
    assert [said[0] for said in results] == [10, 10]
    assert all("must be one folder that all share" in said[1] for said in results)
    assert all("holds a run already" in said[2] for said in results)
    assert os.listdir(tmp_path / "mine1") == ["step_000010"]


def look_after_a_restart_of_node_1(base):
    """torchrun counts a restart only on the node where a process died."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(dist.get_rank())
    return run.earlier_run(base / "run", "never", NOW)["step"]


def test_a_restart_on_another_node_counts_too(tmp_path):
    put(tmp_path / "run", 10)
    assert run_processes(2, look_after_a_restart_of_node_1, tmp_path) == [10, 10]
