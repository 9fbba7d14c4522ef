"""Triton's interpreter as a stand-in for a card: its arithmetic repaired, its memory watched, its order shuffled.

    with interpreted():                       every @triton.jit function runs in NumPy, on CPU tensors
        out = experts.gate_up(x, …)

Triton decides between its interpreter and its compiler when a function is decorated, by an environment variable. Here
the decorated functions stay as they are and `JITFunction`'s two entry points are exchanged while the context lasts, so
that one process can do both and nothing else in it notices.

What the interpreter does better than a card, and what is done about it:
    one program after the other     programs run shuffled, and no launch may touch memory so that order could matter
                                    (`kernel_memory.Memory`)
    reads anywhere                  every address has to lie in a tensor that the launch was given
    fresh memory is often zero      torch fills what it allocates, floats with NaN
    exact exp, roots, quotients     all are off by two units in the last place (`COARSE`)
    NaN is the larger of any two    on the card it is not: `fmax`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import gcd
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import triton
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, mangle_type

from kernel_memory import Memory

Builder = interpreter.InterpreterBuilder


# ---- Arithmetic ---------------------------------------------------------------------------------------------------

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
    plain = getattr(Builder, name)

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


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Add a block's products up in float64 and round once to float32: near enough to a matrix unit's own sums.

    A row's result is then the same bits wherever the row stands, which no BLAS library promises of its float32.
    """
    left, right = (_decode(x).astype(np.float64) for x in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _get_bf16(self: Any, value: float) -> Any:
    """A scalar constant of bfloat16, which the interpreter has of every other width."""
    return _encode(np.array([value], np.float32), triton.language.bfloat16)


COARSE = 2.0**-22
"""Relative error of `ex2.approx`, `rsqrt.approx` and `div.full`, which is what Triton makes of exp, exp2, rsqrt and a
quotient of float32: two units in the last place. NVIDIA gives 2^-22.9 for the second and two units for the others."""


def _coarse(exact: np.ndarray, sure: np.ndarray | bool = False) -> np.ndarray:
    """Return float32 that are off by up to `COARSE`, by an amount that looks random and is a number's own.

    Subnormal results are 0, as `.ftz` has them. `sure` are exact on a card as well.
    """
    exact = exact.astype(np.float32)
    noise = (exact.view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)) * 2.0**-23 - 1.0
    rough = (exact * (1.0 + COARSE * noise)).astype(np.float32)
    rough = np.where(np.abs(rough) < 2.0**-126, np.copysign(np.float32(0), rough), rough)
    return np.where(sure | ~np.isfinite(exact), exact, rough)


def _exp2(self: Any, x: Any) -> Any:
    power = _decode(x)
    return _encode(_coarse(np.exp2(power.astype(np.float64)), power == 0), x.dtype)


def _exp(self: Any, x: Any) -> Any:
    scaled = _decode(x) * np.float32(np.log2(np.e))
    return _encode(_coarse(np.exp2(scaled.astype(np.float64)), scaled == 0), x.dtype)


def _rsqrt(self: Any, x: Any) -> Any:
    return _encode(_coarse(1 / np.sqrt(_decode(x).astype(np.float64))), x.dtype)


def _quotient(self: Any, x: Any, y: Any) -> Any:
    above, below = _decode(x), _decode(y)
    powers = np.frexp(below)[0] == 0.5
    return _encode(_coarse(above.astype(np.float64) / below, powers), x.dtype)


_REPAIRS = {
    "cast_impl": _cast, "create_fp_to_fp": _cast, "create_dot": _dot, "create_fma": _fma,
    "create_exp": _exp, "create_exp2": _exp2, "create_rsqrt": _rsqrt, "create_fdiv": _quotient,
    "create_maxnumf": lambda self, x, y: self.binary_op(x, y, np.fmax),
    "create_minnumf": lambda self, x, y: self.binary_op(x, y, np.fmin),
    "unary_op": _operation("unary_op", 0),
    "binary_op": _operation("binary_op", 0), "ternary_op": _operation("ternary_op", 2),
}  # fmt: skip


# ---- Order and memory ---------------------------------------------------------------------------------------------


def _shuffled(at: int, count: int) -> int:
    step = next(n for n in range(max(1, int(count * 0.618)), count + 2) if gcd(n, count) == 1)
    return (at * step + count // 3) % count


ORDERS: Mapping[str, Callable[[int, int], int]] = {
    "grid": lambda at, count: at,
    "reversed": lambda at, count: count - 1 - at,
    "shuffled": _shuffled,
}
"""In which order a launch's programs run: position, number of programs → number of the program."""


class Watch:
    """Stands between the interpreter and memory; `memory` is that of the launch which runs."""

    def __init__(self, order: str) -> None:
        self.memory: Memory | None = None
        self.kernels: set[str] = set()
        """Names of what has run."""
        self._order = ORDERS[order]

    def patches(self) -> dict[str, Any]:
        plain_load, plain_store = Builder.create_masked_load, Builder.create_masked_store

        def load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
            assert self.memory is not None
            self.memory.read(pointers, mask, builder.grid_idx)
            return plain_load(builder, pointers, mask, other, *rest)

        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            assert self.memory is not None
            self.memory.write(pointers, value, mask, builder.grid_idx)
            return plain_store(builder, pointers, value, mask, *rest)

        def turn(builder: Any, x: int, y: int, z: int) -> None:
            across, down, deep = builder.grid_dim
            at = self._order((x * down + y) * deep + z, across * down * deep)
            builder.grid_idx = (at // (down * deep), at // deep % down, at % deep)

        return {"create_masked_load": load, "create_masked_store": store, "set_grid_idx": turn}

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {key: value for key, value in kwargs.items() if key in function.arg_names}
        bound = function.signature.bind(*args, **given).arguments
        self.memory = Memory({name: x for name, x in bound.items() if isinstance(x, torch.Tensor)})
        self.kernels.add(function.fn.__name__)
        with np.errstate(all="ignore"):  # of this thread, which may be an engine's own
            of_interpreter(function).run(*args, grid=grid, warmup=warmup, **kwargs)


def of_interpreter(function: JITFunction) -> interpreter.InterpretedFunction:
    return interpreter.InterpretedFunction(function.fn)


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return of_interpreter(self).rewrite()(*args, **kwargs)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_scalars(tensor: Any, scope: Any) -> None:
    """The interpreter's scalars are arrays of one element, which NumPy 2.4 no longer takes for a loop's bounds."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


@contextmanager
def repaired(run: Callable[..., None], builder: Mapping[str, Any]) -> Iterator[None]:
    """Within, kernels run in the interpreter by way of `run`, with some of its builder's methods replaced."""
    with (
        knobs.runtime.scope(),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(JITFunction, "__call__", _call),
        mock.patch.multiple(Builder, **_REPAIRS, **builder),
        mock.patch.object(Builder, "get_bf16", _get_bf16, create=True),
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


@contextmanager
def _filled() -> Iterator[None]:
    """Within, torch fills what it allocates: floats with NaN, integers with their largest."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def interpreted(order: str = "shuffled") -> Iterator[Watch]:
    """Within, kernels run in Triton's interpreter, on the CPU, in one of `ORDERS`.

    bfloat16 rounds to nearest even after every operation, and `tl.dot` of it has exact products and sums that are
    rounded to float32.

    Raises:
        interpreter.InterpreterError: a launch touches memory as `Memory` forbids.
    """
    watch = Watch(order)
    with ExitStack() as stack:
        stack.enter_context(_filled())
        # A function, not a bound method: patched into a class, it is to receive the kernel as its first argument.
        stack.enter_context(repaired(lambda *args, **kwargs: watch.run(*args, **kwargs), watch.patches()))
        yield watch


# ---- Sizes beyond any memory --------------------------------------------------------------------------------------


def reach(
    kernel: JITFunction, grid: Sequence[int], arguments: Mapping[str, Any], programs: Sequence[tuple[int, int, int]],
    contents: Mapping[str, np.ndarray],
) -> Memory:  # fmt: skip
    """Run some programs of a launch whose tensors have sizes and no memory: integers overflow as on a card.

    Args:
        kernel, grid, arguments: the launch, with tensors of the device "meta".
        programs: which ones run.
        contents: what stands in some of the tensors, by argument, as far as it goes; the others are 0 throughout.

    Returns:
        what was touched.

    Raises:
        interpreter.InterpreterError: a program reads or writes outside of its tensors.
    """
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    memory = Memory(tensors)

    def load(builder: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        read = np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind))
        if other is not None:
            read[...] = other.data
        place = memory.read(pointers, mask, builder.grid_idx)
        if place is not None:
            known = contents.get(place[0].name)
            read[mask.data] = 0 if known is None else known.reshape(-1)[place[1]]
        return interpreter.TensorHandle(read, kind)

    def store(builder: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        memory.write(pointers, value, mask, builder.grid_idx)

    def as_launched(builder: Any, *_: int) -> None:
        builder.grid_dim = (*grid, 1, 1)[:3]

    def chosen(builder: Any, at: int, *_: int) -> None:
        builder.grid_idx = programs[at]

    def pointer(name: str, x: torch.Tensor) -> Any:
        kind = triton.language.str_to_ty(mangle_type(x), None)
        handle = interpreter.TensorHandle(np.array([memory.addresses[name]], np.uint64), kind)
        return triton.language.tensor(handle, kind)

    given = {name: pointer(name, x) if name in tensors else x for name, x in arguments.items()}
    methods = {"create_masked_load": load, "create_masked_store": store, "set_grid_dim": as_launched}
    with repaired(_unexpected, {**methods, "set_grid_idx": chosen}):
        of_interpreter(kernel).run(**given, grid=(len(programs),), warmup=False)
    return memory


def _unexpected(self: JITFunction, *_: Any, **__: Any) -> None:
    raise AssertionError(f"{self.fn.__name__} was launched")
