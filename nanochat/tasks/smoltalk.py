"""SmolTalk: general conversations for small models, 460K to train on.

Source: HuggingFaceTB/smol-smoltalk on the Hugging Face hub.
"""

from typing import Any

from nanochat.chat_format import conversation_pieces
from nanochat.tasks.common import Conversation
from nanochat.tasks.hub import PublishedTask


class SmolTalk(PublishedTask):
    """Conversations as they are, to train on; not graded."""

    name = "SmolTalk"

    @staticmethod
    def conversation(row: dict[str, Any]) -> Conversation:
        conversation = {"messages": row["messages"]}
        conversation_pieces(conversation)
        return conversation
