"""Mid-training: the base model meets conversations, tool calls and multiple choice, as one stream of text.

    python -m scripts.mid_train --model-tag=d12
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.mid_train --tasks=SmolTalk,MMLU,GSM8K,Identity*2

Sequence length, batch and learning rates are those of the base run unless a flag says otherwise.
"""

from typing import Annotated

from nanochat import cli
from nanochat.cli import float_flag
from nanochat.flags import ChatTrainSettings, LossOn, Packing


@cli.program
class Settings(ChatTrainSettings):
    """Train a base model on conversations."""

    tasks: str = "SmolTalk,MMLU,GSM8K,Identity*2,SimpleSpelling:200000,SpellingBee:80000"
    packing: Packing = "stream"
    loss_on: LossOn = "all"
    warmdown_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.2


from nanochat.cluster.observer import ClusterObserver
from nanochat.train.chat import train_on_chats


def main(settings: Settings) -> None:
    train_on_chats(settings, "mid", "base", ClusterObserver())


if __name__ == "__main__":
    cli.run(main, Settings)
