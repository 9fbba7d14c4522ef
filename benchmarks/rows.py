"""Rows of results: what was measured, when, on which machine and at which commit, a JSON object a line."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dgemma.checkpoints.files import append_bytes
from dgemma.cli.bench import commit

RESULTS = Path(__file__).resolve().parent / "results"


def append(name: str, row: dict[str, Any], *packages: str) -> dict[str, Any]:
    """Append a row to results/`name`.jsonl, with its circumstances and the versions of packages; return all of it."""
    row = row | {package: version(package) for package in packages} | circumstances()
    RESULTS.mkdir(exist_ok=True)
    append_bytes(RESULTS / f"{name}.jsonl", f"{json.dumps(row)}\n".encode())
    return row


def circumstances() -> dict[str, Any]:
    """Return date, commit, machine and its load: other work on the machine is part of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }  # fmt: skip


def processor() -> str:
    """Return the processor's name as Linux has it, else its architecture."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
