"""What a benchmark asks of a card: random weights made there, its copy bandwidth, its name, its kernels' times."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..backends.cuda.load import free_memory
from ..backends.torch.packed import QuantizedTensor
from ..checkpoints.quant import Format
from .bench import SPREAD, affine_codes, float_scale

Tensor = torch.Tensor

PART = 1 << 26
"""Weights drawn at once: 256 MB of float32."""


def maker(device: torch.device) -> Callable[[tuple[int, ...], Format | None, int], Tensor | QuantizedTensor]:
    """Return `bench.random_weight` for a device: the same distributions from torch's generator, nothing copied."""

    def make(shape: tuple[int, ...], kind: Format | None, seed: int) -> Tensor | QuantizedTensor:
        generator = torch.Generator(device).manual_seed(seed)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        if kind is None:
            draw = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return draw.normal_(0.0, SPREAD, generator=generator)
        grouped = (*shape[:-1], shape[-1] // kind.group_size)
        words = _words(shape, kind, generator, device)
        if kind.mode != "affine":
            scale = torch.full(grouped, float_scale(kind.mode), dtype=torch.uint8, device=device)
            return QuantizedTensor(words=words, scales=scale, biases=None, global_scale=None, format=kind)
        zero, spread = affine_codes(kind.bits)
        scale = torch.full(grouped, SPREAD / spread, dtype=torch.bfloat16, device=device)
        biases = None if kind.symmetric else -zero * scale
        return QuantizedTensor(words=words, scales=scale, biases=biases, global_scale=None, format=kind)

    return make


def _words(shape: tuple[int, ...], kind: Format, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw codes part by part and pack them: int32 [..., N·bits/32]; bits are 4 or 8."""
    per_word = 32 // kind.bits
    words = torch.empty((*shape[:-1], shape[-1] // per_word), dtype=torch.int32, device=device)
    flat = words.view(-1)
    for start in range(0, len(flat), PART // per_word):
        part = flat[start : start + PART // per_word]
        if kind.mode == "affine":
            zero, spread = affine_codes(kind.bits)
            draw = torch.randn(len(part) * per_word, generator=generator, device=device)
            codes = draw.mul_(spread).round_().clamp_(1 - zero, zero - 1).add_(zero).to(torch.uint8)
        else:
            codes = torch.randint(
                0, 1 << kind.bits, (len(part) * per_word,), generator=generator, device=device, dtype=torch.uint8
            )
            codes = codes & 0xBF if kind.bits == 8 else codes
        if kind.bits == 4:
            codes = codes[0::2] | codes[1::2] << 4
        part.copy_(codes.view(torch.int32))
    return words


def copy_bandwidth(device: torch.device, *, size: int = 1 << 30, repeats: int = 20) -> float:
    """Return bytes per second of a copy within the device's memory, reads and writes counted, by the median.

    What is copied is smaller where a card is nearly full.
    """
    if device.type == "cuda":
        size = min(size, free_memory(device)[0] // 4)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(repeats + 3)][3:]
    return 2 * size / statistics.median(seconds)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a run, by the device's own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def profile(run: Callable[[], Any], device: torch.device, *, passes: int) -> list[dict[str, Any]]:
    """Run something of so many passes under torch's profiler; return its kernels, the costliest first.

    Milliseconds and launches are for one pass. On the CPU they are torch's ops, their own time without their callees'.
    """
    on_card = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as recorded:
        run()
        if on_card:
            torch.cuda.synchronize(device)
    seconds, launches = Counter[str](), Counter[str]()
    for event in recorded.key_averages():
        if on_card and event.device_type.name == "CPU":
            continue  # CUDA's own calls, to which a graph's kernels may be counted once more
        spent = event.self_device_time_total if on_card else event.self_cpu_time_total
        seconds[event.key] += spent
        launches[event.key] += event.count
    return [
        {"kernel": name[:80], "ms": round(spent / 1e3 / passes, 4), "launches": round(launches[name] / passes, 2)}
        for name, spent in seconds.most_common()
        if spent > 0
    ]


def describe(device: torch.device) -> dict[str, Any]:
    """Return a row's description of where it was measured."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }
    if device.type != "cuda":
        return found | {"device": _processor(), "threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(device)
    return found | {
        "device": card.name, "capability": f"{card.major}.{card.minor}", "multiprocessors": card.multi_processor_count,
        "memory_gb": round(card.total_memory / 1e9, 2), "cuda": torch.version.cuda, "driver": _driver(),
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
