"""Rows of results: what was measured, when, on which machine and at which commit, a JSON object a line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def append(name: str, row: dict[str, Any], *packages: str) -> dict[str, Any]:
    """Append a row to results/`name`.jsonl, with its circumstances and the versions of packages; return all of it."""
    row = row | {package: version(package) for package in packages} | circumstances()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def circumstances() -> dict[str, Any]:
    """Return date, commit, machine and its load: other work on the machine is part of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }  # fmt: skip


def commit() -> str:
    """Return the commit of this tree, with a + if tracked files differ from it; rows written so far do not count."""
    git = ["git", "-C", str(HERE)]
    state = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(exclude)results"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run(state, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # a bare machine that was lent, with a copy of the tree
        return "unknown"
    return f"{head or 'unknown'}{'+' if changed else ''}"


def processor() -> str:
    """Return the processor's name as Linux has it, else its architecture."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
