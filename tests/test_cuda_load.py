"""Weights on their way to a card, and models that do not fit: refused with the numbers, before or in the middle."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dgemma
from dgemma import DgemmaError
from dgemma.backends import cuda
from dgemma.backends.cuda import load as load_module
from dgemma.backends.cuda import passes as passes_module
from dgemma.backends.cuda.card import CardOps, _sent
from dgemma.backends.cuda.load import Room, Stager, bucketed, refusal, releasing
from dgemma.backends.cuda.passes import CardPasses, admit
from dgemma.backends.torch.blocks import whole
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints import sizes
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.checkpoints.quant import Format, dequantize, quantize
from dgemma.core import memory
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine
from dgemma.tools.bench import config_of
from loops import request
from tiny import tiny_checkpoint
from under_test import build

CPU = torch.device("cpu")
GB = 10**9

# ---- Copying ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 5 << 20])
def test_every_byte_arrives(count: int, threads: int) -> None:
    """Less than a chunk, more chunks than lanes, and parts for several threads."""
    stager = Stager(CPU, chunk=4096 if count < 1 << 20 else 3 << 20, lanes=2, threads=threads)
    source = np.random.default_rng(count).integers(0, 255, count, np.uint8)
    sent = [stager.send(source, torch.uint8), stager.send(source[::-1], torch.uint8)]
    stager.close()
    np.testing.assert_array_equal(sent[0].numpy(), source)
    np.testing.assert_array_equal(sent[1].numpy(), source[::-1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_staged_weight_is_the_packed_one(dtype: Any) -> None:
    stored = np.random.default_rng(0).standard_normal((3, 5)).astype(getattr(ml_dtypes, dtype, None) or dtype)
    ops = CardOps("bfloat16", "cpu")
    assert torch.equal(ops.pack(stored, Stager(CPU)), ops.pack(stored))


@pytest.mark.parametrize("mode", ["affine", "symmetric", "nvfp4", "mxfp8"])
def test_a_staged_quantized_weight_keeps_its_bytes(mode: str) -> None:
    kinds = {
        "affine": Format(group_size=32), "symmetric": Format(symmetric=True),
        "nvfp4": Format(mode="nvfp4", group_size=16), "mxfp8": Format(mode="mxfp8", bits=8),
    }  # fmt: skip
    w = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    q = quantize(w, kinds[mode], global_scale=0.01 if mode == "nvfp4" else None)
    staged = CardOps("bfloat16", "cpu").pack(q, Stager(CPU))
    assert isinstance(staged, QuantizedTensor) and staged.format == q.format
    np.testing.assert_array_equal(whole(staged, torch.float32).numpy(), dequantize(q))


class Late(torch.Tensor):
    """A target whose copies are made when somebody waits for the stream that they were given to."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking and Late.stream is not None
        Late.stream.pending.append(lambda: torch.Tensor.copy_(self, source))
        return self

    def record_stream(self, stream: LateStream) -> None:
        pass

    stream: LateStream | None = None


class LateStream:
    """A stream that does nothing until it has to; waiting for another stream is not the host's waiting."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.pending: list[Any] = []

    def wait_stream(self, other: LateStream) -> None:
        self.pending.append(other.run)

    def run(self) -> None:
        while self.pending:
            self.pending.pop(0)()

    def __enter__(self) -> None:
        Late.stream = self

    def __exit__(self, *_: object) -> None:
        Late.stream = None


class LateEvent:
    def __init__(self) -> None:
        self._todo: list[Any] = []

    def record(self, stream: LateStream) -> None:
        self._todo = [stream]

    def synchronize(self) -> None:
        for stream in self._todo:
            stream.run()


def test_a_buffer_is_filled_again_only_when_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that run as late as they may: when the host waits for them, or not before the end."""
    main = LateStream()

    def empty(*shape: Any, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
        assert pin_memory or device is not None
        made = torch.zeros(*shape, dtype=dtype)
        return made if pin_memory else made.as_subclass(Late)

    cuda = SimpleNamespace(
        Stream=LateStream, Event=LateEvent, stream=lambda stream: stream, current_stream=lambda device: main
    )  # fmt: skip
    names = SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8)
    monkeypatch.setattr(load_module, "torch", names)
    stager = Stager(torch.device("cuda:0"), chunk=64, lanes=3, threads=1)
    sources = [np.random.default_rng(i).integers(0, 255, 64 * i + 17, np.uint8) for i in range(9)]
    sent = [stager.send(source, torch.uint8) for source in sources]
    assert any((x.numpy() != source).any() for x, source in zip(sent, sources, strict=True)), "nothing was late"
    stager.close()
    for x, source in zip(sent, sources, strict=True):
        np.testing.assert_array_equal(x.numpy(), source)


@pytest.mark.parametrize("fails", [False, True])
def test_the_ring_is_given_back_after_loading(fails: bool) -> None:
    ops, kept = CardOps("float32", "cpu"), []
    try:
        with cuda._loading(ops) as stager:
            ops.pack(np.ones(3, np.float32), stager)
            kept.append(stager)
            assert stager._ring
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert not kept[0]._ring


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, (70 << 20) + 5])
def test_every_byte_arrives_on_the_card(count: int) -> None:
    """Of memory that begins anywhere, in fewer and in more pieces than the ring has."""
    stored = np.random.default_rng(count).integers(0, 255, count + 1, np.uint8)[1:]
    with cuda._loading(CardOps("bfloat16", "cuda")) as stager:
        sent = [_sent(stored, stager), _sent(stored[: count // 2], stager)]
        for x, source in zip(sent, (stored, stored[: count // 2]), strict=True):
            np.testing.assert_array_equal(x.cpu().numpy(), source)


# ---- Room -------------------------------------------------------------------------------------------------------


def found(shape: str = "26b", *, weights: int = 0, free: float = 0, total: float = 0, **changes: Any) -> Room:
    given: dict[str, Any] = dict(
        config=config_of(shape), weights=weights, width=2, scratch=1024, free=int(free), total=int(total)
    )
    return Room(**{**given, **changes})


@pytest.mark.parametrize("context", [1, 1024, 1025, 5000])
def test_the_cache_is_counted_as_slots_are_cut(context: int) -> None:
    """Behind at least a window's tokens; a shorter context takes less."""
    ops = CardOps("bfloat16", "cpu")
    model = SimpleNamespace(config=config_of("nano-like"))
    passes = CardPasses(ops, model)
    passes.open(context, 48)
    room = found("nano-like", scratch=passes._scratch)
    assert room.cache(context) == passes._held()
    assert bucketed(context) == passes._capacity


def test_weights_are_counted_as_they_will_be_held(tmp_path: Path) -> None:
    """By the headers alone, and by what they take on the device when they are there."""
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    ops = CardOps("bfloat16", "cpu")
    held = [ops.pack(checkpoint.tensor(name)) for name in checkpoint.names]
    want = memory.held_bytes(sizes.of_checkpoint(checkpoint), "torch", "bfloat16", gpu=True)
    assert want == sum(x.nbytes for x in held)


@pytest.mark.parametrize("free", [18, 18.3, 19, 21, 30])
def test_the_context_that_is_said_to_fit_does(free: float) -> None:
    room = found(weights=15_420_000_000, free=free * GB, total=80 * GB)
    most = room.largest_context
    assert most > 0 and refusal(room, most, "cuda:0") is None
    assert most == room.config.max_positions or refusal(room, most + 1, "cuda:0") is not None


def test_the_4bit_model_needs_less_than_18_gb() -> None:
    """What the recipe is for: with 4,096 tokens of context."""
    room = found(weights=15_420_000_000, free=24 * GB, total=24 * GB)
    assert 15.4 * GB < room.needed(4096) < 18 * GB
    assert refusal(room, 4096, "cuda:0") is None


def test_a_context_that_does_not_fit_is_refused_with_what_would() -> None:
    weights = 15 * GB
    room = found(weights=weights, free=weights + found().needed(3000), total=24 * GB)
    assert room.largest_context == 3072 and refusal(room, 3072, "cuda:0") is None
    why = refusal(room, 3073, "cuda:1")
    assert why is not None and "\n" not in why
    has = f"cuda:1 has {room.free / GB:.2f} GB of 24.00 GB free"
    for part in (has, "15.00 GB of weights", "3,073 tokens", "a context of 3,072"):
        assert part in why
    small = found("nano-like", free=GB, config=replace(config_of("nano-like"), max_positions=500))
    assert small.largest_context == 500


def test_weights_that_do_not_fit_are_refused_with_what_would() -> None:
    room = found(weights=15 * GB, free=10 * GB, total=24 * GB)
    rest = room.free - (room.needed(1) - room.weights)
    why = refusal(room, 1, "cuda:0")
    assert why is not None and "--recipe 4bit" in why
    assert f"weights of at most {rest / GB:.2f} GB would fit" in why


def test_a_model_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = CardOps("bfloat16", "cuda:0")
    monkeypatch.setattr(passes_module, "free_memory", lambda device: (8 * GB, 12 * GB))
    with pytest.raises(DgemmaError, match=re.escape("does not fit: cuda:0 has 8.00 GB of 12.00 GB free")):
        admit(config_of("26b"), 15 * GB, ops)
    admit(config_of("nano-like"), 10**7, ops)


# ---- Out of memory ----------------------------------------------------------------------------------------------


def test_running_out_gives_everything_back_and_says_so_in_a_line() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has none.")

    with (
        pytest.raises(DgemmaError, match=r"^cpu ran .* while reading: 2.00 GiB .*; take less$") as caught,
        releasing(CPU, "reading", "take less"),
    ):
        work()
    assert held[0]() is None, "the failed frames still hold what they had allocated"
    assert "\n" not in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), releasing(CPU, "reading", "take less"):
        raise ZeroDivisionError


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_loading_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `load` on, with a card's numbers made up."""
    folder = tiny_checkpoint(tmp_path)
    monkeypatch.setattr("dgemma.backends.torch.device_of", lambda device: "cuda:0")
    monkeypatch.setattr(cuda, "card_ops", lambda dtype, device: CardOps(dtype, "cpu"))
    monkeypatch.setattr(passes_module, "free_memory", lambda device: (8 * GB, 12 * GB))
    monkeypatch.setattr(CardOps, "pack", out_of_memory)
    with pytest.raises(DgemmaError, match=r"ran out of memory while loading the weights.*smaller recipe"):
        dgemma.load(folder, backend="torch", device="cuda")


@pytest.mark.parametrize("fails_at", ["zeros", "_step"])
def test_generating_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    """The request ends with a line, its pool is given back, and the next one is answered."""
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path))
    ops = CardOps("float32", "cpu")
    passes = CardPasses(ops, build(ops, checkpoint.config, checkpoint.tensor))
    engine = Engine(passes, None, prefix_bytes=0)
    sampler = SamplerConfig(steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(passes, fails_at, out_of_memory)
        with pytest.raises(DgemmaError, match=r"ran out of memory while generating.*a shorter context"):
            list(engine.add(request(5, sampler, max_new_tokens=3)).events())
        engine.run("looking", lambda: None)
    assert (passes._pool, passes._canvases, passes._lengths) == ((), {}, {})
    assert list(engine.add(request(5, sampler, max_new_tokens=3)).events())
