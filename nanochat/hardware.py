"""Facts about code, machine, software and price, for the head of the report."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parent.parent

# USD per GPU and hour: usual on-demand price of cloud offers, rounded, as of the date below. By a substring of the
# device name, the longest first where one holds another.
PRICES_DATE = "mid 2025"
PRICES = {
    "GB200": 8.0,
    "GH200": 2.0,
    "B200": 5.0,
    "H200": 3.8,
    "H100": 3.0,
    "H800": 3.0,
    "A100": 1.8,
    "A800": 1.8,
    "L40S": 1.5,
    "A10G": 1.0,
    "L4": 0.8,
    "V100": 0.55,
    "RTX 5090": 0.7,
    "RTX 4090": 0.4,
    "RTX 3090": 0.25,
}


def git(root: Path = REPO) -> dict[str, Any] | None:
    """Branch, commit, number of changed files and subject of the commit; None outside a git checkout with commits."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = (_git(root, "status", "--porcelain") or "").splitlines()
    return {
        "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
        "commit": commit,
        "changed_files": len(changes),
        "message": _git(root, "log", "-1", "--format=%s"),
    }


def short_commit(root: Path = REPO) -> str | None:
    """Short commit, with a + when the working tree differs from it; None outside a git checkout."""
    facts = git(root)
    return None if facts is None else facts["commit"][:10] + ("+" if facts["changed_files"] else "")


def hardware() -> dict[str, Any]:
    """Platform, cores, memory in bytes, and the visible GPUs as [{name, memory_bytes}]."""
    import torch  # seconds to import; only the report pays for it

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def software() -> dict[str, str]:
    """Versions of Python and of the packages whose version can move a number."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pyarrow", "tiktoken", "rustbpe"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def usd_per_hour(gpus: list[dict[str, Any]]) -> float | None:
    """What renting these GPUs costs by PRICES; None without a GPU or where one is not in the table."""
    prices = [next((price for key, price in PRICES.items() if key in gpu["name"]), None) for gpu in gpus]
    known = [price for price in prices if price is not None]
    return sum(known) if known and len(known) == len(prices) else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
