"""What all tests share: no test touches the user's artifact store, and small machines are not overrun by threads."""

import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

import nanochat  # noqa: F401  (first, for it sets what Ctrl-C does in `python -c`, as which pytest-xdist starts workers)

# Before torch is imported. Tests run side by side, and OpenMP threads that wait for a core spin: 166 s of CPU
# instead of 30 for the same tests of muP on two busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_store = tempfile.mkdtemp(prefix="nanochat-tests-")
os.environ["NANOCHAT_BASE_DIR"] = _store
for _name in ("NANOCHAT_RUN_ID", "NANOCHAT_CONTINUE", "NANOCHAT_DTYPE", "PROFILE", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(_name, None)
hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("any machine")
# A shell lets what it starts in the background ignore Ctrl-C, and those tests that send it would wait until training
# ends by itself: 12 minutes.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Few tests that take long: by their number, as pytest-xdist orders files, they would begin last and end alone. Those
# whose processes wait for each other come after those that only compute, while Rust is compiled beside them.
LONGEST = ("mup_mutations", "chat_rl", "baselines", "inference_benchmark", "ablate", "many_ranks", "faults", "watchdog",
           "chat_sharded", "saver", "base_train_speedrun", "sandbox_escapes")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest first, then those with the most tests."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (places.get(item.path.name, len(LONGEST)), -tests[item.path], item.path))


def pytest_sessionfinish() -> None:
    shutil.rmtree(_store, ignore_errors=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty artifact store of its own for one test."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    return tmp_path / "store"
