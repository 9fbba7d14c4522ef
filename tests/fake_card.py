"""A card that is not there: whole passes on torch's fake tensors of device `cuda`, and everything a card would refuse.

    with fake_card() as card:
        passes = CardPasses(CudaOps("bfloat16", "cuda"), weights, capture=CudaCapture(torch.device("cuda")))
        …                                   kernels are recorded, graphs are captured and replayed by name only

Raises `Refused` where CUDA, torch or Triton would fail, wait for the device, or compile when nothing may:

    always       tensors of two devices in one op; values read on the host; a copy to memory that is not pinned; a
                 kernel whose arguments are not on the thread's card, not dense, or not of the dtype that it reads
    capturing    any copy between host and card, a random number, a kernel that has not been compiled before
    steady       (set by the test) a copy that waits, and a kernel that has not been compiled before

Devices are torch's own: `torch.device("cuda")` is taken where torch takes it, and refused where it wants a number.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.jit import JITFunction

from dgemma.backends.cuda.kernels import configs

Tensor = torch.Tensor

DTYPES: dict[str, tuple[torch.dtype, ...]] = (
    dict.fromkeys(
        ("held_of", "slots", "order", "tiles", "index", "token", "argmax", "noise", "canvas", "last_argmax", "stable",
         "stable_out", "stability", "listed", "count", "wanted", "kept", "argmax_out",
         "edges", "places", "best"), (torch.int32,)
    )
    | dict.fromkeys(("accepted", "stop", "greedy"), (torch.bool,))
    | dict.fromkeys(
        ("shares", "weights", "partial", "squares", "entropy", "temperature", "u", "statistics", "ceilings", "ceiling",
         "total", "total_out", "log_sums", "factor", "bound", "confidence",
         "entropy_out", "raw", "norms", "scores", "mass", "score", "moment_out"), (torch.float32,)
    )
    | dict.fromkeys(("words",), (torch.int32, torch.bfloat16))
    | dict.fromkeys(("scales", "biases"), (torch.bfloat16, torch.uint8))
    | dict.fromkeys(("parts", "out"), (torch.bfloat16, torch.float32))
)  # fmt: skip
"""What kernels read under an argument's name; bfloat16 under every other."""

STRIDED = {("_attend", "q"), ("_qkv", "q"), ("_qkv", "k"), ("_qkv", "v"), ("_qkv", "q_out")}
"""Kernels' arguments that come with strides; all others are read as dense."""

RANDOM = ("normal", "rand", "uniform", "bernoulli", "multinomial", "exponential")


class Refused(AssertionError):
    """What a card would not do, or not without waiting."""


class Card:
    """The state that torch, CUDA and Triton keep, as far as this project touches it."""

    def __init__(self) -> None:
        self.steady = False
        self.launches: Counter[str] = Counter()
        self.captures = self.replays = self.waits = 0
        self.current = 0
        self.stream: Stream = Stream(0)
        self.capturing: Any = None  # the pool that a capture fills
        self.fails_to_end = False
        self.held: dict[Any, weakref.WeakSet[Graph]] = {}  # pools, and the graphs that hold them
        self.ended_badly: set[Any] = set()
        self._compiled: set[Any] = set()
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    # ---- Kernels ------------------------------------------------------------------------------------------------

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        given = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
        known = {field.name for field in dataclasses.fields(CUDAOptions)}
        if unknown := options.keys() - known:
            raise Refused(f"{name}: Triton has no option {', '.join(unknown)}")
        bound = kernel.signature.bind(*args, **given)
        bound.apply_defaults()
        size = grid(bound.arguments) if callable(grid) else grid
        limits = (2**31 - 1, 65535, 65535)
        if not all(0 < one <= most for one, most in zip(size, limits, strict=False)):
            raise Refused(f"{name}: a grid of {size}")
        for argument, value in bound.arguments.items():
            if isinstance(value, Tensor):
                self._check_argument(name, argument, value)
        key = name, tuple(map(_kind, bound.arguments.values())), tuple(sorted(options.items(), key=str))
        if key not in self._compiled and (self.steady or self.capturing is not None):
            raise Refused(f"{name} is compiled where nothing may be")
        self._compiled.add(key)
        self.launches[name] += 1

    def _check_argument(self, kernel: str, argument: str, value: Tensor) -> None:
        where = f"{kernel}: {argument}"
        if value.device != torch.device("cuda", self.current):
            raise Refused(f"{where} is on {value.device}, and the thread launches on cuda:{self.current}")
        if value.dtype not in DTYPES.get(argument, (torch.bfloat16,)):
            raise Refused(f"{where} is {value.dtype}")
        dense = value.is_contiguous() if (kernel, argument) not in STRIDED else value.stride(-1) == 1
        if not dense:
            raise Refused(f"{where} has strides {value.stride()} for {tuple(value.shape)}")

    # ---- Operators ----------------------------------------------------------------------------------------------

    def check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Check an operator of torch that has run."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if kwargs.get("pin_memory"):
            self._pinned.update(x.untyped_storage() for x in made)
        if name in ("prim::device", "aten::lift_fresh", "aten::detach"):
            return
        if self.capturing is not None and any(word in name for word in RANDOM):
            raise Refused(f"{name} in a captured pass")
        if name == "aten::index" and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:]):
            raise Refused("an index that is a mask: how many it picks is read on the host")
        if name in ("aten::copy_", "aten::_to_copy"):
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], made[0])
            if source.device != target.device:
                self._check_copy(source, target, waits=not (kwargs.get("non_blocking") or args[2:] == (True,)))
            return
        devices = {x.device for x in (*given, *made)}
        if len(devices) > 1:
            raise Refused(f"{name} on {' and '.join(sorted(map(str, devices)))}")

    def _check_copy(self, source: Tensor, target: Tensor, *, waits: bool) -> None:
        what = f"a copy from {source.device} to {target.device}, {tuple(source.shape)}"
        if self.capturing is not None:
            raise Refused(f"{what}, in a captured pass")
        host = source if source.device.type == "cpu" else target
        waits = waits or host.untyped_storage() not in self._pinned
        self.waits += waits
        if waits and (self.steady or target is host):
            raise Refused(f"{what}, for which the host waits")

    def pin(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)

    # ---- torch.cuda ---------------------------------------------------------------------------------------------

    def index(self, device: Any, *, optional: bool = True) -> int:
        """Return a device's number as torch.cuda's functions take it."""
        if isinstance(device, int):
            return device
        device = torch.device(device) if device is not None else torch.device("cuda")
        if device.index is None and not optional:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        return self.current if device.index is None else device.index

    def set_device(self, device: Any) -> None:
        self.current = self.index(device, optional=False)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self.index(device)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, graph: Graph, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As `torch.cuda.graph`: where a capture cannot be ended, its stream and its claim on the pool stay."""
        if pool in self.ended_badly or (pool in self.held and not self.held[pool]):
            raise RuntimeError(f"pool {pool} is still being recorded to, or nobody holds it")
        if stream.device != self.current:
            raise RuntimeError(f"capturing on a stream of cuda:{stream.device} while cuda:{self.current} is current")
        before, self.stream, self.capturing = self.stream, stream, pool
        try:
            yield
        finally:
            self.capturing = None
            if self.fails_to_end:
                self.ended_badly.add(pool)
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream = before
        self.captures += 1
        self.held.setdefault(pool, weakref.WeakSet()).add(graph)


class Stream:
    def __init__(self, device: Any) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    def __init__(self, card: Card) -> None:
        self._card = card

    def replay(self) -> None:
        self._card.replays += 1


class Event:
    """Is recorded before anybody waits for it."""

    def __init__(self) -> None:
        self._recorded = False

    def record(self, stream: Any = None) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        assert self._recorded


def _kind(value: Any) -> Any:
    """What a kernel is compiled for: dtypes, whether addresses are multiples of 16, integers that are 1 or such."""
    if isinstance(value, Tensor):
        return value.dtype, value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return (1 if value == 1 else value % 16 == 0), value.bit_length() > 31
    return value if not isinstance(value, float) else float


class _Checking(TorchDispatchMode):
    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._card.check(func.name().split(".")[0], args, kwargs or {}, out)
        return out


class _Bindings(TorchFunctionMode):
    """torch's bindings that would look for a CUDA driver before they dispatch, by way of the operators behind them."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.__getitem__:
            x, index = _viewed(*args)
            return torch.ops.aten.index(x, index) if index else x
        if func is Tensor.__setitem__:
            x, index = _viewed(*args[:2])
            value = args[2] if isinstance(args[2], Tensor) else x.new_full((), args[2])
            put = torch.ops.aten.index_put_
            return put(x, index, value) if index else torch.ops.aten.copy_.default(x, value)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **kwargs)
        if func is Tensor.pin_memory:
            return self._card.pin(args[0])
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            data = np.asarray(args[0])
            usual = {"f": torch.float32, "i": torch.int64, "b": torch.bool}[data.dtype.kind]
            host = torch.empty(data.shape, dtype=kwargs.get("dtype") or usual)
            return host.to(kwargs.get("device", "cpu"))
        target = kwargs.pop("out", None)
        result = func(*args, **kwargs)
        return result if target is None else torch.ops.aten.copy_.default(target, result)


def _viewed(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Apply the parts of an index that make views; return the rest as `aten::index` takes it."""
    index = index if isinstance(index, tuple) else (index,)
    used = sum(one is not None and one is not Ellipsis for one in index)
    axis, rest = 0, []
    for one in index:
        if one is Ellipsis:
            axis += x.ndim - used
        elif one is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(one, slice):
            x, axis = torch.ops.aten.slice(x, axis, one.start, one.stop, one.step or 1), axis + 1
        elif isinstance(one, int):
            x = x.select(axis, one)
        else:
            rest += [None] * (axis - len(rest)) + [one]
            axis += 1
    return x, rest


@contextmanager
def fake_card(capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> Iterator[Card]:
    """Within, torch has two cards of a kind, and none that does anything."""
    card = Card()
    pools = iter(range(1000))
    functions: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: card.current,
        "set_device": card.set_device, "device": card.device, "stream": card.on_stream,
        "current_stream": lambda device=None: card.stream, "synchronize": lambda device=None: None,
        "Stream": lambda device=None: Stream(card.index(device)), "Event": lambda **_: Event(),
        "CUDAGraph": lambda: Graph(card), "graph": card.graph, "graph_pool_handle": lambda: next(pools),
        "get_device_capability": lambda device=None: capability, "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=multiprocessors),
        "max_memory_reserved": lambda device=None: 1 << 34, "mem_get_info": lambda device=None: (60 << 30, 80 << 30),
        "memory_reserved": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
    }  # fmt: skip

    def launch(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        card.launch(self, *args, **kwargs)

    def address(x: Tensor) -> int:
        return x.untyped_storage()._cdata * 16 + x.storage_offset() * x.element_size()

    with ExitStack() as stack:
        stack.enter_context(fake_tensor.FakeTensorMode())  # before it can be told that there is a card
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(fake_tensor.FakeTensor, "data_ptr", address, create=True))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "data_ptr", lambda x: x._cdata * 16))
        configs.card.cache_clear()
        stack.callback(configs.card.cache_clear)
        stack.enter_context(_Bindings(card))
        stack.enter_context(_Checking(card))
        yield card
