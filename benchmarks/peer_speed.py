"""Speed and memory of the training step of another program of this family, by the protocol of benchmarks.train_speed.

    python benchmarks/peer_speed.py CHECKOUT DEPTH VOCABULARY [--out=FILE]

It imports nothing of this project: the checkout has a package of the same name. That must have GPT, GPTConfig,
init_weights, estimate_flops and setup_optimizer, and the head dimension 128 of its newest models.
"""

import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROWS, LENGTH, STEPS, WARM_UP = 32, 2048, 10, 3
PEAK = 989e12  # H100 and H200, dense bf16


def main(checkout: str, depth: int, vocab_size: int, out: str | None) -> None:
    sys.path.insert(0, checkout)
    from nanochat.gpt import GPT, GPTConfig  # the checkout's

    heads = max(1, -(-depth * 64 // 128))
    sizes: dict[str, Any] = {"n_layer": depth, "n_head": heads, "n_kv_head": heads, "n_embd": heads * 128}
    started = time.perf_counter()
    with torch.device("meta"):
        model: Any = GPT(GPTConfig(sequence_len=LENGTH, vocab_size=vocab_size, window_pattern="L", **sizes))
    model.to_empty(device="cuda")
    model.init_weights()
    forward, optimizer = torch.compile(model, dynamic=False), model.setup_optimizer()
    tokens = torch.randint(0, vocab_size, (ROWS, LENGTH + 1), device="cuda")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(wait: bool = True) -> float:
        if wait:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        forward(inputs, targets).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if wait:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    step()
    first = time.perf_counter() - started
    times = [step() for _ in range(WARM_UP - 1 + STEPS)][WARM_UP - 1 :]
    rate = ROWS * LENGTH / statistics.median(times)
    begin = time.perf_counter()
    for _ in range(STEPS):
        step(wait=False)
    torch.cuda.synchronize()
    in_a_row = STEPS * ROWS * LENGTH / (time.perf_counter() - begin)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "parameters": sum(param.numel() for param in model.parameters()),
        "milliseconds": 1000 * statistics.median(times),
        "tokens_per_second": rate,
        "tokens_per_second_in_a_row": in_a_row,
        "mfu": model.estimate_flops() * rate / PEAK,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_step_seconds": first,
    }
    print(json.dumps(result))
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    places = [word for word in sys.argv[1:] if not word.startswith("--out=")]
    outs = [word.removeprefix("--out=") for word in sys.argv[1:] if word.startswith("--out=")]
    main(places[0], int(places[1]), int(places[2]), outs[0] if outs else None)
