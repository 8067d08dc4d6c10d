"""Who may write into a checkpoint folder, seen from several ranks and after a restart by torchrun."""

import fcntl
import json
import math
import os
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nanochat import checkpoint, runtime
from nanochat.errors import UserError
from nanochat.files import sha256_file
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


def test_a_complete_run_may_lose_what_only_training_on_needs(tmp_path, capsys):
    """Its state, which people delete to save room; not its weights: then it goes on from the checkpoint before."""
    put(tmp_path / "a", 10)
    put(tmp_path / "a", 20, complete=True)
    last = checkpoint.step_dir(tmp_path / "a", 20)
    names = ("meta.json", "model.safetensors", "state/optimizer")
    (last / "state").mkdir()
    for name in names[1:]:
        (last / name).write_text(name)
    checkpoint.write_sums(last, [(sha256_file(last / name), name) for name in names])
    for _ in range(2):
        assert run.earlier_run(tmp_path / "a", "auto", NOW) is None
        assert capsys.readouterr().out == f"the run in {tmp_path / 'a'} is complete: nothing to do\n"
        shutil.rmtree(last / "state", ignore_errors=True)
    assert sorted(os.listdir(tmp_path / "a")) == ["COMPLETE", "step_000010", "step_000020"]
    (last / "model.safetensors").write_text("else")
    assert run.earlier_run(tmp_path / "a", "auto", NOW)["step"] == 10
    assert "kept as step_000020.damaged.1, step 10 is used" in capsys.readouterr().out


def test_another_run_is_set_aside(tmp_path, capsys):
    put(tmp_path / "a", 20, complete=True)
    assert run.earlier_run(tmp_path / "a", "auto", {**NOW, "settings": {"depth": 6}}) == {}
    assert "differs in depth: kept as a.1, starting anew" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["a.1"]
    assert run.earlier_run(tmp_path / "a", "auto", NOW) == {}


@pytest.mark.parametrize("there", [None, NOW, {**NOW, "settings": {"depth": 6}}])
def test_two_processes_never_train_in_one_folder(store, monkeypatch, there):
    """Not even one whose settings differ, which would set the folder aside while the other writes into it."""
    monkeypatch.setattr(run, "ENDING_SECONDS", 0.3)
    folder = store / "checkpoints" / "base" / "a"
    if there:
        put(folder, 10, **there)
    before = sorted(store.rglob("checkpoints/**"))
    (store / "locks" / "base-a").mkdir(parents=True)
    other = os.open(store / "locks" / "base-a", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"base/a: another process trains there: wait .*--model-tag=NAME"):
        run.earlier_run(folder, "auto", NOW)
    assert sorted(store.rglob("checkpoints/**")) == before
    fcntl.flock(other, fcntl.LOCK_UN)  # as when it ends
    assert run.earlier_run(folder, "auto", NOW).get("step", 0) == (10 if there == NOW else 0)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert run.earlier_run(folder.with_name("b"), "auto", NOW) == {}
    runtime.compute_cleanup()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def choose_on_ranks(base):
    """All ranks go on from the same step, whoever looks first; what they load too."""
    meta = run.earlier_run(base / "a", "auto", NOW)
    try:
        wanted = runtime.on_first_rank(lambda: checkpoint.check(base / "a", 30))
    except UserError as error:
        wanted = str(error)
    return meta["step"], wanted


def test_all_ranks_pass_over_a_damaged_checkpoint(tmp_path):
    for step in (10, 20, 30):
        put(tmp_path / "a", step)
    (checkpoint.step_dir(tmp_path / "a", 20) / "COMMITTED").write_text(f"{'0' * 64}  meta.json\n")
    (checkpoint.step_dir(tmp_path / "a", 30) / "meta.json").write_text("[" * 100_000)
    results = run_processes(2, choose_on_ranks, tmp_path)
    assert [step for step, _ in results] == [10, 10] and all("no checkpoint" in said for _, said in results)
    assert sorted(os.listdir(tmp_path / "a")) == ["step_000010", "step_000020.damaged.1", "step_000030.damaged.1"]


def test_counters_of_other_types_are_one_line(tmp_path):
    about = {"optimizer_steps": 1, "rng": [], "loop": {}}
    for name, value in (
        ("loop", {"step": "1"}),
        ("loop", {"step": 10**30}),
        ("loop", {"seconds": math.nan}),
        ("loop", {"latest": {"Loss/x": "low"}}),
        ("loop", {"other": 1}),
        ("rng", [{"torch": "zz"}]),
        ("rng", [{"torch": "00", "python": [3, [], None], "numpy": []}]),
        ("rng", [None]),
        ("optimizer_steps", None),
    ):
        earlier = {"step": 10, **about, name: value}
        if value is None:
            del earlier[name]
        with pytest.raises(UserError, match=r"meta\.json is damaged") as error:
            run.resume(mock.Mock(folder=tmp_path, earlier=earlier))
        assert "\n" not in str(error.value)


def test_a_parent_without_a_whole_recipe_is_one_line(monkeypatch):
    for recipe in ({}, {"recipe": {"source": "pydocs", "use_muon": True}}):
        monkeypatch.setattr(checkpoint, "find_model", lambda *_, of=recipe: (None, None, {"tag": "a", "step": 3, **of}))
        with pytest.raises(UserError, match=r"base a, step 3: its recipe lacks .*total_batch_size"):
            run.load_parent("base", mock.Mock(), None)


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


@pytest.mark.parametrize(
    ("device", "shape", "every", "compiled"),
    [
        ("cuda", (265, 2048), -1, False),
        ("cuda", (265, 2048), 300, False),
        ("cuda", (265, 2048), 5, True),  # so often that it pays
        ("cuda", (5120, 2048), -1, True),
        ("cuda", (2, 8192), -1, True),  # masks that are not compiled would not fit
        ("cpu", (265, 2048), -1, True),
    ],
)
def test_few_rows_are_evaluated_sooner_than_a_graph_for_them_is_compiled(device, shape, every, compiled):
    def forward(*batch, **options):
        return "compiled"

    model = mock.MagicMock(return_value="as it is", **{"estimate_flops.return_value": 1e9})
    model.get_device.return_value = torch.device(device)
    called = run.evaluated_with(model, forward, shape, every, 600)
    with mock.patch.object(run.parallel, "disable_compile") as uncompiled:
        assert called(1, 2, loss_reduction="none") == ("compiled" if compiled else "as it is")
    assert uncompiled.called is not compiled
