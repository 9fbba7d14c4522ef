"""Running Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for other cards.

    with interpreted():                       every @triton.jit function runs in NumPy, on CPU tensors
        out = experts.gate_up(x, …)
    launches = launched(lambda: experts.gate_up(…))            on meta tensors of the real shapes: nothing runs
    built = compile_ahead_launch(launches[0], "sm_90")         → registers, shared memory, spills

Triton decides between its interpreter and its compiler when a function is decorated, by an environment variable. Here
the decorated functions stay as they are and `JITFunction`'s two entry points are exchanged while the context lasts, so
that one process can do both and nothing else in it notices.

The same tests run on a card: take the fixture `device`, put tensors there, call kernels `with running(device)`. By
default it is the CPU and the interpreter; `pytest -m gpu tests/test_cuda_*.py` runs them compiled, on the first card.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import triton
from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
"""A100; RTX 40, L4, L40; H100, H200; B100, B200."""

GUARD = 512
"""Elements of guard before and behind a buffer."""

_SENTINEL = {1: 0x5A, 2: 0x5A5A, 4: 0x5A5A5A5A, 8: 0x5A5A5A5A5A5A5A5A}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- The interpreter ----------------------------------------------------------------------------------------------


def _interpreted(function: JITFunction) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function.fn)


def _run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    _interpreted(self).run(*args, grid=grid, warmup=warmup, **kwargs)


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return _interpreted(self).rewrite()(*args, **kwargs)


# The interpreter keeps bfloat16 and 8-bit floats as integers, computes on their bits, and truncates on the way in. Here
# they are decoded to float32 before every operation and rounded to nearest even after it.

_NARROW = {
    triton.language.bfloat16: ml_dtypes.bfloat16,
    triton.language.float8e4nv: ml_dtypes.float8_e4m3fn,
    triton.language.float8e5: ml_dtypes.float8_e5m2,
}


def _decode(handle: Any) -> np.ndarray:
    narrow = _NARROW.get(handle.dtype.scalar)
    return handle.data if narrow is None else handle.data.view(narrow).astype(np.float32)


def _encode(data: np.ndarray, dtype: Any) -> Any:
    narrow = _NARROW.get(dtype.scalar)
    stored = interpreter._get_np_dtype(dtype.scalar)
    if narrow is not None and data.dtype.kind == "f":
        data = data.astype(narrow).view(stored)
    return interpreter.TensorHandle(data, dtype.scalar)


def _cast(self: Any, source: Any, dtype: Any, *_: Any) -> Any:
    data = _decode(source)
    if dtype.scalar in _NARROW:
        return _encode(data.astype(np.float32), dtype)
    return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)


def _operation(name: str, result: int) -> Callable[..., Any]:
    """Wrap `unary_op`, `binary_op` or `ternary_op`; the result has the dtype of the operand at `result`.

    But what a comparison gives is int1. The interpreter leaves it the operands' dtype, and makes integers of it when a
    scalar is spread over a block, which Triton 3.9 does not take for a mask.
    """
    plain = getattr(interpreter.InterpreterBuilder, name)

    def run(self: Any, *given: Any) -> Any:
        *handles, operation = given
        if any(handle.dtype.scalar in _NARROW for handle in handles):
            out = _encode(operation(*map(_decode, handles)), handles[result].dtype)
        else:
            out = plain(self, *given)
        return interpreter.TensorHandle(out.data, triton.language.int1) if out.data.dtype == np.bool_ else out

    return run


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if z.dtype.scalar not in _NARROW:
        return interpreter.TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    return _encode(_decode(x) * _decode(y) + _decode(z), z.dtype)  # the product of two bfloat16 is exact in float32


def _rsqrt(self: Any, x: Any) -> Any:
    return _encode((1 / np.sqrt(_decode(x))).astype(_decode(x).dtype), x.dtype)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = (_decode(x) for x in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


_REPAIRS = {
    "cast_impl": _cast, "create_fp_to_fp": _cast, "create_dot": _dot, "create_fma": _fma, "create_rsqrt": _rsqrt,
    "unary_op": _operation("unary_op", 0),
    "binary_op": _operation("binary_op", 0), "ternary_op": _operation("ternary_op", 2),
}  # fmt: skip


def _get_bf16(self: Any, value: float) -> Any:
    """A scalar constant of bfloat16, which the interpreter has of every other width."""
    return _encode(np.array([value], np.float32), triton.language.bfloat16)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_scalars(tensor: Any, scope: Any) -> None:
    """The interpreter's scalars are arrays of one element, which NumPy 2.4 no longer takes for a loop's bounds."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@contextmanager
def interpreted() -> Iterator[None]:
    """Within, kernels run in Triton's interpreter, on the CPU.

    bfloat16 rounds to nearest even after every operation, and `tl.dot` of it has exact products and float32 sums.
    """
    with (
        knobs.runtime.scope(),
        mock.patch.object(JITFunction, "run", _run),
        mock.patch.object(JITFunction, "__call__", _call),
        mock.patch.multiple(interpreter.InterpreterBuilder, **_REPAIRS),
        mock.patch.object(interpreter.InterpreterBuilder, "get_bf16", _get_bf16, create=True),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_scalars),
        np.errstate(all="ignore"),  # masked lanes compute on whatever they hold
        warnings.catch_warnings(),
    ):
        # The maximum of nothing but NaN is NaN, as on a card; NumPy's, which the interpreter takes, says so aloud.
        warnings.filterwarnings("ignore", "All-NaN (slice|axis) encountered", RuntimeWarning)
        knobs.runtime.interpret = True
        # Kernels see `tl`, the functions of Triton's own library `tl.core`: patched here, both, and once.
        language = SimpleNamespace(__globals__={"tl": triton.language, "core": triton.language.core})
        patches = interpreter._patch_lang(language)
        try:
            yield
        finally:
            patches.restore()


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
        bits = torch.full((count + 2 * GUARD,), _SENTINEL[size] if size > 1 else 0x5A, dtype=_BITS[size])
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
