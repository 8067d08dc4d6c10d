"""chat_sft and chat_rl with sharded weights: the same run as with unsharded ones, and as one process."""

import json
import os
import signal
import subprocess
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nanochat import checkpoint
from nanochat.cluster import observer
from nanochat.cluster.watchdog import lower_timeout
from nanochat.errors import UserError
from nanochat.eval.bpb import evaluate_bpb
from nanochat.eval.samples import make_chat_samples
from nanochat.paths import checkpoint_dir, get_base_dir, run_dir
from nanochat.runtime import get_dist_info
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.train import chat, run
from scripts import chat_eval, chat_rl, chat_sft
from tests.chat_setup import make_base, make_text
from tests.processes import run_processes

# Two micro-batches on each of two ranks; checkpoints in between, which hold no model.safetensors.
SFT = {"source_stage": "base", "model_tag": "m", "tasks": "Arithmetic:60,Identity:40", "num_iterations": 6,
       "device_batch_size": 2, "eval_tokens": 1024, "eval_every": 2, "save_every": 2, "keep_last": 3,
       "device_type": "cpu"}  # fmt: skip
# Three questions on two ranks, from a checkpoint that two ranks have written in parts.
RL = {"task": "Arithmetic", "model_tag": "fsdp", "model_step": 2, "num_iterations": 4, "questions_per_step": 3,
      "num_samples": 4, "max_new_tokens": 16, "device_batch_size": 4, "eval_every": 2, "eval_questions": 5,
      "eval_samples": 2, "save_every": -1, "device_type": "cpu"}  # fmt: skip
LONE = {"questions_per_step": 1, "num_iterations": 2}  # of two ranks one has no question


class Lengths(Arithmetic):
    """Even a model that has learnt nothing earns something here, and not always the same."""

    def __init__(self, split, said, at_reward):
        super().__init__(split, size=200)
        self.said, self.at_reward = said, at_reward

    def evaluate(self, conversation, completion):
        return len(completion) % 3 == 0

    def reward(self, conversation, completion):
        self.at_reward()
        self.said.append((conversation["messages"][0]["content"], completion))
        return len(completion) % 7 / 7


def stop_rank_1():
    """As if the cluster took back one of the hosts."""
    if get_dist_info().rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def run_out_of_memory():
    raise torch.OutOfMemoryError("no memory left")


def in_a_run_called(tag, main, settings, *patches):
    """Run a script in the process group of the test; each rank but the first would report into a folder of its own.
    Ranks that wait for each other for ever fail after two minutes, not 15."""
    rank = get_dist_info().rank
    patches = [*patches, (chat, "compute_cleanup", lambda: None),
               (observer, "lower_timeout", partial(lower_timeout, 120.0))]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RUN_ID", tag if rank == 0 else f"{tag}-rank{rank}")
        for module, name, value in patches:
            patch.setattr(module, name, value)
        main(settings)


def sft(tag, at_evaluation=lambda: None, **changes):
    def evaluate(*arguments):
        at_evaluation()
        return evaluate_bpb(*arguments)

    settings = chat_sft.Settings(**{**SFT, "out_tag": tag, **changes})
    in_a_run_called(tag, chat_sft.main, settings, (run, "evaluate_bpb", evaluate))


def rl(tag, at_reward=lambda: None, **changes):
    """All (question, answer) that this rank has sampled to train on, in order."""
    said = []
    settings = chat_rl.Settings(**{**RL, "out_tag": tag, **changes})
    make_task = (chat_rl, "make_task", lambda name, split, source: Lengths(split, said, at_reward))
    in_a_run_called(tag, chat_rl.main, settings, make_task, (chat_rl, "compute_cleanup", lambda: None))
    return said


def on_two_ranks():
    """Everything that needs two ranks, in one group: most of the time goes to starting processes."""
    sft("fsdp", parallel="fsdp")
    sft("ddp", parallel="ddp")
    sft("bare", use_fsdp=True, model_tag="bare", keep_last=1, keep_every=4)
    sft("stopped", parallel="fsdp", save_every=-1, at_evaluation=stop_rank_1)
    steps = checkpoint.committed_steps(checkpoint_dir("sft", "stopped"))
    dist.barrier()  # before the next run adds to them
    sft("stopped", parallel="fsdp", save_every=-1, resume="auto")
    said = {
        "fsdp": rl("fsdp", parallel="fsdp"),
        "ddp": rl("ddp", parallel="ddp"),
        "lone-fsdp": rl("lone-fsdp", parallel="fsdp", **LONE),
        "lone-ddp": rl("lone-ddp", parallel="ddp", **LONE),
        "stopped": rl("stopped", parallel="fsdp", at_reward=stop_rank_1),
    }
    steps += checkpoint.committed_steps(checkpoint_dir("rl", "stopped"))
    dist.barrier()
    said["stopped"] += rl("stopped", parallel="fsdp", resume="auto")
    try:
        rl("full", parallel="fsdp", at_reward=run_out_of_memory)
        message = ""
    except UserError as error:
        message = str(error)
    return {"said": said, "steps": steps, "out of memory": message}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A store with all runs in it, and what on_two_ranks gave on each rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("store")))
        make_text()
        make_base()
        bare = checkpoint_dir("base", "bare")
        subprocess.run(["cp", "-r", checkpoint_dir("base", "m"), bare], check=True)
        (bare / "step_000003" / "model.safetensors").unlink()
        yield run_processes(2, on_two_ranks)


@pytest.fixture(scope="module")
def alone(ranks):
    """The same in one process: what it sampled."""
    sft("one")
    return {"one": rl("one"), "lone": rl("lone", **LONE)}


def weights(stage, tag, step=None):
    return checkpoint.load_model(stage, torch.device("cpu"), tag, step)[0].state_dict()


def parts_of_the_head(stage, tag, step):
    """In how many parts the head lies in a checkpoint: as many as there were shards."""
    reader = dcp.FileSystemReader(checkpoint_dir(stage, tag) / f"step_{step:06d}" / "state")
    return len(reader.read_metadata().state_dict_metadata["model.lm_head.weight"].chunks)


def metric(tag, stage, name):
    """{step: value} of a metric in a run."""
    lines = map(json.loads, (run_dir(tag) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if line["stage"] == stage and name in line}


def section(tag, name):
    return json.loads((run_dir(tag) / "report" / f"{name}.json").read_text())


def assert_moved_alike(before, single, other):
    for name in single:
        moved = (single[name] - before[name]).abs().max()
        assert moved > 1e-5 and (other[name] - single[name]).abs().max() < 0.02 * moved, name


def assert_equal(first, second):
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_sft_ends_as_one_process_does(ranks, alone):
    for tag in ("fsdp", "ddp"):
        for name in ("Loss/train_loss", "Loss/val_bpb", "Optimization/grad_norm"):
            single, double = metric("one", "sft", name), metric(tag, "sft", name)
            assert list(double) == ([2, 4, 6] if name == "Loss/val_bpb" else [1, 2, 3, 4, 5, 6])
            assert double == pytest.approx(single, rel=1e-3), name
        assert_moved_alike(weights("base", "m"), weights("sft", "one"), weights("sft", tag))
        single, double = (checkpoint.read_meta(checkpoint_dir("sft", one), 6) for one in ("one", tag))
        assert double["world_size"] == 2 and double["loader"] == single["loader"]
    samples = section("fsdp", "chat_sft")["samples"]
    assert len(samples) == 6 and samples == section("one", "chat_sft")["samples"]


def test_checkpoints_are_kept_as_asked(ranks):
    assert checkpoint.committed_steps(checkpoint_dir("sft", "fsdp")) == [2, 4, 6]
    assert checkpoint.committed_steps(checkpoint_dir("sft", "bare")) == [4, 6]
    assert checkpoint.committed_steps(checkpoint_dir("rl", "stopped")) == [2, 4]


def test_rank_0_alone_writes_the_section(ranks):
    for stage, tag in (("chat_sft", "fsdp"), ("chat_rl", "fsdp")):
        assert section(tag, stage)["metrics"]["ranks"] == 2
    assert not list(get_base_dir().glob("runs/*-rank1"))


def test_the_checkpoint_of_two_ranks_speaks_and_is_scored(ranks, alone):
    model, tokenizer, _ = checkpoint.load_model("sft", torch.device("cpu"), "fsdp")
    assert make_chat_samples(model, tokenizer) == section("fsdp", "chat_sft")["samples"]
    answers = []
    for tag in ("one", "fsdp"):
        settings = chat_eval.Settings(stage="sft", model_tag=tag, task_name="Arithmetic", max_problems=6,
                                      max_new_tokens=12, device_type="cpu")  # fmt: skip
        in_a_run_called("scores", chat_eval.main, settings)
        (path,) = get_base_dir().glob(f"chat_eval/sft_{tag}_*.jsonl")
        answers.append([json.loads(line)["completions"] for line in path.read_text().splitlines()])
    assert len(answers[0]) == 6 and answers[0] == answers[1]


def test_a_parent_without_a_file_of_weights_will_do(ranks):
    assert not (checkpoint_dir("base", "bare") / "step_000003" / "model.safetensors").exists()
    assert not (checkpoint_dir("sft", "fsdp") / "step_000002" / "model.safetensors").exists()  # the parent of all RL
    assert parts_of_the_head("base", "bare", 3) == 1 and parts_of_the_head("sft", "fsdp", 2) == 2
    assert checkpoint.read_meta(checkpoint_dir("sft", "bare"), 6)["parent"]["tag"] == "bare"
    assert_equal(weights("sft", "bare"), weights("sft", "fsdp"))


@pytest.mark.parametrize(("one", "layouts"), [("one", ("fsdp", "ddp")), ("lone", ("lone-fsdp", "lone-ddp"))])
def test_rl_samples_and_learns_as_one_process_does(ranks, alone, one, layouts):
    before, single = weights("sft", "fsdp", 2), weights("rl", one)
    for tag in layouts:
        said = [rank["said"][tag] for rank in ranks]
        assert sorted(said[0] + said[1]) == sorted(alone[one]) and (not said[1]) == (one == "lone")
        for name in ("RL/reward", "RL/sampled_tokens", "RL/teaching_share", "Eval/pass@1", "Eval/pass@2"):
            assert metric(tag, "rl", name) == pytest.approx(metric(one, "rl", name), rel=1e-6), name
        assert metric(tag, "rl", "Loss/train_loss") == pytest.approx(metric(one, "rl", "Loss/train_loss"), rel=1e-3)
        assert_moved_alike(before, single, weights("rl", tag))
        assert parts_of_the_head("rl", tag, len(metric(one, "rl", "RL/reward"))) == (2 if "fsdp" in tag else 1)
        found, wanted = section(tag, "chat_rl"), section(one, "chat_rl")
        assert found["tables"] == wanted["tables"] and found["samples"] == wanted["samples"]
    assert len(alone[one]) == (4 * 4 * 3 if one == "one" else 4 * 2)
    assert np.ptp(list(metric(one, "rl", "RL/reward").values())) > 0


@pytest.mark.parametrize(("stage", "name"), [("sft", "Loss/train_loss"), ("rl", "RL/reward")])
def test_a_run_stopped_on_one_rank_continues_bit_for_bit(ranks, stage, name):
    assert [rank["steps"] for rank in ranks] == [[2, 2]] * 2  # of SFT (in an evaluation) and RL, when stopped
    assert_equal(weights(stage, "stopped"), weights(stage, "fsdp"))
    assert metric("stopped", stage, name) == metric("fsdp", stage, name)


def test_what_was_sampled_after_a_stop_is_what_would_have_been(ranks):
    for rank in ranks:
        assert rank["said"]["stopped"] == rank["said"]["fsdp"]


def test_a_run_of_two_ranks_continues_on_one(ranks, alone):
    folder = checkpoint_dir("sft", "moved")
    subprocess.run(["cp", "-r", checkpoint_dir("sft", "fsdp"), folder], check=True)
    (folder / checkpoint.COMPLETE).unlink()
    checkpoint.discard(checkpoint.step_dir(folder, 6))
    sft("moved", resume="auto")
    assert list(metric("moved", "sft", "Loss/train_loss")) == [5, 6]
    assert_moved_alike(weights("base", "m"), weights("sft", "fsdp"), weights("sft", "moved"))


def test_no_memory_for_sampling_is_one_line(ranks):
    for rank in ranks:
        assert "out of memory" in rank["out of memory"] and chat_rl.MEMORY_ADVICE in rank["out of memory"]


def on_two_nodes():
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    sft("hsdp", parallel="hsdp")
    return rl("hsdp")  # which is what --parallel=auto chooses here


@pytest.mark.slow
def test_two_nodes_do_as_one_process_does(ranks, alone):
    said = run_processes(4, on_two_nodes)  # four ranks: one has no question of a step
    assert parts_of_the_head("sft", "hsdp", 6) == parts_of_the_head("rl", "hsdp", 4) == 2  # in each node
    assert sorted(pair for rank in said for pair in rank) == sorted(alone["one"]) and said[3] == []
    for stage, before in (("sft", weights("base", "m")), ("rl", weights("sft", "fsdp", 2))):
        assert_moved_alike(before, weights(stage, "one"), weights(stage, "hsdp"))
        name = f"chat_{stage}"
        assert section("hsdp", name)["samples"] == section("one", name)["samples"]
    assert metric("hsdp", "rl", "RL/reward") == pytest.approx(metric("one", "rl", "RL/reward"), rel=1e-6)
