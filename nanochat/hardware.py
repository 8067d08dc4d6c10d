"""What this machine is: GPUs with their peaks, memory, code and software, for the console and the report.

torch takes seconds to import, and the stage runner needs none of it: it is imported where it is used.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from nanochat.paths import REPO

if TYPE_CHECKING:
    import torch

PEAK_ALLOCATED = "Hardware/peak_memory_gib"  # most memory held by tensors so far; on a CPU peak RSS, GiB
PEAK_RESERVED = "Hardware/peak_reserved_gib"  # most memory taken by the allocator so far, GiB


class Gpu(NamedTuple):
    """What is known of a kind of GPU."""

    peak: float | None  # dense bf16 FLOP/s with fp32 accumulation; None: it has no bf16
    source: str  # of the peak; where a vendor prints only sparse figures, half of them
    bandwidth: float | None = None  # of its memory, bytes/s, by the same datasheet; None: not looked up


# By a substring of the device name; the first that fits counts, so a name comes before those that are part of it.
GPUS = {
    "GB200": Gpu(2500e12, "NVIDIA GB200 NVL72 datasheet: 360 PFLOPS sparse over 72 GPUs"),
    "B200": Gpu(2250e12, "NVIDIA HGX B200 datasheet: 36 PFLOPS sparse over 8 GPUs"),
    "GH200": Gpu(989e12, "NVIDIA GH200 datasheet: 1,979 TFLOPS sparse"),
    "H200 NVL": Gpu(835e12, "NVIDIA H200 datasheet, NVL column: 1,671 TFLOPS sparse"),
    "H200": Gpu(989e12, "NVIDIA H200 datasheet, SXM column: 1,979 TFLOPS sparse", 4.8e12),
    "H100 NVL": Gpu(835e12, "NVIDIA H100 datasheet, NVL column: 1,671 TFLOPS sparse"),
    "H100 PCIe": Gpu(756e12, "NVIDIA H100 PCIe product brief: 1,513 TFLOPS sparse"),
    "H100": Gpu(989e12, "NVIDIA H100 datasheet, SXM column: 1,979 TFLOPS sparse", 3.35e12),
    "H800": Gpu(989e12, "H100 SXM with slower links"),
    "A100": Gpu(312e12, "NVIDIA A100 datasheet: 312 TFLOPS, 624 sparse"),
    "A800": Gpu(312e12, "A100 with slower links"),
    "A10G": Gpu(70e12, "NVIDIA A10G figures of Amazon EC2 G5: 70 TFLOPS, 140 sparse"),
    "L40S": Gpu(362e12, "NVIDIA L40S datasheet: 362.05 TFLOPS, 733 sparse"),
    "L40": Gpu(181e12, "NVIDIA L40 datasheet: 181.05 TFLOPS, 362.1 sparse"),
    "L4": Gpu(121e12, "NVIDIA L4 datasheet: 242 TFLOPS sparse"),
    "V100": Gpu(None, ""),
    "RTX 5090": Gpu(209.5e12, "NVIDIA RTX Blackwell GPU architecture paper: 209.5, 419 sparse"),
    "RTX 4090": Gpu(165.2e12, "NVIDIA Ada GPU architecture paper: 165.2, 330.4 sparse"),
    "RTX 3090": Gpu(71e12, "NVIDIA GA102 GPU architecture paper: 71, 142 sparse"),
}


def find_gpu(name: str) -> Gpu:
    """The entry of GPUS for a device of this name; one without a peak where nobody listed it."""
    return next((gpu for key, gpu in GPUS.items() if key in name), Gpu(None, ""))


def unlisted(what: str, names: Iterable[str]) -> str:
    """The message where the peak or the bandwidth of a card is not known."""
    return f"the {what} of {' and '.join(dict.fromkeys(names))} is not in hardware.GPUS"


def device_name(device: torch.device) -> str:
    """Name for people and reports."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of this card in FLOP/s; None where it is not known (then no MFU is printed)."""
    return find_gpu(device_name(device)).peak if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held by tensors so far: on the GPU as the allocator counts it, on the CPU the process's peak RSS."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peaks so far in GiB: of what tensors held, and on a GPU of what the allocator has taken for them (the difference
    is fragmentation, and what others cannot have). Counters of the host: nothing waits for the device."""
    metrics = {PEAK_ALLOCATED: peak_memory_bytes(device) / 2**30}
    if device.type == "cuda":
        import torch

        metrics[PEAK_RESERVED] = torch.cuda.max_memory_reserved(device) / 2**30
    return metrics


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
    import torch

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
