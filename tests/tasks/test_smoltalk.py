import pytest

from nanochat.errors import UserError
from nanochat.tasks import hub
from nanochat.tasks.smoltalk import SmolTalk
from tests.tasks.hub_rows import put, talk_row

SYSTEM = {"role": "system", "content": "Be brief."}


def test_conversations_come_as_they_are_system_message_included(store, tmp_path):
    rows = [talk_row(0), talk_row(1, SYSTEM), talk_row(2)]
    put(tmp_path, "SmolTalk", train=rows, test=[talk_row(9)])
    task = SmolTalk("train")
    assert (task.name, task.eval_type, len(task)) == ("SmolTalk", None, 3)
    found = sorted((task[i] for i in range(3)), key=lambda item: item["messages"][-1]["content"])
    assert found == [{"messages": row["messages"]} for row in rows]


def test_the_table_is_not_read_before_a_conversation_is_asked_for(store, tmp_path, monkeypatch):
    put(tmp_path, "SmolTalk", train=[talk_row(0), talk_row(1)])
    monkeypatch.setattr(hub, "load_tables", lambda *_: pytest.fail("read"))
    assert len(SmolTalk("train")) == 2


def test_a_malformed_row_is_named_when_it_is_asked_for(store, tmp_path):
    put(tmp_path, "SmolTalk", train=[talk_row(0), talk_row(1, {"role": "assistant", "content": "Hello."}), talk_row(2)])
    task = SmolTalk("train")
    bad = hub.fixed_order(3).index(1)
    with pytest.raises(UserError, match="SmolTalk train, row 1: message 0: role is 'assistant', expected 'user'"):
        task[bad]
    assert [len(task[i]["messages"]) for i in range(3) if i != bad] == [2, 2]
