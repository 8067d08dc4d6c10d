"""Speed of the engine with random weights: what a user waits for, and how much of the memory's bandwidth that is.

    python -m benchmarks.inference --out=inference.json                            d20 on a GPU, batches of 1 to 128
    python -m benchmarks.inference --context=1024 --arch=speedrun --window-pattern=SSSL
    python -m benchmarks.inference --peer=/programs/nanochat                       another program beside it
    python -m benchmarks.inference --depth=2 --vocab-size=512 --context=16 --new-tokens=8 --batch-sizes=1,2     on a CPU

MBU (model bandwidth utilization) = bytes that a step must read / (seconds of a step x bandwidth of the card, as its
datasheet has it: nanochat.hardware.GPUS). Bytes = parameters in the dtype they are computed in, once, without tables of
which only a row a token is read + for each row and layer, keys and values of the positions that the row has by then and
the layer's window reaches. What is padded, or read twice, does not count.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch

from benchmarks import decoding
from benchmarks.measure import about
from benchmarks.output import Output, write_json
from nanochat import cli
from nanochat.cli import int_flag
from nanochat.config import ArchFlags, build_config, resolve
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.flags import DeviceFlags
from nanochat.gpt import GPT
from nanochat.hardware import device_name, find_gpu, peak_memory_bytes, unlisted
from nanochat.runtime import compute_cleanup, compute_dtype, compute_init


@cli.program
class Settings(Output, DeviceFlags, ArchFlags):
    """Measure decoding."""

    vocab_size: Annotated[int, int_flag(gte=64)] = 32_768
    """Vocabulary."""
    batch_sizes: str = "1,8,32,128"
    """Rows decoded together, samples of one prompt; one measurement for each number."""
    context: Annotated[int, int_flag(gte=1)] = 256
    """Tokens of the prompt."""
    new_tokens: Annotated[int, int_flag(gte=4)] = 256
    """Tokens decoded in each row."""
    top_k: Annotated[int, int_flag(gte=1)] = 50
    """Each token is drawn from this many."""
    peer: Path | None = None
    """Folder of another program of this family, which is measured in the same way, with its own weights and dtype."""


def main(settings: Settings) -> None:
    device = compute_init(settings.device_type)[-1]
    flags = resolve(settings)
    config = build_config(flags, settings.vocab_size, document_token=0)
    if settings.context + settings.new_tokens > config.sequence_len:
        raise UserError(
            f"--context={settings.context} and --new-tokens={settings.new_tokens} are more than "
            f"--max-seq-len={config.sequence_len}: make it longer"
        )
    with torch.device("meta"):
        model = GPT(config, compute_dtype(device))
    model.to_empty(device=device)
    model.init_weights()
    names = ("vocab_size", "context", "new_tokens", "top_k")
    work = {name: getattr(settings, name) for name in names} | {"batch_sizes": _sizes(settings.batch_sizes)}
    engine = Engine(model.eval(), decoding.NoText(settings.vocab_size))  # type: ignore[arg-type]
    bandwidth = find_gpu(device_name(device)).bandwidth
    if bandwidth is None and device.type == "cuda":
        print(unlisted("bandwidth", [device_name(device)]))
    result = about(settings, device, without=("out", "peer")) | {
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "parameters": model.num_params(),
        "bandwidth": bandwidth,
        "rows": _described(decoding.time_decoding(engine, work), model, settings, bandwidth),
    }
    if settings.peer is not None:
        shape = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
        work |= {"device": str(device), "model": {name: getattr(config, name) for name in shape}}
        del engine  # its copy of the weights
        result["peer"] = _described(_of_peer(settings.peer, work), model, settings, bandwidth)
    for who in ("rows", "peer"):
        for row in result.get(who, []):
            mbu = "" if row["mbu"] is None else f", MBU {row['mbu']:.1%}"
            print(
                f"{'' if who == 'rows' else 'peer: '}batch {row['batch_size']}: first token {row['first_ms']:.1f} ms, "
                f"{row['token_ms']:.3f} ms a token, {row['tokens_per_second']:,.0f} tok/s{mbu}, "
                f"{row['memory_gib']:.2f} GiB"
            )
    write_json(settings, result)
    compute_cleanup()


def _sizes(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--batch-sizes={text}: say numbers of rows, as in 1,8,32")
    return [int(word) for word in words]


def _of_peer(folder: Path, work: dict[str, Any]) -> list[dict[str, float]]:
    """The same by another program, in a process of its own. -P: it does not find ours."""
    if not (folder / "nanochat" / "gpt.py").is_file():
        raise UserError(f"--peer={folder}: no nanochat/gpt.py in it; name the folder of another program of this family")
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
    command = [sys.executable, "-P", str(Path(decoding.__file__)), json.dumps(work)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise UserError(f"--peer={folder}: {last[-1]}")
    found: list[dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _described(
    found: list[dict[str, float]], model: GPT, settings: Settings, bandwidth: float | None
) -> list[dict[str, Any]]:
    rows = []
    for one in found:
        size = int(one["rows"])
        read = step_bytes(model, size, settings.context, settings.new_tokens)
        rows.append({
            "batch_size": size,
            "first_ms": 1000 * one["first"],
            "token_ms": 1000 * one["seconds"],
            "tokens_per_second": size / one["seconds"],
            "bytes_read": read,
            "mbu": read / one["seconds"] / bandwidth if bandwidth else None,
            "memory_gib": (one["memory"] or peak_memory_bytes(model.get_device())) / 2**30,
        })  # fmt: skip
    return rows


def step_bytes(model: GPT, rows: int, context: int, new_tokens: int) -> float:
    """Bytes that a step must read, on average over the steps behind a prompt of `context` tokens; see above."""
    config, size = model.config, model.compute_dtype.itemsize
    tables = ("transformer.wte.", "transformer.value_embeds.")
    weights = sum(param.numel() for name, param in model.named_parameters() if not name.startswith(tables))
    positions = 0
    for length in range(context + 1, context + new_tokens):  # with the token that the step itself reads
        for layer in range(config.n_layer):
            if layer != config.attention_free_layer:
                window = config.window(layer)
                positions += length if window < 0 else min(length, window + 1)
    cached = 2 * config.n_kv_head * (config.n_embd // config.n_head) * positions / (new_tokens - 1)
    return size * (weights + rows * cached)


if __name__ == "__main__":
    cli.run(main, Settings)
