"""The flag --out that every benchmark has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.files import atomic_write_text


@dataclass(frozen=True, kw_only=True)
class Output:
    """Settings of every benchmark."""

    out: str | None = None
    """File for the results as JSON."""


def write_json(settings: Output, report: dict[str, Any]) -> None:
    """`report` into --out, where one was given."""
    if settings.out:
        atomic_write_text(Path(settings.out), json.dumps(report, indent=1) + "\n")
