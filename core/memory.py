"""How much memory this process has held."""

from __future__ import annotations

import sys


def peak_memory() -> int:
    """Return the process's peak resident size in bytes."""
    try:
        import resource
    except ImportError:  # Windows has no getrusage; psutil keeps the same figure there
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
