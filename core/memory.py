"""How much memory this process has held."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the process's peak resident size in bytes."""
    try:
        # getrusage's figure survives exec on Linux: a child would report the peak of whoever started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows has no getrusage; psutil keeps the same figure there
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
