"""Which low precisions this processor multiplies by itself, as torch would run them here.

torch takes bfloat16 on any CPU. Where the processor has no instructions for it, oneDNN widens and rounds around every
product: on AVX2 that is 4 times slower than float32 in large products and far more in small ones, with AVX-512 alone
2.5 times. There products run in float32, whatever the width of the weights in the file (`blocks.py`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ...core.ops import DType

LOW: tuple[DType, ...] = ("bfloat16", "float16")

_X86 = ("x86_64", "amd64", "x64")

_LIMITS_WITHOUT = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
)  # fmt: skip
"""Values of oneDNN's own limit under which it has no bfloat16 products of 512 bits."""


def native(environment: Mapping[str, str] = os.environ) -> tuple[DType, ...]:
    """Return those of `LOW` that products are faster in than in float32; a reading of flags, nothing is timed.

    On x86 that is bfloat16 with AVX512_BF16 or AMX, and float16 with AMX_FP16; on Arm what oneDNN has instructions for.
    Limits that torch and oneDNN obey count as the processor's own: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.
    """
    if not torch.backends.mkldnn.is_available():  # products are then torch's own loops, in any low precision
        return ()
    found = {"bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    if platform.machine().lower() in _X86:
        limit = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        limited = not wide or limit.upper() in _LIMITS_WITHOUT
        # oneDNN calls bfloat16 supported on all of AVX-512, where it emulates it.
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        found["bfloat16"] = found["bfloat16"] and has and not limited
        amx = torch.cpu._is_amx_fp16_supported() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
        found["float16"] = amx and not limited
    return tuple(name for name in LOW if found.get(name))


def multiplies(dtype: DType) -> DType:
    """Return the width that products run in for activations of a dtype: its own, or float32 where it is emulated."""
    return "float32" if dtype in LOW and dtype not in native() else dtype
