"""The index of torch.distributed.checkpoint is a pickle: what a hostile or damaged one can do."""

import io
import os
import pickle
import time
import zipfile
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from nanochat import checkpoint, dcp
from nanochat.errors import UserError
from tests.checkpoints import save_checkpoint


class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.full((3,), 2.0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save_checkpoint(folder, 1, Weights(), None, {}) / "state"


@pytest.fixture
def state(saved, tmp_path):
    """A copy of the state, without checksums, as a stranger would make it."""
    path = tmp_path / "run" / "step_000001" / "state"
    path.mkdir(parents=True)
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path.parent / "meta.json").write_text(f'{{"format": {checkpoint.FORMAT}}}')
    (path.parent / "COMMITTED").touch()
    return path


def refused(state, message):
    """Loading and exporting both end with one line, at once."""
    folder, started = state.parent.parent, time.monotonic()
    for action in (lambda: checkpoint.load_weights(folder, 1, Weights()), lambda: checkpoint.export(folder, 1)):
        with pytest.raises(UserError, match=message) as error:
            action()
        assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("call", [(os.mkdir, "proof"), (eval, "__import__('os').mkdir('proof')"), (torch.load, "x")])
def test_an_index_that_names_a_function_does_not_run_it(state, monkeypatch, tmp_path, protocol, call):
    monkeypatch.chdir(tmp_path)
    honest = FileSystemReader(state).read_metadata()
    for hidden in (Runs(*call), [Runs(*call)]):
        (state / ".metadata").write_bytes(pickle.dumps(hidden, protocol))
        refused(state, "state is damaged")
        honest.planner_data = hidden
        (state / ".metadata").write_bytes(pickle.dumps(honest, protocol))
        if call[0] is torch.load and protocol > 0:  # torch's own names are stand-ins too
            checkpoint.load_weights(state.parent.parent, 1, Weights())
        else:
            refused(state, r"state is damaged \(its index names \w+\.\w+, which no checkpoint does")
    assert not (tmp_path / "proof").exists()


def test_a_place_in_the_memo_that_is_named_takes_no_memory(state):
    (state / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    refused(state, "state is damaged")


def change(state, edit):
    metadata = FileSystemReader(state).read_metadata()
    edit(metadata)
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


def place(metadata, **fields):
    for key, info in metadata.storage_data.items():
        if key.fqn == "model.one":
            vars(info).update(fields)


def entry(metadata, **fields):
    vars(metadata.state_dict_metadata["model.one"]).update(fields)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: place(m, relative_path="../../../../secret.distcp"),
        lambda m: place(m, relative_path="/etc/passwd"),
        lambda m: place(m, relative_path=None),
        lambda m: place(m, relative_path="__9_9.distcp"),
        lambda m: place(m, offset=-1),
        lambda m: place(m, offset=10**30),
        lambda m: place(m, length=10**18),
        lambda m: place(m, length=float("nan")),
        lambda m: entry(m, size=torch.Size([10**12, 4])),
        lambda m: entry(m, size=torch.Size([10**12, 10**6]), chunks=[]),
        lambda m: entry(
            m,
            size=torch.Size([10**12, 4]),
            chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([10**12, 4]))],
        ),
        lambda m: entry(m, size=torch.Size([-6, 4])),
        lambda m: entry(m, chunks=[]),
        lambda m: entry(m, chunks=m.state_dict_metadata["model.one"].chunks * 2),
        lambda m: entry(m, chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([6, 3]))]),
        lambda m: entry(m, chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([5, 4]))]),
        lambda m: entry(m, chunks="text"),
        lambda m: m.storage_data.clear(),
        lambda m: setattr(m, "storage_data", None),
        lambda m: setattr(m, "state_dict_metadata", [1]),
        lambda m: m.state_dict_metadata.update({"model.one": BytesStorageMetadata()}),  # DCP would unpickle those
        lambda m: m.storage_data.update({MetadataIndex("model.one", [0, 0]): None}),
    ],
)
def test_an_index_that_does_not_agree_with_its_files_is_refused(state, edit):
    change(state, edit)
    refused(state, "state is damaged")


def test_a_tensor_that_would_run_something_is_refused(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = state / "__0_0.distcp"
    torch.save(Runs(os.mkdir, "proof"), file)
    change(state, lambda m: [vars(i).update(offset=0, length=file.stat().st_size) for i in m.storage_data.values()])
    refused(state, "state is damaged")
    torch.save({"not": "a tensor"}, file)
    change(state, lambda m: [vars(i).update(offset=0, length=file.stat().st_size) for i in m.storage_data.values()])
    refused(state, "state is damaged")
    assert not (tmp_path / "proof").exists()


def doubled(depth=60):
    """A tuple of a few hundred bytes whose hash, comparison and text take for ever."""
    value = (1, 2)
    for _ in range(depth):
        value = (value, value)
    return value


def pickled(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


DOUBLED = pickle.dumps(doubled(), 4)[11:-1]  # without protocol, frame and end


@pytest.mark.parametrize(
    "content",
    [
        pickled(pickle.EMPTY_DICT, DOUBLED, pickle.NONE, pickle.SETITEM),
        pickled(pickle.EMPTY_DICT, pickle.MARK, DOUBLED, pickle.NONE, pickle.SETITEMS),
        pickled(pickle.MARK, DOUBLED, pickle.NONE, pickle.DICT),
        pickled(pickle.MARK, DOUBLED, pickle.FROZENSET),
        pickled(pickle.EMPTY_SET, pickle.MARK, DOUBLED, pickle.ADDITEMS),
    ],
)
def test_values_that_take_for_ever_to_hash_are_refused(state, content):
    (state / ".metadata").write_bytes(content)
    refused(state, "state is damaged")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: place(m, relative_path=doubled()),
        lambda m: place(m, offset=doubled()),
        lambda m: entry(m, size=torch.Size([6, 4]), chunks=doubled()),
        lambda m: [vars(key).update(fqn=doubled()) for key in m.storage_data],
    ],
)
def test_values_that_take_for_ever_to_print_are_refused(state, edit):
    with mock.patch.object(MetadataIndex, "__hash__", object.__hash__):
        change(state, edit)
        refused(state, "state is damaged")


def pack_anew(state, write):
    """Have `write(archive, name, content)` write each entry of each tensor's archive."""
    file = state / "__0_0.distcp"
    before, after = file.read_bytes(), io.BytesIO()

    def edit(metadata):
        for info in metadata.storage_data.values():
            source = zipfile.ZipFile(io.BytesIO(before[info.offset : info.offset + info.length]))
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for name in source.namelist():
                    write(archive, name, source.read(name))
            info.offset, info.length = after.tell(), len(buffer.getvalue())
            after.write(buffer.getvalue())

    change(state, edit)
    file.write_bytes(after.getvalue())


def test_archives_that_grow_in_memory_are_refused(state):
    pack_anew(state, lambda archive, name, content: archive.writestr(name, content))
    checkpoint.load_weights(state.parent.parent, 1, Weights())

    def bomb(archive, name, content):
        if name.endswith("data/0"):
            content = content.ljust(30_000_000, b"\0")
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)

    pack_anew(state, bomb)
    refused(state, "state is damaged .it has compressed tensors")


@given(data=st.data())
def test_flipped_bits_in_the_index_never_end_in_anything_but_an_exception(saved, tmp_path_factory, data):
    content = bytearray((saved / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("flipped")
    (folder / ".metadata").write_bytes(content)
    (folder / "__0_0.distcp").write_bytes((saved / "__0_0.distcp").read_bytes())
    try:
        index = dcp.read_index(folder)
        dcp.read_tensors(folder, index, {"model.one": torch.empty(6, 4)})
    except Exception as error:
        assert not isinstance(error, MemoryError)
