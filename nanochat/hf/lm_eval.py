"""lm-evaluation-harness as a judge of our checkpoints: the model `nanochat` of its command line.

    python -m nanochat.hf.lm_eval --model nanochat --model_args stage=base,tag=d20 --tasks piqa,arc_easy --batch_size 16
    python -m nanochat.hf.lm_eval --model nanochat --model_args stage=sft --apply_chat_template --tasks gsm8k
    python -m nanochat.launch -- -m nanochat.hf.lm_eval --model nanochat --model_args stage=base --tasks lambada_openai

All else is as lm_eval has it. Texts begin with <|bos|>, as all documents did in training. Only what the chat template
has put in becomes a special token: its names carry a mark that no text has.
"""

import re
from typing import Any

import torch
import torch.distributed as dist

from nanochat import errors
from nanochat.chat_format import CHAT_TEMPLATE, Piece, completion_pieces, conversation_pieces
from nanochat.checkpoint import STAGE_SCRIPTS, load_model
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.eval.tree import Row, score
from nanochat.runtime import compute_cleanup, compute_init, gather, rank_and_world
from nanochat.tokenizer import repaired

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as missing:
    hint = f"{missing.name} is missing: `uv pip install lm_eval==0.4.13` (the extra `eval` of pyproject.toml)"
    if __name__ == "__main__":
        errors.end(hint)
    raise UserError(hint) from None

MARK = "\ufdd0"  # behind the name of a special token that is one; Unicode keeps it free for use within a program
DEFAULT_BATCH = 16


class NanochatLM(TemplateLM):
    """stage, tag, step: which checkpoint; by default the base model of the newest run. batch_size: rows of full length
    per forward pass, and answers that are written at once. max_length: tokens of context; by default the model's."""

    def __init__(
        self,
        stage: str = "base",
        tag: str | int | None = None,
        step: int | None = None,
        batch_size: int | str = DEFAULT_BATCH,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if stage not in STAGE_SCRIPTS:
            raise UserError(f"stage={stage}: use one of {', '.join(STAGE_SCRIPTS)}")
        kind: Any = "cpu" if device == "cpu" else "auto"  # lm_eval asks for cuda:0 wherever it runs
        self._device = compute_init(kind)[-1]
        model, self.tokens, meta = load_model(stage, self._device, tag=None if tag is None else str(tag), step=step)
        self.model, self.engine = model, Engine(model, self.tokens)
        self.max_length = max_length or model.config.sequence_len
        self.max_gen_toks = max_gen_toks
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else DEFAULT_BATCH  # not `auto`
        self._rank, self._world_size = rank_and_world()
        self.about = {"model_stage": stage, "model_tag": meta["tag"], "model_step": meta["step"]}

    def get_model_info(self) -> dict[str, Any]:
        return {**self.about, "model_num_parameters": self.model.num_params(), "model_dtype": self.model.compute_dtype}

    # ---- text

    @property
    def eot_token_id(self) -> int:
        return self.tokens.encode_special("<|assistant_end|>")

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.get_bos_token_id()

    @property
    def tokenizer_name(self) -> str:
        return f"nanochat-{self.tokens.hash}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """<|bos|> in front, unless the text has it there, or add_special_tokens is False."""
        names = "|".join(map(re.escape, self.tokens.get_special_tokens()))
        ids: list[int] = []
        for part in re.split(f"((?:{names}){MARK})", repaired(string)):
            if part.endswith(MARK) and part[:-1] in self.tokens.get_special_tokens():
                ids.append(self.tokens.encode_special(part[:-1]))
            else:
                ids += self.tokens.encode_ordinary(part)
        has_bos = ids[:1] == [self.prefix_token_id]
        return ids if add_special_tokens is False or has_bos else [self.prefix_token_id, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation up to where the assistant speaks next, or goes on with its last message. What is special has
        a MARK behind it, and messages have none."""
        messages = [{**turn, "content": turn["content"].replace(MARK, "\ufffd")} for turn in chat_history]
        if add_generation_prompt:
            pieces = completion_pieces({"messages": messages})
        else:
            pieces = conversation_pieces({"messages": messages})[:-1]
        return "".join(map(_marked, pieces))

    # ---- scores

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of ((context, continuation), their ids): summed log-probability of the continuation, and whether each of its
        tokens is the likeliest. As lm_eval's own models do, of max_length + 1 tokens at most, the last ones."""
        rows, places = [], []
        for place, (_, context, continuation) in enumerate(requests):
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            if continuation:
                places.append(place)
                rows.append(Row(tokens, max(1, len(tokens) - len(continuation)), len(tokens)))
        found = [(0.0, True)] * len(requests)
        if rows:
            longest = self.max_length + 1
            limits = self._device, self.prefix_token_id, longest, self.batch_size * longest
            means, exact = score(self.model, [[row] for row in rows], *limits)
            for place, row, mean, hit in zip(places, rows, means, exact, strict=True):
                found[place] = -float(mean) * (row.end - row.start), bool(hit)
        for (names, *_), answer in zip(requests, found, strict=True):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token seen with as much of the text before it as fits."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            pieces = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(utils.make_disjoint_window, pieces):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts without special tokens, up to one of the strings of `until`, written by the engine, calculator
        included: requests of equal settings in one batch that rows leave and join."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            until = handle_stop_sequences(settings.pop("until", None), eos=None)
            texts = self._generate([requests[number].args[0] for number in numbers], settings, until)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
        return answers

    def _generate(self, prompts: list[str], settings: Any, until: list[str]) -> list[str]:
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            raise UserError(f"max_gen_toks={most}: must be less than the context of {self.max_length} tokens")
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        sampling = Sampling(
            max_new_tokens=most,
            temperature=temperature,
            top_k=settings.get("top_k") or None,
            top_p=settings.get("top_p"),
        )
        room = self.max_length - most
        samples = [
            self.engine.samples(number, self.tok_encode(prompt)[-room:], sampling, seed=42 + number)
            for number, prompt in enumerate(prompts)
        ]
        batch = self.engine.batch(samples, rows=self.batch_size)
        texts, stops = [bytearray() for _ in prompts], [stop.encode() for stop in until if stop]
        first_special = self.tokens.get_vocab_size() - len(self.tokens.get_special_tokens())
        while len(batch):
            over = []
            for row, token, _ in batch.step():
                new, text = self.tokens.decode_bytes([token]) if token < first_special else b"", texts[row.prompt]
                text += new
                if any(stop in text[-(len(stop) + len(new)) :] for stop in stops):
                    over.append(row)
            batch.leave([row for row in over if not row.ended])
        return [text.decode("utf-8", "replace") for text in texts]

    # ---- ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in gather(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = gather(obj)
        return found if self._rank == dst else None

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def _marked(piece: Piece) -> str:
    return piece.text + MARK if piece.special else piece.text


model_registry.register("nanochat")(NanochatLM)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    compute_cleanup()


if __name__ == "__main__":
    errors.exit_on_user_error(main)
