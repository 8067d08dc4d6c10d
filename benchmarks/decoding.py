"""Times the engine of whichever program of this family is on the path. benchmarks.inference runs it, for another
program in a process of its own. It uses nothing but the names that these programs share."""

import dataclasses
import json
import sys
import time
from typing import Any, NamedTuple

import torch


class NoText(NamedTuple):
    """Stands in for a tokenizer: nothing that is sampled means anything, so that every row goes on to its limit."""

    vocab_size: int

    def encode_special(self, name: str) -> int:
        return self.vocab_size + sum(name.encode())  # no such token

    def get_bos_token_id(self) -> int:
        return self.vocab_size


def time_decoding(engine: Any, work: dict[str, Any]) -> list[dict[str, float]]:
    """For each batch size: seconds to the first token and for each further one, and the most memory held, in bytes.
    Every batch is decoded once before it is timed, and the second and third token are left out: there an engine may
    record its steps."""
    device = engine.model.get_device()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    options = {"max_tokens": work["new_tokens"], "temperature": 1.0, "top_k": work["top_k"]}
    prompt = [i % work["vocab_size"] for i in range(1, work["context"] + 1)]
    found = []
    for rows in work["batch_sizes"]:
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            wait()
            times = [time.perf_counter()]
            for column, _ in engine.generate(prompt, num_samples=rows, seed=1, **options):
                assert len(column) == rows
                times.append(time.perf_counter())  # when the host has it, as a user would
            wait()
        assert len(times) == work["new_tokens"] + 1, f"{len(times) - 1} tokens instead of {work['new_tokens']}"
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        seconds = (times[-1] - times[3]) / (len(times) - 4)
        found.append({"rows": rows, "first": times[1] - times[0], "seconds": seconds, "memory": memory})
    return found


def main() -> None:
    """A model of the program's own, with weights as it draws them, from the settings in the first argument."""
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    work = json.loads(sys.argv[1])
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    with torch.device("meta"):
        model = GPT(GPTConfig(**{name: value for name, value in work["model"].items() if name in known}))
    model.to_empty(device=work["device"])
    model.init_weights()
    print(json.dumps(time_decoding(Engine(model.eval(), NoText(work["vocab_size"])), work)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
