"""SmolTalk: general conversations for small models, 460K to train on.

Source: HuggingFaceTB/smol-smoltalk on the Hugging Face hub.
"""

from typing import Any

from nanochat.chat_format import conversation_pieces
from nanochat.errors import UserError
from nanochat.tasks.common import Conversation
from nanochat.tasks.hub import PublishedTask


class SmolTalk(PublishedTask):
    """Conversations as they are, to train on; not graded. A malformed row raises UserError when it is read."""

    name = "SmolTalk"

    def get_example(self, index: int) -> Conversation:
        try:
            return super().get_example(index)
        except UserError as error:
            raise UserError(f"{self.name} {self.split}, row {self.row_number(index)}: {error}") from None

    def conversation(self, row: dict[str, Any]) -> Conversation:
        conversation = {"messages": row["messages"]}
        conversation_pieces(conversation)
        return conversation
