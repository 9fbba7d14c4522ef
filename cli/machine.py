"""What `dgemma doctor` finds out about this machine. Frameworks are asked in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

PROBE_SECONDS = 120  # the first import of a framework from a slow disk takes its time

# What each framework says of itself; printed as JSON on the last line. A crash, as of a broken driver, is its own.
PROBES = {
    "torch": f"""
import json, runpy, torch
native = runpy.run_path({str(Path(__file__).parents[1] / "backends" / "torch" / "processor.py")!r})["native"]()
cards = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    card = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    cards.append(dict(name=card.name, device=f"cuda:{{i}}", total=total, free=free,
                      capability=f"{{card.major}}.{{card.minor}}"))
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, gpus=cards, native=native)))
""",
    "mlx": """
import json
from importlib.metadata import version
import mlx.core as mx
cards = []
if mx.metal.is_available():
    info = mx.device_info()
    total = info["max_recommended_working_set_size"]
    cards.append({"name": info.get("device_name", "Apple GPU"), "device": "gpu", "total": total, "free": total})
print(json.dumps({"version": version("mlx"), "gpus": cards}))
""",
    "onnxruntime": """
import json, onnxruntime
print(json.dumps({"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers(), "gpus": []}))
""",
    "numpy": 'import json, numpy; print(json.dumps({"version": numpy.__version__, "gpus": []}))',
}

FEATURES = {  # as the kernel spells them, and as people do
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16", "amx_int8": "AMX INT8", "asimd": "NEON", "bf16": "NEON BF16", "sve": "SVE", "i8mm": "I8MM",
}  # fmt: skip


def system() -> dict[str, Any]:
    """Python, operating system, processor and memory."""
    model, flags = _processor()
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    free = memory.available if limit is None else min(memory.available, max(0, limit[0] - limit[1]))
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count()
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "threads": affinity,
        "features": [name for flag, name in FEATURES.items() if flag in flags],
        "memory_bytes": memory.total if limit is None else min(memory.total, limit[0]),
        "free_memory_bytes": free,
    }


def _processor() -> tuple[str, set[str]]:
    if sys.platform == "darwin":
        name = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout
        return name.strip() or platform.processor(), {"asimd"} if platform.machine() == "arm64" else set()
    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:  # not Linux
        return platform.processor(), set()
    flags = info.get("flags") or info.get("Features") or ""
    return info.get("model name") or platform.machine(), set(flags.split())


def _memory_limit() -> tuple[int, int] | None:
    """Limit and use in bytes of the control group that a container runs in, if it has a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # Files it has read count as used, but are given back when memory is short.
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if limit == "max" else (int(limit), int(used) - int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def frameworks() -> dict[str, dict[str, Any]]:
    """Every installed framework: its version and GPUs, or the `error` that importing it ends in."""
    return {name: _probe(code) for name, code in PROBES.items() if find_spec(name)}


def framework(name: str) -> dict[str, Any]:
    """One framework, as `frameworks` has it."""
    return _probe(PROBES[name]) if find_spec(name) else {"error": "not installed", "gpus": []}


def _probe(code: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", code], capture_output=True, text=True, errors="replace",
            timeout=PROBE_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} s", "gpus": []}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"error": said[-1] if said else f"ended by signal {-done.returncode}", "gpus": []}
    return json.loads(done.stdout.strip().splitlines()[-1])


def package_version() -> str:
    try:
        return version("dgemma")
    except PackageNotFoundError:  # run from a copy of the sources
        return "unknown"


def hub_cache() -> dict[str, Any]:
    """Where downloaded models go, and what is free there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(os.path.expanduser(HF_HUB_CACHE)).absolute()
    existing = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
    return {"path": str(place), "free_bytes": shutil.disk_usage(existing).free}
