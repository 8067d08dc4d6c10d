import gc
import weakref

import pytest

from nanochat.train import collector


class Node:
    pass


def cycle() -> weakref.ref:
    node = Node()
    node.self = node
    return weakref.ref(node)


def test_collects_at_multiples_of_every_and_not_in_between():
    with collector.scheduled() as collect:
        collect(1)
        garbage = cycle()
        many = [[] for _ in range(100_000)]  # enough to start an automatic collection
        for step in range(2, collector.EVERY):
            collect(step)
        assert garbage() is not None
        collect(collector.EVERY)
        assert garbage() is None
        assert len(many) == 100_000


def test_the_first_call_collects_all_and_freezes_what_lives():
    with collector.scheduled() as collect:
        garbage = cycle()
        collect(12_345)  # a resumed run starts anywhere
        assert garbage() is None
        assert gc.get_freeze_count() > 0
        frozen = gc.get_freeze_count()
        collect(collector.EVERY)
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_an_exception(enabled):
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(KeyError), collector.scheduled() as collect:
            assert not gc.isenabled()
            collect(1)
            raise KeyError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    finally:
        gc.enable()
