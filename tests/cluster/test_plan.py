import runpy
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.cluster import plan
from nanochat.cluster.plan import Measurement, Plan, Settings, one_gpu_mfu, shapes
from nanochat.errors import UserError

DEPTHS = (12, 20, 26, 32, 48, 64)


def test_published_sizes():
    assert shapes(20, 65536).params == 560_988_160
    assert shapes(32, 65536).params == 1_879_048_192


@settings(deadline=None)  # the first model of each depth is built
@given(st.sampled_from(DEPTHS), st.integers(1, 5).map(lambda power: 2**power))
def test_sharding_divides_what_it_says(depth, nodes):
    """Against the arithmetic done by hand: 4 bytes each of weights and gradients, 4 of momentum, 8 of Adam."""
    params = shapes(depth, 65536).params
    ends = params - shapes(depth, 65536).matrices
    state = 4 * (params - ends) + 8 * ends
    one_pass = {"depth": depth, "nodes": nodes, "total_batch_size": 2048 * nodes * 8, "device_batch_size": 1}
    for parallel, parts in (("fsdp", 8 * nodes), ("hsdp", 8)):
        sizes = Plan(Settings(**one_pass, parallel=parallel)).memory()
        assert sizes["weights, fp32"] == sizes["gradients, fp32"] == 4 * params / parts
        assert sizes["optimizer state, fp32"] == state / parts
    sizes = Plan(Settings(**one_pass, parallel="ddp")).memory()
    assert sizes["weights, fp32"] == 4 * params and sizes["optimizer state, fp32"] == state / (8 * nodes)


def test_state_under_hsdp_as_derived_by_hand():
    """12 bytes a parameter over 8 GPUs: d48 8.4 to 9 GB, d64 19.8 to 20.5 GB (Adam's ends make the difference)."""
    for depth, low, high in ((48, 8.4e9, 9.2e9), (64, 19.8e9, 20.8e9)):
        asked = Settings(depth=depth, nodes=16, parallel="hsdp", total_batch_size=2048 * 128)
        state = sum(size for name, size in Plan(asked).memory().items() if name.endswith("fp32"))
        assert low <= state <= high


def test_unsharded_gradients_between_passes_are_counted():
    params = shapes(20, 65536).params
    four_passes = Settings(depth=20, parallel="fsdp", total_batch_size=4 * 2048 * 8, device_batch_size=1)
    assert Plan(four_passes).memory()["gradients, fp32"] == 4 * params / 8 + 4 * params


def test_the_run_that_was_measured_is_predicted():
    row = next(row for row in plan.MEASURED if row.depth == 20)
    sizes = {"depth": row.depth, "vocab_size": row.vocab_size, "total_batch_size": row.tokens_per_step}
    one, two = (Plan(Settings(**sizes, gpus_per_node=n, device_batch_size=row.device_batch_size)) for n in (1, 2))
    assert row.tokens_per_step / sum(one.step()) == pytest.approx(row.tokens_per_second, rel=0.02)
    assert sum(one.step()) / sum(two.step()) / 2 == pytest.approx(plan.TWO_GPU_EFFICIENCY, abs=0.03)


@settings(deadline=None)  # the first model of each depth is built
@given(st.sampled_from(DEPTHS), st.sampled_from([1, 2, 4, 16]), st.sampled_from(["ddp", "fsdp", "hsdp"]))
def test_more_nodes_and_faster_networks_never_slow_a_step(depth, nodes, parallel):
    def step(nodes, speed):
        return Plan(Settings(depth=depth, nodes=nodes, parallel=parallel, network_gbps=speed)).step()

    assert 0 < sum(step(nodes, 1000.0)) <= sum(step(nodes, 10.0))
    assert step(2 * nodes, 1e9).computing < step(nodes, 1e9).computing


def traffic(**flags):
    return Plan(Settings(**flags)).traffic()


def test_one_gpu_sends_nothing_and_one_node_nothing_out():
    assert traffic(depth=20, gpus_per_node=1) == (0.0, 0.0)
    for parallel in ("ddp", "fsdp", "hsdp"):
        inside, between = traffic(depth=20, parallel=parallel)
        assert inside > 0 and between == 0.0


def test_large_models_send_less_between_nodes_by_hsdp_than_by_fsdp():
    """Four passes a step, which fsdp gathers and reduces across nodes each time."""
    hsdp, fsdp = (
        traffic(depth=48, nodes=8, device_batch_size=1, parallel=parallel)[1] for parallel in ("hsdp", "fsdp")
    )
    assert hsdp < fsdp / 2


def test_muon_is_a_small_part_and_spread():
    one, eight = (plan.muon_seconds(shapes(26, 65536), 26, ranks) for ranks in (1, 8))
    assert one == pytest.approx(8 * eight)
    step = Plan(Settings(depth=26)).step()
    assert step.muon / sum(step) < 0.02
    assert Plan(Settings(depth=26, use_muon=False)).step().muon == 0.0


def test_mfu_between_two_measurements():
    def row(depth, mfu):
        return Measurement(depth, 65536, 1, 1, 1.0, mfu, f"run {depth}")

    rows = (row(30, 0.6), row(20, 0.5))
    assert one_gpu_mfu(25, rows)[0] == pytest.approx(0.55) and "d20 and d30" in one_gpu_mfu(25, rows)[1]
    assert one_gpu_mfu(20, rows) == (0.5, "measured at d20: run 20")
    assert one_gpu_mfu(12, rows)[0] == 0.5 and "assumption" in one_gpu_mfu(12, rows)[1]
    assert one_gpu_mfu(64, rows)[0] == 0.6 and "assumption" in one_gpu_mfu(64, rows)[1]


@settings(deadline=None)  # the first model of each depth is built
@given(st.sampled_from(DEPTHS), st.sampled_from([1, 2, 4, 16]), st.floats(24, 200))
def test_the_chosen_batch_fits_and_divides(depth, nodes, gpu_memory):
    chosen = Plan(Settings(depth=depth, nodes=nodes, gpu_memory_gb=gpu_memory))
    assert chosen.passes >= 1 and (chosen.rows == 1 or chosen.fits())


def test_a_batch_that_does_not_divide_names_both_flags():
    with pytest.raises(UserError, match=r"--total-batch-size=524288 .* 5 rows .*--device-batch-size"):
        Plan(Settings(device_batch_size=5))


def test_what_is_printed_says_that_it_is_a_prediction_and_on_what_it_rests(capsys):
    plan.main(Settings(depth=48, nodes=16))
    shown = capsys.readouterr().out
    assert shown.startswith("A PREDICTION") and "hsdp (16 nodes" in shown
    measured, assumed = shown.split("\nMeasured\n")[1].split("\nAssumed\n")
    assert "790 TFLOP/s" in measured and "an assumption" in measured
    assert "200 Gb/s a GPU (--network-gbps)" in assumed
    plan.main(Settings(depth=64, nodes=1, parallel="ddp"))
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # a process of its own would take seconds to import torch
def test_plan_is_a_word_of_launch(monkeypatch, capsys):
    words = ["launch", "plan", "--depth", "48", "--nodes", "16", "--parallel", "fsdp"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_module("nanochat.launch", run_name="__main__", alter_sys=True)
    assert "16 x 8 GPUs, fsdp" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--depth=0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("nanochat.launch", run_name="__main__", alter_sys=True)
    wrong = capsys.readouterr().err
    assert wrong.startswith("error: ") and wrong.count("\n") == 1


@pytest.mark.parametrize(("depth", "strategy", "rows"), [(20, "ddp", 16), (32, "fsdp", 8)])
def test_what_was_measured_on_two_gpus_is_predicted(depth, strategy, rows):
    measured = next(row for row in plan.MEASURED if row.depth == depth)
    sizes = {"depth": depth, "vocab_size": measured.vocab_size, "device_batch_size": rows}
    asked = Settings(**sizes, gpus_per_node=2, parallel=strategy, gpu_memory_gb=150)
    predicted = Plan(asked)
    assert asked.total_batch_size / sum(predicted.step()) == pytest.approx(2 * measured.tokens_per_second, rel=0.02)
