"""What the model says to fixed prompts, so that two checkpoints can be compared by eye."""

from typing import Any

from nanochat.engine import Engine, Sampling

PROMPTS = (
    "The capital of Italy is",
    "Water boils at a temperature of",
    "If today is Tuesday, then tomorrow is",
    "The opposite of cold is",
    "The function returns",
    "To install the package, run",
    "Once upon a time",
)

CHAT_PROMPTS = (
    "Hello! Who are you?",
    "What can you do?",
    "Spell the word: table",
    "How many r are in the word strawberry?",
    "Tom has 12 apples and buys 7 more. How many apples does he have now?",
    "What is the capital of France?",
)
CHAT_TOKENS = 96  # of an answer, at most


def make_samples(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Greedy continuations of PROMPTS, and two documents drawn from nothing at temperature 0.8."""
    engine = Engine(model, tokenizer)
    bos = tokenizer.get_bos_token_id()
    samples = []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt, prepend=bos)
        sequences, _ = engine.generate_batch(tokens, num_samples=1, max_tokens=32, temperature=0.0)
        samples.append({"prompt": prompt, "text": tokenizer.decode(sequences[0][1:])})
    free, _ = engine.generate_batch([bos], num_samples=2, max_tokens=64, temperature=0.8, top_k=50, seed=42)
    return samples + [{"prompt": "", "text": tokenizer.decode(sequence[1:])} for sequence in free]


def make_chat_samples(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Greedy answers to CHAT_PROMPTS; tool calls and their output with their brackets."""
    engine = Engine(model, tokenizer)
    conversations = [{"messages": [{"role": "user", "content": prompt}]} for prompt in CHAT_PROMPTS]
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    room = max(1, min(CHAT_TOKENS, model.config.sequence_len - max(map(len, prompts))))
    answers = engine.generate_many(prompts, Sampling(max_new_tokens=room, temperature=0.0))
    texts = [tokenizer.decode(rows[0][len(ids) :]) for (rows, _), ids in zip(answers, prompts, strict=True)]
    return [{"prompt": prompt, "text": text} for prompt, text in zip(CHAT_PROMPTS, texts, strict=True)]
