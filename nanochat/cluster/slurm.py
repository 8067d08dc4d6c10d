"""What Slurm says of a job, for nanochat.launch."""

import re
import subprocess
from collections.abc import Mapping
from itertools import product

from nanochat.errors import UserError


def check(environment: Mapping[str, str], nodes: int) -> None:
    """Raises UserError unless this is the one launcher of its node, started on every node."""
    local = environment.get("SLURM_LOCALID", "0")
    if local != "0":
        raise UserError(f"SLURM_LOCALID={local}: start one launcher on each node, with --ntasks-per-node=1")
    if nodes > 1 and "SLURM_STEP_ID" not in environment and "SLURM_STEPID" not in environment:
        raise UserError(f"SLURM_NNODES={nodes} and no SLURM_STEP_ID: start it with srun, so that every node takes part")


def hosts(nodelist: str) -> list[str]:
    """Host names of a Slurm node list, by scontrol where there is one. Raises UserError when it holds none."""
    if found := _ask_scontrol(nodelist) or expand_hosts(nodelist):
        return found
    raise UserError(f"the Slurm node list {nodelist!r} names no host: set SLURM_JOB_NODELIST to a list of hosts")


def _ask_scontrol(nodelist: str) -> list[str]:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []  # containers often have none
    return done.stdout.split()


def expand_hosts(nodelist: str) -> list[str]:
    """`gpu[01-03,07],login1` -> gpu01, gpu02, gpu03, gpu07, login1. Raises UserError when brackets do not fit."""
    found: list[str] = []
    for item in re.split(r",(?![^\[]*\])", nodelist.strip()):  # commas outside brackets
        parts = re.split(r"\[([^\[\]]*)\]", item)  # text and bracket contents in turn
        if any(mark in text for text in parts[::2] for mark in "[]"):
            raise UserError(f"the Slurm node list {nodelist!r} has an open bracket: set SLURM_JOB_NODELIST again")
        choices = [[part] if place % 2 == 0 else _expand_ranges(part, nodelist) for place, part in enumerate(parts)]
        found += ["".join(pieces) for pieces in product(*choices)]
    return [host for host in found if host]


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for one in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", one)
        if not match:
            raise UserError(
                f"the Slurm node list {nodelist!r} has {one!r} in brackets, not 1-3: set SLURM_JOB_NODELIST again"
            )
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
