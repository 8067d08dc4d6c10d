"""The device batch that is chosen, and what is said where it was too large."""

from typing import Any

import pytest
import torch

from nanochat.config import ArchFlags, build_config, resolve
from nanochat.gpt import GPT
from nanochat.kernels.linear import Linear
from nanochat.parallel import Policy
from nanochat.train.memory import MARGIN, Batch, choose_rows, fitting_rows, memory_advice, needed_bytes

DDP = Policy("ddp", torch.bfloat16)
BATCH = Batch(rows=256, length=2048, use_muon=True)


def model(depth: int, arch: str = "nanochat", **flags: Any) -> GPT:
    with torch.device("meta"):
        return GPT(
            build_config(resolve(ArchFlags(depth=depth, arch=arch, **flags)), 32_768, document_token=0), torch.bfloat16
        )


@pytest.mark.parametrize("gigabytes", [8, 16, 24, 48, 80, 141])
@pytest.mark.parametrize("depth", [4, 12, 26])
def test_the_largest_that_fits(gigabytes, depth):
    built, memory = model(depth), int(gigabytes * 1e9)
    rows, why = fitting_rows(built, DDP, memory, BATCH, 32)
    assert rows in (1, 2, 4, 8, 16, 32) and "GiB" in why
    assert rows == 1 or needed_bytes(built, DDP, BATCH, rows) <= MARGIN * memory
    assert rows == 32 or needed_bytes(built, DDP, BATCH, 2 * rows) > MARGIN * memory


# Peaks of benchmarks.train_speed on one H200, torch 2.11: one pass a step, vocabulary 32,768.
@pytest.mark.parametrize(
    ("arch", "depth", "rows", "gib", "fp8"),
    [
        ("nanochat", 12, 32, 14.77, False),
        ("nanochat", 20, 32, 38.48, False),
        ("nanochat", 24, 32, 55.28, False),
        ("nanochat", 24, 32, 70.24, True),
        ("nanochat", 26, 16, 38.14, False),
        ("nanochat", 26, 16, 46.47, True),
        ("ngram", 12, 16, 13.28, False),
    ],
)
def test_what_was_measured_is_estimated(arch, depth, rows, gib, fp8):
    batch = Batch(rows, 2048, use_muon=True)
    tables = {"ngram_embeds": 3, "value_embeds": "ends"} if arch == "ngram" else {}  # the preset of that day
    built = model(depth, arch, **tables)
    for layer in built.modules():
        if isinstance(layer, Linear):
            layer.fp8 = fp8
    assert needed_bytes(built, DDP, batch, rows) / 2**30 == pytest.approx(gib, rel=0.05)


# The same of four passes a step on one, and of two on each of two, by 16 rows; d24 with and without 8 bits.
@pytest.mark.parametrize(
    ("depth", "strategy", "world", "gib", "fp8"),
    [
        (20, "ddp", 1, 24.23, False),
        (20, "ddp", 2, 23.21, False),
        (20, "fsdp", 2, 22.40, False),
        (24, "ddp", 1, 35.22, False),
        (24, "ddp", 1, 42.44, True),
    ],
)
def test_what_was_measured_of_several_passes_and_on_two_gpus_is_estimated(
    depth, strategy, world, gib, fp8, monkeypatch
):
    if world > 1:
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))
    built = model(depth)
    for layer in built.modules():
        if isinstance(layer, Linear):
            layer.fp8 = fp8
    batch = Batch(64 // world, 2048, use_muon=True)
    needed = needed_bytes(built, Policy(strategy, torch.bfloat16), batch, 16)
    assert needed / 2**30 == pytest.approx(gib, rel=0.1)


def test_what_is_not_kept_makes_room():
    built, memory = model(26), int(48e9)
    all_kept, half = (fitting_rows(built, DDP, memory, BATCH._replace(budget=b), 32)[0] for b in (1.0, 0.5))
    assert half >= 2 * all_kept


def test_more_features_keep_more():
    assert needed_bytes(model(12, "speedrun"), DDP, BATCH, 8) > needed_bytes(model(12), DDP, BATCH, 8)


def test_on_a_cpu_nothing_is_estimated():
    assert choose_rows(model(4), DDP, torch.device("cpu"), BATCH) == 32


def test_after_running_out_of_memory():
    assert "--device-batch-size=16 should fit" in memory_advice(model(4), DDP, BATCH, 32)
    assert "--parallel=fsdp" in memory_advice(model(4), DDP, BATCH, 1)
