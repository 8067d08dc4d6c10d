"""Supervised fine-tuning: whole conversations, and the loss only on what the assistant says.

    python -m scripts.chat_sft --model-tag=d12
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.chat_sft --tasks=my_chats.jsonl,GSM8K

Sequence length, batch and learning rates are those of the stage before unless a flag says otherwise.
"""

from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import float_flag, int_flag
from nanochat.flags import ChatTrainSettings


@cli.program
class Settings(ChatTrainSettings):
    """Fine-tune a model on conversations."""

    tasks: str = "ARC-Easy,ARC-Challenge,GSM8K,SmolTalk:10000,Identity,SimpleSpelling:300,SpellingBee:300"
    source_stage: Literal["mid", "base"] = "mid"
    """Stage to start from."""
    init_lr_frac: Annotated[float, float_flag(gte=0)] = 0.5
    warmdown_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 1.0
    eval_every: Annotated[int, int_flag(gte=-1)] = 100


from nanochat.cluster.observer import ClusterObserver
from nanochat.train.chat import train_on_chats


def main(settings: Settings) -> None:
    train_on_chats(settings, "sft", settings.source_stage, ClusterObserver())


if __name__ == "__main__":
    cli.run(main, Settings)
