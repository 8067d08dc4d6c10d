import itertools
import threading
import time

import pytest

from nanochat.data.prefetch import Prefetcher


def test_items_come_in_order_and_ahead():
    made = []
    ahead = Prefetcher((made.append(i) or i for i in itertools.count()), 3, "numbers")
    assert [ahead.get() for _ in range(5)] == [0, 1, 2, 3, 4]
    deadline = time.monotonic() + 5
    while len(made) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 9  # three lie ready, and one waits for room
    ahead.close()
    assert "numbers" not in {thread.name for thread in threading.enumerate()}


def test_what_the_iterator_raises_is_raised_where_it_is_read():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = Prefetcher(items(), 2, "broken")
    assert ahead.get() == 1
    with pytest.raises(ValueError, match="broken"):
        ahead.get()
    ahead.close()
