"""SmolTalk: general conversations for small models, 460K to train on.

Source: HuggingFaceTB/smol-smoltalk on the Hugging Face hub.
"""

import functools
from typing import Any

import pyarrow as pa

from nanochat.chat_format import conversation_pieces
from nanochat.errors import UserError
from nanochat.tasks import hub
from nanochat.tasks.common import Conversation, Split, Task


class SmolTalk(Task):
    """Conversations as they are, in a fixed random order, to train on; they are not graded.

    Raises UserError where the data is absent, and naming the row when one is asked for that is malformed.
    """

    name = "SmolTalk"
    published = True

    def __init__(self, split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split = split
        self.source = hub.source_text(self.name)
        self._total = hub.num_rows(self.name, split)

    @functools.cached_property
    def _table(self) -> pa.Table:  # 2 GB of text: read when the first conversation is asked for
        return hub.load_table(self.name, self.split)

    def num_examples(self) -> int:
        return self._total

    def get_example(self, index: int) -> Conversation:
        number = hub.fixed_order(self._total)[index]
        conversation = {"messages": self._table.column("messages")[number].as_py()}
        try:
            conversation_pieces(conversation)
        except UserError as error:
            raise UserError(f"{self.name} {self.split}, row {number}: {error}") from None
        return conversation
