"""Running Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for other cards.

    with running("cpu"):                      every @triton.jit function runs in NumPy (`interpreter.py`)
        out = experts.gate_up(x, …)
    launches = launched(lambda: experts.gate_up(…))            on meta tensors of the real shapes: nothing runs
    built = compile_ahead_launch(launches[0], "sm_90")         → registers, shared memory, spills

The same tests run on a card: take the fixture `device`, put tensors there, call kernels `with running(device)`. By
default it is the CPU and the interpreter; `pytest -m gpu tests/test_cuda_*.py` runs them compiled, on the first card.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from interpreter import interpreted

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
"""A100; RTX 40, L4, L40; H100, H200; B100, B200."""

GUARD = 512
"""Elements of guard before and behind a buffer."""

_SENTINEL = {1: 0x5A, 2: 0x7FDA, 4: 0x7FDADADA, 8: 0x7FDADADADADADADA}
"""By bytes: what a buffer is full of. As floats NaN, and as indices far beyond anything."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def running(device: str) -> AbstractContextManager[None]:
    """`interpreted()` on the CPU, nothing on a card."""
    return interpreted() if device == "cpu" else nullcontext()


# ---- Guarded buffers ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Guarded:
    """Buffers with sentinels before and behind; `check` finds writes outside, and elements that were never written."""

    device: Any = "cpu"
    _made: list[tuple[torch.Tensor, torch.Tensor, bool, str]] = field(default_factory=list)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, what: str = "output") -> torch.Tensor:
        """Return a tensor full of sentinels, every element of which the kernel has to write."""
        return self._make(shape, dtype, True, what)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32, what: str = "scratch") -> torch.Tensor:
        """Return a tensor full of sentinels, of which the kernel may leave some unwritten."""
        return self._make(shape, dtype, False, what)

    def like(self, x: torch.Tensor, what: str = "input") -> torch.Tensor:
        """Return a guarded copy: for inputs, which must stay as they are around, and for buffers updated in place."""
        copy = self._make(tuple(x.shape), x.dtype, False, what)
        return copy.copy_(x)

    def _make(self, shape: Sequence[int], dtype: torch.dtype, whole: bool, what: str) -> torch.Tensor:
        count = int(np.prod(shape))
        size = dtype.itemsize
        bits = torch.full((count + 2 * GUARD,), _SENTINEL[size], dtype=_BITS[size])
        bits = bits.to(self.device)
        inner = bits[GUARD : GUARD + count]
        self._made.append((bits, inner, whole, what))
        return inner.view(dtype).view(tuple(shape))

    def check(self) -> None:
        """Raise AssertionError where a sentinel around a buffer changed, or one inside an `empty` did not."""
        for bits, inner, whole, what in self._made:
            count, sentinel = inner.numel(), _SENTINEL[bits.element_size()]
            outside = torch.cat([bits[:GUARD], bits[GUARD + count :]])
            wrong = (outside != sentinel).nonzero().flatten()
            if len(wrong):
                at = int(wrong[0]) - GUARD
                raise AssertionError(f"{what}: {len(wrong)} writes out of bounds, the first at element {at} of the end")
            if whole and bits.element_size() > 1:
                left = (inner == sentinel).nonzero().flatten()
                assert not len(left), f"{what}: {len(left)} of {count} never written, the first at {int(left[0])}"


# ---- Launches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One `kernel[grid](…)` as it was called, before anything ran."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]  # num_warps, num_stages, …

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def launched(run: Callable[[], Any]) -> list[Launch]:
    """Return the launches that `run` makes, none of which is carried out; give it tensors of torch's device "meta"."""
    found: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {key: value for key, value in kwargs.items() if key not in self.arg_names}
        given = {key: value for key, value in kwargs.items() if key in self.arg_names}
        bound = self.signature.bind(*args, **given)
        bound.apply_defaults()
        size = grid(bound.arguments) if callable(grid) else grid
        found.append(Launch(kernel=self, grid=tuple(size), arguments=dict(bound.arguments), options=options))

    with mock.patch.object(JITFunction, "run", record):
        run()
    return found


# ---- Ahead of time ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the assembler says of one kernel on one architecture."""

    name: str
    arch: str
    registers: int
    """Per thread."""
    shared: int
    """Bytes per program, dynamic part included."""
    spill_stores: int
    """Bytes per thread."""
    spill_loads: int
    stack: int
    """Bytes of stack frame per thread; spills lie there."""
    warps: int
    serialized: bool
    """Whether Hopper's matrix instructions wait for one another, where the assembler cannot keep them in flight."""
    ptx: str = field(repr=False)

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def compile_ahead(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    arch: str = "sm_90",
    *,
    attributes: Mapping[str, Sequence[Any]] | None = None,
) -> Built:
    """Compile a kernel for a card that is not here and read the assembler's report; needs neither card nor driver.

    Args:
        kernel: decorated with `triton.jit`.
        signature: argument name → Triton's type, such as "*bf16", "i32" or "constexpr"; constexprs may be left out.
        constexprs: argument name → value.
        options: `num_warps`, `num_stages` and so on.
        arch: one of `ARCHITECTURES`.
        attributes: argument name → its attributes. By default all pointers are divisible by 16, as torch's are.
    """
    constexprs = dict(constexprs or {})
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    if attributes is None:
        aligned = [["tt.divisibility", 16]]
        attributes = {name: aligned for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs={(kernel.arg_names.index(name),): value for name, value in attributes.items()},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    said = StringIO()
    with (
        tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), knobs.compilation.scope(),
        redirect_stdout(said), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION", category=UserWarning)  # Triton 3.9
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=dict(options or {}))
    log = said.getvalue()

    def figure(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found, f"the assembler's report has no {pattern!r}: {log}"
        return int(found[1])

    return Built(
        name=kernel.fn.__name__,
        arch=arch,
        registers=figure(r"Used (\d+) registers"),
        shared=compiled.metadata.shared,
        spill_stores=figure(r"(\d+) bytes spill stores"),
        spill_loads=figure(r"(\d+) bytes spill loads"),
        stack=figure(r"(\d+) bytes stack frame"),
        warps=compiled.metadata.num_warps,
        serialized="instructions are serialized" in log,
        ptx=compiled.asm["ptx"],
    )


def compile_ahead_launch(launch: Launch, arch: str = "sm_90") -> Built:
    """`compile_ahead` for a launch as it was made: types, constants and alignment are those of its arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attributes: dict[str, Sequence[Any]] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constexprs[parameter.name] = value
            continue
        kind, key = native_specialize_impl(
            BaseBackend if isinstance(value, torch.Tensor) else CUDABackend, _Aligned(value) if
            isinstance(value, torch.Tensor) else value, parameter.is_const, not parameter.do_not_specialize,
            not parameter.do_not_specialize_on_alignment,
        )  # fmt: skip
        if kind == "constexpr":  # None, and integers that are 1
            constexprs[parameter.name] = value
            continue
        signature[parameter.name] = kind
        if isinstance(key, str):
            attributes[parameter.name] = CUDABackend.parse_attr(key)
    return compile_ahead(launch.kernel, signature, constexprs, launch.options, arch, attributes=attributes)


class _Aligned:
    """A tensor's dtype, and an address that stands for torch's 16-byte alignment (meta tensors have none)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._at = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return (1 << 20) + self._at
