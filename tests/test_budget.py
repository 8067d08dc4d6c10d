"""The size of the house: how many rooms, how large, and that what can be deleted is not built into the rest.

Which module may import which is checked by import-linter (pyproject.toml).
"""

from functools import cache
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
CORE_LINES = 15_603  # kernels/: norms, rotary, MLP and a step of decoding on a GPU; eval/tree.py: shared text once
MODULE_LINES = 500
ENTRIES = 42

# What could be deleted without touching the rest of nanochat/, which is what PROFILE=full runs: width studies,
# clusters, tasks on generated questions, offline text, token files, instruments, other programs' formats, 8 bits.
# Scripts attach them, or a table names them.
ANNEXES = (
    "nanochat.studies",
    "nanochat.cluster",
    "nanochat.serve",
    "nanochat.hf",
    "nanochat.kernels.fp8",
    "nanochat.kernels.fp8_device",
    *(f"nanochat.tasks.{name}" for name in ("arithmetic", "customjson", "passages", "reasoning_gym", "text_choice")),
    *(f"nanochat.data.{name}" for name in ("bins", "local", "overlap", "pydocs")),
    *(f"nanochat.train.{name}" for name in ("coordinates", "memory", "monitor", "spectral", "tracking", "warmup")),
    *(f"nanochat.report.{name}" for name in ("compare", "events", "plots")),
    *(f"nanochat.eval.{name}" for name in ("baselines", "foreign", "offline_bundle", "row_files", "shortcuts")),
)


def is_annex(module: str) -> bool:
    return any(module == annex or module.startswith(f"{annex}.") for annex in ANNEXES)


def lines(module: str) -> int:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return len(path.read_text(encoding="utf-8").splitlines())


@cache
def graph() -> grimp.ImportGraph:
    """Imports within nanochat/, lazy ones and those of annotations too."""
    return grimp.build_graph("nanochat", cache_dir=None)


def test_no_module_is_too_long():
    assert {module: lines(module) for module in graph().modules if lines(module) > MODULE_LINES} == {}


def test_the_core_is_small():
    sizes = {module: lines(module) for module in graph().modules if not is_annex(module)}
    assert sum(sizes.values()) <= CORE_LINES, sorted(sizes.items(), key=lambda item: -item[1])[:20]


def test_the_spine_is_a_table_of_contents():
    entries = {path.name for path in (ROOT / "nanochat").iterdir()} - {"__pycache__"}
    assert len(entries) <= ENTRIES, sorted(entries)


def test_the_core_can_do_without_the_annexes():
    core = [module for module in graph().modules if not is_annex(module)]
    found = {module: graph().find_modules_directly_imported_by(module) for module in core}
    annexes = {module: sorted(filter(is_annex, imported)) for module, imported in found.items()}
    assert {module: imported for module, imported in annexes.items() if imported} == {}
